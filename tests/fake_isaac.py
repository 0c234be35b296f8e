"""A stand-in for Isaac Lab: its launchers and a DirectMARLEnv, for what the real task does not do.

As a program it is ddpl_isaaclab.py on this stand-in, for torchrun, which starts files.
"""

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import torch
from gymnasium.spaces import Box

TASK, ONE_AGENT = "Isaac-Fake-MARL-Direct", "Isaac-Fake-Direct"
LENGTH = 12


class FakeMARLEnv(gym.Env):
    """A point x per environment that the agents push to 0. Episodes terminate beyond 1 and time out after LENGTH steps.

    Agent "left" sees (x, step) and has two actions, "right" sees x + 10 and has one; right's rewards are twice left's.
    Like Isaac Lab it starts an ended episode anew in the same step, and keeps the last final observations for ever.
    """

    def __init__(self, cfg, **registered):
        self.cfg, self.possible_agents, self.num_envs = cfg, ["left", "right"], cfg.num_envs
        self.sizes = {"left": (2, 2), "right": (1, 1)}
        self.state_space = Box(-9, 9, (cfg.state_space,)) if cfg.state_space > 0 else None
        self.device = cfg.device
        self.max_episode_length = LENGTH
        self.extras = {agent: {} for agent in self.possible_agents}
        self.closed = False
        torch.seed()  # nothing may depend on what a simulation draws while it starts

    def observation_space(self, agent):
        return Box(-float("inf"), float("inf"), self.sizes[agent][:1])

    def action_space(self, agent):
        return Box(*(self.cfg.bounds if agent == "left" else (-float("inf"), float("inf"))), self.sizes[agent][1:])

    def seed(self, seed):
        torch.manual_seed(seed)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.seed(seed)
        self.x = torch.zeros(self.num_envs, device=self.device)
        self.episode_length_buf = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        self._start(torch.ones(self.num_envs, dtype=torch.bool, device=self.device))
        return self._obs(), self.extras

    def step(self, actions):
        self.actions = actions
        self.x = self.x + 0.2 * (actions["left"].sum(-1) + actions["right"][:, 0])
        self.episode_length_buf = self.episode_length_buf + 1
        terminated, truncated = self.x.abs() > 1, self.episode_length_buf >= LENGTH
        reward = 1 - self.x.square()
        if self.device == "meta" or (terminated | truncated).any():
            if getattr(self.cfg, "compute_final_obs", False):
                for agent, obs in self._obs().items():
                    self.extras[agent]["final_obs"] = obs
            self._start(terminated | truncated)
        ends = ({agent: end for agent in self.possible_agents} for end in (terminated, truncated))
        return self._obs(), {"left": reward, "right": 2 * reward}, *ends, self.extras

    def state(self):
        return torch.stack([self.x] * self.cfg.state_space, dim=1)

    def close(self):
        self.closed = True

    def _start(self, which):
        self.x = torch.where(which, torch.rand(self.num_envs, device=self.device) - 0.5, self.x)
        self.episode_length_buf = torch.where(which, 0, self.episode_length_buf)

    def _obs(self):
        return {"left": torch.stack([self.x, self.episode_length_buf], 1), "right": self.x[:, None] + 10}


def install(version=3, state_space=-1, bounds=(-float("inf"), float("inf"))):
    """The modules, by name, of an Isaac Lab of this version, whose multi-agent task has this state and these bounds.

    Also returns the list of what has happened.
    """
    events, modules = [], {name: ModuleType(name) for name in ("isaaclab", "isaaclab.app")}
    tasks = {
        f"isaaclab_tasks{name}": ModuleType(f"isaaclab_tasks{name}") for name in ("", ".utils", ".utils.parse_cfg")
    }
    app = modules["isaaclab"].app = modules["isaaclab.app"]

    def parse_env_cfg(task, device, num_envs):
        cfg = SimpleNamespace(device=device, num_envs=num_envs, seed=None, bounds=bounds)
        if version == 3:
            cfg.compute_final_obs = False
        if task == TASK:
            cfg.possible_agents, cfg.state_space = ["left", "right"], state_space
        return cfg

    @contextmanager
    def launch_simulation(cfg, launcher_args):
        events.append("launch")
        try:
            yield
        except BaseException:  # an interrupt ends the process here, where Isaac Sim runs
            events.append("print a traceback")
            raise
        finally:
            events.append("shut down")

    class AppLauncher:
        """Before Isaac Sim runs, nothing else of Isaac Lab 2.3 can be imported."""

        def __init__(self, headless, device):
            events.append("launch")
            sys.modules.update(tasks)
            self.app = SimpleNamespace(close=lambda: events.append("shut down"))

    tasks["isaaclab_tasks.utils.parse_cfg"].parse_env_cfg = parse_env_cfg
    for task in (TASK, ONE_AGENT):
        gym.registry.pop(task, None)
        gym.register(task, entry_point=FakeMARLEnv, disable_env_checker=True, kwargs={"env_cfg_entry_point": None})
    if version == 3:
        app.launch_simulation = launch_simulation
        return modules | tasks, events
    app.AppLauncher = AppLauncher
    return modules | dict.fromkeys(tasks), events


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import ddpl_isaaclab

    sys.modules.update(install()[0])
    ddpl_isaaclab.version = lambda package: "none"
    ddpl_isaaclab.main(*ddpl_isaaclab.read_command_line())
