"""policy_transfer.py: Riccati equations, learning with and without the model, transfer, the grid, diffusion models."""

import csv
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.linalg import inv, norm
from scipy.integrate import quad, solve_bvp
from scipy.linalg import solve_continuous_are, sqrtm
from scipy.ndimage import map_coordinates

import policy_transfer as script
from policy_transfer import LQR, Args, RunError, best_policy, cost, evaluate, riccati

DEFAULT = Args()
TINY = Args(num_pairs=2, num_repeats=2, grid_size=4)


def scalar(a=1.0, b=2.0, c=1.0, d=1.0, s=3.0, q=3.5, r=1.0, discount=2.0, temperature=0.1):
    """A problem of one state and one control; with the defaults P = 1, R~ = 2, G = 3 and K = 3 / 2 by hand."""
    A, B, S, Q, R = (np.array([[x]]) for x in (a, b, s, q, r))
    return LQR(A, B, np.array([[[c]]]), np.array([[[d]]]), S, Q, R, discount, temperature)


def system(seed=0, n=3, args=DEFAULT):
    return script.random_system(args, n, np.random.default_rng(seed))


# ---- the problem and its solution


def test_riccati_and_policy_of_a_scalar_by_hand():
    """0 = q + (2 a - discount + c^2) P - ((b + c d) P)^2 / (r + d^2 P) = 3.5 + 1 - 9 / 2."""
    problem = scalar()
    P = riccati(problem)
    K, spread = best_policy(problem, P)
    assert [P.item(), K.item(), spread.item()] == pytest.approx([1, 1.5, 0.1 / 2 / 2], rel=1e-12)
    rates, constant = script.riccati_rates(problem, P)
    assert rates.item() == pytest.approx(0, abs=1e-12)
    assert constant == pytest.approx(9 - 0.05 * (math.log(0.1 * math.pi) - math.log(2)))


@pytest.mark.parametrize("n, num_noises", [(1, 0), (4, 0), (9, 2)])
def test_riccati_without_multiplicative_noise_is_scipys(n, num_noises):
    rng = np.random.default_rng(n)
    A, B, root = rng.normal(size=(n, n)), rng.normal(size=(n, 2)), rng.normal(size=(n, n))
    none = np.zeros((num_noises, n, n)), np.zeros((num_noises, n, 2))
    problem = LQR(A, B, *none, np.eye(n), root @ root.T, np.diag([1.0, 2.0]), 0.3, 0.1)
    expected = solve_continuous_are(A - 0.15 * np.eye(n), B, problem.Q, problem.R)
    np.testing.assert_allclose(riccati(problem), expected, rtol=1e-8, atol=1e-8)


def test_riccati_residual_term_by_term():
    problem, P = system(n=4)
    A, B, Q, R = problem.A, problem.B, problem.Q, problem.R
    tilde = R + sum(D.T @ P @ D for D in problem.D)
    G = B.T @ P + sum(D.T @ P @ C for C, D in zip(problem.C, problem.D))
    residual = Q + A.T @ P + P @ A - problem.discount * P + sum(C.T @ P @ C for C in problem.C) - G.T @ inv(tilde) @ G
    assert norm(residual) < 1e-12 * norm(P)


def test_finite_horizon_by_hand():
    """With A = discount / 2 and Q = 0: -dP/dt = -P^2, so P = g / (1 + g t); c is an integral."""
    problem = scalar(b=1.0, c=0.0, d=0.0, s=2.0, q=0.0)
    times = np.array([0.5, 1.0, 3.0])
    P, c = script.riccati_flow(problem, np.array([[2.0]]), times)
    np.testing.assert_allclose(P[:, 0, 0], 2 / (1 + 2 * times), rtol=1e-8)
    entropy = 0.05 * math.log(0.1 * math.pi)
    expected = [quad(lambda t: math.exp(-2 * (T - t)) * (8 / (1 + 2 * t) - entropy), 0, T)[0] for T in times]  # noqa: B023
    np.testing.assert_allclose(c, expected, rtol=1e-7)


def test_a_long_horizon_is_none():
    problem, P = system()
    flow, c = script.riccati_flow(problem, 0 * P, np.array([1.0, 200.0]))
    np.testing.assert_allclose(flow[1], P, rtol=1e-6, atol=1e-8)
    assert c[1] == pytest.approx(script.riccati_rates(problem, P)[1] / problem.discount, rel=1e-6)


# ---- learning with the model


