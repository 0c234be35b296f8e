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
3. Learn without it: the same two steps by least-squares temporal differences on the policy's trajectories.
4. Transfer: start IPO at the policy that is optimal for another system, at relative distance eps.
5. Transfer, non-linear: policy iteration for the exploratory HJB equation of a pendulum on a grid.
6. Diffusion models: the reverse SDE is optimally controlled, and what it generates is stable in its data.

To fork it for a linear system of your own, fill an LQR and call riccati and policy_iteration on it. For a non-linear
one rewrite pendulum: grid_value and grid_policy see only its Chain.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from numpy import ndarray as Array
from numpy.linalg import LinAlgError, cholesky, inv, lstsq, norm, solve
from numpy.random import Generator, default_rng
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
    grid_size: int = 40
    """Points of the coarsest of three grids in each direction; the others have two and four times as many."""
    seed: int = 1
    """Seed of all experiments."""


SIZES = (1, 2, 5, 10, 20)  # of the state, with half as many controls
SIZE = 4  # where one size is shown
EPS = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])  # relative distances of source and target
HORIZON = 4.0  # time of the forward SDE
STD = 0.3  # standard deviation of each of the mixture's modes
COLUMNS = ("quantity", "x", "value", "low", "high", "count")  # of the CSV


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

    @property
    def F(self) -> Array:
        """A - discount / 2 [n, n]: to discount a quadratic cost is to let the state decay faster."""
        return self.A - self.discount / 2 * np.eye(len(self.A))


def check_problem(problem: LQR) -> None:
    """Raise RunError, naming the field, where sizes do not fit, Q or R is indefinite, or a number is not possible."""
    n, m, J, k = len(problem.A), problem.B.shape[-1], len(problem.C), problem.S.shape[-1]
    shapes = {"A": (n, n), "B": (n, m), "C": (J, n, n), "D": (J, n, m), "S": (n, k), "Q": (n, n), "R": (m, m)}
    for name, shape in shapes.items():
        if getattr(problem, name).shape != shape:
            raise RunError(f"{name}: shape {getattr(problem, name).shape} does not fit A, B and C; it must be {shape}")
        if not np.isfinite(getattr(problem, name)).all():
            raise RunError(f"{name}: it must be finite")
    for name, kind, low in (("Q", "nonnegative", -1e-12), ("R", "positive", 1e-12)):
        matrix = getattr(problem, name)
        least = np.linalg.eigvalsh(matrix + matrix.T)[0] / 2
        if not np.allclose(matrix, matrix.T) or not least >= low:
            raise RunError(f"{name}: it must be symmetric and {kind} definite; its least eigenvalue is {least:.3g}")
    if not 0 < problem.temperature < math.inf or not 0 <= problem.discount < math.inf:
        raise RunError("temperature, discount: they must be finite, above 0 and from 0 on")


def hamiltonian(problem: LQR, P: Array) -> tuple[Array, Array]:
    """R~ [m, m] and G [m, n] of the Hamiltonian u'R~u + 2 u'Gx + (terms in x), at the value x'Px + c."""
    B, C, D = problem.B, problem.C, problem.D
    return problem.R + (D.mT @ P @ D).sum(0), B.T @ P + (D.mT @ P @ C).sum(0)


def best_policy(problem: LQR, P: Array) -> tuple[Array, Array]:
    """K [m, n] and covariance [m, m] of the policy N(-Kx, .) that minimises the entropy-regularised Hamiltonian."""
    R, G = hamiltonian(problem, P)
    return solve(R, G), problem.temperature / 2 * inv(R)


