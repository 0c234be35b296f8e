"""Bang-bang control: PPO in which the policy's distribution is the one thing that changes.

Seyde, Gilitschenski, Schwarting, Stellato, Riedmiller, Wulfmeier, Rus, "Is Bang-Bang Control All You Need? Solving
Continuous Control with Bernoulli Policies", NeurIPS 2021, arXiv 2111.02552. No code is public; the PPO here (Schulman
et al. 2017) has the settings of CleanRL's ppo_continuous_action.py, so that a Gaussian run is the usual baseline.

    python bang_bang.py --env-id HalfCheetah-v5 --policy bernoulli

1. --policy bernoulli plays each action dimension at one of its two bounds, with probability sigmoid(logit);
   --policy categorical at one of --bins evenly spaced values (3: bang-off-bang); --policy gaussian anywhere between.
2. A rollout is played; generalised advantages are estimated with a value function that bootstraps at time limits.
3. Policy and value function take minibatch steps on the clipped surrogate of the rollout.
4. Evaluation plays the mode of the distribution, and samples of it.

Where the dynamics are affine in the action and the reward does not depend on it, the optimal continuous-time policy
maximises something linear in the action, so it lies at the bounds (but where that is constant for a while, a singular
arc). --action-cost subtracts a cost of acting from the reward, and shows where that ends.
docs/bang_bang.md numbers the implementation details and explains the logged scalars.

To fork it for another distribution, write a class like BernoulliPolicy and name it in POLICIES and in --policy; for
other tasks, rewrite make_env. A copy under another name refuses this script's checkpoints.
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
from functools import partial
from importlib.metadata import version
from inspect import formatannotation
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

SCRIPT = Path(__file__).stem


@dataclass
class Task:
    """What is learned, and for how long."""

    env_id: str = "HalfCheetah-v5"
    """A Gymnasium task with a Box of continuous actions, such as Pendulum-v1 or dm_control/walker-walk-v0."""
    num_envs: int = 1
    """Copies of the task, stepped one after the other in this process."""
    total_timesteps: int = 200_000
    """Environment steps in all, summed over the copies (the last rollout is played to its end)."""
    seed: int = 1
    """Seed of networks, exploration, minibatches and episodes."""
    action_cost: float = 0.0
    """c, what acting costs: the reward loses c |a| (l1) or c / 2 a^2 (l2), summed over dimensions in [-1, 1]."""
    action_cost_form: Literal["l1", "l2"] = "l1"
    """Form of the cost."""


@dataclass
class Policy:
    """The policy's distribution and the networks."""

    policy: Literal["bernoulli", "categorical", "gaussian"] = "bernoulli"
    """Distribution of each action dimension: on its two bounds, on evenly spaced values, or a Gaussian."""
    bins: int = 3
    """Values of each action dimension of the categorical policy, from bound to bound."""
    squash: Literal["clip", "tanh"] = "clip"
    """How the Gaussian's actions are kept within the bounds."""
    hidden: int = 64
    """Width of all networks' two hidden layers."""


@dataclass
class PPO:
    """Proximal policy optimisation; names and values are CleanRL's."""

    num_steps: int = 2048
    """Steps of each copy in a rollout."""
    update_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches in a pass."""
    learning_rate: float = 3e-4
    """Learning rate at the start; it falls linearly to 0."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantages."""
    clip_coef: float = 0.2
    """How far the probability ratio may pay, and how far the values may move."""
    ent_coef: float = 0.0
    """Weight of the entropy in the loss."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm that gradients are clipped to."""


@dataclass
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 40_000
    """Environment steps between evaluations (each waits for the end of a rollout)."""
    eval_episodes: int = 10
    """Episodes of each evaluation, once with sampled actions (stochastic), once with the mode (deterministic)."""
    final_eval_episodes: int = 50
    """Episodes of the last evaluation, the one reported."""
    checkpoint_interval: int = 20_000
    """Environment steps between checkpoints. Each also ends the copies' episodes early, as a time limit does."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks and rollouts live; auto is CUDA if there is one."""
    compile: bool = False
    """Run the minibatch steps through torch.compile (needs a C++ compiler)."""
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
class Args(Run, PPO, Policy, Task):
    """Train PPO with a Bernoulli, categorical or Gaussian policy; the defaults are those of the reported results."""


