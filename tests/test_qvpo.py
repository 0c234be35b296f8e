"""qvpo.py: its maths, its update against the published procedure, its loop on real Gymnasium tasks, its run folders."""

import csv
import itertools
import json
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import checkpoint_of, command, equal, error_about, error_of, kill_and_resume, recorded
from torch.nn import functional as F

import qvpo
from benchmark.qvpo_published import PublishedLearner
from qvpo import Args, Batch, Learner, make_env, train, with_preset

SIZES = dict(hidden=16, denoising_steps=3, num_candidates=4, batch_size=16, num_uniform=2)
SMALL = SIZES | dict(total_timesteps=900, learning_starts=100, eval_interval=300, eval_episodes=2, num_threads=1)
SMALL |= dict(final_eval_episodes=3, log_interval=100, checkpoint_interval=250)


def learner(obs_size=5, action_size=3, **options):
    return Learner(with_preset(Args(**SIZES | options)), obs_size, action_size)


def random_batch(size=16, obs_size=5, action_size=3):
    obs, next_obs = torch.randn(2, size, obs_size)
    actions = 2 * torch.rand(size, action_size) - 1
    return Batch(obs, actions, torch.randn(size), (torch.rand(size) < 0.3).float(), next_obs)


# ---- diffusion against diffusers


