"""Policy gradient, natural policy gradient, and both with stochastic recursive variance reduction.

After Liu, Zhang, Basar and Yin, "An Improved Analysis of (Variance-Reduced) Policy Gradient and Natural Policy
Gradient Methods", NeurIPS 2020, arXiv 2211.07937, and Xu, Gao and Gu, "Sample Efficient Policy Gradient Methods with
Recursive Variance Reduction" (SRVR-PG), ICLR 2020, arXiv 1909.08610.

    python srvr_npg.py

    g(tau | theta) = sum_h (sum_{t<=h} grad log pi(a_t | s_t)) gamma^h r_h                                    (GPOMDP)

1. Sample N trajectories with theta; u is the mean of g(tau | theta).
2. m - 1 times: sample B trajectories with the new theta; u gains the mean of g(tau | theta) - g_w(tau | theta_before),
   where g_w weighs the reward of step h by the ratio of the probabilities of a_0 ... a_h, before over now.
3. Step: theta moves along u (pg, srvr-pg) or along w = argmin E (w' grad log pi)^2 / 2 - w'u (npg, srvr-npg).
4. --algorithm pg and npg take m = 1: every step has its own N trajectories.
5. What counts is trajectories: N + (m - 1) B for m steps.
6. On --env-id tabular, a small random MDP, the gradient, the Fisher matrix and the optimum are exact.

docs/srvr_npg.md numbers the implementation details and explains the logged scalars.

To fork it for another distribution, write a class like Softmax and choose it in GymTask; for another kind of task,
write a class with GymTask's play and evaluate. A copy under another name refuses this script's checkpoints.
"""

import csv
import json
import math
import os
import re
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import datetime
from importlib.metadata import version
from inspect import formatannotation
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

SCRIPT = Path(__file__).stem


@dataclass
class Task:
    """What is learned, and for how long."""

    env_id: str = "CartPole-v1"
    """A Gymnasium task with Discrete or bounded Box actions, such as MountainCarContinuous-v0; or tabular."""
    horizon: int = 200
    """H, the steps after which a trajectory is cut off; evaluations play whole episodes of the task."""
    gamma: float = 0.99
    """Discount factor."""
    total_trajectories: int = 1_000
    """Trajectories in all, N + (m - 1) B for m steps (the last batch is played to its end)."""
    seed: int = 1
    """Seed of the policy, its actions and the episodes."""


@dataclass
class Algorithm:
    """Estimator and step."""

    algorithm: Literal["pg", "npg", "srvr-pg", "srvr-npg"] = "srvr-npg"
    """Plain or natural policy gradient, with or without recursive variance reduction."""
    large_batch: int = 25
    """N, trajectories of an estimate from scratch."""
    small_batch: int = 10
    """B, trajectories that correct an estimate (srvr-pg and srvr-npg)."""
    epoch_steps: int = 3
    """m, steps of an epoch: one from scratch and m - 1 corrected (srvr-pg and srvr-npg)."""
    baseline: Literal["none", "others"] = "others"
    """What is subtracted from the reward of step h: nothing, or its mean over a batch's other trajectories."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """How theta moves along the direction: by the learning rate alone, or by Adam."""
    learning_rate: float = 0.001
    """Step size."""
    adam_beta2: float = 0.99
    """Decay of Adam's squares; its first decay is 0.9."""
    solver: Literal["auto", "cholesky", "cg", "sgd"] = "auto"
    """Of the natural direction: auto is Cholesky up to 500 parameters, conjugate gradients above."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    cg_steps: int = 20
    """Steps of conjugate gradients."""
    subproblem_steps: int = 1_000
    """Steps of averaged SGD, one drawn state and action each."""
    hidden: int = 32
    """Width of the policy's one hidden layer."""
    std: float = 1.0
    """Standard deviation of continuous actions, in units in which they lie in [-1, 1]."""


@dataclass
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 200
    """Trajectories between evaluations (each waits for the end of a batch)."""
    eval_episodes: int = 10
    """Episodes of each evaluation, once with sampled actions (stochastic), once with the mode (deterministic)."""
    final_eval_episodes: int = 50
    """Episodes of the last evaluation, the one reported."""
    checkpoint_interval: int = 200
    """Trajectories between checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy and its gradients live; auto is CUDA if there is one."""
    num_threads: int = 1
    """Threads of PyTorch; networks this small gain nothing from more."""
    capture_video: bool = False
    """Write a GIF of the trained policy to its run folder (with --evaluate: of both ways to play)."""
    exp_name: str = SCRIPT
    """First part of the run folder's name."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    wandb_entity: str | None = None
    """Team on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


@dataclass
class Args(Run, Algorithm, Task):
    """Train a policy by plain or natural policy gradient, with or without recursive variance reduction."""


LONGEST_EPISODE = 20_000  # steps of an evaluation's episode of a task without a time limit

EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes", "trajectories")


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# ------------------------------------------------------------------------------------- policies of a flat vector theta


