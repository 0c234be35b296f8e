"""Why diffusion policies, in figures: what happens inside the runs of ddpl_coordination.py, and what ISSM does alone.

    python benchmark/ddpl_coordination_figures.py

Takes the arguments of ddpl_coordination.py, with defaults of 24,000 joint actions and one to five agents. Writes to
benchmark/results/coordination/:

- training.png: one seed with the most agents, every agent's density over training and its energy at the end;
- nash_gap.png: what one agent could gain alone, over training;
- exact.png: what each policy class makes of the same known energy, without a learned critic;
- issm.png: the error of ISSM's score and the effective sample size, where the score is known.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize
from scipy.stats import norm
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpl_coordination import (  # noqa: E402
    COLORS,
    GRID,
    PEAK,
    Args,
    DiffusionPolicy,
    Learner,
    Policy,
    RunError,
    boltzmann,
    check_args,
    entropy_of,
    interval,
    issm_target,
    issm_weights,
    learn,
    match_denoisers,
    moments,
    nash_gap,
    own_payoff,
    propose_actions,
    require,
    run_all,
)

DEFAULTS = Args(total_timesteps=24_000, num_agents=(1, 2, 3, 4, 5), policies=("diffusion", "gaussian", "moments"))
GAUSSIAN_START = (0.8, -1.5)  # mean and log standard deviation before the tanh, right of 0
TARGET_MODE, TARGET_STD = 0.4, 0.12  # of issm_error

# ------------------------------------------------------------------------------------------------- inside the runs


def watched(args: Args, policy: Policy, num_agents: int) -> dict[str, np.ndarray]:
    """A run of ddpl_coordination.py as seen from inside.

    gaps [20, S]: Nash gaps over training. snapshots [20, N, 500]: actions of the first seed's agents over training.
    energy [N, G]: what each action is worth to them at the end, E[Q(a_i, a_-i)] on GRID.
    """
    gaps, snapshots, learners = [], [], []

    def watch(learner: Learner) -> None:
        device = learner.grid.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            joint = learner.joint(learner.policy.sample(500))
        gaps.append(nash_gap(joint[:, :100], args))
        snapshots.append(joint[0].T)
        learners[:] = [learner]

    outcomes = learn(args, policy, num_agents, watch)
    (learner,) = learners
    others = learner.policy.sample(200)
    candidates = learner.grid[:, None, None].expand(len(others), -1, 200, 1)
    energy = learner.score(others, candidates)[:num_agents].mean(2)
    seen = {"gaps": torch.stack(gaps), "snapshots": torch.stack(snapshots), "energy": energy}
    return outcomes | {name: values.cpu().numpy() for name, values in seen.items()}


def plot_training(args: Args, runs: dict[tuple[Policy, int], dict[str, np.ndarray]], path: Path) -> None:
    """One run of each policy: every agent's density over training, and the final energy (its local critic)."""
    n = max(args.num_agents)
    figure = Figure(figsize=(2.2 * (n + 1), 2.1 * len(args.policies)), dpi=70, layout="tight")
    rows = figure.subplots(len(args.policies), n + 1, squeeze=False, sharey=True)
    for row, policy in zip(rows, args.policies):
        run = runs[policy, n]
        for agent in range(n):
            drawn = run["snapshots"][:, agent]  # [20, 500]
            density = [np.histogram(actions, bins=50, range=(-1, 1), density=True)[0] for actions in drawn]
            extent = (0, args.total_timesteps, -1, 1)
            row[agent].imshow(np.array(density).T, origin="lower", aspect="auto", extent=extent, vmax=3)
            row[agent].set(title=f"{policy}, agent {agent + 1}", xlabel="joint actions")
            row[agent].tick_params(labelsize=7)
            energy = run["energy"][agent]
            row[n].plot(energy - energy.max(), GRID, label=f"agent {agent + 1}")
        row[0].set(ylabel="action")
        row[n].set(title="energy at the end")
    figure.savefig(path)


def plot_nash_gap(args: Args, runs: dict[tuple[Policy, int], dict[str, np.ndarray]], path: Path) -> None:
    """What one agent could gain alone, over training: mean and interval over seeds, for every number of agents."""
    figure = Figure(figsize=(2.6 * len(args.num_agents), 2.8), dpi=90, layout="tight")
    (axes,) = figure.subplots(1, len(args.num_agents), squeeze=False, sharey=True)
    for n, plot in zip(args.num_agents, axes):
        for policy in args.policies:
            gaps = runs[policy, n]["gaps"]  # [20, S]
            steps = np.linspace(0, args.total_timesteps, len(gaps) + 1)[1:]
            plot.plot(steps, gaps.mean(1), color=COLORS[policy], label=policy)
            plot.fill_between(steps, *interval(gaps.T), color=COLORS[policy], alpha=0.2, linewidth=0)
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
    for _ in range(num_updates):
        drawn = learner.policy.sample(args.actor_batch_size)
        candidates, log_proposal = propose_actions(drawn, learner.sigmas, args.num_uniform, args.num_per_kernel)
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
    """Train what the figures need and write all four to a folder. Raises RunError for bad arguments."""
    check_args(args)
    require(args, "policies", "uniform" not in args.policies, "policies that learn")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    plot_exact(args, folder / "exact.png")
    plot_issm(args, folder / "issm.png")
    runs = run_all(watched, args)
    plot_training(args, runs, folder / "training.png")
    plot_nash_gap(args, runs, folder / "nash_gap.png")


def main() -> None:
    args = tyro.cli(Args, default=DEFAULTS, description=draw.__doc__, config=(tyro.conf.OmitArgPrefixes,))
    try:
        draw(args, ROOT / "benchmark" / "results" / "coordination")
    except RunError as error:
        raise SystemExit(f"ddpl_coordination_figures.py: error: {error}") from None


if __name__ == "__main__":
    main()
