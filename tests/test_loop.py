"""The environment arrays, the replay buffer and the training loop of ddpl_mpe.py, on the real mpe2 tasks."""

import csv
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, equal
from mpe2 import simple_spread_v3

import ddpl_mpe
from ddpl_mpe import Args, Batch, ReplayBuffer, VectorMPE, episode_seeds, evaluate, train

SMALL = dict(total_timesteps=700, learning_starts=200, eval_interval=300, eval_episodes=2, final_eval_episodes=3)
SMALL |= dict(
    compile=False,
    log_interval=100,
    checkpoint_interval=200,
    critic_hidden=32,
    actor_hidden=16,
    batch_size=32,
    actor_batch_size=32,
)
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
    velocity_before, velocity_after, force = added[24][0][:, :, :2], added[24][4][:, :, :2], added[24][1]
    np.testing.assert_allclose(velocity_after, 0.75 * velocity_before + 0.5 * force, atol=0.15)


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_run_folder_and_result(env_id, policy):
    result = train(Args(**SMALL, env_id=env_id, policy=policy, num_envs=4))
    assert result["global_step"] == 700 and len(result["episodic_returns"]) == 3
    assert result["final_return"] == pytest.approx(np.mean(result["episodic_returns"]))
    run_dir = ddpl_mpe.Path(result["run_dir"])
    assert run_dir.name.startswith(f"ddpl_mpe__{env_id}__1__")
    assert json.loads((run_dir / "result.json").read_text())["final_return"] == result["final_return"]
    assert json.loads((run_dir / "args.json").read_text())["env_id"] == env_id
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [(row["global_step"], row["mode"]) for row in rows] == [
        (step, mode) for step in ("300", "600", "700") for mode in ("stochastic", "deterministic")
    ]
    assert float(rows[-1]["return_mean"]) == pytest.approx(result["final_return"])
    assert list(run_dir.glob("events.out.tfevents*"))


def test_same_seed_same_run_and_other_seed_another():
    first, again, other = (checkpoint_of(train(Args(**SMALL, seed=seed))) for seed in (1, 1, 2))
    assert equal(first["learner"], again["learner"]) and equal(first["buffer"], again["buffer"])
    assert not equal(first["learner"], other["learner"]) and not equal(first["buffer"], other["buffer"])
    assert not torch.equal(first["buffer"]["data"][0][0], other["buffer"]["data"][0][0])  # other episodes, too


def test_evaluation_does_not_disturb_training():
    """More frequent evaluations and log points leave the same learner."""
    often, rarely = (checkpoint_of(train(Args(**SMALL | dict(eval_interval=n, log_interval=n)))) for n in (100, 700))
    assert equal(often["learner"], rarely["learner"])


# ---- learning


@pytest.fixture(scope="module")
def random_return():
    class Uniform:
        mask = torch.zeros(1)  # on the CPU

        def sample(self, obs, deterministic):
            return 2 * torch.rand(*obs.shape[:2], 2) - 1

    return evaluate(Uniform(), Args(), 200, False, seed=0).mean()


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_learning_beats_a_random_policy(policy, random_return):
    """By 4 within seconds: a random team of three scores about -25.4, one after the default run -12."""
    args = dict(policy=policy, total_timesteps=8_000, learning_starts=500, steps_per_update=5, eval_interval=8_000)
    args |= dict(critic_hidden=64, actor_hidden=64, local_critic_hidden=32, batch_size=128, actor_batch_size=32)
    args |= dict(compile=False)
    assert train(Args(**args, final_eval_episodes=100))["final_return"] > random_return + 4
