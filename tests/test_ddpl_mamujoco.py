"""ddpl_mamujoco.py: factorisations as arrays, its loop on one of them, processes."""

import ast
import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
import torch
from gymnasium_robotics import mamujoco_v1
from helpers import checkpoint_of, command, error_of, kill_and_resume, recorded, scalars

import ddpl_mamujoco
from ddpl_mamujoco import CONFIGURATIONS, Args, RunError, StackedAgents, evaluate, train, vector_env

SMALL = dict(total_timesteps=1_200, learning_starts=200, eval_interval=400, eval_episodes=1, final_eval_episodes=3)
SMALL |= dict(log_interval=100, checkpoint_interval=400, num_envs=4, batch_size=32, actor_batch_size=32)
SMALL |= dict(critic_hidden=32, actor_hidden=16, denoising_steps=4, compile=False)
HOPPER, HALF_CHEETAH = dict(scenario="Hopper", agent_conf="3x1"), dict(scenario="HalfCheetah", agent_conf="6x1")


# ---- environment


@pytest.mark.parametrize("scenario", CONFIGURATIONS)
def test_every_published_factorisation_steps(scenario):
    """As the package itself does, each agent's action scaled to its own bounds."""
    for agent_conf in CONFIGURATIONS[scenario].removesuffix(" and so on").split():
        env = StackedAgents(Args(scenario=scenario, agent_conf=agent_conf))
        theirs = mamujoco_v1.parallel_env(scenario, agent_conf)
        obs, mask = env.reset(seed=3)[0], env.action_mask()
        their_obs = theirs.reset(seed=3)[0]
        assert mask.sum() == theirs.single_agent_env.action_space.shape[0]
        for _ in range(3):
            for row, agent in zip(obs["obs"], theirs.possible_agents, strict=True):
                order = np.sort if scenario == "Pusher" else np.array  # the package's own order varies there
                our_row, their_row = order(row[: len(their_obs[agent])]), order(their_obs[agent])
                np.testing.assert_allclose(our_row, their_row, rtol=1e-5, atol=1e-5)
                assert (row[len(their_obs[agent]) :] == 0).all()
            np.testing.assert_allclose(obs["state"], theirs.state(), rtol=1e-5, atol=1e-5)
            actions = np.random.default_rng(0).uniform(-1, 1, mask.shape).astype(np.float32) * mask.numpy()
            spaces = {agent: theirs.action_space(agent) for agent in theirs.possible_agents}
            scaled = {
                agent: space.low + (row[: space.shape[0]] + 1) / 2 * (space.high - space.low)
                for (agent, space), row in zip(spaces.items(), actions)
            }
            obs, reward, terminated, truncated, _ = env.step(actions)
            their_obs, rewards, *ends, _ = theirs.step(scaled)
            assert reward == pytest.approx(rewards["agent_0"], rel=1e-4, abs=1e-5)
            assert (terminated, truncated) == tuple(end["agent_0"] for end in ends)


@pytest.mark.parametrize("scenario", CONFIGURATIONS)
def test_copies_see_alike(scenario):
    args = Args(scenario=scenario, agent_conf=CONFIGURATIONS[scenario].split()[0])
    first, *others = [StackedAgents(args).reset(seed=5)[0]["obs"] for _ in range(6)]
    assert all(np.array_equal(first, other) for other in others)


def test_sizes_differ_between_agents():
    env = StackedAgents(Args(scenario="Humanoid", agent_conf="9|8"))
    assert env.obs_sizes[0] != env.obs_sizes[1] and env.action_mask().sum(-1).tolist() == [9, 8]
    assert (env.num_agents, env.obs_size, env.action_size) == (2, max(env.obs_sizes), 9)
    assert env.boxes[0].high.max() == pytest.approx(0.4)


def test_actions_beyond_the_bounds_are_clipped():
    ends = []
    for size in (1.0, 5.0):
        env = StackedAgents(Args(**HOPPER))
        env.reset(seed=0)
        ends.append(env.step(np.full((3, 1), size, np.float32))[0]["state"])
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("agent_obsk", [0, 2])
def test_agents_see_as_far_as_asked(agent_obsk):
    near, far = (StackedAgents(Args(**HALF_CHEETAH, agent_obsk=k)) for k in (agent_obsk, 1))
    assert (max(near.obs_sizes) < max(far.obs_sizes)) == (agent_obsk == 0)


