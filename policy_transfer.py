"""Policy transfer in continuous time: what a task gains from the policy of its neighbour.

After Guo and Lyu, "Policy Transfer for Continuous-Time Reinforcement Learning: A (Rough) Differential Equation
Approach", arXiv 2510.15165 (2025). Only its abstract could be read: this is a reconstruction, and its exact assumptions
are unknown. It has no experiments, so what this script measures is new evidence and reproduces nothing.

    python policy_transfer.py

    dX = (A X + B u) dt + sum_j (C_j X + D_j u) dW_j + S dW_0,    X_0 ~ N(0, I),    u ~ pi(. | X)
    J(pi) = E int_0^inf exp(-discount t) [X'QX + u'Ru + temperature log pi(u | X)] dt

1. Solve: V(x) = x'Px + c with P from the Riccati equation; the optimal policy is N(-Kx, temperature / 2 inv(R~)),
   where R~ = R + sum_j D_j'P D_j.
2. Learn with the model: evaluate by a Lyapunov equation, improve by the Hamiltonian's minimiser (IPO).
3. Learn without it: the same two steps by least-squares temporal differences on trajectories.
4. Transfer: start IPO at the policy that is optimal for another system, at relative distance eps.
5. Transfer, non-linear: policy iteration for the exploratory HJB equation of a pendulum on a grid.
6. Diffusion models: the reverse SDE is optimally controlled, and what it generates is stable in its data.

To fork it for a linear system of your own, fill an LQR and call riccati and policy_iteration on it. For a non-linear
one rewrite pendulum: grid_value and grid_policy see only its Chain.
"""

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy import ndarray as Array
from numpy.linalg import LinAlgError, cholesky, inv, norm, solve
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_are
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import spsolve
from scipy.special import ndtr, softmax
from scipy.stats import binomtest

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """Measure IPO and policy transfer on random linear systems, a pendulum and diffusion models."""

    dimensions: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Sizes of the state on which IPO's rates are measured; controls are half as many."""
    noise: float = 0.2
    """Size of C and D beside A and B: the noise that grows with state and control."""
    discount: float = 0.2
    """Discount rate, in 1 / time."""
    temperature: float = 0.1
    """Weight of the entropy."""
    num_pairs: int = 100
    """Random pairs of a source and a target."""
    num_repeats: int = 20
    """Random systems for each other experiment, each with its own start, trajectories or samples."""
    grid_size: int = 160
    """Points of the finest grid in each direction."""
    seed: int = 1
    """Seed of all experiments."""


EPS = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])  # relative distances of source and target
SIZE = 4  # of the state, where one size is shown
HORIZON = 4.0  # time of the forward SDE
STD = 0.3  # standard deviation of each of the mixture's modes


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


# ---------------------------------------------------------------------------------- 1. the problem and its solution


class LQR(NamedTuple):
    """A linear-quadratic problem: n states, m controls, J noises that grow with them, k that do not."""

    A: Array  # [n, n], 1 / time
    B: Array  # [n, m]
    C: Array  # [J, n, n]
    D: Array  # [J, n, m]
    S: Array  # [n, k]
    Q: Array  # [n, n]
    R: Array  # [m, m]
    discount: float
    temperature: float


def check_problem(problem: LQR) -> None:
    """Raise RunError, naming the array, where sizes do not fit or Q or R is indefinite."""
    n, m, J, k = len(problem.A), problem.B.shape[-1], len(problem.C), problem.S.shape[-1]
    shapes = {"A": (n, n), "B": (n, m), "C": (J, n, n), "D": (J, n, m), "S": (n, k), "Q": (n, n), "R": (m, m)}
    for name, shape in shapes.items():
        if getattr(problem, name).shape != shape:
            raise RunError(f"{name}: shape {getattr(problem, name).shape} does not fit A, B and C; it must be {shape}")
    for name, kind, low in (("Q", "nonnegative", -1e-12), ("R", "positive", 1e-12)):
        matrix = getattr(problem, name)
        least = np.linalg.eigvalsh(matrix + matrix.T)[0] / 2
        if not np.allclose(matrix, matrix.T) or not least >= low:
            raise RunError(f"{name}: it must be symmetric and {kind} definite; its least eigenvalue is {least:.3g}")


def hamiltonian(problem: LQR, P: Array) -> tuple[Array, Array]:
    """R~ [m, m] and G [m, n] of the Hamiltonian u'R~u + 2 u'Gx + (terms in x), at the value x'Px + c."""
    B, C, D = problem.B, problem.C, problem.D
    return problem.R + (D.mT @ P @ D).sum(0), B.T @ P + (D.mT @ P @ C).sum(0)


def best_policy(problem: LQR, P: Array) -> tuple[Array, Array]:
    """K [m, n] and covariance [m, m] of the policy N(-Kx, .) that minimises the entropy-regularised Hamiltonian."""
    R, G = hamiltonian(problem, P)
    return solve(R, G), problem.temperature / 2 * inv(R)


def discounted_drift(problem: LQR) -> Array:
    """A - discount / 2 [n, n]: to discount a quadratic cost is to let the state decay faster."""
    return problem.A - problem.discount / 2 * np.eye(len(problem.A))


def riccati_rates(problem: LQR, P: Array) -> tuple[Array, float]:
    """-dP/dt [n, n] of the optimal value x'Px + c, which is 0 without horizon, and discount c - dc/dt."""
    F, (R, G) = discounted_drift(problem), hamiltonian(problem, P)
    noise = (problem.C.mT @ P @ problem.C).sum(0)
    free_energy = problem.temperature / 2 * (len(R) * math.log(math.pi * problem.temperature) - np.linalg.slogdet(R)[1])
    return problem.Q + F.T @ P + P @ F + noise - G.T @ solve(R, G), np.trace(problem.S.T @ P @ problem.S) - free_energy


