"""Run the experiments of experiments.toml, collect their numbers in benchmark/results/, make its tables and plots.

    pip install -r requirements-benchmark.txt
    python benchmark/run.py                          # all that is missing, in the order of the list
    python benchmark/run.py mpe mamujoco/Hopper_3x1  # a benchmark, a task
    python benchmark/run.py --dry-run                # what there is to do
    python benchmark/run.py --address auto           # on the Ray cluster that this machine belongs to

A run that is done is skipped, one that was killed goes on from its checkpoint, and one whose worker dies is tried again
from there. As many run at a time as there are cores, one thread each. On a cluster, every machine needs this folder
under the same path (a shared file system) and the same Python environment.

A run works in runs/benchmark/<benchmark>/<task>/<arm>_<seed>/: output.txt is what it printed, origin.json where its
numbers come from. Where the list has changed its command since, the old folder is set aside, not overwritten. Each run
is collected when it has finished, so Ctrl-C loses nothing.
"""

import importlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from csv import DictReader
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import distributions
from itertools import product
from pathlib import Path
from typing import TypedDict

import ray
import tyro
from filelock import FileLock
from tqdm import tqdm
from typeguard import TypeCheckError, check_type

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmark" / "results"
BUDGETS = ("--total-timesteps", "--total-trajectories")
PACKAGES = (
    *("torch", "jax", "numpy", "gymnasium", "mujoco", "stable_baselines3"),
    *("mpe2", "gymnasium-robotics", "jaxmarl", "dm_control", "metaworld"),
)


@dataclass
class Args:
    """Run the experiments of a list that are not done yet, then collect, tabulate and plot their results."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Benchmarks or tasks, such as mpe or mpe/simple_spread_v3_N3; all if none is named."""
    list: Path = ROOT / "benchmark" / "experiments.toml"
    """The list of experiments."""
    runs: Path = Path("runs/benchmark")
    """Where the runs work."""
    results: Path = RESULTS
    """Where their numbers are collected."""
    address: str | None = None
    """Address of a Ray cluster; without one, this machine alone."""
    retries: int = 3
    """How often a run whose worker has died is tried again."""
    dry_run: bool = False
    """Only say what is done and what is missing."""


class ListError(Exception):
    """Something wrong with the list or the names, told to the user in one sentence."""


@dataclass(frozen=True)
class Run:
    """One training run: an arm of an experiment with a seed."""

    task: str  # <benchmark>/<task>, its folder in the results
    arm: str
    seed: int
    script: str
    flags: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}_{self.seed}"

    @property
    def command(self) -> list[str]:
        return [self.script, *self.flags, "--seed", str(self.seed)]

    def run_dir(self, *files: str) -> Path | None:
        """The script's own run folder in here that holds one of these files, if there is one."""
        found = sorted(path for file in files for path in self.folder.glob(f"runs/*/{file}"))
        return found[-1].parent if found else None

    @property
    def done(self) -> bool:
        return self.recorded_command == self.command and self.run_dir("result.json") is not None

    @property
    def recorded_command(self) -> list[str] | None:
        origin = self.folder / "origin.json"
        return json.loads(origin.read_text())["command"] if origin.is_file() else None

    @property
    def budget(self) -> float:
        """Environment steps or trajectories in all. ValueError unless the flags say it, once."""
        (position,) = [i for i, flag in enumerate(self.flags[:-1]) if flag in BUDGETS]
        return float(self.flags[position + 1])

    def progress(self) -> tuple[float, float]:
        """Environment steps, or trajectories where they are the budget, and seconds at the last evaluation."""
        run_dir = self.run_dir("evaluations.csv") if self.recorded_command == self.command else None
        rows = list(DictReader(open(run_dir / "evaluations.csv"))) if run_dir else []
        column = "trajectories" if "--total-trajectories" in self.flags else "global_step"
        return (float(rows[-1][column]), float(rows[-1]["seconds"])) if rows else (0.0, 0.0)


