"""Bang-bang control where the optimum is known: the minimum-time double integrator.

    python benchmark/bang_bang_double_integrator.py     # three seeds: benchmark/results/bang_bang/double_integrator.png

A unit mass on a line is to rest at the origin, as soon as possible, by a force of at most 1. The optimal force is
u = -sign(x + v |v| / 2): full force one way, then the other, with the switch on a curve. PPO with Bernoulli policies
takes at most some 3 % more time, with a switch on a nearly straight line that crosses the curve.
"""

import os
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bang_bang  # noqa: E402

TIME_STEP = 0.05


class DoubleIntegrator(gym.Env):
    """x'' = u, integrated exactly over steps of TIME_STEP; the reward is -TIME_STEP until |x| and |v| are below 0.1.

    An episode also ends where |x| or |v| exceeds 2, at the price of the time limit's ten seconds. No optimal path from
    [-1, 1]^2 goes there.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        """Start at rest or moving, anywhere in [-1, 1]^2 unless options["state"] says where."""
        super().reset(seed=seed)
        start = (options or {}).get("state")
        self.state = self.np_random.uniform(-1, 1, 2) if start is None else np.array(start, dtype=float)
        return self.state.astype(np.float32), {}

    def step(self, action):
        x, v = self.state
        u = float(np.clip(action[0], -1, 1))
        self.state = np.array([x + v * TIME_STEP + u * TIME_STEP**2 / 2, v + u * TIME_STEP])
        arrived, lost = (np.abs(self.state) < 0.1).all(), (np.abs(self.state) > 2).any()
        return self.state.astype(np.float32), -10.0 if lost else -TIME_STEP, bool(arrived or lost), False, {}


gym.register("DoubleIntegrator-v0", DoubleIntegrator, max_episode_steps=200)
SETTINGS = dict(env_id="DoubleIntegrator-v0", total_timesteps=100_000, num_steps=1024, eval_interval=100_000)


def optimal_force(states: np.ndarray) -> np.ndarray:
    """The minimum-time force [B, 1] at states [B, 2] of position and velocity."""
    x, v = states.T
    return -np.sign(x + v * np.abs(v) / 2)[:, None]


def times_to_goal(act, starts: np.ndarray) -> np.ndarray:
    """Seconds [B] to the goal from starts [B, 2] by act, states [B, 2] to forces [B, 1]; 10 or more if it fails."""
    env, times = gym.make("DoubleIntegrator-v0"), []
    for start in starts:
        state, _ = env.reset(options={"state": start})
        time, ended = 0.0, False
        while not ended:
            state, reward, terminated, truncated, _ = env.step(act(state[None])[0])
            time, ended = time - reward, terminated or truncated
        times.append(time)
    return np.array(times)


def grid_of_starts() -> np.ndarray:
    """[36, 2] positions and velocities in [-1, 1]^2, none of them at the goal."""
    axis = np.linspace(-1, 1, 6)
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)


def trained_force(seed: int = 1, **options):
    """Train a Bernoulli policy; the force [B, 1] that its mode applies at states [B, 2]."""
    result = bang_bang.train(bang_bang.Args(seed=seed, **SETTINGS | options))
    run_dir = Path(result["run_dir"])
    args, checkpoint = bang_bang.load_checkpoint("--evaluate", run_dir, bang_bang.Args(), given=(), free=())
    learner = bang_bang.Learner(args, 2, 1)
    normalizer = bang_bang.Normalizer(2, 1, args.gamma)
    learner.load_state_dict(checkpoint["learner"])
    normalizer.load_state_dict(checkpoint["normalizer"])
    return bang_bang.ways_to_play(learner, normalizer)["deterministic"]


def main() -> None:
    torch.set_num_threads(1)
    starts = grid_of_starts()
    optimal = times_to_goal(optimal_force, starts)
    figure = Figure(figsize=(10, 3.4), dpi=80, layout="tight")
    x, v = np.meshgrid(np.linspace(-1.2, 1.2, 241), np.linspace(-1.6, 1.6, 241))
    os.chdir(tempfile.mkdtemp())
    for seed, axes in enumerate(figure.subplots(1, 3, sharey=True), start=1):
        force = trained_force(seed)
        times = times_to_goal(force, starts)
        print(f"seed {seed}: mean time to goal {times.mean():.2f}, of the optimal law {optimal.mean():.2f}")
        axes.contourf(
            x, v, force(np.stack([x, v], -1).reshape(-1, 2)).reshape(x.shape), levels=1, cmap="coolwarm", alpha=0.5
        )
        axes.plot(-v[:, 0] * np.abs(v[:, 0]) / 2, v[:, 0], color="black", label="optimal switch")
        axes.set(
            xlabel="position", title=f"seed {seed}: {times.mean() / optimal.mean() - 1:+.1%} time", xlim=(-1.2, 1.2)
        )
    axes.legend()
    figure.axes[0].set_ylabel("velocity")
    target = ROOT / "benchmark" / "results" / "bang_bang" / "double_integrator.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


if __name__ == "__main__":
    main()