def riccati_rates(problem: LQR, P: Array) -> tuple[Array, float]:
    """-dP/dt [n, n] of the optimal value x'Px + c, which is 0 without horizon, and discount c - dc/dt."""
    F, (R, G) = problem.F, hamiltonian(problem, P)
    P_rate = problem.Q + F.T @ P + P @ F + (problem.C.mT @ P @ problem.C).sum(0) - G.T @ solve(R, G)
    free_energy = problem.temperature / 2 * (len(R) * math.log(math.pi * problem.temperature) - np.linalg.slogdet(R)[1])
    return P_rate, np.trace(problem.S.T @ P @ problem.S) - free_energy


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
    CD, P, n = np.concatenate([problem.C, problem.D], 2), np.zeros_like(problem.A), len(problem.A)
    try:
        for _ in range(30):
            noise = (CD.mT @ P @ CD).sum(0)
            noise = (noise + noise.T) / 2
            Q, R = problem.Q + noise[:n, :n], problem.R + noise[n:, n:]
            P = solve_continuous_are(problem.F, problem.B, Q, R, s=noise[:n, n:])
            if stabilises(problem, best_policy(problem, P)[0]) or norm(P) > 1e10:
                break
        for _ in range(50):
            last, P = P, evaluate(problem, best_policy(problem, P)[0])
            if norm(P - last) <= 1e-8 * norm(P):  # the error is then of the order of its square
                break
    except (LinAlgError, RunError):  # no gain was found, or the costs grow without bound
        why = "no u = -Kx makes the discounted second moment decay, or Q does not see what grows"
        raise RunError(f"A, B, C, D: not stabilisable: {why}") from None
    return P


# -------------------------------------------------------------------------------------- 2. learning with the model


def lyapunov_operator(problem: LQR, K: Array) -> Array:
    """The map P -> F'P + PF + sum_j E_j'PE_j as a matrix [n^2, n^2], for F and E_j of the loop that K closes."""
    if K.shape != problem.B.T.shape or not np.isfinite(K).all():
        raise RunError(f"K: it must be finite and of shape {problem.B.T.shape}, as A and B are, not {K.shape}")
    F, eye = problem.F - problem.B @ K, np.eye(len(problem.A))
    E = (problem.C - problem.D @ K).mT
    left, right = np.stack([F.T, eye, *E]), np.stack([eye, F.T, *E])
    return np.einsum("jab,jcd->acbd", left, right).reshape(eye.size, eye.size)


def lyapunov(operator: Array, *sources: Array) -> Array:
    """Solutions [..., n, n] of operator P + source = 0, for symmetric sources [n, n]."""
    solved = -solve(operator, np.stack([source.ravel() for source in sources], 1)).T.reshape(-1, *sources[0].shape)
    return (solved + solved.mT) / 2


def stabilises(problem: LQR, K: Array) -> bool:
    """Whether the discounted second moment decays under u = -Kx: positive sources then have positive solutions."""
    try:
        return np.linalg.eigvalsh(lyapunov(lyapunov_operator(problem, K), np.eye(len(problem.A)))[0])[0] > 0
    except LinAlgError:  # an eigenvalue is 0
        return False


def evaluate(problem: LQR, K: Array) -> Array:
    """P [n, n] of the value x'Px + c of a Gaussian policy with mean -Kx; raises RunError where its cost is infinite."""
    if not stabilises(problem, K):
        value = np.linalg.eigvals(lyapunov_operator(problem, K)).real.max()
        raise RunError(f"K: does not stabilise: the eigenvalue {value:.3g} of the second moment must be below 0")
    return lyapunov(lyapunov_operator(problem, K), problem.Q + K.T @ problem.R @ K)[0]


def cost(problem: LQR, K: Array, spread: Array) -> float:
    """J of the policy N(-Kx, spread [m, m]); raises RunError where it is infinite."""
    if not problem.discount > 0:
        raise RunError(f"discount: {problem.discount:g} is not valid; it must be above 0, or costs are infinite")
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


def convergence(errors: Array, floor: float = 1e-12) -> tuple[float, float]:
    """The order of convergence, from the last three errors above the floor, and the largest ratio of two in a row.

    Below the floor errors are rounding.
    """
    falls = np.diff(np.log(errors[errors > floor]))
    return (falls[-1] / falls[-2] if len(falls) > 1 else math.nan), math.exp(falls.max(initial=-math.inf))