def test_one_round_of_ipo_by_hand():
    """With A = discount / 2, b = q = r = 1: the gain 2 costs (q + 4 r) / 4, and the next gain is that."""
    problem = scalar(b=1.0, c=0.0, d=0.0, q=1.0)
    P = evaluate(problem, np.array([[2.0]]))
    assert P.item() == pytest.approx(5 / 4)
    assert script.ipo_step(problem, np.array([[2.0]]), P).item() == pytest.approx(5 / 4)
    assert script.natural_gradient_step(problem, np.array([[2.0]]), P).item() == pytest.approx(2 - (2 - 5 / 4))


def test_lyapunov_operator_on_a_matrix():
    problem, P = system(n=3)
    K = np.random.default_rng(1).normal(size=problem.B.T.shape)
    F = problem.A - problem.B @ K - problem.discount / 2 * np.eye(3)
    loops = [C - D @ K for C, D in zip(problem.C, problem.D)]
    expected = F.T @ P + P @ F + sum(E.T @ P @ E for E in loops)
    np.testing.assert_allclose((script.lyapunov_operator(problem, K) @ P.ravel()).reshape(3, 3), expected)


def test_cost_of_the_optimum_is_its_value():
    problem, P = system()
    value = np.trace(P) + script.riccati_rates(problem, P)[1] / problem.discount
    assert cost(problem, *best_policy(problem, P)) == pytest.approx(value, rel=1e-12)


def test_cost_by_monte_carlo():
    """Of a policy that is not optimal, averaged exactly, on the problem that the Euler steps solve.

    Only drawn controls would put their variance into a step's drift, which euler_limit counts: B spread B' step.
    """
    rng = np.random.default_rng(3)
    problem, P = system(seed=5, n=2, args=Args(noise=0.6, discount=2.0, temperature=10.0))
    K = script.random_start(problem, best_policy(problem, P)[0], rng, distance=0.3)
    spread, step, num_steps = np.array([[0.4]]), 0.05, 120
    starts, none = rng.normal(size=(2, 20_000)), np.zeros((1, 1))
    _, costs = script.simulate(problem, K, spread, starts, none, step, num_steps, rng)
    entropy = math.log(2 * math.pi * math.e * 0.4) / 2
    weights = step * np.exp(-problem.discount * step * np.arange(num_steps))
    totals = weights @ (costs - problem.temperature * entropy)
    error = totals.std() / len(totals) ** 0.5
    limit = script.euler_limit(problem, step)
    drawn = step * np.trace(problem.B.T @ evaluate(limit, K) @ problem.B @ spread) / limit.discount
    assert abs(totals.mean() - cost(limit, K, spread) + drawn) < 3.5 * error
    assert error < 0.05


def test_a_step_has_the_exact_mean_and_second_moment_of_the_relaxed_control():
    """Against controls that are drawn from the policy, for each sample of one step from one state."""
    problem, _ = system(seed=2, n=2, args=Args(noise=0.8))
    rng, step, count = np.random.default_rng(0), 1e-4, 400_000
    x, mean, spread = np.array([[1.0], [-0.5]]), np.array([[0.7]]), np.array([[2.0]])
    K, starts = np.array([[0.3, 0.1]]), np.repeat(x, count, 1)
    states, costs = script.simulate(problem, K, spread, starts, mean, step, 1, rng)
    u = mean - K @ x + math.sqrt(2.0) * rng.normal(size=(1, count))
    noises = [C @ x + D @ u for C, D in zip(problem.C, problem.D)]
    second = sum(noise @ noise.T for noise in noises) / count + problem.S @ problem.S.T
    moved = (states[:, 1] - x) / math.sqrt(step)
    np.testing.assert_allclose(moved @ moved.T / count, second, rtol=0.02, atol=0.02 * norm(second))
    drift = ((problem.A @ x + problem.B @ u).mean(1) * math.sqrt(step)).ravel()
    np.testing.assert_allclose(moved.mean(1), drift, atol=4 * math.sqrt(norm(second) / count))
    drawn = (x.T @ problem.Q @ x).item() + np.einsum("im,ij,jm->m", u, problem.R, u)
    assert costs[0, 0] == pytest.approx(drawn.mean(), rel=0.02) and np.ptp(costs) < 1e-12


def test_euler_limit_tends_to_the_problem():
    problem, P = system()
    policy = best_policy(problem, P)
    gaps = [cost(script.euler_limit(problem, step), *policy) - cost(problem, *policy) for step in (2e-4, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.01)


def numerical_gradient(function, at, h=1e-5):
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        move = np.zeros_like(at)
        move[index] = h
        found[index] = (function(at + move) - function(at - move)) / (2 * h)
    return found


def test_cost_gradient_by_finite_differences():
    problem, P = system(n=3)
    K = script.random_start(problem, best_policy(problem, P)[0], np.random.default_rng(1), distance=0.3)
    spread = np.array([[0.5, 0.1], [0.1, 0.2]])
    gradient, _ = script.cost_gradient(problem, K, spread, evaluate(problem, K))
    expected = numerical_gradient(lambda K: cost(problem, K, spread), K)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5 * norm(expected))


