"""ddpl_isaaclab.py: the real registered task on Isaac Lab, and a stand-in for what that task does not do."""

import contextlib
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
import time
from pathlib import Path
from types import SimpleNamespace

import fake_isaac
import pytest
import torch
import torch.multiprocessing as mp
from gymnasium.spaces import Box
from helpers import checkpoint_of, command, equal, error_of, evaluations, global_step, recorded, scalars, wait_for

import ddpl_isaaclab
from ddpl_isaaclab import Args, Batch, Learner, make_env, train

ASSETS = str(Path(__file__).parent / "assets")
SMALL = dict(total_timesteps=1_600, learning_starts=200, num_envs=8, eval_interval=800, log_interval=80, batch_size=32)
SMALL |= dict(checkpoint_interval=400, critic_hidden=32, actor_hidden=16, steps_per_update=16, actor_batch_size=32)
SMALL |= dict(device="cpu")
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
    with make_env(Args(task=fake_isaac.TASK, num_envs=5, device="cpu")) as env:
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
    with make_env(Args(task=fake_isaac.TASK, num_envs=1, device="cpu")) as env:
        env.reset(0)
        env.step(torch.tensor([[[-1.0, 1.0], [0.5, 0.0]]]))
        assert env.env.actions["left"].tolist() == [[-1, 4]] and env.env.actions["right"].tolist() == [[0.5]]


@pytest.mark.parametrize("options", [dict(), dict(version=2), dict(state_space=4)], ids=str)
def test_replay_holds_true_next_observations_or_does_not_bootstrap(options, fake, monkeypatch):
    """Known are the final observations in 3.0, and of use where the state consists of them.

    After a reset the environments' clocks stand apart, which the observations show from the next step on.
    """
    fake(**options)
    rows = recorded(ddpl_isaaclab, monkeypatch, **FAKE)
    x, pushes = rows.obs[..., 0, 0], rows.actions.sum((-1, -2))
    final_x, clock = x + 0.2 * pushes, rows.next_obs[..., 0, 1]
    fell = final_x.abs() > 1
    late = (clock == fake_isaac.LENGTH) | (clock == 0) & ~fell  # 0: of the next episode
    assert fell.any() and late.any() and (fell & ~late).any()
    known = ~(fell | late) if options else torch.ones_like(fell)
    torch.testing.assert_close(rows.next_obs[..., 0, 0][known], final_x[known])
    assert torch.equal(rows.terminated.bool(), fell | late if options else fell)
    checkpoint_or_evaluation = torch.zeros(199, dtype=torch.bool)
    checkpoint_or_evaluation[[49, 99, 149]] = True
    reset = torch.cat([torch.ones(1, dtype=torch.bool), checkpoint_or_evaluation])
    assert torch.equal(clock[~reset][known[~reset]], (rows.obs[..., 0, 1] + 1)[~reset][known[~reset]])
    assert (rows.obs[reset][..., 0, 1] == 0).all()
    assert all(len(set(clocks.tolist())) > 3 for clocks in clock[reset])
    continues = (rows.next_obs[:-1] == rows.obs[1:]).flatten(2).all(-1)
    ends = (fell | late)[:-1] | checkpoint_or_evaluation[:, None]
    assert torch.equal(continues, ~ends | (bool(options) & ~checkpoint_or_evaluation[:, None]))
    if "state_space" in options:
        assert rows.state.shape[-1] == 4 and torch.equal(rows.state[..., 2], x)


def test_isaac_lab_2_starts_isaac_sim_first(fake):
    """And leaves it running to the end of the process, which its close() would be."""
    events = fake(version=2)
    assert train(Args(**FAKE | dict(total_timesteps=400)))["global_step"] == 400
    assert events == ["launch"]