def scheduler(num_steps):
    return DDPMScheduler(num_steps, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_schedule_is_diffusers(num_steps):
    ours = qvpo.cosine_schedule(num_steps)
    assert ours[0] == 1
    torch.testing.assert_close(ours[1:], scheduler(num_steps).alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_sampler_is_diffusers(num_steps):
    """The same chain from the same random numbers."""
    policy, obs = learner(denoising_steps=num_steps).policy, torch.randn(4, 5)
    torch.manual_seed(1)
    ours = policy.sample(obs, 6)
    theirs, features = scheduler(num_steps), policy.step_features()
    torch.manual_seed(1)
    x = torch.randn(6, 4, 3)
    for t in theirs.timesteps:
        x = theirs.step(policy(policy.observation(obs) + features[t], x), t, x).prev_sample
    torch.testing.assert_close(ours, x.detach(), rtol=1e-3, atol=1e-3)
    assert ours.abs().max() <= 1 and ours.std() > 0.1


def test_bfloat16_samples_nearly_the_same():
    policy, obs = learner(hidden=64).policy, torch.randn(4, 5)
    samples = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        samples.append(policy.sample(obs, 8, dtype))
    assert samples[1].dtype == torch.float32
    torch.testing.assert_close(*samples, atol=0.05, rtol=0)
    assert not torch.equal(*samples)


# ---- candidates and weights


def test_weights_by_hand():
    q = torch.tensor([[1.0, -3.0, 5.0], [2.0, -1.0, 5.0], [6.0, -2.0, 5.0]])  # [K, B]
    assert qvpo.q_weights(q, "qadv").tolist() == [3, 1, 0]
    assert qvpo.q_weights(q, "qcut").tolist() == [6, 1, 5]


def test_best_of_by_hand():
    candidates = torch.arange(12.0).view(3, 2, 2)
    assert qvpo.best_of(candidates, torch.tensor([[0.0, 3], [2, 1], [1, 2]])).tolist() == [[4, 5], [2, 3]]


def test_candidates_carry_their_own_lower_q():
    """Also in several chunks: the values are those of a plain MLP asked one candidate at a time."""
    model, obs = learner(), torch.randn(700, 5)
    candidates, q = qvpo.draw_candidates(model.policy, model.critic, obs, 5)
    assert candidates.shape == (5, 700, 3) and q.shape == (5, 700)
    assert len({candidates[k].sum().item() for k in range(5)}) == 5
    for k in range(5):
        torch.testing.assert_close(q[k], model.critic(obs, candidates[k : k + 1])[:, 0].amin(0).detach())


def test_acting_takes_the_best_and_one_candidate_is_plain_sampling():
    model, obs = learner(), torch.randn(6, 5)
    torch.manual_seed(3)
    candidates, q = qvpo.draw_candidates(model.policy, model.critic, obs, 8)
    torch.manual_seed(3)
    action = model.act(obs, 8)
    for b in range(6):
        assert torch.equal(action[b], candidates[q[:, b].argmax(), b])
    torch.manual_seed(3)
    action = model.act(obs, 1)
    torch.manual_seed(3)
    assert torch.equal(action, model.policy.sample(obs, 1)[0])


def test_evaluation_plays_the_best_of_more_candidates():
    model, asked = learner(behavior_candidates=3, eval_candidates=7), []
    model.act = lambda obs, num_candidates: asked.append(num_candidates)
    for act in qvpo.ways_to_play(model).values():
        act(None)
    assert asked == [3, 7] and Args().eval_candidates == 32


# ---- losses and updates


def test_gradient_is_that_of_weighted_behaviour_cloning():
    """Finite differences of a sum of weights times each action's own loss, noised by diffusers."""
    torch.set_default_dtype(torch.float64)
    try:
        policy, obs, actions = learner().policy, torch.randn(7, 5), 2 * torch.rand(2, 7, 3) - 1
        weights = torch.rand(2, 7)
        noising = scheduler(3)

        def cloning():
            torch.manual_seed(5)
            t, noise = torch.randint(1, 4, weights.shape), torch.randn_like(actions)
            total = 0.0
            for k, b in itertools.product(range(2), range(7)):
                x_t = noising.add_noise(actions[k, b], noise[k, b], t[k, b] - 1)
                context = policy.observation(obs[b]) + policy.step_features()[t[k, b] - 1]
                error = policy(context[None, None], x_t[None, None])[0, 0] - noise[k, b]
                total += weights[k, b] * error.square().mean()
            return total / 14

        parameters = list(policy.parameters())
        torch.manual_seed(5)
        gradient = torch.autograd.grad(qvpo.denoising_loss(policy, obs, actions, weights), parameters)
        for _ in range(5):
            direction = [torch.randn_like(parameter) for parameter in parameters]
            slope = []
            for step in (1e-5, -2e-5):
                torch._foreach_add_([p.data for p in parameters], direction, alpha=step)
                slope.append(cloning().item())
            torch._foreach_add_([p.data for p in parameters], direction, alpha=1e-5)
            expected = sum((g * d).sum() for g, d in zip(gradient, direction)).item()
            assert (slope[0] - slope[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("q_transform", ["qadv", "qcut"])
def test_update_is_the_published_one(q_transform):
    """Losses and every parameter after three updates, from the same random numbers and with the same activation."""
    model, batch = learner(hidden=32, q_transform=q_transform), random_batch()
    published = PublishedLearner(model, F.silu)
    for seed in range(3):
        torch.manual_seed(seed)
        ours = qvpo.update(model, batch, batch.next_obs, 0.02)
        torch.manual_seed(seed)
        theirs = published.update(batch, batch.next_obs, 0.02)
        torch.testing.assert_close((ours["losses/critic"], ours["losses/actor"]), theirs, rtol=1e-4, atol=1e-6)
    expected = PublishedLearner(model, F.silu)
    for name in ("actor", "target_actor", "critic", "target_critic"):
        for p, q in zip(getattr(published, name).parameters(), getattr(expected, name).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_critic_bootstraps_unless_terminated():
    """The target by hand, with a target policy of one action and a target critic of known values."""
    model, batch = learner(target_candidates=3, gamma=0.9), random_batch()
    model.target_critic.forward = lambda obs, actions: torch.stack([actions.sum(-1), actions.sum(-1) + 1])
    torch.manual_seed(0)
    value = model.target_policy.sample(batch.next_obs, 3).sum(-1).amax(0)
    target = batch.reward + 0.9 * torch.where(batch.terminated.bool(), 0, value)
    q = model.critic(batch.obs, batch.actions[None])[:, 0].detach()
    torch.manual_seed(0)
    loss = qvpo.update_critic(model, batch)["losses/critic"]
    torch.testing.assert_close(loss, ((q - target) ** 2).mean(1).sum())
    assert batch.terminated.any() and not batch.terminated.all()


def test_without_entropy_only_the_best_candidates_are_learned():
    model, obs = learner(), torch.randn(16, 5)
    learned = []
    loss = qvpo.denoising_loss

    def spy(policy, obs, actions, weights):
        learned.append((actions, weights))
        return loss(policy, obs, actions, weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qvpo, "denoising_loss", spy)
        qvpo.update_policy(model, obs, 0.0)
        qvpo.update_policy(model, obs, 0.1)
    (actions, weights), (more_actions, more_weights) = learned
    assert actions.shape == (1, 16, 3) and weights.shape == (1, 16)
    assert more_actions.shape == (3, 16, 3)
    torch.testing.assert_close(more_weights[1:], 0.1 * more_weights[:1].expand(2, -1))


def test_entropy_coefficient_decays_to_its_floor():
    args = Args(total_timesteps=1000, entropy_coefficient=0.02, min_entropy_coefficient=0.002)
    assert [qvpo.entropy_coefficient(args, step) for step in (0, 500, 950, 1000)] == [0.02, 0.01, 0.002, 0.002]
    assert qvpo.entropy_coefficient(Args(entropy_coefficient=0.0), 0) == 0
    assert qvpo.entropy_coefficient(Args(entropy_coefficient=0.001), 10) == 0.001


def test_gradients_are_clipped():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], 1.0)
    qvpo.take_step(optimizer, (weight * torch.tensor([30.0, 40.0])).sum(), 2.0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-1.2, -1.6]))


# ---- environments


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "Hopper-v5", "BipedalWalker-v3", "dm_control/cartpole-swingup-v0"])
def test_every_task_is_flat_float32_and_takes_unit_actions(env_id):
    env = make_env(env_id)
    obs, _ = env.reset(seed=0)
    assert obs.dtype == np.float32 and obs.ndim == 1 and env.observation_space.shape == obs.shape
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    plain = gym.make(env_id)
    plain.reset(seed=0)
    low, high = plain.action_space.low, plain.action_space.high
    actions = np.linspace(-1, 1, 5)[:, None] * np.ones(low.shape)
    for action in actions:
        obs, reward, *_ = env.step(action.astype(np.float32))
        their_obs, their_reward, *_ = plain.step(
            (low + (action + 1) / 2 * (high - low)).astype(plain.action_space.dtype)
        )
        their_obs = np.concatenate([*their_obs.values()]) if isinstance(their_obs, dict) else their_obs
        np.testing.assert_allclose(obs, their_obs, rtol=1e-4, atol=1e-5)
        assert reward == pytest.approx(their_reward, rel=1e-4, abs=1e-5)