def test_the_policy_is_where_both_gradients_vanish():
    problem, P = system(n=3)
    K, spread = best_policy(problem, P)
    scale = abs(cost(problem, K, spread))
    assert norm(numerical_gradient(lambda K: cost(problem, K, spread), K, 1e-4)) < 1e-5 * scale
    assert norm(numerical_gradient(lambda spread: cost(problem, K, spread), spread, 1e-6)) < 1e-5 * scale


@pytest.mark.parametrize("n", [1, 4, 10])
def test_ipo_converges_quadratically_from_above(n):
    problem, P = system(seed=n, n=n)
    rng = np.random.default_rng(0)
    K = script.random_start(problem, best_policy(problem, P)[0], rng)
    order, ratio = script.convergence(script.policy_iteration(problem, K, P, script.ipo_step, 1e-14, 20))
    assert order == pytest.approx(2, abs=0.25) and ratio < 1
    values = [evaluate(problem, K)]
    for _ in range(4):
        K = script.ipo_step(problem, K, values[-1])
        values.append(evaluate(problem, K))
        assert np.linalg.eigvalsh(values[-2] - values[-1])[0] > -1e-9 * norm(P)


@pytest.mark.parametrize("step", [script.natural_gradient_step, script.gradient_step])
def test_gradient_methods_fall_to_the_optimum_linearly(step):
    problem, P = system(n=4)
    K = script.random_start(problem, best_policy(problem, P)[0], np.random.default_rng(0))
    errors = script.policy_iteration(problem, K, P, step, 1e-9, 2000)
    assert errors[-1] <= 1e-9 and np.all(np.diff(errors) < 0)
    assert script.convergence(errors)[0] == pytest.approx(1, abs=0.1)


def test_order_of_known_sequences():
    assert script.convergence(np.array([1e-1, 1e-2, 1e-4, 1e-8])) == pytest.approx((2, 0.1))
    assert script.convergence(0.5 ** np.arange(9)) == pytest.approx((1, 0.5))
    assert script.convergence(np.array([1e-2, 1e-4, 1e-8, 3e-16])) == pytest.approx((2, 1e-2))
    assert script.convergence(np.array([1e-2, 1e-4, 1e-8, 4e-13, 6e-13])) == pytest.approx((2, 1e-2))  # rounding


# ---- without the model


