"""The baseline of qvpo.py: Stable-Baselines3's SAC, a tanh-Gaussian policy, at its own defaults and on one thread.

    pip install stable-baselines3==2.9.2
    python benchmark/qvpo_sac.py --env-id Hopper-v5 --seed 1

Evaluated at the same steps and on the same episodes as qvpo.py, into runs/sac__<task>__<seed>__<time>/.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).parent.parent))

import qvpo  # noqa: E402


@dataclass
class Args:
    """Train SAC; everything but these is Stable-Baselines3's default."""

    env_id: str = "Pendulum-v1"
    """A Gymnasium task with continuous actions."""
    total_timesteps: int = qvpo.Args.total_timesteps
    """Environment steps."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""
    eval_interval: int = qvpo.Args.eval_interval
    """Environment steps between evaluations."""


class Evaluations(BaseCallback):
    """Evaluates SAC as qvpo.train evaluates its policy, stochastic (sampled) and deterministic (mean actions)."""

    def __init__(self, args: Args, run_dir: Path):
        super().__init__()
        self.args, self.run_dir, self.rows, self.started = args, run_dir, [], time.monotonic()

    def evaluate(self, episodes: int) -> np.ndarray:
        for mode in ("stochastic", "deterministic"):

            def act(obs: np.ndarray, deterministic: bool = mode == "deterministic") -> np.ndarray:
                return self.model.predict(obs, deterministic=deterministic)[0]

            returns = qvpo.evaluate(act, self.args, episodes, self.num_timesteps)
            values = (
                self.num_timesteps,
                round(time.monotonic() - self.started, 1),
                mode,
                returns.mean(),
                returns.std(),
            )
            self.rows.append(dict(zip(qvpo.EVALUATION_COLUMNS, (*values, episodes))))
        qvpo.write_evaluations(self.run_dir, self.rows)
        return returns  # of the deterministic policy

    def _on_step(self) -> bool:
        if self.num_timesteps % self.args.eval_interval == 0 and self.num_timesteps < self.args.total_timesteps:
            self.evaluate(qvpo.Args.eval_episodes)
        return True


def main(args: Args) -> None:
    torch.set_num_threads(1)
    run_dir = Path("runs") / f"sac__{args.env_id.replace('/', '-')}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": "sac", **asdict(args)}, indent=2))
    model, evaluations = SAC("MlpPolicy", qvpo.make_env(args.env_id), seed=args.seed), Evaluations(args, run_dir)
    model.learn(args.total_timesteps, callback=evaluations)
    returns = evaluations.evaluate(qvpo.Args.final_eval_episodes)
    result = {"final_return": returns.mean(), "episodic_returns": returns.tolist()}
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    print(f"final return {returns.mean():.2f}, run folder {run_dir}")


def read_command_line() -> tuple[Args]:
    """As benchmark/run.py asks for it."""
    return (tyro.cli(Args),)


if __name__ == "__main__":
    main(*read_command_line())
