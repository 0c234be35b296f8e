"""QVPO: Q-weighted variational policy optimisation, a diffusion policy for any continuous Gymnasium task.

Ding, Hu, Zhang, Ren, Zhang, Yu, Wang, Shi, "Diffusion-based Reinforcement Learning via Q-weighted Variational Policy
Optimization", NeurIPS 2024, arXiv 2405.16173. Where paper and official code differ, this follows the code.

    python qvpo.py --env-id HalfCheetah-v5 --total-timesteps 40000

1. The policy is a T-step denoising diffusion (DDPM) of actions. To act, it draws K_b candidates and plays the one of
   highest Q; transitions go to a replay buffer.
2. Twin critics learn r + gamma min_k Q'_k(s', a'), where a' is the best of K_t candidates of the target policy.
3. For fresh states, N_d candidates are drawn and the best, a*, is kept, weighed by w = max(Q(s, a*) - mean Q, 0)
   (qadv) or w = max(Q(s, a*), 1) (qcut).
4. The denoiser learns a* with its loss times w: a weighted variational bound on log pi(a* | s).
5. It also learns ten uniform actions per state, with w times a coefficient that decays: the entropy term, without which
   the policy imitates its own best samples until nothing is left to choose from.
6. Target networks follow; evaluation plays the best of 32 candidates.

--preset paper has the published sizes, --preset laptop (the default) ones that two cores train in minutes.
docs/qvpo.md numbers the implementation details and explains the logged scalars.

To fork it for other tasks, rewrite make_env; for other weights of the candidates, q_weights. A copy under another name
refuses this script's checkpoints.
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
from copy import deepcopy
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

    env_id: str = "Pendulum-v1"
    """A Gymnasium task with a Box of continuous actions, such as Hopper-v5 or dm_control/cartpole-swingup-v0."""
    num_envs: int = 1
    """Copies of the task, stepped one after the other in this process."""
    total_timesteps: int = 10_000
    """Environment steps in all, summed over the copies."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""


@dataclass
class Sizes:
    """What a preset sets unless a flag says otherwise."""

    preset: Literal["laptop", "paper"] = "laptop"
    """Sizes for two cores, or the published ones."""
    hidden: int | None = None
    """Width of all networks' three hidden layers (laptop 128, paper 256)."""
    denoising_steps: int | None = None
    """T, the steps of the diffusion (laptop 5, paper 20)."""
    num_candidates: int | None = None
    """N_d, actions of which the denoiser learns the best (laptop 16, paper 64)."""
    behavior_candidates: int | None = None
    """K_b, actions of which the best is played while training (laptop 4, paper 4)."""
    target_candidates: int | None = None
    """K_t, actions of which the best enters the critic's target (laptop 2, paper 4)."""
    batch_size: int | None = None
    """Transitions in a critic update, and fresh states in a policy update (laptop 128, paper 256)."""
    policy_frequency: int | None = None
    """Critic updates for each policy update (laptop 2, paper 1)."""
    actor_lr: float | None = None
    """Learning rate of the policy (laptop 0.0003, paper 0.0001)."""
    learning_starts: int | None = None
    """Environment steps of uniformly random actions before the first update (laptop 1000, paper 10000)."""


@dataclass
class Algorithm:
    """Updates, weights and replay."""

    critic_lr: float = 3e-4
    """Learning rate of the critics."""
    gamma: float = 0.99
    """Discount factor."""
    tau: float = 0.005
    """Step of the target networks, each update."""
    max_grad_norm: float = 2.0
    """Norm that gradients are clipped to."""
    buffer_size: int = 1_000_000
    """Transitions the replay buffer holds."""
    steps_per_update: int = 1
    """Environment steps for each update."""
    q_transform: Literal["qadv", "qcut"] = "qadv"
    """Weight of the best candidate: its advantage over their mean, or its Q, at least 1."""
    entropy_coefficient: float = 0.02
    """Weight of the uniform actions at the start, relative to w (0: none). It decays linearly."""
    min_entropy_coefficient: float = 0.002
    """Where that decay ends."""
    num_uniform: int = 10
    """N_e, uniform actions per state that the denoiser learns for the sake of entropy."""
    bfloat16: bool = False
    """Draw the candidates of an update in bfloat16: faster on CPUs and GPUs that support it."""


