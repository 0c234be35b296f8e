"""bang_bang.py: its distributions, advantages and normalisation, its loop on real tasks."""

import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import OnMeta, checkpoint_of, error_of, scalars
from torch.distributions import Bernoulli, Categorical, Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

import bang_bang
from bang_bang import ActionCost, Args, Learner, Normalizer, Rollout, evaluate, make_costly_env, make_env, train
from benchmark.bang_bang_double_integrator import grid_of_starts, optimal_force, times_to_goal, trained_force

SMALL = dict(env_id="Pendulum-v1", total_timesteps=900, num_steps=100, num_minibatches=2, update_epochs=2, hidden=16)
SMALL |= dict(eval_interval=300, eval_episodes=2, final_eval_episodes=3, checkpoint_interval=250)
HEADS = [
    dict(policy="bernoulli"),
    dict(policy="categorical"),
    dict(policy="categorical", bins=5),
    dict(policy="gaussian"),
    dict(policy="gaussian", squash="tanh"),
]


def policy_of(**options):
    """A policy for three observations and two action dimensions, away from its start."""
    policy = Learner(Args(**options), 3, 2).policy
    for parameter in policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def reference(policy, parameters):
    """The same distribution in torch.distributions."""
    if isinstance(policy, bang_bang.BernoulliPolicy):
        return Independent(Bernoulli(logits=parameters), 1)
    if isinstance(policy, bang_bang.CategoricalPolicy):
        return Independent(Categorical(logits=parameters), 1)
    return Independent(Normal(parameters[0], parameters[1].exp()), 1)


