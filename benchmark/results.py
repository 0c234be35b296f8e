"""Collect finished runs into benchmark/results/<benchmark>/, plot them and print the pages' tables.

    python benchmark/results.py runs     # take the finished runs below runs/ that are not there yet
    python benchmark/results.py          # only plot and print what is collected

Intervals are 95 % percentile bootstraps over seeds; with 3 to 5 seeds they are, if anything, too narrow.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import comparison  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parent / "results"
SCRIPTS = ("ddpl_mpe", "ddpl_mamujoco", "ddpl_smax_jax", "ddpl_isaaclab", "qvpo", "sac", "bang_bang")
ARMS = {  # benchmark: its arms, the first of which is compared with the last
    "mpe": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "mpe_long": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "mpe_flat": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "mpe_flat_long": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "mamujoco": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "mamujoco_long": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "control": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "smax": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "smax_before": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "isaaclab": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "isaaclab_longer": {"diffusion": "tab:blue", "gaussian": "tab:orange"},
    "qvpo": {"qvpo": "tab:blue", "sac": "tab:orange"},
    "bang_bang": {"bernoulli": "tab:blue", "categorical": "tab:green", "gaussian": "tab:orange"},
}

HASAC = {
    "hasac": ("hasac", "tab:green"),
    "hasac-our-temperature": ("hasac", "tab:red"),
    "hasac-our-observations": ("hasac", "tab:purple"),
    "hasac-ours": ("hasac", "tab:brown"),  # both
}
PEERS = {  # benchmark: other people's arms, the benchmark where they are kept under the same tasks, their colours
    "mpe_long": HASAC,
    "mamujoco": HASAC,
    "isaaclab": {"mappo": ("isaaclab_mappo", "gray")},
}

# What a benchmark is judged by, if not by the return
SCORES = dict.fromkeys(("smax", "smax_before", "smax_whole"), "win_rate")
SCORES |= dict.fromkeys(("isaaclab", "isaaclab_longer", "isaaclab_mappo"), "success_rate")


def place(args: dict) -> tuple[str, str, str]:
    """Benchmark, task and arm of a run with these arguments."""
    if args["script"] == "ddpl_mamujoco":
        return "mamujoco", f"{args['scenario']}_{args['agent_conf'].replace('|', '-')}", args["policy"]
    if args["script"] == "ddpl_smax_jax":
        budget = "" if args["total_timesteps"] == 200_000 else f"_{args['total_timesteps']}_steps"
        return "smax", args["map_name"] + budget, args["policy"] + ("-raw" if args["raw_actions"] else "")
    if args["script"] == "ddpl_isaaclab":
        return "isaaclab", args["task"].rpartition(":")[2], args["policy"]
    task = args["env_id"].rpartition(":")[2].replace("/", "-")
    if args["script"] == "ddpl_mpe":
        return "mpe", task + (f"_N{args['num_agents'] or 3}" if task == "simple_spread_v3" else ""), args["policy"]
    if args["script"] == "bang_bang":
        squash = "-tanh" if args["squash"] == "tanh" else ""
        entropy = f"-entropy{args['ent_coef']}" if args["ent_coef"] else ""
        several = args["num_envs"] > 1 and task.startswith("dm_control")  # Pendulum's table has four for every head
        copies = f"-{args['num_envs']}-copies" if several else ""
        return "bang_bang", task, args["policy"] + squash + entropy + copies
    return "qvpo", task, args["script"] + ("-bfloat16" if args.get("bfloat16") else "")


def collect(runs: Path) -> None:
    """Copy evaluations.csv of every finished run to RESULTS/<benchmark>/<task>/<arm>_<seed>.csv.

    A file that is there already stays. A run of several seeds becomes several files. Where there is a TensorBoard
    scalar policy/spread, the mean of its last ten points fills a last column.
    """
    for result in sorted(runs.glob("*/result.json")):
        args = json.loads((result.parent / "args.json").read_text())
        if args["script"] not in SCRIPTS:
            continue
        benchmark, task, arm = place(args)
        folder = RESULTS / benchmark / task
        folder.mkdir(parents=True, exist_ok=True)
        events = EventAccumulator(str(result.parent))
        events.Reload()
        header, *rows = (result.parent / "evaluations.csv").read_text().splitlines()
        if "policy/spread" in events.Tags()["scalars"]:
            spread = np.mean([point.value for point in events.Scalars("policy/spread")[-10:]])
            header, rows = f"{header},final_spread", [f"{row},{spread:.3f}" for row in rows]
        by_seed = {str(args["seed"]): rows}
        if "seed" in header.split(","):
            column = header.split(",").index("seed")
            seeds = dict.fromkeys(row.split(",")[column] for row in rows)
            by_seed = {seed: [row for row in rows if row.split(",")[column] == seed] for seed in seeds}
        for seed, rows in by_seed.items():
            path = folder / f"{arm}_{seed}.csv"
            if path.exists():  # maybe with an origin, or from another budget
                print(f"{path} stays as it is; remove it to take {result.parent}")
            else:
                path.write_text("\n".join([header, *rows]) + "\n")


def tasks_of(benchmark: str) -> list[Path]:
    """The folders of a benchmark's tasks of which every arm that is compared has results."""
    found = []
    for task in sorted(path for path in (RESULTS / benchmark).glob("*") if path.is_dir()):
        missing = [arm for arm in ARMS.get(benchmark, ()) if not list(task.glob(f"{arm}_[0-9]*.csv"))]
        if missing:
            print(f"{benchmark}/{task.name} is left out: no results of {', '.join(missing)}")
        else:
            found.append(task)
    return found


