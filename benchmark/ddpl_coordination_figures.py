"""Why diffusion policies, in figures: what happens inside the runs of ddpl_coordination.py, and what ISSM does alone.

    python benchmark/ddpl_coordination_figures.py

Adds a fourth policy to those of the script, "moments": the Gaussian with the mean and deviation of the energy-based
policy, which needs no learning. Takes the arguments of ddpl_coordination.py, with defaults of 24,000 joint actions and
one to five agents. Prints the table, and writes to benchmark/results/coordination/:

- success.png, first_success.png: final teams that coordinate, and joint actions to the first success;
- training.png: one seed with the most agents, every agent's density over training and its energy at the end;
- nash_gap.png: what one agent could gain alone, over training;
- exact.png: what each policy class makes of the same known energy, without a learned critic;
- issm.png: the error of ISSM's score and the effective sample size, where the score is known.
"""

import math
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize
from scipy.stats import norm
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpl_coordination import (  # noqa: E402
    PEAK,
    POLICY_COLORS,
    Args,
    DiffusionPolicy,
    Learner,
    RunError,
    Runs,
    check_args,
    issm_target,
    issm_weights,
    learn,
    match_denoisers,
    own_payoff,
    plot_success,
    print_table,
    propose_actions,
    team_reward,
    update_local_critic,
    update_temperature,
)

DEFAULTS = Args(total_timesteps=24_000, num_agents=(1, 2, 3, 4, 5))
COLORS = POLICY_COLORS | {"moments": "tab:green"}
LEARNED = ("diffusion", "gaussian", "moments")
GRID = torch.linspace(-1, 1, 201)[1::2]  # [G], midpoints of 100 cells of the box, for quadrature
GAUSSIAN_START = (0.8, -1.5)  # mean and log standard deviation before the tanh, right of 0
TARGET_MODE, TARGET_STD = 0.4, 0.12  # of issm_error

# ------------------------------------------------------------------------------------- quadrature over one action


def boltzmann(energy: Tensor, temperature: Tensor | float) -> Tensor:
    """Density [..., G] on GRID of the policy proportional to exp(energy / temperature), energy [..., G]."""
    return (energy / temperature).softmax(-1) * len(GRID) / 2