# -------------------------------------------------------------------------------------- 3. learning without the model


def simulate(
    problem: LQR, K: Array, spread: Array, x: Array, offset: Array, step: float, num_steps: int, rng: Generator
) -> tuple[Array, Array]:
    """States [n, T + 1, M] and costs per time [T, M] without entropy, from x [n, M], by Euler-Maruyama.

    The policies are N(offset - Kx, spread [m, m]) with offset [m, M], and are averaged exactly: no control is drawn.
    Their mean is in the drift, their second moment in the noise and in the cost.
    """
    states, costs = [x], []
    constant = np.hstack([problem.S, *(problem.D @ cholesky(spread))])
    for _ in range(num_steps):
        u = offset - K @ x
        growing = problem.C @ x + problem.D @ u  # [J, n, M]
        noise = (growing * rng.normal(size=(len(growing), 1, x.shape[1]))).sum(0)
        noise += constant @ rng.normal(size=(constant.shape[1], x.shape[1]))
        costs.append((x * (problem.Q @ x)).sum(0) + (u * (problem.R @ u)).sum(0) + np.trace(problem.R @ spread))
        x = x + (problem.A @ x + problem.B @ u) * step + noise * math.sqrt(step)
        states.append(x)
    return np.stack(states, 1), np.stack(costs)


def temporal_differences(
    states: Array, costs: Array, offset: Array, K: Array, discount: float, step: float
) -> tuple[Array, Array, Array]:
    """P [n, n] of the policy with mean -Kx, the gain [m, n] that improves it, and R~ [m, m], from simulate's output.

    With V(x) = x'Px + c and q(x, w) = w'R~w + 2 w'(G - R~K)x, the Hamiltonian at w - Kx less that at -Kx,

        V(x) - exp(-discount step) V(x_next) + step q(x, offset) = step cost + constant

    up to the step's error and a martingale, which averages out against the products of x and offset: least squares.
    """
    n = len(states)
    x, x_next = (z.reshape(n, -1) for z in (states[:, :-1], states[:, 1:]))
    z = np.vstack([x, np.tile(offset, len(costs))])
    products = z[:, None] * z  # [n + m, n + m, T M]
    changes = step * products
    changes[:n, :n] = products[:n, :n] - math.exp(-discount * step) * x_next[:, None] * x_next
    one = np.ones((1, z.shape[1]))
    known = np.vstack([*products, one])
    equations, target = known @ np.vstack([*changes, one]).T, known @ (step * costs.ravel())
    form = lstsq(equations, target, rcond=1e-10)[0][:-1].reshape(len(z), -1)  # of least norm, so it is symmetric
    return form[:n, :n], K + solve(form[n:, n:], form[n:, :n]), form[n:, n:]


def model_free_ipo(problem: LQR, K: Array, num_trajectories: int, step: float, rng: Generator) -> Array:
    """The gain [m, n] after four rounds, each on trajectories of its own policy over eight steps.

    The average over a policy hides what a control does, so each trajectory shifts its policy by an offset. The gain is
    NaN where a learned R~ is not positive definite, since the trajectories are too few.
    """
    spread = problem.temperature / 2 * np.eye(len(K))
    for _ in range(4):
        x = rng.normal(size=(K.shape[1], num_trajectories))
        offset = 2 * rng.normal(size=(len(K), num_trajectories))
        states, costs = simulate(problem, K, spread, x, offset, step, 8, rng)
        _, K, R = temporal_differences(states, costs, offset, K, problem.discount, step)
        if not np.linalg.eigvalsh(R)[0] > 0:
            return np.full_like(K, math.nan)
        spread = problem.temperature / 2 * inv(R)
    return K