class Softmax:
    """pi(a | s) as a function of a flat vector of parameters, theta [P]: a softmax over a network's outputs.

    The network has tanh between its layers. Each layer's matrix has the biases in its last column, if there are any.
    """

    def __init__(self, sizes: Sequence[int], biases: bool = True):
        self.biases = biases
        self.shapes = [(after, before + biases) for before, after in pairwise(sizes)]
        self.size = sum(math.prod(shape) for shape in self.shapes)

    def initial(self) -> Tensor:
        """A random theta [P]: no biases, outputs near 0."""
        layers = [torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[1] - self.biases) for shape in self.shapes]
        layers[-1] *= 0.01
        if self.biases:
            for layer in layers:
                layer[:, -1] = 0
        return torch.cat([layer.flatten() for layer in layers])

    def outputs(self, theta: Tensor, obs: Tensor) -> Tensor:
        """Outputs [..., K] of the network for observations [..., O]."""
        x = obs
        layers = theta.split([math.prod(shape) for shape in self.shapes])
        for i, (layer, shape) in enumerate(zip(layers, self.shapes)):
            x = F.pad(x.tanh() if i else x, (0, int(self.biases)), value=1.0) @ layer.view(shape).T
        return x

    def sample(self, theta: Tensor, obs: Tensor) -> Tensor:
        """Actions [B, 1] for observations [B, O]."""
        return self.outputs(theta, obs).softmax(-1).multinomial(1)

    def mode(self, theta: Tensor, obs: Tensor) -> Tensor:
        """The most likely actions [B, 1]."""
        return self.outputs(theta, obs).argmax(-1, keepdim=True)

    def log_prob(self, theta: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a | s) [...]."""
        return self.outputs(theta, obs).log_softmax(-1).gather(-1, action)[..., 0]


class Gaussian(Softmax):
    """A Gaussian around the network's outputs, its standard deviation fixed; what is played is clipped to [-1, 1]."""

    def __init__(self, sizes: Sequence[int], std: float):
        super().__init__(sizes)
        self.std = std

    def sample(self, theta: Tensor, obs: Tensor) -> Tensor:
        """Actions [B, D] for observations [B, O], before they are clipped."""
        mean = self.outputs(theta, obs)
        return mean + self.std * torch.randn_like(mean)

    def mode(self, theta: Tensor, obs: Tensor) -> Tensor:
        """The means [B, D]."""
        return self.outputs(theta, obs)

    def log_prob(self, theta: Tensor, obs: Tensor, action: Tensor) -> Tensor:
        """log pi(a | s) [...], of the action before it is clipped."""
        z = (action - self.outputs(theta, obs)) / self.std
        return (-0.5 * z**2 - math.log(self.std) - 0.5 * math.log(2 * math.pi)).sum(-1)


# ----------------------------------------------------------------------------------------- estimators of the gradient


class Trajectories(NamedTuple):
    """N trajectories of H steps; after the end of an episode rewards are 0 and `running` is 0."""

    obs: Tensor  # [N, H, O]
    action: Tensor  # [N, H, D]
    reward: Tensor  # [N, H]
    running: Tensor  # [N, H], 1 or 0


def log_importance_weights(log_prob: Tensor, log_prob_sampled: Tensor, running: Tensor) -> Tensor:
    """log w_{0:h} [N, H], of the probability of actions 0 to h under another policy over that under the one playing.

    Products are sums of logarithms; after the end of an episode there are no actions, so the weight stays.
    """
    return ((log_prob - log_prob_sampled) * running).cumsum(-1)


def mean_of_others(reward: Tensor) -> Tensor:
    """[N, H]: the mean over the other trajectories, a baseline that a trajectory's own actions cannot change."""
    return (reward.sum(0) - reward) / (len(reward) - 1)


def rewards_to_go(reward: Tensor, weight: Tensor, gamma: float, baseline: str) -> Tensor:
    """sum_{h >= t} gamma^h (w_{0:h} r_h - w_{0:h} b_h) [N, H], what multiplies grad log pi(a_t | s_t)."""
    discount = gamma ** torch.arange(reward.shape[1], dtype=reward.dtype, device=reward.device)
    value = mean_of_others(weight * reward) if baseline == "others" else torch.zeros_like(reward)
    return (discount * weight * (reward - value)).flip(-1).cumsum(-1).flip(-1)