class Experiment(TypedDict):
    """An entry of the list."""

    script: str
    flags: str
    seeds: list[int]
    arms: dict[str, str]


def read_list(path: Path, runs: Path, names: Sequence[str] = ()) -> list[Run]:
    """The runs of a list, in its order, all seeds of an experiment before the next.

    Raises ListError, naming the choices, for a name that is not in it, and for an entry that is not as it should be.
    """
    try:
        entries = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ListError(f"--list: cannot read {path} ({error})") from None
    benchmarks = sorted({task.split("/")[0] for task in entries})
    for name in names:
        if name not in entries and name not in benchmarks:
            raise ListError(f"there is no experiment {name!r}; choose from {', '.join([*benchmarks, *entries])}")
    found = []
    for task, entry in entries.items():
        try:
            check_type(entry, Experiment)
            benchmark, _ = task.split("/")
            ours = []
            for seed, (arm, own) in product(entry["seeds"], entry["arms"].items()):
                own_words = shlex.split(own)
                script = own_words.pop(0) if own_words and own_words[0].endswith(".py") else entry["script"]
                words = (*shlex.split(entry["flags"]), *own_words)
                ours.append(Run(task, arm, seed, script, words, runs.absolute() / task / f"{arm}_{seed}"))
            if len(set(entry["seeds"])) < len(entry["seeds"]) or not all(run.budget > 0 for run in ours):
                raise ValueError
        except (TypeCheckError, ValueError):
            needed = "script, flags with one --total-timesteps N or --total-trajectories N, different seeds, and arms"
            raise ListError(f"--list: {task!r} must be <benchmark>/<task>, with {needed}") from None
        if not names or task in names or benchmark in names:
            found += ours
    return found


def origin(run: Run) -> dict:
    """Where a run's numbers come from."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    versions = {package.name: package.version for package in distributions()}
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": run.command,
        "commit": commit.stdout.strip() or "unknown",
        "processor": models[0] if models else platform.processor(),
        "python": platform.python_version(),
        "packages": {package: versions[package] for package in PACKAGES if package in versions},
    }


@ray.remote(num_cpus=1, max_calls=1)  # a process of its own for every run
def train(run: Run) -> None:
    """Train in this worker's own process, so that both end together; from a checkpoint, if there is one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # the same for JAX
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {single}".strip()
    if run.folder.exists() and run.recorded_command != run.command:
        run.folder.rename(run.folder.with_name(f"{run.folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"))
    run.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(run.folder / "lock", timeout=0):  # raises where another process trains it
        stopped = run.run_dir("checkpoint.pt", "checkpoint.safetensors")
        write_origin(run, goes_on=stopped is not None)
        os.chdir(run.folder)
        sys.path[:0] = [str(ROOT), str((ROOT / run.script).parent)]
        script = importlib.import_module(Path(run.script).stem)
        sys.argv = [*run.command, *(("--resume", str(stopped)) if stopped else ())]  # a module to import is named again
        with open("output.txt", "a") as output, redirect_stdout(output), redirect_stderr(output):
            try:
                script.main(*script.read_command_line())
            except SystemExit as ended:
                raise RuntimeError(f"{run.name}: {ended}") from None


def write_origin(run: Run, goes_on: bool) -> None:
    """Write the run's origin.json, with all the commits that it was trained at if it goes on from a checkpoint."""
    path, ours = run.folder / "origin.json", origin(run)
    if goes_on:
        before = json.loads(path.read_text())["commit"].split(", ")
        ours["commit"] = ", ".join(dict.fromkeys([*before, ours["commit"]]))
    write_whole(path, json.dumps(ours, indent=2))