def euler_limit(problem: LQR, step: float) -> LQR:
    """The problem that Euler trajectories solve without error: step F'PF is one more noise, of size sqrt(step)."""
    growth = math.exp(problem.discount * step)
    C = np.concatenate([problem.C, math.sqrt(step) * problem.A[None]])
    D = np.concatenate([problem.D, math.sqrt(step) * problem.B[None]])
    costs = {"Q": growth * problem.Q, "R": growth * problem.R, "temperature": growth * problem.temperature}
    return problem._replace(C=C, D=D, discount=(growth - 1) / step, **costs)


# --------------------------------------------------------------------------------- 4. random systems and neighbours


def random_system(args: Args, n: int, rng: Generator, step: float | None = None) -> tuple[LQR, Array]:
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


def random_start(problem: LQR, K: Array, rng: Generator, distance: float = 10.0) -> Array:
    """The first stabilising gain [m, n] at distance, distance / 2, distance / 4, ... |K| from K in a direction."""
    direction = distance * norm(K) * unit(rng.normal(size=K.shape))
    while not stabilises(problem, K + direction):
        direction /= 2
    return K + direction


def unit(direction: Array) -> Array:
    """The direction scaled to norm 1."""
    return direction / norm(direction)


def neighbour(problem: LQR, eps: float, rng: Generator) -> LQR:
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
    directions = [(push, 0.5, angles[1])]  # drift, size of the noise, width of a cell
    if inertia:
        ends = np.pad(index, ((0, 0), (1, 1)), mode="edge")  # reflecting
        around += [ends[:, 2:], ends[:, :-2]]
        directions = [(speed + 0 * torque, 0.0, angles[1]), (push, 0.5, 8 / size)]
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


def generate(score: Callable, size: tuple[int, ...], rng: Generator, num_steps: int = 200) -> Array:
    """Samples of this size from N(0, I) by the reverse SDE over HORIZON, by Euler-Maruyama; score(x, t) is the data's
    after time t. Steps get shorter towards the data: equal ones leave too much between the modes of a mixture."""
    x, times = rng.normal(size=size), HORIZON * np.linspace(1, 0, num_steps + 1) ** 2
    for t, h in zip(times, -np.diff(times)):
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
    return math.sqrt(max(np.trace(cov + other) - 2 * norm(cholesky(cov).T @ cholesky(other), "nuc"), 0))


# ------------------------------------------------------------------------------------------------------ experiments


def curve(quantity: str, xs: Array, values: Array, below: float = 0.0) -> list[dict]:
    """Lines of the CSV for values [S, X]: median and 10 % and 90 % quantiles of the finite ones, and their number.

    One line more, if an x is under `below`, has the slope in log scale over those xs, of the geometric means over S
    of what is above 0 at all of them, with a 95 % bootstrap interval, which is NaN where that is one row or none.
    """
    xs, values, rows = np.asarray(xs), np.asarray(values, dtype=float), []
    for x, column in zip(xs, values.T):
        finite = column[np.isfinite(column)]
        low, median, high = np.quantile(finite, [0.1, 0.5, 0.9]) if len(finite) else [math.nan] * 3
        rows.append(dict(zip(COLUMNS, (quantity, x, median, low, high, len(finite)))))
    inside = xs < below
    if inside.any():
        values = values[(values[:, inside] > 0).all(1)][:, inside]

        def fit(samples: Array, axis: int) -> Array:
            return np.polyfit(np.log(xs[inside]), np.log(samples).mean(axis).T, 1)[0]

        slope = fit(values, 0) if len(values) else math.nan
        low, high = interval(values, fit) if len(values) > 1 else (math.nan, math.nan)
        rows.append(dict(zip(COLUMNS, (quantity, "slope", slope, low, high, len(values)))))
    return rows