def riccati_flow(problem: LQR, terminal: Array, times: Array) -> tuple[Array, Array]:
    """P [T, n, n] and c [T] with a horizon, at these times to go, ascending; the value at 0 is x' terminal x."""

    def rate(_: float, y: Array) -> Array:
        P = y[:-1].reshape(terminal.shape)
        P_rate, c_rate = riccati_rates(problem, (P + P.T) / 2)  # rounding that is not symmetric would grow
        return np.append(P_rate, c_rate - problem.discount * y[-1])

    solved = solve_ivp(rate, (0, times[-1]), np.append(terminal, 0.0), "DOP853", times, rtol=1e-10, atol=1e-12).y.T
    return solved[:, :-1].reshape(-1, *terminal.shape), solved[:, -1]


def riccati(problem: LQR) -> Array:
    """P [n, n] of the optimal value without horizon; raises RunError where no control stabilises the system.

    The noise terms, held fixed, are costs of an ordinary Riccati equation: solve_continuous_are finds a stabilising
    gain in a few rounds, from which Newton's method converges to rounding.
    """
    check_problem(problem)
    F, n = discounted_drift(problem), len(problem.A)
    CD, P = np.concatenate([problem.C, problem.D], 2), np.zeros_like(F)
    try:
        for _ in range(30):
            noise = (CD.mT @ P @ CD).sum(0)
            noise = (noise + noise.T) / 2
            of_Q, of_R, mixed = noise[:n, :n], noise[n:, n:], noise[:n, n:]
            P = solve_continuous_are(F, problem.B, problem.Q + of_Q, problem.R + of_R, s=mixed)
            if stabilises(problem, best_policy(problem, P)[0]) or norm(P) > 1e10:
                break
        for _ in range(50):
            last, P = P, evaluate(problem, best_policy(problem, P)[0])
            if norm(P - last) <= 1e-8 * norm(P):  # the error is then of the order of its square
                break
    except (LinAlgError, RunError):  # no gain was found, or the costs grow without bound
        raise RunError("A, B, C, D: not stabilisable: no u = -Kx makes the discounted second moment decay") from None
    return P


# -------------------------------------------------------------------------------------- 2. learning with the model


def lyapunov_operator(problem: LQR, K: Array) -> Array:
    """The map P -> F'P + PF + sum_j E_j'PE_j as a matrix [n^2, n^2], for F and E_j of the loop that K closes."""
    F, eye = discounted_drift(problem) - problem.B @ K, np.eye(len(problem.A))
    E = (problem.C - problem.D @ K).mT
    left, right = np.stack([F.T, eye, *E]), np.stack([eye, F.T, *E])
    return np.einsum("jab,jcd->acbd", left, right).reshape(eye.size, eye.size)


def lyapunov(operator: Array, *sources: Array) -> Array:
    """Solutions [..., n, n] of operator P + source = 0, for symmetric sources [n, n]."""
    solved = -solve(operator, np.stack([source.ravel() for source in sources], 1))
    solved = solved.T.reshape(-1, *sources[0].shape)
    return (solved + solved.mT) / 2


def stabilises(problem: LQR, K: Array) -> bool:
    """Whether the discounted second moment decays under u = -Kx: positive sources then have positive solutions."""
    return np.linalg.eigvalsh(lyapunov(lyapunov_operator(problem, K), np.eye(len(problem.A)))[0])[0] > 0


def evaluate(problem: LQR, K: Array) -> Array:
    """P [n, n] of the value x'Px + c of a Gaussian policy with mean -Kx; raises RunError where its cost is infinite."""
    operator = lyapunov_operator(problem, K)
    P, probe = lyapunov(operator, problem.Q + K.T @ problem.R @ K, np.eye(len(problem.A)))
    if not np.linalg.eigvalsh(probe)[0] > 0:
        value = np.linalg.eigvals(operator).real.max()
        raise RunError(f"K: does not stabilise: the eigenvalue {value:.3g} of the second moment must be below 0")
    return P


def cost(problem: LQR, K: Array, spread: Array) -> float:
    """J of the policy N(-Kx, spread [m, m]); raises RunError where it is infinite."""
    P = evaluate(problem, K)
    entropy = (len(K) * math.log(2 * math.pi * math.e) + np.linalg.slogdet(spread)[1]) / 2
    noise = np.trace(problem.S.T @ P @ problem.S) + np.trace(hamiltonian(problem, P)[0] @ spread)
    return np.trace(P) + (noise - problem.temperature * entropy) / problem.discount


def cost_gradient(problem: LQR, K: Array, spread: Array, P: Array) -> tuple[Array, Array]:
    """dJ/dK [m, n] = 2 (R~K - G) M for the policy N(-Kx, spread), and M [n, n], the discounted second moment."""
    (R, G), D = hamiltonian(problem, P), problem.D
    noise = problem.S @ problem.S.T + (D @ spread @ D.mT).sum(0)
    (M,) = lyapunov(lyapunov_operator(problem, K).T, np.eye(len(noise)) + noise / problem.discount)
    return 2 * (R @ K - G) @ M, M


def ipo_step(problem: LQR, K: Array, P: Array) -> Array:
    """Iterative policy optimisation: the Hamiltonian's minimiser, which is Newton's step for the Riccati equation."""
    return best_policy(problem, P)[0]


def natural_gradient_step(problem: LQR, K: Array, P: Array) -> Array:
    """K - 2 rate (R~K - G), at rate 1 / (2 |R~|), where the cost is sure to fall; with one control this is IPO."""
    R, G = hamiltonian(problem, P)
    return K - (R @ K - G) / norm(R, 2)


