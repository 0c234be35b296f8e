"""qvpo.py: its maths, its update against the published procedure, its loop on real Gymnasium tasks, its presets."""

import contextlib
import itertools
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from helpers import OnMeta, checkpoint_of, equal, error_of, recorded, scalars
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

import qvpo
from benchmark.qvpo_published import PublishedLearner
from qvpo import Args, Batch, Learner, make_env, train, with_preset

SIZES = dict(hidden=16, denoising_steps=3, num_candidates=4, batch_size=16, num_uniform=2)
SMALL = SIZES | dict(total_timesteps=900, learning_starts=100, eval_interval=300, eval_episodes=2, num_threads=1)
SMALL |= dict(final_eval_episodes=3, log_interval=100, checkpoint_interval=250, steps_per_update=4)


def learner(obs_size=5, action_size=3, device="cpu", **options):
    return Learner(with_preset(Args(**SIZES | options)), obs_size, action_size, device)


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
    theirs, features = scheduler(num_steps), policy.time_features()
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


# ---- networks, candidates and weights


def test_weights_start_as_truncated_normals():
    """Of deviation 1 / (2 sqrt(fan_in)), of which the cut at two deviations leaves 0.88."""
    model = learner(hidden=256)
    policy, critic = model.policy, model.critic
    weights = {256: (policy.hidden[0].weight, policy.epsilon.weight, critic.hidden[1].weight, critic.value.weight)}
    weights |= {40: (policy.time.weight, policy.noisy_action.weight), 8: (critic.observation.weight, critic.action)}
    for fan_in, drawn in weights.items():
        for weight in drawn:
            assert weight.abs().max() <= fan_in**-0.5
            assert weight.std().item() == pytest.approx(0.44 * fan_in**-0.5, rel=0.1)


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
    model.act = lambda obs, num_candidates: (asked.append(num_candidates), 2 * obs)[1]
    for act in qvpo.ways_to_play(model).values():
        assert np.array_equal(act(np.ones((1, 5), np.float32)), 2 * np.ones((1, 5)))
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
                context = policy.observation(obs[b]) + policy.time_features()[t[k, b] - 1]
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
    model, batch = learner(hidden=32, q_transform=q_transform, actor_lr=1e-3, critic_lr=2e-4), random_batch()
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
        qvpo.update_policy(model, obs, None)
        qvpo.update_policy(model, obs, torch.tensor(0.1))
    (actions, weights), (more_actions, more_weights) = learned
    assert actions.shape == (1, 16, 3) and weights.shape == (1, 16)
    assert more_actions.shape == (3, 16, 3)
    torch.testing.assert_close(more_weights[1:], 0.1 * more_weights[:1].expand(2, -1))


def test_entropy_coefficient_decays_to_its_floor():
    args = Args(total_timesteps=1000, entropy_coefficient=0.02, min_entropy_coefficient=0.002)
    assert [qvpo.entropy_coefficient(args, step) for step in (0, 500, 950, 1000)] == [0.02, 0.01, 0.002, 0.002]
    assert qvpo.entropy_coefficient(Args(entropy_coefficient=0.0), 0) == 0
    assert qvpo.entropy_coefficient(Args(entropy_coefficient=0.001), 10) == 0.001


@pytest.mark.parametrize("size", [1e-3, 0.7, 30.0])
def test_gradients_are_clipped(size):
    """To the same bits as PyTorch's own clipping, and not at all where they are small."""
    weights = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((5, 3), (4,), (1,))]
    slopes = [size * torch.randn_like(weight) for weight in weights]
    optimizer, descended = qvpo.Adam(weights, 1.0), []
    optimizer.descend = descended.extend
    qvpo.take_step(optimizer, sum((weight * slope).sum() for weight, slope in zip(weights, slopes)), 2.0)
    for weight, slope in zip(weights, slopes):
        weight.grad = slope.clone()
    torch.nn.utils.clip_grad_norm_(weights, 2.0)
    assert all(torch.equal(ours, weight.grad) for ours, weight in zip(descended, weights, strict=True))
    assert (torch.cat([ours.flatten() for ours in descended]).norm() < 1.999) == (size < 0.1)


# ---- devices, compiled