def test_temporal_differences_are_exact_without_sampling_error():
    """Noise replaced by points of the same mean and covariance: the evaluation and the gain of the Euler problem."""
    problem, P = system(seed=2, n=3)
    rng, step = np.random.default_rng(0), 0.1
    K = script.random_start(problem, best_policy(problem, P)[0], rng, distance=0.2)
    x, offset = rng.normal(size=(3, 40)), rng.normal(size=(2, 40))
    u = offset - K @ x
    noises = [C @ x + D @ u for C, D in zip(problem.C, problem.D)] + [0 * x + column[:, None] for column in problem.S.T]
    means = x + step * (problem.A @ x + problem.B @ u)
    ends = [means + sign * math.sqrt(step * len(noises)) * noise for noise in noises for sign in (1, -1)]
    states = np.concatenate([np.stack([x, end], 1) for end in ends], axis=2)
    costs = np.einsum("im,ij,jm->m", x, problem.Q, x) + np.einsum("im,ij,jm->m", u, problem.R, u)
    costs, offset = np.tile(costs, len(ends))[None], np.tile(offset, len(ends))
    found, gain, R = script.temporal_differences(states, costs, offset, K, problem.discount, step)
    limit = script.euler_limit(problem, step)
    np.testing.assert_allclose(found, evaluate(limit, K), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(gain, script.ipo_step(limit, K, found), rtol=1e-8, atol=1e-8)
    growth = math.exp(problem.discount * step)
    np.testing.assert_allclose(R, script.hamiltonian(limit, found)[0] / growth, rtol=1e-8, atol=1e-8)


def test_learning_from_trajectories_alone():
    """Fifty times the trajectories make the error a seventh, up to chance; the model is only simulated."""
    problem, P = system(seed=1, n=2)
    limit = script.euler_limit(problem, 0.1)
    best = best_policy(limit, riccati(limit))[0]
    start = script.random_start(limit, best, np.random.default_rng(0), distance=0.5)
    errors = [
        [norm(script.model_free_ipo(problem, start, count, 0.1, np.random.default_rng(i)) - best) for i in range(5)]
        for count in (400, 20_000)
    ]
    few, many = np.mean(errors, 1) / norm(best)
    assert many < 0.1 and few > 3 * many


def test_learning_explores_with_the_policy_it_has_learned(monkeypatch):
    problem = system(seed=1, n=2)[0]._replace(R=np.array([[4.0]]))
    P = riccati(problem)
    simulate, spreads = script.simulate, []
    monkeypatch.setattr(script, "simulate", lambda *args: spreads.append(args[2].item()) or simulate(*args))
    script.model_free_ipo(problem, best_policy(problem, P)[0], 20_000, 0.01, np.random.default_rng(0))
    best = best_policy(problem, P)[1].item()
    assert spreads[0] == 0.05 and spreads[1:] == pytest.approx([best] * 3, rel=0.2) and best < 0.5 * 0.05


# ---- transfer


def test_a_neighbour_is_as_far_as_asked():
    source, _ = system(n=4)
    target = script.neighbour(source, 0.01, np.random.default_rng(0))
    for one, other in zip(source[:4], target[:4]):
        assert norm(one - other) == pytest.approx(0.01 * norm(one))
    for one, other in ((source.Q, target.Q), (source.R, target.R)):
        assert norm(np.linalg.cholesky(one) - np.linalg.cholesky(other)) < 0.02 * norm(one)
        assert np.linalg.eigvalsh(other)[0] > 0


def test_gap_is_linear_and_cost_quadratic_in_the_distance():
    source, P = system(n=3)
    K, found = best_policy(source, P)[0], []
    for eps in (1e-3, 5e-4):
        target = script.neighbour(source, eps, np.random.default_rng(0))
        best, spread = best_policy(target, riccati(target))
        found.append([norm(K - best), cost(target, K, spread) - cost(target, best, spread)])
    assert np.divide(*found) == pytest.approx([2, 4], rel=0.02)


def test_a_start_stabilises_and_is_as_far_as_that_allows():
    problem, P = system(n=3)
    K = best_policy(problem, P)[0]
    near, far = (script.random_start(problem, K, np.random.default_rng(0), distance) for distance in (1e-3, 1e3))
    assert norm(near - K) == pytest.approx(1e-3 * norm(K))
    assert script.stabilises(problem, far) and not script.stabilises(problem, 2 * far - K)


def test_random_systems_bear_the_step_that_is_asked_of_them():
    """The first system of this seed can be stabilised, but not through Euler steps of 0.2."""
    first, other = (
        script.random_system(DEFAULT, 2, np.random.default_rng([0, 3, 12]), step)[0] for step in (None, 0.2)
    )
    with pytest.raises(RunError):
        riccati(script.euler_limit(first, 0.2))
    riccati(script.euler_limit(other, 0.2))


# ---- the grid


def chain(rates, neighbours, costs, discount=0.5, temperature=0.2, cell=0.1):
    return script.Chain(np.array(rates), np.array(neighbours), np.array(costs), cell, discount, temperature)


def test_grid_of_one_state_is_a_softmax():
    """Nothing moves: V = -temperature log(integral of exp(-cost / temperature)) / discount."""
    costs = np.array([[0.1, 0.5, 0.9]])
    still = chain(np.zeros((1, 3, 2)), [[0, 0]], costs)
    values = script.grid_iteration(still)
    assert values[-1].item() == pytest.approx(-0.2 * math.log(0.1 * np.exp(-costs / 0.2).sum()) / 0.5)
    uniform = costs.mean() + 0.2 * math.log(1 / 3 / 0.1)
    assert values[0].item() == pytest.approx(uniform / 0.5)


def test_grid_of_two_states_by_hand():
    """One torque; 0 jumps to 1 with rate 2 and costs 1, 1 stays and costs nothing: V0 = 1 / (discount + 2)."""
    two = chain([[[2.0, 0.0]], [[0.0, 0.0]]], [[1, 0], [1, 1]], [[1.0], [0.0]], cell=1.0)
    assert script.grid_value(two, np.ones((2, 1))) == pytest.approx([1 / 2.5, 0])
    torques = chain([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0]] * 2], [[1, 0], [1, 1]], [[0.0, 0.3], [0.0, 0.0]])
    first, _ = script.grid_policy(torques, np.array([1.0, 0.9]))
    odds = math.exp((0.3 - 2 * (0.9 - 1)) / 0.2)
    assert first == pytest.approx([odds / (1 + odds), 1 / (1 + odds)])