def gradient_step(problem: LQR, K: Array, P: Array) -> Array:
    """K - rate dJ/dK, at rate 1 / (4 |R~| |M|), which is halved while the next gain would not stabilise."""
    gradient, M = cost_gradient(problem, K, best_policy(problem, P)[1], P)
    step = gradient / (4 * norm(hamiltonian(problem, P)[0], 2) * norm(M, 2))
    while not stabilises(problem, K - step):
        step = step / 2
    return K - step


def policy_iteration(problem: LQR, K: Array, P_best: Array, step: Callable, tolerance: float, most: int) -> Array:
    """Errors |P_k - P_best| / |P_best| of the policies from K on, until the tolerance or `most` policies."""
    P = evaluate(problem, K)
    errors = [norm(P - P_best) / norm(P_best)]
    while len(errors) < most and errors[-1] > tolerance:
        K = step(problem, K, P)
        P = evaluate(problem, K)
        errors.append(norm(P - P_best) / norm(P_best))
    return np.array(errors)


def convergence(errors: Array, floor: float = 1e-13) -> tuple[float, float]:
    """The order of convergence, from the last three errors above the floor, and the largest ratio of two in a row."""
    falls = np.diff(np.log(errors[errors > floor]))
    return (falls[-1] / falls[-2] if len(falls) > 1 else math.nan), math.exp(falls.max(initial=-math.inf))


# -------------------------------------------------------------------------------------- 3. learning without the model


def simulate(
    problem: LQR, K: Array, spread: Array, x: Array, step: float, num_steps: int, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """States [M, T + 1, n], controls [M, T, m], costs per time [M, T] without entropy, from x [M, n] (Euler-Maruyama).

    A control is drawn from N(-Kx, spread [m, m]) and held for a step.
    """
    states, controls, root = [x], [], cholesky(spread)
    for _ in range(num_steps):
        u = -x @ K.T + rng.normal(size=(len(x), len(K))) @ root.T
        growing = x @ problem.C.mT + u @ problem.D.mT  # [J, M, n]
        noise = (growing * rng.normal(size=(*growing.shape[:2], 1))).sum(0)
        noise += rng.normal(size=(len(x), problem.S.shape[1])) @ problem.S.T
        x = x + (x @ problem.A.T + u @ problem.B.T) * step + noise * math.sqrt(step)
        states.append(x)
        controls.append(u)
    x, u = np.stack(states, 1), np.stack(controls, 1)
    return x, u, np.einsum("...i,ij,...j", x[:, :-1], problem.Q, x[:, :-1]) + np.einsum("...i,ij,...j", u, problem.R, u)


def squares(x: Array) -> Array:
    """Products [..., n (n + 1) / 2] whose inner product with P's upper triangle is x'Px."""
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j] * np.where(i == j, 1, 2)


def symmetric(upper: Array) -> Array:
    """The symmetric matrix [n, n] with this upper triangle [n (n + 1) / 2]."""
    n = math.isqrt(2 * len(upper))
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n)] = upper
    return matrix + np.triu(matrix, 1).T


def trajectory_moments(states: Array, controls: Array, costs: Array) -> Array:
    """All that temporal_differences needs of the trajectories of simulate, whatever policy drew their controls.

    Means of the instruments, squares of (x, u) and 1, times: squares of x, squares of x_next, the instruments, costs.
    """
    x, x_next, u = (z.reshape(-1, z.shape[-1]) for z in (states[:, :-1], states[:, 1:], controls))
    instruments = np.hstack([squares(np.hstack([x, u])), np.ones((len(x), 1))])
    return instruments.T @ np.hstack([squares(x), squares(x_next), instruments, costs.reshape(-1, 1)]) / len(x)


def temporal_differences(moments: Array, K: Array, discount: float, step: float) -> tuple[Array, Array]:
    """P [n, n] of the policy with mean -Kx, and the gain [m, n] that improves it, from trajectories alone.

    With V(x) = x'Px + c, and q(x, u) = u'R~u + 2u'Gx + x'Yx, the Hamiltonian at u less that at -Kx, any control obeys

        V(x) - exp(-discount step) V(x_next) + step q(x, u) = step cost(x, u)    and    q(x, -Kx) = 0

    up to the step's error and a martingale, which averages out against instruments that are known before the step.
    The policy's spread changes c alone, by its exact average tr(R~ spread) - temperature entropy: it is not needed.
    """
    n = K.shape[1]
    i, j = np.triu_indices(n)
    now, later, at_xu, cost = np.split(moments, [len(i), 2 * len(i), -1], axis=1)
    points = np.eye(n)[i] + np.eye(n)[j]  # a quadratic form that is 0 at all of them is 0
    along = np.hstack([np.zeros((len(i), len(i))), squares(np.hstack([points, -points @ K.T])), np.zeros((len(i), 1))])
    equations = np.vstack([np.hstack([now - math.exp(-discount * step) * later, step * at_xu]), along])
    solved = solve(equations, np.append(step * cost, np.zeros(len(i))))
    q = symmetric(solved[len(i) : -1])
    return symmetric(solved[: len(i)]), solve(q[n:, n:], q[n:, :n])


def model_free_ipo(problem: LQR, K: Array, num_trajectories: int, step: float, rng: np.random.Generator) -> Array:
    """The gain [m, n] after five rounds on one set of trajectories of length 1; the problem only simulates them.

    All are drawn with the first gain and a spread of 3, which is wide, so that the controls' effects are seen.
    """
    x = rng.normal(size=(num_trajectories, K.shape[1]))
    data = simulate(problem, K, 9 * np.eye(len(K)), x, step, round(1 / step), rng)
    moments = trajectory_moments(*data)
    for _ in range(5):
        K = temporal_differences(moments, K, problem.discount, step)[1]
    return K


