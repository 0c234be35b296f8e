"""ddpl_isaaclab.py: the real registered task on Isaac Lab, and a stand-in for what that task does not do."""

import csv
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import fake_isaac
import pytest
import torch
import torch.multiprocessing as mp
from gymnasium.spaces import Box
from helpers import checkpoint_of, command, equal, error_about, error_of, evaluations, global_step, recorded, wait_for

import ddpl_isaaclab
from ddpl_isaaclab import Args, Batch, Learner, ReplayBuffer, make_env, train

ASSETS = str(Path(__file__).parent / "assets")
SMALL = dict(total_timesteps=1_600, learning_starts=200, num_envs=8, eval_interval=800, log_interval=80, batch_size=32)
SMALL |= dict(checkpoint_interval=400, critic_hidden=32, actor_hidden=16, steps_per_update=16)
FAKE = SMALL | dict(task=fake_isaac.TASK)


@pytest.fixture
def fake(monkeypatch):
    """A function that puts the stand-in in the place of Isaac Lab, and returns the list of what happens to it."""

    def install(**options):
        modules, events = fake_isaac.install(**options)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(ddpl_isaaclab, "version", lambda package: "none")
        return events

    return install


# ---- environment, on the stand-in


def test_agents_of_different_sizes_as_arrays(fake):
    """Observations padded, rewards averaged, each agent given its own actions; the simulation shut down at the end."""
    events = fake()
    with make_env(Args(task=fake_isaac.TASK, num_envs=5)) as env:
        assert env.action_mask().tolist() == [[1, 1], [1, 0]]
        obs, state = env.reset(3)
        assert obs.shape == (5, 2, 2) and (obs[:, 1, 1] == 0).all()
        assert torch.equal(state, torch.cat([obs[:, 0], obs[:, 1, :1]], 1)) and env.state_size == 3
        actions = torch.tensor([[0.1, -0.3], [0.5, 0.0]]).repeat(5, 1, 1)
        after = env.step(actions)
        assert env.env.actions["left"].shape == (5, 2) and env.env.actions["right"].shape == (5, 1)
        torch.testing.assert_close(after.next_obs[:, 0, 0], obs[:, 0, 0] + 0.2 * 0.3)
        torch.testing.assert_close(after.reward, 1.5 * (1 - after.next_obs[:, 0, 0] ** 2))
        assert torch.equal(env.reset(3)[0], obs) and not torch.equal(env.reset(4)[0], obs)
        isaac = env.env
    assert isaac.closed and events == ["launch", "shut down"]


def test_actions_are_scaled_where_there_are_bounds(fake):
    fake(bounds=(-1.0, 4.0))
    with make_env(Args(task=fake_isaac.TASK, num_envs=1)) as env:
        env.reset(0)
        env.step(torch.tensor([[[-1.0, 1.0], [0.5, 0.0]]]))
        assert env.env.actions["left"].tolist() == [[-1, 4]] and env.env.actions["right"].tolist() == [[0.5]]


@pytest.mark.parametrize("options", [dict(), dict(version=2), dict(state_space=4)], ids=str)
def test_replay_holds_true_next_observations_or_does_not_bootstrap(options, fake, monkeypatch):
    """Known are the final observations in 3.0, and the final states too where they consist of observations."""
    fake(**options)
    rows = recorded(ddpl_isaaclab, monkeypatch, **FAKE)
    x, pushes = rows.obs[..., 0, 0], rows.actions.sum((-1, -2))
    final_x, final_step = x + 0.2 * pushes, rows.obs[..., 0, 1] + 1
    fell, late = final_x.abs() > 1, final_step == fake_isaac.LENGTH
    assert fell.any() and late.any() and (fell & ~late).any()
    known = torch.ones_like(fell) if options.get("version") != 2 else ~(fell | late)
    torch.testing.assert_close(rows.next_obs[..., 0, 0][known], final_x[known])
    assert torch.equal(rows.next_obs[..., 0, 1][known], final_step[known])
    assert torch.equal(rows.terminated.bool(), fell | late if options else fell)
    checkpoint_or_evaluation = torch.zeros(199, dtype=torch.bool)
    checkpoint_or_evaluation[[49, 99, 149]] = True
    continues = (rows.next_obs[:-1] == rows.obs[1:]).flatten(2).all(-1)
    ends = (fell | late)[:-1] | checkpoint_or_evaluation[:, None]
    assert torch.equal(continues, ~ends | ((options.get("version") == 2) & ~checkpoint_or_evaluation[:, None]))
    if "state_space" in options:
        assert rows.state.shape[-1] == 4 and torch.equal(rows.state[..., 2], x)


