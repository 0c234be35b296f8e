"""ddpl_mpe.py on the real mpe2 tasks: the environment arrays, the replay buffer, the training loop, unfit tasks."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of
from mpe2 import simple_spread_v3

import ddpl_mpe
from ddpl_mpe import Args, Batch, ReplayBuffer, VectorMPE, episode_seeds, evaluate, train

SMALL = dict(total_timesteps=700, learning_starts=200, eval_interval=300, eval_episodes=2, final_eval_episodes=3)
SMALL |= dict(log_interval=100, checkpoint_interval=200, critic_hidden=32, actor_hidden=16, batch_size=32)
SMALL |= dict(actor_batch_size=32, compile=False)
TASKS = {  # task: observation sizes, action sizes
    "simple_spread_v3": ([18, 18, 18], [2, 2, 2]),
    "simple_reference_v3": ([21, 21], [12, 12]),
    "simple_speaker_listener_v4": ([3, 11], [3, 2]),
}


# ---- environment


@pytest.mark.parametrize("env_id", TASKS)
def test_shapes_bounds_and_truncation(env_id):
    obs_sizes, action_sizes = TASKS[env_id]
    env = VectorMPE(env_id, None, 4)
    assert (env.obs_sizes, env.action_sizes) == (obs_sizes, action_sizes)
    mask = env.action_mask()
    assert mask.sum(-1).tolist() == action_sizes
    obs = env.reset(episode_seeds(0, 1, 0, 4))
    for step in range(25):
        actions = ((2 * torch.rand(4, *mask.shape) - 1).sign() * mask).numpy()  # the corners of the box
        for box, agent in zip(env._to_box(actions), env.agents):
            assert all(env.envs[0].action_space(agent).contains(row) for row in box)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            obs, reward, terminated, truncated = env.step(actions)
        assert obs.shape == (4, len(obs_sizes), max(obs_sizes)) and obs.dtype == reward.dtype == np.float32
        assert not terminated.any() and (truncated == (step == 24)).all()
    for i, size in enumerate(obs_sizes):
        assert (obs[:, i, size:] == 0).all() and (obs[:, i, :size] != 0).any()


def test_steps_equal_mpe2s_own():
    """Same seeds and forces: same observations and the mean of the agents' rewards, up to and with the last step."""
    env, seeds = VectorMPE("simple_spread_v3", 3, 2), episode_seeds(0, 1, 0, 2)
    obs = env.reset(seeds)
    theirs = simple_spread_v3.parallel_env(N=3, continuous_actions=True)
    their_obs = theirs.reset(seed=int(seeds[1]))[0]
    while theirs.agents:
        np.testing.assert_array_equal(obs[1], [their_obs[a] for a in env.agents])
        actions = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2)).astype(np.float32)
        obs, reward, _, truncated = env.step(actions)
        left, right = np.maximum(-actions[1], 0), np.maximum(actions[1], 0)
        boxes = np.stack([left[:, 0] * 0, left[:, 0], right[:, 0], left[:, 1], right[:, 1]], -1)
        their_obs, rewards, *_ = theirs.step(dict(zip(env.agents, boxes)))
        assert reward[1] == np.float32(np.mean([*rewards.values()]))
    assert truncated.all()
    np.testing.assert_array_equal(obs[1], [their_obs[a] for a in env.agents])  # the true last observation


def test_force_points_where_the_action_says():
    env = VectorMPE("simple_spread_v3", 3, 1)
    env.reset([0])
    forces = np.array([[[1, 0], [0, -1], [-0.5, 0.5]]], np.float32)
    velocity = env.step(forces)[0][0, :, :2]
    np.testing.assert_allclose(velocity, 0.5 * forces[0], atol=0.05)  # acceleration 5, time step 0.1; soft contacts


# ---- replay buffer