def measure_learning(args: Args) -> list[dict]:
    """Parts 1 and 2: Riccati solutions; order and rate of IPO for every size, beside gradient methods for one."""
    rng = default_rng([args.seed, 2])
    times, steps = np.array([1.0, 2.0, 4.0, 8.0]), (ipo_step, natural_gradient_step, gradient_step)
    found = np.zeros((4, args.num_repeats, len(SIZES)))
    distances, curves = np.zeros((args.num_repeats, len(times))), np.zeros((3, args.num_repeats, 300))
    for repeat in range(args.num_repeats):
        for i, n in enumerate(SIZES):
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
    rows = [row for name, values in zip(names, found) for row in curve(name, SIZES, values)]
    rows += curve("Riccati: distance of a finite horizon", times, distances)
    for step, errors in zip(steps, curves):
        arrived = np.where(errors[:, -1] <= 1e-10, (errors > 1e-10).sum(1), np.nan)
        rows += curve(f"{step.__name__}: steps to 1e-10", [SIZE], arrived[:, None])
        rows += curve(f"{step.__name__}: error", range(300), errors)
    return rows


def measure_model_free(args: Args) -> list[dict]:
    """Part 3: the model-free gain's distance from its limit over trajectories, and from the optimum over the step."""
    counts, steps = 2 ** np.arange(9, 15), np.array([0.4, 0.2, 0.1])
    of_counts = np.zeros((args.num_repeats, len(counts)))
    of_steps, exact = np.zeros((2, args.num_repeats, len(steps)))
    for repeat in range(args.num_repeats):
        rng = default_rng([args.seed, 3, repeat])
        problem, P = random_system(args, 2, rng, steps[0])
        best = best_policy(problem, P)[0]
        limits = [best_policy(limit, riccati(limit))[0] for limit in (euler_limit(problem, step) for step in steps)]
        exact[repeat] = norm(np.array(limits) - best, axis=(1, 2)) / norm(best)
        start = random_start(euler_limit(problem, steps[0]), limits[0], rng, distance=0.5)
        gains = [model_free_ipo(problem, start, count, steps[1], rng) for count in counts]
        of_counts[repeat] = norm(np.array(gains) - limits[1], axis=(1, 2)) / norm(limits[1])
        gains = [model_free_ipo(problem, start, counts[-1], step, rng) for step in steps]
        of_steps[repeat] = norm(np.array(gains) - best, axis=(1, 2)) / norm(best)
    rows = curve("model-free: error over trajectories", counts, of_counts, math.inf)
    rows += curve("model-free: error over the step", steps, of_steps, math.inf)
    return rows + curve("model-free: endless trajectories", steps, exact, math.inf)


def measure_transfer(args: Args) -> list[dict]:
    """Part 4: gap of the gains, cost of the source's policy, and steps to 1e-10 from it and from a random start."""
    gaps, costs, stable = np.full((3, args.num_pairs, len(EPS)), np.nan)
    counts = np.full((2, 2, args.num_pairs, len(EPS)), np.nan)
    for pair in range(args.num_pairs):
        source, P = random_system(args, SIZE, default_rng([args.seed, 4, pair]))
        K = best_policy(source, P)[0]
        for i, eps in enumerate(EPS):
            rng = default_rng([args.seed, 5, pair])  # so that the direction is the same for every eps
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
    rows = curve("transfer: gap of the gains", EPS, gaps, 0.05)
    rows += curve("transfer: relative excess cost of the source", EPS, costs, 0.05)
    for eps, column in zip(EPS, stable.T):
        wins, tries = int(np.nansum(column)), int(np.isfinite(column).sum())
        low, high = binomtest(wins, tries).proportion_ci(method="wilson") if tries else (math.nan, math.nan)
        values = "transfer: source stabilises the target", eps, wins / max(tries, 1), low, high, tries
        rows.append(dict(zip(COLUMNS, values)))
    for j, k in np.ndindex(2, 2):
        name = f"{('IPO', 'natural gradient')[j]}: steps from {('source', 'random start')[k]}"
        rows += curve(name, EPS, counts[j, k])
    return rows


