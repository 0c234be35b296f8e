"""World4RL on states instead of pixels: a policy refined by PPO inside a diffusion world model that stays frozen.

After Jiang et al., "World4RL: Diffusion World Models for Policy Refinement with Reinforcement Learning for Robotic
Manipulation", arXiv 2509.19080. No code is public. Camera images become numbers here (Meta-World's 18, the goal, and
where the hand is pulled), the U-Net an MLP; the rest is the paper's.

    pip install --no-deps -r requirements-world4rl.txt && python world4rl.py

1. Data: a few episodes of Meta-World's scripted expert, and episodes of random actions.
2. Clone: a Gaussian policy by maximum likelihood on the expert's episodes. Rollouts: its own episodes join the data.
3. Model: a diffusion model of the next state, given the last four states and two-hot actions; and a reward classifier.
4. Refine: model and classifier stay as they are. PPO plays in the model only, from real initial states; an imagined
   episode ends with reward 1 where the classifier sees success.
5. Evaluate, in the simulator and in the model from the same starts. Nothing of it flows back: where imagined success
   stays high and real success does not, the policy exploits the model.

docs/world4rl.md numbers the implementation details and explains the logged scalars.

To fork it for another simulator, write a class with the attributes and methods of PointTask and choose it in make_task.
A copy under another name refuses this script's checkpoints.
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
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

SCRIPT = Path(__file__).stem
STAGES = ("data", "clone", "rollouts", "model", "refine")


@dataclass
class Task:
    """What is learned, and for how long."""

    env_id: str = "door-lock-v3"
    """A task of Meta-World, such as coffee-pull-v3; or point, a double integrator that needs nothing installed."""
    horizon: int = 75
    """Decisions in an episode, real or imagined."""
    action_repeat: int = 2
    """Simulator steps that a decision lasts."""
    total_timesteps: int = 200_000
    """Steps of the refinement in all, imagined ones (the last rollout is played to its end)."""
    seed: int = 1
    """Seed of networks, data, minibatches and episodes."""
    stage: Literal["data", "clone", "rollouts", "model", "refine", "evaluate", "all"] = "all"
    """The last stage of this call (--resume goes on); evaluate, the final evaluation, is the last of all."""


@dataclass
class Data:
    """Real episodes, all that is ever learned from; the paper's 50, 150 and 30 are 50 steps long."""

    expert_episodes: int = 3
    """Episodes of the scripted expert, for clone and model."""
    clone_episodes: int = 100
    """Episodes of the clone, for the model."""
    random_episodes: int = 30
    """Episodes of uniformly random actions, for the model."""


@dataclass
class Policy:
    """The policy and its cloning."""

    hidden: int = 256
    """Width of the two hidden layers of policy, value function and classifier."""
    min_log_std: float = -2.0
    """Lower bound of the logarithm of the policy's standard deviation."""
    max_log_std: float = 0.0
    """Upper bound; the paper's is 0, and 2 is usual."""
    clone_steps: int = 2_000
    """Gradient steps of the clone."""
    clone_lr: float = 1e-3
    """Learning rate of the clone at the start; it falls linearly to 0, as the others."""


@dataclass
class Model:
    """World model and reward classifier."""

    world_model: Literal["diffusion", "mlp"] = "diffusion"
    """A diffusion model, or the same network trained to predict the mean."""
    action_encoding: Literal["two-hot", "raw", "one-hot"] = "two-hot"
    """How the model sees each action dimension: 21 hat functions, the number itself, or the nearest of 21 values."""
    history: int = 4
    """States, and actions, that the model sees."""
    model_hidden: int = 256
    """Width of the world model's three hidden layers."""
    denoising_steps: int = 3
    """Euler steps of the sampler."""
    model_steps: int = 15_000
    """Gradient steps of world model and classifier."""
    model_lr: float = 1e-3
    """Their learning rate at the start."""
    batch_size: int = 256
    """Transitions in a gradient step of clone, model and classifier."""


@dataclass
class PPO:
    """Proximal policy optimisation in the model."""

    refine_in: Literal["model", "simulator"] = "model"
    """Where PPO plays: in the world model, or, to compare, in the simulator itself."""
    rollout_episodes: int = 64
    """Episodes of a rollout, all imagined at once."""
    update_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 8
    """Minibatches in a pass."""
    learning_rate: float = 3e-4
    """Learning rate at the start."""
    gamma: float = 0.985
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
    """Norm that all gradients are clipped to."""
    kl_coef: float = 0.1
    """Weight in the loss of KL(policy || clone), which keeps the policy near the data of the model; ours."""


@dataclass
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 50_000
    """Steps of the refinement between evaluations (each waits for the end of a rollout)."""
    eval_episodes: int = 20
    """Real episodes of each, once with sampled actions (stochastic), once with the mode (deterministic)."""
    final_eval_episodes: int = 100
    """Real episodes of the first evaluation, the clone's, and of the last."""
    checkpoint_interval: int = 20
    """Rounds between checkpoints: episodes, hundreds of gradient steps, or rollouts of PPO."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks and imagination live; auto is CUDA if there is one."""
    num_threads: int = 1
    """Threads of PyTorch."""
    capture_video: bool = False
    """With --evaluate: draw an imagined episode beside the real one from the same start and actions, as a GIF."""
    exp_name: str = SCRIPT
    """First part of the run folder's name."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    wandb_entity: str | None = None
    """Team on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments but --stage."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


@dataclass
class Args(Run, PPO, Model, Policy, Data, Task):
    """Clone an expert, learn a diffusion world model and refine the clone in it."""


EVALUATION_COLUMNS = (
    "global_step",
    "seconds",
    "mode",
    "return_mean",
    "return_std",
    "episodes",
    "success_rate",
    "imagined_success_rate",
)


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# ------------------------------------------------------------------------------ actions, diffusion, advantages: maths


BINS = 21  # the paper's K
REST = 0.1  # deviations: a smaller change of an object is none
CONTACT = 0.03  # metres, the unit of the ways between things


