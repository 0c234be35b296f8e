"""The tables of docs/srvr_npg.md on CartPole-v1 and MountainCarContinuous-v0, from the CSV files of benchmark/run.py.

    python benchmark/srvr_npg_tables.py

Final returns, deterministic and sampled, the mean of all evaluations of sampled play, and differences, each with a 95 %
percentile bootstrap over ten seeds. A run that stopped before its end has no file and counts as the worst possible.
"""

import csv
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "srvr_npg"
ALGORITHMS = ("pg", "npg", "srvr-pg", "srvr-npg")
PAIRS = (("npg", "pg"), ("srvr-pg", "pg"), ("srvr-npg", "npg"))
SEEDS = range(1, 11)
WORST = {"CartPole-v1": 0.0, "MountainCarContinuous-v0": -99.9}


def returns(task: str, algorithm: str, mode: str) -> np.ndarray:
    """[seeds, evaluations]"""
    curves = {}
    for seed in SEEDS:
        path = RESULTS / task / f"{algorithm}_{seed}.csv"
        if path.exists():
            curves[seed] = [float(row["return_mean"]) for row in csv.DictReader(open(path)) if row["mode"] == mode]
    length = len(next(iter(curves.values())))
    return np.array([curves.get(seed, [WORST[task]] * length) for seed in SEEDS])


def bootstrap(values: np.ndarray, seed: int) -> np.ndarray:
    """Means [10,000] of resampled seeds."""
    return np.random.default_rng(seed).choice(values, (10_000, len(values))).mean(1)


def estimate(mean: float, means: np.ndarray) -> str:
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


MEASURES: dict[str, Callable] = {
    "deterministic": lambda task, algorithm: returns(task, algorithm, "deterministic")[:, -1],
    "sampled": lambda task, algorithm: returns(task, algorithm, "stochastic")[:, -1],
    "sampled, mean of evaluations": lambda task, algorithm: returns(task, algorithm, "stochastic").mean(1),
}


def main() -> None:
    for task in WORST:
        print(f"\n{task}\n| | {' | '.join(MEASURES)} |\n{'|---' * (1 + len(MEASURES))}|")
        values = {pair: MEASURES[pair[1]](task, pair[0]) for pair in product(ALGORITHMS, MEASURES)}
        for algorithm in ALGORITHMS:
            cells = [estimate(x.mean(), bootstrap(x, 0)) for x in (values[algorithm, name] for name in MEASURES)]
            print(f"| {algorithm} | {' | '.join(cells)} |")
        for one, other in PAIRS:
            cells = []
            for name in MEASURES:
                x, y = values[one, name], values[other, name]
                cells.append(estimate(x.mean() - y.mean(), bootstrap(x, 0) - bootstrap(y, 1)))
            print(f"| {one} minus {other} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