@dataclass
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 5_000
    """Environment steps between evaluations."""
    eval_candidates: int = 32
    """Actions of which the best is played in a deterministic evaluation."""
    eval_episodes: int = 10
    """Episodes of each evaluation, once as while training (stochastic), once with more candidates (deterministic)."""
    final_eval_episodes: int = 50
    """Episodes of the last evaluation, the one reported."""
    log_interval: int = 1_000
    """Environment steps between TensorBoard points."""
    checkpoint_interval: int = 10_000
    """Environment steps between checkpoints. Each also ends the copies' episodes early, as a time limit does."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where learner and replay buffer live; auto is CUDA if there is one."""
    compile: bool = False
    """Run the update through torch.compile (needs a C++ compiler)."""
    num_threads: int = 1
    """Threads of PyTorch."""
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
class Args(Run, Algorithm, Sizes, Task):
    """Train a diffusion policy with QVPO on a Gymnasium task; the defaults are those of the reported results."""


PRESETS = {
    "laptop": {
        "hidden": 128,
        "denoising_steps": 5,
        "num_candidates": 16,
        "behavior_candidates": 4,
        "target_candidates": 2,
        "batch_size": 128,
        "policy_frequency": 2,
        "actor_lr": 3e-4,
        "learning_starts": 1_000,
    },
    "paper": {
        "hidden": 256,
        "denoising_steps": 20,
        "num_candidates": 64,
        "behavior_candidates": 4,
        "target_candidates": 4,
        "batch_size": 256,
        "policy_frequency": 1,
        "actor_lr": 1e-4,
        "learning_starts": 10_000,
    },
}
LONGEST_EPISODE = 20_000  # steps of an evaluation's episode of a task without a time limit

EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")
TIME_FEATURES = 32


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


def with_preset(args: Args) -> Args:
    """The arguments with every None that the preset knows filled in."""
    require(args, "preset", args.preset in list(PRESETS), f"one of {', '.join(PRESETS)}")
    missing = {name: value for name, value in PRESETS[args.preset].items() if getattr(args, name) is None}
    return replace(args, **missing)


# -------------------------------------------------------------------------- diffusion and Q-weighting: pure functions


def cosine_schedule(num_steps: int, offset: float = 0.008) -> Tensor:
    """alphas_bar [T + 1], the share of signal variance left after t steps; alphas_bar[0] is 1.

        alphas_bar[t] proportional to cos^2((t / T + offset) / (1 + offset) * pi / 2)

    (Nichol and Dhariwal 2021, eq. 17.) No step's beta exceeds 0.999.
    """
    fraction = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alphas_bar = ((fraction + offset) / (1 + offset) * math.pi / 2).cos().square()
    alphas = (alphas_bar[1:] / alphas_bar[:-1]).clamp(min=0.001)
    return torch.cat([torch.ones(1), alphas.cumprod(0).float()])


