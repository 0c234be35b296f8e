"""What srvr_npg.py does on an MDP whose gradient and optimum are exact; and its curves on CartPole.

    python benchmark/srvr_npg_figures.py     # some ten minutes on one core; CartPole-v1 is drawn from its CSV files

Writes benchmark/results/srvr_npg/tabular.csv and srvr_npg.png. Intervals are 95 % percentile bootstraps over seeds.
"""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from srvr_npg import (  # noqa: E402
    Args,
    TabularTask,
    action_probs,
    effective_sample_size,
    exact_gradient,
    exact_return,
    new_learner,
    next_batch,
    optimal_return,
    trajectory_gradients,
    update,
)

RESULTS = ROOT / "benchmark" / "results" / "srvr_npg"
ALGORITHMS = {"pg": "tab:green", "npg": "tab:orange", "srvr-pg": "tab:purple", "srvr-npg": "tab:blue"}
SEEDS = 20
SETTINGS = dict(env_id="tabular", horizon=30, gamma=0.9, large_batch=25, small_batch=5, epoch_steps=5, damping=0.1)
TRAJECTORIES = 1_800  # of a run
RATES = {"pg": (0.1, 0.3, 1.0, 3.0), "npg": (0.03, 0.1, 0.3, 1.0)}  # four for each algorithm
TUNING_SEEDS = range(101, 103)  # apart from those of the results
CHECKPOINTS = np.unique(np.geomspace(45, TRAJECTORIES, 25).astype(int) // 45 * 45)


def interval(values: np.ndarray, statistic: Callable = np.mean, repeats: int = 2000) -> np.ndarray:
    """95 % percentile bootstrap [2, ...] of a statistic over the first axis, the seeds."""
    rows = np.random.default_rng(0).integers(len(values), size=(repeats, len(values)))
    return np.percentile(statistic(values[rows], axis=1), [2.5, 97.5], axis=0)


def row(quantity: str, x: float | str, values: np.ndarray, statistic: Callable = np.mean) -> dict:
    """A line of the CSV: a statistic over seeds and its interval."""
    low, high = interval(values, statistic)
    found = {"value": statistic(values), "low": low, "high": high, "count": len(values)}
    return {"quantity": quantity, "x": x} | {name: f"{value:.6g}" for name, value in found.items()}


def slopes(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The slope in log scale for each seed [seeds], of values [seeds, len(x)]."""
    return np.polyfit(np.log(x), np.log(values).T, 1)[0]


def gradients_of(task: TabularTask, played: Tensor, count: int, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean gradient [P], at the parameters that played or at others, and the logarithms of the last weights [count]."""
    batch = task.play(played, count, 0, 0)
    return mean_gradient(task, played, batch, at)


def mean_gradient(task: TabularTask, played: Tensor, batch, at: Tensor | None) -> tuple[Tensor, Tensor]:
    parameters, sampled = (played, None) if at is None else (at, played)
    gradients, log_weight = trajectory_gradients(task.policy, parameters, batch, task.args.gamma, "others", sampled)
    return gradients.mean(0), log_weight[:, -1]


def recursive_estimate(task: TabularTask, path: list[Tensor], large: int, small: int) -> Tensor:
    """u [P] at the end of a path of parameters that does not depend on it."""
    estimate, _ = gradients_of(task, path[0], large)
    for before, now in zip(path, path[1:]):
        batch = task.play(now, small, 0, 0)
        estimate = estimate + mean_gradient(task, now, batch, None)[0] - mean_gradient(task, now, batch, before)[0]
    return estimate


def measure_bias() -> list[dict]:
    """1. Distance of each estimator from the exact gradient over the number of trajectories."""
    task = TabularTask(Args(**SETTINGS), torch.device("cpu"))
    gamma, horizon = SETTINGS["gamma"], SETTINGS["horizon"]
    counts = np.array([10, 30, 100, 300, 1000, 3000])
    errors = {name: np.zeros((SEEDS, len(counts))) for name in ("g", "g_w", "recursion")}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        start, direction = torch.randn(2, task.policy.size, dtype=torch.float64)
        path = [start + 0.1 * k * direction / direction.norm() for k in range(4)]
        exact = [exact_gradient(task.mdp, theta, gamma, horizon) for theta in path]
        for i, count in enumerate(map(int, counts)):
            found = {
                "g": (gradients_of(task, start, count)[0], exact[0]),
                "g_w": (gradients_of(task, path[1], count, start)[0], exact[0]),
                "recursion": (recursive_estimate(task, path, count, count), exact[-1]),
            }
            for name, (estimate, truth) in found.items():
                errors[name][seed, i] = (estimate - truth).norm() / truth.norm()
    rows = []
    for name, values in errors.items():
        rows += [row(f"relative error of {name}", int(count), column) for count, column in zip(counts, values.T)]
        rows.append(row(f"relative error of {name}", "slope", slopes(counts, values)))
    return rows


def follow(algorithm: str, rate: float, seed: int, watch: Callable | None = None) -> np.ndarray:
    """Train on the MDP; J* - J without end at CHECKPOINTS [len], each after the last step that was played by then.

    `watch` sees each learner before and after a step.
    """
    args = Args(**SETTINGS, algorithm=algorithm, learning_rate=rate, seed=seed)
    torch.manual_seed(seed)
    task = TabularTask(args, torch.device("cpu"))
    learner = new_learner(task.policy)._replace(theta=torch.zeros(task.policy.size, dtype=torch.float64))
    optimum, played, gaps, reached = optimal_return(task.mdp, args.gamma), 0, [], []
    while played < TRAJECTORIES:
        count = next_batch(learner, args)
        batch = task.play(learner.theta, count, 0, 0)
        before, (learner, _) = learner, update(task.policy, learner, batch, args)
        if not learner.theta.isfinite().all():
            raise FloatingPointError(f"{algorithm} at rate {rate} with seed {seed}: theta is NaN")
        played += count
        if watch:
            watch(task, before, learner, batch)
        reached.append(played)
        gaps.append(optimum - float(exact_return(task.mdp, action_probs(task.mdp, learner.theta), args.gamma)))
    return np.array(gaps)[np.searchsorted(reached, CHECKPOINTS, side="right") - 1]


def measure_variance() -> list[dict]:
    """2. |u - grad J|^2 along runs of srvr-pg and srvr-npg, over that of as many trajectories a step from scratch.

    N + (m - 1) B = 45 trajectories in m = 5 steps are 9 a step. Both are measured at the same parameters.
    """
    rows = []
    for algorithm in ("srvr-pg", "srvr-npg"):
        for rate in RATES[algorithm.removeprefix("srvr-")]:
            ratios, sizes = [], []
            for seed in range(SEEDS):
                ours, theirs, ess = [], [], []

                def watch(task, before, after, batch, ours=ours, theirs=theirs, ess=ess):
                    exact = exact_gradient(task.mdp, before.theta, SETTINGS["gamma"], SETTINGS["horizon"])
                    ours.append(float((after.estimate - exact).square().sum()))
                    fresh, _ = gradients_of(task, before.theta, 9)
                    theirs.append(float((fresh - exact).square().sum()))
                    if len(batch.reward) == SETTINGS["small_batch"]:
                        _, log_weight = mean_gradient(task, before.theta, batch, before.before)
                        ess.append(float(effective_sample_size(log_weight)))

                shortened(lambda rate=rate, a=algorithm, s=seed, w=watch: follow(a, rate, s, w))
                ratios.append(np.mean(ours) / np.mean(theirs))
                sizes.append(np.mean(ess))
            rows.append(row(f"{algorithm}: error of u over that of 9 fresh trajectories", rate, np.array(ratios)))
            rows.append(row(f"{algorithm}: effective sample size", rate, np.array(sizes)))
    return rows


def shortened(function: Callable) -> None:
    """With a quarter of the trajectories, when the gradient is still large."""
    global TRAJECTORIES, CHECKPOINTS
    before = TRAJECTORIES, CHECKPOINTS
    TRAJECTORIES, CHECKPOINTS = 450, np.array([45])
    try:
        function()
    finally:
        TRAJECTORIES, CHECKPOINTS = before


def measure_gaps() -> list[dict]:
    """3. J* - J over trajectories at each algorithm's best rate of four, chosen with other seeds."""
    rows, gaps = [], {}
    for algorithm in ALGORITHMS:
        rates = RATES[algorithm.removeprefix("srvr-")]
        tuning = [np.array([follow(algorithm, rate, seed)[-1] for seed in TUNING_SEEDS]) for rate in rates]
        rows += [row(f"{algorithm}: tuning, last J* - J", rate, values) for rate, values in zip(rates, tuning)]
        best = rates[int(np.argmin([values.mean() for values in tuning]))]
        gaps[algorithm] = np.array([follow(algorithm, best, seed) for seed in range(SEEDS)])
        print(f"{algorithm}: rate {best}, last J* - J {gaps[algorithm][:, -1].mean():.4f}", flush=True)
        rows += [row(f"{algorithm}: J* - J", int(x), column) for x, column in zip(CHECKPOINTS, gaps[algorithm].T)]
        late = CHECKPOINTS >= TRAJECTORIES / 8
        rows.append(row(f"{algorithm}: J* - J", "slope", slopes(CHECKPOINTS[late], gaps[algorithm][:, late])))
        rows.append(row(f"{algorithm}: J* - J, median", TRAJECTORIES, gaps[algorithm][:, -1], np.median))
    for one, other in (("srvr-pg", "pg"), ("srvr-npg", "npg"), ("npg", "pg"), ("srvr-npg", "srvr-pg")):
        difference = gaps[one][:, -1] - gaps[other][:, -1]
        rows.append(row(f"last J* - J: {one} minus {other}", TRAJECTORIES, difference))
    return rows


def cartpole(algorithm: str, mode: str = "stochastic") -> tuple[np.ndarray, np.ndarray]:
    """Trajectories [evaluations] and returns [seeds, evaluations] of the collected runs; empty if there are none."""
    tables = [list(csv.DictReader(open(path))) for path in sorted(RESULTS.glob(f"CartPole-v1/{algorithm}_*.csv"))]
    curves = [[line for line in table if line["mode"] == mode] for table in tables]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    returns = np.array([[float(line["return_mean"]) for line in curve] for curve in curves])
    return np.array([int(line["trajectories"]) for line in curves[0]]), returns


def plot(rows: list[dict], path: Path) -> None:
    """Errors over trajectories, error ratio and effective sample size over the rate, gaps, CartPole."""
    figure = Figure(figsize=(10, 7.5), dpi=100, layout="tight")
    errors, variance, gaps, poles = figure.subplots(2, 2).flat

    def line(axis, quantity: str, label: str, color: str, **style) -> None:
        ours = [line for line in rows if line["quantity"] == quantity and line["x"] != "slope"]
        x, value, low, high = (np.array([float(line[name]) for line in ours]) for name in ("x", "value", "low", "high"))
        axis.plot(x, value, label=label, color=color, **style)
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)

    for name, color in (("g", "tab:green"), ("g_w", "tab:orange"), ("recursion", "tab:blue")):
        line(errors, f"relative error of {name}", name, color, marker="o", markersize=3)
    errors.set(xscale="log", yscale="log", xlabel="trajectories", ylabel="|estimate - grad J| / |grad J|")
    share = variance.twinx()
    for algorithm in ("srvr-pg", "srvr-npg"):
        color, name = ALGORITHMS[algorithm], f"{algorithm}: error of u over that of 9 fresh trajectories"
        line(variance, name, algorithm, color, marker="o", markersize=3)
        line(share, f"{algorithm}: effective sample size", "", color, linestyle=":")
    variance.axhline(1, color="black", linewidth=0.5)
    variance.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="squared error, recursion over fresh")
    share.set(ylim=(0, 1.05), ylabel="effective sample size (dotted)")
    for algorithm, color in ALGORITHMS.items():
        line(gaps, f"{algorithm}: J* - J", algorithm, color)
        x, returns = cartpole(algorithm)
        if len(returns):
            poles.plot(x, returns.mean(0), color=color, label=f"{algorithm} ({len(returns)} seeds)")
            poles.fill_between(x, *interval(returns), color=color, alpha=0.15, linewidth=0)
    gaps.set(xscale="log", yscale="log", xlabel="trajectories", ylabel="J* - J")
    poles.set(xlabel="trajectories", ylabel="return on CartPole-v1", ylim=(0, 520))
    for axis in (errors, variance, gaps, poles):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, loc="lower right" if axis in (variance, poles) else "best")
    figure.savefig(path)


def main() -> None:
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "tabular.csv"
    if "--plot" in sys.argv and path.exists():
        rows = list(csv.DictReader(open(path)))
    else:
        rows = measure_bias() + measure_gaps() + measure_variance()
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    plot(rows, RESULTS / "srvr_npg.png")
    for line in rows:
        print(f"{line['quantity']:60} {line['x']:>8}  {line['value']} [{line['low']}, {line['high']}]")


if __name__ == "__main__":
    main()