def two_hot(action: Tensor) -> Tensor:
    """Actions [...] in [-1, 1] as weights [..., K] of the two nearest of K evenly spaced values.

        t_k = (b_{k+1} - a) / (b_{k+1} - b_k)        t_{k+1} = (a - b_k) / (b_{k+1} - b_k)

    Together these are hat functions: piecewise linear, and nothing is lost, since sum_k t_k b_k = a.
    """
    place = (action + 1) / 2 * (BINS - 1)
    return (1 - (place[..., None] - torch.arange(BINS, device=action.device)).abs()).clamp(min=0)


def encode(action: Tensor, encoding: str) -> Tensor:
    """Actions [..., D] as the world model sees them [..., D K], or [..., D] if raw."""
    if encoding == "raw":
        return action
    if encoding == "one-hot":  # of the nearest value
        action = ((action + 1) / 2 * (BINS - 1)).round() / (BINS - 1) * 2 - 1
    return two_hot(action).flatten(-2)


class Coefficients(NamedTuple):
    """What the denoiser's network is wrapped in (Karras et al. 2022, table 1)."""

    skip: Tensor
    out: Tensor
    into: Tensor
    noise: Tensor


def preconditioning(sigma: Tensor) -> Coefficients:
    """For data of unit variance under noise of standard deviation sigma [...]."""
    variance = 1 + sigma**2
    return Coefficients(1 / variance, sigma / variance.sqrt(), 1 / variance.sqrt(), sigma.log() / 4)


def noise_levels(num_steps: int, smallest: float = 2e-3, largest: float = 5.0, rho: float = 7.0) -> list[float]:
    """[num_steps + 1] standard deviations for the sampler, from the largest to the smallest, and 0 (eq. 5)."""
    spaced = np.linspace(largest ** (1 / rho), smallest ** (1 / rho), num_steps) ** rho
    return [*spaced.tolist(), 0.0]


