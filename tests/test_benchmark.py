"""benchmark/run.py: what it runs, skips, resumes and collects; workers and machines that die."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import evaluations

ray = pytest.importorskip("ray", reason="needs pip install -r requirements-benchmark.txt")
from ray.cluster_utils import Cluster  # noqa: E402

import ddpl_mpe  # noqa: E402
from benchmark import run as benchmark_run  # noqa: E402

SCRIPT = benchmark_run.__file__
FLAGS = (
    "--total-timesteps 1600 --learning-starts 100 --eval-interval 200 --eval-episodes 2 --final-eval-episodes 2"
    " --checkpoint-interval 200 --critic-hidden 16 --actor-hidden 8 --no-compile"
)
LIST = f"""
["mpe/simple_spread_v3_N3"]
script = "ddpl_mpe.py"
flags = "{FLAGS}"
seeds = [1, 2]
arms.diffusion = "--policy diffusion"
arms.gaussian = "--policy gaussian --actor-lr 0.001"

["mpe/simple_reference_v3"]
script = "ddpl_mpe.py"
flags = "--env-id simple_reference_v3 {FLAGS}"
seeds = [3]
arms.gaussian = "--policy gaussian"
"""
SPREAD, REFERENCE = "mpe/simple_spread_v3_N3", "mpe/simple_reference_v3"


@pytest.fixture(autouse=True)
def experiments(tmp_path):
    (tmp_path / "list.toml").write_text(LIST)


def start(*words):
    command = [sys.executable, SCRIPT, *words, "--list", "list.toml", "--results", "results"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    return printed


def kill_in_the_middle(folder, after=400):
    """SIGKILL whatever trains in this folder, once it has a checkpoint of some step; returns that step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        time.sleep(0.05)
        for checkpoint in Path(folder).glob("runs/*/checkpoint.pt"):
            step = torch.load(checkpoint, weights_only=True)["progress"]["global_step"]
            if step >= after:
                owner = int(re.search(r"process (\d+)", (checkpoint.parent / "lock").read_text())[1])
                os.kill(owner, signal.SIGKILL)
                assert not (checkpoint.parent / "result.json").exists()
                return step
    pytest.fail(f"no checkpoint in {folder}")


def check_results(task, names):
    folder = Path("results") / task
    assert {path.stem for path in folder.glob("*.csv")} == names
    for name in names:
        rows = list(csv.DictReader(open(folder / f"{name}.csv")))
        assert [int(row["global_step"]) for row in rows[::2]] == list(range(200, 1601, 200))
    origins = json.loads((folder / "origins.json").read_text())
    assert set(origins) == names
    for origin in origins.values():
        assert origin["command"][0] == "ddpl_mpe.py" and origin["packages"]["torch"].startswith("2.")
        assert origin["commit"] and origin["processor"] and origin["python"]


@pytest.mark.slow
def test_a_list_is_run_resumed_and_collected():
    """A worker killed in the middle: tried again from its checkpoint, with the numbers of a run never killed.

    Results of the task without an origin make room.
    """
    Path(f"results/{SPREAD}").mkdir(parents=True)
    Path(f"results/{SPREAD}/diffusion_9.csv").write_text("from before")
    process = start(SPREAD)
    kill_in_the_middle(f"runs/benchmark/{SPREAD}/diffusion_1")
    printed = finish(process)
    assert "0 runs are done, 4 missing" in printed and "left" in printed
    check_results(SPREAD, {"diffusion_1", "diffusion_2", "gaussian_1", "gaussian_2"})

    words = "--policy diffusion --seed 1 --exp-name whole " + FLAGS
    subprocess.run([sys.executable, benchmark_run.ROOT / "ddpl_mpe.py", *words.split()], check=True, stderr=-3)
    (whole,) = Path("runs").glob("whole__*")
    (killed,) = Path(f"runs/benchmark/{SPREAD}/diffusion_1").glob("runs/*")
    assert evaluations(killed) == evaluations(whole)

    # What is done is skipped. Another command than the recorded one: a new run, and the old folder set aside.
    assert "4 runs are done, 1 missing" in finish(start("--dry-run"))
    Path("list.toml").write_text(LIST.replace("--actor-lr 0.001", "--actor-lr 0.002"))
    dry = finish(start("--dry-run", SPREAD))
    assert "2 runs are done, 2 missing" in dry and "gaussian_1  python ddpl_mpe.py" in dry
    finish(start(SPREAD))
    assert len(list(Path(f"runs/benchmark/{SPREAD}").glob("gaussian_1.*"))) == 1
    origins = json.loads(Path(f"results/{SPREAD}/origins.json").read_text())
    assert "0.002" in origins["gaussian_1"]["command"]


