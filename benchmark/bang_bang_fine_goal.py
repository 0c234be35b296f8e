"""Two tasks for bang_bang.py with a goal coarser or finer than a step at full force: FineGoal-0.5 and FineGoal-0.02.

    python bang_bang.py --env-id benchmark.bang_bang_fine_goal:FineGoal-0.02-v0 --num-steps 1024

A unit mass on a line is to come to rest at the origin and to stay there, by a force of at most 1. In a step at full
force its velocity v changes by 0.05. The reward of each of an episode's 200 steps is g / (g + |x| + |v|), so the name's
number g is the distance from rest that halves it.
"""

import gymnasium as gym
import numpy as np

from benchmark.bang_bang_double_integrator import DoubleIntegrator


class FineGoal(DoubleIntegrator):
    """Nothing but time ends an episode."""

    def __init__(self, goal: float, render_mode: str | None = None):
        super().__init__(render_mode)
        self.goal = goal

    def step(self, action):
        observation, *_ = super().step(action)
        return observation, self.goal / (self.goal + np.abs(self.state).sum()), False, False, {}


for goal in (0.5, 0.02):
    gym.register(f"FineGoal-{goal}-v0", FineGoal, kwargs={"goal": goal}, max_episode_steps=200)
