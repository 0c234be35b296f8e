"""srvr_npg.py: estimators by enumeration of all trajectories, Fisher matrix and solvers, four algorithms learning."""

import csv
import json
import math
from itertools import product
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import checkpoint_of, command, error_of, evaluations, kill_and_resume, scalars
from torch.func import grad

import srvr_npg
from benchmark import srvr_npg_figures as figures
from benchmark import srvr_npg_tables as tables
from srvr_npg import MDP, Args, Gaussian, Softmax, Steps, Trajectories

ALGORITHMS = ("pg", "npg", "srvr-pg", "srvr-npg")
HORIZON, GAMMA = 3, 0.9
SMALL = dict(env_id="tabular", horizon=30, gamma=0.9, large_batch=20, small_batch=10, total_trajectories=200)


@pytest.fixture
def two_states():
    """Two states, two actions; an episode ends with some probability, which differs between states and actions."""
    transition = torch.tensor([[[0.5, 0.3], [0.1, 0.9]], [[0.4, 0.2], [0.6, 0.1]]], dtype=torch.float64)
    reward = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
    return MDP(torch.tensor([0.7, 0.3], dtype=torch.float64), transition, reward)


@pytest.fixture
def tabular():
    return Softmax((2, 2), biases=False)


def thetas(count, size=4, scale=1.0):
    return scale * torch.randn(count, size, dtype=torch.float64)


def all_trajectories(mdp, theta, horizon=HORIZON):
    """Every trajectory there can be, and the probability of each [M] under theta, step by step and by hand."""
    probs = srvr_npg.action_probs(mdp, theta)
    found = []

    def go_on(state, steps, probability):
        if state is None or len(steps) == horizon:
            found.append((steps, probability))
            return
        for action in range(2):
            taken = probability * probs[state, action]
            ahead = [*steps, (state, action)]
            if len(ahead) == horizon:  # where it would go is not seen
                found.append((ahead, taken))
                continue
            for after in range(2):
                go_on(after, ahead, taken * mdp.transition[state, action, after])
            go_on(None, ahead, taken * (1 - mdp.transition[state, action].sum()))

    for start in range(2):
        go_on(start, [], mdp.start[start])
    count = len(found)
    obs = torch.full((count, horizon, 2), 7.0, dtype=torch.float64)  # after the end: not to be looked at
    action = torch.zeros(count, horizon, 1, dtype=torch.int64)
    reward, running = torch.zeros(2, count, horizon, dtype=torch.float64)
    for i, (steps, _) in enumerate(found):
        for t, (s, a) in enumerate(steps):
            obs[i, t] = torch.eye(2)[s]
            action[i, t, 0], reward[i, t], running[i, t] = a, mdp.reward[s, a], 1
    return Trajectories(obs, action, reward, running), torch.stack([probability for _, probability in found])


# ---- the estimators, exactly


def test_trajectories_have_probability_one_and_the_mean_return(two_states):
    (theta,) = thetas(1)
    batch, probability = all_trajectories(two_states, theta)
    assert probability.sum() == pytest.approx(1) and (batch.running.sum(1) < HORIZON).any()
    discounted = batch.reward @ GAMMA ** torch.arange(HORIZON, dtype=torch.float64)
    expected = srvr_npg.exact_return(two_states, srvr_npg.action_probs(two_states, theta), GAMMA, HORIZON)
    assert probability @ discounted == pytest.approx(float(expected))


def test_gpomdp_is_unbiased(two_states, tabular):
    (theta,) = thetas(1)
    batch, probability = all_trajectories(two_states, theta)
    gradients, log_weight = srvr_npg.trajectory_gradients(tabular, theta, batch, GAMMA, "none")
    exact = srvr_npg.exact_gradient(two_states, theta, GAMMA, HORIZON)
    torch.testing.assert_close(probability @ gradients, exact)
    assert (log_weight == 0).all()


def test_the_weighted_estimator_is_unbiased_at_other_parameters(two_states, tabular):
    """Trajectories of `now` give the gradient at `before`, with weights that end with the episode."""
    before, now = thetas(2)
    batch, probability = all_trajectories(two_states, now)
    gradients, _ = srvr_npg.trajectory_gradients(tabular, before, batch, GAMMA, "none", now)
    exact = srvr_npg.exact_gradient(two_states, before, GAMMA, HORIZON)
    torch.testing.assert_close(probability @ gradients, exact)
    unweighted, _ = srvr_npg.trajectory_gradients(tabular, before, batch, GAMMA, "none")
    assert (probability @ unweighted - exact).norm() > 0.05