def test_a_run_that_goes_on_is_given_its_flags_again(monkeypatch):
    """A script resumes a task from a module to import only where the command names it."""
    run, *_ = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    stopped = run.folder / "runs" / "one"
    stopped.mkdir(parents=True)
    (stopped / "checkpoint.pt").touch()
    begun = run.folder / "runs" / "two"
    begun.mkdir()
    (begun / "checkpoint.pt.tmp").touch()  # killed while it wrote its first
    (run.folder / "origin.json").write_text(json.dumps({"command": run.command, "commit": "abc"}))
    seen = []
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(Path.cwd())  # and back in the end
    monkeypatch.setattr(os, "environ", {**os.environ, "XLA_FLAGS": "--of-mine"})
    monkeypatch.setattr(ddpl_mpe, "read_command_line", lambda: ())
    monkeypatch.setattr(ddpl_mpe, "main", lambda: seen.append(sys.argv))
    benchmark_run.train._function(run)
    assert seen == [[*run.command, "--resume", str(stopped)]]
    flags = "--of-mine --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    assert (os.environ["OMP_NUM_THREADS"], os.environ["XLA_FLAGS"]) == ("1", flags)  # a run has one thread


@pytest.mark.slow
def test_two_machines_one_of_which_dies(monkeypatch):
    """The runs of the machine that is lost go on, from their checkpoints, on the one that is left."""
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.add_node(num_cpus=1)
        second = cluster.add_node(num_cpus=1)
        process = start("mpe", "--address", cluster.address)
        kill_in_the_middle(f"runs/benchmark/{SPREAD}/gaussian_1")
        cluster.remove_node(second, allow_graceful=False)
        finish(process)
    finally:
        cluster.shutdown()
    check_results(SPREAD, {"diffusion_1", "diffusion_2", "gaussian_1", "gaussian_2"})
    check_results(REFERENCE, {"gaussian_3"})


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on():
    Path("list.toml").write_text(LIST.replace("--policy gaussian --actor-lr 0.001", "--policy beta"))
    process = start(SPREAD)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "these runs failed" in printed and f"{SPREAD}/gaussian_2" in printed
    check_results(SPREAD, {"diffusion_1", "diffusion_2"})


@pytest.mark.parametrize(
    "words, entries, sentence",
    [
        (["smax"], LIST, "there is no experiment 'smax'; choose from mpe, mpe/simple_spread_v3_N3"),
        ([], "a = ", "--list: cannot read list.toml"),
        *(
            ([], LIST.replace(right, wrong), f"--list: '{SPREAD}' must be <benchmark>/<task>, with script, flags")
            for right, wrong in (
                ('script = "ddpl_mpe.py"\n', ""),
                ("seeds = [1, 2]", "seeds = 3"),
                ("seeds = [1, 2]", "seeds = [2, 2]"),
                ('"--policy diffusion"', "3"),
                ('"--policy diffusion"', "'--policy \"'"),
                ('"--policy diffusion"', '"--total-timesteps 5"'),
                ("--total-timesteps 1600", "--total-timesteps=1600"),
                ("--total-timesteps 1600", "--total-timesteps many"),
            )
        ),
        ([], '["a"]', "--list: 'a' must be <benchmark>/<task>, with script, flags"),
    ],
)
def test_wrong_lists_and_names(words, entries, sentence):
    Path("list.toml").write_text(entries)
    with pytest.raises(benchmark_run.ListError) as told:
        benchmark_run.read_list(Path("list.toml"), Path("runs"), words)
    assert sentence in str(told.value)


def test_a_wrong_list_is_told_in_one_line():
    printed, _ = (process := start("smax", "--dry-run")).communicate(timeout=60)
    assert process.returncode == 1 and printed.startswith("run.py: error: there is no experiment 'smax'")


def done_run(run, commit="abc", rows=("global_step,seconds,mode", "200,3.0,deterministic")):
    """The folder of a run that has finished."""
    ended = run.folder / "runs" / "one"
    ended.mkdir(parents=True)
    (ended / "result.json").touch()
    (ended / "evaluations.csv").write_text("\n".join(rows))
    (run.folder / "origin.json").write_text(json.dumps({"command": run.command, "commit": commit}))