def sample_euler(denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Follow dx / d sigma = (x - D(x, sigma)) / sigma from noise [B, S] of unit variance down the levels."""
    x = levels[0] * noise
    for sigma, after in zip(levels, levels[1:]):
        denoised = denoise(x, torch.full_like(x[:, :1], sigma))
        x = x + (after - sigma) * (x - denoised) / sigma
    return x


class Rollout(NamedTuple):
    """Episodes side by side: [T, E, ...]. States are whitened; after the end of an episode `running` is 0."""

    obs: Tensor
    choice: Tensor
    reward: Tensor
    terminated: Tensor
    ended: Tensor
    next_obs: Tensor
    running: Tensor


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


# -------------------------------------------------------------------------------------------------------- networks


def mlp(in_features: int, hidden: int, out_features: int, last_gain: float) -> nn.Sequential:
    """A tanh network with two hidden layers, orthogonal weights and no biases at first, as CleanRL's."""
    layers = [nn.Linear(in_features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_features)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class GaussianPolicy(nn.Module):
    """A Gaussian whose mean and deviation depend on the state, the deviation within bounds.

    It maps whitened states [..., S], of which it sees the first `observed`, to the mean and log standard deviation
    [2, ..., D]. What it draws is a choice, the Gaussian's own value [..., D], that is clipped to an action in [-1, 1];
    log-probabilities are those of the choice.
    """

    def __init__(self, args: Args, observed: int, action_size: int):
        super().__init__()
        self.observed = observed
        self.network = mlp(observed, args.hidden, 2 * action_size, 0.01)
        self.lowest = args.min_log_std
        self.highest = args.max_log_std

    def forward(self, obs: Tensor) -> Tensor:
        """The bounds are approached smoothly, so that a deviation at a bound can leave it again."""
        mean, free = self.network(obs[..., : self.observed]).chunk(2, -1)
        log_std = self.lowest + (self.highest - self.lowest) * free.sigmoid()
        return torch.stack([mean, log_std])

    def sample(self, parameters: Tensor) -> Tensor:
        return torch.normal(parameters[0], parameters[1].exp())

    def mode(self, parameters: Tensor) -> Tensor:
        """The Gaussian's mean."""
        return parameters[0]

    def log_prob(self, parameters: Tensor, choice: Tensor) -> Tensor:
        """[...], of the whole choice."""
        mean, log_std = parameters
        return (-0.5 * ((choice - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """[...] in nats."""
        return (parameters[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two parameters."""
        p_mean, p_log_std = p
        q_mean, q_log_std = q
        ratio = (2 * (p_log_std - q_log_std)).exp()
        distance = ((p_mean - q_mean) / q_log_std.exp()) ** 2
        return (0.5 * (ratio + distance - 1) - (p_log_std - q_log_std)).sum(-1)


class WorldModel(nn.Module):
    """p(change | last states, last actions), of the whitened change [B, S] from a state to the next.

    The condition's layer is its own, so that the sampler passes the large two-hot input through it once, not at every
    noise level. As "mlp" the same network predicts the mean: its noisy input is 0 and its noise level constant.
    """

    def __init__(self, args: Args, state_size: int, action_size: int):
        super().__init__()
        self.diffusion = args.world_model == "diffusion"
        self.encoding = args.action_encoding
        self.levels = noise_levels(args.denoising_steps)
        width = args.model_hidden
        bins = 1 if args.action_encoding == "raw" else BINS
        self.condition = nn.Linear(args.history * (state_size + action_size * bins), width)
        self.noisy = nn.Linear(state_size + 1, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.last = nn.Linear(width, state_size)

    def see(self, states: Tensor, actions: Tensor) -> Tensor:
        """The condition [B, width] of the last states [B, K, S], whitened, and actions [B, K, D]."""
        return self.condition(torch.cat([states.flatten(1), encode(actions, self.encoding).flatten(1)], 1))

    def forward(self, x: Tensor, noise: Tensor, seen: Tensor) -> Tensor:
        """F_theta [B, S] of scaled noisy changes [B, S] and c_noise [B, 1]."""
        h = F.silu(seen + self.noisy(torch.cat([x, noise], 1)))
        for layer, norm in zip(self.hidden, self.norms):
            h = h + F.silu(layer(norm(h)))
        return self.last(h)

    def denoise(self, x: Tensor, sigma: Tensor, seen: Tensor) -> Tensor:
        """D [B, S] = c_skip x + c_out F(c_in x, c_noise), the mean change given x [B, S] under noise sigma [B, 1]."""
        c = preconditioning(sigma)
        return c.skip * x + c.out * self(c.into * x, c.noise, seen)

    def predict_mean(self, seen: Tensor) -> Tensor:
        """The prediction [B, S] of the "mlp"."""
        x = torch.zeros(len(seen), self.last.out_features, device=seen.device)
        return self(x, x[:, :1], seen)

    def loss(self, change: Tensor, states: Tensor, actions: Tensor) -> Tensor:
        """|F - (change - c_skip x) / c_out|^2 at x = change + sigma noise, ln sigma ~ N(-0.4, 1.2^2); or the MSE."""
        seen = self.see(states, actions)
        if not self.diffusion:
            return (self.predict_mean(seen) - change).square().mean()
        sigma = (1.2 * torch.randn_like(change[:, :1]) - 0.4).exp().clamp(2e-3, 20)  # DIAMOND's, as all constants
        x = change + sigma * torch.randn_like(change)
        c = preconditioning(sigma)
        return (self(c.into * x, c.noise, seen) - (change - c.skip * x) / c.out).square().mean()

    @torch.no_grad()
    def sample(self, states: Tensor, actions: Tensor) -> Tensor:
        """One change [B, S] for each of the last states [B, K, S] and actions [B, K, D]."""
        seen = self.see(states, actions)
        if not self.diffusion:
            return self.predict_mean(seen)
        noise = torch.randn_like(states[:, 0])
        return sample_euler(lambda x, sigma: self.denoise(x, sigma, seen), noise, self.levels)


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
    """What training changes: networks, statistics and optimisers, all on one device.

    The networks are drawn on the CPU first, so a seed starts with the same ones on every device.
    """

    def __init__(self, args: Args, task: "PointTask | MetaWorldTask", device: torch.device | str = "cpu"):
        super().__init__()
        state_size, action_size = task.state_size, task.action_size
        self.args = args
        self.policy = GaussianPolicy(args, task.observed, action_size)
        self.clone = GaussianPolicy(args, task.observed, action_size)
        self.value = mlp(state_size, args.hidden, 1, 1.0)
        self.model = WorldModel(args, state_size, action_size)
        rest = torch.zeros(state_size)
        rest[list(task.objects)] = REST
        self.register_buffer("rest", rest)
        self.between = task.between
        self.classifier = mlp(state_size + 3 * len(task.between), args.hidden, 1, 1.0)
        for name in ("state_mean", "change_mean"):
            self.register_buffer(name, torch.zeros(state_size))
        for name in ("state_std", "change_std"):
            self.register_buffer(name, torch.ones(state_size))
        self.to(device)

        self.clone_optimizer = Adam(self.policy.parameters(), args.clone_lr)
        self.model_optimizer = Adam(self.model.parameters(), args.model_lr)
        self.classifier_optimizer = Adam(self.classifier.parameters(), args.model_lr)
        self.optimizer = Adam([*self.policy.parameters(), *self.value.parameters()], args.learning_rate, eps=1e-5)

    @property
    def device(self) -> torch.device:
        return self.state_mean.device

    def optimizers(self) -> list[Adam]:
        return [self.clone_optimizer, self.model_optimizer, self.classifier_optimizer, self.optimizer]

    def whiten(self, state: Tensor) -> Tensor:
        """States [..., S] of about zero mean and unit variance, at most 10 from zero; constants become 0."""
        return ((state - self.state_mean) / self.state_std).clamp(-10, 10)

    def classify(self, state: Tensor) -> Tensor:
        """The logit [...] of success in the states [..., S].

        The classifier sees them whitened, and the ways between things: whether the object is at the goal would else
        have to be learned anew for every place.
        """
        ways = [state[..., i : i + 3] - state[..., j : j + 3] for i, j in self.between]
        seen = torch.cat([self.whiten(state), *((way / CONTACT).clamp(-10, 10) for way in ways)], -1)
        return self.classifier(seen)[..., 0]

    def succeeded(self, state: Tensor) -> Tensor:
        """Whether the classifier sees success in the states [..., S]: C > 1/2."""
        return self.classify(state) > 0

    @torch.no_grad()
    def next_state(self, states: Tensor, actions: Tensor) -> Tensor:
        """A sample [B, S] of what follows the last states [B, K, S] and actions [B, K, D].

        An object at rest stays at rest: else the model's small errors would carry it off before the hand arrives.
        """
        change = self.change_mean + self.change_std * self.model.sample(self.whiten(states), actions)
        return states[:, -1] + torch.where(change.abs() < self.rest * self.change_std, 0.0, change)


def take_step(optimizer: Adam, loss: Tensor, max_grad_norm: float) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only, their gradient clipped."""
    gradients = torch.autograd.grad(loss, optimizer.param_groups[0]["params"])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    scale = (max_grad_norm / (norm + 1e-6)).clamp(max=1)
    optimizer.descend([gradient * scale for gradient in gradients])


def clone_step(learner: Learner, obs: Tensor, action: Tensor) -> dict[str, Tensor]:
    """One step on the negative log-likelihood of the expert's actions [B, D]; returns metrics, each a tensor []."""
    loss = -learner.policy.log_prob(learner.policy(obs), action).mean()
    take_step(learner.clone_optimizer, loss, learner.args.max_grad_norm)
    return {"clone/loss": loss.detach()}


def model_step(learner: Learner, batch: "Windows") -> dict[str, Tensor]:
    """One step of the world model and one of the classifier; returns metrics, each a tensor []."""
    change = batch.next_state - batch.states[:, -1] - learner.change_mean
    scaled = change / learner.change_std.clamp(min=1e-6)  # what never changes has deviation 0, and stays as it is
    loss = learner.model.loss(scaled, learner.whiten(batch.states), batch.actions)
    take_step(learner.model_optimizer, loss, learner.args.max_grad_norm)
    logit = learner.classify(batch.next_state)
    classifier_loss = F.binary_cross_entropy_with_logits(logit, batch.success)
    take_step(learner.classifier_optimizer, classifier_loss, learner.args.max_grad_norm)
    wrong = ((logit > 0) != (batch.success > 0.5)).float().mean()
    metrics = {"model/loss": loss, "classifier/loss": classifier_loss, "classifier/errors": wrong}
    return {name: metric.detach() for name, metric in metrics.items()}


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

    kl = policy.kl(parameters, learner.clone(batch.obs)).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss + args.kl_coef * kl
    take_step(learner.optimizer, loss, args.max_grad_norm)
    metrics = {"losses/policy": policy_loss, "losses/value": value_loss, "policy/entropy": entropy}
    return {name: metric.detach() for name, metric in metrics.items()}


def update(learner: Learner, rollout: Rollout) -> dict[str, Tensor]:
    """Epochs of minibatch steps on a rollout; returns metrics, each a tensor [], losses those of the last minibatch."""
    args, policy = learner.args, learner.policy
    running = rollout.running.flatten().nonzero()[:, 0]
    with torch.no_grad():
        log_prob = policy.log_prob(policy(rollout.obs), rollout.choice)
        value = learner.value(rollout.obs)[..., 0]
        next_value = learner.value(rollout.next_obs)[..., 0]
        advantage = advantages(rollout, value, next_value, args.gamma, args.gae_lambda)
    columns = rollout.obs, rollout.choice, log_prob, advantage, value
    steps = Minibatch(*(column.flatten(0, 1)[running] for column in columns))

    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(running), device=learner.device).chunk(args.num_minibatches):
            if len(rows) > 1:  # one alone, which may be left over, has no deviation to normalise its advantage by
                metrics = update_minibatch(learner, Minibatch(*(column[rows] for column in steps)))

    with torch.no_grad():
        target = steps.advantage + steps.value
        metrics["losses/explained_variance"] = 1 - (target - steps.value).var() / target.var().clamp(min=1e-8)
        parameters = policy(steps.obs)
        metrics["policy/std"] = parameters[1].exp().mean()
        metrics["policy/kl_to_clone"] = policy.kl(parameters, learner.clone(steps.obs)).mean()
        metrics["success/training"] = rollout.reward.sum(0).mean()
    return metrics


# ---------------------------------------------------------------------------------------------------- environments


class PointTask:
    """A double integrator: a point in the plane is pushed to the origin, and has to be slow there.

    Every task has these attributes and methods. Actions are in [-1, 1].
    """

    drawn = {"point": (0, 1)}  # where in the state the coordinates of things are
    state_size = 4  # position, velocity
    observed = 4  # so many of these, from the first, the policy sees
    objects = ()  # places in the state of what rests unless it is touched
    between = ()  # pairs of places of three coordinates, whose differences the classifier sees, too
    action_size = 2

    def reset(self, seed: int) -> np.ndarray:
        """The initial state [S] of an episode that the seed alone determines."""
        self.state = np.append(np.random.default_rng(seed).uniform(-1, 1, 2), [0, 0])
        return self.state

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """The next state [S], and whether it is a success."""
        position, velocity = self.state.reshape(2, 2)
        position = position + 0.1 * velocity + 0.005 * action
        velocity = velocity + 0.1 * action
        self.state = np.concatenate([position, velocity])
        return self.state, bool(np.linalg.norm(position) < 0.4 and np.linalg.norm(velocity) < 0.5)

    def expert(self) -> np.ndarray:
        """The action [D] of a scripted expert in the present state."""
        position, velocity = self.state.reshape(2, 2)
        return (-4 * position - 3 * velocity).clip(-1, 1)

    def close(self) -> None:
        """Nothing is open."""


class MetaWorldTask:
    """A task of Meta-World v3. The state is the present half of its observation, the goal, and the pull on the hand.

    That is hand, gripper, position and orientation of two objects (zeros if there is one), the goal's position, and the
    way from the hand to where a spring drags it. Actions move that place, not the hand: the longer the hand presses
    against something, the harder. No observation shows it, and without it no model can know. The policy does not see
    it: a clone that knows what it has just done goes on doing it.
    """

    drawn = {"hand": (0, 1, 2), "object": (4, 5, 6)}
    state_size = 24
    observed = 21  # all but the pull
    objects = range(4, 18)
    between = ((0, 4), (4, 18))  # hand and object, object and goal
    action_size = 4

    def __init__(self, env_id: str, action_repeat: int):
        """Raises RunError unless Meta-World is installed and has the task."""
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
            from metaworld.policies import ENV_POLICY_MAP
        except ImportError as error:
            how = "pip install --no-deps -r requirements-world4rl.txt, or choose --env-id point"
            raise RunError(f"--env-id: {env_id} needs Meta-World ({error}): {how}") from None
        if env_id not in ENV_POLICY_MAP:
            raise RunError(f"--env-id: {env_id!r} is not valid; it must be point, {', '.join(sorted(ENV_POLICY_MAP))}")
        self.env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{env_id}-goal-observable"](seed=0)
        self.env._freeze_rand_vec = False  # objects and goals anywhere in their ranges, as `seed` of `reset` says
        self.env.seeded_rand_vec = True
        self.script = ENV_POLICY_MAP[env_id]()
        self.action_repeat = action_repeat

    def seen(self, obs: np.ndarray) -> np.ndarray:
        """The state [S] in an observation [39], which holds the state before, too."""
        self.obs = obs
        pull = self.env.data.mocap_pos[0] - obs[:3]
        return np.concatenate([obs[:18], obs[36:], pull])

    def reset(self, seed: int) -> np.ndarray:
        self.env.seed(seed)
        return self.seen(self.env.reset()[0])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, bool]:
        """Of `action_repeat` simulator steps; a success at any of them counts."""
        success = False
        for _ in range(self.action_repeat):
            obs, _, _, _, info = self.env.step(action)
            success = success or bool(info["success"])
        return self.seen(obs), success

    def expert(self) -> np.ndarray:
        return np.clip(self.script.get_action(self.obs), -1, 1)

    def close(self) -> None:
        self.env.close()


def make_task(args: Args) -> PointTask | MetaWorldTask:
    """The task that --env-id names."""
    return PointTask() if args.env_id == "point" else MetaWorldTask(args.env_id, args.action_repeat)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ---------------------------------------------------------------------------------------- episodes, real and imagined


class Episode(NamedTuple):
    """A real episode of T decisions."""

    states: Tensor  # [T + 1, S]
    choices: Tensor  # [T, D], actions before they are clipped to [-1, 1]
    success: Tensor  # [T], of the state that follows: 1 or 0


def play_episode(
    task: PointTask | MetaWorldTask, seed: int, choose: Callable[[np.ndarray], np.ndarray], horizon: int, stop: bool
) -> Episode:
    """One episode of `choose`, from states [S] to choices [D]; with `stop` it ends at the first success.

    Raises RunError where a state or an action is NaN.
    """
    states = [task.reset(seed)]
    choices = []
    successes = []
    for _ in range(horizon):
        choice = choose(states[-1])
        state, success = task.step(np.clip(choice, -1, 1).astype(np.float32))
        if not (np.isfinite(choice).all() and np.isfinite(state).all()):
            raise RunError(f"a state or an action is NaN or infinite in a real episode, at its step {len(choices)}")
        states.append(state)
        choices.append(choice)
        successes.append(success)
        if stop and success:
            break
    arrays = states, choices, successes
    return Episode(*(torch.tensor(np.array(array), dtype=torch.float32) for array in arrays))


def chooser(learner: Learner, policy: GaussianPolicy, deterministic: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What play_episode needs of a policy."""

    @torch.no_grad()
    def choose(state: np.ndarray) -> np.ndarray:
        obs = learner.whiten(torch.tensor(state, dtype=torch.float32, device=learner.device)[None])
        parameters = policy(obs)
        return (policy.mode(parameters) if deterministic else policy.sample(parameters))[0].cpu().numpy()

    return choose


class History:
    """The last K states and actions of episodes side by side, as the world model sees them.

    Before an episode's first step its states are the initial one, its actions 0.
    """

    def __init__(self, start: Tensor, length: int, action_size: int):
        self.states = start[:, None].repeat(1, length, 1)  # [E, K, S]
        self.actions = torch.zeros(len(start), length, action_size, device=start.device)  # [E, K, D]

    def act(self, action: Tensor, rows: Tensor) -> None:
        """The actions [R, D] follow the last ones of the episodes `rows` [R]."""
        self.actions[rows] = torch.cat([self.actions[rows, 1:], action[:, None]], 1)

    def move(self, state: Tensor, rows: Tensor) -> None:
        """The states [R, S] follow."""
        self.states[rows] = torch.cat([self.states[rows, 1:], state[:, None]], 1)


@torch.no_grad()
def imagine(learner: Learner, policy: GaussianPolicy, start: Tensor, deterministic: bool = False) -> Rollout:
    """Episodes of the policy in the world model from initial states [E, S], up to the horizon.

    The reward is 1 where the classifier sees success, and the episode ends there. Nothing is computed after that.
    """
    args = learner.args
    history = History(start, args.history, policy.network[-1].out_features // 2)
    rows = torch.arange(len(start), device=start.device)
    shape = args.horizon, len(start)
    states = torch.zeros(2, *shape, start.shape[1], device=start.device)
    choices = torch.zeros(*shape, history.actions.shape[2], device=start.device)
    reward, running = torch.zeros(2, *shape, device=start.device)
    ended = torch.ones(shape, device=start.device)
    for t in range(args.horizon):
        obs = learner.whiten(history.states[rows, -1])
        parameters = policy(obs)
        choice = policy.mode(parameters) if deterministic else policy.sample(parameters)
        history.act(choice.clamp(-1, 1), rows)
        state = learner.next_state(history.states[rows], history.actions[rows])
        history.move(state, rows)
        success = learner.succeeded(state)
        states[0, t, rows] = obs
        states[1, t, rows] = learner.whiten(state)
        choices[t, rows] = choice
        reward[t, rows] = success.float()
        running[t, rows] = 1
        ended[t, rows] = success.float()
        rows = rows[~success]
        if not len(rows):
            break
    return Rollout(states[0], choices, reward, reward, ended, states[1], running)


def play_rollout(task: PointTask | MetaWorldTask, learner: Learner, seeds: Iterable[int]) -> Rollout:
    """The same in the simulator, one episode after the other."""
    args = learner.args
    choose = chooser(learner, learner.policy, deterministic=False)
    columns = []
    for seed in seeds:
        states, choices, success = play_episode(task, int(seed), choose, args.horizon, stop=True)
        obs = learner.whiten(states.to(learner.device))
        running = torch.ones(len(choices))
        column = obs[:-1], choices, success, success, success, obs[1:], running
        missing = args.horizon - len(choices)
        columns.append([torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) for x in column])
    return Rollout(*(torch.stack(x, 1).to(learner.device) for x in zip(*columns)))


class Windows(NamedTuple):
    """Transitions [B, ...] of the data, each with the last K states and actions before it."""

    states: Tensor  # [B, K, S]
    actions: Tensor  # [B, K, D]
    next_state: Tensor  # [B, S]
    success: Tensor  # [B], of next_state


def windows(data: Episode, history: int) -> Windows:
    """All transitions of whole episodes [N, T + 1, S]; before an episode's start its states repeat, its actions are 0.

    The last of `states` is where the last of `actions` is taken.
    """
    horizon = data.choices.shape[1]
    place = torch.arange(horizon)[:, None] + torch.arange(1 - history, 1)  # [T, K]
    actions = data.choices.clamp(-1, 1)[:, place.clamp(min=0)] * (place >= 0)[..., None].to(data.choices)
    columns = data.states[:, place.clamp(min=0)], actions, data.states[:, 1:], data.success
    return Windows(*(column.flatten(0, 1) for column in columns))


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    task: PointTask | MetaWorldTask,
    learner: Learner,
    policy: GaussianPolicy,
    deterministic: bool,
    episodes: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Successes, 1 or 0, of real episodes [episodes], and of imagined ones from the same starts [at least 256].

    Imagined success is one NaN where there is no model. Leaves no trace in training's random numbers and the learner.
    """
    choose = chooser(learner, policy, deterministic)
    with forked_random_numbers(learner.device):
        torch.manual_seed(seed)
        seeds = episode_seeds(1, seed, 0, episodes)
        bar = tqdm(seeds, desc="real episodes", leave=False, mininterval=1)
        played = [play_episode(task, int(s), choose, learner.args.horizon, stop=True) for s in bar]
        real = np.array([float(episode.success.max()) for episode in played])
        if learner.args.refine_in == "simulator":
            return real, np.array([np.nan])
        start = torch.stack([episode.states[0] for episode in played]).repeat(math.ceil(256 / episodes), 1)
        imagined = imagine(learner, policy, start.to(learner.device), deterministic)
    return real, imagined.reward.sum(0).cpu().numpy()


def replay(learner: Learner, episode: Episode, samples: int = 1) -> Tensor:
    """States [samples, T + 1, S] that the model imagines, so many times, from an episode's start and actions."""
    start = episode.states[:1].to(learner.device).expand(samples, -1)
    history = History(start, learner.args.history, episode.choices.shape[1])
    rows = torch.arange(samples, device=learner.device)
    imagined = [start]
    for choice in episode.choices.to(learner.device):
        history.act(choice.clamp(-1, 1).expand(samples, -1), rows)
        imagined.append(learner.next_state(history.states, history.actions))
        history.move(imagined[-1], rows)
    return torch.stack(imagined, 1).cpu()


def film(task: PointTask | MetaWorldTask, learner: Learner, seed: int, path: Path) -> None:
    """Draw a real episode of the policy's mode (solid) and its replay in the model (dashed), from above and the front.

    Positions only: this state is not enough to set the simulator to, so none is rendered.
    """
    import imageio
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    choose = chooser(learner, learner.policy, deterministic=True)
    episode = play_episode(task, seed, choose, learner.args.horizon, stop=True)
    paths = {"solid": episode.states, "dashed": replay(learner, episode)[0]}
    three = len(next(iter(task.drawn.values()))) == 3
    frames = []
    for t in range(2, len(episode.states) + 1, 2):
        figure = Figure(figsize=(8, 4) if three else (4, 4))
        canvas = FigureCanvasAgg(figure)
        for ax, (i, j) in zip(figure.subplots(1, 1 + three, squeeze=False)[0], ((0, 1), (0, 2))):
            for number, (name, places) in enumerate(task.drawn.items()):
                for style, states in paths.items():
                    line = states[:, [places[i], places[j]]]
                    ax.plot(*line.T, alpha=0)  # the axes stay as they are
                    ax.plot(*line[:t].T, f"C{number}", linestyle=style, label=name if style == "solid" else None)
            ax.set(xlabel="xyz"[i], ylabel="xyz"[j])
        ax.legend(title="dashed: imagined")
        figure.tight_layout()
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    imageio.mimsave(path, frames, duration=100, loop=0)


def forked_random_numbers(device: torch.device) -> AbstractContextManager:
    """Inside, PyTorch's random numbers may be seeded and drawn without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0  # of the refinement
    stage: int = 0  # index in STAGES
    unit: int = 0  # of the stage's work: episodes, gradient steps, or steps of the refinement
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, int | float | str]] = field(default_factory=list)  # of evaluations.csv


def amount_of_work(args: Args) -> dict[str, int]:
    """Units of work in every stage."""
    imagines = args.refine_in == "model"
    return {
        "data": args.expert_episodes + args.random_episodes,
        "clone": args.clone_steps,
        "rollouts": args.clone_episodes * imagines,
        "model": args.model_steps * imagines,
        "refine": args.total_timesteps,
    }


def work_done(args: Args, progress: Progress) -> int:
    """Units of work in all stages so far: TensorBoard's step."""
    before_refinement = [*amount_of_work(args).values()][:-1]
    return sum(before_refinement[: progress.stage]) + max(progress.unit, progress.global_step)


def empty_data(args: Args, task: PointTask | MetaWorldTask) -> Episode:
    """Room [N, ...] for all real episodes: those of the expert, of random actions, and of the clone."""
    work = amount_of_work(args)
    shape = work["data"] + work["rollouts"], args.horizon
    states = torch.zeros(shape[0], shape[1] + 1, task.state_size)
    return Episode(states, torch.zeros(*shape, task.action_size), torch.zeros(shape))


def collect(task: PointTask | MetaWorldTask, learner: Learner, data: Episode, index: int) -> dict[str, float]:
    """Plays episode `index` of the data, to the horizon: success in it goes on, so that the classifier sees more."""
    args = learner.args
    (seed,) = episode_seeds(0, args.seed, index, 1)
    rng = np.random.default_rng(seed)
    if index < args.expert_episodes:
        who, choose = "expert", lambda state: task.expert()
    elif index < args.expert_episodes + args.random_episodes:
        who, choose = "random", lambda state: rng.uniform(-1, 1, task.action_size)
    else:
        who, choose = "clone", chooser(learner, learner.clone, deterministic=False)
    episode = play_episode(task, int(seed), choose, args.horizon, stop=False)
    for column, value in zip(data, episode):
        column[index] = value
    return {f"success/{who}": float(episode.success.max())}


def set_statistics(learner: Learner, states: Tensor, name: str) -> None:
    """Mean and deviation [S] of states (or of their changes) [..., S]."""
    flat = states.flatten(0, -2).double()
    std = flat.std(0).float()
    if name == "state":
        std = torch.where(std < 1e-4, 1.0, std)
    else:
        std = torch.where(std < 1e-6, 0.0, std)
    getattr(learner, f"{name}_mean").copy_(flat.mean(0))
    getattr(learner, f"{name}_std").copy_(std)


def begin(stage: str, learner: Learner, data: Episode) -> None:
    """What a stage does before its first round."""
    args = learner.args
    if stage == "clone":
        set_statistics(learner, data.states[: args.expert_episodes + args.random_episodes], "state")
    if stage == "rollouts":
        learner.clone.load_state_dict(learner.policy.state_dict())
    if stage == "model":
        set_statistics(learner, data.states.diff(dim=1), "change")


def work(
    stage: str, task: PointTask | MetaWorldTask, learner: Learner, data: Episode, progress: Progress
) -> tuple[int, dict[str, Any]]:
    """One round of a stage: how many units of work it was, and metrics."""
    args, device, unit = learner.args, learner.device, progress.unit

    # 1. Data, and 2. the clone's rollouts.
    if stage in ("data", "rollouts"):
        before = 0 if stage == "data" else amount_of_work(args)["data"]
        return 1, collect(task, learner, data, before + unit)

    # 2. Clone: what the expert does up to its success.
    total = amount_of_work(args)[stage]
    if stage == "clone":
        expert = Episode(*(column[: args.expert_episodes].to(device) for column in data))
        relevant = expert.success.cumsum(1) - expert.success == 0
        obs, action = learner.whiten(expert.states[:, :-1])[relevant], expert.choices[relevant]
        steps = min(100, total - unit)
        for step in range(steps):
            learner.clone_optimizer.param_groups[0]["lr"] = args.clone_lr * (1 - (unit + step) / total)
            rows = torch.randint(len(obs), (args.batch_size,), device=device)
            metrics = clone_step(learner, obs[rows], action[rows])
        return steps, metrics

    # 3. Model and classifier, on all data.
    if stage == "model":
        transitions = Windows(*(column.to(device) for column in windows(data, args.history)))
        steps = min(100, total - unit)
        for step in range(steps):
            for optimizer in (learner.model_optimizer, learner.classifier_optimizer):
                optimizer.param_groups[0]["lr"] = args.model_lr * (1 - (unit + step) / total)
            rows = torch.randint(len(transitions.success), (args.batch_size,), device=device)
            metrics = model_step(learner, Windows(*(column[rows] for column in transitions)))
        return steps, metrics

    # 4. Refine: PPO in the model, from initial states of the data, or in the simulator.
    if args.refine_in == "model":
        start = data.states[:, 0].to(device)
        rows = torch.randint(len(start), (args.rollout_episodes,), device=device)
        rollout = imagine(learner, learner.policy, start[rows])
    else:
        seeds = episode_seeds(2, args.seed, progress.global_step, args.rollout_episodes)
        rollout = play_rollout(task, learner, seeds)
    learner.optimizer.param_groups[0]["lr"] = args.learning_rate * max(1 - unit / total, 0)
    return int(rollout.running.sum()), update(learner, rollout)


def train(args: Args, given: Collection[str] = (), signals: Sequence[int] = ()) -> dict:
    """Run the stages up to --stage; returns a dict.

    Keys: run_dir; global_step, steps of the refinement; and after the evaluation, also written to RUN_DIR/result.json:
    episodic_returns, the list of successes (1 or 0) of the final deterministic evaluation in the simulator;
    final_return, their mean; clone_return, the clone's; real_steps, the decisions in the data or, with --refine-in
    simulator, in data and refinement; env_steps_per_second of the refinement; stage_seconds. Raises RunError for bad
    arguments and for NaN. `given` names arguments that count as asked for though they equal their defaults. When
    `signals` is no longer empty, the run saves a checkpoint and raises Stopped.
    """
    with ExitStack() as held:
        checkpoint = None
        if args.resume is not None:
            run_dir = existing_run("--resume", args.resume)
            held.enter_context(locked(run_dir))
            args, checkpoint = load_checkpoint("--resume", run_dir, args, {*given, "stage"}, free=("device", "stage"))
        check_args(args)
        torch.set_num_threads(args.num_threads)
        torch.manual_seed(args.seed)
        device = choose_device(args)
        task = make_task(args)
        held.callback(task.close)
        learner = Learner(args, task, device)
        data = empty_data(args, task)
        progress = Progress()
        if checkpoint:
            progress = restore("--resume", run_dir, checkpoint, learner, data, device)
        else:
            run_dir = create_run(args, args.env_id)
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, task, learner, data, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    task: PointTask | MetaWorldTask,
    learner: Learner,
    data: Episode,
    progress: Progress,
    signals: Sequence[int],
) -> dict:
    """Go through the stages, from where `progress` stands. Between rounds a checkpoint holds everything."""
    started = time.monotonic()
    writer = start_logging(args, run_dir, work_done(args, progress))
    evaluated = args.stage in ("evaluate", "all")
    end = len(STAGES) if evaluated else STAGES.index(args.stage) + 1

    def seconds() -> float:
        return progress.seconds + time.monotonic() - started

    def save() -> None:
        check_learner(learner, progress.global_step)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), learner, data)

    def log_evaluation(episodes: int) -> np.ndarray:
        for mode in ("stochastic", "deterministic"):
            seed = args.seed + progress.global_step
            real, imagined = evaluate(task, learner, learner.policy, mode == "deterministic", episodes, seed)
            mean, std = float(real.mean()), float(real.std())
            row = progress.global_step, round(seconds(), 1), mode, mean, std, episodes, mean, float(imagined.mean())
            progress.rows.append(dict(zip(EVALUATION_COLUMNS, row)))
            writer.add_scalar(f"returns/{mode}", mean, work_done(args, progress))
            writer.add_scalar(f"success/imagined_{mode}", float(imagined.mean()), work_done(args, progress))
        write_evaluations(run_dir, progress.rows)
        return real  # of the deterministic policy

    while progress.stage < end:
        stage = STAGES[progress.stage]
        total = amount_of_work(args)[stage]
        bar = tqdm(total=total, initial=progress.unit, desc=f"{args.env_id} {stage}", mininterval=1)
        if not progress.unit:
            save()
            begin(stage, learner, data)
            if stage == "refine" and not progress.rows:
                log_evaluation(args.final_eval_episodes)  # of the clone
                save()
        stage_started = time.monotonic() - progress.stage_seconds.get(stage, 0)
        rounds = 0
        while progress.unit < total:
            if rounds % args.checkpoint_interval == 0 and rounds:
                save()
            if signals:
                save()
                bar.close()
                where = f"stage {stage}, {progress.unit} of {total}"
                raise Stopped(f"stopped in {where}; go on with --resume {run_dir}")
            done, metrics = work(stage, task, learner, data, progress)
            before = progress.unit
            progress.unit += done
            rounds += 1
            if stage == "refine":
                progress.global_step = progress.unit
            check_finite([*metrics.items(), *learner.named_parameters()], progress.global_step)
            progress.stage_seconds[stage] = time.monotonic() - stage_started

            # Log.
            if stage == "refine":
                metrics["steps_per_second"] = progress.unit / progress.stage_seconds[stage]
            for name, value in metrics.items():
                writer.add_scalar(name, float(value), work_done(args, progress))
            bar.update(done)
            name, value = next(reversed(metrics.items()))
            bar.set_postfix({name: f"{float(value):.2f}"})
            due = stage == "refine" and progress.unit // args.eval_interval > before // args.eval_interval
            if due and progress.unit < total:
                log_evaluation(args.eval_episodes)
                stage_started = time.monotonic() - progress.stage_seconds[stage]
        bar.close()
        progress.stage += 1
        progress.unit = 0

    save()
    result = {"run_dir": str(run_dir), "global_step": progress.global_step}
    if not evaluated:
        writer.close()
        return result
    if signals:
        raise Stopped(f"stopped before the evaluation; go on with --resume {run_dir}")
    episodic_returns = log_evaluation(args.final_eval_episodes)
    writer.close()
    result |= {
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "clone_return": progress.rows[1]["return_mean"],
        "real_steps": len(data.states) * args.horizon + progress.global_step * (args.refine_in == "simulator"),
        "env_steps_per_second": progress.global_step / progress.stage_seconds["refine"],
        "stage_seconds": progress.stage_seconds,
    }
    packages = ("torch", "numpy", "mujoco") + (("metaworld",) if args.env_id != "point" else ())
    versions = {package: version(package) for package in packages}
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
    check_types(args, {"seed": 0, "random_episodes": 0, "clone_episodes": 0})
    check_run_args(args)
    for name in ("clone_lr", "model_lr", "learning_rate", "clip_coef", "max_grad_norm"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    for name in ("gamma", "gae_lambda"):
        require(args, name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    for name in ("ent_coef", "vf_coef", "kl_coef"):
        require(args, name, 0 <= getattr(args, name) <= 1e6, "a number from 0 to 1e6")
    require(args, "min_log_std", -10 <= args.min_log_std <= 2, "a number from -10 to 2")
    require(args, "max_log_std", args.min_log_std <= args.max_log_std <= 2, "a number from --min-log-std to 2")
    require(args, "denoising_steps", args.denoising_steps >= 2, "a whole number of 2 or more")
    longest = 500 // args.action_repeat
    require(args, "horizon", args.env_id == "point" or args.horizon <= longest, f"at most {longest}, Meta-World's end")
    size = args.rollout_episodes * args.horizon
    require(args, "rollout_episodes", size <= 10**7, f"such that a rollout has 1e7 steps or fewer, not {size:.3g}")
    require(args, "num_minibatches", 2 * args.num_minibatches <= args.rollout_episodes, "at most half the episodes")
    films = args.evaluate is not None and args.refine_in == "model"
    require(args, "capture_video", films or not args.capture_video, "left out without --evaluate and a model to film")


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


def save_checkpoint(run_dir: Path, args: Args, progress: Progress, learner: Learner, data: Episode) -> None:
    """Write checkpoint.pt, whole."""
    contents = {
        "script": SCRIPT,
        "args": run_arguments(args),
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "optimizers": [list(optimizer.state.values()) for optimizer in learner.optimizers()],
        "data": data._asdict(),
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
    flag: str, run_dir: Path, checkpoint: dict, learner: Learner, data: Episode, device: torch.device
) -> Progress:
    """Bring learner, data and random numbers to where the checkpoint stands. Raises RunError if it is damaged."""
    with damage_reported(flag, run_dir / "checkpoint.pt"):
        progress = read_progress(checkpoint["progress"])
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
        copy_into([list(optimizer.state.values()) for optimizer in learner.optimizers()], checkpoint["optimizers"])
        copy_into(data._asdict(), checkpoint["data"])
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
    """--evaluate: play a run's clone and its policy, and print their returns, which are successes."""
    run_dir = existing_run("--evaluate", args.evaluate)
    free = ("seed", "final_eval_episodes", "num_threads", "device", "stage")
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, given, free)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    task = make_task(args)
    learner = Learner(args, task, choose_device(args))
    with damage_reported("--evaluate", run_dir / "checkpoint.pt"):
        if read_progress(checkpoint["progress"]).stage < STAGES.index("refine"):
            raise RunError(f"--evaluate: {run_dir} has not learned what it refines in; go on with --resume")
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
    for name, policy in (("clone", learner.clone), ("policy", learner.policy)):
        for mode in ("stochastic", "deterministic"):
            deterministic = mode == "deterministic"
            real, imagined = evaluate(task, learner, policy, deterministic, args.final_eval_episodes, args.seed)
            found = f"return {real.mean():.2f} over {len(real)} episodes"
            if args.refine_in == "model":
                found += f", imagined {imagined.mean():.2f} over {len(imagined)}"
            print(f"{name:6s} {mode:13s} {found}")
    if args.capture_video:
        film(task, learner, args.seed, run_dir / "imagined.gif")
        print(f"{'video':20s} {run_dir / 'imagined.gif'}")
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
            done = f"final return {result['final_return']:.2f}" if "final_return" in result else f"{args.stage} is done"
            print(f"{done}, run folder {result['run_dir']}")
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