def tensors_of(model):
    """All that a learner holds: networks, buffers and optimisers."""
    states = [state for optimizer in model.optimizers() for state in optimizer.state.values()]
    return [*model.parameters(), *model.buffers(), *(tensor for state in states for tensor in state.values())]


@pytest.mark.parametrize("options", [dict(), dict(q_transform="qcut", bfloat16=True)], ids=str)
def test_an_update_leaves_no_tensor_behind(options, monkeypatch):
    """On PyTorch's meta device most operations with a tensor from elsewhere raise."""
    stepped = []

    def check_adam(parameters, gradients, *states, **_):  # Adam itself has no kernel for the meta device
        tensors = [*parameters, *gradients, *(tensor for group in states for tensor in group)]
        stepped.append(all(tensor.is_meta for tensor in tensors))

    monkeypatch.setattr(qvpo, "adam", check_adam)
    model = learner(device="meta", **options)
    batch = Batch(*(column.to("meta") for column in random_batch()))
    with OnMeta():
        metrics = qvpo.update(model, batch, batch.next_obs, torch.full((), 0.02, device="meta"))
        model.act(batch.obs, 4)
    assert stepped == [True, True] and all(tensor.is_meta for tensor in (*metrics.values(), *tensors_of(model)))


def test_the_same_seed_starts_with_the_same_networks_on_every_device(monkeypatch):
    """They are drawn on the CPU and then moved."""
    drawn = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: (drawn.append(self.state_dict()), self)[1])
    torch.manual_seed(0)
    learner(device="meta")
    monkeypatch.undo()
    torch.manual_seed(0)
    assert equal(dict(drawn[0]), dict(learner().state_dict()))


def test_a_run_traces_its_update_once_with_the_policy_and_once_without(monkeypatch):
    """As one graph each, though the weight of the uniform actions changes with every step."""
    torch._dynamo.reset()
    counter, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=counter, fullgraph=True))
    train(Args(**SMALL | dict(total_timesteps=140, compile=True, bfloat16=True, final_eval_episodes=1)))
    assert counter.frame_count == 2