def test_isaac_lab_2_starts_isaac_sim_first(fake):
    """And leaves it running to the end of the process, which its close() would be."""
    events = fake(version=2)
    assert train(Args(**FAKE | dict(total_timesteps=400)))["global_step"] == 400
    assert events == ["launch"]


def test_success_is_what_the_task_counts_or_an_episode_to_the_time_limit(fake):
    """Of one episode per environment: those that start anew in the same evaluation do not count."""

    class Standing:
        def sample(self, obs, deterministic):
            push = torch.full(obs.shape, 0.0)
            push[:, ::4] = 1  # every fourth environment falls, again and again
            return push

    fake()
    with make_env(Args(task=fake_isaac.TASK, num_envs=8)) as env:
        returns, success_rate = ddpl_isaaclab.evaluate(Standing(), env, True, 0)
        assert success_rate == 0.75 and returns.shape == (8,) and returns[::4].max() < returns[1:4].min()
        env.env.extras["log"] = {"Metrics/success_rate": torch.tensor(0.5)}
        assert ddpl_isaaclab.evaluate(Standing(), env, True, 0)[1] == pytest.approx(0.5, abs=0.13)


# ---- training, on the stand-in


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_run_folder_and_result(policy, fake):
    fake()
    result = train(Args(**FAKE, policy=policy))
    assert result["global_step"] == 1_600 and len(result["episodic_returns"]) == 8
    run_dir = Path(result["run_dir"])
    assert run_dir.name.startswith(f"ddpl_isaaclab__{fake_isaac.TASK}__1__")
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [(row["global_step"], row["mode"]) for row in rows] == [
        (step, mode) for step in ("800", "1600") for mode in ("stochastic", "deterministic")
    ]
    assert float(rows[-1]["return_mean"]) == pytest.approx(result["final_return"], rel=1e-6)
    assert float(rows[-1]["success_rate"]) == result["success_rate"]
    assert json.loads((run_dir / "result.json").read_text())["final_return"] == result["final_return"]
    assert list(run_dir.glob("events.out.tfevents*"))
    buffer = checkpoint_of(result)["buffers"][0]["data"]
    assert (buffer[1][:, 1, 1] == 0).all() and (buffer[1] != 0).any()  # padding


def test_same_seed_same_run_and_other_seed_another(fake):
    fake()
    first, again, other = (
        checkpoint_of(train(Args(**FAKE | dict(total_timesteps=640), seed=seed))) for seed in (1, 1, 2)
    )
    assert equal(first["learner"], again["learner"]) and equal(first["buffers"], again["buffers"])
    assert not equal(first["learner"], other["learner"])
    start, other_start = (run["buffers"][0]["data"][0][:8] for run in (first, other))
    assert not torch.equal(start, other_start)  # other episodes, too


def test_nothing_is_created_on_another_device(fake):
    """Everything that follows a step, on PyTorch's device without memory: one tensor on the CPU would raise."""
    adam = torch.optim.Adam
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", lambda *args, fused: adam(*args))  # a fused one knows no such device
        mask = torch.ones(2, 2)
        for policy in ("diffusion", "gaussian"):
            learner = Learner(Args(policy=policy), 2, 3, 2, 5, mask)
            buffer = ReplayBuffer(100, Batch((2, 3), (2, 2), (), (), (2, 3), (5,), (5,)))
            obs, state, reward = torch.rand(40, 2, 3), torch.rand(40, 5), torch.rand(40)
            actions = learner.policy.sample(obs.transpose(0, 1)).transpose(0, 1)
            buffer.add(obs, actions, reward, reward > 0.5, obs, state, state)
            metrics = ddpl_isaaclab.update(learner, buffer.sample(64))
            assert all(metric.device.type == "meta" for metric in metrics.values())


# ---- several processes, on the stand-in