@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_others_keeps_it_unbiased(two_states, tabular, weighted):
    """Over all pairs of trajectories: the baseline of one is the reward of the other, also after its own end."""
    before, now = thetas(2)
    batch, probability = all_trajectories(two_states, now, horizon=2)
    at, sampled = (before, now) if weighted else (now, None)
    total = torch.zeros(4, dtype=torch.float64)
    for i, j in product(range(len(probability)), repeat=2):
        pair = Trajectories(*(column[[i, j]] for column in batch))
        gradients, _ = srvr_npg.trajectory_gradients(tabular, at, pair, GAMMA, "others", sampled)
        total += probability[i] * probability[j] * gradients.mean(0)
    torch.testing.assert_close(total, srvr_npg.exact_gradient(two_states, at, GAMMA, 2))


def test_the_recursion_is_unbiased(two_states, tabular, monkeypatch):
    """update() itself, over all trajectories of two steps, its means replaced by exact expectations."""
    start, args = thetas(1)[0], Args(algorithm="srvr-pg", gamma=GAMMA, baseline="none", learning_rate=0.3)
    learner = srvr_npg.new_learner(tabular)._replace(theta=start)
    estimators = srvr_npg.trajectory_gradients

    def expectation(*options):
        """In the place of each trajectory's gradient, such that their mean is the expectation."""
        gradients, log_weight = estimators(*options)
        return gradients * probability[:, None] * len(probability), log_weight

    monkeypatch.setattr(srvr_npg, "trajectory_gradients", expectation)
    for _ in range(3):
        here = learner.theta
        batch, probability = all_trajectories(two_states, here)
        learner, _ = srvr_npg.update(tabular, learner, batch, args)
        exact = srvr_npg.exact_gradient(two_states, here, GAMMA, HORIZON)
        torch.testing.assert_close(learner.estimate, exact)
        torch.testing.assert_close(learner.theta, here + 0.3 * exact)
        assert torch.equal(learner.before, here)


def natural_by_hand(policy, theta, batch, damping):
    """The map u -> inv(F + damping) u, with the Fisher matrix of the batch."""
    matrix = srvr_npg.fisher_matrix(policy, theta, srvr_npg.visited(batch, GAMMA))
    return lambda u: torch.linalg.solve(matrix + damping * torch.eye(len(u)).to(u), u)


@pytest.mark.parametrize("algorithm", ["srvr-pg", "srvr-npg"])
@pytest.mark.parametrize("updates", [0, 1, 2])
def test_a_step_by_hand(two_states, tabular, algorithm, updates):
    """From scratch and corrected: the estimate, and where it leads with and without the Fisher matrix."""
    before, now, last = thetas(3)
    args = Args(algorithm=algorithm, epoch_steps=3, gamma=GAMMA, baseline="none", learning_rate=0.3, damping=0.2)
    learner = srvr_npg.new_learner(tabular)
    learner = learner._replace(theta=now, before=before, estimate=last, updates=torch.tensor(updates))
    batch, _ = all_trajectories(two_states, now)
    u = srvr_npg.trajectory_gradients(tabular, now, batch, GAMMA, "none")[0].mean(0)
    if updates:
        u = last + u - srvr_npg.trajectory_gradients(tabular, before, batch, GAMMA, "none", now)[0].mean(0)
    direction = natural_by_hand(tabular, now, batch, 0.2)(u) if algorithm == "srvr-npg" else u
    learner, _ = srvr_npg.update(tabular, learner, batch, args)
    torch.testing.assert_close(learner.estimate, u)
    torch.testing.assert_close(learner.theta, now + 0.3 * direction)
    assert torch.equal(learner.before, now) and learner.updates == updates + 1