def ddpm_step(x_t: Tensor, epsilon: Tensor, t: int, alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted noise (DDPM, eq. 6-7, 15).

        x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) epsilon

    implies an x_0, which is clipped to [-1, 1]. At t = 1 the mean is x_0 and the deviation 0.
    """
    alpha_bar = alphas_bar[t]
    alpha_bar_before = alphas_bar[t - 1]
    alpha = alpha_bar / alpha_bar_before
    x_0 = ((x_t - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-1, 1)
    of_x_0 = alpha_bar_before.sqrt() * (1 - alpha) * x_0
    of_x_t = alpha.sqrt() * (1 - alpha_bar_before) * x_t
    variance = (1 - alpha) * (1 - alpha_bar_before) / (1 - alpha_bar)
    return (of_x_0 + of_x_t) / (1 - alpha_bar), variance.sqrt()


def best_of(candidates: Tensor, q: Tensor) -> Tensor:
    """The candidate [B, D] of highest q [K, B] among candidates [K, B, D]."""
    return candidates[q.argmax(0), torch.arange(q.shape[1], device=q.device)]


def q_weights(q: Tensor, transform: str) -> Tensor:
    """Weight [B] of the best of K candidates with values q [K, B]; none is negative (paper, section 4.2).

        qadv: w = max_k q_k - mean_k q_k        qcut: w = max(max_k q_k, 1)

    qadv is its advantage, as the mean estimates V; qcut its value, raised to 1 if it is lower.
    """
    highest = q.amax(0)
    return highest - q.mean(0) if transform == "qadv" else highest.clamp(min=1)


def entropy_coefficient(args: Args, global_step: int) -> float:
    """Weight of the uniform actions: linear from args.entropy_coefficient towards 0, but not below its minimum."""
    decayed = args.entropy_coefficient * (1 - global_step / args.total_timesteps)
    return min(args.entropy_coefficient, max(args.min_entropy_coefficient, decayed))


# ------------------------------------------------------------------------------------------------------- networks


def truncated_normal(weight: Tensor, fan_in: int) -> None:
    """Draw a weight as the official code does: normal of deviation 1 / (2 sqrt(fan_in)), cut at two deviations."""
    std = 0.5 * fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def stacked_weight(stack: int, in_features: int, out_features: int) -> nn.Parameter:
    """`stack` weight matrices [S, in, out], one per agent or critic, each started as torch.nn.Linear starts its own."""
    bound = in_features**-0.5
    return nn.Parameter(torch.empty(stack, in_features, out_features).uniform_(-bound, bound))


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias, with or without a leading stack. Compiled, the sum fuses with the activation that follows.

    A stack of one serves all of x.
    """
    if torch.compiler.is_compiling():
        return x @ weight + bias
    return torch.addmm(bias, x, weight) if x.ndim == 2 else torch.baddbmm(bias, x, weight.expand(len(x), -1, -1))