LONGEST_EPISODE = 20_000  # steps of an evaluation's episode of a task without a time limit

PLAY_COLUMNS = ("return_without_cost", "saturation", "switching_rate")
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes", *PLAY_COLUMNS)


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# -------------------------------------------------------------------------------- rollouts and advantages: pure maths


class Rollout(NamedTuple):
    """What was played: [T, E, ...]. Observations and rewards are normalised."""

    obs: Tensor
    choice: Tensor
    reward: Tensor
    terminated: Tensor
    ended: Tensor
    next_obs: Tensor


def advantages(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages [T, E] (Schulman et al. 2016, eq. 16) from the values [T, E] of obs and next_obs.

        A_t = delta_t + gamma lambda A_{t+1}        delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    A terminated step has no future; one that was cut off bootstraps, but nothing after it counts.
    """
    delta = rollout.reward + gamma * (1 - rollout.terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - rollout.ended)
    advantage = torch.zeros_like(delta[0])
    backwards = []
    for d, k in zip(reversed(delta.unbind()), reversed(decay.unbind())):
        advantage = d + k * advantage
        backwards.append(advantage)
    return torch.stack(backwards[::-1])


def saturation(actions: Tensor) -> Tensor:
    """Share [] of actions in [-1, 1] that lie within 5 % of their range from a bound."""
    return (actions.abs() >= 0.9).float().mean()


# ------------------------------------------------------------------------------------------------------- policies


def mlp(in_features: int, hidden: int, out_features: int, last_gain: float) -> nn.Sequential:
    """A tanh network with two hidden layers, orthogonal weights and no biases at first, as CleanRL's."""
    layers = [nn.Linear(in_features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_features)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class BernoulliPolicy(nn.Module):
    """Bang-bang: each dimension of the action at its upper bound with probability sigmoid(logit), or at its lower.

    A policy maps observations [..., O] to the parameters of its distribution. What it draws is a choice [..., D], here
    1 or 0 (upper or lower), that `action` turns into an action [..., D] in [-1, 1].
    """

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size, 0.01)

    def forward(self, obs: Tensor) -> Tensor:
        """Logits [..., D]."""
        return self.network(obs)

    def sample(self, logits: Tensor) -> Tensor:
        return torch.bernoulli(logits.sigmoid())

    def mode(self, logits: Tensor) -> Tensor:
        return (logits > 0).float()

    def action(self, choice: Tensor) -> Tensor:
        return 2 * choice - 1

    def log_prob(self, logits: Tensor, choice: Tensor) -> Tensor:
        """[...], of the whole choice."""
        return -F.binary_cross_entropy_with_logits(logits, choice, reduction="none").sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """[...] in nats, from 0 to D ln 2."""
        return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two logits."""
        return (p.sigmoid() * (p - q) - F.softplus(p) + F.softplus(q)).sum(-1)


class CategoricalPolicy(nn.Module):
    """Each dimension of the action at one of `bins` evenly spaced values, bounds included; 3 is bang-off-bang."""

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size * args.bins, 0.01)
        self.register_buffer("values", torch.linspace(-1, 1, args.bins), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Log-probabilities [..., D, bins]."""
        return self.network(obs).unflatten(-1, (-1, len(self.values))).log_softmax(-1)

    def sample(self, log_probs: Tensor) -> Tensor:
        """The index of a value, for each dimension."""
        return log_probs.flatten(0, -2).exp().multinomial(1).view(log_probs.shape[:-1])

    def mode(self, log_probs: Tensor) -> Tensor:
        return log_probs.argmax(-1)

    def action(self, choice: Tensor) -> Tensor:
        return self.values[choice]

    def log_prob(self, log_probs: Tensor, choice: Tensor) -> Tensor:
        """[...], of the whole choice."""
        return log_probs.gather(-1, choice[..., None])[..., 0].sum(-1)

    def entropy(self, log_probs: Tensor) -> Tensor:
        """[...] in nats, from 0 to D ln(bins)."""
        return -(log_probs.exp() * log_probs).sum((-2, -1))

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two log-probabilities."""
        return (p.exp() * (p - q)).sum((-2, -1))


class GaussianPolicy(nn.Module):
    """A Gaussian whose mean depends on the observation and whose deviation does not, clipped to the bounds or squashed.

    The choice is the Gaussian's own value. Clipped, log-probability and entropy are those of the choice, as in CleanRL:
    the gradient does not know that values beyond a bound act alike. Under tanh they are those of the action.
    """

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size, 0.01)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.tanh = args.squash == "tanh"
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        weights = weights / weights.sum()
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float32), persistent=False)
        self.register_buffer("node_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Mean and log standard deviation [2, ..., D]."""
        mean = self.network(obs)
        return torch.stack([mean, self.log_std.expand_as(mean)])

    def sample(self, parameters: Tensor) -> Tensor:
        return torch.normal(parameters[0], parameters[1].exp())

    def mode(self, parameters: Tensor) -> Tensor:
        """The Gaussian's mean."""
        return parameters[0]

    def action(self, choice: Tensor) -> Tensor:
        return choice.tanh() if self.tanh else choice.clamp(-1, 1)

    def log_prob(self, parameters: Tensor, choice: Tensor) -> Tensor:
        """[...], of the choice (clip) or of the action (tanh)."""
        mean, log_std = parameters
        log_prob = -0.5 * ((choice - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return (log_prob - self.log_slope(choice) if self.tanh else log_prob).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """[...] in nats, of the choice (clip) or of the action (tanh; by Gauss-Hermite quadrature)."""
        mean, log_std = parameters
        entropy = log_std + 0.5 * math.log(2 * math.pi * math.e)
        if self.tanh:
            choices = mean[..., None] + log_std.exp()[..., None] * self.nodes
            entropy = entropy + self.log_slope(choices) @ self.node_weights
        return entropy.sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two parameters; tanh does not change it."""
        p_mean, p_log_std = p
        q_mean, q_log_std = q
        ratio = (2 * (p_log_std - q_log_std)).exp()
        distance = ((p_mean - q_mean) / q_log_std.exp()) ** 2
        return (0.5 * (ratio + distance - 1) - (p_log_std - q_log_std)).sum(-1)

    @staticmethod
    def log_slope(choice: Tensor) -> Tensor:
        """log(1 - tanh(choice)^2), without cancellation."""
        return 2 * (math.log(2) - choice - F.softplus(-2 * choice))


POLICIES = {"bernoulli": BernoulliPolicy, "categorical": CategoricalPolicy, "gaussian": GaussianPolicy}


# ------------------------------------------------------------------------------------------- learner and its updates


class Adam(torch.optim.Adam):
    """torch.optim.Adam that an update compiles through: all of its state is there from the start, and no hooks run."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float = 1e-8):
        super().__init__(parameters, lr, eps=eps)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def descend(self, gradients: Sequence[Tensor]) -> None:
        """One step down the gradients of the parameters, in their order."""
        (group,) = self.param_groups
        states = [self.state[parameter] for parameter in group["params"]]
        compiling = torch.compiler.is_compiling()  # fused by the compiler, then
        adam(
            group["params"],
            list(gradients),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=not compiling,
            capturable=compiling and states[0]["step"].is_cuda,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


class Learner(nn.Module):
    """What training changes: policy, value function and their optimiser, all on one device.

    The networks are drawn on the CPU first, so a seed starts with the same ones on every device.
    """

    def __init__(self, args: Args, obs_size: int, action_size: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.args = args
        self.policy = POLICIES[args.policy](args, obs_size, action_size)
        self.value = mlp(obs_size, args.hidden, 1, 1.0)
        # A tensor, so that a compiled step reads it anew. Fused Adam wants it double on the CPU and single on CUDA.
        precision = torch.float64 if torch.device(device).type == "cpu" else torch.float32
        learning_rate = torch.tensor(args.learning_rate, dtype=precision)
        self.register_buffer("learning_rate", learning_rate, persistent=False)
        self.to(device)

        self.optimizer = Adam(self.parameters(), args.learning_rate, eps=1e-5)
        self.optimizer.param_groups[0]["lr"] = self.learning_rate

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def optimizers(self) -> list[Adam]:
        return [self.optimizer]

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [B, D] in [-1, 1] for normalised observations [B, O]."""
        parameters = self.policy(obs)
        choice = self.policy.mode(parameters) if deterministic else self.policy.sample(parameters)
        return self.policy.action(choice)


class Minibatch(NamedTuple):
    """Steps [B, ...] of a rollout; log-probability of the choice, advantage and value are from before the update."""

    obs: Tensor
    choice: Tensor
    log_prob: Tensor
    advantage: Tensor
    value: Tensor


def update_minibatch(learner: Learner, batch: Minibatch) -> dict[str, Tensor]:
    """One step on the clipped surrogate (Schulman et al. 2017, eq. 7 and 9); returns metrics, each a tensor [].

        ratio = pi(a | s) / pi_old(a | s)        gain = min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A)

    A is normalised, and the value is held near the old one in the same way.
    """
    args, policy = learner.args, learner.policy
    parameters = policy(batch.obs)
    ratio = (policy.log_prob(parameters, batch.choice) - batch.log_prob).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    advantage = (batch.advantage - batch.advantage.mean()) / (batch.advantage.std() + 1e-8)
    policy_loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    entropy = policy.entropy(parameters).mean()

    value = learner.value(batch.obs)[:, 0]
    near = batch.value + (value - batch.value).clamp(-args.clip_coef, args.clip_coef)
    target = batch.advantage + batch.value
    value_loss = 0.5 * torch.maximum((value - target).square(), (near - target).square()).mean()

    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    take_step(learner.optimizer, loss, args.max_grad_norm)
    metrics = {"losses/policy": policy_loss, "losses/value": value_loss, "policy/entropy": entropy}
    return {name: metric.detach() for name, metric in metrics.items()}


def update(learner: Learner, rollout: Rollout, step: Callable = update_minibatch) -> dict[str, Tensor]:
    """Epochs of minibatch steps on a rollout; returns metrics, each a tensor [], losses those of the last minibatch."""
    args, policy = learner.args, learner.policy
    with torch.no_grad():
        old = policy(rollout.obs)
        log_prob = policy.log_prob(old, rollout.choice)
        value = learner.value(rollout.obs)[..., 0]
        next_value = learner.value(rollout.next_obs)[..., 0]
        advantage = advantages(rollout, value, next_value, args.gamma, args.gae_lambda)
    columns = rollout.obs, rollout.choice, log_prob, advantage, value
    steps = Minibatch(*(column.flatten(0, 1) for column in columns))

    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(steps.obs), device=learner.device).chunk(args.num_minibatches):
            metrics = step(learner, Minibatch(*(column[rows] for column in steps)))

    with torch.no_grad():
        target = steps.advantage + steps.value
        variance = target.var()
        explained = torch.where(variance == 0, 0.0, 1 - (target - steps.value).var() / variance)
        kl = policy.kl(old, policy(rollout.obs)).mean()
    return metrics | {"losses/explained_variance": explained, "policy/kl": kl}


def take_step(optimizer: Adam, loss: Tensor, max_grad_norm: float) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only, their gradient clipped."""
    gradients = torch.autograd.grad(loss, optimizer.param_groups[0]["params"])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    optimizer.descend([gradient * scale for gradient in gradients])


def compiled(function: Callable, learner: Learner, signals: Sequence[int] = ()) -> Callable:
    """An update of this learner through torch.compile: one graph, gradients and optimisers included.

    On CUDA it is replayed as a CUDA graph. Random numbers stay those of the function itself. Raises RunError where the
    compiler fails; Stopped where `signals` are not empty then, since Ctrl-C reaches the compiler, too.
    """
    torch._dynamo.config.trace_autograd_ops = True
    on_cuda = next(learner.parameters()).is_cuda
    for optimizer in learner.optimizers() if on_cuda else ():
        for state in optimizer.state.values():
            for tensor in state.values():
                torch._dynamo.mark_static_address(tensor)  # a CUDA graph may then change it in place
    options = {"fallback_random": True, "triton.cudagraphs" if on_cuda else "cpp_wrapper": True}
    step = torch.compile(function, fullgraph=True, options=options)

    def step_or_sentence(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except torch._dynamo.exc.ShortenTraceback as error:
            if signals:
                raise Stopped("stopped while compiling; --resume goes on from the last checkpoint") from None
            reason = " ".join(str(error).split("\n")[:2]).strip()
            raise RunError(f"--compile: the compiler failed ({reason}); try --no-compile") from None

    return step_or_sentence


# -------------------------------------------------------------------------------------------------- normalisation


class Normalizer:
    """Running statistics that bring observations to zero mean and unit variance, and returns to unit variance."""

    def __init__(self, obs_size: int, num_envs: int, gamma: float):
        self.obs = RunningMeanStd(shape=(obs_size,))
        self.returns = RunningMeanStd(shape=())
        self.discounted = np.zeros(num_envs)
        self.gamma = gamma

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """Observations [..., O] by the statistics so far, float32, at most 10 from zero."""
        scaled = (obs - self.obs.mean) / np.sqrt(self.obs.var + 1e-8)
        return scaled.clip(-10, 10).astype(np.float32)

    def scale_reward(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Rewards [E] over the deviation of the discounted returns that they add to, at most 10 from zero."""
        self.discounted = self.discounted * self.gamma + reward
        self.returns.update(self.discounted)
        self.discounted[ended] = 0
        return (reward / np.sqrt(self.returns.var + 1e-8)).clip(-10, 10)

    def state_dict(self) -> dict:
        statistics = [x for rms in (self.obs, self.returns) for x in (rms.mean, rms.var, rms.count)]
        return {"statistics": [torch.tensor(x, dtype=torch.float64) for x in statistics]}

    def load_state_dict(self, state: dict) -> None:
        """ValueError unless the stored statistics are of the shapes that they should be, and possible."""
        ours = self.state_dict()
        copy_into(ours, state)
        for rms, start in ((self.obs, 0), (self.returns, 3)):
            rms.mean, rms.var, rms.count = (x.numpy() for x in ours["statistics"][start : start + 3])
            if rms.var.min() < 0 or rms.count <= 0:
                raise ValueError("variance or count")


# ---------------------------------------------------------------------------------------------------- environment


def is_bounded_vector(space: gym.Space) -> bool:
    """Whether actions of this space are float vectors, each number of which has two different bounds, as float32."""
    if not isinstance(space, Box) or len(space.shape) != 1 or not len(space.low) or space.dtype.kind != "f":
        return False
    width = np.subtract(space.high, space.low, dtype=np.float64)
    return bool(((width > 0) & (width < np.finfo(np.float32).max)).all())


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The Gymnasium task `env_id` with flat float32 observations and actions in [-1, 1].

    Raises RunError unless Gymnasium knows it and its actions are a bounded vector.
    """
    if not re.fullmatch(r"(\w[\w.]*:)?[^:\s]+", env_id):
        raise RunError(f"--env-id: {env_id!r} is no name of a task; write it as in Hopper-v5 or module:Hopper-v5")
    try:
        if env_id.startswith("dm_control/"):
            import shimmy  # noqa: F401, registers the tasks of DM Control
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.Error, ImportError) as error:  # ImportError: also for the tasks that Gymnasium has given away
        raise RunError(f"--env-id: {error} Choose a task with continuous actions, such as Hopper-v5") from None
    space = env.action_space
    if not is_bounded_vector(space):
        raise RunError(f"--env-id: {env_id} has actions {space}; choose a task with a bounded vector, as in Hopper-v5")
    if not env.observation_space.is_np_flattenable:
        raise RunError(f"--env-id: {env_id} has observations {env.observation_space}, of no fixed size; choose another")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


class ActionCost(gym.Wrapper):
    """Subtracts a cost of acting from the reward of a task with actions in [-1, 1]; info["action_cost"] is the cost."""

    def __init__(self, env: gym.Env, coefficient: float, form: str):
        super().__init__(env)
        self.coefficient = coefficient
        self.form = form

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        size = np.abs(action).sum() if self.form == "l1" else 0.5 * np.square(action).sum()
        cost = self.coefficient * float(size)
        return obs, reward - cost, terminated, truncated, info | {"action_cost": cost}


def make_costly_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The task of `args`, its cost of acting included."""
    return ActionCost(make_env(args.env_id, render_mode), args.action_cost, args.action_cost_form)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ------------------------------------------------------------------------------------------------------ evaluation


def ways_to_play(learner: Learner, normalizer: Normalizer) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """stochastic: sampled actions; deterministic: the mode of the distribution."""

    def act(obs: np.ndarray, deterministic: bool) -> np.ndarray:
        scaled = torch.from_numpy(normalizer(obs)).to(learner.device)
        return learner.act(scaled, deterministic).cpu().numpy()

    return {"stochastic": partial(act, deterministic=False), "deterministic": partial(act, deterministic=True)}


def evaluate(
    act: Callable[[np.ndarray], np.ndarray],
    args: Args,
    episodes: int,
    seed: int,
    video: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Plays act, raw observations [B, O] to actions [B, D] in [-1, 1], without touching training's random numbers.

    Those that act draws are of `device`. Returns, each [episodes]: return (undiscounted), return_without_cost,
    saturation, and switching_rate, the share of steps and dimensions where the action changes sides. The first episode
    goes to the GIF `video`, if given.
    """
    envs = [make_costly_env(args, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
    film = []
    results = []
    with forked_random_numbers(torch.device(device)):
        torch.manual_seed(seed)
        for wave in range(math.ceil(episodes / len(envs))):
            obs = [env.reset(seed=int(s))[0] for env, s in zip(envs, episode_seeds(1, seed, wave, len(envs)))]
            rewards = [[] for _ in envs]
            costs = [[] for _ in envs]
            played = [[] for _ in envs]
            step, playing = 0, list(range(len(envs)))
            while playing:
                if step == LONGEST_EPISODE and envs[0].spec.max_episode_steps is None:
                    reason = f"has no time limit, and an evaluation's episode of it does not end in {step} steps"
                    raise RunError(f"--env-id: {args.env_id} {reason}; choose a task with max_episode_steps")
                step += 1
                if video and not wave and 0 in playing:
                    film.append(envs[0].render()[::2, ::2])
                seen = np.stack([obs[i] for i in playing])
                if not np.isfinite(seen).all():
                    raise RunError(f"an observation of {args.env_id} is NaN or infinite in an evaluation")
                for i, action in zip(playing, act(seen)):
                    obs[i], reward, terminated, truncated, info = envs[i].step(action)
                    rewards[i].append(reward)
                    costs[i].append(info["action_cost"])
                    played[i].append(action)
                    if terminated or truncated:
                        playing = [j for j in playing if j != i]
            for r, c, a in zip(rewards, costs, map(np.array, played)):
                if not np.isfinite(r).all():
                    raise RunError(f"a reward of {args.env_id} is NaN or infinite in an evaluation")
                saturated = saturation(torch.from_numpy(a)).item()
                switching_rate = (a[1:] * a[:-1] < 0).mean() if len(a) > 1 else 0.0
                results.append((sum(r), sum(r) + sum(c), saturated, switching_rate))
    for env in envs:
        env.close()  # else DM Control's renderer fails at the interpreter's exit
    if video:
        import imageio

        imageio.mimsave(video, film[:: math.ceil(len(film) / 200)], duration=50, loop=0)
    return dict(zip(("return", *PLAY_COLUMNS), np.array(results[:episodes]).T))


def forked_random_numbers(device: torch.device) -> AbstractContextManager:
    """Inside, PyTorch's random numbers may be seeded and drawn without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    episode: int = 0
    seconds: float = 0.0
    episode_return: float = math.nan
    rows: list[dict[str, int | float | str]] = field(default_factory=list)  # of evaluations.csv


def train(args: Args, given: Collection[str] = (), signals: Sequence[int] = ()) -> dict:
    """Train one policy; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation;
    final_return, their mean; env_steps_per_second. Raises RunError for bad arguments and for NaN.
    `given` names arguments that count as asked for though they equal their defaults. When `signals` is no longer empty,
    the run raises Stopped: a checkpoint then would end episodes early, and a resumed run would be another one.
    """
    with ExitStack() as held:
        checkpoint = None
        if args.resume is not None:
            run_dir = existing_run("--resume", args.resume)
            held.enter_context(locked(run_dir))
            args, checkpoint = load_checkpoint("--resume", run_dir, args, given, free=("device", "compile"))
        check_args(args)
        torch.set_num_threads(args.num_threads)
        torch.manual_seed(args.seed)
        device = choose_device(args)
        copies = [lambda: make_costly_env(args)] * args.num_envs
        env = SyncVectorEnv(copies, autoreset_mode=AutoresetMode.DISABLED)
        obs_size = env.single_observation_space.shape[0]
        learner = Learner(args, obs_size, env.single_action_space.shape[0], device)
        normalizer = Normalizer(obs_size, args.num_envs, args.gamma)
        progress = Progress()
        if checkpoint:
            progress = restore("--resume", run_dir, checkpoint, learner, normalizer, device)
        else:
            run_dir = create_run(args, args.env_id.replace("/", "-"))
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, env, learner, normalizer, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    env: SyncVectorEnv,
    learner: Learner,
    normalizer: Normalizer,
    progress: Progress,
    signals: Sequence[int],
) -> dict:
    """Act, store, learn and log, from where `progress` stands to the end."""
    device = learner.device
    step = compiled(update_minibatch, learner, signals) if args.compile else update_minibatch
    first_step = progress.global_step
    started = time.monotonic()
    last_checkpoint = first_step if first_step else -args.checkpoint_interval
    writer = start_logging(args, run_dir, first_step)
    bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", desc=args.env_id, mininterval=1)

    def seconds() -> float:
        return progress.seconds + time.monotonic() - started

    def save() -> None:
        nonlocal last_checkpoint
        state = normalizer.state_dict()
        statistics = [("a running statistic", value) for value in state["statistics"]]
        check_learner(learner, progress.global_step)
        check_finite(statistics, progress.global_step)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), learner, normalizer)
        last_checkpoint = progress.global_step

    def stop_if_asked() -> None:
        if signals:
            bar.close()
            saved = f"the last checkpoint is from step {last_checkpoint}"
            raise Stopped(f"stopped at step {progress.global_step}; {saved}; go on with --resume {run_dir}")

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode, act in ways_to_play(learner, normalizer).items():
            film = video if mode == "deterministic" else None
            played = evaluate(act, args, episodes, progress.global_step, film, device)
            returns = played["return"]
            mean, std = float(returns.mean()), float(returns.std())
            others = [float(played[name].mean()) for name in PLAY_COLUMNS]
            row = progress.global_step, round(seconds(), 1), mode, mean, std, episodes, *others
            progress.rows.append(dict(zip(EVALUATION_COLUMNS, row)))
            writer.add_scalar(f"returns/{mode}", mean, progress.global_step)
        write_evaluations(run_dir, progress.rows)
        return returns  # of the deterministic policy

    obs = None
    while progress.global_step < args.total_timesteps:
        # A checkpoint cannot hold the state of any environment, so there all copies start anew, interrupted or not.
        if progress.global_step - last_checkpoint >= args.checkpoint_interval:
            save()
            obs = None
        if obs is None:
            seeds = episode_seeds(0, args.seed, progress.episode, args.num_envs)
            obs, _ = env.reset(seed=seeds.tolist())
            check_finite([("an observation", obs)], progress.global_step)
            returns = np.zeros(args.num_envs)
            normalizer.discounted[:] = 0
            progress.episode += 1

        # Play a rollout.
        rollout_start = progress.global_step
        observations = []
        choices = []
        outcomes = []
        finished = []
        for _ in range(args.num_steps):
            stop_if_asked()

            # Act.
            normalizer.obs.update(obs)
            observations.append(torch.from_numpy(normalizer(obs)).to(device))
            with torch.no_grad():
                choices.append(learner.policy.sample(learner.policy(observations[-1])))
                played = learner.policy.action(choices[-1]).cpu().numpy()
            check_finite([("the action", played)], progress.global_step)
            next_obs, reward, terminated, truncated, _ = env.step(played)
            progress.global_step += args.num_envs

            # Store. What the policy does not need to act follows it to the device at the rollout's end.
            check_finite([("an observation", next_obs), ("the reward", reward)], progress.global_step)
            returns += reward
            ended = terminated | truncated
            outcomes.append((normalizer.scale_reward(reward, ended), terminated, ended, normalizer(next_obs)))
            obs = next_obs
            if ended.any():
                finished.extend(returns[ended])
                returns[ended] = 0
                obs, _ = env.reset(options={"reset_mask": ended})
                check_finite([("an observation", obs)], progress.global_step)

        # Learn.
        outcomes = [torch.as_tensor(np.stack(x), dtype=torch.float32, device=device) for x in zip(*outcomes)]
        rollout = Rollout(torch.stack(observations), torch.stack(choices), *outcomes)
        learner.learning_rate.fill_(args.learning_rate * (1 - rollout_start / args.total_timesteps))
        metrics = update(learner, rollout, step)

        # Log.
        check_finite([*metrics.items(), *learner.named_parameters()], progress.global_step)
        if finished:
            progress.episode_return = float(np.mean(finished))
        metrics["policy/saturation"] = saturation(learner.policy.action(rollout.choice))
        metrics["steps_per_second"] = (progress.global_step - first_step) / (time.monotonic() - started)
        metrics["returns/training"] = progress.episode_return
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), progress.global_step)
        bar.update(progress.global_step - rollout_start)
        bar.set_postfix({"return": f"{progress.episode_return:.2f}"})
        due = progress.global_step // args.eval_interval > rollout_start // args.eval_interval
        if due and progress.global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
    stop_if_asked()
    env_steps_per_second = progress.global_step / seconds()
    video = run_dir / "final.gif" if args.capture_video else None
    episodic_returns = log_evaluation(args.final_eval_episodes, video)
    bar.close()
    writer.close()
    result = {
        "run_dir": str(run_dir),
        "global_step": progress.global_step,
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("torch", "numpy", "gymnasium", "mujoco")}
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
    check_types(args, {"seed": 0, "bins": 2})
    check_run_args(args)
    require(args, "bins", args.bins <= 1000, "a whole number from 2 to 1000")
    steps = args.num_steps * args.num_envs
    size = math.ceil(steps / args.num_minibatches)
    smallest = min(steps // args.num_minibatches, steps % size or size)
    require(args, "num_minibatches", smallest > 1, f"such that each has two of a rollout's {steps} steps or more")
    for name in ("learning_rate", "clip_coef", "max_grad_norm"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    for name in ("gamma", "gae_lambda"):
        require(args, name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    for name in ("action_cost", "ent_coef", "vf_coef"):
        require(args, name, 0 <= getattr(args, name) <= 1e6, "a number from 0 to 1e6")
    if args.capture_video:
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
    if args.compile:
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise RunError(
                "--compile: there is no C++ compiler; install one, such as g++, or add --no-compile"
            ) from None


def choose_device(args: Args) -> torch.device:
    """The device that --device names; auto is CUDA if there is one."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def check_finite(named_values: Iterable[tuple[str, Any]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not torch.as_tensor(value).isfinite().all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


def check_learner(learner: Learner, global_step: int) -> None:
    """check_finite for the networks and for what Adam keeps of their gradients."""
    check_finite(learner.named_parameters(), global_step)
    for optimizer in learner.optimizers():
        for state in optimizer.state.values():
            check_finite(((f"Adam's {name}", value) for name, value in state.items()), global_step)


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


def save_checkpoint(run_dir: Path, args: Args, progress: Progress, learner: Learner, normalizer: Normalizer) -> None:
    """Write checkpoint.pt, whole."""
    contents = {
        "script": SCRIPT,
        "args": run_arguments(args),
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "optimizers": [list(optimizer.state.values()) for optimizer in learner.optimizers()],
        "normalizer": normalizer.state_dict(),
        **random_state(learner.device),
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


def restore(
    flag: str, run_dir: Path, checkpoint: dict, learner: Learner, normalizer: Normalizer, device: torch.device
) -> Progress:
    """Bring learner, statistics and random numbers to where the checkpoint stands. Raises RunError if it is damaged."""
    with damage_reported(flag, run_dir / "checkpoint.pt"):
        progress = read_progress(checkpoint["progress"])
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
        copy_into([list(optimizer.state.values()) for optimizer in learner.optimizers()], checkpoint["optimizers"])
        normalizer.load_state_dict(checkpoint["normalizer"])
        set_random_state(checkpoint, device, learner.args.seed + progress.global_step)
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
    free = ("seed", "final_eval_episodes", "num_threads", "device", "compile")
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, given, free)
    args = replace(args, compile=False)  # nothing is learned
    check_args(args)
    torch.set_num_threads(args.num_threads)
    device = choose_device(args)
    env = make_costly_env(args)
    obs_size = env.observation_space.shape[0]
    learner = Learner(args, obs_size, env.action_space.shape[0], device)
    normalizer = Normalizer(obs_size, 1, args.gamma)
    with damage_reported("--evaluate", run_dir / "checkpoint.pt"):
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
        normalizer.load_state_dict(checkpoint["normalizer"])
    for mode, act in ways_to_play(learner, normalizer).items():
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        played = evaluate(act, args, args.final_eval_episodes, args.seed, video, device)
        returns = played["return"]
        others = "  ".join(f"{name} {played[name].mean():.2f}" for name in PLAY_COLUMNS)
        spread = f"{returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes"
        print(f"{mode:13s} return {spread}  {others}")
        if video:
            print(f"{'':13s} video {video}")


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
