"""What the tests of several scripts need: runs as files, kill and resume, errors as one line."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def checkpoint_of(result):
    """The checkpoint of what train returned."""
    return torch.load(f"{result['run_dir']}/checkpoint.pt", weights_only=True)


def equal(a, b):
    """Bit for bit equality of nested dicts, lists and tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def command(script, **options):
    """The command line that runs a script with these flags."""
    flags = []
    for name, value in options.items():
        name = name.replace("_", "-")
        flags.append((f"--{name}" if value else f"--no-{name}") if isinstance(value, bool) else f"--{name}={value}")
    return [sys.executable, script.__file__, *flags]


def evaluations(run_dir):
    """The rows of evaluations.csv, without the seconds, which no run repeats."""
    rows = list(csv.DictReader(open(Path(run_dir) / "evaluations.csv")))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def scalars(run_dir):
    """The points of TensorBoard's curves, without those of speed, which no run repeats.

    A finished run that is resumed evaluates again, and writes the same points twice. TensorBoard reads the files of one
    second by their names, the tenth of a process before its ninth, so here they are numbered.
    """
    files = sorted(Path(run_dir).glob("*tfevents*"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    with TemporaryDirectory() as folder:
        for number, path in enumerate(files):
            shutil.copy(path, f"{folder}/{number:03}.tfevents")
        events = EventAccumulator(folder).Reload()
    tags = set(events.Tags()["scalars"]) - {"steps_per_second"}
    return {tag: sorted({(event.step, str(event.value)) for event in events.Scalars(tag)}) for tag in tags}


def global_step(checkpoint):
    return torch.load(checkpoint, weights_only=True)["progress"]["global_step"]


def kill_and_resume(script, kill_at, **options):
    """Train once undisturbed, and once with a SIGKILL after each of the steps `kill_at`; everything must be equal."""
    whole = Path(script.train(script.Args(**options))["run_dir"])
    process = subprocess.Popen(command(script, **options), stderr=subprocess.DEVNULL)
    wait_for(process, lambda: len(list(Path("runs").iterdir())) == 2)
    (run_dir,) = set(Path("runs").iterdir()) - {whole}
    for reached in kill_at:
        checkpoint = run_dir / "checkpoint.pt"
        wait_for(process, lambda: checkpoint.exists() and global_step(checkpoint) >= reached)  # noqa: B023
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (run_dir / "result.json").exists()
        process = subprocess.Popen(command(script, resume=run_dir), stderr=subprocess.DEVNULL)
    assert process.wait() == 0
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run_dir, whole))
    for key in ours.keys() - {"progress"}:  # the time that has passed differs
        assert equal(ours[key], theirs[key]), key
    assert evaluations(run_dir) == evaluations(whole)
    returns = [json.loads((folder / "result.json").read_text())["episodic_returns"] for folder in (run_dir, whole)]
    assert returns[0] == returns[1]


def wait_for(process, condition):
    """Wait until the running process has done something."""
    while not condition():
        assert process.poll() is None, "the process ended before"
        time.sleep(0.02)


def error_of(script, given=(), **options):
    """The one line that ends a script with this input; `given` names options that were given as flags."""
    with pytest.raises(SystemExit) as stopped:
        script.main(script.Args(**options), given)
    message, name = str(stopped.value.code), Path(script.__file__).name
    assert message.startswith(f"{name}: error: ") and "\n" not in message
    return message


def recorded(script, monkeypatch, **options):
    """What train adds to its replay buffer, as one Batch of [steps, copies, ...]."""
    added, add = [], script.ReplayBuffer.add
    spy = lambda self, *t: (added.append([x.clone() for x in t]), add(self, *t))  # noqa: E731
    monkeypatch.setattr(script.ReplayBuffer, "add", spy)
    script.train(script.Args(**options))
    return script.Batch(*map(torch.stack, zip(*added)))


class OnMeta(TorchDispatchMode):
    """Inside, whatever gives a tensor that is not on PyTorch's meta device fails: a tensor left behind on the CPU.

    The device alone lets some pass, such as an index from the CPU. Those without dimensions may: Adam counts its steps.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.is_meta or not tensor.ndim for tensor in tensors), function
        return result