def play_rank(rank, port, kill_at, options):
    """One of two processes as torchrun starts them; the first dies after the checkpoint at step `kill_at`."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    save_checkpoint, begin, learners = ddpl_isaaclab.save_checkpoint, Learner.__init__, []

    def killed(run_dir, contents):
        save_checkpoint(run_dir, contents)
        if contents["progress"][0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def spy(self, *args):
        begin(self, *args)
        learners.append(self)

    ddpl_isaaclab.save_checkpoint, Learner.__init__ = killed, spy
    ddpl_isaaclab.main(Args(**options))
    torch.save(learners[0].state_dict(), f"parameters_{rank}.pt")


def two_processes(kill_at=-1, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(play_rank, (port, kill_at, options), nprocs=2, start_method="fork")


def test_two_processes_and_their_resumption(fake):
    """Equal parameters, other episodes, one run folder; with a kill in between everything ends just as without."""
    options = FAKE | dict(total_timesteps=1_280, eval_interval=640, checkpoint_interval=320)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", fake_isaac.__file__]
    done = subprocess.run([*program, *command(ddpl_isaaclab, **options)[2:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (whole,) = Path("runs").iterdir()
    assert done.stdout.count("final return") == 1 and len(list(whole.glob("events.out.tfevents*"))) == 1
    theirs = torch.load(whole / "checkpoint.pt", weights_only=True)
    first, second = (stored["data"][0] for stored in theirs["buffers"])
    assert first.shape == second.shape == (640, 2, 2) and not torch.equal(first, second)
    assert evaluations(whole)[-1]["episodes"] == "16" and theirs["progress"][0] == 1_280

    fake()
    with pytest.raises(mp.ProcessExitedException):
        two_processes(kill_at=640, **options)
    (run_dir,) = set(Path("runs").iterdir()) - {whole}
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["progress"][0] == 640
    assert "2 processes, not 1" in error_of(ddpl_isaaclab, resume=str(run_dir))
    two_processes(resume=str(run_dir))
    ours = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert all(equal(ours[key], theirs[key]) for key in ours.keys() - {"progress"})
    assert evaluations(run_dir) == evaluations(whole)
    for rank in (0, 1):
        assert equal(torch.load(f"parameters_{rank}.pt", weights_only=True), theirs["learner"])


def learn(rank, world_size, policy):
    """Five updates on this process's share of a batch of 32 transitions; writes the parameters.

    So that the shares add up to the whole, no random number depends on the transition, and the steps are plain ones:
    Adam divides by the size of gradients, which blows up rounding errors where they are next to 0.
    """
    if world_size > 1:
        torch.distributed.init_process_group("gloo", f"file://{Path.cwd()}/meet", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    mask, share = torch.tensor([[1.0, 1], [1, 0]]), 32 // world_size
    obs, next_obs = torch.randn(2, 2, 32, 3)
    (state, next_state), reward = torch.randn(2, 32, 5), torch.randn(32)
    terminated, actions = (torch.rand(32) < 0.3).float(), (2 * torch.rand(2, 32, 2) - 1) * mask[:, None]

    def fixed(*shape, device=None):
        """Numbers between 0 and 1 that differ along all axes but the last two, batch and action."""
        count = math.prod(shape[:-2])
        return (torch.arange(1, count + 1) * 0.618 % 1).view(*shape[:-2], 1, 1).expand(shape)

    def fixed_steps(low, high, shape, device):
        return (low + torch.arange(shape[1])[:, None] % (high - low)).expand(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, 0.1))
        learner = Learner(Args(policy=policy, actor_batch_size=share), 2, 3, 2, 5, mask)
        if world_size > 1:
            for optimizer in learner.optimizers():
                optimizer.register_step_pre_hook(ddpl_isaaclab.average_gradients)
        for name in ("rand", "randn"):
            patch.setattr(torch, name, fixed)
            patch.setattr(torch, f"{name}_like", lambda x: fixed(*x.shape))
        patch.setattr(torch, "randint", fixed_steps)
        patch.setattr(torch.Tensor, "multinomial", lambda self, n, replacement: self.topk(n).indices)
        whole = Batch(obs, actions, reward, terminated, next_obs, state, next_state)
        rows = slice(rank * share, (rank + 1) * share)
        batch = Batch(*(column[:, rows] if column.ndim > 2 else column[rows] for column in whole))
        for _ in range(5):
            ddpl_isaaclab.update(learner, batch)
    torch.save(learner.state_dict(), f"{world_size}_{rank}.pt")


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_two_processes_learn_as_one_does_from_the_joint_batch(policy):
    mp.start_processes(learn, (2, policy), nprocs=2, start_method="fork")
    learn(0, 1, policy)
    first, second, joint = (torch.load(f"{name}.pt", weights_only=True) for name in ("2_0", "2_1", "1_0"))
    assert equal(first, second)
    start = (torch.manual_seed(0), Learner(Args(policy=policy), 2, 3, 2, 5, torch.ones(2, 2)))[1].state_dict()
    for name in joint:
        assert name.startswith("local") or not torch.equal(joint[name], start[name])
        torch.testing.assert_close(first[name], joint[name], rtol=1e-4, atol=1e-5)


# ---- the real task


ISAAC_LAB = importlib.util.find_spec("isaaclab") is not None or "ISAACLAB_REQUIRED" in os.environ
real = pytest.mark.skipif(not ISAAC_LAB, reason="Isaac Lab is not installed (requirements-isaaclab.txt)")


@pytest.fixture(scope="module")
def pendulum():
    """The registered task with eight environments; a process can open one simulation only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISAACSIM_ASSET_ROOT", ASSETS)
        with make_env(Args(num_envs=8)) as env:
            yield env