# ---- distributions


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_heads_are_those_of_torch(options):
    policy, obs = policy_of(**options), torch.randn(7, 4, 3)
    p, q = policy(obs), policy_of(**options)(obs)
    theirs, tanh = reference(policy, p), options.get("squash") == "tanh"
    choice = policy.sample(p)
    assert choice.shape == (7, 4, 2) and policy.mode(p).shape == (7, 4, 2)
    actions = policy.action(choice)
    assert actions.shape == (7, 4, 2) and actions.abs().max() <= 1
    executed = TransformedDistribution(theirs, TanhTransform()) if tanh else theirs
    value = actions if tanh else choice
    torch.testing.assert_close(policy.log_prob(p, choice), executed.log_prob(value), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(policy.kl(p, q), kl_divergence(theirs, reference(policy, q)))
    if not tanh:
        torch.testing.assert_close(policy.entropy(p), theirs.entropy())


def test_entropy_under_tanh_against_quadrature():
    """-E[log p(a)], with the density of a on a fine grid."""
    policy = policy_of(policy="gaussian", squash="tanh")
    for mean, std in ((0.0, 0.5), (1.2, 0.3), (-0.4, 1.5)):
        parameters = torch.tensor([[[mean]], [[math.log(std)]]])
        u = torch.linspace(mean - 8 * std, mean + 8 * std, 40_001)[:, None]
        density = Normal(mean, std).log_prob(u[:, 0]).exp()
        log_prob = policy.log_prob(parameters.expand(2, len(u), 1), u)
        expected = -torch.trapezoid(density * log_prob, u[:, 0])
        torch.testing.assert_close(policy.entropy(parameters)[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_samples_follow_the_probabilities(options):
    """Their mean log-probability is minus the entropy (of the choice, except under tanh); the mode is most likely."""
    policy = policy_of(**options)
    parameters = policy(torch.randn(1, 3).expand(50_000, 3))
    log_prob = policy.log_prob(parameters, policy.sample(parameters)).mean()
    torch.testing.assert_close(log_prob, -policy.entropy(parameters)[0], atol=0.03, rtol=0)
    if options.get("squash") != "tanh":
        best = policy.log_prob(parameters, policy.mode(parameters))[0]
        assert best >= policy.log_prob(parameters, policy.sample(parameters)).max() - 1e-5


def test_two_bins_are_bernoulli():
    bernoulli, two = policy_of(policy="bernoulli"), policy_of(policy="categorical", bins=2)
    logits = torch.randn(6, 2)
    log_probs = torch.stack([torch.zeros(6, 2), logits], -1).log_softmax(-1)
    choice = torch.randint(2, (6, 2))
    torch.testing.assert_close(two.log_prob(log_probs, choice), bernoulli.log_prob(logits, choice.float()))
    torch.testing.assert_close(two.entropy(log_probs), bernoulli.entropy(logits))
    torch.testing.assert_close(two.action(choice), bernoulli.action(choice.float()))
    assert torch.equal(two.mode(log_probs), bernoulli.mode(logits).long())


def test_what_each_head_can_play():
    for options, values in ((HEADS[0], {-1, 1}), (HEADS[1], {-1, 0, 1}), (HEADS[2], {-1, -0.5, 0, 0.5, 1})):
        policy = policy_of(**options)
        assert set(policy.action(policy.sample(policy(torch.randn(500, 3)))).flatten().tolist()) == values
    policy = policy_of(**HEADS[3])
    assert policy.action(torch.tensor([-3.0, 0.2, 1.5])).tolist() == pytest.approx([-1, 0.2, 1])


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_every_head_starts_nearly_indifferent(options):
    """Its last layer at a gain of 0.01; that of the values at 1."""
    learner = Learner(Args(**options), 3, 2)
    for network, gain in ((learner.policy.network, 0.01), (learner.value, 1)):
        assert network[-1].weight.norm(dim=1).tolist() == pytest.approx([gain] * network[-1].out_features)


# ---- advantages, update


def rollout_of(reward, terminated, ended):
    steps, copies = reward.shape
    obs = torch.zeros(steps, copies, 3)
    return Rollout(obs, torch.zeros(steps, copies, 2), reward, terminated, ended, obs)


def test_advantages_are_the_brute_force_sum():
    """Of (gamma lambda)^k delta_{t+k} up to the episode's end, with both kinds of ends."""
    steps, copies, gamma, gae_lambda = 12, 2, 0.9, 0.8
    terminated = (torch.rand(steps, copies) < 0.2).float()
    ended = torch.maximum(terminated, (torch.rand(steps, copies) < 0.2).float())
    assert 0 < terminated.sum() < ended.sum()
    reward, value, next_value = torch.randn(3, steps, copies)
    rollout = rollout_of(reward, terminated, ended)
    ours = bang_bang.advantages(rollout, value, next_value, gamma, gae_lambda)
    for e in range(copies):
        for t in range(steps):
            total, discount = 0.0, 1.0
            for k in range(t, steps):
                bootstrap = 0 if terminated[k, e] else gamma * next_value[k, e]
                total += discount * (reward[k, e] + bootstrap - value[k, e])
                discount *= gamma * gae_lambda
                if ended[k, e]:
                    break
            torch.testing.assert_close(ours[t, e], total)


def real_rollout(learner, steps=64):
    obs, next_obs = torch.randn(2, steps, 2, 3)
    with torch.no_grad():
        choice = learner.policy.sample(learner.policy(obs))
    ended = (torch.rand(steps, 2) < 0.05).float()
    return Rollout(obs, choice, torch.randn(steps, 2), ended, ended, next_obs)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_first_gradient_is_the_policy_gradient(options, monkeypatch):
    """At ratio 1 the clipped surrogate's gradient is that of mean(advantage * log pi), of any head; values regress."""
    learner = Learner(Args(update_epochs=1, num_minibatches=1, vf_coef=0.7, ent_coef=0.1, **options), 3, 2)
    rollout, losses = real_rollout(learner), []
    monkeypatch.setattr(bang_bang, "take_step", lambda optimizer, loss, norm: losses.append(loss))
    bang_bang.update(learner, rollout)
    ours = torch.autograd.grad(losses[0], list(learner.parameters()))
    with torch.no_grad():
        value, next_value = learner.value(rollout.obs)[..., 0], learner.value(rollout.next_obs)[..., 0]
        advantage = bang_bang.advantages(rollout, value, next_value, 0.99, 0.95)
        target, weight = advantage + value, (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    parameters = learner.policy(rollout.obs)
    gain = (weight * learner.policy.log_prob(parameters, rollout.choice)).mean()
    error = (learner.value(rollout.obs)[..., 0] - target).square().mean()
    loss = -gain - 0.1 * learner.policy.entropy(parameters).mean() + 0.7 * 0.5 * error
    for a, b in zip(ours, torch.autograd.grad(loss, list(learner.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_ratios_beyond_the_clip_do_not_pay(monkeypatch):
    """After a step that moved all ratios far, the policy's gradient comes only from samples that it moved wrongly."""
    learner = Learner(Args(update_epochs=2, num_minibatches=1, vf_coef=0.0), 3, 2)
    rollout, gradients = real_rollout(learner), []
    old = learner.policy.log_prob(learner.policy(rollout.obs), rollout.choice).detach()

    def spy(optimizer, loss, norm):
        gradients.append(torch.autograd.grad(loss, learner.policy.network[-1].bias)[0])
        learner.policy.network[-1].bias.data += 2.0  # towards the upper bound

    monkeypatch.setattr(bang_bang, "take_step", spy)
    bang_bang.update(learner, rollout)
    learner.policy.network[-1].bias.data -= 2.0
    with torch.no_grad():
        value, next_value = learner.value(rollout.obs)[..., 0], learner.value(rollout.next_obs)[..., 0]
        advantage = bang_bang.advantages(rollout, value, next_value, 0.99, 0.95)
        weight = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (learner.policy.log_prob(learner.policy(rollout.obs), rollout.choice) - old).exp()
    pays = ((weight > 0) & (ratio < 1.2)) | ((weight < 0) & (ratio > 0.8))
    expected = torch.autograd.grad(-(ratio * weight * pays).mean(), learner.policy.network[-1].bias)[0]
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=1e-5)
    assert 0 < pays.float().mean() < 1


def test_values_beyond_the_clip_do_not_pay(monkeypatch):
    """After a step that raised all values by 0.5, only those learn whose clipped value would have the smaller error."""
    learner = Learner(Args(update_epochs=2, num_minibatches=1, vf_coef=1.0), 3, 2)
    rollout, gradients = real_rollout(learner), []

    def spy(optimizer, loss, norm):
        gradients.append(torch.autograd.grad(loss, learner.value[-1].bias)[0])
        learner.value[-1].bias.data += 0.5

    with torch.no_grad():
        value, next_value = learner.value(rollout.obs)[..., 0], learner.value(rollout.next_obs)[..., 0]
        target = bang_bang.advantages(rollout, value, next_value, 0.99, 0.95) + value
    monkeypatch.setattr(bang_bang, "take_step", spy)
    bang_bang.update(learner, rollout)
    pays = (value + 0.5 - target).abs() > (value + 0.2 - target).abs()
    torch.testing.assert_close(gradients[1], ((value + 0.5 - target) * pays).mean()[None], rtol=1e-4, atol=1e-6)
    assert 0 < pays.float().mean() < 1


def test_gradients_are_clipped():
    learner = Learner(Args(update_epochs=1, num_minibatches=1, max_grad_norm=1e-3), 3, 2)
    descended = []
    learner.optimizer.descend = descended.extend
    bang_bang.update(learner, real_rollout(learner))
    assert torch.cat([gradient.flatten() for gradient in descended]).norm().item() == pytest.approx(1e-3, rel=0.01)


def test_every_pass_takes_all_steps_in_another_order():
    learner = Learner(Args(update_epochs=2, num_minibatches=4), 3, 2)
    rollout, batches = real_rollout(learner), []
    bang_bang.update(learner, rollout, lambda _, batch: batches.append(batch.obs) or {})
    played, first, second = rollout.obs.flatten(0, 1), torch.cat(batches[:4]), torch.cat(batches[4:])
    assert [len(batch) for batch in batches] == [32] * 8
    for seen, other in ((first, played), (second, played), (first, second)):
        assert torch.equal(seen.sort(0).values, other.sort(0).values) and not torch.equal(seen, other)


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_metrics_of_the_whole_rollout(options):
    """What the values explained before the update, and how far the policy has moved."""
    learner = Learner(Args(num_minibatches=2, learning_rate=0.01, **options), 3, 2)
    rollout = real_rollout(learner)
    with torch.no_grad():
        old, value = learner.policy(rollout.obs), learner.value(rollout.obs)[..., 0]
        next_value = learner.value(rollout.next_obs)[..., 0]
        advantage = bang_bang.advantages(rollout, value, next_value, 0.99, 0.95)
        metrics = torch.enable_grad()(bang_bang.update)(learner, rollout)
        kl = kl_divergence(reference(learner.policy, old), reference(learner.policy, learner.policy(rollout.obs)))
    explained = 1 - advantage.numpy().var() / (advantage + value).numpy().var()
    assert metrics["losses/explained_variance"].item() == pytest.approx(explained, rel=1e-3)
    torch.testing.assert_close(metrics["policy/kl"], kl.mean())
    assert kl.mean() > 1e-3


def test_equal_returns_leave_no_variance_to_explain():
    """And no NaN, which would stop the run."""
    learner = Learner(Args(num_minibatches=2), 3, 2)
    rollout = real_rollout(learner)
    one = torch.ones_like(rollout.reward)
    metrics = bang_bang.update(learner, rollout._replace(reward=0 * one, terminated=one, ended=one))
    assert metrics["losses/explained_variance"] == 0


# ---- devices, compiled


@pytest.mark.parametrize("options", HEADS, ids=str)
def test_an_update_leaves_no_tensor_behind(options, monkeypatch):
    """On PyTorch's meta device an operation with a tensor from elsewhere raises."""
    stepped = []

    def check_adam(parameters, gradients, *states, lr, **_):  # Adam itself has no kernel for the meta device
        tensors = [lr, *parameters, *gradients, *(tensor for group in states for tensor in group)]
        stepped.append(all(tensor.is_meta for tensor in tensors))

    monkeypatch.setattr(bang_bang, "adam", check_adam)
    learner = Learner(Args(num_minibatches=3, update_epochs=2, **options), 3, 2, "meta")
    rollout = Rollout(*(column.to("meta") for column in real_rollout(Learner(Args(**options), 3, 2))))
    with OnMeta():
        metrics = bang_bang.update(learner, rollout)
        learner.act(rollout.obs[0])
        learner.act(rollout.obs[0], deterministic=True)
    assert stepped == 6 * [True] and all(metric.is_meta for metric in metrics.values())


def test_compiled_equals_eager():
    """Also when the learning rate has fallen, which compiles nothing anew."""
    torch._dynamo.reset()
    results = []
    for compiling in (False, True):
        torch.manual_seed(3)
        options = dict(policy="gaussian", squash="tanh", hidden=16, num_minibatches=2, update_epochs=2)
        learner = Learner(Args(ent_coef=0.01, **options), 3, 2)
        for state in learner.optimizer.state.values():  # else Adam's first step is a sign, even a rounding error's
            state["exp_avg_sq"].fill_(1)
        rollout = real_rollout(learner)
        step = bang_bang.compiled(bang_bang.update_minibatch, learner) if compiling else bang_bang.update_minibatch
        for rate in (0.1, 0.05):
            learner.learning_rate.fill_(rate)
            with torch._dynamo.config.patch(error_on_recompile=rate < 0.1):
                metrics = bang_bang.update(learner, rollout, step)
        moments = [state["exp_avg"] for state in learner.optimizer.state.values()]
        results.append([*metrics.values(), *learner.parameters(), *moments])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
@pytest.mark.parametrize("compiling", [False, True])
def test_cuda(compiling):
    """Runs of every head there, whose checkpoints are played on the CPU."""
    for options in HEADS:
        result = train(Args(**SMALL, device="cuda", compile=compiling, **options))
        assert checkpoint_of(result)["device"] == "cuda"
        bang_bang.main(Args(evaluate=result["run_dir"], device="cpu", final_eval_episodes=1))


# ---- environment and normalisation


class Lopsided(gym.Env):
    """Actions in [-1, 3] and [0, 0.5], played back as the observation."""

    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gym.spaces.Box(np.array([-1, 0], np.float32), np.array([3, 0.5], np.float32))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.array(action, np.float32), 1.0, False, False, {}


gym.register("Lopsided-v0", Lopsided, max_episode_steps=10)


def test_actions_reach_the_bounds_of_a_lopsided_box():
    env = make_env("Lopsided-v0")
    env.reset(seed=0)
    for action, expected in (([-1, -1], [-1, 0]), ([1, 1], [3, 0.5]), ([0, 0], [1, 0.25]), ([0.5, -0.5], [2, 0.125])):
        np.testing.assert_allclose(env.step(np.array(action, np.float32))[0], expected, atol=1e-6)


@pytest.mark.parametrize("form, cost", [("l1", 0.2 * 1.5), ("l2", 0.2 * 0.5 * 1.25)])
def test_action_cost_is_taken_from_the_reward(form, cost):
    env = make_costly_env(Args(env_id="Lopsided-v0", action_cost=0.2, action_cost_form=form))
    env.reset(seed=0)
    _, reward, _, _, info = env.step(np.array([1, -0.5], np.float32))
    assert reward == pytest.approx(1 - cost) and info["action_cost"] == pytest.approx(cost)


def test_evaluation_measures_what_was_played():
    """Ten steps: the first dimension's actions at a bound, changing sides at every other step, the second's inside."""
    args, step = Args(env_id="Lopsided-v0", action_cost=0.1), iter(range(1000))

    def act(obs):
        t = next(step)
        return np.full((len(obs), 2), [1.0 if t % 4 < 2 else -1.0, 0.2 + 0.1 * (t % 2)], np.float32)

    played = evaluate(act, args, 2, seed=0)
    assert played["return"] == pytest.approx([10 - 0.1 * 12.5] * 2)
    assert played["return_without_cost"] == pytest.approx([10] * 2)
    assert played["saturation"] == pytest.approx([0.5] * 2) and played["switching_rate"] == pytest.approx([4 / 18] * 2)


def test_saturated_is_who_lies_within_a_twentieth_of_the_range_from_a_bound():
    assert bang_bang.saturation(torch.tensor([1.0, -1.0, 0.91, -0.91, 0.89, 0.0])) == pytest.approx(4 / 6)


def test_normalizer_has_the_statistics_of_what_it_saw():
    normalizer, obs = Normalizer(3, 4, 0.9), np.random.default_rng(0).normal(2, 5, (100, 4, 3))
    for rows in obs:
        normalizer.obs.update(rows)
    scaled = normalizer(obs.reshape(-1, 3))
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(0), np.zeros(3), atol=1e-3, rtol=0)
    np.testing.assert_allclose(scaled.std(0), np.ones(3), atol=1e-2, rtol=0)
    assert normalizer(np.array([[1e6, -1e6, 1e6]])).tolist() == [[10, -10, 10]]


def test_rewards_are_scaled_by_the_deviation_of_discounted_returns():
    normalizer, rng = Normalizer(1, 2, 0.5), np.random.default_rng(0)
    discounted, seen = np.zeros(2), []
    for step in range(200):
        reward, ended = rng.normal(1, 3, 2), np.array([step % 7 == 6, False])
        discounted = 0.5 * discounted + reward
        seen.extend(discounted)
        scaled = normalizer.scale_reward(reward, ended)
        discounted[ended] = 0
    np.testing.assert_allclose(scaled, reward / np.std(seen), rtol=1e-2)
    assert normalizer.scale_reward(np.array([1e6, -1e6]), ended).tolist() == [10, -10]


# ---- training loop


def played(monkeypatch, **options):
    rollouts = []
    learn = bang_bang.update
    spy = lambda learner, rollout, step: (rollouts.append(rollout), learn(learner, rollout, step))[1]  # noqa: E731
    monkeypatch.setattr(bang_bang, "update", spy)
    train(Args(**SMALL | options))
    return Rollout(*map(torch.cat, zip(*rollouts)))


def test_rollouts_hold_normalised_rewards(monkeypatch):
    scaled, scale = [], Normalizer.scale_reward
    spy = lambda *args: (scaled.append(scale(*args)), scaled[-1])[1]  # noqa: E731
    monkeypatch.setattr(Normalizer, "scale_reward", spy)
    rows = played(monkeypatch, num_envs=2)
    np.testing.assert_allclose(rows.reward, np.stack(scaled), rtol=1e-6)


class Short(Lopsided):
    """Episodes of two or five steps."""

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.left = self.np_random.choice([2, 5])
        return result

    def step(self, action):
        self.left -= 1
        obs, reward, *_ = super().step(action)
        return obs, reward, bool(self.left == 0), False, {}


gym.register("LopsidedShort-v0", Short)


def test_an_evaluation_without_a_time_limit_ends(monkeypatch):
    """An episode that is too long for that is told; one that ends is played, however short what is allowed."""
    monkeypatch.setattr(bang_bang, "LONGEST_EPISODE", 5)
    act = lambda obs: np.zeros((len(obs), 2), np.float32)  # noqa: E731
    for env_id in ("LopsidedShort-v0", "Lopsided-v0"):
        assert len(evaluate(act, Args(env_id=env_id), 30, seed=0)["return"]) == 30
    monkeypatch.setattr(bang_bang, "LONGEST_EPISODE", 4)
    with pytest.raises(bang_bang.RunError, match="--env-id: LopsidedShort-v0 has no time limit, .* in 4 steps"):
        evaluate(act, Args(env_id="LopsidedShort-v0"), 30, seed=0)


def test_training_returns_are_those_of_the_episodes_that_ended():
    """Of one step of two copies, so of one or two episodes."""
    options = dict(env_id="LopsidedShort-v0", num_envs=2, num_steps=1, num_minibatches=1, total_timesteps=100)
    result = train(Args(**SMALL | options))
    values = {float(value) for _, value in scalars(result["run_dir"])["returns/training"]}
    assert {value for value in values if not math.isnan(value)} == {2, 3.5, 5}


def test_time_limits_are_not_terminations(monkeypatch):
    rows = played(monkeypatch, num_envs=2, checkpoint_interval=10_000)
    assert not rows.terminated.any() and rows.ended.any(1).nonzero()[:, 0].tolist() == [199, 399]
    jump = (rows.next_obs[:-1] - rows.obs[1:]).abs().amax((1, 2))
    assert jump[199] > 10 * jump[195:199].max()  # the true last observation, not the one after the reset


def test_terminations_say_so(monkeypatch):
    rows = played(monkeypatch, env_id="InvertedDoublePendulum-v5", num_envs=2)
    assert 10 < rows.terminated.sum() < 400 and torch.equal(rows.terminated, rows.ended)


def test_learning_rate_falls_to_zero(monkeypatch):
    """In double precision: single would change the last bits of every step."""
    rates, adam = [], bang_bang.adam
    spy = lambda *args, lr, **options: (rates.append(lr.item()), adam(*args, lr=lr, **options))  # noqa: E731
    monkeypatch.setattr(bang_bang, "adam", spy)
    train(Args(**SMALL | dict(num_minibatches=1, update_epochs=1), learning_rate=0.9))
    assert rates == [0.9 * (1 - step / 900) for step in range(0, 900, 100)]


def test_every_start_after_a_checkpoint_is_another_and_all_is_counted(monkeypatch):
    """Of 900 steps with a checkpoint every 250, so at 300 and 600; the statistics are those of 900 observations."""
    episodes, seeds = [], bang_bang.episode_seeds
    spy = lambda stream, *rest: (episodes.append(rest[1]) if stream == 0 else None, seeds(stream, *rest))[1]  # noqa: E731
    monkeypatch.setattr(bang_bang, "episode_seeds", spy)
    statistics = checkpoint_of(train(Args(**SMALL)))["normalizer"]["statistics"]
    assert episodes == [0, 1, 2]
    assert statistics[2] == pytest.approx(900, abs=1e-3) and statistics[5] == pytest.approx(900, abs=1e-3)


# ---- bad input


@pytest.mark.parametrize("env_id, why", [("Hoper-v5", "Did you mean"), ("CartPole-v1", "Discrete")])
def test_unfit_tasks(env_id, why):
    message = error_of(bang_bang, env_id=env_id)
    assert "--env-id" in message and why in message and "Hopper-v5" in message and not Path("runs").exists()


def test_statistics_that_overflow_reach_no_checkpoint(monkeypatch):
    """Finite rewards whose square is not."""
    step = ActionCost.step

    def generous(self, action):
        obs, _, *others = step(self, action)
        return obs, 1e200, *others

    monkeypatch.setattr(ActionCost, "step", generous)
    assert "NaN or infinite at step" in error_of(bang_bang, **SMALL)
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    contents = torch.load(checkpoint, weights_only=True)
    assert all(value.isfinite().all() for value in contents["normalizer"]["statistics"])


# ---- learning


@pytest.mark.slow
def test_is_nearly_as_fast_as_the_optimum_of_the_double_integrator():
    """Its mode takes at most 5 % more time to the goal than the optimal law, on average over a grid of starts."""
    starts = grid_of_starts()
    fast = dict(num_envs=8, num_steps=128, num_minibatches=8, learning_rate=1e-3, final_eval_episodes=1)
    fast |= dict(total_timesteps=150_000)  # with 100,000 the first seed misses it on some processors
    optimal, ours = times_to_goal(optimal_force, starts), times_to_goal(trained_force(**fast), starts)
    assert ours.mean() < 1.05 * optimal.mean()


def test_optimal_law_takes_the_closed_forms_time():
    """|v| + 2 sqrt(|x| + v^2 / 2), signs towards the switching curve, to the origin; less to a box of 0.1 around it."""
    starts = grid_of_starts()
    side = -optimal_force(starts)[:, 0]
    x, v = side * starts[:, 0], side * starts[:, 1]  # now all start above the curve and brake first
    closed_form = v + 2 * np.sqrt(x + v**2 / 2)
    times = times_to_goal(optimal_force, starts)
    assert (times < closed_form + 0.1).all() and (times > closed_form - 0.5).all()


def test_a_fine_goal_rewards_who_rests():
    """A mass at rest gets 1 a step, and at full force to and fro g / (g + half a step's velocity)."""
    env = make_env("benchmark.bang_bang_fine_goal:FineGoal-0.02-v0")
    env.reset(seed=1, options={"state": [0, 0]})
    assert env.step(np.zeros(1))[1:4] == (1, False, False)
    env.reset(seed=1, options={"state": [0, -0.025]})
    for sign in (1, -1, 1, -1):
        assert env.step(np.array([sign]))[1] == pytest.approx(0.02 / (0.02 + 0.025))


def test_costly_env_is_the_task_where_nothing_is_charged():
    free, plain = make_costly_env(Args(env_id="Pendulum-v1")), make_env("Pendulum-v1")
    free.reset(seed=3), plain.reset(seed=3)
    action = np.array([0.7], np.float32)
    assert free.step(action)[1] == plain.step(action)[1]
