"""HARL's HASAC (Liu et al. 2024), a strong public peer, on the tasks of ddpl_mpe.py and ddpl_mamujoco.py.

    git clone https://github.com/PKU-MARL/HARL && git -C HARL checkout d539bad
    pip install absl-py==2.5.1 setproctitle==1.3.8 tensorboardX==2.6.5
    PYTHONPATH=HARL python benchmark/hasac.py --env-id simple_spread_v3 --total-timesteps 400000
    PYTHONPATH=HARL python benchmark/hasac.py --scenario HalfCheetah --agent-conf 2x3 --total-timesteps 200000

Networks, learning, replay and loop are HARL's own, with the settings that it tuned for the task over 10 million steps.
On MuJoCo its agents see what they see in HARL, more than ours: the whole state, standardised, and their number (Ant's
state is the newer robot's).
Adapted:
- The environments are those of our scripts (their robots are newer, v5), all 20 copies in this process. On mpe2 an
  action is a force in two dimensions and a message scaled to its bounds, where HARL has five movements, and clips at 0.
- Evaluations are on our scripts' episodes, of the current policy (ours play averaged weights). One thread, on a CPU.
- The warm-up's steps count.
On mpe2 it learns from the sum of the agents' rewards, as in HARL; the evaluations show the mean.

--observations ours: on MuJoCo its agents see what ours see, raw, and the critic the raw state (on mpe2 they always do).
--temperature ours: temperatures start, move at each update and aim as our Gaussians' do, and rewards are the mean, as
ours. HARL updates every 20 steps, our scripts every 8, and its critic keeps the entropy bonus that ours has not.

A run is written to runs/hasac__<task>__<seed>__<time>/, and does not go on once it is killed.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import harl
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from harl.runners import off_policy_base_runner
from harl.runners.off_policy_ha_runner import OffPolicyHARunner
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import ddpl_mamujoco as mamujoco  # noqa: E402
import ddpl_mpe as mpe  # noqa: E402

TUNED = Path(harl.__file__).parent.parent / "tuned_configs"


@dataclass
class Args:
    """Train HASAC on a task of mpe2 or, if a scenario is named, of multi-agent MuJoCo."""

    env_id: str = "simple_spread_v3"
    """A task of mpe2."""
    num_agents: int | None = None
    """Number of agents, where the task lets you choose."""
    scenario: str | None = None
    """A robot of multi-agent MuJoCo, in the place of a task of mpe2."""
    agent_conf: str = "2x3"
    """How the robot is shared out."""
    total_timesteps: int = mpe.Args.total_timesteps
    """Environment steps in all, summed over the copies."""
    eval_interval: int = 20_000
    """Environment steps between evaluations."""
    observations: Literal["harl", "ours"] = "harl"
    """What the agents of a robot see; harl: the whole state, standardised; ours: as in our script."""
    temperature: Literal["harl", "ours"] = "harl"
    """harl: as HARL tuned it, which on some tasks is a fixed one; ours: as in our scripts."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""

    @property
    def task(self) -> str:
        return f"{self.scenario}_{self.agent_conf}" if self.scenario else self.env_id

    @property
    def script(self) -> mpe.Args | mamujoco.Args:
        """The arguments of our script for this task."""
        if self.scenario:
            return mamujoco.Args(scenario=self.scenario, agent_conf=self.agent_conf, seed=self.seed)
        return mpe.Args(env_id=self.env_id, num_agents=self.num_agents, seed=self.seed)


class MPECopy(mpe.VectorMPE):
    """One copy of an mpe2 task with the interface of ddpl_mamujoco.StackedAgents."""

    def __init__(self, args: mpe.Args):
        super().__init__(args.env_id, args.num_agents, num_envs=1)

    def reset(self, seed: int) -> tuple[dict, dict]:
        (obs,) = super().reset(np.array([seed]))
        return {"obs": obs, "state": obs.ravel()}, {}

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        (obs,), (reward,), (terminated,), (truncated,) = super().step(actions[None])
        return {"obs": obs, "state": obs.ravel()}, reward, terminated, truncated, {}