def euler_limit(problem: LQR, step: float) -> LQR:
    """The problem that Euler trajectories solve without error: step F'PF is one more noise, of size sqrt(step)."""
    growth = math.exp(problem.discount * step)
    C = np.concatenate([problem.C, math.sqrt(step) * problem.A[None]])
    D = np.concatenate([problem.D, math.sqrt(step) * problem.B[None]])
    costs = {"Q": growth * problem.Q, "R": growth * problem.R, "temperature": growth * problem.temperature}
    return problem._replace(C=C, D=D, discount=(growth - 1) / step, **costs)


# --------------------------------------------------------------------------------- 4. random systems and neighbours


def random_system(args: Args, n: int, rng: np.random.Generator, step: float | None = None) -> tuple[LQR, Array]:
    """A random system with n states, most with an unstable mode, and its P [n, n]; with stabilising controls.

    They stabilise its Euler trajectories too, if there is a step. Raises RunError after 100 systems without them.
    """
    m = (n + 1) // 2
    for _ in range(100):
        A, B = rng.normal(size=(n, n)) / n**0.5, rng.normal(size=(n, m)) / m**0.5
        C, D = args.noise * rng.normal(size=(2, n, n)) / n**0.5, args.noise * rng.normal(size=(2, n, m)) / m**0.5
        problem = LQR(A, B, C, D, np.eye(n), np.eye(n), np.eye(m), args.discount, args.temperature)
        try:
            if step:
                riccati(euler_limit(problem, step))
            return problem, riccati(problem)
        except RunError:
            continue
    raise RunError(f"--noise: {args.noise} is not valid; it must be smaller, since no control stabilised 100 systems")


def random_start(problem: LQR, K: Array, rng: np.random.Generator, distance: float = 10.0) -> Array:
    """The first stabilising gain [m, n] at distance, distance / 2, distance / 4, ... |K| from K in a direction."""
    direction = distance * norm(K) * unit(rng.normal(size=K.shape))
    while not stabilises(problem, K + direction):
        direction /= 2
    return K + direction


def unit(direction: Array) -> Array:
    """The direction scaled to norm 1."""
    return direction / norm(direction)


def neighbour(problem: LQR, eps: float, rng: np.random.Generator) -> LQR:
    """A system whose A, B, C, D, and the roots of Q and R, each lie at relative distance eps in a random direction."""
    roots = [*problem[:4], cholesky(problem.Q), cholesky(problem.R)]
    A, B, C, D, Q, R = (X + eps * norm(X) * unit(rng.normal(size=X.shape)) for X in roots)
    return problem._replace(A=A, B=B, C=C, D=D, Q=Q @ Q.T, R=R @ R.T)


# ------------------------------------------------------------------------- 5. the exploratory HJB equation on a grid


class Chain(NamedTuple):
    """A diffusion on a grid of S states and A torques, as the jump process of an upwind scheme in d directions."""

    rates: Array  # [S, A, 2 d], jumps / time
    neighbours: Array  # [S, 2 d], where they lead
    costs: Array  # [S, A], per time
    cell: float  # width of a torque's cell
    discount: float
    temperature: float


def pendulum(size: int, gravity: float, args: Args, inertia: bool = True) -> Chain:
    """A pendulum with noise, to be held upright, on size x (size + 1) states: angle, and velocity in [-4, 4].

        d angle = velocity dt    d velocity = (gravity sin(angle) - velocity / 2 + u) dt + dW / 2,    u in [-2, 2]

    Without inertia the angle is all there is (size states): d angle = (gravity sin(angle) + u) dt + dW / 2.
    """
    angles, speeds = 2 * math.pi * np.arange(size) / size, np.linspace(-4, 4, size + 1) if inertia else np.zeros(1)
    angle, speed = (z.reshape(-1, 1) for z in np.meshgrid(angles, speeds, indexing="ij"))  # [S, 1]
    torque = np.linspace(-2, 2, 31)[1::2]  # [A], midpoints of 15 cells
    push = gravity * np.sin(angle) - speed / 2 + torque  # [S, A]
    index = np.arange(len(angle)).reshape(size, -1)
    around = [np.roll(index, -1, 0), np.roll(index, 1, 0)]
    directions = [(speed + 0 * torque, 0.0, angles[1]) if inertia else (push, 0.5, angles[1])]
    if inertia:
        around += [np.hstack([index[:, 1:], index[:, -1:]]), np.hstack([index[:, :1], index[:, :-1]])]  # reflecting
        directions.append((push, 0.5, 8 / size))
    rates = [noise**2 / 2 / h**2 + np.maximum(sign * b, 0) / h for b, noise, h in directions for sign in (1, -1)]
    costs = 1 - np.cos(angle) + 0.1 * speed**2 + 0.1 * torque**2
    neighbours = np.stack([z.ravel() for z in around], 1)
    return Chain(np.stack(rates, -1), neighbours, costs, 4 / 15, args.discount, args.temperature)


def grid_value(chain: Chain, policy: Array) -> Array:
    """V [S] of a policy [S, A], the torques' chances: discount V = cost - temperature entropy + (generator V)."""
    costs = (policy * (chain.costs + chain.temperature * np.log(policy / chain.cell))).sum(1)
    rates = (policy[:, :, None] * chain.rates).sum(1)  # [S, 2 d]
    rows = np.repeat(np.arange(len(costs)), rates.shape[1])
    jumps = csr_array((rates.ravel(), (rows, chain.neighbours.ravel())), shape=(len(costs), len(costs)))
    return spsolve((diags_array(chain.discount + rates.sum(1)) - jumps).tocsc(), costs)