class StackedLinear(nn.Module):
    """`stack` linear layers as one batched matrix product: [S, B, in] -> [S, B, out]. A stack of one serves any S."""

    def __init__(self, stack: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = stacked_weight(stack, in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


class DiffusionPolicy(nn.Module):
    """A denoiser of T steps (DDPM, Ho et al. 2020; epsilon-prediction): an MLP of (noisy action, t, observation).

    Its first layer is a sum of three parts, so that those of t and the observation are computed once for many actions.
    """

    def __init__(self, obs_size: int, action_size: int, hidden: int, num_steps: int):
        super().__init__()
        self.action_size = action_size
        self.num_steps = num_steps
        self.embedding = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, TIME_FEATURES))
        self.observation = nn.Linear(obs_size, hidden)
        self.time = nn.Linear(TIME_FEATURES, hidden, bias=False)
        self.noisy_action = nn.Linear(action_size, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.epsilon = nn.Linear(hidden, action_size)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                first = layer in (self.observation, self.time, self.noisy_action)
                fan_in = obs_size + action_size + TIME_FEATURES if first else layer.in_features
                truncated_normal(layer.weight, fan_in)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.register_buffer("alphas_bar", cosine_schedule(num_steps), persistent=False)
        frequencies = torch.exp(torch.arange(TIME_FEATURES // 2) * -(math.log(10_000) / (TIME_FEATURES // 2 - 1)))
        angles = torch.arange(num_steps)[:, None] * frequencies  # step t of the paper is row t - 1
        self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], -1), persistent=False)

    def time_features(self) -> Tensor:
        """The first layer's share [T, H] of every t = 1..T, from sinusoids (Vaswani et al. 2017) and an MLP."""
        return self.time(self.embedding(self.sinusoids))

    def forward(self, context: Tensor, x_t: Tensor) -> Tensor:
        """The noise in actions [K, B, D]; context [K or 1, B, H] is the first layer's sum for observation and t.

        All is computed in the type of x_t.
        """
        dtype = x_t.dtype
        hidden = F.silu(x_t @ self.noisy_action.weight.to(dtype).T + context).flatten(0, 1)
        for layer in self.hidden:
            hidden = F.silu(affine(hidden, layer.weight.to(dtype).T, layer.bias.to(dtype)))
        return affine(hidden, self.epsilon.weight.to(dtype).T, self.epsilon.bias.to(dtype)).view(x_t.shape)

    @torch.no_grad()
    def sample(self, obs: Tensor, num_candidates: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Candidate actions [K, B, D] in [-1, 1] for observations [B, O], by ancestral sampling.

        The network runs in `dtype`, the chain itself in float32.
        """
        observation = self.observation(obs).to(dtype)
        time_features = self.time_features().to(dtype)
        x_t = torch.randn(num_candidates, len(obs), self.action_size, device=obs.device)
        for t in range(self.num_steps, 0, -1):
            epsilon = self((observation + time_features[t - 1])[None], x_t.to(dtype)).float()
            mean, std = ddpm_step(x_t, epsilon, t, self.alphas_bar)
            x_t = mean + std * torch.randn_like(mean)
        return x_t


class TwinCritic(nn.Module):
    """Two critics Q(s, a), each an MLP of (observation, action)."""

    def __init__(self, obs_size: int, action_size: int, hidden: int):
        super().__init__()
        self.observation = StackedLinear(2, obs_size, hidden)
        self.action = stacked_weight(2, action_size, hidden)
        self.hidden = nn.ModuleList(StackedLinear(2, hidden, hidden) for _ in range(2))
        self.value = StackedLinear(2, hidden, 1)
        for weight in (self.observation.weight, self.action):
            truncated_normal(weight, obs_size + action_size)
        for layer in (*self.hidden, self.value):
            truncated_normal(layer.weight, hidden)

    def forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Values [2, K, B] of K actions [K, B, D] at each observation [B, O], whose share is computed once."""
        shape = 2, *actions.shape[:2], -1
        hidden = (actions.flatten(0, 1) @ self.action).view(shape) + self.observation(obs.expand(2, -1, -1))[:, None]
        hidden = F.silu(hidden).flatten(1, 2)
        for layer in self.hidden:
            hidden = F.silu(layer(hidden))
        return self.value(hidden).view(shape[:3])


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
    """What training changes: policy, critics, their targets and optimisers, all on one device.

    The networks are drawn on the CPU first, so a seed starts with the same ones on every device.
    """

    def __init__(self, args: Args, obs_size: int, action_size: int, device: torch.device | str = "cpu"):
        super().__init__()
        self.args = args
        self.device = torch.device(device)
        self.sampling_dtype = torch.bfloat16 if args.bfloat16 else torch.float32
        self.policy = DiffusionPolicy(obs_size, action_size, args.hidden, args.denoising_steps)
        self.critic = TwinCritic(obs_size, action_size, args.hidden)
        self.target_policy = deepcopy(self.policy)
        self.target_critic = deepcopy(self.critic)
        self.to(self.device)

        self.policy_optimizer = Adam(self.policy.parameters(), args.actor_lr, eps=1e-5)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, eps=1e-5)

    def optimizers(self) -> list[Adam]:
        return [value for value in vars(self).values() if isinstance(value, Adam)]

    def act(self, obs: Tensor, num_candidates: int) -> Tensor:
        """Actions [B, D] for observations [B, O]: the best of several candidates, by the minimum of both critics."""
        return best_of(*draw_candidates(self.policy, self.critic, obs, num_candidates))