def test_truncated_transitions_keep_their_true_next_observation(monkeypatch):
    """Pendulum is cut at 200 steps and never terminates; the checkpoint at 500 starts both copies anew."""
    rows = recorded(qvpo, monkeypatch, **SMALL | dict(num_envs=2, checkpoint_interval=500))
    assert not rows.terminated.any() and rows.actions.abs().max() <= 1
    continues = (rows.next_obs[:-1] == rows.obs[1:]).all(-1)
    assert [i + 1 for i in range(449) if not continues[i].all()] == [200, 250]
    np.testing.assert_allclose(rows.next_obs.norm(dim=-1)[..., None] ** 2, 1 + rows.next_obs[..., 2:] ** 2, rtol=1e-4)
    turn = torch.atan2(rows.next_obs[..., 1], rows.next_obs[..., 0]) - torch.atan2(rows.obs[..., 1], rows.obs[..., 0])
    turn = torch.atan2(turn.sin(), turn.cos())
    torch.testing.assert_close(turn, 0.05 * rows.next_obs[..., 2], atol=1e-3, rtol=0)  # also over the ends


def test_terminated_transitions_say_so(monkeypatch):
    rows = recorded(qvpo, monkeypatch, **SMALL | dict(env_id="InvertedDoublePendulum-v5", num_envs=2))
    assert 10 < rows.terminated.sum() < 450
    continues = (rows.next_obs[:-1] == rows.obs[1:]).all(-1)
    checkpoints = torch.zeros_like(continues)
    checkpoints[[124, 249, 374]] = True
    assert torch.equal(continues, ~(rows.terminated[:-1] | checkpoints))


def test_copies_and_checkpoints_start_different_episodes(monkeypatch):
    rows = recorded(qvpo, monkeypatch, **SMALL | dict(num_envs=2))
    starts = rows.obs[[0, 125]].flatten(0, 1)  # of both copies, at the start and after the first checkpoint
    assert len(starts.unique(dim=0)) == 4


# ---- run folders


def test_run_folder_and_result():
    result = train(Args(**SMALL, num_envs=3))
    assert result["global_step"] == 900 and len(result["episodic_returns"]) == 3
    assert result["final_return"] == pytest.approx(np.mean(result["episodic_returns"]))
    run_dir = Path(result["run_dir"])
    assert run_dir.name.startswith("qvpo__Pendulum-v1__1__")
    assert json.loads((run_dir / "result.json").read_text())["final_return"] == result["final_return"]
    assert json.loads((run_dir / "args.json").read_text())["target_candidates"] == 2  # the preset's, written down
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    assert [(row["global_step"], row["mode"]) for row in rows] == [
        (step, mode) for step in ("300", "600", "900") for mode in ("stochastic", "deterministic")
    ]
    assert list(run_dir.glob("events.out.tfevents*"))


def test_presets_fill_in_what_flags_leave_open():
    paper = with_preset(Args(preset="paper", hidden=99))
    assert (paper.hidden, paper.denoising_steps, paper.num_candidates, paper.batch_size) == (99, 20, 64, 256)
    assert None not in [getattr(with_preset(Args()), name) for name in qvpo.PRESETS["laptop"]]
    assert qvpo.PRESETS["laptop"].keys() == qvpo.PRESETS["paper"].keys()


