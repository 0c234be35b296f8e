"""What world4rl.py imagined, what of it came true, and how far its world models can be trusted.

    python benchmark/run.py world4rl                                                # the runs
    python benchmark/world4rl_figures.py runs/benchmark/world4rl/*/*/runs/*         # fidelity.csv, figure and tables
    python benchmark/world4rl_figures.py                                            # from the CSVs: figure and tables

All of it is in benchmark/results/world4rl/: TASK/ARM_SEED.csv, the evaluations that run.py has collected; fidelity.csv,
the error of predictions over the horizon on 30 new episodes of the clone and 30 of random actions; world4rl.png. The
tables go to the standard output. Intervals are 95 % percentile bootstraps, seeds resampled within each task.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]

import comparison  # noqa: E402

import world4rl  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "world4rl"
EPISODES = 30
SAMPLES = 10  # of the future of each episode
AHEAD = (1, 5, 10, 25, 50, 75)
FRESH = ("4", "5")  # seeds on which nothing was chosen
MODES = ("stochastic", "deterministic")
STYLES = {"diffusion": "tab:blue", "mlp": "tab:orange", "simulator": "tab:gray"}


def restored(run_dir: Path) -> tuple:
    """Task and learner of a run."""
    args, checkpoint = world4rl.load_checkpoint("--evaluate", run_dir, world4rl.Args(), (), ())
    task = world4rl.make_task(args)
    learner = world4rl.Learner(args, task)
    world4rl.copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
    return task, learner


def fidelity(task, learner, who: str) -> tuple[np.ndarray, np.ndarray]:
    """Error of the mean prediction [T], and spread of the samples [T], both root mean squares in metres.

    Over the positions of hand and object. Predictions start at an episode's start and know its actions. A calibrated
    model's spread is as large as its error.
    """
    rng = np.random.default_rng(0)
    random = lambda state: rng.uniform(-1, 1, task.action_size)  # noqa: E731
    choose = random if who == "random" else world4rl.chooser(learner, learner.clone, deterministic=False)
    places = [place for thing in task.drawn.values() for place in thing]
    errors, spreads = [], []
    for seed in world4rl.episode_seeds(3, 0, 0, EPISODES):
        episode = world4rl.play_episode(task, int(seed), choose, learner.args.horizon, stop=False)
        imagined = world4rl.replay(learner, episode, SAMPLES)[..., places]
        errors.append((imagined.mean(0) - episode.states[:, places]).square().mean(1))
        spreads.append(imagined.var(0).mean(1))
    return torch.stack(errors).mean(0).sqrt().numpy(), torch.stack(spreads).mean(0).sqrt().numpy()


def measure(run_dirs: Sequence[Path]) -> None:
    """Write fidelity.csv."""
    rows = []
    for run_dir in run_dirs:
        torch.manual_seed(0)
        task, learner = restored(run_dir)
        args = learner.args
        if args.refine_in == "simulator":  # there is no model
            continue
        for who in ("clone", "random"):
            error, spread = fidelity(task, learner, who)
            run = {"task": args.env_id, "arm": args.world_model, "seed": args.seed, "actions": who}
            rows += [run | {"ahead": t, "error": f"{error[t]:.5f}", "spread": f"{spread[t]:.5f}"} for t in AHEAD]
        task.close()
    with open(RESULTS / "fidelity.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def curves(task: Path, arm: str, mode: str, column: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps [evaluations] of the first seed, and each seed's values [evaluations] of a column."""
    tables = {path.stem.rpartition("_")[2]: csv.DictReader(open(path)) for path in sorted(task.glob(f"{arm}_*.csv"))}
    chosen = {seed: [row for row in table if row["mode"] == mode] for seed, table in tables.items()}
    values = {seed: np.array([float(row[column] or "nan") for row in rows]) for seed, rows in chosen.items()}
    return np.array([int(row["global_step"]) for row in next(iter(chosen.values()))]), values


def arms(task: Path) -> list[str]:
    """Those of STYLES first."""
    found = {path.stem.rpartition("_")[0] for path in task.glob("*.csv")}
    return [arm for arm in STYLES if arm in found] + sorted(found.difference(STYLES))


def gain(task: Path, arm: str, mode: str) -> dict[str, float]:
    """What refinement has added to real success, of each seed."""
    _, real = curves(task, arm, mode, "success_rate")
    return {seed: rates[-1] - rates[0] for seed, rates in real.items()}


def less(one: dict[str, float], other: dict[str, float]) -> np.ndarray:
    """Differences of the seeds that both have."""
    return np.array([one[seed] - other[seed] for seed in one if seed in other])


def success_cells(task: Path, arm: str, mode: str) -> str:
    """Cells of a page: success of clone and refined policy, real and imagined, each seed; the gain of the real one."""
    both = [curves(task, arm, mode, column)[1].values() for column in ("success_rate", "imagined_success_rate")]
    cells = [" ".join(f"{rates[i]:.2f}" for rates in seeds) for seeds in both for i in (0, -1)]
    return f"| {' | '.join(cells)} | {with_interval([[*gain(task, arm, mode).values()]])} |"