def test_buffer_keeps_the_last_transitions_and_their_order_of_axes():
    buffer = ReplayBuffer(5, Batch((2, 3), (2, 1), (), (), (2, 3)))
    for step in range(4):
        numbers = torch.arange(2.0) + 2 * step
        obs = numbers[:, None, None].expand(2, 2, 3)
        buffer.add(obs, obs[..., :1], numbers, torch.zeros(2, dtype=bool), obs + 0.5)
    assert buffer.size == 5
    batch = buffer.sample(200)
    assert set(batch.reward.tolist()) == {3, 4, 5, 6, 7}
    assert batch.obs.shape == (2, 200, 3) and batch.actions.shape == (2, 200, 1)
    assert (batch.obs[1, :, 2] == batch.reward).all() and (batch.next_obs[0, :, 0] == batch.reward + 0.5).all()


# ---- training loop


def test_replay_holds_true_next_observations(monkeypatch):
    """Also at the end of an episode, whose transition is truncated, not terminated; actions stay in the box."""
    added, add = [], ReplayBuffer.add
    monkeypatch.setattr(ReplayBuffer, "add", lambda self, *t: (added.append(t), add(self, *t)))
    train(Args(**SMALL, num_envs=2))
    assert len(added) == 350
    for step, (now, then) in enumerate(zip(added, added[1:]), start=1):
        assert torch.equal(now[4], then[0]) == (step % 25 != 0)
    assert all(not row[3].any() and row[1].abs().max() <= 1 for row in added)
    ends = Batch(*(torch.cat(column) for column in zip(*added[24::25])))
    moved = ends.next_obs[:, :, :2] - (0.75 * ends.obs[:, :, :2] + 0.5 * ends.actions)
    distances = torch.cdist(ends.obs[:, :, 2:4], ends.obs[:, :, 2:4]) + 9 * torch.eye(3)
    alone = distances.min(-1).values > 0.4  # who touches nobody, at a radius of 0.15, is pushed by nobody
    assert alone.sum() > 20 and moved[alone].abs().max() < 1e-5


# ---- unfit tasks


def test_unknown_task_names_the_cooperative_ones():
    message = error_of(ddpl_mpe, env_id="simple_spred_v3")
    assert "--env-id" in message
    for task in ("simple_spread_v3", "simple_reference_v3", "simple_speaker_listener_v4"):
        assert task in message
    assert "simple_tag_v3" not in message and not Path("runs").exists()


def test_competitive_task():
    message = error_of(ddpl_mpe, env_id="simple_tag_v3")
    assert "adversaries" in message and "simple_spread_v3" in message


def test_discrete_task(monkeypatch):
    module = ddpl_mpe.mpe_environments["mpe/simple_spread_v3"]

    class DiscreteOnly:
        @staticmethod
        def parallel_env(continuous_actions=False, **options):
            return module.parallel_env(continuous_actions=False, **options)

    monkeypatch.setitem(ddpl_mpe.mpe_environments, "mpe/discrete_v0", DiscreteOnly)
    message = error_of(ddpl_mpe, env_id="discrete_v0")
    assert "discrete" in message and "simple_spread_v3" in message


def test_number_of_agents_where_the_task_fixes_it():
    assert "--num-agents" in error_of(ddpl_mpe, env_id="simple_reference_v3", num_agents=3)


# ---- learning


@pytest.fixture(scope="module")
def random_return():
    class Uniform:
        mask = torch.zeros(1)  # on the CPU

        def sample(self, obs, deterministic):
            return 2 * torch.rand(*obs.shape[:2], 2) - 1

    return evaluate(Uniform(), Args(), 200, False, seed=0).mean()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_learning_beats_a_random_policy(policy, random_return):
    """By 4 within seconds: a random team of three scores about -25.4, one after the default run -12."""
    args = dict(policy=policy, total_timesteps=8_000, learning_starts=500, steps_per_update=5, eval_interval=8_000)
    args |= dict(critic_hidden=64, actor_hidden=64, local_critic_hidden=32, batch_size=128, actor_batch_size=32)
    args |= dict(compile=False)
    assert train(Args(**args, final_eval_episodes=100))["final_return"] > random_return + 4