def test_metrics_by_hand(two_states, tabular):
    """Of a corrected step on two trajectories, of which the second ends after one step."""
    before, now, last = thetas(3)
    probs_before, probs = (srvr_npg.action_probs(two_states, theta).numpy() for theta in (before, now))
    played = [[(0, 1, 1.5), (1, 0, -0.7)], [(1, 1, 2.0)]]  # states, actions, rewards
    obs = torch.zeros(2, 2, 2, dtype=torch.float64)
    action, (reward, running) = torch.zeros(2, 2, 1, dtype=torch.int64), torch.zeros(2, 2, 2, dtype=torch.float64)
    weights, gradients, visits = [], [], []
    for i, steps in enumerate(played):
        weight, score, gradient = 1.0, np.zeros((2, 2)), np.zeros((2, 2))  # [A, S], as theta
        for t, (s, a, r) in enumerate(steps):
            obs[i, t, s], action[i, t, 0], reward[i, t], running[i, t] = 1, a, r, 1
            weight *= probs_before[s, a] / probs[s, a]
            score[a, s] += 1
            score[:, s] -= probs[s]
            gradient += GAMMA**t * r * score
            weights.append(weight)
            visits.append((GAMMA**t, s, a))
        gradients.append(gradient.flatten())
    weights.append(weights[-1])  # after the end
    args = Args(algorithm="srvr-pg", epoch_steps=3, gamma=GAMMA, baseline="none", learning_rate=0.3)
    learner = srvr_npg.new_learner(tabular)
    learner = learner._replace(theta=now, before=before, estimate=last, updates=torch.tensor(1))
    learner, metrics = srvr_npg.update(tabular, learner, Trajectories(obs, action, reward, running), args)
    after = srvr_npg.action_probs(two_states, learner.theta).numpy()
    ends = weights[1], weights[3]
    total = sum(visit for visit, _, _ in visits)
    expected = {
        "weights/effective_sample_size": sum(ends) ** 2 / sum(w**2 for w in ends) / 2,
        "weights/largest": max(weights),
        "policy/kl": sum(visit * math.log(probs[s, a] / after[s, a]) for visit, s, a in visits) / total,
        "policy/entropy": -sum(visit * math.log(probs[s, a]) for visit, s, a in visits) / total,
        "gradient/norm": float(learner.estimate.norm()),
        "gradient/step_norm": 0.3 * float(learner.estimate.norm()),
        "gradient/variance": ((gradients[0] - gradients[1]) ** 2).sum() / 4,
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def test_weights_by_brute_force(two_states, tabular):
    """Products of probabilities, one factor at a time, up to the end of each episode."""
    before, now = thetas(2)
    batch, _ = all_trajectories(two_states, now)
    _, log_weight = srvr_npg.trajectory_gradients(tabular, before, batch, GAMMA, "none", now)
    weight = log_weight.exp()
    ratio = srvr_npg.action_probs(two_states, before) / srvr_npg.action_probs(two_states, now)
    for i in range(len(weight)):
        expected = 1.0
        for t in range(HORIZON):
            if batch.running[i, t]:
                expected *= ratio[int(batch.obs[i, t].argmax()), int(batch.action[i, t])]
            assert weight[i, t] == pytest.approx(float(expected))


def test_long_products_of_small_probabilities_do_not_vanish():
    log_prob = torch.full((1, 5_000), -50.0, dtype=torch.float64)
    log_weight = srvr_npg.log_importance_weights(log_prob, log_prob, torch.ones(1, 5_000))
    assert (log_weight == 0).all()


@pytest.mark.parametrize("scale", [0, -1_000, -260_000, 1_000])
def test_effective_sample_size(scale):
    """Whatever multiplies all weights, exp(scale), has no part in it, also where no number is as small or large."""
    weights = {(3, 3, 3, 3, 3, 3, 3): 1, (0, 0, 0, 5): 0.25, (1, 3): 0.8}
    for weight, expected in weights.items():
        log_weight = torch.tensor(weight, dtype=torch.float64).log() + scale
        assert float(srvr_npg.effective_sample_size(log_weight)) == pytest.approx(expected)


def test_error_falls_as_the_root_of_the_number_of_trajectories():
    """The sampler, too: means over 100 times as many trajectories are ten times as near to the exact gradient."""
    task = srvr_npg.TabularTask(Args(env_id="tabular", horizon=20, gamma=0.8), torch.device("cpu"))
    theta = thetas(1, task.policy.size)[0]
    exact = srvr_npg.exact_gradient(task.mdp, theta, 0.8, 20)
    errors = []
    for count in (50, 5_000):
        repeats = []
        for _ in range(12):
            batch = task.play(theta, count, 0, 0)
            gradients, _ = srvr_npg.trajectory_gradients(task.policy, theta, batch, 0.8, "others")
            repeats.append(float((gradients.mean(0) - exact).norm() ** 2))
        errors.append(math.sqrt(np.mean(repeats)))
    assert 7 < errors[0] / errors[1] < 14


# ---- the Fisher matrix and its solvers


def test_fisher_matrix_is_the_expected_outer_product(two_states, tabular):
    """Over all trajectories, weighted by their probabilities, it is the exact one, and E[score] is 0."""
    (theta,) = thetas(1)
    batch, probability = all_trajectories(two_states, theta)
    steps = srvr_npg.visited(batch, GAMMA)
    assert steps.weight.sum() == pytest.approx(1) and len(steps.obs) == batch.running.sum()
    likely = steps.weight * probability[:, None].expand_as(batch.reward)[batch.running > 0]
    steps = steps._replace(weight=likely / likely.sum())
    exact = srvr_npg.exact_fisher(two_states, theta, GAMMA, HORIZON)
    torch.testing.assert_close(srvr_npg.fisher_matrix(tabular, theta, steps), exact)
    by_hand = torch.zeros(4, 4, dtype=torch.float64)
    for obs, action, weight in zip(*steps):
        score = grad(tabular.log_prob)(theta, obs, action)
        by_hand += weight * torch.outer(score, score)
    torch.testing.assert_close(by_hand, exact)
    mean = steps.weight @ srvr_npg.scores(tabular, theta, steps)
    torch.testing.assert_close(mean, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("policy", [Softmax((4, 6, 3)), Gaussian((4, 6, 2), 0.7)], ids=["softmax", "gaussian"])
def test_solvers_agree(policy):
    theta = thetas(1, policy.size, 0.5)[0]
    obs = torch.randn(10, 30, 4, dtype=torch.float64)
    action = policy.sample(theta, obs.flatten(0, 1)).unflatten(0, (10, 30))
    running = (torch.rand(10, 30) < 0.8).double()
    batch = Trajectories(obs, action, torch.zeros(10, 30), running)
    u, steps = thetas(1, policy.size)[0], srvr_npg.visited(batch, GAMMA)
    matrix = srvr_npg.fisher_matrix(policy, theta, steps)
    torch.testing.assert_close(srvr_npg.fisher_product(policy, theta, steps)(u), matrix @ u)
    exact = torch.linalg.solve(matrix + 0.1 * torch.eye(policy.size, dtype=torch.float64), u)
    options = dict(gamma=GAMMA, damping=0.1, cg_steps=200, subproblem_steps=20_000)
    for solver, error in (("cholesky", 1e-9), ("cg", 1e-8), ("auto", 1e-9), ("sgd", 0.15)):
        found = srvr_npg.natural_direction(policy, theta, u, batch, Args(solver=solver, **options))
        assert (found - exact).norm() <= error * exact.norm(), solver
    few = srvr_npg.natural_direction(policy, theta, u, batch, Args(solver="cg", **options | dict(cg_steps=2)))
    assert (few - exact).norm() > 1e-3 * exact.norm()


def test_averaged_sgd_converges_to_the_exact_solution():
    """Fifty times as many steps bring it nearer by more than three times."""
    torch.manual_seed(3)
    rows = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([1.0, 0.5, 2.0])
    u = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    exact = torch.linalg.solve(rows.T @ rows / 50 + 0.01 * torch.eye(3), u)
    errors = []
    for count in (200, 10_000):
        drawn = rows[torch.randint(50, (5, count))]
        errors.append(np.mean([(srvr_npg.solve_averaged_sgd(score, u, 0.01) - exact).norm() for score in drawn]))
    assert errors[1] < errors[0] / 3 and errors[1] < 0.1 * exact.norm()


def test_natural_step_is_invariant_under_linear_reparametrisation(two_states):
    """theta = A phi + b: the natural step in phi is the same step in theta; the plain one is not."""
    policy = Softmax((2, 3))  # with biases, so that not even the numbering is that of the table
    transform = torch.eye(policy.size, dtype=torch.float64) + 0.3 * thetas(policy.size, policy.size)
    offset, phi = thetas(2, policy.size)

    class Reparametrised(Softmax):
        def outputs(self, phi, obs):
            return super().outputs(transform @ phi + offset, obs)

    other, theta = Reparametrised((2, 3)), transform @ phi + offset
    obs = torch.randn(40, 9, 2, dtype=torch.float64)
    action = policy.sample(theta, obs.flatten(0, 1)).unflatten(0, (40, 9))
    batch = Trajectories(obs, action, torch.randn(40, 9, dtype=torch.float64), torch.ones(40, 9))
    args = Args(algorithm="npg", gamma=GAMMA, baseline="none", damping=1e-9, learning_rate=0.1)
    ours, _ = srvr_npg.update(policy, srvr_npg.new_learner(policy)._replace(theta=theta), batch, args)
    theirs, _ = srvr_npg.update(other, srvr_npg.new_learner(policy)._replace(theta=phi), batch, args)
    moved = policy.log_prob(theta, obs, action) - policy.log_prob(ours.theta, obs, action)
    assert moved.abs().max() > 0.01
    log_probs = policy.log_prob(ours.theta, obs, action), other.log_prob(theirs.theta, obs, action)
    torch.testing.assert_close(*log_probs, atol=1e-6, rtol=1e-6)
    plain = args.__class__(**vars(args) | dict(algorithm="pg"))
    ours, _ = srvr_npg.update(policy, srvr_npg.new_learner(policy)._replace(theta=theta), batch, plain)
    theirs, _ = srvr_npg.update(other, srvr_npg.new_learner(policy)._replace(theta=phi), batch, plain)
    log_probs = policy.log_prob(ours.theta, obs, action), other.log_prob(theirs.theta, obs, action)
    assert (log_probs[0] - log_probs[1]).abs().max() > 1e-3


# ---- policies and the exact MDP


def test_policies_are_distributions():
    softmax = Softmax((3, 5, 4))
    theta = thetas(1, softmax.size)[0]
    obs = torch.randn(7, 3, dtype=torch.float64)
    total = sum(softmax.log_prob(theta, obs, torch.full((7, 1), a)).exp() for a in range(4))
    torch.testing.assert_close(total, torch.ones_like(total))
    gaussian = Gaussian((3, 5, 2), 0.6)
    theta = thetas(1, gaussian.size)[0]
    mean, action = gaussian.mode(theta, obs), gaussian.sample(theta, obs)
    expected = torch.distributions.Normal(mean, 0.6).log_prob(action).sum(-1)
    torch.testing.assert_close(gaussian.log_prob(theta, obs, action), expected)
    many = gaussian.sample(theta, obs[:1].expand(20_000, 3))
    assert many.std(0).sub(0.6).abs().max() < 0.02
    drawn = softmax.sample(thetas(1, softmax.size)[0] * 0, obs[:1].expand(8_000, 3)).flatten().bincount() / 8_000
    assert (drawn - 0.25).abs().max() < 0.03


def test_the_network_is_that_of_torch():
    policy = Softmax((3, 5, 4))
    theta, obs = policy.initial() + 0.1 * thetas(1, policy.size)[0], torch.randn(7, 3, dtype=torch.float64)
    first, second = theta[:20].view(5, 4), theta[20:].view(4, 6)
    hidden = torch.nn.functional.linear(obs, first[:, :3], first[:, 3]).tanh()
    expected = torch.nn.functional.linear(hidden, second[:, :5], second[:, 5])
    torch.testing.assert_close(policy.outputs(theta, obs), expected)


def test_exact_return_optimum_and_gradient():
    """Without end it is the limit of horizons; the optimum is the best of all deterministic policies."""
    mdp = srvr_npg.random_mdp(3, 2, seed=4)
    theta = thetas(1, 6)[0]
    probs = srvr_npg.action_probs(mdp, theta)
    endless = srvr_npg.exact_return(mdp, probs, 0.9)
    assert float(srvr_npg.exact_return(mdp, probs, 0.9, 400)) == pytest.approx(float(endless), rel=1e-12)
    tables = [torch.eye(2, dtype=torch.float64)[list(choice)] for choice in product(range(2), repeat=3)]
    best = max(float(srvr_npg.exact_return(mdp, table, 0.9)) for table in tables)
    assert srvr_npg.optimal_return(mdp, 0.9) == pytest.approx(best) and best > endless
    gradient, eps = srvr_npg.exact_gradient(mdp, theta, 0.9, 7), 1e-6
    for i, direction in enumerate(torch.eye(6, dtype=torch.float64)):
        ends = [srvr_npg.action_probs(mdp, theta + sign * eps * direction) for sign in (1, -1)]
        high, low = (srvr_npg.exact_return(mdp, end, 0.9, 7) for end in ends)
        assert float((high - low) / (2 * eps)) == pytest.approx(float(gradient[i]), abs=1e-7)


# ---- batches


def test_trajectories_of_gymnasium_end_where_the_episodes_do():
    """Replayed by hand from the same seeds: observations, rewards, ends; nothing after them."""
    args = Args(horizon=40, large_batch=6, seed=3)
    task = srvr_npg.GymTask(args, torch.device("cpu"))
    batch = task.play(task.policy.initial(), 6, 9, 0)
    lengths = batch.running.sum(1).int().tolist()
    assert min(lengths) < 40
    for i, seed in enumerate(srvr_npg.episode_seeds(0, 3, 9, 6)):
        env = gym.make("CartPole-v1")
        obs, _ = env.reset(seed=int(seed))
        for t in range(lengths[i]):
            assert batch.obs[i, t].tolist() == obs.tolist() and batch.running[i, t] == 1
            obs, reward, terminated, _, _ = env.step(int(batch.action[i, t, 0]))
            assert batch.reward[i, t] == reward
        assert terminated == (lengths[i] < 40)
        assert not batch.running[i, lengths[i] :].any() and not batch.reward[i, lengths[i] :].any()


def test_trajectories_of_the_mdp_end_where_the_episodes_do():
    """Rewards are those of its table, and 0 after the end."""
    task = srvr_npg.TabularTask(Args(env_id="tabular", horizon=40), torch.device("cpu"))
    batch = task.play(thetas(1, task.policy.size)[0], 50, 0, 0)
    ended = batch.running == 0
    assert ended.any() and (batch.running[:, 0] == 1).all() and (batch.running.diff() <= 0).all()
    assert (batch.reward[ended] == 0).all()
    table = task.mdp.reward[batch.obs.argmax(-1), batch.action[..., 0]]
    assert torch.equal(batch.reward[~ended], table[~ended]) and (table[ended] > 0).all()


@pytest.mark.parametrize("deterministic", [False, True])
def test_evaluation_on_the_mdp_is_exact(deterministic):
    task = srvr_npg.TabularTask(Args(env_id="tabular", gamma=0.9), torch.device("cpu"))
    theta = thetas(1, task.policy.size)[0]
    probs = theta.view(3, 5).T.softmax(1)
    if deterministic:
        probs = torch.stack([torch.eye(3, dtype=torch.float64)[row.argmax()] for row in probs])
    expected = float(srvr_npg.exact_return(task.mdp, probs, 0.9))
    assert task.evaluate(theta, deterministic, 2, 0).tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_evaluation_plays_the_mode_or_samples(deterministic):
    """An episode replayed by hand from the same seed, of a policy whose mode balances for long."""
    task = srvr_npg.GymTask(Args(hidden=1), torch.device("cpu"))
    theta = torch.tensor([0, 0, 1, 1, 0, -1, 0, 1, 0], dtype=torch.float64)  # pushes where the pole falls
    env, total = gym.make("CartPole-v1"), 0
    found = task.evaluate(theta, deterministic, 1, 5)
    obs, _ = env.reset(seed=int(srvr_npg.episode_seeds(1, 5, 0, 1)[0]))
    torch.manual_seed(5)
    ended = False
    while not ended:
        probs = task.policy.outputs(theta, torch.tensor(obs[None], dtype=torch.float64)).softmax(-1)
        action = probs.argmax(-1) if deterministic else probs.multinomial(1)
        obs, reward, terminated, truncated, _ = env.step(int(action))
        total, ended = total + reward, terminated or truncated
    assert found.tolist() == [total] and (total > 100) == deterministic


def test_evaluations_without_a_time_limit_end(monkeypatch):
    """A policy that walks into CliffWalking's wall for ever is told; tasks that end, or have a limit, are played."""
    monkeypatch.setattr(srvr_npg, "LONGEST_EPISODE", 8)
    task = srvr_npg.GymTask(Args(env_id="CliffWalking-v1"), torch.device("cpu"))
    with pytest.raises(srvr_npg.RunError, match="--env-id: CliffWalking-v1 has no time limit, .* in 8 steps"):
        task.evaluate(torch.zeros(task.policy.size, dtype=torch.float64), True, 2, 0)
    for env_id in ("Blackjack-v1", "CartPole-v1"):
        task = srvr_npg.GymTask(Args(env_id=env_id), torch.device("cpu"))
        returns = task.evaluate(torch.zeros(task.policy.size, dtype=torch.float64), False, 30, 0)
        assert len(returns) == 30 and (env_id == "Blackjack-v1" or returns.max() > 8)


def test_continuous_actions_are_clipped_and_scaled():
    """Pendulum's torques lie in [-2, 2], the policy's in [-1, 1]."""
    env, plain = srvr_npg.make_env("Pendulum-v1"), gym.make("Pendulum-v1")
    for action, torque in (([0.5], 1.0), ([7.0], 2.0), ([-3.0], -2.0)):
        env.reset(seed=0)
        plain.reset(seed=0)
        ours, theirs = env.step(np.array(action)), plain.step(np.array([torque], np.float32))
        assert ours[1] == pytest.approx(theirs[1]) and ours[0] == pytest.approx(theirs[0])
    assert env.action(np.array([7.0])).tolist() == [1.0]  # whatever the task itself would do with 7


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_trajectories_are_counted(algorithm, monkeypatch):
    """N + (m - 1) B an epoch of m steps; plain algorithms play N at every step."""
    played, play = [], srvr_npg.TabularTask.play
    spy = lambda self, theta, count, *rest: (played.append(count), play(self, theta, count, *rest))[1]  # noqa: E731
    monkeypatch.setattr(srvr_npg.TabularTask, "play", spy)
    result = srvr_npg.train(Args(**SMALL, algorithm=algorithm, epoch_steps=3, learning_rate=1e-3))
    assert played[:6] == ([20, 10, 10, 20, 10, 10] if "srvr" in algorithm else [20] * 6)
    assert result["trajectories"] == sum(played) == 200


@pytest.mark.parametrize("algorithm", ["pg", "npg"])
def test_adam_is_torchs(two_states, tabular, algorithm):
    """On the direction: the estimate, or the natural one."""
    args = Args(algorithm=algorithm, optimizer="adam", learning_rate=0.05, gamma=GAMMA, baseline="none")
    learner = srvr_npg.new_learner(tabular)
    theirs = torch.nn.Parameter(learner.theta.clone())
    optimizer = torch.optim.Adam([theirs], lr=0.05, betas=(0.9, 0.99))
    for _ in range(4):
        batch, _ = all_trajectories(two_states, learner.theta)
        natural = natural_by_hand(tabular, learner.theta, batch, args.damping)
        learner, _ = srvr_npg.update(tabular, learner, batch, args)
        theirs.grad = -(natural(learner.estimate) if algorithm == "npg" else learner.estimate)
        optimizer.step()
        torch.testing.assert_close(learner.theta, theirs.detach())


# ---- runs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learning(algorithm):
    """From a third below the optimum to near it, in a few seconds."""
    rate = 0.05 if algorithm.endswith("npg") else 0.3
    options = SMALL | dict(total_trajectories=1_000, learning_rate=rate, damping=0.1, eval_interval=100_000)
    result = srvr_npg.train(Args(**options, algorithm=algorithm))
    task = srvr_npg.TabularTask(Args(**options), torch.device("cpu"))
    optimum = srvr_npg.optimal_return(task.mdp, 0.9)
    first = task.evaluate(torch.zeros(15, dtype=torch.float64), False, 1, 0)[0]
    *_, last, _ = evaluations(result["run_dir"])
    assert last["mode"] == "stochastic" and first < 0.7 * optimum
    assert float(last["return_mean"]) > 0.93 * optimum


def test_cartpole_is_learned():
    """From returns near 20 to 150 or more in a few hundred trajectories."""
    options = dict(algorithm="npg", total_trajectories=300, learning_rate=1e-3, damping=0.01)
    result = srvr_npg.train(Args(**options, final_eval_episodes=10))
    assert result["final_return"] > 150 and len(result["episodic_returns"]) == 10


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed():
    """With whatever draws random numbers: episodes, actions, averaged SGD; and with Adam's moments."""
    run = dict(horizon=50, total_trajectories=300, checkpoint_interval=20, eval_interval=200, final_eval_episodes=5)
    kill_and_resume(srvr_npg, (40,), **run, learning_rate=1e-4, optimizer="adam", solver="sgd")


def test_nan_weights_are_never_saved(monkeypatch):
    update = srvr_npg.update

    def poison(policy, learner, *rest):
        learner, metrics = update(policy, learner, *rest)
        return learner._replace(estimate=learner.estimate * (math.nan if learner.updates > 3 else 1)), metrics

    monkeypatch.setattr(srvr_npg, "update", poison)
    message = error_of(srvr_npg, **SMALL, checkpoint_interval=1)
    assert "estimate is NaN or infinite at step" in message
    (run_dir,) = Path("runs").iterdir()
    assert all(value.isfinite().all() for value in checkpoint_of({"run_dir": run_dir})["learner"].values())


def shift_log_weights(monkeypatch, shift):
    log_weights = srvr_npg.log_importance_weights
    monkeypatch.setattr(srvr_npg, "log_importance_weights", lambda *options: log_weights(*options) + shift)


def test_importance_weights_that_overflow_stop_the_run(monkeypatch):
    """At the first corrected step, before anything is stored."""
    shift_log_weights(monkeypatch, 1_000)
    message = error_of(srvr_npg, **SMALL)
    assert "weights/largest is NaN or infinite at step" in message
    (run_dir,) = Path("runs").iterdir()
    assert checkpoint_of({"run_dir": run_dir})["progress"]["global_step"] == 0


def test_importance_weights_that_vanish_do_not_stop_the_run(monkeypatch):
    """As numbers they are all 0, and so is their part in the estimate; the metrics are finite all the same."""
    shift_log_weights(monkeypatch, -1_000)
    result = srvr_npg.train(Args(**SMALL, learning_rate=1e-4))
    assert result["trajectories"] == 200
    curves = scalars(result["run_dir"])
    assert {value for _, value in curves["weights/largest"]} == {"0.0"}
    assert all(0.9 < float(value) <= 1 for _, value in curves["weights/effective_sample_size"])


def test_evaluate_prints_the_exact_return(capsys):
    result = srvr_npg.train(Args(**SMALL, learning_rate=1e-3))
    srvr_npg.main(Args(evaluate=result["run_dir"]))
    printed = capsys.readouterr().out
    assert f"deterministic return {result['final_return']:.2f} +- 0.00" in printed and "stochastic" in printed
    written = json.loads((Path(result["run_dir"]) / "result.json").read_text())
    assert written["trajectories"] == 200 and written["final_return"] == result["final_return"]


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(large_batch=1), "from 2 to"),
        (dict(small_batch=1), "2 or more with --baseline others"),
        (dict(damping=0.0), "above 0"),
        (dict(std=-1.0), "above 0"),
        (dict(adam_beta2=1.0), "from 0 to below 1"),
        (dict(horizon=0), "from 1 to"),
        (dict(horizon=10**9), "1e7 steps or fewer"),
        (dict(gamma=1.0, env_id="tabular"), "below 1"),
        (dict(capture_video=True, env_id="tabular"), "no pictures"),
        (dict(epoch_steps=0), "from 1 to"),
        (dict(total_trajectories=0), "from 1 to"),
        (dict(algorithm="trpo"), "'pg', 'npg', 'srvr-pg', 'srvr-npg'"),
        (dict(solver="lu"), "'cholesky', 'cg', 'sgd'"),
        (dict(optimizer="rmsprop"), "'sgd', 'adam'"),
        (dict(baseline="value"), "'none', 'others'"),
    ],
)
def test_invalid_values_are_refused_by_name(options, words):
    message = error_of(srvr_npg, **options)
    assert f"--{next(iter(options)).replace('_', '-')}" in message and words in message and "must be" in message
    assert not Path("runs").exists()


