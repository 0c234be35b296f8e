"""ddpl_mamujoco.py: factorisations as arrays, its loop on two of them, its run folders."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium_robotics import mamujoco_v1
from helpers import command, equal, error_about, error_of, kill_and_resume, recorded

import ddpl_mamujoco
from ddpl_mamujoco import CONFIGURATIONS, Args, StackedAgents, evaluate, train

SMALL = dict(total_timesteps=1_200, learning_starts=200, eval_interval=400, eval_episodes=2, final_eval_episodes=3)
SMALL |= dict(log_interval=100, checkpoint_interval=400, critic_hidden=32, actor_hidden=16, batch_size=32, num_envs=4)
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


def test_processes_play_as_one_does(monkeypatch):
    options = SMALL | HOPPER | dict(total_timesteps=400)
    one, many = (recorded(ddpl_mamujoco, monkeypatch, **options, async_envs=a) for a in (False, True))
    for ours, theirs in zip(one, many):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("task", [HOPPER, HALF_CHEETAH], ids=str)
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_run_folder_and_result(task, policy):
    result = train(Args(**SMALL, **task, policy=policy))
    assert result["global_step"] == 1200 and len(result["episodic_returns"]) == 3
    run_dir = Path(result["run_dir"])
    assert run_dir.name.startswith(f"ddpl_mamujoco__{task['scenario']}-{task['agent_conf']}__1__")
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [(row["global_step"], row["mode"]) for row in rows] == [
        (step, mode) for step in ("400", "800", "1200") for mode in ("stochastic", "deterministic")
    ]
    assert float(rows[-1]["return_mean"]) == pytest.approx(result["final_return"])
    assert json.loads((run_dir / "result.json").read_text())["final_return"] == result["final_return"]
    buffer = torch.load(run_dir / "checkpoint.pt", weights_only=True)["buffer"]["data"]
    padding = StackedAgents(Args(**task)).action_mask() == 0
    assert (buffer[1][:, padding] == 0).all()


@pytest.mark.parametrize("policy, task", [("diffusion", HOPPER), ("gaussian", HALF_CHEETAH)])
def test_killed_and_resumed_equals_never_killed(policy, task):
    kill_and_resume(ddpl_mamujoco, (400, 1200), **SMALL | task | dict(policy=policy, total_timesteps=2_400))


def test_evaluation_does_not_disturb_training():
    often, rarely = (train(Args(**SMALL | HOPPER | dict(eval_interval=n, log_interval=n))) for n in (100, 1200))
    learners = [torch.load(f"{run['run_dir']}/checkpoint.pt", weights_only=True)["learner"] for run in (often, rarely)]
    assert equal(*learners)


def test_evaluate_prints_returns():
    run_dir = train(Args(**SMALL | HOPPER))["run_dir"]
    done = subprocess.run(
        command(ddpl_mamujoco, evaluate=run_dir, final_eval_episodes=5, seed=7), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stochastic" in done.stdout and "deterministic" in done.stdout and "5 episodes" in done.stdout


# ---- bad input


@pytest.mark.parametrize(
    "options, choice",
    [
        (dict(scenario="HalfCheeta"), "HalfCheetah"),
        (dict(agent_conf="3x2"), "6x1"),
        (dict(agent_obsk=-1), "at least 0"),
    ],
)
def test_unknown_tasks_name_the_choices(options, choice):
    (name,) = options
    message = error_of(ddpl_mamujoco, **options)
    assert f"--{name.replace('_', '-')}" in message and choice in message and not Path("runs").exists()


@pytest.mark.parametrize("options", [dict(num_envs=0), dict(gamma=1.5), dict(block_size=0), dict(sigmas=())], ids=str)
def test_invalid_numbers(options):
    error_about(ddpl_mamujoco, **options)


def test_video_where_nothing_can_be_drawn(monkeypatch):
    """Said before the training, not after it."""

    def no_display(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(mamujoco_v1.parallel_env, "render", no_display)
    message = error_of(ddpl_mamujoco, **SMALL | HOPPER, capture_video=True)
    assert "--capture-video" in message and "MUJOCO_GL" in message and not Path("runs").exists()


def test_diverging_run_says_where():
    assert "is NaN or infinite at step" in error_of(
        ddpl_mamujoco, **SMALL | HOPPER | dict(critic_lr=1e30, log_interval=10_000)
    )


# ---- learning


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_learning_beats_a_random_policy(policy):
    """Swimmer, whose reward is its speed: a random team drifts, one that has learned a little swims."""
    args = Args(scenario="Swimmer", agent_conf="2x1", policy=policy, total_timesteps=8_000, learning_starts=1_000)

    class Uniform:
        def sample(self, obs, deterministic):
            return 2 * torch.rand(*obs.shape[:2], 1) - 1

    random = evaluate(Uniform(), args, 10, False, seed=0).mean()
    assert train(args)["final_return"] > random + 10