@torch.no_grad()
def draw_candidates(
    policy: DiffusionPolicy, critic: TwinCritic, obs: Tensor, num_candidates: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Candidate actions [K, B, D] at observations [B, O] and their min_k Q_k [K, B].

    A CPU takes them in chunks of some 2,048 rows, whose activations stay in its cache.
    """
    size = max(1, 2048 // len(obs)) if obs.device.type == "cpu" else num_candidates
    sizes = [min(size, num_candidates - done) for done in range(0, num_candidates, size)]
    chunks = [policy.sample(obs, size, dtype) for size in sizes]
    return torch.cat(chunks), torch.cat([critic(obs, chunk).amin(0) for chunk in chunks])


def update(
    learner: Learner, batch: "Batch", obs: Tensor | None, entropy_weight: Tensor | float | None
) -> dict[str, Tensor]:
    """One update of the critics and, at fresh observations obs [B, O] if given, of the policy; returns metrics [].

    entropy_weight [] is that of the uniform actions, None if there are none.
    """
    metrics = update_critic(learner, batch)
    if obs is not None:
        metrics |= update_policy(learner, obs, entropy_weight)
    targets = [*learner.target_policy.parameters(), *learner.target_critic.parameters()]
    with torch.no_grad():
        torch._foreach_lerp_(targets, [*learner.policy.parameters(), *learner.critic.parameters()], learner.args.tau)
    return metrics


def update_critic(learner: Learner, batch: "Batch") -> dict[str, Tensor]:
    """Move both critics to r + gamma (1 - terminated) max over K_t of min_k Q'_k(s', a'); truncation bootstraps."""
    args = learner.args
    networks = learner.target_policy, learner.target_critic
    with torch.no_grad():
        _, next_q = draw_candidates(*networks, batch.next_obs, args.target_candidates, learner.sampling_dtype)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_q.amax(0)
    q = learner.critic(batch.obs, batch.actions[None])[:, 0]
    loss = (q - target).square().mean(1).sum()
    take_step(learner.critic_optimizer, loss, args.max_grad_norm)
    return {"losses/critic": loss.detach(), "losses/q": q.detach().mean()}


def update_policy(learner: Learner, obs: Tensor, entropy_weight: Tensor | float | None) -> dict[str, Tensor]:
    """One step of the denoiser at obs [B, O], towards the best of its own candidates and towards uniform actions."""
    args = learner.args
    networks = learner.policy, learner.critic
    with torch.no_grad():
        candidates, q = draw_candidates(*networks, obs, args.num_candidates, learner.sampling_dtype)
        actions = best_of(candidates, q)[None]
        weights = q_weights(q, args.q_transform)[None]
        metrics = {"losses/weight": weights.mean(), "policy/spread": candidates.std(0).mean()}
        if entropy_weight is not None:
            uniform = 2 * torch.rand(args.num_uniform, *actions.shape[1:], device=obs.device) - 1
            actions = torch.cat([actions, uniform])
            weights = torch.cat([weights, entropy_weight * weights.expand(args.num_uniform, -1)])
    loss = denoising_loss(learner.policy, obs, actions, weights)
    take_step(learner.policy_optimizer, loss, args.max_grad_norm)
    return metrics | {"losses/actor": loss.detach()}


def denoising_loss(policy: DiffusionPolicy, obs: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """Squared error [] of the predicted noise at random t, weighted: actions [K, B, D], weights [K, B], obs [B, O].

        E[w |epsilon(sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise, t, s) - noise|^2]

    The mean over all actions and dimensions; for equal weights DDPM's simplified bound (eq. 14), a behaviour cloning.
    """
    t = torch.randint(1, policy.num_steps + 1, weights.shape, device=obs.device)
    noise = torch.randn_like(actions)
    alpha_bar = policy.alphas_bar[t][..., None]
    signal_scale = alpha_bar.sqrt()
    noise_scale = (1 - alpha_bar).sqrt()
    x_t = signal_scale * actions + noise_scale * noise
    error = policy(policy.observation(obs) + policy.time_features()[t - 1], x_t) - noise
    return (weights[..., None] * error.square()).mean()


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


# -------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    """Transitions: observations [B, O], actions [B, D] in [-1, 1], reward and terminated [B]."""

    obs: Tensor
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor


class ReplayBuffer:
    """The last `capacity` transitions, whose fields have `shapes`, on a device.

    `next_obs` is the true next observation, also where an episode was truncated. Raises RunError if it does not fit.
    """

    def __init__(self, capacity: int, shapes: Batch, device: torch.device | str = "cpu"):
        try:  # untouched pages take no memory
            self.data = Batch(*(torch.empty(capacity, *shape, device=device) for shape in shapes))
        except RuntimeError:
            raise RunError(f"--buffer-size: no memory for {capacity} transitions; choose a smaller number") from None
        self.capacity, self.device, self.added = capacity, device, 0

    @property
    def size(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transitions: Tensor) -> None:
        """Add E transitions, given in the order of Batch's fields, each [E, ...]."""
        rows = torch.arange(self.added, self.added + len(transitions[0]), device=self.device) % self.capacity
        for column, values in zip(self.data, transitions, strict=True):
            column[rows] = values.to(column.dtype)
        self.added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """A batch drawn uniformly with replacement, agents first where there are agents."""
        rows = torch.randint(self.size, (batch_size,), device=self.device)
        return Batch(*(column[rows].transpose(0, 1) if column.ndim > 2 else column[rows] for column in self.data))

    def state_dict(self) -> dict:
        return {"added": self.added, "data": [column[: self.size].clone() for column in self.data]}

    def load_state_dict(self, state: dict) -> None:
        """ValueError unless the stored transitions are as many and of the shapes as they should be."""
        if not fits(state["added"], int) or state["added"] < 0:
            raise ValueError("added")
        self.added = state["added"]
        copy_into([column[: self.size] for column in self.data], state["data"])


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


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> Sequence[Tensor]:
    """Arrays [E, ...] as float32 tensors on the device, in a single transfer."""
    rows = [array.reshape(len(array), -1) for array in arrays]
    moved = torch.from_numpy(np.concatenate(rows, 1, dtype=np.float32)).to(device)
    columns = moved.split([row.shape[1] for row in rows], 1)
    return [column.view(array.shape) for column, array in zip(columns, arrays)]


# ------------------------------------------------------------------------------------------------------ evaluation


def ways_to_play(learner: Learner) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """stochastic: as while training, the best of K_b candidates; deterministic: the best of many, hardly random."""

    def act(obs: np.ndarray, num_candidates: int) -> np.ndarray:
        return learner.act(torch.from_numpy(obs).to(learner.device), num_candidates).cpu().numpy()

    return {
        "stochastic": partial(act, num_candidates=learner.args.behavior_candidates),
        "deterministic": partial(act, num_candidates=learner.args.eval_candidates),
    }


def evaluate(
    act: Callable[[np.ndarray], np.ndarray],
    args: Args,
    episodes: int,
    seed: int,
    video: Path | None = None,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Undiscounted returns [episodes] of act, observations [B, O] to actions [B, D] in [-1, 1].

    Played without touching training's random numbers; those that act draws are of `device`. The first episode goes to
    the GIF `video`, if given.
    """
    envs = [make_env(args.env_id, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
    waves = []
    film = []
    with forked_random_numbers(torch.device(device)):
        torch.manual_seed(seed)
        while len(waves) * len(envs) < episodes:
            seeds = episode_seeds(1, seed, len(waves), len(envs))
            obs = [env.reset(seed=int(s))[0] for env, s in zip(envs, seeds)]
            returns = np.zeros(len(envs))
            step, playing = 0, list(range(len(envs)))
            while playing:
                if step == LONGEST_EPISODE and envs[0].spec.max_episode_steps is None:
                    reason = f"has no time limit, and an evaluation's episode of it does not end in {step} steps"
                    raise RunError(f"--env-id: {args.env_id} {reason}; choose a task with max_episode_steps")
                step += 1
                if video and not waves and 0 in playing:
                    film.append(envs[0].render()[::2, ::2])
                seen = np.stack([obs[i] for i in playing])
                if not np.isfinite(seen).all():
                    raise RunError(f"an observation of {args.env_id} is NaN or infinite in an evaluation")
                for i, action in zip(playing, act(seen)):
                    obs[i], reward, terminated, truncated, _ = envs[i].step(action)
                    returns[i] += reward
                    if terminated or truncated:
                        playing = [j for j in playing if j != i]
            if not np.isfinite(returns).all():
                raise RunError(f"a return of {args.env_id} is NaN or infinite in an evaluation")
            waves.append(returns)
    for env in envs:
        env.close()  # else DM Control's renderer fails at the interpreter's exit
    if video:
        import imageio

        imageio.mimsave(video, film[:: math.ceil(len(film) / 200)], duration=50, loop=0)
    return np.concatenate(waves)[:episodes]


def forked_random_numbers(device: torch.device) -> AbstractContextManager:
    """Inside, PyTorch's random numbers may be seeded and drawn without a trace outside."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    episode: int = 0
    updates: int = 0
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
        args = with_preset(args)
        check_args(args)
        torch.set_num_threads(args.num_threads)
        torch.manual_seed(args.seed)
        device = choose_device(args)
        env = SyncVectorEnv([lambda: make_env(args.env_id)] * args.num_envs, autoreset_mode=AutoresetMode.DISABLED)
        obs_size = env.single_observation_space.shape[0]
        action_size = env.single_action_space.shape[0]
        learner = Learner(args, obs_size, action_size, device)
        capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)
        buffer = ReplayBuffer(capacity, Batch((obs_size,), (action_size,), (), (), (obs_size,)), device)
        progress = Progress()
        if checkpoint:
            progress = restore("--resume", run_dir, checkpoint, learner, buffer, device)
        else:
            run_dir = create_run(args, args.env_id.replace("/", "-"))
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, env, learner, buffer, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    env: SyncVectorEnv,
    learner: Learner,
    buffer: ReplayBuffer,
    progress: Progress,
    signals: Sequence[int],
) -> dict:
    """Act, store, learn and log, from where `progress` stands to the end."""
    device = buffer.device
    update_step = compiled(update, learner, signals) if args.compile else update
    first_step = progress.global_step
    started = time.monotonic()
    last_checkpoint = first_step if first_step else -args.checkpoint_interval
    writer = start_logging(args, run_dir, first_step)
    bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", desc=args.env_id, mininterval=1)

    def seconds() -> float:
        return progress.seconds + time.monotonic() - started

    def save() -> None:
        nonlocal last_checkpoint
        check_learner(learner, progress.global_step)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), learner, buffer)
        last_checkpoint = progress.global_step

    def stop_if_asked() -> None:
        if signals:
            bar.close()
            saved = f"the last checkpoint is from step {last_checkpoint}"
            raise Stopped(f"stopped at step {progress.global_step}; {saved}; go on with --resume {run_dir}")

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode, act in ways_to_play(learner).items():
            film = video if mode == "deterministic" else None
            returns = evaluate(act, args, episodes, progress.global_step, film, device)
            mean, std = float(returns.mean()), float(returns.std())
            row = progress.global_step, round(seconds(), 1), mode, mean, std, episodes
            progress.rows.append(dict(zip(EVALUATION_COLUMNS, row)))
            writer.add_scalar(f"returns/{mode}", mean, progress.global_step)
        write_evaluations(run_dir, progress.rows)
        return returns  # of the deterministic policy

    def due(interval: int) -> bool:
        return progress.global_step // interval > (progress.global_step - args.num_envs) // interval

    obs = None
    metrics = {}
    while progress.global_step < args.total_timesteps:
        # A checkpoint cannot hold the state of any environment, so there all copies start anew, interrupted or not.
        if progress.global_step - last_checkpoint >= args.checkpoint_interval:
            save()
            obs = None
            metrics = {}
        stop_if_asked()
        if obs is None:
            seeds = episode_seeds(0, args.seed, progress.episode, args.num_envs)
            obs, _ = env.reset(seed=seeds.tolist())
            check_finite([("an observation", obs)], progress.global_step)
            (obs,) = to_device([obs], device)
            returns = np.zeros(args.num_envs)
            progress.episode += 1

        # Act.
        if progress.global_step < args.learning_starts:
            actions = 2 * torch.rand(args.num_envs, learner.policy.action_size, device=device) - 1
        else:
            actions = learner.act(obs, args.behavior_candidates)
        played = actions.cpu().numpy()
        check_finite([("the action", played)], progress.global_step)
        next_obs, reward, terminated, truncated, _ = env.step(played)
        progress.global_step += args.num_envs

        # Store.
        check_finite([("an observation", next_obs), ("the reward", reward)], progress.global_step)
        returns += reward
        next_obs, reward, stored_terminated = to_device([next_obs, reward, terminated], device)
        buffer.add(obs, actions, reward, stored_terminated, next_obs)
        obs = next_obs
        ended = terminated | truncated
        if ended.any():
            progress.episode_return = float(returns[ended].mean())
            returns[ended] = 0
            obs, _ = env.reset(options={"reset_mask": ended})
            check_finite([("an observation", obs)], progress.global_step)
            (obs,) = to_device([obs], device)

        # Learn.
        while args.learning_starts + progress.updates * args.steps_per_update < progress.global_step:
            policy_too = progress.updates % args.policy_frequency == 0
            fresh = buffer.sample(args.batch_size).obs if policy_too else None
            weight = entropy_coefficient(args, progress.global_step)
            entropy_weight = torch.full((), weight, device=device) if weight > 0 else None
            results = update_step(learner, buffer.sample(args.batch_size), fresh, entropy_weight)
            metrics |= {name: value.clone() for name, value in results.items()}  # a CUDA graph overwrites its own
            progress.updates += 1

        # Log.
        bar.update(args.num_envs)
        if due(args.log_interval) and metrics:
            scalars = {name: float(value) for name, value in metrics.items()}
            check_finite(scalars.items(), progress.global_step)
            scalars["policy/entropy_coefficient"] = entropy_coefficient(args, progress.global_step)
            scalars["steps_per_second"] = (progress.global_step - first_step) / (time.monotonic() - started)
            scalars["returns/training"] = progress.episode_return
            for name, value in scalars.items():
                writer.add_scalar(name, value, progress.global_step)
            bar.set_postfix({"return": f"{progress.episode_return:.2f}"})
            metrics = {}
        if due(args.eval_interval) and progress.global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
    stop_if_asked()
    env_steps_per_second = progress.global_step / seconds()
    episodic_returns = log_evaluation(args.final_eval_episodes, run_dir / "final.gif" if args.capture_video else None)
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
    check_types(args, {"seed": 0, "learning_starts": 0, "num_candidates": 2})
    check_run_args(args)
    require(args, "learning_starts", args.learning_starts < args.total_timesteps, "below --total-timesteps")
    require(args, "buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    require(args, "batch_size", args.batch_size <= args.buffer_size, f"at most --buffer-size, {args.buffer_size}")
    for name in ("critic_lr", "actor_lr", "max_grad_norm"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require(args, "gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require(args, "tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    for name in ("entropy_coefficient", "min_entropy_coefficient"):
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


def save_checkpoint(run_dir: Path, args: Args, progress: Progress, learner: Learner, buffer: ReplayBuffer) -> None:
    """Write checkpoint.pt, whole."""
    contents = {
        "script": SCRIPT,
        "args": run_arguments(args),
        "progress": asdict(progress),
        "learner": learner.state_dict(),
        "optimizers": [list(optimizer.state.values()) for optimizer in learner.optimizers()],
        "buffer": buffer.state_dict(),
        **random_state(next(learner.parameters()).device),
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
    flag: str, run_dir: Path, checkpoint: dict, learner: Learner, buffer: ReplayBuffer, device: torch.device
) -> Progress:
    """Bring learner, buffer and random numbers to where the checkpoint stands. Raises RunError if it is damaged."""
    with damage_reported(flag, run_dir / "checkpoint.pt"):
        progress = read_progress(checkpoint["progress"])
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
        copy_into([list(optimizer.state.values()) for optimizer in learner.optimizers()], checkpoint["optimizers"])
        buffer.load_state_dict(checkpoint["buffer"])
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
    args = replace(with_preset(args), compile=False)  # nothing is learned
    check_args(args)
    torch.set_num_threads(args.num_threads)
    device = choose_device(args)
    env = make_env(args.env_id)
    learner = Learner(args, env.observation_space.shape[0], env.action_space.shape[0], device)
    with damage_reported("--evaluate", run_dir / "checkpoint.pt"):
        copy_into(dict(learner.state_dict()), dict(checkpoint["learner"]))
    for mode, act in ways_to_play(learner).items():
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        returns = evaluate(act, args, args.final_eval_episodes, args.seed, video, device)
        print(f"{mode:13s} return {returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes")
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