def test_same_seed_same_run_and_other_seed_another():
    first, again, other = (checkpoint_of(train(Args(**SMALL, seed=seed))) for seed in (1, 1, 2))
    assert equal(first["learner"], again["learner"]) and equal(first["buffer"], again["buffer"])
    assert not torch.equal(first["buffer"]["data"][0][0], other["buffer"]["data"][0][0])


def test_evaluation_does_not_disturb_training():
    often, rarely = (checkpoint_of(train(Args(**SMALL | dict(eval_interval=n, log_interval=n)))) for n in (100, 900))
    assert equal(often["learner"], rarely["learner"])


def test_killed_and_resumed_equals_never_killed():
    """On a task whose episodes end at different times in its two copies."""
    options = SMALL | dict(env_id="Hopper-v5", num_envs=2, total_timesteps=2_000)
    kill_and_resume(qvpo, kill_at=(500, 1250), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    subprocess.run(command(qvpo, **SMALL), cwd=folder, check=True, capture_output=True)
    return next(folder.glob("runs/*"))


def test_resuming_a_finished_run_repeats_its_result(finished):
    before = json.loads((finished / "result.json").read_text())
    assert train(Args(resume=str(finished)))["episodic_returns"] == before["episodic_returns"]


def test_evaluate_prints_returns_and_films(finished):
    flags = [*command(qvpo, evaluate=finished, final_eval_episodes=5, seed=7), "--capture-video"]
    done = subprocess.run(flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stochastic" in done.stdout and "deterministic" in done.stdout and "5 episodes" in done.stdout
    for mode in ("stochastic", "deterministic"):
        assert (finished / f"{mode}.gif").read_bytes()[:3] == b"GIF"


# ---- bad input


@pytest.mark.parametrize(
    "env_id, why",
    [("Hoper-v5", "Did you mean"), ("CartPole-v1", "Discrete"), ("Hopper-v99", "v5"), ("dm_control/cart-v0", "exist")],
)
def test_unfit_tasks(env_id, why):
    message = error_of(qvpo, env_id=env_id)
    assert "--env-id" in message and why in message and "Hopper-v5" in message and not Path("runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        dict(num_envs=0),
        dict(total_timesteps=-5),
        dict(batch_size=0),
        dict(hidden=0),
        dict(denoising_steps=0),
        dict(num_candidates=1),
        dict(seed=-1),
        dict(gamma=1.5),
        dict(tau=0.0),
        dict(actor_lr=float("nan")),
        dict(max_grad_norm=0.0),
        dict(entropy_coefficient=-0.1),
        dict(checkpoint_interval=0),
        dict(buffer_size=3, num_envs=4),
    ],
    ids=str,
)
def test_invalid_numbers(options):
    error_about(qvpo, **options)


def test_invalid_choices_are_listed():
    for flag, choices in (("preset", ("laptop", "paper")), ("q_transform", ("qadv", "qcut"))):
        done = subprocess.run(command(qvpo, **{flag: "best"}), capture_output=True, text=True)
        assert done.returncode != 0 and all(choice in done.stderr for choice in choices)


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_run_folders_that_cannot_be_used(flag, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished.parent.parent)
    assert finished.name in error_of(qvpo, **{flag: "runs/nothing_here"})
    (tmp_path / "checkpoint.pt").write_bytes((finished / "checkpoint.pt").read_bytes()[:5000])
    assert "damaged" in error_of(qvpo, **{flag: str(tmp_path)})
    assert f"ran with --{'preset'} laptop" in error_of(qvpo, **{flag: str(finished), "preset": "paper"})


def test_video_where_nothing_can_be_drawn(monkeypatch):
    def no_display(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(gym.envs.classic_control.PendulumEnv, "render", no_display)
    message = error_of(qvpo, **SMALL, capture_video=True)
    assert "--capture-video" in message and "MUJOCO_GL" in message and not Path("runs").exists()


@pytest.mark.parametrize("option", ["critic_lr", "actor_lr"])
def test_diverging_run_says_where(option):
    assert "is NaN or infinite at step" in error_of(qvpo, **SMALL | {option: 1e30, "log_interval": 10_000})


# ---- learning


def test_learns_to_stand_a_pendulum():
    """A random policy scores about -1200, one that stands it at once about -150."""
    args = Args(
        total_timesteps=6_000, denoising_steps=5, hidden=64, num_candidates=8, eval_interval=6_000, critic_lr=1e-3
    )
    assert train(args)["final_return"] > -200