@pytest.mark.parametrize("inertia", [False, True])
def test_jumps_have_the_drift_and_the_noise_of_the_pendulum(inertia):
    """Mean and variance of the jumps per time: the drift, and noise^2 plus the scheme's own, |drift| times a cell."""
    size, gravity = 24, 1.5
    pendulum = script.pendulum(size, gravity, Args(), inertia)
    torque = -2 + 4 / 15 * (np.arange(15) + 0.5)
    speeds = np.linspace(-4, 4, size + 1) if inertia else [0.0]
    for (i, angle), (j, speed) in product(enumerate(2 * np.pi * np.arange(size) / size), enumerate(speeds)):
        state = i * len(speeds) + j
        push = gravity * np.sin(angle) + torque - speed / 2
        up, down, *other = pendulum.rates[state].T
        width, drift = 2 * np.pi / size, speed + 0 * torque if inertia else push
        np.testing.assert_allclose((up - down) * width, drift, atol=1e-12)
        np.testing.assert_allclose((up + down) * width**2, np.abs(drift) * width + (0 if inertia else 0.25))
        if inertia:
            width = 8 / size
            np.testing.assert_allclose((other[0] - other[1]) * width, push, atol=1e-12)
            np.testing.assert_allclose((other[0] + other[1]) * width**2, np.abs(push) * width + 0.25)
        expected = [(i + 1) % size * len(speeds) + j, (i - 1) % size * len(speeds) + j]
        if inertia:
            expected += [state + (j < size), state - (j > 0)]
        assert pendulum.neighbours[state].tolist() == expected
        np.testing.assert_allclose(pendulum.costs[state], 1 - np.cos(angle) + 0.1 * (speed**2 + torque**2))