def test_returns_and_successes_of_an_evaluation(fake):
    """Of one episode per environment: those that start anew in the same evaluation do not count.

    A success is what the task counts, or an episode to the time limit.
    """

    class Standing:
        def sample(self, obs, deterministic):
            push = torch.full(obs.shape, 0.0)
            push[:, ::4] = 1  # every fourth environment falls, again and again
            return push

    fake()
    with make_env(Args(task=fake_isaac.TASK, num_envs=8, device="cpu")) as env:
        returns, success_rate = ddpl_isaaclab.evaluate(Standing(), env, True, 7)
        x = env.reset(int(ddpl_isaaclab.episode_seeds(1, 7, 0, 1)[0]))[0][:, 0, :1]
        x = x + 0.6 * torch.tensor([1.0, 0, 0, 0] * 2)[:, None] * torch.arange(1, fake_isaac.LENGTH + 1)
        counts = torch.cat([torch.ones(8, 1), (x[:, :-1].abs() <= 1).float()], 1)  # up to the step in which it falls
        assert success_rate == 0.75 and (counts.sum(1) < 4).tolist() == [True, False, False, False] * 2
        assert returns == pytest.approx((counts * 1.5 * (1 - x**2)).sum(1).numpy(), rel=1e-4)
        env.env.extras["log"] = {"Metrics/success_rate": torch.tensor(0.5)}
        assert ddpl_isaaclab.evaluate(Standing(), env, True, 0)[1] == pytest.approx(0.5, abs=0.13)


# ---- training, on the stand-in


def test_training_returns_are_of_the_episodes_since_the_last_point(fake, monkeypatch):
    """Here of those that end from step 240 to 320, each from its own start."""
    fake()
    rows = recorded(ddpl_isaaclab, monkeypatch, **FAKE | dict(total_timesteps=320, steps_per_update=80))
    late = rows.next_obs[..., 0, 1] == fake_isaac.LENGTH
    returns, successes = [], []
    for copy in range(8):
        ends = [-1, *(rows.terminated[:, copy].bool() | late[:, copy]).nonzero().flatten().tolist()]
        for before, end in zip(ends, ends[1:]):
            if end >= 30:
                returns.append(rows.reward[before + 1 : end + 1, copy].sum().item())
                successes.append(not rows.terminated[end, copy])
    (run_dir,) = Path("runs").iterdir()
    for name, values in (("returns", returns), ("success_rate", successes)):
        step, value = scalars(run_dir)[f"{name}/training"][-1]
        assert step == 320 and float(value) == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_seconds_are_those_of_training(fake, monkeypatch):
    """Not of evaluations, each of which lasts a thousand here."""
    fake()
    evaluate, waited = ddpl_isaaclab.evaluate, []
    monkeypatch.setattr(ddpl_isaaclab, "evaluate", lambda *args: (waited.append(1_000), evaluate(*args))[1])
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(waited))
    monkeypatch.setattr(ddpl_isaaclab, "time", clock)
    result = train(Args(**FAKE | dict(learning_starts=1_500)))
    rows = csv.DictReader(open(Path(result["run_dir"]) / "evaluations.csv"))
    assert [float(row["seconds"]) < 1_000 for row in rows] == [True] * 4
    assert checkpoint_of(result)["progress"]["seconds"] < 1_000 and len(waited) == 4