def trajectory_gradients(
    policy: Softmax, theta: Tensor, batch: Trajectories, gamma: float, baseline: str, sampled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPOMDP's g(tau | theta) [N, P] of each trajectory, and the logarithms of the weights [N, H], here 0.

    With `sampled`, the parameters that played, it is g_w(tau | theta), whose mean is the gradient at theta all the
    same, and the weights are importance weights. They count as constants: no gradient flows through them.
    """
    log_weight = torch.zeros_like(batch.reward)
    if sampled is not None:
        log_probs = (policy.log_prob(parameters, batch.obs, batch.action) for parameters in (theta, sampled))
        log_weight = log_importance_weights(*log_probs, batch.running)
    to_go = rewards_to_go(batch.reward, log_weight.exp(), gamma, baseline) * batch.running

    def surrogate(theta: Tensor, obs: Tensor, action: Tensor, to_go: Tensor) -> Tensor:
        return (policy.log_prob(theta, obs, action) * to_go).sum()

    return vmap(grad(surrogate), (None, 0, 0, 0))(theta, batch.obs, batch.action, to_go), log_weight


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2) [], of the weights of whole trajectories: from 1 / N (one counts) to 1 (all do).

    Here relative to the largest, from their logarithms [N]: all may be too small, or too large, for a number.
    """
    weight = (log_weight - log_weight.max()).exp()
    return weight.sum() ** 2 / weight.square().sum() / len(weight)


# ---------------------------------------------------------------------------------------------- natural gradient steps


class Steps(NamedTuple):
    """States and actions [K, ...] of a batch, and the weight of each in the discounted visitation [K], summing to 1."""

    obs: Tensor
    action: Tensor
    weight: Tensor


def visited(batch: Trajectories, gamma: float) -> Steps:
    """The steps of a batch before the ends of its episodes, weighted by gamma^t."""
    discount = gamma ** torch.arange(batch.reward.shape[1], dtype=batch.reward.dtype, device=batch.reward.device)
    running = batch.running > 0
    weight = discount.expand_as(batch.reward)[running]
    return Steps(batch.obs[running], batch.action[running], weight / weight.sum())


def scores(policy: Softmax, theta: Tensor, steps: Steps) -> Tensor:
    """grad log pi(a | s) [K, P] at every step."""
    return vmap(grad(policy.log_prob), (None, 0, 0))(theta, steps.obs, steps.action)


def fisher_matrix(policy: Softmax, theta: Tensor, steps: Steps) -> Tensor:
    """F [P, P], the mean of score score' over the steps."""
    score = scores(policy, theta, steps)
    return score.T @ (steps.weight[:, None] * score)


def fisher_product(policy: Softmax, theta: Tensor, steps: Steps) -> Callable[[Tensor], Tensor]:
    """The map v [P] -> F v [P], without a matrix."""
    log_prob = lambda theta: policy.log_prob(theta, steps.obs, steps.action)  # noqa: E731
    transposed = vjp(log_prob, theta)[1]
    return lambda v: transposed(steps.weight * jvp(log_prob, (theta,), (v,))[1])[0]


def solve_cholesky(matrix: Tensor, u: Tensor) -> Tensor:
    """inv(matrix) u [P]."""
    return torch.cholesky_solve(u[:, None], torch.linalg.cholesky(matrix))[:, 0]


def solve_cg(product: Callable[[Tensor], Tensor], u: Tensor, num_steps: int) -> Tensor:
    """The solution w [P] of product(w) = u by conjugate gradients, at most to a residual of 1e-10."""
    w, residual = torch.zeros_like(u), u
    direction, squared = residual, residual @ residual
    for _ in range(num_steps):
        if squared <= 1e-20 * (u @ u):
            break
        moved = product(direction)
        rate = squared / (direction @ moved)
        w = w + rate * direction
        residual = residual - rate * moved
        last, squared = squared, residual @ residual
        direction = residual + squared / last * direction
    return w


def solve_averaged_sgd(score: Tensor, u: Tensor, damping: float) -> Tensor:
    """The minimiser w [P] of E (w'score)^2 / 2 + damping w'w / 2 - w'u by SGD, one drawn score [K, P] a step.

    The rate is constant, 1 / (4 E |score|^2) (Bach and Moulines 2013); the mean of the second half is returned.
    """
    rate = 1 / (4 * (score.square().sum(1).mean() + damping))
    w, total = torch.zeros_like(u), torch.zeros_like(u)
    for k, drawn in enumerate(score):
        w = w - rate * (drawn * (drawn @ w) + damping * w - u)
        if k >= len(score) // 2:
            total += w
    return total / (len(score) - len(score) // 2)


def natural_direction(policy: Softmax, theta: Tensor, u: Tensor, batch: Trajectories, args: Args) -> Tensor:
    """w [P], about inv(F + damping) u, with the Fisher matrix of the batch."""
    steps = visited(batch, args.gamma)
    solver = args.solver if args.solver != "auto" else "cholesky" if policy.size <= 500 else "cg"
    if solver == "cholesky":
        return solve_cholesky(fisher_matrix(policy, theta, steps) + args.damping * torch.eye(len(u)).to(u), u)
    if solver == "cg":
        product = fisher_product(policy, theta, steps)
        return solve_cg(lambda v: product(v) + args.damping * v, u, args.cg_steps)
    rows = steps.weight.multinomial(args.subproblem_steps, replacement=True)
    return solve_averaged_sgd(scores(policy, theta, Steps(*(column[rows] for column in steps))), u, args.damping)


# ------------------------------------------------------------------------------------------- learner and its updates


class Learner(NamedTuple):
    """What training changes."""

    theta: Tensor  # [P]
    before: Tensor  # [P], theta one step ago
    estimate: Tensor  # [P], u
    first_moment: Tensor  # [P], Adam's
    second_moment: Tensor  # [P], Adam's
    updates: Tensor  # []


def new_learner(policy: Softmax, device: torch.device | str = "cpu") -> Learner:
    """Drawn on the CPU first, so a seed starts with the same policy on every device."""
    theta = policy.initial().to(device)
    return Learner(*(theta.clone() for _ in range(2)), *torch.zeros(3, len(theta)).to(theta), torch.tensor(0))


def epoch_of(args: Args) -> int:
    """m, the number of steps from one estimate from scratch to the next."""
    return args.epoch_steps if args.algorithm.startswith("srvr") else 1


def next_batch(learner: Learner, args: Args) -> int:
    """How many trajectories the next update needs: N, or B if it corrects an estimate."""
    return args.small_batch if learner.updates % epoch_of(args) else args.large_batch


def adam_moments(learner: Learner, direction: Tensor, beta2: float) -> Learner:
    """Adam's moments (Kingma and Ba 2015) after one more direction."""
    first = 0.9 * learner.first_moment + 0.1 * direction
    second = beta2 * learner.second_moment + (1 - beta2) * direction**2
    return learner._replace(first_moment=first, second_moment=second)


def update(policy: Softmax, learner: Learner, batch: Trajectories, args: Args) -> tuple[Learner, dict[str, Tensor]]:
    """One step of any of the four algorithms on a batch played by learner.theta; also metrics, each a tensor []."""
    theta = learner.theta
    gradients, _ = trajectory_gradients(policy, theta, batch, args.gamma, args.baseline)
    metrics = {}

    # 1. From scratch.
    if learner.updates % epoch_of(args) == 0:
        estimate = gradients.mean(0)

    # 2. Correct.
    else:
        before, log_weight = trajectory_gradients(policy, learner.before, batch, args.gamma, args.baseline, theta)
        estimate = learner.estimate + (gradients - before).mean(0)
        metrics["weights/effective_sample_size"] = effective_sample_size(log_weight[:, -1])
        metrics["weights/largest"] = log_weight.max().exp()

    # 3. Step.
    direction = estimate
    if args.algorithm.endswith("npg"):
        direction = natural_direction(policy, theta, estimate, batch, args)
    learner = learner._replace(before=theta, estimate=estimate, updates=learner.updates + 1)
    if args.optimizer == "adam":
        learner = adam_moments(learner, direction, args.adam_beta2)
        count = int(learner.updates)
        mean_square = learner.second_moment / (1 - args.adam_beta2**count)
        direction = learner.first_moment / (1 - 0.9**count) / (mean_square.sqrt() + 1e-8)
    learner = learner._replace(theta=theta + args.learning_rate * direction)

    steps = visited(batch, args.gamma)
    moved = [policy.log_prob(parameters, steps.obs, steps.action) for parameters in (theta, learner.theta)]
    metrics["policy/kl"] = (steps.weight * (moved[0] - moved[1])).sum()
    metrics["policy/entropy"] = -(steps.weight * moved[0]).sum()
    metrics["gradient/norm"] = estimate.norm()
    metrics["gradient/step_norm"] = (learner.theta - theta).norm()
    if len(gradients) > 1:  # of the mean of g over this batch
        metrics["gradient/variance"] = gradients.var(0).sum() / len(gradients)
    return learner, metrics


# ------------------------------------------------------------------------------------------ an MDP with exact answers


class MDP(NamedTuple):
    """A small MDP. Where probabilities of the next state sum to less than 1, an episode ends with the rest."""

    start: Tensor  # [S]
    transition: Tensor  # [S, A, S]
    reward: Tensor  # [S, A]


def random_mdp(num_states: int = 5, num_actions: int = 3, ends: float = 0.05, seed: int = 0) -> MDP:
    """Transitions that lead mostly to one or two states, rewards uniform in [0, 1]."""
    rng = np.random.default_rng(seed)
    transition = (1 - ends) * rng.dirichlet(np.full(num_states, 0.3), size=(num_states, num_actions))
    reward = rng.uniform(size=(num_states, num_actions))
    start = np.full(num_states, 1 / num_states)
    return MDP(*map(torch.from_numpy, (start, transition, reward)))


def exact_return(mdp: MDP, probs: Tensor, gamma: float, horizon: int | None = None) -> Tensor:
    """J [] of a policy with probabilities [S, A], discounted, over H steps or without end."""
    reward = (probs * mdp.reward).sum(1)
    chain = torch.einsum("sa,sap->sp", probs, mdp.transition)
    if horizon is None:
        return mdp.start @ torch.linalg.solve(torch.eye(len(chain)).to(chain) - gamma * chain, reward)
    value = torch.zeros_like(reward)
    for _ in range(horizon):
        value = reward + gamma * chain @ value
    return mdp.start @ value


def action_probs(mdp: MDP, theta: Tensor) -> Tensor:
    """[S, A] of the tabular softmax policy, whose theta [A S] has an entry for every action and state."""
    return theta.view(mdp.reward.T.shape).T.softmax(1)


def exact_gradient(mdp: MDP, theta: Tensor, gamma: float, horizon: int | None = None) -> Tensor:
    """grad J [P] of the tabular softmax policy."""
    return grad(lambda theta: exact_return(mdp, action_probs(mdp, theta), gamma, horizon))(theta)


def exact_fisher(mdp: MDP, theta: Tensor, gamma: float, horizon: int) -> Tensor:
    """F [P, P] of the tabular softmax policy, the mean over the discounted visitation of H steps."""
    probs, state = action_probs(mdp, theta), mdp.start
    visits = torch.zeros_like(state)
    for step in range(horizon):
        visits = visits + gamma**step * state
        state = torch.einsum("s,sa,sap->p", state, probs, mdp.transition)
    blocks = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]  # [S, A, A]
    return torch.einsum("s,sab,sz->asbz", visits / visits.sum(), blocks, torch.eye(len(visits)).to(probs)).reshape(
        len(theta), len(theta)
    )


def optimal_return(mdp: MDP, gamma: float) -> float:
    """J* without end, by value iteration."""
    value = torch.zeros_like(mdp.start)
    for _ in range(10_000):
        value = (mdp.reward + gamma * mdp.transition @ value).max(1).values
    return float(mdp.start @ value)


# ----------------------------------------------------------------------------------------------------------- tasks


class TabularTask:
    """The MDP of random_mdp, the same for every seed, observed as one-hot states, and its tabular softmax policy."""

    def __init__(self, args: Args, device: torch.device):
        self.args = args
        self.mdp = MDP(*(part.to(device) for part in random_mdp()))
        self.policy = Softmax(self.mdp.reward.shape, biases=False)

    def play(self, theta: Tensor, count: int, episode: int, global_step: int) -> Trajectories:
        """`count` trajectories [count, H, ...] of theta."""
        probs = action_probs(self.mdp, theta)
        ends = 1 - self.mdp.transition.sum(2, keepdim=True)
        to_next = torch.cat([self.mdp.transition, ends.clamp(min=0)], 2)
        state = self.mdp.start.multinomial(count, replacement=True)
        running = torch.ones(count, dtype=torch.bool, device=theta.device)
        played = []
        for _ in range(self.args.horizon):
            action = probs[state].multinomial(1)[:, 0]
            obs = F.one_hot(state, len(self.mdp.start)).to(theta)
            played.append((obs, action[:, None], self.mdp.reward[state, action] * running, running.to(theta)))
            after = to_next[state, action].multinomial(1)[:, 0]
            running = running & (after < len(self.mdp.start))
            state = torch.where(running, after, 0)
        return Trajectories(*(torch.stack(column, 1) for column in zip(*played)))

    def evaluate(
        self, theta: Tensor, deterministic: bool, episodes: int, seed: int, video: Path | None = None
    ) -> np.ndarray:
        """The exact discounted return J without end, of the policy or of its mode, as often as there are episodes."""
        probs = action_probs(self.mdp, theta)
        if deterministic:
            probs = F.one_hot(probs.argmax(1), probs.shape[1]).to(probs)
        return np.full(episodes, float(exact_return(self.mdp, probs, self.args.gamma)))

    def close(self) -> None:
        """Nothing is open."""


def is_bounded_vector(space: gym.Space) -> bool:
    """Whether actions of this space are float vectors, each number of which has two different bounds, as float32."""
    if not isinstance(space, Box) or len(space.shape) != 1 or not len(space.low) or space.dtype.kind != "f":
        return False
    width = np.subtract(space.high, space.low, dtype=np.float64)
    return bool(((width > 0) & (width < np.finfo(np.float32).max)).all())


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The Gymnasium task `env_id` with flat observations, and continuous actions in [-1, 1].

    Raises RunError unless Gymnasium knows it and its actions are Discrete or a bounded vector.
    """
    if not re.fullmatch(r"(\w[\w.]*:)?[^:\s]+", env_id):
        raise RunError(f"--env-id: {env_id!r} is no name of a task; write it as in CartPole-v1 or module:CartPole-v1")
    try:
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:  # ImportError: also for the tasks that Gymnasium has given away
        raise RunError(f"--env-id: {error} Choose tabular or a task of Gymnasium, such as CartPole-v1") from None
    space = env.action_space
    if not isinstance(space, Discrete) and not is_bounded_vector(space):
        choices = "choose a task with Discrete actions or a bounded vector, such as CartPole-v1"
        raise RunError(f"--env-id: {env_id} has actions {space}; {choices}")
    if not env.observation_space.is_np_flattenable:
        raise RunError(f"--env-id: {env_id} has observations {env.observation_space}, of no fixed size; choose another")
    env = gym.wrappers.FlattenObservation(env)
    if isinstance(space, Discrete):
        return gym.wrappers.TransformAction(env, lambda action: int(action[0]) + space.start, space)
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return gym.wrappers.TransformAction(env, lambda action: action.clip(-1, 1).astype(np.float32), env.action_space)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


class GymTask:
    """A Gymnasium task and a policy for it."""

    def __init__(self, args: Args, device: torch.device):
        self.args = args
        self.device = device
        self.envs = [make_env(args.env_id) for _ in range(max(args.large_batch, args.small_batch))]
        obs_size = math.prod(self.envs[0].observation_space.shape)
        space = self.envs[0].unwrapped.action_space
        if isinstance(space, Discrete):
            self.policy = Softmax((obs_size, args.hidden, int(space.n)))
        else:
            self.policy = Gaussian((obs_size, args.hidden, math.prod(space.shape)), args.std)

    def play(self, theta: Tensor, count: int, episode: int, global_step: int) -> Trajectories:
        """`count` trajectories [count, H, ...] of theta, from the seeds of this episode's number.

        Raises RunError where an observation or a reward is NaN, naming the environment step.
        """
        envs, horizon = self.envs[:count], self.args.horizon
        seeds = episode_seeds(0, self.args.seed, episode, count)
        now = np.stack([env.reset(seed=int(seed))[0] for env, seed in zip(envs, seeds)]).astype(np.float64)
        check_finite([("an observation", now)], global_step)
        observations = np.zeros((count, horizon, now.shape[1]))
        rewards, running = np.zeros((2, count, horizon))
        actions = []
        playing = np.arange(count)
        for step in range(horizon):
            action = self.policy.sample(theta, torch.from_numpy(now).to(self.device))
            actions.append(action)
            observations[playing, step] = now[playing]
            running[playing, step] = 1
            chosen = action.cpu().numpy()
            check_finite([("the action", chosen)], global_step)
            still = []
            for i in playing:
                now[i], rewards[i, step], terminated, truncated, _ = envs[i].step(chosen[i])
                if not (terminated or truncated):
                    still.append(i)
            global_step += len(playing)
            check_finite([("an observation", now), ("the reward", rewards[:, step])], global_step)
            playing = np.array(still, dtype=int)
            if not still:
                break
        missing = horizon - len(actions)
        actions += missing * [torch.zeros_like(actions[0])]
        arrays = observations, rewards, running
        obs, reward, mask = (torch.from_numpy(array).to(self.device) for array in arrays)
        return Trajectories(obs, torch.stack(actions, 1), reward, mask)

    def evaluate(
        self, theta: Tensor, deterministic: bool, episodes: int, seed: int, video: Path | None = None
    ) -> np.ndarray:
        """Undiscounted returns [episodes] of whole episodes, which leave no trace in training's random numbers.

        The first episode goes to the GIF `video`, if given.
        """
        envs = [make_env(self.args.env_id, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
        act = self.policy.mode if deterministic else self.policy.sample
        returns, film = [], []
        with forked_random_numbers(self.device):
            torch.manual_seed(seed)
            for wave in range(math.ceil(episodes / len(envs))):
                seeds = episode_seeds(1, seed, wave, len(envs))
                obs = np.stack([env.reset(seed=int(s))[0] for env, s in zip(envs, seeds)]).astype(np.float64)
                total, step = np.zeros(len(envs)), 0
                playing = list(range(len(envs)))
                while playing:
                    if step == LONGEST_EPISODE and envs[0].spec.max_episode_steps is None:
                        reason = f"has no time limit, and an evaluation's episode of it does not end in {step} steps"
                        raise RunError(f"--env-id: {self.args.env_id} {reason}; choose a task with max_episode_steps")
                    step += 1
                    if video and not wave and 0 in playing:
                        film.append(envs[0].render()[::2, ::2])
                    if not np.isfinite(obs).all():
                        raise RunError(f"an observation of {self.args.env_id} is NaN or infinite in an evaluation")
                    actions = act(theta, torch.from_numpy(obs[playing]).to(self.device)).cpu().numpy()
                    for i, action in zip(playing, actions):
                        obs[i], reward, terminated, truncated, _ = envs[i].step(action)
                        total[i] += reward
                        if terminated or truncated:
                            playing = [j for j in playing if j != i]
                if not np.isfinite(total).all():
                    raise RunError(f"a return of {self.args.env_id} is NaN or infinite in an evaluation")
                returns.extend(total)
        for env in envs:
            env.close()
        if video:
            import imageio

            imageio.mimsave(video, film[:: math.ceil(len(film) / 200)], duration=50, loop=0)
        return np.array(returns[:episodes])

    def close(self) -> None:
        for env in self.envs:
            env.close()


def make_task(args: Args, device: torch.device) -> TabularTask | GymTask:
    """The task that --env-id names."""
    return (TabularTask if args.env_id == "tabular" else GymTask)(args, device)


def forked_random_numbers(device: torch.device) -> AbstractContextManager:
    """Inside, PyTorch's random numbers may be seeded and drawn without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    trajectories: int = 0
    seconds: float = 0.0
    rows: list[dict[str, int | float | str]] = field(default_factory=list)  # of evaluations.csv


def train(args: Args, given: Collection[str] = (), signals: Sequence[int] = ()) -> dict:
    """Train one policy; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step, environment steps; trajectories; episodic_returns, the list of returns of the final
    deterministic evaluation; final_return, their mean; env_steps_per_second. Raises RunError for bad arguments and for
    NaN. `given` names arguments that count as asked for though they equal their defaults. When `signals` is no longer
    empty, the run saves a checkpoint and raises Stopped.
    """
    with ExitStack() as held:
        checkpoint = None
        if args.resume is not None:
            run_dir = existing_run("--resume", args.resume)
            held.enter_context(locked(run_dir))
            args, checkpoint = load_checkpoint("--resume", run_dir, args, given, free=("device",))
        check_args(args)
        torch.set_num_threads(args.num_threads)
        torch.manual_seed(args.seed)
        device = choose_device(args)
        task = make_task(args, device)
        held.callback(task.close)
        learner = new_learner(task.policy, device)
        progress = Progress()
        if checkpoint:
            progress = restore("--resume", run_dir, checkpoint, learner, device, args.seed)
        else:
            run_dir = create_run(args, args.env_id.replace("/", "-"))
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, task, learner, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    task: TabularTask | GymTask,
    learner: Learner,
    progress: Progress,
    signals: Sequence[int],
) -> dict:
    """Play, learn and log, from where `progress` stands to the end. Between updates a checkpoint holds everything."""
    first_step = progress.global_step
    started = time.monotonic()
    last_checkpoint = progress.trajectories if first_step else -args.checkpoint_interval
    writer = start_logging(args, run_dir, progress.trajectories)
    total, begin = args.total_trajectories, progress.trajectories
    bar = tqdm(total=total, initial=begin, unit="trajectory", desc=args.env_id, mininterval=1)

    def seconds() -> float:
        return progress.seconds + time.monotonic() - started

    def save() -> None:
        check_finite(learner._asdict().items(), progress.global_step)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), learner)
        if signals:
            bar.close()
            raise Stopped(f"stopped at step {progress.global_step}; go on with --resume {run_dir}")

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode in ("stochastic", "deterministic"):
            film = video if mode == "deterministic" else None
            returns = task.evaluate(learner.theta, mode == "deterministic", episodes, progress.global_step, film)
            mean, std = float(returns.mean()), float(returns.std())
            row = progress.global_step, round(seconds(), 1), mode, mean, std, episodes, progress.trajectories
            progress.rows.append(dict(zip(EVALUATION_COLUMNS, row)))
            writer.add_scalar(f"returns/{mode}", mean, progress.trajectories)
        write_evaluations(run_dir, progress.rows)
        return returns  # of the deterministic policy

    while progress.trajectories < args.total_trajectories:
        if signals or progress.trajectories - last_checkpoint >= args.checkpoint_interval:
            save()
            last_checkpoint = progress.trajectories

        # Play.
        count = next_batch(learner, args)
        batch = task.play(learner.theta, count, int(learner.updates), progress.global_step)
        progress.global_step += int(batch.running.sum())
        progress.trajectories += count

        # Learn.
        try:
            learner, metrics = update(task.policy, learner, batch, args)
        except torch.linalg.LinAlgError:
            where = f"at step {progress.global_step}; the last checkpoint is from before"
            raise RunError(f"the Fisher matrix is NaN or not positive {where}; --damping may help") from None
        check_finite([*metrics.items(), *learner._asdict().items()], progress.global_step)

        # Log.
        metrics["returns/training"] = batch.reward.sum(1).mean()
        metrics["steps_per_second"] = (progress.global_step - first_step) / (time.monotonic() - started)
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), progress.trajectories)
        bar.update(count)
        bar.set_postfix({"return": f"{float(metrics['returns/training']):.2f}"})
        due = progress.trajectories // args.eval_interval > (progress.trajectories - count) // args.eval_interval
        if due and progress.trajectories < args.total_trajectories:
            log_evaluation(args.eval_episodes)

    save()
    env_steps_per_second = progress.global_step / seconds()
    video = run_dir / "final.gif" if args.capture_video else None
    episodic_returns = log_evaluation(args.final_eval_episodes, video)
    bar.close()
    writer.close()
    result = {
        "run_dir": str(run_dir),
        "global_step": progress.global_step,
        "trajectories": progress.trajectories,
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("torch", "numpy", "gymnasium")}
    with whole_file(run_dir / "result.json") as path:
        path.write_text(json.dumps(result | {"versions": versions}, indent=2))
    return result