def measure_pendulum(args: Args) -> list[dict]:
    """Part 5: three grids and their limit; policy iteration from the source's policy and from the uniform one."""
    rows, sizes = [], [args.grid_size, 2 * args.grid_size, 4 * args.grid_size]
    for name, inertia in (("pendulum 1D", False), ("pendulum 2D", True)):
        fields = [grid_iteration(pendulum(size, 1.0, args, inertia))[-1].reshape(size, -1) for size in sizes]
        values = np.array([field[:: 2**i, :: 2**i] for i, field in enumerate(fields)])  # at the same states
        limit = 2 * values[2] - values[1]  # Richardson's, since the error of an upwind scheme is linear in the cells
        rows += curve(f"{name}: mean value", [*sizes, math.inf], [[*values.mean((1, 2)), limit.mean()]])
        changes = np.abs(np.diff(values, axis=0))
        for which, change in (("mean", changes.mean((1, 2))), ("largest", changes.max((1, 2)))):
            rows += curve(f"{name}: {which} change of the value", sizes[1:], [change], math.inf)
        source = pendulum(sizes[1], 1.0, args, inertia)
        policy = grid_policy(source, grid_iteration(source)[-1])
        for start, kind in ((policy, "source"), (None, "uniform")):
            runs = [grid_iteration(pendulum(sizes[1], 1 + eps, args, inertia), start) for eps in EPS]
            gaps = [np.abs(run - run[-1]).max(1) / np.abs(run[-1]).max() for run in runs]
            costs = [(run[0] - run[-1]).mean() for run in runs]
            rows += curve(f"{name}: steps from {kind}", EPS, [[(gap > 1e-10).sum() for gap in gaps]])
            rows += curve(f"{name}: cost of the {kind} policy", EPS, [costs], 0.05 if start is policy else 0)
    return rows


def measure_diffusion(args: Args) -> list[dict]:
    """Part 6: W2 of what is generated for two data laws, the noise of both being the same, over their distance."""
    near, times = EPS[EPS < 0.5], HORIZON / 4 * np.arange(1, 5)
    data, exact = np.zeros((2, args.num_pairs, len(near)))
    sampled, residuals = np.zeros((args.num_repeats, len(near))), np.zeros((args.num_repeats, len(times)))
    for pair in range(args.num_pairs):
        factor, direction = default_rng([args.seed, 6, pair]).normal(size=(2, 2, 2))
        factors = [factor, *(factor + eps * norm(factor) * unit(direction) for eps in near)]
        covs = [F @ F.T + 0.05 * np.eye(2) for F in factors]
        made = [generated_covariance(cov, HORIZON) for cov in covs]
        data[pair] = [gaussian_distance(covs[0], cov) for cov in covs[1:]]
        exact[pair] = [gaussian_distance(made[0], cov) for cov in made[1:]]
        if pair < args.num_repeats:
            scores = [lambda x, t, cov=cov: -x @ inv(diffused(cov, t)) for cov in covs]
            drawn = [generate(score, (2_000, 2), default_rng([args.seed, 7, pair])) for score in scores]
            sampled[pair] = [gaussian_distance(np.cov(drawn[0].T), np.cov(x.T)) for x in drawn[1:]]
            flow = riccati_flow(reverse_problem(2), inv(covs[-1]), times)[0]
            residuals[pair] = [norm(P @ diffused(covs[-1], t) - np.eye(2)) for P, t in zip(flow, times)]
    rows = curve("reverse SDE: |P cov - I| of its Riccati equation", times, residuals)
    rows += curve("W2 generated / W2 data: Gaussian", near, exact / data)
    rows += curve("W2: Gaussian, data", near, data, 1)
    rows += curve("W2: Gaussian, generated", near, exact, 1)
    rows += curve("W2: Gaussian, generated, samples", near, sampled, 1)

    mixtures = [(1.0, 0.5), *((1 + eps, 0.5) for eps in near), *((1.0, 0.5 + eps) for eps in near)]
    scores = [lambda x, t, mixture=mixture: mixture_score(x, t, *mixture) for mixture in mixtures]
    quantiles = [mixture_quantiles(100_000, *mixture) for mixture in mixtures]
    noises = [[args.seed, 8, repeat] for repeat in range(args.num_repeats)]  # the same for all laws
    drawn = [[np.sort(generate(score, (5_000,), default_rng(noise))) for score in scores] for noise in noises]
    for kind, laws in (("data", [quantiles]), ("generated", drawn)):
        distances = [[math.sqrt(np.mean((first - other) ** 2)) for other in others] for first, *others in laws]
        of_centre, of_chance = np.split(np.array(distances), 2, axis=1)
        rows += curve(f"W2: mixture, centre moved, {kind}", near, of_centre, 1)
        rows += curve(f"W2: mixture, chance moved, {kind}", near, of_chance, 1)
    return rows