def write_whole(path: Path, text: str) -> None:
    """Write a file under another name first, so that a kill at any moment leaves the old or the new."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def time_left(waiting: Sequence[Run], runs: Sequence[Run], slots: int) -> str:
    """An estimate, as `1:23:45`, from the speeds that runs of this list have had, those of its own script if there are
    any; `?` before the first evaluation."""
    paces = {}
    for run in runs:
        steps, seconds = run.progress()
        if steps:
            paces.setdefault(run.script, []).append(seconds / steps)
    if not paces:
        return "?"
    left = 0.0
    for run in waiting:
        of_script = paces.get(run.script) or sum(paces.values(), [])
        left += (run.budget - run.progress()[0]) * sum(of_script) / len(of_script)
    return str(timedelta(seconds=round(left / max(min(slots, len(waiting)), 1))))


def run_all(missing: Sequence[Run], retries: int, results: Path) -> list[str]:
    """Train all of them, and collect each that has finished; returns a line for each that has failed."""
    waiting = {train.options(max_retries=retries).remote(run): run for run in missing}
    slots = int(ray.cluster_resources()["CPU"])
    failures = []
    with tqdm(total=len(missing), unit="run") as bar:
        while waiting:
            finished, _ = ray.wait([*waiting], timeout=5)
            for reference in finished:
                run = waiting.pop(reference)
                try:
                    ray.get(reference)
                    collect([run], results)
                except ray.exceptions.RayError as error:
                    failures.append(f"{run.name}: {str(error).strip().splitlines()[-1]}; see {run.folder}/output.txt")
                bar.update()
            bar.set_postfix_str(f"about {time_left([*waiting.values()], missing, slots)} left")
    return failures


def collected(run: Run, results: Path) -> Iterator[tuple[Path, str]]:
    """The files of a run's results, and what is in them: for each seed that it trained, its rows of evaluations.csv."""
    header, *rows = (run.run_dir("result.json") / "evaluations.csv").read_text().splitlines()
    column = header.split(",").index("seed") if "seed" in header.split(",") else None
    seeds = dict.fromkeys(row.split(",")[column] for row in rows) if column is not None else [str(run.seed)]
    for seed in seeds:
        of_seed = [row for row in rows if column is None or row.split(",")[column] == seed]
        yield results / run.task / f"{run.arm}_{seed}.csv", "\n".join([header, *of_seed, ""])


def collect(runs: Sequence[Run], results: Path) -> None:
    """Copy the results of runs that are done, with their origins, all of a task in one origins.json."""
    for run in runs:
        origin = json.loads((run.folder / "origin.json").read_text())
        path = results / run.task / "origins.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        origins = json.loads(path.read_text()) if path.exists() else {}
        for csv, text in collected(run, results):
            write_whole(csv, text)
            origins[csv.stem] = origin
        write_whole(path, json.dumps(dict(sorted(origins.items())), indent=1) + "\n")


def make_room(runs: Sequence[Run], results: Path) -> None:
    """Remove what a task has without an origin, once all of its runs are done: it may be from another budget."""
    for task in {run.task for run in runs} - {run.task for run in runs if not run.done}:
        origins = json.loads((results / task / "origins.json").read_text())
        for csv in (results / task).glob("*.csv"):
            if csv.stem not in origins:
                csv.unlink()


def main(args: Args) -> None:
    runs = read_list(args.list, args.runs, args.names)
    missing = [run for run in runs if not run.done]
    print(f"{len(runs) - len(missing)} runs are done, {len(missing)} missing")
    if args.dry_run:
        for run in missing:
            print(run.name, " python", shlex.join(run.command))
        return
    collect([run for run in runs if run.done], args.results)
    failures = []
    if missing:
        ray.init(address=args.address or "local", log_to_driver=False, logging_level="warning")
        failures = run_all(missing, args.retries, args.results)
        ray.shutdown()
    make_room(runs, args.results)
    if failures:
        print("\n".join(["these runs failed:", *failures]), file=sys.stderr)
    if args.results.resolve() == RESULTS.resolve():
        from results import report

        report()
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except ListError as error:
        raise SystemExit(f"run.py: error: {error}") from None
    except KeyboardInterrupt:
        print("stopped; what has finished is collected, the rest goes on when this is run again", file=sys.stderr)
        raise SystemExit(130) from None