# ------------------------------------------------------------------------------------------------- files of a run


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type that a field's annotation names; True and False are no numbers here."""
    try:
        check_type(value, annotation, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return isinstance(value, bool) == (annotation is bool)


def require(args: Args, name: str, valid: bool, choices: str) -> None:
    """Raise RunError, naming the argument and what it must be, unless it is valid."""
    if not valid:
        raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)!r} is not valid; it must be {choices}")


def check_types(args: Args, smallest: dict[str, int]) -> None:
    """Raise RunError for the first argument of another type than its field, and for whole numbers out of bounds.

    These lie from `smallest`, or 1 where it does not name them, to 4294967295.
    """
    for argument in fields(args):
        value = getattr(args, argument.name)
        valid = fits(value, argument.type)
        require(args, argument.name, valid, f"of type {formatannotation(argument.type)}")
        if fits(value, int):
            low = smallest.get(argument.name, 1)
            require(args, argument.name, low <= value < 2**32, f"a whole number from {low} to {2**32 - 1}")


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""
    check_types(args, {"seed": 0, "large_batch": 2})
    check_run_args(args)
    smallest = 2 if args.baseline == "others" and args.algorithm.startswith("srvr") else 1
    require(args, "small_batch", args.small_batch >= smallest, "2 or more with --baseline others")
    for name in ("learning_rate", "damping", "std"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require(args, "gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require(args, "gamma", args.env_id != "tabular" or args.gamma < 1, "below 1 on --env-id tabular")
    require(args, "adam_beta2", 0 <= args.adam_beta2 < 1, "a number from 0 to below 1")
    size = max(args.large_batch, args.small_batch) * args.horizon
    require(args, "horizon", size <= 10**7, f"such that a batch has 1e7 steps or fewer, not {size:.3g}")
    if args.env_id == "tabular":
        require(args, "capture_video", not args.capture_video, "left out with --env-id tabular, which has no pictures")
    elif args.capture_video:
        try:
            env = make_env(args.env_id, "rgb_array")
            env.reset()
            env.render()[::2, ::2]
            env.close()
        except RunError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}; on a machine without a display, MUJOCO_GL=egl or osmesa may help"
            raise RunError(f"--capture-video: {args.env_id} cannot be drawn here ({reason})") from None


def check_run_args(args: Args) -> None:
    """Raise RunError for the first argument of a run, rather than of an algorithm, that makes no sense."""
    require(args, "exp_name", re.fullmatch(r"[\w.-]+", args.exp_name), "letters, digits, and the signs _ . -")
    require(args, "num_threads", args.num_threads <= 1024, "a whole number from 1 to 1024")
    cuda = torch.cuda.is_available()
    require(args, "device", args.device != "cuda" or cuda, "auto or cpu on this machine, where PyTorch finds no CUDA")
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise RunError("--track needs Weights & Biases: pip install wandb, or drop the flag") from None


def choose_device(args: Args) -> torch.device:
    """The device that --device names; auto is CUDA if there is one."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def check_finite(named_values: Iterable[tuple[str, Any]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not torch.as_tensor(value).isfinite().all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


def run_arguments(args: Args) -> dict:
    """The arguments that define a run, as opposed to what to do with it."""
    return {k: v for k, v in asdict(args).items() if k not in ("resume", "evaluate", "capture_video", "track")}


def create_run(args: Args, task: str) -> Path:
    """A new run folder with the arguments in it."""
    run_dir = Path("runs") / f"{args.exp_name}__{task}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    with whole_file(run_dir / "args.json") as path:
        path.write_text(json.dumps({"script": SCRIPT, **run_arguments(args)}, indent=2))
    return run_dir


def existing_run(flag: str, folder: str) -> Path:
    """A run folder by its name. Raises RunError, naming those there are, unless it holds a checkpoint."""
    if folder and (Path(folder) / "checkpoint.pt").is_file():
        return Path(folder)
    runs = ", ".join(str(path.parent) for path in sorted(Path("runs").glob("*/checkpoint.pt"))) or "none yet"
    raise RunError(f"{flag}: there is no checkpoint.pt in {folder!r}; run folders here: {runs}")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in this run folder. Raises RunError if one does."""
    path = run_dir / "lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = path.read_text() or "another process"
        raise RunError(f"--resume: {run_dir} is in use by {owner}; wait for its end or stop it") from None
    with lock:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, renamed to `path` in the end: a kill at any moment leaves a whole file, the old or the new.

    So does a full disk, as a RunError.
    """
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's own, at a full disk
        unfinished.unlink(missing_ok=True)
        raise RunError(f"cannot write {path} ({error}); the one before stays") from None


def save_checkpoint(run_dir: Path, args: Args, progress: Progress, learner: Learner) -> None:
    """Write checkpoint.pt, whole."""
    contents = {
        "script": SCRIPT,
        "args": run_arguments(args),
        "progress": asdict(progress),
        "learner": learner._asdict(),
        **random_state(learner.theta.device),
    }
    with whole_file(run_dir / "checkpoint.pt") as path:
        torch.save(contents, path)


@contextmanager
def damage_reported(flag: str, path: Path) -> Iterator[None]:
    """Whatever a truncated, changed or foreign file raises becomes one sentence."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{flag}: {path} is damaged ({type(error).__name__}); choose another") from None