@real
def test_shapes_of_the_pendulum(pendulum):
    obs, state = pendulum.reset(0)
    assert pendulum.agents == ["cart", "pendulum"] and pendulum.action_mask().tolist() == [[1], [1]]
    assert obs.shape == (8, 2, 4) and state.shape == (8, 7) and pendulum.state_size == 7 and not pendulum.own_state
    assert (obs[:, 1, 3] == 0).all() and torch.equal(state, pendulum.env.state())
    after = pendulum.step(2 * torch.rand(8, 2, 1) - 1)
    assert torch.equal(after.state, pendulum.env.state())
    rewards = pendulum.env.reward_dict
    assert torch.equal(rewards["cart"], rewards["pendulum"]) and torch.equal(after.reward, rewards["cart"])


@real
def test_pendulum_restarts_in_the_step_it_falls_and_keeps_the_true_end(pendulum):
    obs, _ = pendulum.reset(0)
    fallen = torch.zeros(8, dtype=torch.bool)
    for _ in range(60):
        after = pendulum.step(torch.ones(8, 2, 1))
        cart, pole = after.next_obs[:, 0, 0], after.next_obs[:, 0, 2]
        out = (cart.abs() > 3) | (pole.abs() > math.pi / 2)
        assert torch.equal(after.ended, out) and torch.equal(after.terminated, out)
        assert torch.equal(after.next_state[:, :4], after.next_obs[:, 0]) and after.successes == 0
        assert (after.obs[out][:, 0, :2] == 0).all() and (after.obs[out][:, 0, 2].abs() <= math.pi / 4).all()
        assert torch.equal(after.next_obs[~out], after.obs[~out])
        moved, velocity = after.next_obs[:, 0, 0] - obs[:, 0, 0], (after.next_obs + obs)[:, 0, 1] / 2
        torch.testing.assert_close(moved, velocity / 60, atol=0.1, rtol=0)  # goes on from the last one
        obs, fallen = after.obs, fallen | out
    assert fallen.all()


@real
def test_pendulum_times_out_without_terminating(pendulum):
    pendulum.reset(0)
    pendulum.env.episode_length_buf[:4] = 298
    after = pendulum.step(torch.zeros(8, 2, 1))
    assert torch.equal(after.ended, torch.arange(8) < 4) and not after.terminated.any()
    assert (after.next_obs[:4, 0, 1] != 0).all() and (after.obs[:4, 0, 1] == 0).all()  # the cart's velocity


@real
def test_pendulum_repeats_itself(pendulum):
    """To the last bit, after whatever went before; a resumed run relies on it."""
    actions = 2 * torch.rand(40, 8, 2, 1) - 1
    twice = []
    for _ in range(2):
        obs = [pendulum.reset(3)[0]]
        for action in actions:
            obs.append(pendulum.step(action).next_obs)
        twice.append(torch.stack(obs))
    assert torch.equal(*twice)


REAL = dict(total_timesteps=19_200, num_envs=64, learning_starts=1_280, steps_per_update=8, batch_size=128)
REAL |= dict(critic_hidden=64, actor_hidden=64, eval_interval=19_200, checkpoint_interval=9_600, policy="gaussian")


