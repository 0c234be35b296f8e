"""What every PyTorch script with checkpoints does alike: what train returns and leaves in the run folder, --resume and
--evaluate, signals, full disks, damaged files, NaN, bad arguments. ddpl_isaaclab.py runs on a stand-in for Isaac Lab.
"""

import contextlib
import copy
import csv
import errno
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import fake_isaac
import gymnasium
import numpy as np
import pytest
import torch
import torch._inductor.config
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.spaces import Box, Dict, Sequence
from helpers import (
    checkpoint_of,
    command,
    equal,
    error_of,
    evaluations,
    global_step,
    kill_and_resume,
    scalars,
    wait_for,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bang_bang
import ddpl_isaaclab
import ddpl_mamujoco
import ddpl_mpe
import qvpo
import srvr_npg

RUN = dict(total_timesteps=1_200, eval_interval=400, checkpoint_interval=400)
EPISODES = dict(eval_episodes=2, final_eval_episodes=3)
DDPL = dict(critic_hidden=16, actor_hidden=16, batch_size=32, actor_batch_size=16, learning_starts=200, compile=False)
ROBOT = dict(eval_episodes=1, denoising_steps=4, num_envs=4)
FAKE = dict(num_envs=8, log_interval=100, steps_per_update=16, device="cpu")
QVPO = dict(hidden=16, denoising_steps=3, num_candidates=4, batch_size=16, learning_starts=200, steps_per_update=4)
PPO = dict(num_steps=100, num_minibatches=4, update_epochs=2, action_cost=0.01)
TRAJECTORIES = dict(total_trajectories=24, eval_interval=8, checkpoint_interval=8, horizon=50)  # of 50 steps each
SRVR = dict(large_batch=4, small_batch=2, epoch_steps=3, learning_rate=1e-4)
SCRIPTS = {  # the arguments of a small run
    ddpl_mpe: RUN | EPISODES | DDPL | dict(env_id="simple_spread_v3", eval_interval=500),
    ddpl_mamujoco: RUN | EPISODES | DDPL | ROBOT | dict(scenario="Hopper", agent_conf="3x1"),
    ddpl_isaaclab: RUN | DDPL | FAKE | dict(task=fake_isaac.TASK),
    qvpo: RUN | EPISODES | QVPO | dict(env_id="Pendulum-v1", num_envs=4),
    bang_bang: RUN | EPISODES | PPO | dict(env_id="Pendulum-v1", num_envs=4),
    srvr_npg: EPISODES | TRAJECTORIES | SRVR | dict(env_id="Pendulum-v1"),
}
EVALUATED = {  # after how many steps, in how many episodes
    ddpl_mpe: {504: 2, 1_000: 2, 1_200: 3},
    ddpl_mamujoco: {400: 1, 800: 1, 1_200: 3},
    ddpl_isaaclab: {400: 8, 800: 8, 1_200: 8},
    qvpo: {400: 2, 800: 2, 1_200: 3},
    bang_bang: {400: 2, 800: 2, 1_200: 3},
    srvr_npg: {400: 2, 800: 2, 1_200: 3},
}
POLICIES = [dict(policy="diffusion"), dict(policy="gaussian")]
VARIANTS = {  # the runs whose folders are looked at
    ddpl_mpe: [
        dict(env_id=env_id) | policy
        for env_id in ("simple_spread_v3", "simple_reference_v3", "simple_speaker_listener_v4")
        for policy in POLICIES
    ],
    ddpl_mamujoco: [
        dict(scenario=scenario, agent_conf=agent_conf) | policy
        for scenario, agent_conf in (("Hopper", "3x1"), ("HalfCheetah", "6x1"))
        for policy in POLICIES
    ],
    ddpl_isaaclab: POLICIES,
    qvpo: [dict()],
    bang_bang: [
        dict(policy="bernoulli"),
        dict(policy="categorical"),
        dict(policy="categorical", bins=5),
        dict(policy="gaussian"),
        dict(policy="gaussian", squash="tanh"),
    ],
    srvr_npg: [dict(algorithm=algorithm) for algorithm in ("pg", "npg", "srvr-pg", "srvr-npg")],
}


def name_of(value):
    return getattr(value, "__name__", str(value))


def cases(table):
    """Every script with each of its values in a table."""
    pairs = [(script, value) for script, values in table.items() for value in values]
    return pytest.mark.parametrize("script, options", pairs, ids=name_of)


def every(*scripts):
    return pytest.mark.parametrize("script", scripts, ids=name_of)


every_script = every(*SCRIPTS)
module_scripts = every(*(script for script in SCRIPTS if script is not srvr_npg))  # whose learner is a torch module
one_process_scripts = every(*(script for script in SCRIPTS if script is not ddpl_isaaclab))
gymnasium_scripts = every(qvpo, bang_bang, srvr_npg)


@pytest.fixture(scope="module", autouse=True)
def fake_isaac_lab():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in fake_isaac.install()[0].items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(ddpl_isaaclab, "version", lambda package: "none")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains a script with these options, once; returns what train did, its folder as a whole path."""
    results = {}

    def train(script, **options):
        args = script.Args(**SCRIPTS[script] | options)
        if str(args) not in results:
            with contextlib.chdir(tmp_path_factory.mktemp("trained")):
                result = script.train(args)
                results[str(args)] = result | {"run_dir": Path(result["run_dir"]).absolute()}
        return results[str(args)]

    return train


@pytest.fixture
def finished(script, trained):
    """The folder of a finished run of the test's script."""
    return trained(script)["run_dir"]


@pytest.fixture
def no_training(script, finished, monkeypatch):
    """Whatever gets as far as the training loop has been accepted."""
    monkeypatch.setattr(script, "training_loop", lambda args, *_: pytest.fail(f"accepted {args}"))


def loaded(run_dir):
    return checkpoint_of({"run_dir": run_dir})


def differing(ours, theirs):
    """The names of what differs between two checkpoints, besides the progress, which has the time."""
    return {name for name in ours.keys() | theirs.keys() if not equal(ours[name], theirs[name])} - {"progress"}


def log_and_evaluate_every(steps, script):
    return {name: steps for name in ("log_interval", "eval_interval") if hasattr(script.Args(), name)}


# ---- what a run returns and leaves


@cases(VARIANTS)
def test_run_folder_and_result(script, options, trained):
    arguments, result = SCRIPTS[script] | options, trained(script, **options)
    assert result.keys() >= {"run_dir", "global_step", "final_return", "episodic_returns", "env_steps_per_second"}
    assert result["global_step"] == 1_200 and len(result["episodic_returns"]) == EVALUATED[script][1_200]
    assert result["final_return"] == pytest.approx(np.mean(result["episodic_returns"]))
    run_dir = result["run_dir"]
    task = "-".join(arguments[name] for name in ("env_id", "scenario", "agent_conf", "task") if name in arguments)
    assert run_dir.name.startswith(f"{script.__name__}__{task}__1__")
    assert list(run_dir.glob("events.out.tfevents*")) and (run_dir / "checkpoint.pt").exists()
    assert (run_dir / "team.safetensors").exists() == hasattr(script, "save_team")
    assert json.loads((run_dir / "args.json").read_text()).items() >= arguments.items()
    written = json.loads((run_dir / "result.json").read_text())
    package = {ddpl_mpe: "mpe2", ddpl_mamujoco: "mujoco", ddpl_isaaclab: "isaaclab"}.get(script, "gymnasium")
    assert {"torch", package} < written.pop("versions").keys()
    assert written | {"run_dir": run_dir} == result
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert tuple(rows[0]) == script.EVALUATION_COLUMNS
    assert [(int(row["global_step"]), row["mode"], int(row["episodes"])) for row in rows] == [
        (step, mode, episodes)
        for step, episodes in EVALUATED[script].items()
        for mode in ("stochastic", "deterministic")
    ]
    assert float(rows[-1]["return_mean"]) == pytest.approx(result["final_return"])
    assert all(float(rows[-1][name]) == result[name] for name in rows[-1].keys() & result.keys())  # such as successes


@cases({script: VARIANTS[script] for script in (ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab)})
def test_stored_actions_are_padded_with_zeros(script, options, trained):
    result = trained(script, **options)
    action_sizes = {
        "simple_spread_v3": [2, 2, 2],
        "simple_reference_v3": [12, 12],
        "simple_speaker_listener_v4": [3, 2],
        "Hopper-3x1": [1, 1, 1],
        "HalfCheetah-6x1": [1, 1, 1, 1, 1, 1],
        fake_isaac.TASK: [2, 1],
    }[result["run_dir"].name.split("__")[1]]
    for buffer in buffers_of(checkpoint_of(result)):
        actions = buffer["data"][1]
        padding = torch.arange(actions.shape[-1]) >= torch.tensor(action_sizes)[:, None]
        assert (actions[:, padding] == 0).all() and (actions[:, ~padding] != 0).any()


def buffers_of(checkpoint):
    """The replay buffers, one for every process; of bang_bang.py none."""
    return [checkpoint["buffer"]] if "buffer" in checkpoint else checkpoint.get("buffers", [])


@cases({bang_bang: VARIANTS[bang_bang]})
def test_costs_saturation_and_switching_are_measured(script, options, trained):
    *_, row = evaluations(trained(script, **options)["run_dir"])
    cost, free, saturation, switching = (
        float(row[name]) for name in ("return_mean", "return_without_cost", "saturation", "switching_rate")
    )
    assert cost <= free <= 0 and 0 <= switching <= 1
    assert saturation == 1 if options["policy"] == "bernoulli" else 0 <= saturation <= 1


@every_script
def test_same_seed_same_run_and_other_seed_another(script, finished):
    first = loaded(finished)
    again, other = (checkpoint_of(script.train(script.Args(**SCRIPTS[script], seed=seed))) for seed in (1, 2))
    assert not differing(first, again)
    assert differing(first, other) == first.keys() - {"script", "device", "progress"}
    for ours, theirs in zip(buffers_of(first), buffers_of(other), strict=True):
        assert not torch.equal(ours["data"][0][0], theirs["data"][0][0])  # other episodes, too


@pytest.mark.slow
@one_process_scripts  # not ddpl_isaaclab.py, which evaluates in the training's simulation
def test_evaluation_does_not_disturb_training(script, finished):
    often = script.Args(**SCRIPTS[script] | log_and_evaluate_every(100, script))
    assert differing(checkpoint_of(script.train(often)), loaded(finished)) == {"args"}


# ---- evaluate


@every(ddpl_mpe, ddpl_mamujoco)
def test_the_team_of_a_run_plays_its_last_evaluation_again(script, finished):
    """Its averaged weights, alone, give the numbers of the result."""
    policy, args = script.load_team(finished / "team.safetensors")
    result = json.loads((finished / "result.json").read_text())
    again = script.evaluate(policy, args, len(result["episodic_returns"]), True, result["global_step"])
    assert again.tolist() == result["episodic_returns"]
    learned = loaded(finished)["learner"]
    assert torch.equal(policy.hidden.weight, learned["average_policy.hidden.weight"])
    assert not torch.equal(policy.hidden.weight, learned["policy.hidden.weight"])


@one_process_scripts
def test_evaluate_prints_returns_and_films(script, finished, monkeypatch, capsys):
    """But for ddpl_mamujoco.py's films, which not every machine can draw."""
    film = {ddpl_mpe: "team_{}.gif", ddpl_mamujoco: None}.get(script, "{}.gif")
    flags = command(script, evaluate=finished, final_eval_episodes=5, seed=7, capture_video=film is not None)
    monkeypatch.setattr(sys, "argv", flags[1:])
    script.main(*script.read_command_line())
    printed = capsys.readouterr().out
    for word in ("5 episodes", *(("saturation 1.00", "switching_rate") if script is bang_bang else ())):
        assert word in printed
    for mode in ("stochastic", "deterministic"):
        assert mode in printed and (film is None or (finished / film.format(mode)).read_bytes()[:3] == b"GIF")


# ---- kills and signals


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, kill_at, options",
    [
        (ddpl_mpe, (400, 1_200), dict(policy="diffusion", total_timesteps=2_000)),
        (ddpl_mpe, (400, 1_200), dict(policy="gaussian", total_timesteps=2_000)),
        (
            ddpl_mamujoco,
            (400,),
            dict(scenario="HalfCheetah", agent_conf="6x1", policy="gaussian", total_timesteps=1_600)
            | dict(eval_interval=1_200, final_eval_episodes=1),
        ),
        (
            qvpo,
            (500, 1_250),
            dict(env_id="Hopper-v5", num_envs=2, total_timesteps=2_000, eval_interval=1_000, checkpoint_interval=250),
        ),
        (
            bang_bang,
            (800, 2_000),
            dict(env_id="Hopper-v5", num_envs=2, total_timesteps=4_000, update_epochs=10, num_minibatches=10),
        ),
    ],
    ids=name_of,
)
def test_killed_and_resumed_equals_never_killed(script, kill_at, options):
    """Episodes of Hopper end at different times in its copies."""
    kill_and_resume(script, kill_at, **SCRIPTS[script] | options)