def stored_arguments(
    flag: str, path: Path, contents: dict, args: Args, given: Collection[str], free: Collection[str]
) -> Args:
    """The arguments in what a file holds, its `script` and `args`, completed by ours; those in `free` may differ.

    Raises RunError if the file is damaged or another script's, or if ours ask for another run than the one it is from:
    by arguments that are in `given` or differ from their defaults.
    """
    with damage_reported(flag, path):
        script, stored = contents["script"], dict(contents["args"])
    if script != SCRIPT:
        raise RunError(f"{flag}: {path} belongs to {script}.py, not to {SCRIPT}.py; choose another")
    if not stored.keys() <= run_arguments(args).keys():
        raise RunError(f"{flag}: {path} is from another version of {SCRIPT}.py; choose another")
    with damage_reported(flag, path):
        if not all(fits(stored[item.name], item.type) for item in fields(args) if item.name in stored):
            raise TypeError("arguments")
    asked = {item.name for item in fields(args) if getattr(args, item.name) != item.default} | set(given)
    for name in (asked & stored.keys()) - set(free):
        ours, theirs, option = getattr(args, name), stored[name], f"--{name.replace('_', '-')}"
        if ours != theirs:
            raise RunError(f"{flag}: {path} ran with {option} {theirs}, not {ours}; drop {option}")
    for name in {"env_id", "task"} - asked:
        if ":" in str(stored.get(name)):  # gym.make would import what stands before the colon
            option = f"--{name.replace('_', '-')}"
            raise RunError(f"{flag}: {path} names a module to import, {stored[name]}; to trust it, name it by {option}")
    return replace(args, **{name: value for name, value in stored.items() if name not in asked})


