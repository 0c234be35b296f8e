"""What runs of world4rl.py imagined and what came true; and how far their world models can be trusted.

    python benchmark/world4rl_figures.py runs/world4rl__door-lock-v3__1__... [more run folders]

Writes benchmark/results/world4rl/: for each run its evaluations, NAME.csv, and fidelity.csv, the error of predictions
over the horizon on 30 new episodes of the clone and 30 of random actions; and world4rl.png.
"""

import csv
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import world4rl  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "world4rl"
EPISODES = 30
SAMPLES = 10  # of the future of each episode


def restored(run_dir: Path) -> tuple:
    """Task and learner of a run."""
    args, checkpoint = world4rl.load_checkpoint("--evaluate", run_dir, world4rl.Args(), (), ())
    task = world4rl.make_task(args)
    learner = world4rl.Learner(args, task.state_size, task.action_size)
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


def main(run_dirs: list[Path]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    rows = []
    for number, run_dir in enumerate(run_dirs):
        torch.manual_seed(0)
        task, learner = restored(run_dir)
        args = learner.args
        name = f"{args.env_id}_{args.world_model}_{args.seed}"
        if (run_dir / "evaluations.csv").exists():
            shutil.copy(run_dir / "evaluations.csv", RESULTS / f"{name}.csv")
            played = [row for row in csv.DictReader(open(run_dir / "evaluations.csv")) if row["mode"] == "stochastic"]
            steps = [int(row["global_step"]) for row in played]
            for column, style in (("success_rate", "-"), ("imagined_success_rate", "--")):
                left.plot(steps, [float(row[column]) for row in played], style, color=f"C{number}", label=name)
                name = "_"  # one entry in the legend
            name = f"{args.env_id}_{args.world_model}_{args.seed}"
        for who, style in (("clone", "-"), ("random", ":")):
            error, spread = fidelity(task, learner, who)
            ahead = np.arange(1, args.horizon + 1)
            right.plot(ahead, error[1:], style, color=f"C{number}", label=f"{name}, {who}")
            if args.world_model == "diffusion":
                right.plot(ahead, spread[1:], style, color=f"C{number}", alpha=0.4)
            rows += [
                {"run": name, "actions": who, "horizon": t, "error": f"{error[t]:.5f}", "spread": f"{spread[t]:.5f}"}
                for t in (1, 5, 10, 25, 50, args.horizon)
                if t <= args.horizon
            ]
    left.locator_params(axis="x", nbins=5)
    left.set(xlabel="imagined steps", ylabel="success (dashed: imagined)", ylim=(0, 1))
    right.set(xlabel="decisions predicted ahead", ylabel="error of positions in m (pale: spread)", yscale="log")
    for ax in (left, right):
        ax.legend(fontsize=7)
    plt.tight_layout()
    plt.savefig(RESULTS / "world4rl.png", dpi=120)
    with open(RESULTS / "fidelity.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])