MY_OWN = {
    "PACKAGES": 'PACKAGES = ("mpe2",)\n',
    "CONFIGURATIONS": "",
    "make_env": """def make_env(args, render_mode=None):
    from mpe2 import simple_spread_v3

    return simple_spread_v3.parallel_env(N=args.team_size, continuous_actions=True, render_mode=render_mode)
""",
    "task_name": 'def task_name(args):\n    return f"spread-{args.team_size}"\n',
}


def test_the_docstring_names_the_lines_to_change_for_another_task(tmp_path):
    """Change exactly those, and it learns a task of mpe2."""
    source = Path(ddpl_mamujoco.__file__).read_text()
    lines = source.splitlines(keepends=True)
    functions = 0
    for node in reversed(ast.parse(source).body):
        name = node.targets[0].id if isinstance(node, ast.Assign) else getattr(node, "name", None)
        if name in MY_OWN:
            assert name in ddpl_mamujoco.__doc__
            lines[node.lineno - 1 : node.end_lineno] = [MY_OWN[name]]
            functions += isinstance(node, ast.FunctionDef) * (node.end_lineno - node.lineno + 1)
        elif name == "Task":
            arguments = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            assert [item.target.id for item in arguments[:3]] == ["scenario", "agent_conf", "agent_obsk"]
            lines[arguments[0].lineno - 1 : arguments[3].lineno - 1] = ["    team_size: int = 2\n"]
    assert 25 <= functions <= 35 and "thirty lines" in ddpl_mamujoco.__doc__
    path = tmp_path / "my_spread.py"
    path.write_text("".join(lines).replace("from gymnasium_robotics import mamujoco_v1\n", ""))
    ours = {"scenario", "agent_conf", "agent_obsk", "mamujoco_v1", "CONFIGURATIONS"}
    names = {getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(path.read_text()))}
    assert not ours & names  # nothing else reads them
    spec = importlib.util.spec_from_file_location("my_spread", path)
    fork = importlib.util.module_from_spec(spec)
    sys.modules["my_spread"] = fork  # dataclasses look their module up
    spec.loader.exec_module(fork)
    result = fork.train(fork.Args(**SMALL | dict(total_timesteps=400), team_size=3))
    assert Path(result["run_dir"]).name.startswith("my_spread__spread-3__1__")
    stored = fork.Batch(*checkpoint_of(result)["buffer"]["data"])
    assert len(stored.obs) == 400 and result["final_return"] < 0
    assert not stored.terminated.any()  # its episodes end by their time limit of 25 steps, beyond which values go on
    episodes = stored.reward.view(4, 25, 4).sum(1).mean(1)
    logged = scalars(result["run_dir"])["returns/training"]
    assert [float(value) for _, value in logged] == pytest.approx(episodes[2:].tolist(), abs=1e-4)


# ---- training loop


def test_replay_holds_true_next_observations(monkeypatch):
    """Hopper falls, which terminates; checkpoints end episodes, too, but as time limits."""
    rows = recorded(ddpl_mamujoco, monkeypatch, **SMALL | HOPPER)
    assert rows.terminated.any() and not rows.terminated.all() and rows.actions.abs().max() <= 1
    for now, then in ((rows.next_obs, rows.obs), (rows.next_state, rows.state)):
        continues = (now[:-1] == then[1:]).flatten(2).all(-1)
        checkpoints = torch.zeros_like(continues)
        checkpoints[[99, 199]] = True
        assert torch.equal(continues, ~(rows.terminated[:-1].bool() | checkpoints))
    healthy = (rows.next_state[..., 0] > 0.7) & (rows.next_state[..., 1].abs() < 0.2)
    assert torch.equal(rows.terminated.bool(), ~healthy)  # of the true last state
    assert len(rows.state[[0, 100]].flatten(0, 1).unique(dim=0)) == 8  # every episode is another