def test_grid_tends_to_the_hjb_equation_of_a_boundary_value_solver():
    """discount V = 1 - cos(a) + V' sin(a) + V'' / 8 - temperature log(sum_u cell exp(-(u^2 / 10 + u V') / temperature))

    Solved in an independent way on half the circle, where V' is 0 at both ends.
    """
    args = Args()
    torque = np.linspace(-2, 2, 31)[1::2]

    def rate(angle, y):
        value, slope = y
        energy = -(0.1 * torque**2 + slope[:, None] * torque) / args.temperature
        soft = -args.temperature * np.log((4 / 15 * np.exp(energy)).sum(1))
        return np.stack([slope, 8 * (args.discount * value - 1 + np.cos(angle) - slope * np.sin(angle) - soft)])

    angles = np.linspace(0, np.pi, 101)  # the value is even around both ends
    guess = np.stack([2 - 2 * np.cos(angles), 2 * np.sin(angles)])
    exact = solve_bvp(
        rate, lambda left, right: np.array([left[1], right[1]]), angles, guess, tol=1e-8, max_nodes=20_000
    )
    assert exact.success
    errors = []
    for size in (100, 200, 400):
        found = script.grid_iteration(script.pendulum(size, 1.0, args, inertia=False))[-1]
        errors.append(np.abs(found[: size // 2 + 1] - exact.sol(np.linspace(0, np.pi, size // 2 + 1))[0]).max())
    assert errors[2] < 0.03 * np.abs(exact.y[0]).max()
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15) and errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def cost_in_the_sde(chain, policy, size, angle, speed, noise, step):
    """Discounted cost [M] of a grid's policy, read between its points, in the SDE itself, by Euler-Maruyama."""
    torque = np.linspace(-2, 2, 31)[1::2]
    own = 0.1 * torque**2 + chain.temperature * np.log(policy / chain.cell)
    tables = [
        np.vstack([table, table[:1]])
        for table in np.stack([policy @ torque, (policy * own).sum(1)]).reshape(2, size, -1)
    ]
    inertia, total = tables[0].shape[1] > 1, 0.0
    for k, dW in enumerate(noise):
        at = np.stack([angle % (2 * np.pi) / 2 / np.pi * size, (speed + 4) / 8 * size * inertia])
        u, paid = (map_coordinates(table, at, order=1) for table in tables)
        weight = math.exp(-chain.discount * step * (k + 0.5)) * step
        total = total + weight * (paid + 1 - np.cos(angle) + 0.1 * speed**2)
        push = np.sin(angle) - speed / 2 + u
        angle, speed = (
            (angle + speed * step, speed + push * step + dW / 2) if inertia else (angle + push * step + dW / 2, speed)
        )
        speed = np.where(np.abs(speed) > 4, np.sign(speed) * 8 - speed, speed)
    return total


@pytest.mark.parametrize("inertia, repeats", [(False, 80), (True, 2)])
def test_policies_cost_in_the_sde_what_the_grids_tend_to(inertia, repeats):
    """The mean over the states of the coarsest grid is Richardson's limit, and is not what the finest grid says."""
    args, sizes = Args(), (40, 80, 160)
    chain = script.pendulum(160, 1.0, args, inertia)
    fields = [script.grid_iteration(script.pendulum(size, 1.0, args, inertia))[-1] for size in sizes]
    means = [field.reshape(size, -1)[:: size // 40, :: size // 40].mean() for size, field in zip(sizes, fields)]
    limit = 2 * means[2] - means[1]
    assert math.log2((means[0] - means[1]) / (means[1] - means[2])) == pytest.approx(1, abs=0.15)
    angle, speed = np.meshgrid(np.arange(40) * np.pi / 20, np.linspace(-4, 4, 41) if inertia else 0.0, indexing="ij")
    starts = [np.tile(z.ravel(), repeats) for z in (angle, speed)]
    noise = np.random.default_rng(0).normal(size=(2000, len(starts[0]))) * 0.02**0.5
    halves = noise[::2] + noise[1::2]
    policy = script.grid_policy(chain, fields[2])
    fine, coarse = (
        cost_in_the_sde(chain, policy, 160, *starts, dW, step) for dW, step in ((noise, 0.02), (halves, 0.04))
    )
    on_grid = np.tile(fields[2].reshape(160, -1)[::4, ::4].ravel(), repeats)
    gaps = 2 * fine - coarse - on_grid  # the step's error is linear
    error = gaps.std() / len(gaps) ** 0.5
    print(means, limit, "Monte Carlo", means[2] + gaps.mean(), "+-", 1.96 * error)
    assert abs(gaps.mean() - (limit - means[2])) < 3 * error < abs(gaps.mean())


def test_grid_values_fall_and_start_where_told():
    pendulum = script.pendulum(16, 1.0, Args())
    values = script.grid_iteration(pendulum)
    assert np.all(np.diff(values, axis=0) < 1e-9) and len(values) < 15
    again = script.grid_iteration(pendulum, script.grid_policy(pendulum, values[-1]))
    np.testing.assert_allclose(again[0], values[-1], rtol=1e-9)


# ---- diffusion models


def test_reverse_riccati_is_the_score_of_gaussian_data():
    cov, times = np.array([[2.0, 0.3], [0.3, 0.1]]), np.array([0.1, 1.0, 3.0])
    P, _ = script.riccati_flow(script.reverse_problem(2), inv(cov), times)
    for t, found in zip(times, P):
        np.testing.assert_allclose(found, inv(math.exp(-t) * cov + (1 - math.exp(-t)) * np.eye(2)), rtol=1e-7)
        np.testing.assert_allclose(best_policy(script.reverse_problem(2), found)[0], found)


def test_generated_covariance_is_that_of_the_samples_and_of_its_equation():
    """d cov / d tau = F cov + cov F' + I with F = I / 2 - inv(v), here by small steps, from cov = I."""
    data = np.diag([0.25, 4.0]) + 0.2
    found, h = np.eye(2), 1e-4
    for t in 1.0 - h * (np.arange(10_000) + 0.5):
        F = np.eye(2) / 2 - inv(script.diffused(data, t))
        found = found + h * (F @ found + found @ F.T + np.eye(2))
    np.testing.assert_allclose(script.generated_covariance(data, 1.0), found, rtol=1e-3)
    score = lambda x, t: -x @ inv(script.diffused(data, t))  # noqa: E731
    samples = script.generate(score, (20_000, 2), np.random.default_rng(0))
    np.testing.assert_allclose(np.cov(samples.T), script.generated_covariance(data, script.HORIZON), atol=0.15)


def test_mixture_score_is_the_slope_of_its_log_density():
    x, t, centre, chance = np.linspace(-3, 3, 25), 0.7, 1.2, 0.3
    mean, variance = math.exp(-t / 2) * centre, 1 + math.exp(-t) * (script.STD**2 - 1)

    def log_density(x):
        modes = [np.exp(-((x - sign * mean) ** 2) / 2 / variance) for sign in (1, -1)]
        return np.log(chance * modes[0] + (1 - chance) * modes[1])

    expected = (log_density(x + 1e-5) - log_density(x - 1e-5)) / 2e-5
    np.testing.assert_allclose(script.mixture_score(x, t, centre, chance), expected, atol=1e-7)


def test_mixture_is_generated_as_it_is():
    score = lambda x, t: script.mixture_score(x, t, 1.0, 0.3)  # noqa: E731
    samples = script.generate(score, (20_000,), np.random.default_rng(0))
    data = script.mixture_quantiles(20_000, 1.0, 0.3)
    assert np.mean(data) == pytest.approx(-0.4, abs=1e-3) and np.mean(data**2) == pytest.approx(1.09, abs=2e-3)
    assert np.mean(data > 0) == pytest.approx(0.3, abs=1e-3) and np.mean(samples > 0) == pytest.approx(0.3, abs=0.02)
    assert np.sqrt(np.mean((np.sort(samples) - data) ** 2)) < 0.15
    between = [np.mean(np.abs(x) < 0.3) for x in (samples, data)]
    assert between[0] == pytest.approx(between[1], abs=0.004)


def test_distances_by_hand():
    assert script.gaussian_distance(np.diag([1.0, 4.0]), np.diag([9.0, 16.0])) == pytest.approx(math.sqrt(4 + 4))
    one, other = (F @ F.T for F in np.random.default_rng(0).normal(size=(2, 3, 3)))
    middle = sqrtm(sqrtm(one) @ other @ sqrtm(one)).real
    assert script.gaussian_distance(one, other) ** 2 == pytest.approx(np.trace(one + other - 2 * middle))


# ---- a run


def test_a_power_law_has_its_slope():
    xs = np.array([0.01, 0.1, 1.0, 10.0])
    factors = np.random.default_rng(0).lognormal(size=(50, 1))
    rows = script.curve("law", xs, np.where(xs < 5, factors * xs**1.5, np.nan), below=2)
    assert [row["x"] for row in rows] == [*xs, "slope"] and [row["count"] for row in rows] == [50, 50, 50, 0, 50]
    assert [rows[-1][name] for name in ("value", "low", "high")] == pytest.approx([1.5] * 3)
    low, median, high = np.quantile(factors[:, 0], [0.1, 0.5, 0.9]) * 0.1**1.5
    assert [rows[1][name] for name in ("low", "value", "high")] == pytest.approx([low, median, high])


def test_a_slope_of_one_row_has_no_interval_and_of_none_no_value():
    xs, rows = np.array([1.0, 2.0]), np.array([[1.0, 4.0], [1.0, np.nan], [0.0, 1.0]])
    one, none = (script.curve("law", xs, values, 9)[-1] for values in (rows, rows[1:]))
    assert one["value"] == pytest.approx(2) and math.isnan(one["low"]) and one["count"] == 1
    assert math.isnan(none["value"]) and none["count"] == 0


def test_a_run_writes_its_files_and_repeats(capsys):
    assert script.train is script.run
    result = script.run(TINY)
    script.print_table(result["rows"])
    printed = capsys.readouterr().out
    folder = Path(result["run_dir"])
    assert folder.name.startswith("policy_transfer__")
    assert {path.name for path in folder.iterdir()} == {"args.json", "policy_transfer.csv", "policy_transfer.png"}
    table = list(csv.DictReader(open(folder / "policy_transfer.csv")))
    assert list(table[0]) == ["quantity", "x", "value", "low", "high", "count"] and len(table) == len(result["rows"])
    for row in table:
        assert row["quantity"].endswith("_step: error") or row["quantity"] in printed
    found = {(row["quantity"], row["x"]): row["value"] for row in result["rows"]}
    for quantity, slope in (
        ("model-free: endless trajectories", 1),
        ("transfer: gap of the gains", 1),
        ("transfer: relative excess cost of the source", 2),
        ("pendulum 1D: cost of the source policy", 2),
        ("pendulum 2D: cost of the source policy", 2),
        ("W2: Gaussian, generated", 1),
        ("W2: mixture, centre moved, data", 1),
    ):
        assert found[quantity, "slope"] == pytest.approx(slope, rel=0.1), quantity
    for method in ("IPO", "natural gradient", "pendulum 1D", "pendulum 2D"):
        other = "uniform" if "pendulum" in method else "random start"
        assert found[f"{method}: steps from source", 0.001] < found[f"{method}: steps from {other}", 0.001]
        value = {x: found[f"{method}: mean value", x] for x in (8, 16, math.inf)} if "pendulum" in method else None
        assert value is None or value[math.inf] == pytest.approx(2 * value[16] - value[8])
    assert found["Riccati residual", 2] < 1e-13
    assert found["reverse SDE: |P cov - I| of its Riccati equation", script.HORIZON] < 1e-9
    quantities = {row["quantity"] for row in script.measure_transfer(TINY)}
    expected = [row for row in result["rows"] if row["quantity"] in quantities]
    assert str(script.measure_transfer(TINY)) == str(expected) != str(script.measure_transfer(replace(TINY, seed=2)))


# ---- bad input


def test_shapes_and_signs_are_checked():
    problem, _ = system(n=3)
    for name, value, words in (
        ("A", np.zeros((3, 2)), r"A: shape \(3, 2\) does not fit.*\(3, 3\)"),
        ("B", np.zeros((2, 2)), r"B: shape \(2, 2\) does not fit.*\(3, 2\)"),
        ("D", np.zeros((1, 3, 2)), r"D: shape \(1, 3, 2\) does not fit.*\(2, 3, 2\)"),
        ("R", np.eye(3), r"R: shape \(3, 3\) does not fit.*\(2, 2\)"),
        ("R", np.diag([1.0, -2.0]), r"R: it must be symmetric and positive definite; its least eigenvalue is -2"),
        ("Q", np.diag([1.0, 1.0, -3.0]), r"Q: it must be symmetric and nonnegative definite.*-3"),
        ("Q", np.array([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]]), r"Q: it must be symmetric"),
        ("A", np.diag([1.0, math.nan, 1.0]), "A: it must be finite"),
        ("temperature", 0.0, "temperature, discount: they must be finite, above 0 and from 0 on"),
        ("temperature", math.inf, "temperature, discount: they must be finite"),
        ("discount", -0.1, "temperature, discount: they must be finite"),
    ):
        with pytest.raises(RunError, match=words):
            riccati(problem._replace(**{name: value}))


@pytest.mark.parametrize(
    "changes", [{"b": 0.0, "a": 2.0, "d": 0.0}, {"b": 0.0, "c": 9.0, "d": 0.0}, {"d": 9.0, "b": 0.1, "a": 2.0}]
)
def test_systems_that_nothing_stabilises(changes):
    with pytest.raises(RunError, match="A, B, C, D: not stabilisable"):
        riccati(scalar(**changes))


def test_an_unstable_mode_that_no_control_moves():
    none = np.zeros((0, 2, 2)), np.zeros((0, 2, 1))
    problem = LQR(np.diag([1.0, -1.0]), np.array([[0.0], [1.0]]), *none, np.eye(2), np.eye(2), np.eye(1), 0.2, 0.1)
    with pytest.raises(RunError, match="not stabilisable"):
        riccati(problem)
    assert riccati(problem._replace(B=np.array([[1.0], [0.0]])))[1, 1] == pytest.approx(1 / 2.2)


def test_a_start_that_does_not_stabilise_names_the_eigenvalue():
    problem = scalar(b=1.0, c=0.0, d=0.0, q=1.0)
    for call in (lambda K: evaluate(problem, K), lambda K: cost(problem, K, np.eye(1))):
        with pytest.raises(RunError, match="K: does not stabilise: the eigenvalue 2 "):
            call(np.array([[-1.0]]))
        with pytest.raises(RunError, match="K: does not stabilise: the eigenvalue 0 "):
            call(np.array([[0.0]]))
        for gain in (np.zeros((1, 2)), np.array([[math.nan]])):
            with pytest.raises(RunError, match=r"K: it must be finite and of shape \(1, 1\)"):
                call(gain)


def test_gradient_steps_stay_where_costs_are_finite():
    """The step of a start near the edge of what stabilises would leave it, and is halved."""
    problem, P = system(seed=39, n=4)
    K = script.random_start(problem, best_policy(problem, P)[0], np.random.default_rng(39))
    P = evaluate(problem, K)
    gradient, M = script.cost_gradient(problem, K, best_policy(problem, P)[1], P)
    whole = gradient / (4 * norm(script.hamiltonian(problem, P)[0], 2) * norm(M, 2))
    assert not script.stabilises(problem, K - whole)
    halved = K - script.gradient_step(problem, K, P)
    assert script.stabilises(problem, K - halved)
    assert math.log2(norm(whole) / norm(halved)) == pytest.approx(round(math.log2(norm(whole) / norm(halved))))


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_pairs", 1), ("num_repeats", 2.0), ("seed", -1), ("noise", -0.1), ("noise", math.nan),
        ("discount", 0.0), ("temperature", True), ("grid_size", 3), ("grid_size", 65), ("seed", None),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_sentence(name, value):
    with pytest.raises(SystemExit) as error:
        script.main(replace(TINY, **{name: value}))
    message = str(error.value)
    assert message.startswith(f"policy_transfer.py: error: --{name.replace('_', '-')}: {value!r} is not valid; it must")
    assert "\n" not in message and not Path("runs").exists()


def test_noise_that_no_system_bears():
    with pytest.raises(SystemExit, match="--noise: 50 is not valid; it must be smaller"):
        script.main(replace(TINY, noise=50))