@every_script
def test_resuming_a_finished_run_repeats_its_result(script, finished):
    before, rows = json.loads((finished / "result.json").read_text()), evaluations(finished)
    result = script.train(script.Args(resume=str(finished)))
    assert result["episodic_returns"] == before["episodic_returns"] and result["global_step"] == 1_200
    assert evaluations(finished) == rows
    assert 0.5 < result["env_steps_per_second"] / before["env_steps_per_second"] < 2  # of all parts together


class AfterChecks(list):
    """Signals that arrive when they have been asked for a number of times."""

    def __init__(self, checks):
        super().__init__([signal.SIGINT])
        self.checks = checks

    def __bool__(self):
        self.checks -= 1
        return self.checks < 0


@every_script
def test_stopped_and_resumed_equals_never_stopped(script, finished):
    """ddpl_mpe.py between two episodes and srvr_npg.py between two batches, where they save; the others at once."""
    checks = {ddpl_mpe: 5, ddpl_isaaclab: 5, srvr_npg: 6}.get(script, 150)
    with pytest.raises(script.Stopped) as stopped:
        script.train(script.Args(**SCRIPTS[script]), signals=AfterChecks(checks))
    (run_dir,) = Path("runs").iterdir()
    saved = "" if script in (ddpl_mpe, srvr_npg) else " the last checkpoint is from step 400;"
    assert str(stopped.value) == f"stopped at step 600;{saved} go on with --resume {run_dir}"
    assert loaded(run_dir)["progress"]["global_step"] == (400 if saved else 600)
    script.train(script.Args(resume=str(run_dir)))
    assert not differing(loaded(run_dir), loaded(finished))
    assert evaluations(run_dir) == evaluations(finished)
    assert equal(scalars(run_dir), scalars(finished))