def test_compiled_equals_eager():
    torch._dynamo.reset()
    results = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model, batch = learner(denoising_steps=2), random_batch()
        for optimizer in model.optimizers():
            for state in optimizer.state.values():  # else Adam's first step is a sign, even that of a rounding error
                state["exp_avg_sq"].fill_(1)
                state["step"].fill_(1000)
        update = qvpo.compiled(qvpo.update, model) if compiling else qvpo.update
        metrics = [update(model, batch, batch.next_obs + 1, torch.tensor(weight)) for weight in (0.02, 0.01, 0.002)]
        results.append([*tensors_of(model), *(value for row in metrics for value in row.values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("compiling", [False, True])
def test_cuda(compiling):
    """A run there, whose checkpoint is played on the CPU."""
    result = train(Args(**SMALL, device="cuda", compile=compiling))
    assert checkpoint_of(result)["device"] == "cuda"
    qvpo.main(Args(evaluate=result["run_dir"], device="cpu", final_eval_episodes=1))


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


class Short(gym.Env):
    """Episodes of two or five steps that pay 1 each."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.choice([2, 5])
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(2, np.float32), 1.0, bool(self.left == 0), False, {}


gym.register("Short-v0", Short)


def test_evaluation_returns_are_sums_of_rewards():
    returns = qvpo.evaluate(lambda obs: np.zeros((len(obs), 1), np.float32), Args(env_id="Short-v0"), 30, seed=0)
    assert len(returns) == 30 and {*returns} == {2, 5}


def test_an_evaluation_without_a_time_limit_ends(monkeypatch):
    """An episode that is too long for that is told; one that ends is played, however short what is allowed."""
    monkeypatch.setattr(qvpo, "LONGEST_EPISODE", 5)
    act = lambda obs: np.zeros((len(obs), 1), np.float32)  # noqa: E731
    assert len(qvpo.evaluate(act, Args(env_id="Short-v0"), 30, seed=0)) == 30
    assert len(qvpo.evaluate(act, Args(env_id="Pendulum-v1"), 1, seed=0)) == 1
    monkeypatch.setattr(qvpo, "LONGEST_EPISODE", 4)
    with pytest.raises(qvpo.RunError, match="--env-id: Short-v0 has no time limit, .* in 4 steps"):
        qvpo.evaluate(act, Args(env_id="Short-v0"), 30, seed=0)


def test_training_returns_are_those_of_the_copies_that_ended():
    result = train(Args(**SMALL | dict(env_id="Short-v0", num_envs=2, total_timesteps=300, log_interval=2)))
    assert {float(value) for _, value in scalars(result["run_dir"])["returns/training"]} == {2, 3.5, 5}


@pytest.fixture(scope="module")
def pendulums(tmp_path_factory):
    """What two copies of Pendulum store, which is cut at 200 steps; the checkpoint at 500 starts both copies anew."""
    with contextlib.chdir(tmp_path_factory.mktemp("pendulums")), pytest.MonkeyPatch.context() as patch:
        return recorded(qvpo, patch, **SMALL | dict(num_envs=2, checkpoint_interval=500))


def test_truncated_transitions_keep_their_true_next_observation(pendulums):
    """Pendulum never terminates."""
    rows = pendulums
    assert not rows.terminated.any() and rows.actions.abs().max() <= 1
    continues = (rows.next_obs[:-1] == rows.obs[1:]).all(-1)
    assert [i + 1 for i in range(449) if not continues[i].all()] == [200, 250]
    np.testing.assert_allclose(rows.next_obs.norm(dim=-1)[..., None] ** 2, 1 + rows.next_obs[..., 2:] ** 2, rtol=1e-4)
    turn = torch.atan2(rows.next_obs[..., 1], rows.next_obs[..., 0]) - torch.atan2(rows.obs[..., 1], rows.obs[..., 0])
    turn = torch.atan2(turn.sin(), turn.cos())
    torch.testing.assert_close(turn, 0.05 * rows.next_obs[..., 2], atol=1e-3, rtol=0)  # also over the ends


def test_copies_and_checkpoints_start_different_episodes(pendulums):
    starts = pendulums.obs[[0, 200, 250]].flatten(0, 1)  # of both copies: at the start, after an end and a checkpoint
    assert len(starts.unique(dim=0)) == 6


def test_terminated_transitions_say_so(monkeypatch):
    rows = recorded(qvpo, monkeypatch, **SMALL | dict(env_id="InvertedDoublePendulum-v5", num_envs=2))
    assert 10 < rows.terminated.sum() < 450
    continues = (rows.next_obs[:-1] == rows.obs[1:]).all(-1)
    checkpoints = torch.zeros_like(continues)
    checkpoints[[124, 249, 374]] = True
    assert torch.equal(continues, ~(rows.terminated[:-1].bool() | checkpoints))


# ---- training loop


def test_the_loop_plays_and_learns_what_its_arguments_say(monkeypatch):
    """Uniform actions at first, then the best of K_b; an update every four steps, the policy's at states of its own."""
    played, learned = [], []
    act, update = Learner.act, qvpo.update

    def note_act(self, obs, num_candidates):
        played.append(num_candidates)
        return act(self, obs, num_candidates)

    def note_update(model, batch, obs, weight):
        learned.append((weight.item(), obs is not None, obs is not None and torch.equal(obs, batch.obs)))
        return update(model, batch, obs, weight)

    monkeypatch.setattr(Learner, "act", note_act)
    monkeypatch.setattr(qvpo, "update", note_update)
    monkeypatch.setattr(qvpo, "evaluate", lambda *_: np.zeros(1))
    warm_up = recorded(qvpo, monkeypatch, **SMALL, behavior_candidates=3).actions[:100]
    assert warm_up.min() < -0.9 and warm_up.max() > 0.9 and abs(warm_up.mean()) < 0.2
    assert played == [3] * 800
    weights, policy_too, same = zip(*learned)
    assert weights == pytest.approx([max(0.002, 0.02 * (1 - step / 900)) for step in range(101, 900, 4)])
    assert policy_too == (True, False) * 100 and not any(same)


def test_a_resumed_run_logs_the_same_points(monkeypatch):
    """Also where the policy learned last before the checkpoint, and the point that shows it comes after."""
    options = SMALL | dict(total_timesteps=760, learning_starts=90, steps_per_update=1, policy_frequency=40)
    options |= dict(log_interval=40, checkpoint_interval=350)
    whole = train(Args(**options))["run_dir"]
    signals, save = [], qvpo.save_checkpoint

    def stop_at_700(run_dir, args, progress, *rest):
        save(run_dir, args, progress, *rest)
        signals.extend([2] * (progress.global_step == 700))

    monkeypatch.setattr(qvpo, "save_checkpoint", stop_at_700)
    with pytest.raises(qvpo.Stopped):
        train(Args(**options), signals=signals)
    (stopped,) = {str(path) for path in Path("runs").iterdir()} - {whole}
    train(Args(resume=stopped))
    assert scalars(stopped) == scalars(whole)


# ---- presets


def test_presets_fill_in_what_flags_leave_open():
    paper = with_preset(Args(preset="paper", hidden=99))
    assert (paper.hidden, paper.denoising_steps, paper.num_candidates, paper.batch_size) == (99, 20, 64, 256)
    assert None not in [getattr(with_preset(Args()), name) for name in qvpo.PRESETS["laptop"]]
    assert qvpo.PRESETS["laptop"].keys() == qvpo.PRESETS["paper"].keys()


def test_a_resumed_run_keeps_its_preset(monkeypatch):
    """And the sizes that the preset had filled in. Flags may repeat them, but not ask for others."""
    result, accepted = train(Args(**SMALL | dict(total_timesteps=150))), []
    run_dir, contents = result["run_dir"], checkpoint_of(result)
    assert json.loads(Path(run_dir, "args.json").read_text())["target_candidates"] == 2  # the preset's, written down
    contents["args"] |= dict(preset="paper", behavior_candidates=5)
    torch.save(contents, Path(run_dir, "checkpoint.pt"))
    monkeypatch.setattr(qvpo, "training_loop", lambda args, *_: accepted.append(args))
    train(Args(resume=run_dir))
    train(Args(resume=run_dir, preset="paper", behavior_candidates=5), given=["preset", "behavior_candidates"])
    for args in accepted:
        assert (args.preset, args.hidden, args.behavior_candidates, args.target_candidates) == ("paper", 16, 5, 2)
    assert len(accepted) == 2
    assert "ran with --preset paper, not laptop" in error_of(qvpo, given=["preset"], resume=run_dir)
    assert "ran with --behavior-candidates 5, not 4" in error_of(qvpo, resume=run_dir, behavior_candidates=4)
    assert "ran with --hidden 16, not None" in error_of(qvpo, given=["hidden"], resume=run_dir)


# ---- bad input


@pytest.mark.parametrize(
    "env_id, why",
    [
        ("Hoper-v5", "Did you mean"),
        ("CartPole-v1", "Discrete"),
        ("Hopper-v99", "v5"),
        ("Hopper-v2", "mujoco"),  # what it says depends on whether Gymnasium-Robotics has been imported
        ("dm_control/cart-v0", "exist"),
        ("no_such_module:Pendulum-v1", "No module named 'no_such_module'"),
        ("a:b:c", "no name of a task"),
        (":Pendulum-v1", "no name of a task"),
        (".a:Pendulum-v1", "no name of a task"),
        ("", "no name of a task"),
    ],
)
def test_unfit_tasks(env_id, why):
    message = error_of(qvpo, env_id=env_id)
    assert "--env-id" in message and why in message and "Hopper-v5" in message and not Path("runs").exists()


def test_what_fails_inside_a_task_is_not_blamed_on_its_name(monkeypatch):
    def fail(self, **_):
        raise ValueError("a fault of its own")

    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.__init__", fail)
    with pytest.raises(ValueError, match="a fault of its own"):
        make_env("Pendulum-v1")


def test_video_where_nothing_can_be_drawn(monkeypatch):
    def no_display(self):
        raise RuntimeError("no display")

    monkeypatch.setattr("gymnasium.envs.classic_control.PendulumEnv.render", no_display)
    message = error_of(qvpo, **SMALL, capture_video=True)
    assert "--capture-video" in message and "MUJOCO_GL" in message and not Path("runs").exists()


# ---- learning


@pytest.mark.slow
def test_learns_to_stand_a_pendulum():
    """A random policy scores about -1200, one that stands it at once about -150."""
    options = dict(total_timesteps=6_000, eval_interval=6_000, final_eval_episodes=10)
    args = Args(denoising_steps=5, hidden=64, num_candidates=8, batch_size=128, critic_lr=1e-3, **options)
    assert train(args)["final_return"] > -200
