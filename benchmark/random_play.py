"""Returns of uniformly random actions on the tasks of experiments.toml: the zero of the normalised scores.

    python benchmark/random_play.py    # writes benchmark/results/random.csv

200 episodes a task, 50 on MuJoCo; those of the last evaluation's length, with other seeds.
"""

import csv
import shlex
import sys
import tomllib
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpl_mamujoco  # noqa: E402
import ddpl_mpe  # noqa: E402


class RandomPolicy(nn.Module):
    """Uniform actions, for agents with the action dimensions of mask [N, D]."""

    def __init__(self, mask: Tensor):
        super().__init__()
        self.mask = mask[:, None]  # [N, 1, D]

    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O]."""
        return (2 * torch.rand(*obs.shape[:2], self.mask.shape[-1]) - 1) * self.mask


def main() -> None:
    entries = tomllib.loads((ROOT / "benchmark" / "experiments.toml").read_text())
    scripts = {"ddpl_mpe.py": ddpl_mpe, "ddpl_mamujoco.py": ddpl_mamujoco}  # the others' scores are rates
    rows = []
    for task, entry in entries.items():
        script = scripts.get(entry["script"])
        if script is None:
            continue
        sys.argv = [entry["script"], *shlex.split(entry["flags"])]
        args, _ = script.read_command_line()
        if script is ddpl_mpe:
            mask = ddpl_mpe.VectorMPE(args.env_id, args.num_agents, 1).action_mask()
        else:
            mask = ddpl_mamujoco.StackedAgents(args).action_mask()
        returns = script.evaluate(RandomPolicy(mask), args, args.final_eval_episodes, False, seed=0)
        rows.append({"task": task, "return_mean": round(float(returns.mean()), 3), "episodes": len(returns)})
        print(rows[-1])
    with open(ROOT / "benchmark" / "results" / "random.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