def grid_policy(chain: Chain, value: Array) -> Array:
    """The policy [S, A] that minimises the entropy-regularised Hamiltonian: softmax(-H / temperature)."""
    rises = value[chain.neighbours] - value[:, None]  # [S, 2 d]
    energy = chain.costs + (chain.rates * rises[:, None]).sum(-1)
    return np.maximum(softmax(-energy / chain.temperature, axis=1), 1e-300)  # so that its logarithm is finite


def grid_iteration(chain: Chain, policy: Array | None = None) -> Array:
    """Values [k, S] of the policies from this one (uniform if None) on, until they stay the same to 1e-11."""
    uniform = np.full_like(chain.costs, 1 / chain.costs.shape[1])
    values = [grid_value(chain, uniform if policy is None else policy)]
    while len(values) < 2 or np.abs(values[-1] - values[-2]).max() > 1e-11 * np.abs(values[-1]).max():
        values.append(grid_value(chain, grid_policy(chain, values[-1])))
    return np.array(values)


# ----------------------------------------------------------------------------------------------- 6. diffusion models


def reverse_problem(n: int) -> LQR:
    """The reverse of dX = -X/2 dt + dW as a control problem: from the terminal cost inv(cov) of Gaussian data, its
    optimal control -Px is the score of the diffused data, with dP/dt = P - P^2 in the diffusion's time t."""
    none, eye = np.zeros((0, n, n)), np.eye(n)
    return LQR(eye / 2, eye, none, none, eye, 0 * eye, eye, 0.0, 1.0)


def diffused(cov: Array, t: float) -> Array:
    """Covariance [n, n] of Gaussian data after time t of the forward SDE."""
    return math.exp(-t) * cov + (1 - math.exp(-t)) * np.eye(len(cov))


def generated_covariance(cov: Array, horizon: float) -> Array:
    """Covariance [n, n] of what the exact reverse SDE makes of N(0, I), for Gaussian data with covariance cov.

    From the right start, N(0, v) with v the diffused covariance, it would be cov; E[X_0 | X_T] is linear in X_T.
    """
    v = diffused(cov, horizon)
    transition = math.exp(-horizon / 2) * cov @ inv(v)
    return cov + transition @ (np.eye(len(cov)) - v) @ transition.T


def generate(score: Callable, size: tuple[int, ...], rng: np.random.Generator, num_steps: int = 100) -> Array:
    """Samples of this size from N(0, I) by the reverse SDE over HORIZON, by Euler-Maruyama; score(x, t) is the data's
    after time t."""
    x, h = rng.normal(size=size), HORIZON / num_steps
    for t in HORIZON - h * np.arange(num_steps):
        x = x + h * (x / 2 + score(x, t)) + math.sqrt(h) * rng.normal(size=size)
    return x


def mixture_score(x: Array, t: float, centre: float, chance: float) -> Array:
    """Score of modes N(centre, STD^2), with this chance, and N(-centre, STD^2), after time t of the forward SDE."""
    mean, variance = math.exp(-t / 2) * centre, math.exp(-t) * STD**2 + 1 - math.exp(-t)
    share = np.tanh(mean * x / variance + math.log(chance / (1 - chance)) / 2)  # of + less that of -
    return (mean * share - x) / variance


def mixture_quantiles(count: int, centre: float, chance: float) -> Array:
    """Quantiles [count] of the mixture's data at the middles of count equal shares."""
    x = np.linspace(-centre - 8 * STD, centre + 8 * STD, 100_001)
    below = chance * ndtr((x - centre) / STD) + (1 - chance) * ndtr((x + centre) / STD)
    return np.interp((np.arange(count) + 0.5) / count, below, x)


def gaussian_distance(cov: Array, other: Array) -> float:
    """W2 of two centred Gaussians (Bures): the last term is the trace of sqrt(sqrt(cov) other sqrt(cov))."""
    overlap = norm(cholesky(cov).T @ cholesky(other), "nuc")
    return math.sqrt(max(np.trace(cov + other) - 2 * overlap, 0))


def sample_distance(x: Array, y: Array) -> float:
    """W2 of two samples [M] of numbers: sorted, each moves to its partner."""
    return math.sqrt(np.mean((np.sort(x) - np.sort(y)) ** 2))


# ------------------------------------------------------------------------------------------------------ experiments


def curve(quantity: str, xs: Array, values: Array, slope: tuple[float, float] | None = None) -> list[dict]:
    """Lines of the CSV for values [S, X]: median and 10 % and 90 % quantiles of the finite ones, and their number.

    One line more has the slope in log scale over the xs within the bounds `slope`, of the geometric means over S of
    what is above 0 at all of them, with a 95 % bootstrap interval, which is NaN where that is one row or none.
    """
    rows = []
    for x, column in zip(xs, np.asarray(values, dtype=float).T):
        finite = column[np.isfinite(column)]
        low, median, high = np.quantile(finite, [0.1, 0.5, 0.9]) if len(finite) else [math.nan] * 3
        rows.append({"quantity": quantity, "x": x, "value": median, "low": low, "high": high, "count": len(finite)})
    if slope:
        inside = (xs >= slope[0]) & (xs <= slope[1])
        values = values[(values[:, inside] > 0).all(1)][:, inside]

        def fit(samples: Array, axis: int) -> Array:
            return np.polyfit(np.log(xs[inside]), np.log(samples).mean(axis).T, 1)[0]

        low, high = interval(values, fit) if len(values) > 1 else (math.nan, math.nan)
        found = {"value": fit(values, 0) if len(values) else math.nan, "low": low, "high": high, "count": len(values)}
        rows.append({"quantity": quantity, "x": "slope"} | found)
    return rows


