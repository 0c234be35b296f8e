"""Where bang-bang control stops paying: PPO's three heads on Pendulum-v1 as acting gets dearer.

    python benchmark/bang_bang_action_cost.py     # 81 runs in two processes, an hour

Writes benchmark/results/bang_bang/action_cost.csv (one row per head, form, cost and seed) and action_cost.png.
"""

import csv
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from os import chdir
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bang_bang import Args, train  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "bang_bang"
COSTS = (0.0, 0.001, 0.01, 0.1, 1.0)
COLORS = {"bernoulli": "tab:blue", "categorical": "tab:green", "gaussian": "tab:orange"}
SEEDS = (1, 2, 3)
# PPO needs a shorter horizon and more copies than its defaults here; the same for all heads.
SETTINGS = dict(total_timesteps=100_000, num_envs=4, num_steps=1024, gamma=0.9, learning_rate=1e-3)


def run(job: tuple[str, str, float, int]) -> dict:
    """Train one head at one cost; the last deterministic evaluation, as a row."""
    head, form, cost, seed = job
    with tempfile.TemporaryDirectory() as folder:
        chdir(folder)
        args = Args("Pendulum-v1", policy=head, action_cost=cost, action_cost_form=form, seed=seed, **SETTINGS)
        result = train(args)
        evaluation = list(csv.DictReader(open(Path(result["run_dir"]) / "evaluations.csv")))[-1]
        chdir(ROOT)
    names = ("return_mean", "return_without_cost", "saturation", "switching_rate")
    return {"head": head, "form": form, "cost": cost, "seed": seed} | {name: evaluation[name] for name in names}


def series(rows: list[dict], head: str, form: str, name: str) -> np.ndarray:
    """A column of one head's runs, [costs, seeds]. Where c is 0 it has no form: these count for both."""
    chosen = [row for row in rows if row["head"] == head and (row["form"] == form or not row["cost"])]
    return np.array([[float(row[name]) for row in chosen if row["cost"] == cost] for cost in COSTS])


def plot(rows: list[dict]) -> None:
    """Return and saturation against the cost, for both forms: mean over seeds, each seed as a dot."""
    figure = Figure(figsize=(9, 6), dpi=80, layout="tight")
    positions = np.arange(len(COSTS))
    for (form, name), axes in zip(product(("l1", "l2"), ("return_mean", "saturation")), figure.subplots(2, 2).flat):
        for head, color in COLORS.items():
            values = series(rows, head, form, name)
            axes.plot(positions, values.mean(1), color=color, marker="o", label=head)
            axes.plot(positions, values, ".", color=color, alpha=0.4)
        axes.set(xticks=positions, xticklabels=COSTS, xlabel=f"action cost ({form})", ylabel=name.removesuffix("_mean"))
    figure.axes[0].legend()
    figure.savefig(RESULTS / "action_cost.png")


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    # Where c is 0 it has no form. Pendulum-v1's own charge, 0.004 a^2, is in all of them.
    jobs = [job for job in product(COLORS, ("l1", "l2"), COSTS, SEEDS) if job[2] or job[1] == "l1"]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rows = list(pool.map(run, jobs))
    with open(RESULTS / "action_cost.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows)
    for form, head in product(("l1", "l2"), COLORS):
        returns, saturations = (series(rows, head, form, name) for name in ("return_mean", "saturation"))
        for cost, values, share in zip(COSTS, returns, saturations.mean(1)):
            print(f"{form} {cost:5} {head:11s} return {values.mean():8.1f} {values.round(1)}  saturation {share:.2f}")


if __name__ == "__main__":
    main()