class Switches(gym.Env):
    """A task whose actions are neither Discrete nor a Box."""

    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.MultiBinary(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode


gym.register("Switches-v0", Switches)


@pytest.mark.parametrize("env_id", ["NoSuchTask-v0", "a:b:c", "Switches-v0", ""])
def test_unknown_tasks_are_refused(env_id):
    message = error_of(srvr_npg, env_id=env_id)
    assert "--env-id" in message and "CartPole-v1" in message


def test_steps_are_those_before_the_end():
    running = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=torch.float64)
    obs = torch.arange(6.0).view(2, 3, 1)
    steps = srvr_npg.visited(Trajectories(obs, obs.long(), torch.zeros(2, 3), running), 0.5)
    assert isinstance(steps, Steps) and steps.obs.flatten().tolist() == [0, 1, 3, 4, 5]
    assert steps.weight.tolist() == pytest.approx([x / 3.25 for x in (1, 0.5, 1, 0.5, 0.25)])


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", command(srvr_npg, algorithm="pg", seed=1)[1:])
    args, given = srvr_npg.read_command_line()
    assert args == Args(algorithm="pg") and given == {"algorithm", "seed"}
    monkeypatch.setattr("sys.argv", ["srvr_npg.py", "--help"])
    with pytest.raises(SystemExit):
        srvr_npg.read_command_line()
    text = capsys.readouterr().out
    assert [text.index(f"{group} options") for group in ("Task", "Algorithm", "Run")] == sorted(
        text.index(f"{group} options") for group in ("Task", "Algorithm", "Run")
    )