def measure_learning(args: Args) -> list[dict]:
    """Parts 1 and 2: Riccati solutions; order and rate of IPO for every size, beside gradient methods for one."""
    rng = np.random.default_rng([args.seed, 2])
    times, steps = np.array([1.0, 2.0, 4.0, 8.0]), (ipo_step, natural_gradient_step, gradient_step)
    found = np.zeros((4, args.num_repeats, len(args.dimensions)))
    distances, curves = np.zeros((args.num_repeats, len(times))), np.zeros((3, args.num_repeats, 300))
    for repeat in range(args.num_repeats):
        for i, n in enumerate(args.dimensions):
            problem, P = random_system(args, n, rng)
            start = random_start(problem, best_policy(problem, P)[0], rng)
            errors = policy_iteration(problem, start, P, ipo_step, 1e-14, 15)
            residual = np.abs(riccati_rates(problem, P)[0]).max() / np.abs(P).max()
            found[:, repeat, i] = residual, *convergence(errors), np.sum(errors > 1e-10)
        problem, P = random_system(args, SIZE, rng)
        distances[repeat] = norm(riccati_flow(problem, 0 * P, times)[0] - P, axis=(1, 2)) / norm(P)
        start = random_start(problem, best_policy(problem, P)[0], rng)
        for j, step in enumerate(steps):
            errors = policy_iteration(problem, start, P, step, 1e-14, 300)
            curves[j, repeat] = np.pad(errors, (0, 300 - len(errors)), mode="edge")
    names = ("Riccati residual", "IPO: order of convergence", "IPO: largest error ratio", "IPO: steps to 1e-10")
    rows = [row for name, values in zip(names, found) for row in curve(name, args.dimensions, values)]
    rows += curve("Riccati: distance of a finite horizon", times, distances)
    for step, errors in zip(steps, curves):
        arrived = np.where(errors[:, -1] <= 1e-10, (errors > 1e-10).sum(1), np.nan)
        rows += curve(f"{step.__name__}: steps to 1e-10", [SIZE], arrived[:, None])
        rows += curve(f"{step.__name__}: error", range(300), errors)
    return rows


def measure_model_free(args: Args) -> list[dict]:
    """Part 3: the model-free gain's distance from its limit over trajectories, and from the optimum over the step."""
    counts, steps = 2 ** np.arange(7, 17, 2), np.array([0.2, 0.1, 0.05])
    of_counts, (of_steps, exact) = (
        np.zeros((args.num_repeats, len(counts))),
        np.zeros((2, args.num_repeats, len(steps))),
    )
    for repeat in range(args.num_repeats):
        rng = np.random.default_rng([args.seed, 3, repeat])
        problem, P = random_system(args, 2, rng, steps[0])
        best = best_policy(problem, P)[0]
        limits = [best_policy(limit, riccati(limit))[0] for limit in (euler_limit(problem, step) for step in steps)]
        start = random_start(euler_limit(problem, steps[0]), limits[0], rng, distance=0.5)
        for i, count in enumerate(counts):
            K = model_free_ipo(problem, start, count, steps[1], rng)
            of_counts[repeat, i] = norm(K - limits[1]) / norm(limits[1])
        for i, step in enumerate(steps):
            K = model_free_ipo(problem, start, counts[-1], step, rng)
            of_steps[repeat, i], exact[repeat, i] = norm(K - best) / norm(best), norm(limits[i] - best) / norm(best)
    rows = curve("model-free: error over trajectories", counts, of_counts, (200, math.inf))
    rows += curve("model-free: error over the step", steps, of_steps, (0, 1))
    return rows + curve("model-free: endless trajectories", steps, exact, (0, 1))


def measure_transfer(args: Args) -> list[dict]:
    """Part 4: gap of the gains, cost of the source's policy, and steps to 1e-10 from it and from a random start."""
    gaps, costs, stable = np.full((3, args.num_pairs, len(EPS)), np.nan)
    counts = np.full((2, 2, args.num_pairs, len(EPS)), np.nan)
    for pair in range(args.num_pairs):
        rng = np.random.default_rng([args.seed, 4, pair])
        source, P_source = random_system(args, SIZE, rng)
        K = best_policy(source, P_source)[0]
        for i, eps in enumerate(EPS):
            rng = np.random.default_rng([args.seed, 5, pair])  # so that the direction is the same for every eps
            target = neighbour(source, eps, rng)
            try:
                P = riccati(target)
            except RunError:  # no policy stabilises this target
                continue
            best, spread = best_policy(target, P)
            gaps[pair, i] = norm(K - best) / norm(best)
            stable[pair, i] = stabilises(target, K)
            if stable[pair, i]:
                least = cost(target, best, spread)
                costs[pair, i] = (cost(target, K, spread) - least) / abs(least)
            for k, start in enumerate([K, random_start(target, best, rng)]):
                for j, step in enumerate((ipo_step, natural_gradient_step) if k or stable[pair, i] else ()):
                    counts[j, k, pair, i] = len(policy_iteration(target, start, P, step, 1e-10, 100)) - 1
    rows = curve("transfer: gap of the gains", EPS, gaps, (0, 0.05))
    rows += curve("transfer: relative excess cost of the source", EPS, costs, (0, 0.05))
    for eps, column in zip(EPS, stable.T):
        wins, tries = int(np.nansum(column)), int(np.isfinite(column).sum())
        low, high = binomtest(wins, tries).proportion_ci(method="wilson") if tries else (math.nan, math.nan)
        found = {"value": wins / max(tries, 1), "low": low, "high": high, "count": tries}
        rows.append({"quantity": "transfer: source stabilises the target", "x": eps} | found)
    for j, k in np.ndindex(2, 2):
        name = f"{('IPO', 'natural gradient')[j]}: steps from {('source', 'random start')[k]}"
        rows += curve(name, EPS, counts[j, k])
    return rows


