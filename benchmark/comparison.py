"""Two policies over many tasks: interquartile means, probability of improvement, one figure of all tasks.

After Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021. Intervals
are 95 % percentile bootstraps, stratified: seeds are resampled within each task. With 3 to 5 seeds they are, if
anything, too narrow.

A return x becomes (x - random) / (reference - random): 0 is uniformly random play (random.csv), 1 the mean of all final
teams of that task, of both policies. Win and success rates are what they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import trim_mean

REPEATS = 10_000


@dataclass
class Task:
    """Final scores, a value a seed, of two policies on one task."""

    name: str
    ours: np.ndarray
    theirs: np.ndarray

    def normalised(self, random: float) -> "Task":
        """The scores where random play has 0 and the mean of all final teams 1."""
        scale = np.concatenate([self.ours, self.theirs]).mean() - random
        return Task(self.name, (self.ours - random) / scale, (self.theirs - random) / scale)


def resampled(scores: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Bootstrap samples [REPEATS, all seeds] of the scores of several tasks, drawn within each task."""
    generator = np.random.default_rng(seed)
    draws = [values[generator.integers(len(values), size=(REPEATS, len(values)))] for values in scores]
    return np.concatenate(draws, axis=1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean of the middle half."""
    return trim_mean(scores, 0.25, axis=-1)


def mean_of_seeds(scores: np.ndarray) -> np.ndarray:
    return scores.mean(-1)


def difference(tasks: Sequence[Task], statistic: Callable[[np.ndarray], np.ndarray] = iqm) -> tuple[float, np.ndarray]:
    """The statistic of ours minus that of theirs over all seeds of these tasks, and its interval [2]."""
    ours, theirs = [task.ours for task in tasks], [task.theirs for task in tasks]
    samples = statistic(resampled(ours, 0)) - statistic(resampled(theirs, 1))
    return float(statistic(np.concatenate(ours)) - statistic(np.concatenate(theirs))), interval(samples)


def improvement(tasks: Sequence[Task]) -> tuple[float, np.ndarray]:
    """Probability that a seed of ours beats one of theirs, mean over tasks, ties as half; and its interval [2]."""
    means = [wins(task.ours[None], task.theirs[None])[0] for task in tasks]
    samples = [wins(resampled([task.ours], 2 * i), resampled([task.theirs], 2 * i + 1)) for i, task in enumerate(tasks)]
    return float(np.mean(means)), interval(np.mean(samples, axis=0))


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share [K] of pairs in which ours [K, N] is larger than theirs [K, M]; ties count half."""
    pairs = ours[:, :, None] - theirs[:, None]
    return ((pairs > 0) + 0.5 * (pairs == 0)).mean((1, 2))


def interval(samples: np.ndarray) -> np.ndarray:
    return np.percentile(samples, [2.5, 97.5], axis=0)


def verdict(tasks: Sequence[Task]) -> str:
    """What may be claimed: only what both intervals agree on."""
    (_, (low, high)), (_, (rarely, often)) = difference(tasks), improvement(tasks)
    if low > 0 and rarely > 0.5:
        return "ahead"
    return "behind" if high < 0 and often < 0.5 else "no difference to be told"


def table(groups: dict[str, Sequence[Task]]) -> list[str]:
    """Rows of a Markdown table, one for each group of tasks."""
    rows = [
        "| | tasks | runs | IQM, diffusion | IQM, Gaussian | difference | P(diffusion > Gaussian) | diffusion is |",
        "|---" * 8 + "|",
    ]
    for name, tasks in groups.items():
        cells = [f"{len(tasks)}", f"{sum(len(task.ours) + len(task.theirs) for task in tasks)}"]
        for scores in ([task.ours for task in tasks], [task.theirs for task in tasks]):
            low, high = interval(iqm(resampled(scores, 0)))
            cells.append(f"{iqm(np.concatenate(scores)):.2f} [{low:.2f}, {high:.2f}]")
        for (mean, (low, high)), sign in ((difference(tasks), "+"), (improvement(tasks), "")):
            cells.append(f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]")
        rows.append(f"| {name} | {' | '.join(cells)} | {verdict(tasks)} |")
    return rows


def plot(path: Path, groups: dict[str, Sequence[Task]]) -> None:
    """One line a task, and one a group of them: the difference of the normalised scores with its interval."""
    lines = []
    for name, tasks in groups.items():
        if len(tasks) > 1 or name != tasks[0].name:
            lines.append((name, "black", difference(tasks)))
        if name != "all":
            lines += [
                (f"{task.name} ({len(task.ours)})", "tab:blue", difference([task], mean_of_seeds)) for task in tasks
            ]
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(lines) + 1), dpi=100)
    lines.reverse()  # the first stands at the top
    for row, (_, color, (mean, (low, high))) in enumerate(lines):
        axes.plot([low, high], [row, row], color=color, linewidth=2 if color == "black" else 1.2)
        axes.plot(mean, row, "D" if color == "black" else "o", color=color, markersize=5)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(lines)), [name for name, *_ in lines])
    axes.set_xlabel("difference of normalised scores (right: diffusion ahead)")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