def run(args: Args) -> dict:
    """Run all experiments; write a CSV and a figure to the run folder.

    Returns run_dir, and rows, those of the CSV. Raises RunError for bad arguments.
    """
    check_args(args)
    run_dir = Path("runs") / f"{SCRIPT}__{args.num_pairs}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2))
    measures = measure_learning, measure_model_free, measure_transfer, measure_pendulum, measure_diffusion
    rows = [row for measure in measures for row in measure(args)]
    write_csv(run_dir / "policy_transfer.csv", rows)
    plot(rows, run_dir / "policy_transfer.png")
    return {"run_dir": str(run_dir), "rows": rows}


train = run  # as the other scripts call it


# ------------------------------------------------------------------------------------------------- files of a run


LIMITS = {"noise": (0.0, 100.0), "discount": (0.001, 100.0), "temperature": (0.01, 100.0)}
LIMITS |= {"num_pairs": (2, 10_000), "num_repeats": (2, 10_000), "grid_size": (4, 64), "seed": (0, 2**32 - 1)}


def check_args(args: Args) -> None:
    """Raise RunError, naming the argument and what it must be, for the first that is not within its limits."""
    for name, (low, high) in LIMITS.items():
        value, whole = getattr(args, name), isinstance(low, int)
        if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
            valid = f"a {'whole ' * whole}number from {low} to {high}"
            raise RunError(f"--{name.replace('_', '-')}: {value!r} is not valid; it must be {valid}")


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
    Path(f"{path}.tmp").replace(path)


PANELS = (  # what the names of the quantities have in them; scales and labels of x and y
    ("_step: error", "symlog", "log", "step", "|P - P*| / |P*|"),
    ("model-free", "log", "log", "step, or number of trajectories", "|K - K*| / |K*|"),
    ("steps from", "log", "log", "distance of source and target", "steps to 1e-10"),
    ("W2: ", "log", "log", "change of the data's law", "W2"),
)


def plot(rows: list[dict], path: Path) -> None:
    """Four panels: learning with the model and without it, transfer, diffusion models."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=100, layout="tight")
    for axis, (part, xscale, yscale, xlabel, ylabel) in zip(figure.subplots(2, 2).flat, PANELS):
        for quantity in dict.fromkeys(row["quantity"] for row in rows if part in row["quantity"]):
            ours = [row for row in rows if row["quantity"] == quantity and row["x"] != "slope" and row["count"]]
            x, middle, low, high = (np.array([row[key] for row in ours]) for key in ("x", "value", "low", "high"))
            axis.plot(x, middle, label=quantity, linestyle=":" if quantity.endswith("data") else "-")
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0)
        axis.set(xscale=xscale, yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        axis.legend(fontsize=7)
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
        raise SystemExit(f"{SCRIPT}.py: error: {str(error) or 'out of memory'}") from None
    print_table(result["rows"])
    print(f"run folder {result['run_dir']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