# ---- benchmark/srvr_npg_figures.py and srvr_npg_tables.py


@pytest.mark.parametrize(
    "algorithm, reached", [("pg", (25, 50, 75)), ("npg", (25, 50, 75)), ("srvr-pg", (45, 45, 90)), ("pg", (100,))]
)
def test_gaps_are_those_of_the_trajectories_by_then(algorithm, reached, monkeypatch):
    """J* - J after the last step at or before each checkpoint, none after it."""
    checkpoints = np.array([45, 60, 90]) if len(reached) == 3 else np.array([100])
    monkeypatch.setattr(figures, "TRAJECTORIES", 100)
    monkeypatch.setattr(figures, "CHECKPOINTS", checkpoints)
    gaps, played = {}, 0

    def watch(task, before, after, batch):
        nonlocal played
        played += len(batch.reward)
        value = srvr_npg.exact_return(task.mdp, srvr_npg.action_probs(task.mdp, after.theta), 0.9)
        gaps[played] = srvr_npg.optimal_return(task.mdp, 0.9) - float(value)

    found = figures.follow(algorithm, 0.3, 1, watch)
    assert found.tolist() == pytest.approx([gaps[count] for count in reached])


def test_a_missing_run_counts_as_the_worst(monkeypatch, tmp_path):
    """Seed 2 has no file: MountainCar's worst is -99.9 at every evaluation, also in the table."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for task, algorithm in product(tables.WORST, ALGORITHMS):
        (tmp_path / task).mkdir(exist_ok=True)
        for seed in {*tables.SEEDS} - {2}:
            rows = [dict(mode=mode, return_mean=seed + i) for i in range(3) for mode in ("stochastic", "deterministic")]
            with open(tmp_path / task / f"{algorithm}_{seed}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    found = tables.returns("MountainCarContinuous-v0", "npg", "deterministic")
    assert found.shape == (10, 3) and found[0].tolist() == [1, 2, 3] and found[9].tolist() == [10, 11, 12]
    assert found[1].tolist() == [-99.9] * 3
    assert tables.returns("CartPole-v1", "npg", "stochastic")[1].tolist() == [0] * 3
    last = tables.MEASURES["sampled"]("MountainCarContinuous-v0", "pg")
    assert last.mean() == pytest.approx((sum(range(1, 11)) - 2 + 9 * 2 - 99.9) / 10)
    means = tables.bootstrap(np.full(10, 3.0), 0)
    assert tables.estimate(3.0, means) == "3 [3, 3]"