def arms_of(task: Path) -> dict[str, tuple[Path, str]]:
    """Folder and colour of every arm to plot: ours and, where they were run on this task, other people's."""
    arms = {arm: (task, color) for arm, color in ARMS[task.parent.name].items()}
    for arm, (benchmark, color) in PEERS.get(task.parent.name, {}).items():
        if list((RESULTS / benchmark / task.name).glob(f"{arm}_*.csv")):
            arms[arm] = (RESULTS / benchmark / task.name, color)
    return arms


def load(task: Path, arm: str, mode: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Steps [evaluations], scores [seeds, evaluations], and the seeds' mean minutes and final spread (or saturation).

    The latter is NaN where neither was recorded.
    """
    tables = [list(csv.DictReader(open(path))) for path in sorted(task.glob(f"{arm}_*.csv"))]
    curves = [[row for row in table if row["mode"] == mode] for table in tables]
    score = SCORES.get(task.parent.name, "return_mean")
    scores = np.array([[float(row[score]) for row in curve] for curve in curves])
    minutes = np.mean([float(table[-1]["seconds"]) for table in tables]) / 60
    spreads = [curve[-1].get("final_spread") or curve[-1].get("saturation") or "nan" for curve in curves]
    steps = np.array([int(row["global_step"]) for row in curves[0]])
    return steps, scores, minutes, np.mean([float(spread) for spread in spreads])


def bootstrap(values: np.ndarray, repeats: int = 10_000) -> np.ndarray:
    """Means [repeats, ...] of resampled seeds, the first axis of values."""
    rows = np.random.default_rng(0).integers(len(values), size=(repeats, len(values)))
    return values[rows].mean(1)


def interval(samples: np.ndarray) -> np.ndarray:
    return np.percentile(samples, [2.5, 97.5], axis=0)


def plot(task: Path) -> None:
    """<task>.png: mean and interval over seeds of the deterministic scores, each seed as a thin line."""
    figure, axes = plt.subplots(figsize=(5, 3.2), dpi=100)
    for arm, (folder, color) in arms_of(task).items():
        steps, scores, *_ = load(folder, arm, "deterministic")
        axes.plot(steps / 1000, scores.T, color=color, linewidth=0.5, alpha=0.4)
        axes.plot(steps / 1000, scores.mean(0), color=color, label=f"{arm} ({len(scores)} seeds)")
        axes.fill_between(steps / 1000, *interval(bootstrap(scores)), color=color, alpha=0.2, linewidth=0)
    if task.parent.name.startswith("smax"):
        for rates in ippo_curves(task.name):
            upto = rates[:, 0] <= steps[-1]
            axes.plot(*(rates[upto] / (1000, 1)).T, color="gray", linewidth=0.7, label="IPPO, discrete, one seed")
    score = SCORES.get(task.parent.name, "return").replace("_", " ")
    axes.set(title=task.name, xlabel="thousand environment steps", ylabel=score)
    lines = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    axes.legend(lines.values(), lines.keys())
    figure.tight_layout()
    figure.savefig(task.with_name(f"{task.name}.png"))
    plt.close(figure)


def ippo_curves(map_name: str, window: int = 40_000) -> list[np.ndarray]:
    """Steps and win rates [windows, 2] of each seed of the package's IPPO in training, means over `window` steps."""
    with open(RESULTS / "smax" / "ippo.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["map"] == map_name]
    curves = []
    for seed in sorted({row["seed"] for row in rows}):
        points = np.array([(int(r["global_step"]), float(r["win_rate"])) for r in rows if r["seed"] == seed])
        ends = np.arange(window, points[-1, 0], window)
        means = [points[(points[:, 0] > end - window) & (points[:, 0] <= end), 1].mean() for end in ends]
        curves.append(np.stack([ends, means], axis=1))
    return curves


def table_rows(task: Path) -> list[str]:
    """The rows of a page of one task: final scores of every seed, their mean and interval, and the difference.

    The difference is that of the first and the last arm of ARMS; others, ours or other people's, follow behind.
    """
    rows, final = [], {}
    arms = list(ARMS[task.parent.name])
    others = {path.stem.rpartition("_")[0]: task for path in sorted(task.glob("*.csv"))}
    folders = others | {arm: folder for arm, (folder, _) in arms_of(task).items()}
    for arm in [*arms, *(other for other in folders if other not in arms)]:
        cells, spreads = [], []
        for mode in ("deterministic", "stochastic"):
            _, scores, minutes, spread = load(folders[arm], arm, mode)
            final[arm, mode] = scores[:, -1]
            low, high = interval(bootstrap(scores[:, -1]))
            cells.append(f"{scores[:, -1].mean():.2f} [{low:.2f}, {high:.2f}]")
            spreads.append("" if np.isnan(spread) else f"{spread:.2f}")
        digits = 2 if task.parent.name in SCORES else 1
        seeds = " ".join(f"{value:.{digits}f}" for value in final[arm, "deterministic"])
        spread = ", ".join(dict.fromkeys(spreads))  # a saturation is that of one way to play, a spread of the policy
        rows.append(f"| {task.name} | {arm} | {cells[0]} | {cells[1]} | {seeds} | {spread} | {minutes:.1f} |")
    ours, theirs = final[arms[0], "deterministic"], final[arms[-1], "deterministic"]
    # Resampled with different numbers: the seeds of the two policies are not paired.
    difference = bootstrap(ours) - np.random.default_rng(1).permutation(bootstrap(theirs))
    low, high = interval(difference)
    rows.insert(len(arms), f"| | difference | {ours.mean() - theirs.mean():+.2f} [{low:+.2f}, {high:+.2f}] | | | | |")
    return rows


def ablation_rows(task: Path, defaults: Path) -> list[str]:
    """The rows of a page: deterministic scores of every arm at its end, and less those of the defaults at that step.

    An arm is named <policy>-<what is changed>; the defaults are all seeds of that policy, maybe in the same folder.
    """
    rows = []
    for arm in sorted({path.stem.rpartition("_")[0] for path in task.glob("*-*_*.csv")}):
        steps, scores, *_ = load(task, arm, "deterministic")
        default_steps, default_scores, *_ = load(defaults, arm.partition("-")[0], "deterministic")
        changed = scores[:, -1]
        default = default_scores[:, default_steps.tolist().index(steps[-1])]
        low, high = interval(bootstrap(changed) - np.random.default_rng(1).permutation(bootstrap(default)))
        each = [" ".join(f"{score:.2f}" for score in values) for values in (changed, default)]
        difference = f"{changed.mean() - default.mean():+.2f} [{low:+.2f}, {high:+.2f}]"
        beside = defaults.parent.name
        rows.append(f"| {task.name} | {arm} | {beside} | {steps[-1]:,} | {each[0]} | {each[1]} | {difference} |")
    return rows


def plot_success(task: Path) -> None:
    """<task>.png: success of the deterministic policies against frames and against seconds, a line per seed."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), dpi=100, sharey=True)
    for axes, column in zip(panels, ("global_step", "seconds")):
        for arm, (folder, color) in arms_of(task).items():
            _, rates, *_ = load(folder, arm, "deterministic")
            tables = [csv.DictReader(open(path)) for path in sorted(folder.glob(f"{arm}_*.csv"))]
            when = np.array([[float(r[column]) for r in table if r["mode"] == "deterministic"] for table in tables])
            label = f"{'skrl, MAPPO' if arm == 'mappo' else arm}, mean of {len(rates)} seeds"
            axes.plot(when.T, rates.T, color=color, linewidth=0.7, alpha=0.5)
            axes.plot(when.mean(0), rates.mean(0), color=color, label=label)
        axes.set(xlabel={"global_step": "frames", "seconds": "seconds"}[column], xlim=(0, None), ylim=(0, 1.05))
    panels[0].set(title=task.name, ylabel="success rate")
    panels[0].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(task.with_name(f"{task.name}.png"))
    plt.close(figure)


def success_rows(task: Path) -> list[str]:
    """The rows of a page: final success of every seed with mean, interval and difference; frames until 0.99.

    The difference is that of the two policies; MAPPO, whose budget is another, follows behind.
    """
    rows, final = [], {}
    for arm, (folder, _) in arms_of(task).items():
        for mode in ("deterministic", "stochastic"):
            steps, rates, *_ = load(folder, arm, mode)
            final[arm, mode] = rates[:, -1]
            frames = [f"{steps[curve >= 0.99][0] / 1000:.0f}k" if (curve >= 0.99).any() else "-" for curve in rates]
            low, high = interval(bootstrap(final[arm, mode]))
            mean = f"{final[arm, mode].mean():.3f} [{low:.3f}, {high:.3f}]"
            each = " ".join(f"{rate:.3f}" for rate in final[arm, mode])
            rows.append(f"| {arm}, {mode} | {mean} | {each} | {' '.join(frames)} |")
    differences = []
    for mode in ("deterministic", "stochastic"):
        ours, theirs = (final[arm, mode] for arm in ARMS["isaaclab"])
        low, high = interval(bootstrap(ours) - np.random.default_rng(1).permutation(bootstrap(theirs)))
        cell = f"{ours.mean() - theirs.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        differences.append(f"| difference, {mode} | {cell} | | |")
    of_ours = 2 * len(ARMS["isaaclab"])
    return rows[:of_ours] + differences + rows[of_ours:]


def compared() -> dict[str, list[comparison.Task]]:
    """The tasks on which diffusion and Gaussian policies are compared, by benchmark, and all of them.

    A task that was also run with the longer budget (<benchmark>_long), with as many seeds, counts with that one alone;
    one with fewer than three seeds of either policy does not count.
    """
    zeros = {row["task"]: float(row["return_mean"]) for row in csv.DictReader(open(RESULTS / "random.csv"))}
    groups = {}
    for benchmark in ("mpe", "mamujoco", "smax", "isaaclab"):
        tasks = []
        longer = {task.name: task for task in tasks_of(f"{benchmark}_long")}
        for folder in tasks_of(benchmark):
            long = longer.get(folder.name)
            if long and len(list(long.glob("*_[0-9]*.csv"))) >= len(list(folder.glob("*_[0-9]*.csv"))):
                folder = long
            finals = [load(folder, arm, "deterministic")[1][:, -1] for arm in ("diffusion", "gaussian")]
            if min(map(len, finals)) < 3:
                print(f"{benchmark}/{folder.name} is not compared: fewer than three seeds")
                continue
            task = comparison.Task(folder.name, *finals)
            if benchmark not in SCORES:
                task = task.normalised(zeros[f"{folder.parent.name}/{folder.name}"])
            tasks.append(task)
        if tasks:
            groups[benchmark] = tasks
    return groups | {"all": [task for tasks in groups.values() for task in tasks]}


def report() -> None:
    """Draw the plots and print the tables of all that is collected."""
    groups = compared()
    comparison.plot(RESULTS / "comparison.png", groups)
    print("\n".join(comparison.table(groups)), end="\n\n")
    for benchmark in (name for name in ARMS if list((RESULTS / name).glob("*/*.csv"))):
        if benchmark.startswith("isaaclab"):
            print("| policy | final success rate | each seed | frames until 0.99, each seed |\n|---|---|---|---|")
            for task in tasks_of(benchmark):
                plot_success(task)
                print("\n".join(success_rows(task)), end="\n\n")
            continue
        score = SCORES.get(benchmark, "return").replace("_", " ")
        columns = ["task", "policy", f"deterministic {score}", f"stochastic {score}", "deterministic, each seed"]
        columns += ["saturation" if benchmark == "bang_bang" else "spread", "minutes"]
        print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for task in tasks_of(benchmark):
            plot(task)
            print("\n".join(table_rows(task)))
        print()
    columns = "task", "arm", "beside", "steps", "each seed", "the defaults, each seed", "difference"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for ablations, defaults in ("mpe_ablations", "mpe"), ("smax_whole", "smax"), ("qvpo_parts", "qvpo_parts"):
        tasks = {path.name for path in (RESULTS / defaults).glob("*") if path.is_dir()}
        for task in sorted(path for path in (RESULTS / ablations).glob("*") if path.name in tasks):
            print("\n".join(ablation_rows(task, RESULTS / defaults / task.name)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    report()
