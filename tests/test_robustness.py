"""What every PyTorch script with checkpoints survives: signals, damaged files, two processes, NaN, bad arguments."""

import contextlib
import copy
import csv
import errno
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from helpers import checkpoint_of, command, equal, error_of, evaluations, global_step, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import bang_bang
import ddpl_mamujoco
import ddpl_mpe
import qvpo

DDPL = dict(critic_hidden=16, actor_hidden=16, batch_size=32, actor_batch_size=16, compile=False)
RUN = dict(total_timesteps=1_200, eval_interval=600, eval_episodes=1, final_eval_episodes=1, checkpoint_interval=400)
SCRIPTS = {
    ddpl_mpe: RUN | DDPL | dict(learning_starts=200),
    ddpl_mamujoco: RUN | DDPL | dict(learning_starts=200, scenario="Hopper", agent_conf="3x1", num_envs=4),
    qvpo: RUN | dict(learning_starts=200, hidden=16, batch_size=16, num_candidates=4, num_envs=4),
    bang_bang: RUN | dict(env_id="Pendulum-v1", num_steps=100, num_minibatches=4, update_epochs=2, num_envs=4),
}
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run of a script, trained when first asked for."""

    class Runs(dict):
        def __missing__(self, script):
            with contextlib.chdir(tmp_path_factory.mktemp("finished")):
                result = script.train(script.Args(**SCRIPTS[script]))
                self[script] = Path(result["run_dir"]).absolute()
            return self[script]

    return Runs()


@pytest.fixture
def no_training(request, finished, monkeypatch):
    """Whatever gets as far as the training loop has been accepted."""
    script = request.node.callspec.params["script"]
    finished[script]  # train first
    monkeypatch.setattr(script, "training_loop", lambda *_, **__: pytest.fail("accepted"))


# ---- signals


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
    with pytest.raises(script.Stopped, match=r"stopped at step \d+.*; go on with --resume runs/") as stopped:
        script.train(script.Args(**SCRIPTS[script]), signals=AfterChecks(2 if script is ddpl_mpe else 150))
    (run_dir,) = Path("runs").iterdir()
    step = int(str(stopped.value).split("step ")[1].split(";")[0].split(" ")[0].strip(","))
    assert 0 < step < 1_200
    saved = global_step(run_dir / "checkpoint.pt")
    assert saved == step if script is ddpl_mpe else f"the last checkpoint is from step {saved};" in str(stopped.value)
    ours = checkpoint_of(script.train(script.Args(resume=str(run_dir))))
    theirs = torch.load(finished[script] / "checkpoint.pt", weights_only=True)
    for name in ours.keys() - {"progress"}:  # the time that has passed differs
        assert equal(ours[name], theirs[name]), name
    assert evaluations(run_dir) == evaluations(finished[script])


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
def test_a_run_in_use_is_left_alone(script, finished, no_training):
    with script.locked(finished[script]):
        message = error_of(script, resume=str(finished[script]))
    assert "in use by process" in message and str(os.getpid()) in message
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        script.train(script.Args(resume=str(finished[script])))  # the lock is gone with its holder


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


@every_script
def test_memory_that_cannot_be_had(script, monkeypatch):
    if not hasattr(script, "ReplayBuffer"):
        pytest.skip("no replay buffer")

    def refuse(*shape, **_):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(script.RunError, match="--buffer-size: no memory for 1000 transitions"):
        script.ReplayBuffer(1000, [(3,)])


@every_script
def test_networks_too_large_for_the_memory(script):
    (width,) = [name for name in ("hidden", "critic_hidden") if hasattr(script.Args(), name)]
    assert "memory" in error_of(script, **SCRIPTS[script] | {width: 4_000_000_000})


@every_script
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
    message = error_of(fork, resume=str(finished[script]))
    assert f"belongs to {script.__name__}.py, not to my_fork.py" in message


# ---- damaged checkpoints


def places(contents, path=()):
    """The paths of all that a checkpoint holds; of a list, its first entry stands for the others."""
    items = contents.items() if isinstance(contents, dict) else enumerate(contents[:1])
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
            else:
                continue
            if path[0] != "script":
                yield f"{'.'.join(map(str, path))}: {kind}", damaged


@every_script
def test_damaged_parts_are_refused(script, finished, no_training, tmp_path, subtests):
    """Every part of a checkpoint, one by one: a sentence, never a traceback, and the file stays as it is."""
    contents = torch.load(finished[script] / "checkpoint.pt", weights_only=True)
    cases = list(damages(contents))
    assert len(cases) > 80
    path = tmp_path / "checkpoint.pt"
    for name, damaged in cases:
        with subtests.test(name):
            torch.save(damaged, path)
            before = path.read_bytes()
            message = error_of(script, resume=str(tmp_path))
            assert "--" in message
            assert "is damaged" in message or not name.endswith("another type")
            assert path.read_bytes() == before


@every_script
def test_one_flipped_bit_is_noticed(script, finished, no_training, tmp_path):
    contents = bytearray((finished[script] / "checkpoint.pt").read_bytes())
    weight = torch.load(finished[script] / "checkpoint.pt", weights_only=True)["learner"]
    largest = max(weight.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    contents[contents.index(largest) + len(largest) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(contents)
    assert "damaged" in error_of(script, resume=str(tmp_path))
    if not hasattr(script, "save_team"):  # else --evaluate reads the team's file: tests/test_teams.py
        assert "damaged" in error_of(script, evaluate=str(tmp_path))


@pytest.mark.parametrize("script", [qvpo, bang_bang], ids=lambda script: script.__name__)
def test_weights_that_are_nan_are_not_played(script, finished, tmp_path):
    contents = torch.load(finished[script] / "checkpoint.pt", weights_only=True)
    next(iter(contents["learner"].values())).fill_(math.nan)
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert "damaged" in error_of(script, evaluate=str(tmp_path))


@pytest.mark.parametrize("script", [qvpo, bang_bang], ids=lambda script: script.__name__)
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_checkpoint_cannot_import_code(script, flag, finished, no_training, tmp_path, monkeypatch):
    """gym.make imports what stands before a colon: only the user may say that, not a file."""
    (tmp_path / "payload.py").write_text("open('imported', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    contents = torch.load(finished[script] / "checkpoint.pt", weights_only=True)
    contents["args"]["env_id"] = "payload:Pendulum-v1"
    torch.save(contents, tmp_path / "checkpoint.pt")
    message = error_of(script, **{flag: str(tmp_path)})
    assert "payload:Pendulum-v1" in message and not Path("imported").exists()


# ---- what is not a number


def poison(script, monkeypatch, at):
    """Make the observation of the `at`-th step of an environment NaN (0: of the first reset)."""
    calls = []

    def poisoned(obs):
        obs = {name: value.copy() for name, value in obs.items()} if isinstance(obs, dict) else obs.copy()
        (obs["obs"] if isinstance(obs, dict) else obs)[...] = np.nan
        return obs

    owner = {ddpl_mpe: ddpl_mpe.VectorMPE, ddpl_mamujoco: getattr(ddpl_mamujoco, "StackedAgents", None)}.get(script)
    if owner is None:  # a Gymnasium wrapper around the task
        make_env = script.make_env

        def make_poisoned(*args, **options):
            env = make_env(*args, **options)
            reset, step = env.reset, env.step
            if at == 0:
                env.reset = lambda **o: (poisoned(reset(**o)[0]), {})
            env.step = lambda action: (
                (calls.append(0), step(action))[1]
                if len(calls) + 1 != at
                else (
                    calls.append(0),
                    (poisoned(step(action)[0]), *step(action)[1:]),
                )[1]
            )
            return env

        monkeypatch.setattr(script, "make_env", make_poisoned)
        return
    reset, step = owner.reset, owner.step

    def poisoned_reset(self, *args, **options):
        result = reset(self, *args, **options)
        return (poisoned(result[0]), {}) if isinstance(result, tuple) else poisoned(result)

    def poisoned_step(self, actions):
        calls.append(0)
        obs, *others = step(self, actions)
        return (poisoned(obs) if len(calls) == at else obs, *others)

    if at == 0:
        monkeypatch.setattr(owner, "reset", poisoned_reset)
    monkeypatch.setattr(owner, "step", poisoned_step)


@every_script
@pytest.mark.parametrize("at", [0, 3, 75], ids=["at a reset", "in warm-up", "while learning"])
def test_nan_observations_stop_the_run_and_lose_nothing(script, at, monkeypatch):
    with monkeypatch.context() as patch:
        poison(script, patch, at)
        message = error_of(script, **SCRIPTS[script])
    assert "observation is NaN or infinite at step" in message
    (run_dir,) = Path("runs").iterdir()
    assert script.train(script.Args(resume=str(run_dir)))["global_step"] == 1_200


# ---- arguments


@every_script
@pytest.mark.parametrize(
    "options",
    [
        dict(seed=-1),
        dict(seed=99999999999999999999),
        dict(seed="1"),
        dict(num_envs=True),
        dict(total_timesteps=1e5),
        dict(gamma="high"),
        dict(gamma=math.nan),
        dict(policy="beta"),
        dict(device="gpu"),
        dict(compile=1),
        dict(exp_name="../elsewhere"),
        dict(num_envs=10**12),
    ],
    ids=str,
)
def test_wrong_types_and_values_are_refused_by_name(script, options):
    (name,) = options
    if not hasattr(script.Args(), name):
        pytest.skip("no such argument")
    message = error_of(script, **options)
    assert f"--{name.replace('_', '-')}" in message and "must be" in message and not Path("runs").exists()


@pytest.mark.parametrize("script", [ddpl_mpe, ddpl_mamujoco, qvpo], ids=lambda script: script.__name__)
def test_learning_that_would_never_start(script):
    options = dict(total_timesteps=1000, learning_starts=1000)
    assert "--learning-starts" in error_of(script, **options)


@every_script
def test_given_flags_are_told_apart_from_defaults(script, finished, no_training):
    """A flag that repeats the default counts as asked for, where it was given."""
    default = script.Args().total_timesteps
    run_dir = finished[script]
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        script.main(script.Args(resume=str(run_dir)))
    message = error_of(script, given=["total_timesteps"], resume=str(run_dir))
    assert f"ran with --total-timesteps 1200, not {default}" in message


@every_script
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


@every_script
def test_compiling_without_a_compiler(script):
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        message = error_of(script, **SCRIPTS[script] | dict(compile=True))
    assert "--compile" in message and "C++ compiler" in message and not Path("runs").exists()


def test_interrupted_while_playing(finished, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpl_mpe, "evaluate", interrupt)
    with pytest.raises(SystemExit) as stopped:
        ddpl_mpe.main(ddpl_mpe.Args(evaluate=str(finished[ddpl_mpe])))
    assert stopped.value.code == 130


@every_script
def test_evaluations_are_complete_rows(script, finished):
    rows = list(csv.DictReader(open(finished[script] / "evaluations.csv")))
    assert tuple(rows[0]) == script.EVALUATION_COLUMNS