def test_one_transfer_a_step(monkeypatch):
    """And one where copies start anew."""
    moved, starts = [], []
    to_device, reset = ddpl_mamujoco.to_device, StackedAgents.reset
    monkeypatch.setattr(
        ddpl_mamujoco, "to_device", lambda arrays, d: (moved.append(len(arrays)), to_device(arrays, d))[1]
    )
    monkeypatch.setattr(StackedAgents, "reset", lambda *a, **o: (starts.append(o["seed"]), reset(*a, **o))[1])
    monkeypatch.setattr(ddpl_mamujoco, "evaluate", lambda *_, **__: np.zeros(1))
    train(Args(**SMALL | HOPPER | dict(total_timesteps=400)))
    assert moved.count(4) == 100 and 1 < moved.count(2) <= len(starts) and len(moved) == 100 + moved.count(2)


def test_every_episode_of_an_evaluation_is_another():
    """Also the first beyond those of the 25 copies."""
    policy = SimpleNamespace(mask=torch.ones(3, 1, 1), sample=lambda obs, _: -torch.ones(3, obs.shape[1], 1))
    assert len(set(evaluate(policy, Args(**HOPPER), 26, True, seed=0))) == 26


@pytest.mark.parametrize("at", ["reset", "step"])
def test_nan_states_stop_the_run(at, monkeypatch):
    original = getattr(StackedAgents, at)

    def poisoned(self, *args, **options):
        observations, *others = original(self, *args, **options)
        return (observations | {"state": np.nan * observations["state"]}, *others)

    monkeypatch.setattr(StackedAgents, at, poisoned)
    assert "the state is NaN or infinite at step" in error_of(ddpl_mamujoco, **SMALL | HOPPER)


def test_processes_play_as_one_does(monkeypatch):
    options = SMALL | HOPPER | dict(total_timesteps=400)
    one, many = (recorded(ddpl_mamujoco, monkeypatch, **options, async_envs=a) for a in (False, True))
    for ours, theirs in zip(one, many):
        assert torch.equal(ours, theirs)
    assert not multiprocessing.active_children()


def test_processes_leave_signals_to_the_run():
    """A terminal sends Ctrl-C to all processes at once; the run still needs its copies until it stops."""
    with vector_env(Args(**HOPPER, num_envs=2, async_envs=True)) as env:
        env.reset(seed=[1, 2])
        for process in env.processes:
            os.kill(process.pid, signal.SIGINT)
            os.kill(process.pid, signal.SIGTERM)
        env.step(env.action_space.sample())
        assert all(process.is_alive() for process in env.processes)


@pytest.mark.parametrize("end", ["error", "signal", "killed"])
def test_processes_end_with_the_run(end, monkeypatch):
    """killed: one of them, by the system."""
    signals = []

    def act(self, obs):
        if end == "error":
            raise RunError("an error")
        if end == "signal":
            signals.append(signal.SIGTERM)
        else:
            process = multiprocessing.active_children()[0]
            process.kill()
            process.join()
        return torch.zeros(3, 4, 1)

    monkeypatch.setattr(ddpl_mamujoco.DiffusionPolicy, "sample", act)
    monkeypatch.setattr(ddpl_mamujoco, "update", lambda *_: {})
    expected = {"error": "an error", "signal": "stopped at step 204; the last checkpoint is from step 0;"}
    with pytest.raises((RunError, ddpl_mamujoco.Stopped), match=expected.get(end, "--async-envs: .* memory")):
        train(Args(**SMALL | HOPPER, async_envs=True), signals=signals)
    assert not multiprocessing.active_children()


def test_processes_build_models_one_after_the_other():
    """The package writes the model of many segments to a file and removes it."""
    with vector_env(Args(scenario="ManySegmentSwimmer", agent_conf="2x2", num_envs=4, async_envs=True)) as env:
        assert env.reset(seed=[1, 2, 3, 4])[0]["obs"].shape[:2] == (4, 2)


def test_a_process_that_cannot_start(monkeypatch):
    """One of four has no memory for its copy, and the others end."""
    run, make_env = os.getpid(), ddpl_mamujoco.make_env

    def refuse_one(*args):
        if os.getpid() != run and multiprocessing.current_process().name.endswith("1"):
            raise MemoryError
        return make_env(*args)

    monkeypatch.setattr(ddpl_mamujoco, "make_env", refuse_one)
    assert "--async-envs" in error_of(ddpl_mamujoco, **SMALL | HOPPER, async_envs=True)
    assert not multiprocessing.active_children() and not Path("runs").exists()