def load_checkpoint(
    flag: str, run_dir: Path, args: Args, given: Collection[str], free: Collection[str]
) -> tuple[Args, dict]:
    """A run's arguments, see stored_arguments, and the contents of its checkpoint. Loading executes no code."""
    path = run_dir / "checkpoint.pt"
    with damage_reported(flag, path):
        if zipfile.ZipFile(path).testzip():  # PyTorch does not compare the checksums
            raise ValueError("checksum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    run_args = stored_arguments(flag, path, checkpoint, args, given, free)
    if len(checkpoint["args"]) < len(run_arguments(args)):
        raise RunError(f"{flag}: {path} is from another version of {SCRIPT}.py; choose another")
    return run_args, checkpoint


@torch.no_grad()
def copy_into(ours: Any, stored: Any) -> None:
    """Copy nested dicts and lists of tensors onto ours. ValueError unless names, shapes and types are the same, or at
    a NaN or infinite value."""
    if isinstance(ours, Tensor):
        if (ours.shape, ours.dtype) != (stored.shape, stored.dtype) or not stored.isfinite().all():
            raise ValueError("another shape or type, or NaN")
        ours.copy_(stored)
    elif isinstance(ours, dict):
        if ours.keys() != stored.keys():
            raise ValueError("other names")
        for name, value in ours.items():
            copy_into(value, stored[name])
    else:
        for value, theirs in zip(ours, stored, strict=True):
            copy_into(value, theirs)


def read_progress(stored: dict) -> Progress:
    """Where a checkpoint stands. Raises KeyError, TypeError or ValueError unless all is there, and possible."""
    progress = Progress(**stored)
    types = all(fits(stored[item.name], item.type) for item in fields(Progress))
    counts = [value for value in stored.values() if fits(value, int)]
    positive = math.isfinite(progress.seconds) and min(*counts, progress.seconds) >= 0
    columns = all(tuple(row) == EVALUATION_COLUMNS for row in progress.rows)
    values = all(isinstance(value, str) == (name == "mode") for row in progress.rows for name, value in row.items())
    if not (types and positive and columns and values):
        raise ValueError("progress")
    return progress


def restore(flag: str, run_dir: Path, checkpoint: dict, learner: Learner, device: torch.device, seed: int) -> Progress:
    """Bring learner and random numbers to where the checkpoint stands. Raises RunError if it is damaged."""
    with damage_reported(flag, run_dir / "checkpoint.pt"):
        progress = read_progress(checkpoint["progress"])
        copy_into(learner._asdict(), checkpoint["learner"])
        set_random_state(checkpoint, device, seed + progress.global_step)
    return progress


def random_state(device: torch.device) -> dict:
    """PyTorch's random numbers on the device, for a checkpoint."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return {"device": device.type, "rng": state}


def set_random_state(checkpoint: dict, device: torch.device, seed: int) -> None:
    """Go on with the checkpoint's random numbers or, if they are another kind of device's, with new ones."""
    if checkpoint["device"] not in ("cpu", "cuda"):
        raise ValueError("device")
    if checkpoint["device"] != device.type:
        torch.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.set_rng_state(checkpoint["rng"], device)
    else:
        torch.set_rng_state(checkpoint["rng"])


def write_evaluations(run_dir: Path, rows: list[dict]) -> None:
    """Write evaluations.csv, whole."""
    with whole_file(run_dir / "evaluations.csv") as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def start_logging(args: Args, run_dir: Path, global_step: int) -> SummaryWriter:
    """TensorBoard's writer, with the arguments as a table in its text tab; --track mirrors it to Weights & Biases."""
    if args.track:
        import wandb

        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=run_dir.name,
            config=run_arguments(args),
            sync_tensorboard=True,
        )
    writer = SummaryWriter(run_dir, purge_step=global_step + 1)  # those of the checkpoint's own step stay
    table = [f"|{name}|{value}|" for name, value in run_arguments(args).items()]
    writer.add_text("arguments", "\n".join(["|argument|value|", "|-|-|", *table]), global_step)
    return writer