def measure_pendulum(args: Args) -> list[dict]:
    """Part 5: refinement of the grid; policy iteration from the source's policy and from the uniform one."""
    rows, sizes = [], [args.grid_size // 4, args.grid_size // 2, args.grid_size]
    for name, inertia in (("pendulum 1D", False), ("pendulum 2D", True)):
        values = [grid_iteration(pendulum(size, 1.0, args, inertia))[-1].reshape(size, -1) for size in sizes]
        coarse, middle, fine = (value[:: 2**i, :: 2**i] for i, value in enumerate(values))
        changes = np.array([[np.abs(coarse - middle).max(), np.abs(middle - fine).max()]]) / np.abs(fine).max()
        rows += curve(f"{name}: change of the value by refinement", sizes[1:], changes)
        source = pendulum(sizes[1], 1.0, args, inertia)
        policy = grid_policy(source, grid_iteration(source)[-1])
        for start, kind in ((policy, "source"), (None, "uniform")):
            runs = [grid_iteration(pendulum(sizes[1], 1 + eps, args, inertia), start) for eps in EPS]
            gaps = [np.abs(run - run[-1]).max(1) / np.abs(run[-1]).max() for run in runs]
            costs = np.array([[(run[0] - run[-1]).mean() for run in runs]])
            rows += curve(f"{name}: steps from {kind}", EPS, [[(gap > 1e-10).sum() for gap in gaps]])
            rows += curve(f"{name}: cost of the {kind} policy", EPS, costs, (0, 0.05) if kind == "source" else None)
    return rows


def measure_diffusion(args: Args) -> list[dict]:
    """Part 6: W2 of what is generated for two data laws, the noise of both being the same, over their distance."""
    near, times = EPS[EPS < 0.5], HORIZON / 4 * np.arange(1, 5)
    data, exact = np.zeros((2, args.num_pairs, len(near)))
    sampled, residuals = np.zeros((args.num_repeats, len(near))), np.zeros((args.num_repeats, len(times)))
    for pair, (i, eps) in product(range(args.num_pairs), enumerate(near)):
        rng = np.random.default_rng([args.seed, 6, pair])  # so that the direction is the same for every eps
        factor, direction = rng.normal(size=(2, 2, 2))
        covs = [F @ F.T + 0.05 * np.eye(2) for F in (factor, factor + eps * norm(factor) * unit(direction))]
        data[pair, i] = gaussian_distance(*covs)
        exact[pair, i] = gaussian_distance(*(generated_covariance(cov, HORIZON) for cov in covs))
        if pair < args.num_repeats:
            drawn = []
            for cov in covs:
                score = lambda x, t, cov=cov: -x @ inv(diffused(cov, t))  # noqa: E731
                drawn.append(generate(score, (2_000, 2), np.random.default_rng([args.seed, 7, pair])))
            sampled[pair, i] = gaussian_distance(*(np.cov(x.T) for x in drawn))
            flow = riccati_flow(reverse_problem(2), inv(covs[1]), times)[0]
            residuals[pair] = [norm(P @ diffused(covs[1], t) - np.eye(2)) for P, t in zip(flow, times)]
    rows = curve("reverse SDE: |P cov - I| of its Riccati equation", times, residuals)
    rows += curve("W2 generated / W2 data: Gaussian", near, exact / data)
    found = {"Gaussian, data": data, "Gaussian, generated": exact, "Gaussian, generated, samples": sampled}

    def samples(repeat: int, mixture: tuple[float, float]) -> Array:
        rng = np.random.default_rng([args.seed, 8, repeat])
        return generate(lambda x, t: mixture_score(x, t, *mixture), (5_000,), rng)

    base = 1.0, 0.5
    for kind, moved in (("centre", [(1 + eps, 0.5) for eps in near]), ("chance", [(1.0, 0.5 + eps) for eps in near])):
        quantiles = [mixture_quantiles(100_000, *mixture) for mixture in (base, *moved)]
        found[f"mixture, {kind} moved, data"] = np.array([[sample_distance(quantiles[0], q) for q in quantiles[1:]]])
        drawn = [[samples(repeat, mixture) for mixture in (base, *moved)] for repeat in range(args.num_repeats)]
        distances = [[sample_distance(x, moved_x) for moved_x in others] for x, *others in drawn]
        found[f"mixture, {kind} moved, generated"] = np.array(distances)
    return rows + [row for name, values in found.items() for row in curve(f"W2: {name}", near, values, (0, 1))]


def run(args: Args) -> dict:
    """Run all experiments; write a CSV and a figure to the run folder.

    Returns run_dir, and rows, those of the CSV. Raises RunError for bad arguments.
    """
    check_args(args)
    run_dir = Path("runs") / f"{SCRIPT}__{args.num_pairs}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2))
    rows = []
    for measure in (measure_learning, measure_model_free, measure_transfer, measure_pendulum, measure_diffusion):
        rows += measure(args)
    write_csv(run_dir / "policy_transfer.csv", rows)
    plot(rows, run_dir / "policy_transfer.png")
    return {"run_dir": str(run_dir), "rows": rows}


train = run  # as the other scripts call it


# ------------------------------------------------------------------------------------------------- files of a run


def require(args: Args, name: str, valid: bool, choices: str) -> None:
    """Raise RunError, naming the argument and what it must be, unless it is valid."""
    if not valid:
        raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)!r} is not valid; it must be {choices}")


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""
    sizes = args.dimensions
    valid = isinstance(sizes, tuple) and all(type(n) is int and 1 <= n <= 20 for n in sizes)
    require(args, "dimensions", valid and 0 < len(set(sizes)) == len(sizes), "whole numbers from 1 to 20, named once")
    for name, low, high in (("num_pairs", 2, 10_000), ("num_repeats", 2, 10_000), ("seed", 0, 2**32 - 1)):
        valid = type(getattr(args, name)) is int and low <= getattr(args, name) <= high
        require(args, name, valid, f"a whole number from {low} to {high}")
    for name, low, high in (("noise", 0, 100), ("discount", 0.001, 100), ("temperature", 0.01, 100)):
        valid = type(getattr(args, name)) in (int, float) and low <= getattr(args, name) <= high
        require(args, name, valid, f"a number from {low} to {high}")
    valid = type(args.grid_size) is int and args.grid_size in range(16, 257, 4)
    require(args, "grid_size", valid, "a multiple of 4 from 16 to 256")