def test_results_make_room_only_when_all_runs_of_a_task_are_done():
    """What was there without an origin stays as long as its successors are not there."""
    one, *others = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    results, before = Path("results"), Path(f"results/{SPREAD}/sac_1.csv")
    before.parent.mkdir(parents=True)
    before.write_text("from before")
    done_run(one)
    benchmark_run.collect([one], results)
    benchmark_run.make_room([one, *others], results)
    assert before.exists() and (before.parent / "diffusion_1.csv").exists()
    for other in others:
        done_run(other)
    benchmark_run.collect(others, results)
    benchmark_run.make_room([one, *others], results)
    assert not before.exists() and len(list(before.parent.glob("*.csv"))) == 4


def test_a_run_of_several_seeds_becomes_a_file_for_each():
    run, *_ = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    done_run(run, rows=("global_step,seed,return_mean", "200,5,1.0", "200,6,2.0", "400,5,3.0", "400,6,4.0"))
    benchmark_run.collect([run], Path("results"))
    texts = [Path(f"results/{SPREAD}/diffusion_{seed}.csv").read_text().splitlines() for seed in (5, 6)]
    assert texts == [
        ["global_step,seed,return_mean", "200,5,1.0", "400,5,3.0"],
        ["global_step,seed,return_mean", "200,6,2.0", "400,6,4.0"],
    ]
    assert set(json.loads(Path(f"results/{SPREAD}/origins.json").read_text())) == {"diffusion_5", "diffusion_6"}


def test_time_left_counts_with_each_scripts_own_speed():
    """1,600 steps a run: a finished one of 10 ms a step, half of one left, one not begun; on one core and on two."""
    first, second, third, fourth = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    runs = [first, second, third]
    assert benchmark_run.time_left(runs, runs, 1) == "?"
    done_run(first, rows=("global_step,seconds,mode", "1600,16.0,deterministic"))
    done_run(second, rows=("global_step,seconds,mode", "800,8.0,deterministic"))
    assert benchmark_run.time_left([second, third], runs, 1) == "0:00:24"
    assert benchmark_run.time_left([second, third], runs, 2) == "0:00:12"
    # The steps of a command that is no longer the list's do not count.
    (second.folder / "origin.json").write_text(json.dumps({"command": ["else.py"]}))
    assert benchmark_run.time_left([second, third], runs, 1) == "0:00:32"


def test_an_origin_names_every_commit_that_trained(monkeypatch):
    run, *_ = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    run.folder.mkdir(parents=True)
    for commit, goes_on in (("a", False), ("b", False), ("c", True), ("c", True)):
        monkeypatch.setattr(benchmark_run, "origin", lambda run, commit=commit: {"commit": commit})
        benchmark_run.write_origin(run, goes_on)
    assert json.loads((run.folder / "origin.json").read_text()) == {"commit": "b, c"}


def test_an_arm_with_a_script_of_its_own(monkeypatch):
    """It takes the flags of all arms and its own, and is found in the folder where it stands."""
    Path("list.toml").write_text(LIST.replace('"--policy diffusion"', '"baseline/echo_words.py --policy diffusion"'))
    Path("baseline").mkdir()
    lines = ["import sys", "def read_command_line():", "    return ()", "def main():", "    print(*sys.argv)"]
    Path("baseline/echo_words.py").write_text("\n".join(lines))
    own, other, *_ = benchmark_run.read_list(Path("list.toml"), Path("runs"), (SPREAD,))
    assert own.command == ["baseline/echo_words.py", *FLAGS.split(), "--policy", "diffusion", "--seed", "1"]
    assert other.script == "ddpl_mpe.py"

    monkeypatch.setattr(benchmark_run, "ROOT", Path.cwd())
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(os, "environ", {**os.environ})
    monkeypatch.chdir(Path.cwd())  # and back in the end
    benchmark_run.train._function(own)
    assert Path("output.txt").read_text().split() == own.command


def test_the_projects_own_list():
    runs = benchmark_run.read_list(benchmark_run.ROOT / "benchmark" / "experiments.toml", Path("runs"))
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        if "/" in run.script:  # a baseline, with packages of its own
            assert (benchmark_run.ROOT / run.script).is_file()
            continue
        script = __import__(Path(run.script).stem)
        argv, sys.argv = sys.argv, run.command
        try:
            args, _ = script.read_command_line()
        finally:
            sys.argv = argv
        script.check_args(script.with_preset(args) if run.script == "qvpo.py" else args)
        assert args.seed == run.seed