def gains(tasks: Sequence[Path]) -> list[str]:
    """Rows of a page: every task, arm and way to play; arms that all tasks have over all of them; the two models."""
    rows = []
    shared = [arm for arm in STYLES if all(arm in arms(task) for task in tasks)]
    for mode in MODES:
        rows += [
            f"| {task.name}, {arm}, {mode} {success_cells(task, arm, mode)}" for task in tasks for arm in arms(task)
        ]
        every = {arm: [gain(task, arm, mode) for task in tasks] for arm in shared}
        for arm, found in every.items():
            overall = with_interval([[*seeds.values()] for seeds in found])
            rows.append(f"| **all {len(tasks)} tasks**, {arm}, {mode} | | | | | {overall} |")
            fresh = [[seeds[seed] for seed in FRESH if seed in seeds] for seeds in found]
            if all(fresh):
                rows.append(f"| seeds {' and '.join(FRESH)} alone, {arm}, {mode} | | | | | {with_interval(fresh)} |")
        if {"diffusion", "mlp"} <= every.keys():
            differences = with_interval([less(*pair) for pair in zip(every["diffusion"], every["mlp"])])
            rows.append(f"| diffusion less mlp, {mode} | | | | | {differences} |")
    return rows


def ablations(task: Path) -> list[str]:
    """Rows of a page: every arm and way to play; the last column is the gain less that of the defaults."""
    rows = []
    for mode in MODES:
        default = gain(RESULTS / task.name, "diffusion", mode)
        for arm in arms(task):
            difference = with_interval([less(gain(task, arm, mode), default)])
            rows.append(f"| {task.name}, {arm}, {mode} {success_cells(task, arm, mode)} {difference} |")
    return rows


def with_interval(values: Sequence[Sequence[float]]) -> str:
    """The mean over the seeds of several tasks, with its interval."""
    values = [np.array(seeds) for seeds in values]
    low, high = comparison.interval(comparison.resampled(values, 0).mean(1))
    return f"{np.concatenate(values).mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def errors(table: Sequence[dict], column: str, **chosen: str) -> np.ndarray:
    """Root mean squares over seeds [horizons] in millimetres."""
    rows = [row for row in table if all(row[name] == value for name, value in chosen.items())]
    values = [[float(row[column]) for row in rows if int(row["ahead"]) == t] for t in AHEAD]
    return 1000 * np.sqrt(np.mean(np.square(values), axis=1))


def plot(tasks: Sequence[Path], table: Sequence[dict]) -> None:
    """world4rl.png: a column a task; above real and imagined success, below the error of predictions."""
    _, panels = plt.subplots(2, len(tasks), figsize=(3.3 * len(tasks), 6), squeeze=False, sharey="row")
    for task, upper, lower in zip(tasks, *panels):
        for arm in arms(task):
            for column, style in (("success_rate", "-"), ("imagined_success_rate", "--")):
                steps, seeds = curves(task, arm, "stochastic", column)
                rates = np.stack([*seeds.values()])
                if np.isnan(rates).all():  # refined without a model
                    continue
                upper.plot(steps / 1000, rates.T, style, color=STYLES[arm], linewidth=0.5, alpha=0.4)
                label = f"{arm}, {'real' if style == '-' else 'imagined'}"
                upper.plot(steps / 1000, rates.mean(0), style, color=STYLES[arm], label=label)
        for arm in sorted({row["arm"] for row in table if row["task"] == task.name}):
            for who, style in (("clone", "-"), ("random", ":")):
                chosen = {"task": task.name, "arm": arm, "actions": who}
                lower.plot(AHEAD, errors(table, "error", **chosen), style, color=STYLES[arm], label=f"{arm}, {who}")
                if arm == "diffusion":
                    lower.plot(AHEAD, errors(table, "spread", **chosen), style, color=STYLES[arm], alpha=0.4)
        upper.set(title=task.name, xlabel="thousand steps of refinement", ylim=(0, 1))
        lower.set(xlabel="decisions predicted ahead", yscale="log")
        upper.locator_params(axis="x", nbins=5)
    panels[0, 0].set(ylabel="success")
    panels[1, 0].set(ylabel="error of positions in mm (pale: spread)")
    for row in panels:
        lines = {line.get_label(): line for ax in row for line in ax.get_lines() if line.get_label()[0] != "_"}
        row[0].legend(lines.values(), lines.keys(), fontsize=7)
    plt.tight_layout()
    plt.savefig(RESULTS / "world4rl.png", dpi=90)


def main(run_dirs: list[Path]) -> None:
    if run_dirs:
        measure(run_dirs)
    tasks = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    table = list(csv.DictReader(open(RESULTS / "fidelity.csv")))
    plot(tasks, table)
    print("| | clone, real | refined, real | clone, imagined | refined, imagined | gain |", *gains(tasks), sep="\n")
    for task in sorted(RESULTS.with_name("world4rl_ablations").glob("*")):
        print("\nAblations:", *ablations(task), sep="\n")
    print("\n| decisions ahead |", " | ".join(map(str, AHEAD)), "|")
    for name, arm, who in sorted({(row["task"], row["arm"], row["actions"]) for row in table}):
        cells = zip(*(errors(table, c, task=name, arm=arm, actions=who) for c in ("error", "spread")))
        print(f"| {name}, {arm}, {who} |", " | ".join(f"{e:.2g} ({s:.2g})" for e, s in cells), "|")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