# ---------------------------------------------------------------------------------------------------- command line


def play(args: Args, given: Collection[str] = ()) -> None:
    """--evaluate: play a run's policy and print its returns."""
    run_dir = existing_run("--evaluate", args.evaluate)
    free = ("seed", "final_eval_episodes", "num_threads", "device")
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, given, free)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    device = choose_device(args)
    task = make_task(args, device)
    learner = new_learner(task.policy, device)
    with damage_reported("--evaluate", run_dir / "checkpoint.pt"):
        copy_into(learner._asdict(), checkpoint["learner"])
    for mode in ("stochastic", "deterministic"):
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        returns = task.evaluate(learner.theta, mode == "deterministic", args.final_eval_episodes, args.seed, video)
        spread = f"{returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes"
        print(f"{mode:13s} return {spread}")
        if video:
            print(f"{'':13s} video {video}")
    task.close()


def read_command_line() -> tuple[Args, set[str]]:
    """The arguments, with --help in the groups that Args is made of, and the names of those that were given."""
    groups = [(group.__name__, group, field(default_factory=group)) for group in reversed(Args.__bases__)]
    parsed = tyro.cli(make_dataclass("Groups", groups), description=Args.__doc__, config=(tyro.conf.OmitArgPrefixes,))
    values = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    flags = {word[2:].split("=")[0].replace("-", "_").removeprefix("no_") for word in sys.argv if word[:2] == "--"}
    return Args(**values), flags & values.keys()


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list to which SIGINT and SIGTERM are added, so that a run can end in order; a second one ends it at once."""
    signals = []

    def note(number: int, frame: Any) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("\nstopping where a checkpoint allows it; the same signal again stops at once", file=sys.stderr)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(args: Args, given: Collection[str] = ()) -> None:
    """What the command line asks for; a failure is one line on standard error and exit code 1, a signal 128 + n."""
    try:
        if args.resume is not None and args.evaluate is not None:
            raise RunError("--resume: goes on with a run, and --evaluate plays one; give one of them")
        if args.evaluate is not None:
            play(args, given)
        else:
            with noted_signals() as signals:
                result = train(args, given, signals)
            print(f"final return {result['final_return']:.2f}, run folder {result['run_dir']}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + signals[0]) from None
    except KeyboardInterrupt:  # while playing
        raise SystemExit(130) from None
    except (RunError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{SCRIPT}.py: error: {str(error) or 'out of memory'}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch says where the CPU has no memory left
            raise
        raise SystemExit(f"{SCRIPT}.py: error: out of memory; choose smaller numbers ({error})") from None


if __name__ == "__main__":
    main(*read_command_line())