def interval(values: np.ndarray, statistic: Callable = np.mean, repeats: int = 2000) -> np.ndarray:
    """95 % percentile bootstrap [2, ...] of a statistic over the first axis, the seeds."""
    rows = np.random.default_rng(0).integers(len(values), size=(repeats, len(values)))
    return np.percentile(statistic(values[rows], axis=1), [2.5, 97.5], axis=0)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the rows, whole or not at all."""
    with open(f"{path}.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(f"{path}.tmp", path)


def plot(rows: list[dict], path: Path) -> None:
    """Four panels: learning with the model and without it, transfer, diffusion models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), dpi=100, layout="tight")
    learning, model_free, transfer, diffusion = figure.subplots(2, 2).flat

    def line(axis: Any, quantity: str, label: str, color: str, **style: Any) -> None:
        ours = [row for row in rows if row["quantity"] == quantity and row["x"] != "slope" and row["count"]]
        x, middle, low, high = (np.array([row[key] for row in ours]) for key in ("x", "value", "low", "high"))
        axis.plot(x, middle, label=label, color=color, **{"marker": "o", "markersize": 3} | style)
        axis.fill_between(x, low, high, alpha=0.15, color=color, linewidth=0)

    for name, color in (("ipo", "tab:blue"), ("natural_gradient", "tab:orange"), ("gradient", "tab:green")):
        line(learning, f"{name}_step: error", name.replace("_", " ").replace("ipo", "IPO"), color, marker="")
    learning.set(xscale="symlog", yscale="log", xlabel="step", ylabel="|P - P*| / |P*|", ylim=(1e-15, None))
    line(model_free, "model-free: error over trajectories", "over trajectories, from the limit", "tab:blue")
    model_free.set(xscale="log", yscale="log", xlabel="trajectories", ylabel="|K - K*| / |K*|")
    steps = model_free.twiny()
    line(steps, "model-free: error over the step", "over the step, from the optimum", "tab:orange")
    line(steps, "model-free: endless trajectories", "the same, limit", "black", linestyle=":")
    steps.set(xscale="log", xlabel="step")
    steps.legend(fontsize=8, loc="lower right")
    for name, other, color in (("IPO", "random start", "tab:blue"), ("pendulum 2D", "uniform", "tab:orange")):
        line(transfer, f"{name}: steps from source", f"{name}, from the source's policy", color)
        line(transfer, f"{name}: steps from {other}", f"{name}, {other}", color, linestyle="--")
    transfer.set(xscale="log", xlabel="distance of source and target", ylabel="steps to 1e-10", ylim=(0, 12))
    share = transfer.twinx()
    line(share, "transfer: source stabilises the target", "", "black", linestyle=":")
    share.set(ylim=(0, 1.5), yticks=[0, 0.5, 1], ylabel="share of stabilised targets (dotted)")
    kinds = ("Gaussian", "mixture, centre moved", "mixture, chance moved")
    for name, color in zip(kinds, ("tab:blue", "tab:orange", "tab:green")):
        line(diffusion, f"W2: {name}, generated", f"{name}, generated", color)
        line(diffusion, f"W2: {name}, data", f"{name}, data", color, linestyle=":", marker="")
    diffusion.set(xscale="log", yscale="log", xlabel="change of the data's law", ylabel="W2")
    for axis in (learning, model_free, transfer, diffusion):
        axis.legend(fontsize=8, loc={learning: "lower left", diffusion: "lower right"}.get(axis, "upper left"))
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------- command line


def print_table(rows: list[dict]) -> None:
    """One line for every quantity: its medians over x, and the slope in log scale with its interval."""
    header = None
    for quantity in dict.fromkeys(row["quantity"] for row in rows if not row["quantity"].endswith("_step: error")):
        ours = {row["x"]: row for row in rows if row["quantity"] == quantity}
        slope = ours.pop("slope", None)
        if header != list(ours):
            header = list(ours)
            print(f"\n{'':50}" + "".join(f"{x:9g}" for x in header))
        tail = f"   slope {slope['value']:.2f}" if slope else ""
        if slope and slope["count"] > 1:
            tail += f" [{slope['low']:.2f}, {slope['high']:.2f}]"
        print(f"{quantity:50}" + "".join(f"{row['value']:9.2g}" for row in ours.values()) + tail)


def main(args: Args) -> None:
    """What the command line asks for; a failure is one line on standard error and exit code 1."""
    try:
        result = run(args)
    except KeyboardInterrupt:
        raise SystemExit("stopped before the end, so there are no results") from None
    except (RunError, OSError, MemoryError) as error:
        raise SystemExit(f"{SCRIPT}.py: error: {error}") from None
    print_table(result["rows"])
    print(f"run folder {result['run_dir']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