def moments(density: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [...] of a density [..., G] on GRID."""
    mass = density * 2 / len(GRID)
    mean = (mass * GRID).sum(-1)
    variance = (mass * (GRID - mean[..., None]) ** 2).sum(-1)
    return mean, variance.sqrt()


def entropy_of(density: Tensor) -> Tensor:
    """Entropy [...] in nats of a density [..., G] on GRID."""
    return torch.special.entr(density).sum(-1) * 2 / len(GRID)


def nash_gap(actions: Tensor, args: Args) -> Tensor:
    """What one agent could gain at most by its best response [S], from samples [S, K, N] of the joint policies.

    Responses are tried on GRID; the samples of the others stand for their policies.
    """
    current = team_reward(actions, args).mean(1)
    gains = []
    for agent in range(actions.shape[-1]):
        deviations = actions[:, None].repeat(1, len(GRID), 1, 1)  # [S, G, K, N]
        deviations[..., agent] = GRID[:, None]
        best_response = team_reward(deviations, args).mean(2).amax(1)
        gains.append(best_response - current)
    return torch.stack(gains).amax(0)


# ---------------------------------------------------------------------------------------------- the moments policy


class MomentsPolicy(nn.Module):
    """`stack` Gaussians, clipped to [-1, 1], whose mean and deviation are set from outside."""

    def __init__(self, stack: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(stack, 1, 1))
        self.register_buffer("std", torch.ones(stack, 1, 1))

    def sample(self, batch_size: int) -> Tensor:
        """Actions [S, B, 1] in [-1, 1]."""
        noise = torch.randn(len(self.mean), batch_size, 1)
        return (self.mean + self.std * noise).clamp(-1, 1)


def update_moments(learner: Learner, actions: Tensor) -> None:
    """Give every Gaussian the mean and deviation of its energy-based policy, by quadrature of the local critic."""
    candidates = 2 * torch.rand(len(actions), 8, *actions.shape[1:]) - 1
    update_local_critic(learner, actions, candidates)
    with torch.no_grad():
        energy = learner.local_critic(GRID[:, None].expand(len(actions), -1, -1))
    density = boltzmann(energy, learner.log_temperature.detach().exp()[:, None])
    mean, std = moments(density)
    learner.policy.mean.copy_(mean[:, None, None])
    learner.policy.std.copy_(std[:, None, None])
    update_temperature(learner, entropy_of(density) - learner.args.target_entropy)


# ------------------------------------------------------------------------------------------------- inside the runs


class WatchedLearner(Learner):
    """A learner that can learn the moments policy, and that is looked at twenty times over a run, once it learns.

    gaps [looks, S]: Nash gaps. snapshots [looks, N, 500]: actions of the first seed's agents. looks: after how many
    joint actions.
    """

    def __init__(self, args: Args, policy: str, num_agents: int):
        super().__init__(args, policy, num_agents)
        if policy == "moments":
            self.policy = MomentsPolicy(args.num_seeds * num_agents)
        self.played = math.ceil(args.learning_starts / args.num_envs) * args.num_envs
        self.looks, self.gaps, self.snapshots = [], [], []

    def update_policy(self, drawn: Tensor) -> None:
        if isinstance(self.policy, MomentsPolicy):
            update_moments(self, drawn)
        else:
            super().update_policy(drawn)
        before, self.played = self.played, self.played + self.args.num_envs
        if self.played * 20 // self.args.total_timesteps > before * 20 // self.args.total_timesteps:
            self.look()

    def look(self) -> None:
        with torch.random.fork_rng(devices=[]):  # so that the run is the same as without a look
            joint = self.joint(self.policy.sample(500))
        self.looks.append(self.played)
        self.gaps.append(nash_gap(joint[:, :100], self.args))
        self.snapshots.append(joint[0].T)


def watched(args: Args, policy: str, num_agents: int) -> dict[str, np.ndarray]:
    """What learn returns, and what the learner has seen: looks, gaps and snapshots.

    energy [N, G]: what each action is worth to the first seed's agents at the end, E[Q(a_i, a_-i)] on GRID.
    """
    learners = []

    def make_learner(*arguments) -> WatchedLearner:
        learners.append(WatchedLearner(*arguments))
        return learners[0]

    outcomes = learn(args, policy, num_agents, make_learner)
    (learner,) = learners
    others = learner.policy.sample(200)
    candidates = GRID[:, None, None].expand(len(others), -1, 200, 1)
    energy = learner.score(others, candidates)[:num_agents].mean(2)
    seen = {"gaps": torch.stack(learner.gaps), "snapshots": torch.stack(learner.snapshots), "energy": energy}
    return outcomes | {name: values.numpy() for name, values in seen.items()} | {"looks": np.array(learner.looks)}


def interval(values: np.ndarray, statistic: Callable = np.mean, repeats: int = 2000) -> np.ndarray:
    """95 % percentile bootstrap [2, ...] of a statistic over the first axis, the seeds."""
    rows = np.random.default_rng(0).integers(len(values), size=(repeats, len(values)))
    return np.percentile(statistic(values[rows], axis=1), [2.5, 97.5], axis=0)


def plot_first_success(args: Args, runs: Runs, path: Path) -> None:
    """Joint actions to the first success, median over seeds and its interval, against the number of agents."""
    figure = Figure(figsize=(5, 3.8), dpi=100, layout="tight")
    axes = figure.subplots()
    shifts = np.linspace(-0.12, 0.12, len(COLORS))  # so that the bars stand side by side
    for (policy, color), shift in zip(COLORS.items(), shifts):
        first = np.array([runs[policy, n]["first_success"] for n in args.num_agents])  # [num_agents, S]
        medians = np.median(first, 1)
        bars = np.abs(interval(first.T, np.median) - medians)
        positions = np.array(args.num_agents) + shift
        axes.errorbar(positions, medians, bars, label=policy, color=color, marker="o", capsize=3)
    axes.axhline(args.total_timesteps, color="black", linewidth=0.5, linestyle=":")
    axes.set(yscale="log", ylabel="joint actions to the first success (median)")
    axes.set(xlabel="agents", xticks=args.num_agents)
    axes.legend()
    figure.savefig(path)


def plot_training(args: Args, runs: Runs, path: Path) -> None:
    """One run of each policy: every agent's density over training, and the final energy (of the central critic)."""
    n = max(args.num_agents)
    figure = Figure(figsize=(2.2 * (n + 1), 2.1 * len(LEARNED)), dpi=70, layout="tight")
    rows = figure.subplots(len(LEARNED), n + 1, squeeze=False, sharey=True)
    for row, policy in zip(rows, LEARNED):
        run = runs[policy, n]
        for agent in range(n):
            drawn = run["snapshots"][:, agent]  # [looks, 500]
            density = [np.histogram(actions, bins=50, range=(-1, 1), density=True)[0] for actions in drawn]
            extent = (args.total_timesteps * (1 - len(drawn) / 20), args.total_timesteps, -1, 1)
            row[agent].imshow(np.array(density).T, origin="lower", aspect="auto", extent=extent, vmax=3)
            row[agent].set(title=f"{policy}, agent {agent + 1}", xlabel="joint actions")
            row[agent].tick_params(labelsize=7)
            energy = run["energy"][agent]
            row[n].plot(energy - energy.max(), GRID, label=f"agent {agent + 1}")
        row[0].set(ylabel="action")
        row[n].set(title="energy at the end")
    figure.savefig(path)


def plot_nash_gap(args: Args, runs: Runs, path: Path) -> None:
    """What one agent could gain alone, over training: mean and interval over seeds, for every number of agents."""
    figure = Figure(figsize=(2.6 * len(args.num_agents), 2.8), dpi=90, layout="tight")
    (axes,) = figure.subplots(1, len(args.num_agents), squeeze=False, sharey=True)
    for n, plot in zip(args.num_agents, axes):
        for policy in LEARNED:
            gaps, looks = runs[policy, n]["gaps"], runs[policy, n]["looks"]  # [looks, S], [looks]
            plot.plot(looks, gaps.mean(1), color=COLORS[policy], label=policy)
            plot.fill_between(looks, *interval(gaps.T), color=COLORS[policy], alpha=0.2, linewidth=0)
        plot.set(title=f"{n} agents" if n > 1 else "1 agent", xlabel="joint actions")
    axes[0].set(ylabel="gain of the best response")
    axes[0].legend()
    figure.savefig(path)


# ------------------------------------------------------------------------------------ a known energy, without critic


def before_the_bonus(args: Args) -> Tensor:
    """Density [G] of the energy-based policy of an agent that knows its own payoff alone, at the target entropy.

    The critic's scale and the number of agents cancel against the temperature, so this holds for any N.
    """
    payoff = own_payoff(GRID)

    def excess(temperature: float) -> float:
        return (entropy_of(boltzmann(payoff, temperature)) - args.target_entropy).item()

    return boltzmann(payoff, brentq(excess, 1e-3, 1e3))


def gaussian_kl(density: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, before the tanh, of the tanh-Gaussian of least KL to a density [G] on GRID.

    The reverse KL, which the reparameterised gradient descends. Started right of 0, it finds the right-hand mode.
    """
    noise = np.random.default_rng(0).normal(size=4000)
    log_density = density.log().numpy()

    def kl(parameters: np.ndarray) -> float:
        mean, log_std = parameters
        u = noise * math.exp(log_std) + mean
        a = np.tanh(u)
        log_prob = -0.5 * ((u - mean) / math.exp(log_std)) ** 2 - log_std - np.log1p(-(a**2))
        return float(np.mean(log_prob - np.interp(a, GRID.numpy(), log_density)))

    mean, log_std = minimize(kl, GAUSSIAN_START, method="Nelder-Mead").x
    return mean, math.exp(log_std)


def fit_issm(args: Args, num_updates: int = 1000) -> DiffusionPolicy:
    """num_seeds denoisers trained by ISSM on the energy of before_the_bonus itself: no critic, a fixed temperature."""
    torch.manual_seed(args.seed)
    learner = Learner(args, "diffusion", 1)
    log_density = before_the_bonus(args).log()
    sigmas = torch.tensor(args.sigmas)
    for _ in range(num_updates):
        drawn = learner.policy.sample(args.actor_batch_size)
        candidates, log_proposal = propose_actions(drawn, sigmas, args.num_uniform, args.num_per_kernel)
        cells = ((candidates[..., 0] + 1) / 2 * len(GRID)).long().clamp(0, len(GRID) - 1)
        weights, _ = issm_weights(log_density[cells], log_proposal, torch.ones(len(candidates)))
        match_denoisers(learner, candidates, weights)
    return learner.policy


def chances(args: Args, fits: Tensor) -> dict[str, np.ndarray]:
    """Each policy's chance [K] to stand within the tolerance of +0.7 while it knows its own payoff alone.

    K is the number of equally likely outcomes: the fits of fit_issm, of which `fits` [K, B] are samples, and the two
    modes that the reverse KL may pick.
    """
    low, high = PEAK - args.tolerance, PEAK + args.tolerance
    density = before_the_bonus(args)
    mean, std = (value.item() for value in moments(density))
    kl_mean, kl_std = gaussian_kl(density)

    def between(low: float, high: float, mean: float, std: float) -> float:
        return norm.cdf(high, mean, std) - norm.cdf(low, mean, std)

    right_mode, left_mode = (between(math.atanh(low), math.atanh(high), sign * kl_mean, kl_std) for sign in (1, -1))
    return {
        "energy-based policy": density[(GRID > low) & (GRID < high)].sum(0, keepdim=True).numpy() * 2 / len(GRID),
        "its ISSM fit": ((fits - PEAK).abs() < args.tolerance).float().mean(1).numpy(),
        "Gaussian, its mean and deviation": np.array([between(low, high, mean, std)]),
        "Gaussian, least KL": np.array([right_mode, left_mode]),
        "uniform": np.array([args.tolerance]),
    }


def meeting(chance: np.ndarray, num_agents: int, tries: int = 1000) -> tuple[float, float]:
    """Chance to meet at +0.7 in one try, and in at least one of many, of a team that draws its agents from `chance`."""
    team = np.random.default_rng(0).choice(chance, (20_000, num_agents)).prod(1)
    return team.mean(), (1 - (1 - team) ** tries).mean()


def plot_exact(args: Args, path: Path) -> None:
    """What each policy class makes of the same energy, and the chance that N agents meet at +0.7: no learned critic."""
    figure = Figure(figsize=(12, 3.4), dpi=90, layout="tight")
    left, one, many = figure.subplots(1, 3)
    density = before_the_bonus(args)
    grid = GRID.numpy()
    left.plot(grid, density, color="black")
    fits = fit_issm(args).sample(4000)[..., 0]
    left.hist(fits.flatten().numpy(), bins=100, range=(-1, 1), density=True, color=COLORS["diffusion"], alpha=0.5)
    mean, std = (value.item() for value in moments(density))
    left.plot(grid, norm.pdf(grid, mean, std), color=COLORS["moments"])
    mean, std = gaussian_kl(density)
    left.plot(grid, norm.pdf(np.arctanh(grid), mean, std) / (1 - grid**2), color=COLORS["gaussian"])
    left.set(xlabel="action", ylabel="density")
    colors = ["black", COLORS["diffusion"], COLORS["moments"], COLORS["gaussian"], COLORS["uniform"]]
    ns = np.arange(1, 9)
    for (name, chance), color in zip(chances(args, fits).items(), colors):
        single, repeated = np.array([meeting(chance, n) for n in ns]).T
        one.plot(ns, single, marker="o", color=color)
        many.plot(ns, repeated, marker="o", color=color, label=name)
    one.set(yscale="log", title="all at +0.7, in one try")
    many.set(ylim=(-0.05, 1.05), title="at least once in 1,000 tries")
    for axes in (one, many):
        axes.set(xlabel="agents", xticks=ns)
    many.legend(fontsize=7)
    figure.savefig(path)


# ------------------------------------------------------------------------------------------- a known score, ISSM alone


def issm_error(dim: int, num_candidates: int, num_uniform: int, repeats: int = 400) -> tuple[float, float]:
    """Root mean squared error per dimension of ISSM's score, and the effective sample size.

    The target has two modes per dimension, a mixture of Gaussians at +-0.4 of deviation 0.12; its score at the noise
    level alpha_bar = 0.5 is known in closed form. Of the candidates num_uniform are uniform, the rest kernels of widths
    0.1 and 0.3 around a sample of the target.
    """
    alpha_bar = torch.tensor(0.5)
    variance = TARGET_STD**2
    sign = torch.randint(2, (2, 1, repeats, dim)) * 2.0 - 1
    anchor, x_0 = TARGET_MODE * sign + TARGET_STD * torch.randn(2, 1, repeats, dim)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * torch.randn_like(x_0)

    num_per_kernel = (num_candidates - num_uniform) // 2
    sigmas = torch.tensor([0.1, 0.3]) if num_per_kernel else torch.empty(0)
    candidates, log_proposal = propose_actions(anchor.clamp(-1, 1), sigmas, num_uniform, num_per_kernel)
    log_modes = (-((candidates - mode) ** 2) / (2 * variance) for mode in (-TARGET_MODE, TARGET_MODE))
    weights, _ = issm_weights(torch.logaddexp(*log_modes).sum(-1), log_proposal, torch.ones(1))
    denoised = issm_target(x_t[:, None], alpha_bar.expand(1, 1, repeats), candidates, weights)[:, 0]
    estimate = (alpha_bar.sqrt() * denoised - x_t) / (1 - alpha_bar)

    noisy_variance = alpha_bar * variance + 1 - alpha_bar  # of either mode of x_t
    noisy_modes = alpha_bar.sqrt() * torch.tensor([-TARGET_MODE, TARGET_MODE])
    share = (-((x_t[..., None] - noisy_modes) ** 2) / (2 * noisy_variance)).softmax(-1)
    score = ((noisy_modes - x_t[..., None]) / noisy_variance * share).sum(-1)
    return (estimate - score).square().mean().sqrt().item(), (1 / weights.square().sum(1)).mean().item()


def plot_issm(args: Args, path: Path) -> None:
    """Error of ISSM's score against the number of candidates, and the effective sample size against the dimension."""
    torch.manual_seed(args.seed)
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="tight")
    left, right = figure.subplots(1, 2)
    sizes = np.array([16, 64, 256, 1024, 4096])
    for dim in (1, 2, 4):
        errors = [issm_error(dim, size, size // 4)[0] for size in sizes]
        slope = np.polyfit(np.log(sizes[1:]), np.log(errors[1:]), 1)[0]
        left.loglog(sizes, errors, marker="o", label=f"d = {dim}, slope {slope:.2f}")
    left.set(xlabel="candidates M", ylabel="error of the score, per dimension")
    dims = [1, 2, 3, 4, 6, 9]
    for num_uniform, name in ((16, "uniform"), (8, "half uniform"), (4, "a quarter uniform"), (0, "kernels alone")):
        right.plot(dims, [issm_error(dim, 16, num_uniform)[1] for dim in dims], marker="o", label=name)
    right.set(xlabel="dimension of the action", ylabel="effective sample size of 16 candidates", xticks=dims)
    left.legend()
    right.legend()
    figure.savefig(path)


def draw(args: Args, folder: Path) -> None:
    """Train what the figures need, print the table and write all six to a folder. Raises RunError for bad arguments."""
    check_args(args)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    plot_exact(args, folder / "exact.png")
    plot_issm(args, folder / "issm.png")
    runs = {pair: watched(args, *pair) for pair in product(LEARNED, args.num_agents)}
    runs |= {("uniform", n): learn(args, "uniform", n) for n in args.num_agents}
    print_table(args, runs)
    plot_success(args, runs, COLORS, folder / "success.png")
    plot_first_success(args, runs, folder / "first_success.png")
    plot_training(args, runs, folder / "training.png")
    plot_nash_gap(args, runs, folder / "nash_gap.png")


def main() -> None:
    args = tyro.cli(Args, default=DEFAULTS, description=draw.__doc__)
    try:
        draw(args, ROOT / "benchmark" / "results" / "coordination")
    except RunError as error:
        raise SystemExit(f"ddpl_coordination_figures.py: error: {error}") from None


if __name__ == "__main__":
    main()