class SeeingAll(mamujoco.StackedAgents):
    """A robot as HARL's agents see it: each the whole state and its own number as a one-hot vector."""

    def __init__(self, args: mamujoco.Args, render_mode: str | None = None):
        super().__init__(args, render_mode)
        self.obs_size = self.state_size + self.num_agents  # its spaces, which nobody reads here, stay what they were

    def _stack(self, observations: dict) -> dict:
        state = self.env.state()
        seen = np.concatenate([np.tile(state, (self.num_agents, 1)), np.eye(self.num_agents)], axis=1)
        return {"obs": standardised(seen), "state": standardised(state)}


def standardised(x: np.ndarray) -> np.ndarray:
    """x [..., O] with mean 0 and deviation 1 over its own numbers, as HARL has it, not over time."""
    return ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)).astype(np.float32)


def robot_class(args: Args) -> type[mamujoco.StackedAgents]:
    return SeeingAll if args.observations == "harl" else mamujoco.StackedAgents


class Copies:
    """E copies of a task as HARL steps them: one that ends starts again in the same step."""

    def __init__(self, args: Args, num_envs: int):
        make_copy = robot_class(args) if args.scenario else MPECopy
        self.envs = [make_copy(args.script) for _ in range(num_envs)]
        self.seed, self.episodes = args.seed, np.zeros(num_envs, int)
        env = self.envs[0]
        summed = args.temperature == "harl" and not args.scenario  # a robot has one reward for all
        self.reward_scale = env.num_agents if summed else 1
        self.n_agents = env.num_agents
        self.observation_space = [Box(-np.inf, np.inf, (env.obs_size,)) for _ in range(self.n_agents)]
        self.share_observation_space = [Box(-np.inf, np.inf, (env.state_size,)) for _ in range(self.n_agents)]
        self.action_space = [Box(-1, 1, (env.action_size,)) for _ in range(self.n_agents)]

    def start(self, copy: int) -> dict:
        seeds = mpe.episode_seeds(0, self.seed, int(self.episodes[copy]), len(self.envs))
        self.episodes[copy] += 1
        return self.envs[copy].reset(seed=int(seeds[copy]))[0]

    def batch(self, observations: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations [E, N, O], the state for every agent [E, N, S], and that no action is unavailable."""
        obs = np.stack([seen["obs"] for seen in observations])
        state = np.stack([seen["state"] for seen in observations])
        return obs, state[:, None].repeat(self.n_agents, 1), np.full(len(obs), None)

    def reset(self) -> tuple[np.ndarray, ...]:
        return self.batch([self.start(copy) for copy in range(len(self.envs))])

    def step(self, actions: np.ndarray) -> tuple:
        observations, rewards, dones, infos = [], [], [], []
        for copy, (env, rows) in enumerate(zip(self.envs, actions)):
            seen, reward, terminated, truncated, _ = env.step(rows)
            info = {"bad_transition": truncated and not terminated}
            if terminated or truncated:
                info |= {"original_obs": seen["obs"], "original_state": np.tile(seen["state"], (self.n_agents, 1))}
                seen = self.start(copy)
            observations.append(seen)
            rewards.append(np.full((self.n_agents, 1), self.reward_scale * reward))
            dones.append(np.full(self.n_agents, terminated or truncated))
            infos.append([info] * self.n_agents)
        obs, state, available = self.batch(observations)
        return obs, state, np.stack(rewards), np.stack(dones), infos, available


class Runner(OffPolicyHARunner):
    """HARL's runner, with evaluations of our kind; it also is the policy that those play."""

    def __init__(self, args: Args, run_dir: Path):
        settings = json.loads(tuned_settings(args).read_text())
        learning, task = settings["algo_args"], settings["env_args"]
        training = learning["train"]
        training["num_env_steps"] = args.total_timesteps - training["warmup_steps"]
        between = math.gcd(training["warmup_steps"], args.eval_interval)  # so that an evaluation is due among them
        training["eval_interval"] = between // training["n_rollout_threads"]
        learning["seed"]["seed"] = args.seed
        learning["device"] |= {"cuda": False, "torch_threads": 1}
        learning["logger"]["log_dir"] = str(run_dir / "harl")
        if args.temperature == "ours":
            learning["algo"] |= {"auto_alpha": True, "alpha_lr": args.script.temperature_lr}
        off_policy_base_runner.make_train_env = lambda *_: Copies(args, training["n_rollout_threads"])
        off_policy_base_runner.make_eval_env = lambda *_: None
        super().__init__(settings["main_args"], learning, task)
        if args.temperature == "ours":
            self.start_temperatures_like(args.script)
        self.ours, self.run_dir, self.rows = args, run_dir, []
        self.mask = torch.zeros(0)  # what our evaluations ask for a policy's device
        self.started = time.monotonic()

    def start_temperatures_like(self, script: mpe.Args | mamujoco.Args) -> None:
        """Those of the agents and the critic's own."""
        start = math.log(script.init_temperature)
        for log_alpha in (*self.log_alpha, self.critic.log_alpha):
            log_alpha.data.fill_(start)
        self.alpha = [log_alpha.detach().exp() for log_alpha in self.log_alpha]
        self.critic.alpha = self.critic.log_alpha.detach().exp()
        (env, *_), target = self.envs.envs, script.target_entropy
        padding = [env.action_size - size for size in env.action_sizes]  # uniform, for nothing depends on it
        self.target_entropy = [target * size + math.log(2) * more for size, more in zip(env.action_sizes, padding)]

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] at observations [N, B, O]."""
        return torch.stack([actor.get_actions(row, None, not deterministic) for actor, row in zip(self.actor, obs)])

    def eval(self, step: int) -> None:
        if step % self.ours.eval_interval == 0 and step < self.ours.total_timesteps:
            self.evaluate(step, self.ours.script.eval_episodes)

    def evaluate(self, step: int, episodes: int) -> np.ndarray:
        """Add the rows of an evaluation to evaluations.csv; returns those of the deterministic policy."""
        script = mamujoco if self.ours.scenario else mpe
        for mode in ("stochastic", "deterministic"):
            with patch.object(
                mamujoco, "StackedAgents", robot_class(self.ours)
            ):  # the name by which evaluate makes its copies
                returns = script.evaluate(self, self.ours.script, episodes, mode == "deterministic", step)
            row = step, round(time.monotonic() - self.started, 1), mode, returns.mean(), returns.std(), episodes
            self.rows.append(dict(zip(script.EVALUATION_COLUMNS, row)))
        script.write_evaluations(self.run_dir, self.rows)
        return returns

    def save(self) -> None:
        """Nothing: HARL would keep the networks at every evaluation."""


def tuned_settings(args: Args) -> Path:
    """The file of HARL's settings for a task; ends the program, naming the choices, where there is none."""
    kind, name = "pettingzoo_mpe", f"{args.env_id.rpartition('_')[0]}_v*-continuous"
    if args.scenario:
        kind, name = "mamujoco", f"{args.scenario}-v2-{args.agent_conf}"
    found = {path.parent.parent.name: path for path in TUNED.glob(f"{kind}/*/hasac/config.json")}
    for tuned, path in found.items():
        if fnmatch(tuned, name):
            return path
    raise SystemExit(f"hasac.py: error: HARL has no settings for {args.task}, only for {', '.join(sorted(found))}")


def main(args: Args) -> None:
    if args.total_timesteps % 1000 or args.eval_interval % 1000 or args.total_timesteps <= 10_000:
        raise SystemExit(
            "hasac.py: error: --total-timesteps, above 10000, and --eval-interval must be multiples of 1000"
        )
    tuned_settings(args)  # or there is no run
    run_dir = Path("runs") / f"hasac__{args.task}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": "hasac", **asdict(args)}, indent=2))
    runner = Runner(args, run_dir)
    runner.run()
    returns = runner.evaluate(args.total_timesteps, args.script.final_eval_episodes)
    result = {"final_return": returns.mean(), "episodic_returns": returns.tolist()}
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    print(f"final return {returns.mean():.2f}, run folder {run_dir}")


def read_command_line() -> tuple[Args]:
    """As benchmark/run.py asks for it."""
    return (tyro.cli(Args),)


if __name__ == "__main__":
    main(*read_command_line())