def run(folder, **options):
    """A process with a simulation of its own, in this folder."""
    environment = os.environ | {"ISAACSIM_ASSET_ROOT": ASSETS, "OMP_NUM_THREADS": "1"}
    log = open(folder / "log.txt", "a")
    return subprocess.Popen(command(ddpl_isaaclab, **options), cwd=folder, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, and a copy of it from half-way."""
    folder = tmp_path_factory.mktemp("real")
    process = run(folder, **REAL)

    def half_way():
        return any(global_step(checkpoint) == 9_600 for checkpoint in folder.glob("runs/*/checkpoint.pt"))

    wait_for(process, half_way)
    (run_dir,) = folder.glob("runs/*")
    shutil.copytree(run_dir, folder / "half")
    assert process.wait() == 0, (folder / "log.txt").read_text()
    return run_dir, folder / "half"


@real
def test_return_on_the_pendulum_rises(trained):
    run_dir, _ = trained
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [row["mode"] for row in rows] == ["stochastic", "deterministic"]
    assert all(row["episodes"] == "64" and 0 <= float(row["success_rate"]) <= 1 for row in rows)
    assert float(rows[-1]["return_mean"]) > 4  # at most 20; a team that has learned nothing falls at 1
    assert json.loads((run_dir / "result.json").read_text())["versions"]["isaaclab"].startswith("3.")


@real
def test_pendulum_resumed_half_way_ends_as_without(trained):
    run_dir, half = trained
    process = run(half.parent, resume=half)
    assert process.wait() == 0, (half.parent / "log.txt").read_text()
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (half, run_dir))
    assert all(equal(ours[key], theirs[key]) for key in ours.keys() - {"progress"})
    assert evaluations(half) == evaluations(run_dir)


@real
def test_evaluate_plays_the_pendulum(trained):
    run_dir, _ = trained
    process = run(run_dir.parent.parent, evaluate=run_dir, num_envs=16)
    assert process.wait() == 0
    log = (run_dir.parent.parent / "log.txt").read_text()
    for mode in ("stochastic", "deterministic"):
        (line,) = [line for line in log.splitlines() if line.startswith(mode)]
        assert "over 16 episodes" in line and "success rate" in line
        assert float(line.split()[2]) > 2


# ---- bad input


def test_without_isaac_lab(monkeypatch):
    """One sentence, which says how to install it."""
    monkeypatch.setitem(sys.modules, "isaaclab", None)
    message = error_of(ddpl_isaaclab)
    assert "Isaac Lab is not installed" in message and "-r requirements-isaaclab.txt" in message
    assert not Path("runs").exists()


@pytest.mark.parametrize("task, reason", [("Isaac-Fake-MARL", "knows no"), (fake_isaac.ONE_AGENT, "single agent")])
def test_other_tasks_name_the_choices(task, reason, fake):
    fake()
    message = error_of(ddpl_isaaclab, task=task)
    assert "--task" in message and reason in message and fake_isaac.TASK in message and not Path("runs").exists()


def test_observations_that_are_no_vectors(fake, monkeypatch):
    fake()
    monkeypatch.setattr(fake_isaac.FakeMARLEnv, "observation_space", lambda self, agent: Box(0, 1, (8, 8, 3)))
    assert "--task" in error_of(ddpl_isaaclab, **FAKE) and not Path("runs").exists()


@pytest.mark.parametrize(
    "options", [dict(num_envs=0), dict(device="cuda:9"), dict(gamma=1.5), dict(buffer_size=3), dict(sigmas=())], ids=str
)
def test_invalid_numbers(options):
    error_about(ddpl_isaaclab, **options)


def test_nan_reward_stops_and_keeps_the_checkpoint(fake, monkeypatch):
    """Seen at the next log point: to look at every step would have the host wait for the device."""
    events = fake()
    step, calls = fake_isaac.FakeMARLEnv.step, []

    def poisoned(self, actions):
        obs, rewards, *rest = step(self, actions)
        calls.append(self)
        return obs, {agent: r * (math.nan if len(calls) == 63 else 1) for agent, r in rewards.items()}, *rest

    monkeypatch.setattr(fake_isaac.FakeMARLEnv, "step", poisoned)
    assert "the reward is NaN or infinite at step 560" in error_of(ddpl_isaaclab, **FAKE)  # step 504
    assert events == ["launch", "shut down"]
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["progress"][0] == 400


def test_nan_weights_are_never_saved(fake, monkeypatch):
    fake()

    def poisoned(learner, batch):
        with torch.no_grad():
            learner.critic.hidden.weight[0, 0, 0] = math.nan
        return {}

    monkeypatch.setattr(ddpl_isaaclab, "update", poisoned)
    message = error_of(ddpl_isaaclab, **FAKE | dict(log_interval=10_000, eval_interval=10_000))
    assert "critic.hidden.weight is NaN or infinite at step 400" in message
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["learner"]["critic.hidden.weight"].isfinite().all()


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_diverging_run_says_where(policy, fake):
    fake()
    message = error_of(ddpl_isaaclab, **FAKE | dict(critic_lr=1e30, policy=policy, log_interval=10_000))
    assert "is NaN or infinite at step" in message