def test_isaac_labs_log_points_before_the_first_update_change_nothing():
    """Each draws random numbers of training's, also where a resumed run has made no update yet."""
    options = SCRIPTS[ddpl_isaaclab] | dict(log_interval=8)
    whole = Path(ddpl_isaaclab.train(ddpl_isaaclab.Args(**options))["run_dir"])
    with pytest.raises(ddpl_isaaclab.Stopped) as stopped:
        ddpl_isaaclab.train(ddpl_isaaclab.Args(**options), signals=AfterChecks(60))
    run_dir = Path(str(stopped.value).rpartition(" ")[2])
    assert loaded(run_dir)["progress"]["global_step"] == 400
    ddpl_isaaclab.train(ddpl_isaaclab.Args(resume=str(run_dir)))
    assert not differing(loaded(run_dir), loaded(whole)) and evaluations(run_dir) == evaluations(whole)


@every_script
def test_stopped_before_the_last_evaluation(script, finished, monkeypatch):
    signals, save = [], script.save_checkpoint

    def save_and_interrupt(run_dir, args, progress, *others):
        save(run_dir, args, progress, *others)
        if progress.global_step == 1_200:
            signals.append(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save_and_interrupt)
        with pytest.raises(script.Stopped, match="stopped at step 1200"):
            script.train(script.Args(**SCRIPTS[script]), signals=signals)
    (run_dir,) = Path("runs").iterdir()
    assert not (run_dir / "result.json").exists()
    script.train(script.Args(resume=str(run_dir)))
    assert evaluations(run_dir) == evaluations(finished)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_command_in_order(number, code):
    options = SCRIPTS[ddpl_mpe] | dict(total_timesteps=1_000_000, eval_interval=1_000_000)
    process = subprocess.Popen(command(ddpl_mpe, **options), stderr=subprocess.PIPE, text=True)
    wait_for(process, lambda: list(Path("runs").glob("*/checkpoint.pt")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    (run_dir,) = Path("runs").iterdir()
    assert process.returncode == code and "Traceback" not in errors
    step = global_step(run_dir / "checkpoint.pt")
    assert errors.splitlines()[-1] == f"stopped at step {step}; go on with --resume {run_dir}"


def test_signal_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ddpl_mpe.noted_signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# ---- the run folder


@every_script
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_missing_run_folder_names_those_there_are(script, flag, finished, monkeypatch):
    monkeypatch.chdir(finished.parent.parent)
    message = error_of(script, **{flag: "runs/nothing_here"})
    assert f"--{flag}" in message and "nothing_here" in message and finished.name in message


@every_script
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_run_with_other_arguments_is_left_as_it_is(script, flag, finished):
    name, ran, asked = {
        ddpl_mpe: ("env_id", "simple_spread_v3", "simple_reference_v3"),
        ddpl_mamujoco: ("agent_conf", "3x1", "1x3"),
        ddpl_isaaclab: ("task", fake_isaac.TASK, fake_isaac.ONE_AGENT),
        qvpo: ("preset", "laptop", "paper"),
        bang_bang: ("policy", "bernoulli", "gaussian"),
        srvr_npg: ("algorithm", "srvr-npg", "pg"),
    }[script]
    before = (finished / "checkpoint.pt").read_bytes()
    message = error_of(script, **{flag: str(finished), name: asked})
    assert f"ran with --{name.replace('_', '-')} {ran}, not {asked}" in message
    assert (finished / "checkpoint.pt").read_bytes() == before


@every_script
def test_checkpoints_of_another_script_or_version(script, finished, tmp_path):
    contents = loaded(finished)
    torch.save(contents | {"script": "theirs"}, tmp_path / "checkpoint.pt")
    assert f"belongs to theirs.py, not to {script.__name__}.py" in error_of(script, resume=str(tmp_path))
    contents["args"].pop("gamma")
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert "is from another version" in error_of(script, resume=str(tmp_path))


@every_script
def test_a_run_in_use_is_left_alone(script, finished, no_training):
    with script.locked(finished):
        message = error_of(script, resume=str(finished))
    assert "in use by process" in message and str(os.getpid()) in message
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        script.train(script.Args(resume=str(finished)))  # the lock is gone with its holder


@every_script
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_an_empty_folder_name_is_refused(script, flag):
    assert f"--{flag}: there is no checkpoint.pt in ''" in error_of(script, **{flag: ""})
    assert not Path("runs").exists()


@every_script
def test_a_file_in_the_place_of_the_run_folders(script):
    Path("runs").write_text("")
    assert "runs" in error_of(script, **SCRIPTS[script])


@every_script
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_keeps_the_checkpoint_before(script, failure, monkeypatch):
    save, calls = torch.save, []

    def fill_the_disk(contents, path):
        save(contents, path)
        calls.append(path)
        if len(calls) == 2:
            raise failure

    monkeypatch.setattr(torch, "save", fill_the_disk)
    message = error_of(script, **SCRIPTS[script])
    assert "cannot write" in message and "the one before stays" in message
    (run_dir,) = Path("runs").iterdir()
    assert global_step(run_dir / "checkpoint.pt") == 0 and not (run_dir / "checkpoint.pt.tmp").exists()


@every(ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab, qvpo)
def test_memory_that_cannot_be_had(script, monkeypatch):
    def refuse(*shape, **_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(script.RunError, match="--buffer-size: no memory for 1000 transitions"):
        script.ReplayBuffer(1000, [(3,)])


@every_script
def test_networks_too_large_for_the_memory(script):
    (width,) = [name for name in ("hidden", "critic_hidden") if hasattr(script.Args(), name)]
    assert "memory" in error_of(script, **SCRIPTS[script] | {width: 4_000_000_000})


@module_scripts
def test_what_adam_keeps_is_finite_in_a_checkpoint(script, monkeypatch):
    """A gradient of 1e20 leaves the weights finite, but not its square."""

    def overflow(self, gradients):
        next(iter(self.state.values()))["exp_avg_sq"].fill_(math.inf)

    monkeypatch.setattr(script.Adam, "descend", overflow)
    assert "Adam's exp_avg_sq is NaN or infinite at step" in error_of(script, **SCRIPTS[script])
    (run_dir,) = Path("runs").iterdir()
    assert global_step(run_dir / "checkpoint.pt") == 0


def test_experiment_name_and_tables(monkeypatch):
    """--exp-name, the text tab of TensorBoard, and what Weights & Biases is told."""
    told = {}
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: told.update(options)))
    options = dict(exp_name="trial-1", track=True, wandb_entity="the-team", total_timesteps=300)
    result = ddpl_mpe.train(ddpl_mpe.Args(**SCRIPTS[ddpl_mpe] | options))
    assert Path(result["run_dir"]).name.startswith("trial-1__simple_spread_v3__1__")
    assert told["entity"] == "the-team" and told["config"]["gamma"] == 0.95 and told["sync_tensorboard"]
    events = EventAccumulator(result["run_dir"]).Reload()
    (text,) = events.Tensors("arguments/text_summary")
    assert b"|gamma|0.95|" in text.tensor_proto.string_val[0]


@every_script
def test_a_renamed_copy_refuses_the_originals_checkpoints(script, finished, tmp_path):
    path = tmp_path / "my_fork.py"
    shutil.copy(script.__file__, path)
    spec = importlib.util.spec_from_file_location("my_fork", path)
    fork = importlib.util.module_from_spec(spec)
    sys.modules["my_fork"] = fork  # dataclasses look their module up
    spec.loader.exec_module(fork)
    assert fork.Args().exp_name == "my_fork"
    message = error_of(fork, resume=str(finished))
    assert f"belongs to {script.__name__}.py, not to my_fork.py" in message


# ---- damaged checkpoints


@every_script
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_half_a_file_is_left_as_it_is(script, flag, finished, tmp_path):
    halves = {}
    for path in (*finished.glob("checkpoint.pt"), *finished.glob("team.safetensors")):
        halves[tmp_path / path.name] = path.read_bytes()[: path.stat().st_size // 2]
    for path, half in halves.items():
        path.write_bytes(half)
    assert "is damaged" in error_of(script, **{flag: str(tmp_path)})
    assert all(path.read_bytes() == half for path, half in halves.items())


def places(contents, path=()):
    """The paths of all that a checkpoint holds; of a list, its first entry stands for the others but for a buffer's."""
    items = contents.items() if isinstance(contents, dict) else enumerate(contents if "data" in path else contents[:1])
    for name, value in items:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def damages(contents):
    """(description, damaged copy) for every place: missing, and of a wrong type or size."""
    for path in places(contents):
        for kind in ("missing", "another type", "another size", "NaN"):
            damaged = copy.deepcopy(contents)
            inside = damaged
            for name in path[:-1]:
                inside = inside[name]
            value = inside[path[-1]]
            if kind == "missing":
                if path[-2:] == ("rows", 0):
                    continue  # a shorter table is a table
                del inside[path[-1]]
            elif kind == "another type":
                inside[path[-1]] = 7.5 if isinstance(value, str | None) or path[0] == "args" else "x"
                if isinstance(value, float) and path[0] == "args":
                    inside[path[-1]] = "x"
            elif isinstance(value, torch.Tensor) and kind == "another size":
                inside[path[-1]] = torch.cat([value.flatten(), value.flatten()[:1]])
            elif isinstance(value, torch.Tensor) and value.is_floating_point():
                inside[path[-1]] = value * math.nan
            elif path[-1] == "added":  # to a replay buffer
                inside["added"] = 5 if kind == "another size" else -8
            else:
                continue
            if path[0] != "script":
                yield f"{'.'.join(map(str, path))}: {kind}", damaged


@pytest.mark.slow
@every_script
def test_damaged_parts_are_refused(script, finished, no_training, tmp_path, subtests):
    """Every part of a checkpoint, one by one: a sentence, never a traceback, and the file stays as it is."""
    contents = loaded(finished)
    cases = list(damages(contents))
    assert len(cases) > 80
    path = tmp_path / "checkpoint.pt"
    for name, damaged in cases:
        with subtests.test(name):
            torch.save(damaged, path)
            before = path.read_bytes()
            message = error_of(script, resume=str(tmp_path))
            version, processes = name.startswith("args.") and name.endswith("missing"), name == "buffers.0: missing"
            said = "from another version" if version else "ran in 0 processes, not 1" if processes else "is damaged"
            assert "--resume" in message and said in message
            assert path.read_bytes() == before


@every_script
def test_one_flipped_bit_is_noticed(script, finished, no_training, tmp_path):
    contents = bytearray((finished / "checkpoint.pt").read_bytes())
    weight = loaded(finished)["learner"]
    largest = max(weight.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    contents[contents.index(largest) + len(largest) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(contents)
    assert "damaged" in error_of(script, resume=str(tmp_path))
    if not hasattr(script, "save_team"):  # else --evaluate reads the team's file: tests/test_teams.py
        assert "damaged" in error_of(script, evaluate=str(tmp_path))


@gymnasium_scripts
def test_weights_that_are_nan_are_not_played(script, finished, tmp_path):
    contents = loaded(finished)
    next(iter(contents["learner"].values())).fill_(math.nan)
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert "damaged" in error_of(script, evaluate=str(tmp_path))


@every(bang_bang)
@pytest.mark.parametrize("index, value", [(1, -1e-3), (2, 0.0), (4, -1.0), (5, -1.0)])
def test_impossible_statistics(script, index, value, finished, tmp_path):
    """Negative variances and counts that are not positive are of the right shape and type."""
    contents = loaded(finished)
    contents["normalizer"]["statistics"][index].fill_(value)
    torch.save(contents, tmp_path / "checkpoint.pt")
    for flag in ("resume", "evaluate"):
        assert "damaged" in error_of(script, **{flag: str(tmp_path)})


@gymnasium_scripts
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_module_is_imported_on_the_users_word_alone(script, flag, finished, no_training, tmp_path, monkeypatch):
    """gym.make imports what stands before a colon: not because a checkpoint says so."""
    (tmp_path / "payload.py").write_text("open('imported', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    contents, env_id = loaded(finished), "payload:Pendulum-v1"
    contents["args"]["env_id"] = env_id
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert env_id in error_of(script, **{flag: str(tmp_path)})
    assert env_id in error_of(script, given=["seed"], **{flag: str(tmp_path), "seed": 1})
    assert not Path("imported").exists() and "payload" not in sys.modules
    with pytest.raises(pytest.fail.Exception, match=f"accepted .*env_id='{env_id}'"):
        script.train(script.Args(resume=str(tmp_path), env_id=env_id))
    assert Path("imported").exists()
    del sys.modules["payload"]


# ---- what is not a number


def poison(script, monkeypatch, what, at):
    """Make the observation or the reward of a run's step `at` NaN, or the observation of every reset (0)."""
    own = {
        ddpl_mpe: ddpl_mpe.VectorMPE,
        ddpl_mamujoco: ddpl_mamujoco.StackedAgents,
        ddpl_isaaclab: fake_isaac.FakeMARLEnv,
    }
    owner = own.get(script, PendulumEnv)
    reset, step, size, calls = owner.reset, owner.step, 8 if script is ddpl_mpe else 1, []

    def nan(value):
        if isinstance(value, dict):
            return value | {name: value[name] * np.nan for name in ("obs", "left") if name in value}
        return value * np.nan

    def poisoned_reset(self, *args, **options):
        result = reset(self, *args, **options)
        return (nan(result[0]), *result[1:]) if isinstance(result, tuple) else nan(result)

    def poisoned_step(self, actions):
        obs, reward, *others = step(self, actions)
        calls.append(size)
        if sum(calls) != at:
            return obs, reward, *others
        return (nan(obs), reward, *others) if what == "an observation" else (obs, nan(reward), *others)

    if at == 0:
        monkeypatch.setattr(owner, "reset", poisoned_reset)
    monkeypatch.setattr(owner, "step", poisoned_step)


@pytest.mark.filterwarnings("ignore:.*WARN")  # of Gymnasium, about NaN
@one_process_scripts  # ddpl_isaaclab.py looks at log points: test_ddpl_isaaclab.py
@pytest.mark.parametrize(
    "what, at", [("an observation", 0), ("an observation", 24), ("an observation", 600), ("the reward", 600)]
)
def test_nan_of_a_task_stops_the_run_and_loses_nothing(script, what, at, monkeypatch):
    """At a reset, in warm-up and while learning."""
    with monkeypatch.context() as patch:
        poison(script, patch, what, at)
        message = error_of(script, **SCRIPTS[script] | log_and_evaluate_every(10_000, script))
    assert f"{what} is NaN or infinite at step {at}" in message
    (run_dir,) = Path("runs").iterdir()
    assert global_step(run_dir / "checkpoint.pt") == at // 400 * 400
    assert script.train(script.Args(resume=str(run_dir)))["global_step"] == 1_200


@pytest.mark.filterwarnings("ignore:.*WARN")
@every_script
@pytest.mark.parametrize("what", ["an observation", "the reward"])
def test_nan_in_an_evaluation(script, what, finished, monkeypatch):
    """A policy cannot choose by an observation; a reward would become the result."""
    first_step = 8 if script is ddpl_mpe else 1
    poison(script, monkeypatch, what, 0 if what == "an observation" else first_step)
    message = error_of(script, evaluate=str(finished))
    task = {ddpl_mpe: " of simple_spread_v3", ddpl_mamujoco: "", ddpl_isaaclab: ""}.get(script, " of Pendulum-v1")
    told = what if what == "an observation" else "a reward" if script is bang_bang else "a return"
    assert f"{told}{task} is NaN or infinite in an evaluation" in message


@module_scripts
def test_nan_weights_are_never_saved(script, monkeypatch):
    poisoned = []

    def poison_the_critic(learner, *_):
        poisoned.extend(name for name, _ in learner.named_parameters() if name.startswith(("critic", "value")))
        with torch.no_grad():
            learner.get_parameter(poisoned[0]).view(-1)[0] = math.nan
        return {}

    monkeypatch.setattr(script, "update", poison_the_critic)
    message = error_of(script, **SCRIPTS[script] | log_and_evaluate_every(10_000, script))
    assert f"{poisoned[0]} is NaN or infinite at step 400" in message
    (run_dir,) = Path("runs").iterdir()
    assert loaded(run_dir)["learner"][poisoned[0]].isfinite().all()


@cases(
    {
        ddpl_mpe: [{rate: 1e30} | p for rate in ("critic_lr", "actor_lr", "temperature_lr") for p in POLICIES],
        ddpl_mamujoco: [dict(critic_lr=1e30)],
        ddpl_isaaclab: [dict(critic_lr=1e30) | policy for policy in POLICIES],
        qvpo: [dict(critic_lr=1e30), dict(actor_lr=1e30)],
        bang_bang: [dict(learning_rate=1e30)],
        srvr_npg: [dict(learning_rate=1e200)],
    }
)
def test_a_diverging_run_says_where(script, options):
    message = error_of(script, **SCRIPTS[script] | options | log_and_evaluate_every(10_000, script))
    assert f"{'the action' if script is ddpl_mpe else ''} is NaN or infinite at step" in message


# ---- arguments

INVALID = [  # in every script that has the first of them
    dict(seed=-1),
    dict(seed=99999999999999999999),
    dict(seed="1"),
    dict(num_envs=0),
    dict(num_envs=True),
    dict(num_envs=10**12),
    dict(num_agents=-1),
    dict(total_timesteps=-5),
    dict(total_timesteps=1e5),
    dict(learning_starts=1000, total_timesteps=1000),  # would never start
    dict(gamma=1.5),
    dict(gamma="high"),
    dict(gamma=math.nan),
    dict(tau=0.0),
    dict(average_decay=1.0),
    dict(critic_lr=math.nan),
    dict(actor_lr=math.nan),
    dict(actor_lr="fast"),
    dict(learning_rate=math.nan),
    dict(anneal_lr=1),
    dict(max_grad_norm=0.0),
    dict(policy="beta"),
    dict(preset=["laptop"]),
    dict(batch_size=0),
    dict(batch_size=401, buffer_size=400),
    dict(buffer_size=3, num_envs=4),
    dict(actor_hidden=0),
    dict(hidden=0),
    dict(hidden="wide"),
    dict(hidden=128.0),
    dict(denoising_steps=0),
    dict(num_threads=1025),
    dict(block_size=0),
    dict(init_temperature=0.0),
    dict(init_temperature=1e-300),
    dict(target_entropy=1.0),
    dict(target_entropy=-math.inf),
    dict(sigmas=()),
    dict(sigmas=(0.1, -0.1)),
    dict(num_per_kernel=1, num_uniform=0, sigmas=(0.1,)),
    dict(num_critics=1),
    dict(pessimism=-0.1),
    dict(pessimism=math.inf),
    dict(actor_batch_size=30),  # not a multiple of four critics
    dict(actor_batch_size=64, batch_size=32),
    dict(num_candidates=1),
    dict(policy_frequency=True),
    dict(entropy_coefficient=-0.1),
    dict(min_entropy_coefficient=1e300),
    dict(bins=1),
    dict(bins=1001),
    dict(num_steps=0),
    dict(num_minibatches=2048),
    dict(num_minibatches=25, num_steps=101),  # twenty of five steps and one of one step, which has no deviation
    dict(gae_lambda=-0.1),
    dict(clip_coef=0.0),
    dict(action_cost=-0.1),
    dict(action_cost=1e300),
    dict(ent_coef=1e300),
    dict(vf_coef=math.inf),
    dict(checkpoint_interval=0),
    dict(device="gpu"),
    dict(device="cuda:9"),
    dict(compile=1),
    dict(exp_name="../elsewhere"),
]


def refusal(script, **options):
    """The error where the first option is wrong: it is named with what it must be, and no run folder is left."""
    message = error_of(script, **options)
    assert f"--{next(iter(options)).replace('_', '-')}" in message and "must be" in message
    assert not Path("runs").exists()
    return message


@cases({script: [o for o in INVALID if hasattr(script.Args(), next(iter(o)))] for script in SCRIPTS})
def test_invalid_values_are_refused_by_name(script, options):
    refusal(script, **options)


@gymnasium_scripts
@pytest.mark.parametrize(
    "space",
    [
        Box(-1, 1, (1, 3)),
        Box(-1, 1, ()),
        Box(-1, 1, (0,)),
        Box(0, 3, (2,), np.int64),
        Box(np.float32([0, 0]), np.float32([0, 1])),
        Box(-3.4e38, 3.4e38, (1,)),
        Box(-np.inf, 1, (1,)),
        Dict(),
        None,
    ],
    ids=str,
)
def test_spaces_that_do_not_fit_are_refused(script, space, monkeypatch):
    """Broadcasting would let them train, wrongly. None: the observations are a sequence."""
    env = PendulumEnv()
    if space is None:
        env.observation_space = Sequence(Box(0, 1))
    else:
        env.action_space = space
    monkeypatch.setattr(gymnasium, "make", lambda *_, **__: env)
    told = "observations" if space is None else "actions"
    assert f"--env-id: Pendulum-v1 has {told} " in error_of(script, **SCRIPTS[script])


@every_script
def test_without_memory_there_is_a_sentence(script, monkeypatch):
    """Python's own MemoryError says nothing."""

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(script, "train", fail)
    with pytest.raises(SystemExit, match=f"{script.__name__}.py: error: out of memory"):
        script.main(script.Args())


@every(ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab)
def test_a_single_denoising_step_is_refused(script):
    """It would start from what is no noise."""
    refusal(script, denoising_steps=1)


@pytest.mark.parametrize(
    "script, name, choices",
    [
        *((script, "policy", ("diffusion", "gaussian")) for script in (ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab)),
        (qvpo, "preset", ("laptop", "paper")),
        (qvpo, "q_transform", ("qadv", "qcut")),
        (bang_bang, "policy", ("bernoulli", "categorical", "gaussian")),
        (bang_bang, "squash", ("clip", "tanh")),
        (bang_bang, "action_cost_form", ("l1", "l2")),
    ],
    ids=name_of,
)
def test_invalid_choices_list_the_choices(script, name, choices, monkeypatch, capsys):
    """To who calls train, and on the command line."""
    message = refusal(script, **{name: "best"})
    monkeypatch.setattr(sys, "argv", command(script, **{name: "best"})[1:])
    with pytest.raises(SystemExit) as stopped:
        script.read_command_line()
    printed = capsys.readouterr().err
    assert stopped.value.code and all(choice in message and choice in printed for choice in choices)


@every(ddpl_mpe, ddpl_isaaclab, qvpo, bang_bang)  # gymnasium-robotics prints a line of its own
def test_exit_code_and_standard_error(script):
    done = subprocess.run(command(script, num_envs=-1), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--num-envs" in done.stderr


@every_script
def test_track_without_wandb(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error_of(script, **SCRIPTS[script], track=True)


@every_script
def test_given_flags_are_told_apart_from_defaults(script, finished, no_training):
    """A flag that repeats the default counts as asked for, where it was given."""
    budget = "total_trajectories" if script is srvr_npg else "total_timesteps"
    ran, default = SCRIPTS[script][budget], getattr(script.Args(), budget)
    run_dir = finished
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        script.main(script.Args(resume=str(run_dir)))
    message = error_of(script, given=[budget], resume=str(run_dir))
    assert f"ran with --{budget.replace('_', '-')} {ran}, not {default}" in message


@module_scripts
def test_command_line(script, monkeypatch, capsys):
    """Which flags were given, and help in the groups of Args."""
    monkeypatch.setattr(sys, "argv", ["script", "--num-envs", "3", "--seed=1", "--no-compile", "--exp_name", "trial"])
    args, given = script.read_command_line()
    assert (args.num_envs, args.seed, args.exp_name) == (3, 1, "trial")
    assert given == {"num_envs", "seed", "compile", "exp_name"}
    assert args == script.Args(num_envs=3, exp_name="trial", compile=False)
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        script.read_command_line()
    text = capsys.readouterr().out
    titles = [text.index(f"{group.__name__} options") for group in reversed(script.Args.__bases__)]
    assert len(titles) > 2 and titles == sorted(titles)


@module_scripts
def test_compiling_without_a_compiler(script):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        message = error_of(script, **SCRIPTS[script] | dict(compile=True))
    assert "--compile" in message and "C++ compiler" in message and not Path("runs").exists()


@module_scripts
def test_playing_compiles_nothing(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "compiled", lambda function, *_: function)
    run_dir = script.train(script.Args(**SCRIPTS[script] | dict(compile=True)))["run_dir"]
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        script.main(script.Args(evaluate=run_dir))
    assert "deterministic return" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_compiler_that_fails_is_told(interrupted, tmp_path):
    """Also where it was Ctrl-C, which the terminal sends to it as well, that ended it."""
    compiler = tmp_path / "g++"
    ctrl_c = "mkdir $0.once 2>/dev/null && kill -INT $PPID\n" if interrupted else ""
    compiler.write_text(f'#!/bin/sh\ncase "$*" in --version) exec g++ --version;; esac\n{ctrl_c}exit 1\n')
    compiler.chmod(0o755)
    options = SCRIPTS[ddpl_mpe] | dict(policy="gaussian", compile=True)
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run(command(ddpl_mpe, **options), capture_output=True, text=True, env=environment)
    sentence = "stopped while compiling; --resume goes on" if interrupted else "--compile: the compiler failed"
    assert sentence in done.stderr and done.returncode == (130 if interrupted else 1) and "Traceback" not in done.stderr


@every_script
def test_interrupted_while_playing(script, finished, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script.GymTask if script is srvr_npg else script, "evaluate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        script.main(script.Args(evaluate=str(finished)))
    assert stopped.value.code == 130
