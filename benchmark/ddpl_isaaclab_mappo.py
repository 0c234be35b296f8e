"""skrl's MAPPO on Isaac Lab's pendulum, for scale: the settings that Isaac Lab ships for it, on the same asset.

    pip install --no-deps -r requirements-skrl.txt    # after requirements-isaaclab.txt
    ISAACSIM_ASSET_ROOT=$PWD/tests/assets python benchmark/ddpl_isaaclab_mappo.py

Three seeds one after the other, 256 environments, a CPU and one thread. Every 76,800 frames it keeps the policies and
goes on; after the training each of them plays one episode in every environment, as ddpl_isaaclab.py's do. So no episode
of its training is cut short. Writes benchmark/results/isaaclab_mappo/Isaac-Pendulum-MARL-Direct/mappo_<seed>.csv, with
the columns of evaluations.csv. It sees what our scripts see, but its actions have no bounds, ours lie in [-1, 1].
"""

import csv
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from skrl.envs.wrappers.torch import wrap_env
from skrl.multi_agents.torch import MultiAgent
from skrl.utils import set_seed
from skrl.utils.runner.torch import Runner
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import ddpl_isaaclab as isaac  # noqa: E402

TOTAL_TIMESTEPS, EVAL_INTERVAL, SEEDS = 460_800, 76_800, (1, 2, 3)
RESULTS = Path(__file__).parent / "results" / "isaaclab_mappo"


class Team:
    """skrl's agents with the interface of our policies."""

    def __init__(self, agents: MultiAgent, env: isaac.StackedAgents):
        self.agents = agents
        self.env = env

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] at observations [N, B, O]: samples of the Gaussians, or their means."""
        named = {name: row[:, :size] for name, row, size in zip(self.env.agents, obs, self.env.obs_sizes)}
        no_states = dict.fromkeys(named)
        actions, outputs = self.agents.act(named, no_states, timestep=0, timesteps=0)
        if deterministic:
            actions = {name: output["mean_actions"] for name, output in outputs.items()}
        return torch.stack([F.pad(action, (0, self.env.action_size - action.shape[1])) for action in actions.values()])


def train(args: isaac.Args, env: isaac.StackedAgents, settings: dict, folder: Path) -> list[dict]:
    """The rows of evaluations.csv of one run; its policies are kept in a folder meanwhile."""
    set_seed(args.seed)  # of the environments' first reset
    settings["seed"] = args.seed
    settings["agent"]["experiment"] |= {"write_interval": 0, "checkpoint_interval": 0}
    settings["trainer"] |= {"timesteps": EVAL_INTERVAL // args.num_envs, "close_environment_at_exit": False}
    runner = Runner(wrap_env(env.env, wrapper="isaaclab-multi-agent", verbose=False), settings)
    seconds = {}
    started = time.monotonic()
    for step in range(EVAL_INTERVAL, TOTAL_TIMESTEPS + 1, EVAL_INTERVAL):
        runner.trainer.train()  # goes on where it stopped: skrl resets Isaac Lab's environments only once
        seconds[step] = round(time.monotonic() - started, 1)
        runner.agent.save(folder / f"{step}.pt")
    rows = []
    runner.agent.enable_training_mode(False, apply_to_models=True)
    for step in seconds:
        runner.agent.load(folder / f"{step}.pt")
        for mode in ("stochastic", "deterministic"):
            returns, success = isaac.evaluate(Team(runner.agent, env), env, mode == "deterministic", step)
            row = step, seconds[step], mode, float(returns.mean()), float(returns.std()), len(returns), success
            rows.append(dict(zip(isaac.EVALUATION_COLUMNS, row)))
    return rows


def main() -> None:
    args = isaac.Args(device="cpu")
    torch.set_num_threads(args.num_threads)
    with isaac.make_env(args) as env:
        from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

        results = RESULTS / args.task
        results.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS:
            settings = load_cfg_from_registry(args.task, "skrl_mappo_cfg_entry_point")
            with tempfile.TemporaryDirectory() as folder:
                rows = train(replace(args, seed=seed), env, settings, Path(folder))
            with open(results / f"mappo_{seed}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, isaac.EVALUATION_COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            print(f"seed {seed}: {rows[-1]}", flush=True)


if __name__ == "__main__":
    main()