def processes_here():
    """The others whose working directory is this test's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            found += [folder.name] * (os.readlink(folder / "cwd") == os.getcwd())
    return set(found) - {str(os.getpid())}


@pytest.mark.slow
def test_killed_and_resumed_with_processes(monkeypatch):
    """Those of the copies end with the run that was killed."""

    def with_flag(script, async_envs=False, **options):
        return [*command(script, **options), *["--async-envs"] * async_envs]

    monkeypatch.setattr(helpers, "command", with_flag)
    options = SMALL | HOPPER | dict(total_timesteps=2_400, eval_interval=1_200, final_eval_episodes=1)
    kill_and_resume(ddpl_mamujoco, (400, 1200), **options, async_envs=True)
    deadline = time.monotonic() + 20
    while processes_here():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---- bad input


@pytest.mark.parametrize(
    "options, choice",
    [
        (dict(scenario="HalfCheeta"), "HalfCheetah"),
        (dict(agent_conf="3x2"), "6x1"),
        (dict(agent_obsk=-1), "from 0"),
        (dict(agent_obsk=101), "to 100"),
    ],
)
def test_unknown_tasks_name_the_choices(options, choice):
    (name,) = options
    message = error_of(ddpl_mamujoco, **SMALL | options)
    assert f"--{name.replace('_', '-')}" in message and choice in message and not Path("runs").exists()


@pytest.mark.parametrize("agent_conf", ["0x2", "-1x2", "2x0", "2", "2x3d", "2x3/../x", "1x1", "1000x1", "99x99"])
def test_impossible_numbers_of_segments(agent_conf):
    message = error_of(ddpl_mamujoco, **SMALL, scenario="ManySegmentSwimmer", agent_conf=agent_conf)
    for number in (1, 99 * 99):  # the package leaves the models that MuJoCo refuses
        model = f"many_segment_swimmer_{number}_segments.auto.xml"
        (Path(mamujoco_v1.__file__).parent / "assets" / model).unlink(missing_ok=True)
    assert "--agent-conf" in message and "2x3" in message and not Path("runs").exists()


@pytest.mark.parametrize("failure", [MemoryError("no memory"), OSError("too many files"), Exception("a bug")])
def test_failures_are_not_blamed_on_the_factorisation(failure, monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(mamujoco_v1, "parallel_env", fail)
    with pytest.raises(type(failure), match=str(failure)):
        ddpl_mamujoco.make_env(Args())
    if not isinstance(failure, MemoryError | OSError):
        return  # a bug is not told in one sentence
    assert error_of(ddpl_mamujoco).endswith(str(failure)) and not Path("runs").exists()


@pytest.mark.parametrize("where", ["__init__", "render"])
def test_video_where_nothing_can_be_drawn(where, monkeypatch):
    """Said before the training, not after it: a library is missing, or a display."""

    def fail(*_, **__):
        raise AttributeError("nothing to draw with")

    monkeypatch.setattr(mamujoco_v1.parallel_env, where, fail)
    message = error_of(ddpl_mamujoco, **SMALL | HOPPER, capture_video=True)
    assert "--capture-video" in message and "MUJOCO_GL" in message and not Path("runs").exists()


# ---- learning


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_learning_beats_a_random_policy(policy):
    """Swimmer, whose reward is its speed: a random team drifts, one that has learned a little swims."""
    options = dict(total_timesteps=5_000, learning_starts=1_000, final_eval_episodes=5)
    options |= dict(critic_hidden=64, actor_hidden=64, denoising_steps=5, compile=False)
    args = Args(scenario="Swimmer", agent_conf="2x1", policy=policy, **options)

    class Uniform:
        mask = torch.ones(2, 1, 1)

        def sample(self, obs, deterministic):
            return 2 * torch.rand(*obs.shape[:2], 1) - 1

    random = evaluate(Uniform(), args, 10, False, seed=0).mean()
    assert train(args)["final_return"] > random + 15