def test_a_step_stays_on_the_simulations_device(fake, monkeypatch):
    """On PyTorch's device without memory: one tensor on the CPU would raise."""
    fake(bounds=(-1.0, 4.0))
    monkeypatch.setattr(ddpl_isaaclab, "choose_device", lambda args: torch.device("meta"))
    with make_env(Args(task=fake_isaac.TASK, num_envs=5)) as env:
        assert env.env.cfg.device == "meta"
        obs, state = env.reset(3)
        after = env.step(torch.zeros(5, 2, 2, device="meta"))
    assert all(tensor.is_meta for tensor in (obs, state, *after))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_run_on_the_gpu(policy, fake):
    fake()
    there = train(Args(**FAKE | dict(device="cuda", total_timesteps=640, policy=policy)))
    here = train(Args(resume=there["run_dir"], device="cpu"))
    assert here["global_step"] == 640 and math.isfinite(here["final_return"])


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for device in ("auto", "cuda"):
        with pytest.raises(ddpl_isaaclab.RunError, match="--device.*must be cpu, or .* at most 2"):
            ddpl_isaaclab.check_args(Args(device=device))
    ddpl_isaaclab.check_args(Args(device="cpu"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    ddpl_isaaclab.check_args(Args())


# ---- several processes, on the stand-in


def play_rank(rank, port, kill_at, stop_at, options):
    """One of two processes as torchrun starts them; writes its parameters at the end.

    The first dies after the checkpoint at step `kill_at`; the second gets a SIGTERM in its step number `stop_at`.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    save_checkpoint, begin, learners = ddpl_isaaclab.save_checkpoint, Learner.__init__, []
    step, steps = fake_isaac.FakeMARLEnv.step, []

    def killed(run_dir, args, progress, *others):
        save_checkpoint(run_dir, args, progress, *others)
        if progress.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def stopped(self, actions):
        steps.append(0)
        if rank == 1 and len(steps) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, actions)

    def spy(self, *args):
        begin(self, *args)
        learners.append(self)

    ddpl_isaaclab.save_checkpoint, Learner.__init__, fake_isaac.FakeMARLEnv.step = killed, spy, stopped
    ddpl_isaaclab.main(Args(**options))
    torch.save(learners[0].state_dict(), f"parameters_{rank}.pt")


def two_processes(kill_at=-1, stop_at=-1, **options):
    """The exit codes of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = mp.get_context("fork")
    processes = [fork.Process(target=play_rank, args=(rank, port, kill_at, stop_at, options)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


TWO = FAKE | dict(total_timesteps=1_280, eval_interval=640, checkpoint_interval=320)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run folder of two processes that torchrun has started, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", fake_isaac.__file__]
    done = subprocess.run([*program, *command(ddpl_isaaclab, **TWO)[2:]], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    (run_dir,) = folder.glob("runs/*")
    return run_dir, done.stdout


def test_two_processes_share_one_run(two):
    """Equal networks, other episodes, one run folder."""
    run_dir, printed = two
    assert printed.count("final return") == 1 and len(list(run_dir.glob("events.out.tfevents*"))) == 1
    contents = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    first, second = (stored["data"][0] for stored in contents["buffers"])
    assert first.shape == second.shape == (640, 2, 2) and not torch.equal(first, second)
    assert evaluations(run_dir)[-1]["episodes"] == "16" and contents["progress"]["global_step"] == 1_280


def test_two_processes_killed_stopped_and_resumed(two, fake, capfd):
    """Everything ends just as without. One of them is told to stop: both do, at the same step."""
    fake()
    assert two_processes(kill_at=640, **TWO) == [-signal.SIGKILL, 1]
    (run_dir,) = Path("runs").iterdir()
    assert global_step(run_dir / "checkpoint.pt") == 640
    assert "2 processes, not 1" in error_of(ddpl_isaaclab, resume=str(run_dir))
    capfd.readouterr()
    assert two_processes(stop_at=14, resume=str(run_dir)) == [1, 128 + signal.SIGTERM]  # at step 864
    stopped = f"stopped at step 880; the last checkpoint is from step 640; go on with --resume {run_dir}"
    errors = capfd.readouterr().err
    assert errors.count(stopped) == 1 and "Traceback" not in errors
    assert two_processes(resume=str(run_dir)) == [0, 0]
    theirs, ours = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (two[0], run_dir))
    assert all(equal(ours[key], theirs[key]) for key in ours.keys() - {"progress"})
    assert evaluations(run_dir) == evaluations(two[0])
    for rank in (0, 1):
        assert equal(torch.load(f"parameters_{rank}.pt", weights_only=True), theirs["learner"])


@pytest.mark.parametrize("failure", ["locked", "damaged", "nan"])
def test_a_failure_of_one_process_ends_both(failure, two, fake, tmp_path, monkeypatch, capfd):
    """With one sentence in all, and no other process waits for ever."""
    fake()
    run_dir = tmp_path / "copy"
    shutil.copytree(two[0], run_dir)
    with contextlib.ExitStack() as held:
        options = dict(resume=str(run_dir))
        if failure == "locked":
            held.enter_context(ddpl_isaaclab.locked(run_dir))
            sentence = "in use by process"
        elif failure == "damaged":
            contents = torch.load(run_dir / "checkpoint.pt", weights_only=True)
            contents["buffers"][1]["data"][2][5] = math.nan
            torch.save(contents, run_dir / "checkpoint.pt")
            sentence = "is damaged"
        else:
            step_of_nan(monkeypatch, lambda *after: nan_obs(*after) if ddpl_isaaclab.rank() else after, 3)
            options, sentence = TWO, "an observation is NaN or infinite at step 80"
        assert two_processes(**options) == [1, 1]
    errors = capfd.readouterr().err
    assert errors.count(sentence) == errors.count("ddpl_isaaclab.py: error: ") == 1 and "Traceback" not in errors


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
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        count = math.prod(shape[:-2])
        return (torch.arange(1, count + 1) * 0.618 % 1).view(*shape[:-2], 1, 1).expand(shape)

    def fixed_steps(low, high, shape, device):
        return (low + torch.arange(shape[1])[:, None] % (high - low)).expand(shape)

    class Plain:
        def __init__(self, parameters, lr):
            self.param_groups = [{"params": list(parameters)}]

        def descend(self, gradients):
            with torch.no_grad():
                for parameter, gradient in zip(self.param_groups[0]["params"], gradients, strict=True):
                    parameter -= 0.1 * gradient

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpl_isaaclab, "Adam", Plain)
        learner = Learner(Args(policy=policy, actor_batch_size=share), 3, 5, mask, False)
        for name in ("rand", "randn"):
            patch.setattr(torch, name, fixed)
            patch.setattr(torch, f"{name}_like", lambda x: fixed(*x.shape))
        patch.setattr(torch, "randint", fixed_steps)
        patch.setattr(torch.Tensor, "multinomial", lambda self, n, replacement: self.topk(n).indices)
        whole = Batch(obs, actions, reward, terminated, next_obs, state, next_state)
        rows = torch.arange(32).view(4, world_size, -1)[:, rank].flatten()  # each critic scores the same rows as alone
        batch = Batch(*(column[:, rows] if column.ndim > 2 else column[rows] for column in whole))
        for _ in range(5):
            ddpl_isaaclab.update(learner, batch)
    torch.save(learner.state_dict(), f"{world_size}_{rank}.pt")


def learn_compiled(rank, world_size):
    """A few steps of the temperature, alone a whole update; writes it."""
    torch.distributed.init_process_group("gloo", f"file://{Path.cwd()}/meet", rank=rank, world_size=world_size)
    for name, wrap in (("eager", lambda function, learner: function), ("compiled", ddpl_isaaclab.compiled)):
        torch.manual_seed(0)
        learner = Learner(Args(), 3, 5, torch.ones(2, 2), False)
        step = wrap(ddpl_isaaclab.update_temperature, learner)
        for _ in range(3):
            step(learner, torch.tensor([1.0, 2.0]) - 2.5 * rank)  # of opposite signs but for the mean
        torch.save(learner.log_temperature.detach(), f"{name}_{rank}.pt")


def test_two_compiled_processes_average_their_gradients():
    mp.start_processes(learn_compiled, (2,), nprocs=2, start_method="fork")
    one, other, eager, start = (
        *(torch.load(f"{name}.pt", weights_only=True) for name in ("compiled_0", "compiled_1", "eager_0")),
        Learner(Args(), 3, 5, torch.ones(2, 2), False).log_temperature,
    )
    assert torch.equal(one, other) and ((one - start).sign() == torch.tensor([1, -1])).all()
    torch.testing.assert_close(one, eager, atol=1e-6, rtol=0)


@pytest.mark.parametrize("step, share", [(0, 1), (100, 1), (200, 0.5), (270, 0.15), (300, 0)])
def test_learning_rates_fall_to_zero(step, share):
    args = Args(total_timesteps=300, actor_lr=0.1, critic_lr=0.2, temperature_lr=0.3)
    learner = Learner(args, 3, 5, torch.ones(2, 2), False)
    ddpl_isaaclab.anneal_learning_rates(learner, 170)  # what was set before does not count
    ddpl_isaaclab.anneal_learning_rates(learner, step)
    rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in learner.optimizers()]
    assert rates == pytest.approx([share * rate for rate in (0.1, 0.2, 0.3, 0.1)])


@pytest.mark.parametrize("falling", [True, False])
def test_a_run_learns_ever_more_slowly(falling, fake, monkeypatch):
    fake()
    rates, update = [], ddpl_isaaclab.update

    def recorded_update(learner, batch):
        rates.append(float(learner.critic_optimizer.param_groups[0]["lr"]))
        return update(learner, batch)

    monkeypatch.setattr(ddpl_isaaclab, "update", recorded_update)
    train(Args(**FAKE | dict(anneal_lr=falling, critic_lr=0.1)))
    assert rates[0] == pytest.approx(0.1) and rates[-1] == pytest.approx(0 if falling else 0.1)
    assert sorted(rates, reverse=True) == rates and (len(set(rates)) > 10) == falling


def test_a_compiled_update_follows_the_learning_rate_and_is_compiled_once():
    args = Args(total_timesteps=300)
    moved = []
    for compiling in (False, True):
        learner = Learner(args, 3, 5, torch.ones(2, 2), False)
        update = ddpl_isaaclab.update_temperature
        step = ddpl_isaaclab.compiled(update, learner) if compiling else update
        for now in (0, 200, 270):
            before = learner.log_temperature.detach().clone()
            ddpl_isaaclab.anneal_learning_rates(learner, now)
            with torch.compiler.set_stance("fail_on_recompile" if now else "default"):
                step(learner, torch.ones(2))
            moved.append((learner.log_temperature.detach() - before)[0])
    torch.testing.assert_close(torch.stack(moved[3:]), torch.stack(moved[:3]))
    assert (moved[2] / moved[0]).item() == pytest.approx(0.15, rel=1e-3)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_two_processes_learn_as_one_does_from_the_joint_batch(policy):
    mp.start_processes(learn, (2, policy), nprocs=2, start_method="fork")
    learn(0, 1, policy)
    first, second, joint = (torch.load(f"{name}.pt", weights_only=True) for name in ("2_0", "2_1", "1_0"))
    assert equal(first, second)
    start = (torch.manual_seed(0), Learner(Args(policy=policy), 3, 5, torch.ones(2, 2), False))[1].state_dict()
    for name in joint:
        assert name.startswith("local") or not torch.equal(joint[name], start[name])
        torch.testing.assert_close(first[name], joint[name], rtol=1e-4, atol=1e-5)


# ---- the real task


ISAAC_LAB = importlib.util.find_spec("isaaclab") is not None or "ISAACLAB_REQUIRED" in os.environ
real = pytest.mark.skipif(not ISAAC_LAB, reason="Isaac Lab is not installed (requirements-isaaclab.txt)")
E = 64  # environments


@pytest.fixture(scope="module")
def pendulum():
    """The registered task with E environments; a process can open one simulation only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISAACSIM_ASSET_ROOT", ASSETS)
        with make_env(Args(num_envs=E, device="cpu")) as env:
            yield env


@real
def test_shapes_of_the_pendulum(pendulum):
    obs, state = pendulum.reset(0)
    assert pendulum.agents == ["cart", "pendulum"] and pendulum.action_mask().tolist() == [[1], [1]]
    assert obs.shape == (E, 2, 4) and state.shape == (E, 7) and pendulum.state_size == 7 and not pendulum.own_state
    assert (obs[:, 1, 3] == 0).all() and torch.equal(state, pendulum.env.state())
    after = pendulum.step(2 * torch.rand(E, 2, 1) - 1)
    assert torch.equal(after.state, pendulum.env.state())
    rewards = pendulum.env.reward_dict
    assert torch.equal(rewards["cart"], rewards["pendulum"]) and torch.equal(after.reward, rewards["cart"])


@real
def test_the_trained_team_plays(pendulum):
    """So in the way that the script's docstring loads it."""
    name = "benchmark/teams/Isaac-Pendulum-MARL-Direct.safetensors"
    assert f'load_team("{name}")' in ddpl_isaaclab.__doc__
    policy, args = ddpl_isaaclab.load_team(Path(ddpl_isaaclab.__file__).parent / name)
    assert args.task == ddpl_isaaclab.Args().task
    _, success_rate = ddpl_isaaclab.evaluate(policy, pendulum, True, 0)
    assert success_rate > 0.9


@real
def test_pendulum_restarts_in_the_step_it_falls_and_keeps_the_true_end(pendulum):
    obs, _ = pendulum.reset(0)
    fallen = torch.zeros(E, dtype=torch.bool)
    for _ in range(60):
        after = pendulum.step(torch.ones(E, 2, 1))
        cart, pole = after.next_obs[:, 0, 0], after.next_obs[:, 0, 2]
        out = (cart.abs() > 3) | (pole.abs() > math.pi / 2)
        assert torch.equal(after.ended, out) and torch.equal(after.terminated, out)
        assert torch.equal(after.next_state[:, :4], after.next_obs[:, 0]) and after.successes == 0
        assert (after.obs[out][:, 0, :2] == 0).all() and (after.obs[out][:, 0, 2].abs() <= math.pi / 4).all()
        assert torch.equal(after.next_obs[~out], after.obs[~out])
        moved, velocity = after.next_obs[:, 0, 0] - obs[:, 0, 0], (after.next_obs + obs)[:, 0, 1] / 2
        torch.testing.assert_close(moved, velocity / 60, atol=0.15, rtol=0)  # goes on from the last one
        obs, fallen = after.obs, fallen | out
    assert fallen.all()


@real
def test_pendulum_times_out_without_terminating(pendulum):
    pendulum.reset(0)
    pendulum.env.episode_length_buf[:4] = 298
    after = pendulum.step(torch.zeros(E, 2, 1))
    assert torch.equal(after.ended, torch.arange(E) < 4) and not after.terminated.any()
    assert (after.next_obs[:4, 0, 1] != 0).all() and (after.obs[:4, 0, 1] == 0).all()  # the cart's velocity


@real
def test_pendulum_repeats_itself(pendulum):
    """To the last bit, after whatever went before; a resumed run relies on it."""
    actions = 2 * torch.rand(40, E, 2, 1) - 1
    twice = []
    for _ in range(2):
        obs = [pendulum.reset(3)[0]]
        for action in actions:
            obs.append(pendulum.step(action).next_obs)
        twice.append(torch.stack(obs))
    assert torch.equal(*twice)


REAL = dict(total_timesteps=12_800, num_envs=E, device="cpu", learning_starts=1_280, steps_per_update=8, batch_size=128)
REAL |= dict(critic_hidden=64, actor_hidden=64, eval_interval=12_800, checkpoint_interval=6_400)
REAL |= dict(policy="gaussian", tau=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, and a copy of it from half-way."""
    folder = tmp_path_factory.mktemp("real")
    environment = os.environ | {"ISAACSIM_ASSET_ROOT": ASSETS, "OMP_NUM_THREADS": "1"}
    log = open(folder / "log.txt", "w")
    program = command(ddpl_isaaclab, **REAL)
    process = subprocess.Popen(program, cwd=folder, env=environment, stdout=log, stderr=log)

    def half_way():
        return any(global_step(checkpoint) == 6_400 for checkpoint in folder.glob("runs/*/checkpoint.pt"))

    wait_for(process, half_way)
    (run_dir,) = folder.glob("runs/*")
    shutil.copytree(run_dir, folder / "half")
    assert process.wait() == 0, (folder / "log.txt").read_text()
    return run_dir, folder / "half"


@pytest.mark.slow
@real
def test_return_on_the_pendulum_rises(trained):
    run_dir, _ = trained
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [row["mode"] for row in rows] == ["stochastic", "deterministic"]
    assert all(row["episodes"] == "64" and 0 <= float(row["success_rate"]) <= 1 for row in rows)
    assert float(rows[-1]["return_mean"]) > 4  # at most 20; a team that has learned nothing falls at 1
    assert json.loads((run_dir / "result.json").read_text())["versions"]["isaaclab"].startswith("3.")


@pytest.mark.slow
@real
def test_pendulum_resumed_half_way_ends_as_without(trained, pendulum, monkeypatch):
    """In another process, and in a simulation that has done other things before."""
    run_dir, half = trained
    monkeypatch.setattr(ddpl_isaaclab, "make_env", lambda args: contextlib.nullcontext(pendulum))
    train(Args(resume=str(half)))
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (half, run_dir))
    assert all(equal(ours[key], theirs[key]) for key in ours.keys() - {"progress"})
    assert evaluations(half) == evaluations(run_dir)


@pytest.mark.slow
@real
def test_evaluate_plays_the_pendulum(trained, pendulum, monkeypatch, capsys):
    monkeypatch.setattr(ddpl_isaaclab, "make_env", lambda args: contextlib.nullcontext(pendulum))
    monkeypatch.setattr(pendulum.env.cfg, "episode_length_s", 2.5)
    ddpl_isaaclab.main(Args(evaluate=str(trained[0])))
    printed = capsys.readouterr().out.splitlines()
    for mode in ("stochastic", "deterministic"):
        (line,) = [line for line in printed if line.startswith(mode)]
        assert f"over {E} episodes" in line and "success rate" in line
        assert float(line.split()[2]) > 2


def look_at_the_arm(_rank):
    """In a process of its own, which can open one simulation only."""
    with make_env(Args(task="tests.three_links:Three-Links-MARL-Direct", num_envs=8, device="cpu")) as env:
        assert env.agents == ["shoulder", "elbow", "wrist"] and env.action_mask().tolist() == [[1]] * 3
        moves = torch.rand(10, 8, 3, 1) - 0.5
        twice = []
        for _ in range(2):
            obs, state = env.reset(3)
            twice.append(torch.stack([obs, *(env.step(move).next_obs for move in moves)]))
        assert torch.equal(*twice) and obs.shape == (8, 3, 6) and state.shape == (8, 16)
        assert (obs[:, ::2, 5] == 0).all()  # shoulder and wrist have one neighbour

        env.reset(3)
        arm, target = env.env.arm.data, env.env.target
        tip = torch.tensor([0.0, -1.2])  # where the arm hangs
        target[:3] = tip
        target[3:] = tip + torch.tensor([0.0, 0.3])
        for step in range(49):
            after = env.step(torch.zeros(8, 3, 1))
            assert after.ended.tolist() == [step == 48] * 8
            if step == 40:
                links = arm.body_link_pos_w.torch - env.env.scene.env_origins[:, None]
                wrist, elbow = links[:, 3, 1:], links[:, 2, 1:]
                angle = arm.joint_pos.torch.sum(1)
                tips = wrist + 0.4 * torch.stack([angle.sin(), -angle.cos()], 1) - torch.tensor([0.0, 2.0])
                torch.testing.assert_close(env.env.distance(), (tips - target).norm(dim=1), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close((wrist - elbow).norm(dim=1), torch.full((8,), 0.4), atol=1e-3, rtol=0)
        assert after.successes == 3 and not after.terminated.any()


@real
def test_an_arm_of_three_agents_from_a_module_of_its_own(monkeypatch):
    """--task module:task. Shapes, repetition, kinematics, success and time limit of tests/three_links.py."""
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", ASSETS)
    mp.spawn(look_at_the_arm)


def test_a_task_of_a_module_that_is_not_there(fake):
    fake()
    assert "--task: No module named 'nowhere'" in error_of(ddpl_isaaclab, **FAKE | dict(task="nowhere:Task"))


def test_a_module_is_imported_on_the_users_word_alone(fake, tmp_path, monkeypatch):
    """Not because a checkpoint names it before its task."""
    fake()
    (tmp_path / "payload.py").write_text("open('imported', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    run_dir = train(Args(**FAKE | dict(total_timesteps=400)))["run_dir"]
    checkpoint, task = Path(run_dir) / "checkpoint.pt", f"payload:{fake_isaac.TASK}"
    contents = torch.load(checkpoint, weights_only=True)
    contents["args"]["task"] = task
    torch.save(contents, checkpoint)
    assert f"names a module to import, {task}; to trust it, name it by --task" in error_of(
        ddpl_isaaclab, resume=run_dir
    )
    assert not Path("imported").exists() and "payload" not in sys.modules
    train(Args(resume=run_dir, task=task))
    assert Path("imported").exists()
    del sys.modules["payload"]


# ---- bad input, and what stops a run


@pytest.mark.parametrize("failure", ddpl_isaaclab.FAILURES, ids=lambda failure: failure.__name__)
def test_the_launcher_sees_no_failure(failure, fake):
    """It would print a traceback, or end the process before the sentence that says why."""
    events = fake()
    with pytest.raises(failure), make_env(Args(task=fake_isaac.TASK, num_envs=1, device="cpu")):
        raise failure
    assert events == ["launch", "shut down"]


def test_a_signal_stops_in_order(fake):
    events = fake()
    sentence = "stopped at step 80; the last checkpoint is from step 0; go on with --resume runs/"
    with pytest.raises(ddpl_isaaclab.Stopped, match=sentence):
        train(Args(**FAKE), signals=[signal.SIGINT])
    assert events == ["launch", "shut down"]


def test_without_isaac_lab(monkeypatch):
    """One sentence, which says how to install it."""
    monkeypatch.setitem(sys.modules, "isaaclab", None)
    message = error_of(ddpl_isaaclab)
    assert "Isaac Lab is not installed" in message and "-r requirements-isaaclab.txt" in message
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "task, reason",
    [("Isaac-Fake-MARL", "knows no"), ("CartPole-v1", "knows no"), (fake_isaac.ONE_AGENT, "single agent")],
)
def test_other_tasks_name_the_choices(task, reason, fake):
    fake()
    message = error_of(ddpl_isaaclab, task=task)
    assert "--task" in message and reason in message and fake_isaac.TASK in message and not Path("runs").exists()


def test_observations_that_are_no_vectors(fake, monkeypatch):
    fake()
    monkeypatch.setattr(fake_isaac.FakeMARLEnv, "observation_space", lambda self, agent: Box(0, 1, (8, 8, 3)))
    assert "--task" in error_of(ddpl_isaaclab, **FAKE) and not Path("runs").exists()


def nan_obs(obs, rewards, *rest):
    return {agent: value * math.nan for agent, value in obs.items()}, rewards, *rest


def nan_reward(obs, rewards, *rest):
    return obs, {agent: reward * math.nan for agent, reward in rewards.items()}, *rest


def nan_final_obs(obs, rewards, terminated, truncated, extras):
    """Only what is stored of the old episodes; all have ended."""
    ended = {agent: torch.ones_like(end) for agent, end in truncated.items()}
    extras = extras | {agent: {"final_obs": value * math.nan} for agent, value in obs.items()}
    return obs, rewards, terminated, ended, extras


def step_of_nan(monkeypatch, damage, at):
    """Damage what the environment's step number `at` returns."""
    step, calls = fake_isaac.FakeMARLEnv.step, []

    def damaged(self, actions):
        calls.append(self)
        return damage(*step(self, actions)) if len(calls) == at else step(self, actions)

    monkeypatch.setattr(fake_isaac.FakeMARLEnv, "step", damaged)


NAN = [(nan_obs, "an observation"), (nan_final_obs, "an observation"), (nan_reward, "the reward")]


@pytest.mark.parametrize("damage, name", NAN)
@pytest.mark.parametrize("log_interval, seen_at", [(80, 560), (10_000, 800)], ids=["log point", "checkpoint"])
def test_nan_of_the_simulation_stops_and_loses_nothing(damage, name, log_interval, seen_at, fake, monkeypatch):
    """Seen at the next log point or before a checkpoint, since to look at every step would stop the host each time.

    Until then the environments may have started anew, and nobody may have learned from the transition in the buffer.
    """
    events = fake()
    monkeypatch.setattr(ddpl_isaaclab, "update", lambda learner, batch: {})
    options = FAKE | dict(log_interval=log_interval, eval_interval=10_000, checkpoint_interval=400)
    with monkeypatch.context() as patch:
        step_of_nan(patch, damage, 63)  # global step 504
        assert f"{name} is NaN or infinite at step {seen_at}" in error_of(ddpl_isaaclab, **options)
    assert events == ["launch", "shut down"]
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert global_step(checkpoint) == 400
    assert train(Args(resume=str(checkpoint.parent)))["global_step"] == 1_600


def test_nan_at_a_reset_is_an_observation(fake, monkeypatch):
    fake()
    reset = fake_isaac.FakeMARLEnv.reset
    monkeypatch.setattr(fake_isaac.FakeMARLEnv, "reset", lambda self, **o: nan_obs(reset(self, **o)[0], {}))
    assert "an observation is NaN or infinite at step 80" in error_of(ddpl_isaaclab, **FAKE)


def test_a_diverged_policy_is_not_blamed_on_the_simulation(fake, monkeypatch):
    """Its actions make the observations NaN in the same step."""
    fake()
    sample = ddpl_isaaclab.DiffusionPolicy.sample
    monkeypatch.setattr(ddpl_isaaclab.DiffusionPolicy, "sample", lambda self, obs, *o: sample(self, obs, *o) * math.nan)
    options = FAKE | dict(policy="diffusion", steps_per_update=800)
    assert "the action is NaN or infinite at step 240" in error_of(ddpl_isaaclab, **options)
