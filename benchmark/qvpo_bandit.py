"""What the entropy term, the weights and T do to QVPO, on a bandit of two action dimensions with three peaks.

    python benchmark/qvpo_bandit.py     # every setting with 3 seeds, two processes: some minutes

Writes benchmark/results/qvpo/bandit.csv (one row per setting and seed) and bandit.png: the actions played.
"""

import csv
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import chdir
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from qvpo import Args, train  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "qvpo"
PEAKS = np.array([[-0.6, -0.5], [0.6, -0.5], [0.0, 0.6]])
HEIGHTS = np.array([0.8, 0.9, 1.0])
WIDTH = 0.2
STEPS = 3_000
SEEDS = range(1, 4)
SETTINGS = {
    "qadv, entropy term": dict(),
    "qadv, no entropy term": dict(entropy_coefficient=0.0, min_entropy_coefficient=0.0),
    "qcut, entropy term": dict(q_transform="qcut"),
    "qcut, no entropy term": dict(q_transform="qcut", entropy_coefficient=0.0, min_entropy_coefficient=0.0),
    "qadv, entropy term, T = 2": dict(denoising_steps=2),
    "qadv, entropy term, T = 10": dict(denoising_steps=10),
    "qadv, entropy term, T = 20": dict(denoising_steps=20),
}


class ThreePeaks(gym.Env):
    """One state, one step: the reward is the highest of three bumps over the action's square, 0.8, 0.9 and 1."""

    observation_space = gym.spaces.Box(0, 0, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        bumps = HEIGHTS * np.exp(-((action - PEAKS) ** 2).sum(-1) / (2 * WIDTH**2))
        return np.zeros(1, np.float32), float(bumps.max()), True, False, {}


gym.register("ThreePeaks-v0", ThreePeaks)


def run(job: tuple[str, int]) -> dict:
    """Train one setting with one seed; the final return and the actions played [STEPS, 2]."""
    setting, seed = job
    with tempfile.TemporaryDirectory() as folder:
        chdir(folder)
        args = dict(learning_starts=100, total_timesteps=STEPS, eval_interval=STEPS, final_eval_episodes=200)
        args |= dict(hidden=64, batch_size=64, policy_frequency=1, critic_lr=1e-3)
        result = train(Args("ThreePeaks-v0", seed=seed, checkpoint_interval=STEPS, **args | SETTINGS[setting]))
        checkpoint = torch.load(Path(result["run_dir"]) / "checkpoint.pt", weights_only=True)
        actions = checkpoint["buffer"]["data"][1].numpy()
        chdir(ROOT)
    last = actions[-STEPS // 4 :]
    nearest = ((last[:, None] - PEAKS) ** 2).sum(-1)
    shares = [(np.where(nearest.min(1) < WIDTH**2 * 4, nearest.argmin(1), -1) == peak).mean() for peak in range(3)]
    row = {"setting": setting, "seed": seed, "final_return": result["final_return"]}
    return row | {f"share_peak_{h}": share for h, share in zip(HEIGHTS, shares)} | {"actions": actions}


def plot(runs: list[dict]) -> None:
    """Every setting of the first seed: the actions played in each quarter of training; right, all seeds' returns."""
    figure = Figure(figsize=(11, 1.9 * len(SETTINGS)), dpi=60, layout="tight")
    for setting, axes in zip(SETTINGS, figure.subplots(len(SETTINGS), 5)):
        seeds = [r for r in runs if r["setting"] == setting]
        for quarter, plot in enumerate(axes[:4]):
            shown = seeds[0]["actions"][quarter * STEPS // 4 : (quarter + 1) * STEPS // 4]
            plot.scatter(*PEAKS.T, s=300 * HEIGHTS**4, facecolors="none", edgecolors="tab:orange")
            plot.scatter(*shown.T, s=2, alpha=0.4)
            plot.set(xlim=(-1, 1), ylim=(-1, 1), xticks=[], yticks=[])
            plot.set_title(f"steps {quarter * STEPS // 4} to {(quarter + 1) * STEPS // 4}", fontsize=8)
        axes[0].set_ylabel(setting.replace(", ", ",\n"), fontsize=8)
        axes[4].barh([f"seed {r['seed']}" for r in seeds], [r["final_return"] for r in seeds])
        axes[4].set(xlim=(0.7, 1))
        axes[4].set_title("final return", fontsize=8)
    figure.savefig(RESULTS / "bandit.png")


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    jobs = [(setting, seed) for setting in SETTINGS for seed in SEEDS]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = list(pool.map(run, jobs))
    with open(RESULTS / "bandit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in runs[0] if name != "actions"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(runs)
    plot(runs)
    for setting in SETTINGS:
        rows = [r for r in runs if r["setting"] == setting]
        returns = [round(r["final_return"], 3) for r in rows]
        shares = np.mean([[r[f"share_peak_{h}"] for h in HEIGHTS] for r in rows], 0).round(2)
        print(f"{setting:28s} final return {np.mean(returns):.3f} {returns}, share of actions at each peak {shares}")


if __name__ == "__main__":
    main()
