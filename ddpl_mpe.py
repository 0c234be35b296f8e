"""DDPL on the cooperative tasks of mpe2, the multi-agent particle environments.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction.

    python ddpl_mpe.py --env-id simple_spread_v3

1. Every agent acts with its own T-step diffusion policy pi_i(a_i | o_i); transitions go to a replay buffer.
2. Central critics learn Q(s, a_1..a_N) of the team reward; the target's next actions are drawn from the policies.
3. Agent i's local critic Q_i(o_i, a_i) learns what of Q agent i can know: the mean over the rest of s and a_-i ~ pi_-i.
4. Per state and agent, M actions are proposed from a mixture of known density q: uniform, and kernels around pi_i,
   and weighed by w = exp(Q_i(o_i, a_i) / temperature_i) / q(a_i), which estimates the energy-based policy.
5. The denoiser learns E[a_i | x_t] under those weights (importance sampling score matching, ISSM); no sample of the
   energy-based policy is ever needed.
6. temperature_i follows the weights' own entropy estimate to a target entropy.

--policy gaussian is the baseline that the paper argues against: the same energy-based policy projected on a
tanh-Gaussian by the reparameterised KL, as in soft actor-critic, with everything else equal.
docs/ddpl_mpe.md numbers the implementation details, docs/runs.md explains the logged scalars.

A team that has been trained is one small file, which --evaluate plays, and which Python loads:

    from ddpl_mpe import load_team
    policy, args = load_team("benchmark/teams/simple_spread_v3.safetensors")
    actions = policy.sample(obs, deterministic=True)  # [N, B, O] -> [N, B, D], in [-1, 1]

To fork it for another benchmark whose copies all end together, rewrite make_env, observed_entities and VectorMPE; where
episodes end one by one, start from ddpl_mamujoco.py. A copy under another name refuses this script's checkpoints.
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
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import datetime
from importlib.metadata import version
from inspect import formatannotation
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.spaces import Box
from mpe2.all_modules import mpe_environments
from pettingzoo import ParallelEnv
from safetensors import safe_open
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

    env_id: str = "simple_spread_v3"
    """A cooperative mpe2 task, such as simple_spread_v3, simple_reference_v3 or simple_speaker_listener_v4."""
    num_agents: int | None = None
    """Number of agents, where the task lets you choose (simple_spread_v3: 3 unless given)."""
    num_envs: int = 8
    """Copies of the task, stepped one after the other in this process."""
    total_timesteps: int = 120_000
    """Environment steps in all, summed over the copies."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""


@dataclass
class Algorithm:
    """Actor, critics and replay."""

    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """The policy class: DDPL's diffusion policy or the Gaussian baseline."""
    shared_policy: bool = True
    """One policy, and local critic, for all agents, where their observations and actions have one size."""
    buffer_size: int = 1_000_000
    """Transitions the replay buffer holds."""
    learning_starts: int = 2_000
    """Environment steps of uniformly random actions before the first update."""
    steps_per_update: int = 8
    """Environment steps for each update of critic and actor."""
    batch_size: int = 256
    """Transitions in a critic update."""
    actor_batch_size: int = 128
    """Of those, how many states the diffusion policy learns from; each critic scores its share of them."""
    gamma: float = 0.95
    """Discount factor."""
    tau: float = 0.01
    """Step of the target critic towards the critic, each update."""
    average_decay: float = 0.99
    """What the average of a policy's weights keeps of itself, each update; evaluations play the average (0: none)."""
    critic_lr: float = 1e-3
    """Learning rate of the central critics."""
    actor_lr: float = 3e-3
    """Learning rate of the policies and of the diffusion policies' local critics."""
    num_critics: int = 4
    """K, central critics; the policies climb their mean."""
    pessimism: float = 0.6
    """How many of the critics' standard deviations the target lies below their mean."""
    pooled_critics: bool = True
    """Central critics that look at one agent at a time and pool what they see, where agents have one size."""
    critic_hidden: int = 128
    """Width of the central critics' hidden layers; pooled critics look at an agent with two of half that width."""
    entities: bool = True
    """Networks that look at one landmark or agent at a time, where an observation lists such (simple_spread_v3).

    There --layer-norm and both numbers of encoder layers then change nothing.
    """
    entity_width: int = 32
    """Width of the layers that do."""
    layer_norm: bool = False
    """Normalise these layers (LayerNorm), so that values do not run away where nothing has been seen for long."""
    actor_hidden: int = 128
    """Width of the policies' hidden layers."""
    encoder_layers: int = 3
    """Layers of denoisers and local critics that see the observation alone, normalised between (LayerNorm)."""
    gaussian_encoder_layers: int = 1
    """Layers of Gaussian policies before the second hidden one, normalised between (LayerNorm)."""


@dataclass
class Temperature:
    """The temperature of the energy-based policy."""

    init_temperature: float = 0.05
    """Temperature of the energy-based policy at the start."""
    temperature_lr: float = 3e-3
    """Learning rate of the log-temperature."""
    target_entropy: float = -0.5
    """Entropy the temperature aims at, in nats per action dimension (uniform: 0.69)."""


@dataclass
class Diffusion:
    """The diffusion policy and ISSM."""

    denoising_steps: int = 10
    """T, the steps of the diffusion."""
    num_uniform: int = 4
    """Uniform candidates per state and agent."""
    num_per_kernel: int = 6
    """Candidates per state, agent and kernel width."""
    block_size: int = 3
    """Dimensions of an agent's action to propose at a time; the rest keeps the policy's sample (a Gibbs step)."""
    sigmas: tuple[float, ...] = (0.1, 0.3)
    """Widths of the kernels around the policy's sample (actions span [-1, 1])."""
    local_critic_hidden: int = 64
    """Width of the local critics' two hidden layers."""
    num_noise_draws: int = 4
    """R, noisy points that the denoiser learns from per state and agent."""


@dataclass
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 10_000
    """Environment steps between evaluations."""
    eval_episodes: int = 40
    """Episodes of each evaluation, once with sampled and once with deterministic actions."""
    final_eval_episodes: int = 200
    """Episodes of the last evaluation, the one reported."""
    first_guess: bool = False
    """Play without noise by the denoiser's first guess, almost the mean action, instead of by the noiseless chain."""
    log_interval: int = 1_000
    """Environment steps between TensorBoard points."""
    checkpoint_interval: int = 20_000
    """Environment steps between checkpoints (each waits for the end of an episode)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where learner and replay buffer live; auto is CUDA if there is one."""
    compile: bool = True
    """Run the update through torch.compile: a minute at first, then 0.6 of its time on a CPU (needs a C++ compiler)."""
    num_threads: int = 1
    """Threads of PyTorch; networks this small gain little from more."""
    capture_video: bool = False
    """Write a GIF of the trained team to its run folder (with --evaluate: of both ways to play)."""
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
class Args(Run, Diffusion, Temperature, Algorithm, Task):
    """Train agents with DDPL on a cooperative task of mpe2; the defaults are those of the reported results."""


EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# --------------------------------------------------------------------------------- diffusion and ISSM: pure functions


def noise_schedule(num_steps: int, log_snr_max: float = 7.0, log_snr_min: float = -5.0) -> Tensor:
    """alphas_bar [T + 1], the share of signal variance left after t steps; alphas_bar[0] is 1.

    alphas_bar[t] = sigmoid(log_snr[t]), and log_snr is linear in t.
    """
    log_snr = torch.linspace(log_snr_max, log_snr_min, num_steps)
    return torch.cat([torch.ones(1), log_snr.sigmoid()])


def denoise_step(x_t: Tensor, v: Tensor, t: int, alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted v (DDPM, eq. 6-7).

    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 implies an x_0, which is clipped to [-1, 1].
    At t = 1 the mean is x_0 and the deviation 0.
    """
    alpha_bar = alphas_bar[t]
    alpha_bar_before = alphas_bar[t - 1]
    alpha = alpha_bar / alpha_bar_before
    x_0 = (alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v).clamp(-1, 1)
    of_x_0 = alpha_bar_before.sqrt() * (1 - alpha) * x_0
    of_x_t = alpha.sqrt() * (1 - alpha_bar_before) * x_t
    variance = (1 - alpha) * (1 - alpha_bar_before) / (1 - alpha_bar)
    return (of_x_0 + of_x_t) / (1 - alpha_bar), variance.sqrt()


def propose_actions(
    anchor: Tensor, sigmas: Tensor, num_uniform: int, num_per_kernel: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates [N, M, B, D] in [-1, 1] and their log-density [N, M, B] under the mixture that proposed them.

    The mixture: `num_uniform` uniform on the box, and for each of the J widths in `sigmas` [J] `num_per_kernel` from a
    Gaussian around anchor [N, B, D], reflected at the faces of the box. M = num_uniform + J * num_per_kernel. Every
    candidate is scored under the whole mixture (the balance heuristic, Veach and Guibas 1995):

        q(a) = num_uniform / M * U(a) + sum_j num_per_kernel / M * K_j(a)

    mask [N, D] marks real dimensions; the others stay 0 and add nothing to the density.
    """
    num_agents, batch_size, action_size = anchor.shape
    num_widths, device = len(sigmas), anchor.device
    num_candidates = num_uniform + num_widths * num_per_kernel
    mask = torch.ones(num_agents, 1, 1, action_size, device=device) if mask is None else mask[:, None, None]
    width = sigmas.view(-1, 1, 1, 1, 1)
    centre = anchor[:, None]  # [N, 1, B, D]

    uniform = 2 * torch.rand(num_agents, num_uniform, batch_size, action_size, device=device) - 1
    noise = torch.randn(num_widths, num_agents, num_per_kernel, batch_size, action_size, device=device)
    kernel = centre + width * noise  # [J, N, num_per_kernel, B, D]
    kernel = kernel - 2 * (kernel - 1).clamp(min=0) - 2 * (kernel + 1).clamp(max=0)  # beyond a face: mirrored back
    kernel = kernel.clamp(-1, 1).transpose(0, 1).flatten(1, 2)  # beyond both faces: as good as never
    candidates = torch.cat([uniform, kernel], dim=1) * mask

    # A reflected kernel's density sums its images in the two faces.
    images = torch.stack([centre, 2 - centre, -2 - centre])[:, None]  # [3, 1, N, 1, B, D]
    log_images = -0.5 * ((candidates - images) / width) ** 2 - (width * math.sqrt(2 * math.pi)).log()
    log_kernels = (log_images.logsumexp(0) * mask).sum(-1)  # [J, N, M, B]
    log_uniform = (-math.log(2) * mask.sum(-1)).expand(1, *log_kernels.shape[1:])
    shares = torch.full((1 + num_widths, 1, 1, 1), num_per_kernel / num_candidates, device=device)
    shares[0] = num_uniform / num_candidates
    return candidates, (torch.cat([log_uniform, log_kernels]) + shares.log()).logsumexp(0)


def random_blocks(mask: Tensor, block_size: int) -> Tensor:
    """[N, D] float: 1 for `block_size` random dimensions of each agent among those that mask [N, D] marks (or all)."""
    rank = (mask + torch.rand_like(mask)).argsort(-1, descending=True).argsort(-1)
    return mask * (rank < block_size)


def issm_weights(energy: Tensor, log_proposal: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Self-normalised importance weights [N, M, B] of candidates for the energy-based policy, and its entropy [N, B].

        pi(a) = exp(energy(a) / temperature) / Z        w(a) = exp(energy(a) / temperature) / q(a)
        Z = mean over candidates of w                   entropy = log Z - E_pi[energy / temperature], in nats

    energy [N, M, B] and log_proposal [N, M, B], the log-density q, are those of the candidates; temperature is [N].
    """
    highest = energy.amax(1, keepdim=True)
    log_density = (energy - highest) / temperature[:, None, None]  # so that differences survive a low temperature
    log_weights = log_density - log_proposal
    weights = log_weights.softmax(1)
    log_normalizer = log_weights.logsumexp(1) - math.log(energy.shape[1])
    return weights, log_normalizer - (weights * log_density).sum(1)


def issm_target(x_t: Tensor, alpha_bar: Tensor, candidates: Tensor, weights: Tensor) -> Tensor:
    """The exact denoiser E[a | x_t] [N, R, B, D] of the weighted candidates [N, M, B, D], weights [N, M, B].

        x_t = sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise
        E[a | x_t] = sum_m p_m a_m,   p_m proportional to w_m exp(-|x_t - sqrt(alpha_bar) a_m|^2 / (2 (1 - alpha_bar)))

    x_t is [N, R, B, D], alpha_bar [N, R, B]. Every candidate counts, by its weight times its likelihood of x_t, so that
    the choice of the one behind x_t adds no variance.
    """
    x_t = x_t.transpose(1, 2)  # [N, B, R, D]
    candidates = candidates.transpose(1, 2)  # [N, B, M, D]
    alpha_bar = alpha_bar.transpose(1, 2)[..., None]  # [N, B, R, 1]
    log_weights = weights.transpose(1, 2).log()[:, :, None]  # [N, B, 1, M]
    # -|x_t - sqrt(alpha_bar) a|^2 / 2 without the term in x_t alone, which the softmax over candidates cancels
    fit = alpha_bar.sqrt() * (x_t @ candidates.mT) - 0.5 * alpha_bar * candidates.square().sum(-1)[:, :, None]
    posterior = (log_weights + fit / (1 - alpha_bar)).softmax(-1)  # [N, B, R, M]
    return (posterior @ candidates).transpose(1, 2)


# ------------------------------------------------------------------------------------------------------- networks


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


def make_encoder(stack: int, obs_size: int, hidden: int, num_layers: int) -> nn.Sequential:
    """Layers that see the observation alone, [S, B, O] -> [S, B, H], normalised between (LayerNorm).

    What else a network sees is added to their outcome. Where that is much, such as all steps of a diffusion or many
    candidates, depth here costs little.
    """
    layers = [StackedLinear(stack, obs_size, hidden)]
    for _ in range(num_layers - 1):
        layers += nn.LayerNorm(hidden, elementwise_affine=False), nn.SiLU(), StackedLinear(stack, hidden, hidden)
    return nn.Sequential(*layers)


NUM_HEADS = 4  # of attention


class Entities(NamedTuple):
    """How an observation lists entities in no special order: `own` numbers, then of every kind (how many, size)."""

    own: int
    kinds: tuple[tuple[int, int], ...]

    def split(self, obs: Tensor) -> list[Tensor]:
        """What obs [..., O] says of oneself [..., own] and of the entities of each kind [..., how many, size]."""
        sizes = [self.own, *(number * size for number, size in self.kinds)]
        own, *kinds = obs[..., : sum(sizes)].split(sizes, -1)
        return [own, *(part.unflatten(-1, shape) for part, shape in zip(kinds, self.kinds, strict=True))]


class EntityEncoder(nn.Sequential):
    """Takes the place of make_encoder's layers where an observation lists entities, and attends to them.

    One layer sees the observation as a whole. To its outcome comes what is made of the entities: each is embedded
    together with what one knows of oneself, attends to the others in one block of a transformer (Vaswani et al. 2017),
    and is pooled with them by a softmax over entities.
    """

    def __init__(self, stack: int, obs_size: int, hidden: int, entities: Entities, width: int):
        super().__init__(StackedLinear(stack, obs_size, hidden))
        self.entities = entities
        self.own = StackedLinear(stack, entities.own, width)
        self.kinds = nn.ModuleList(StackedLinear(stack, size, width) for _, size in entities.kinds)
        self.embedding = StackedLinear(stack, width, width)
        self.query_key_value = StackedLinear(stack, width, 3 * width)
        self.attention_output = StackedLinear(stack, width, width)
        self.feed_forward = StackedLinear(stack, width, width)
        self.pool_score = StackedLinear(stack, width, NUM_HEADS)
        self.pool_value = StackedLinear(stack, width, width)
        self.output = StackedLinear(stack, width, hidden)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, obs: Tensor) -> Tensor:
        """[S, B, O] -> [S, B, H]."""
        own, *kinds = self.entities.split(obs)
        entities = [each(layer, kind) for layer, kind in zip(self.kinds, kinds, strict=True)]
        x = each(self.embedding, F.silu(torch.cat(entities, 2) + self.own(own)[:, :, None]))  # [S, B, E, W]
        heads = each(self.query_key_value, self.norm(x)).unflatten(-1, (3 * NUM_HEADS, -1)).transpose(2, 3)
        query, key, value = heads.chunk(3, dim=2)  # [S, B, NUM_HEADS, E, W / NUM_HEADS]
        attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + each(self.attention_output, (attention @ value).transpose(2, 3).flatten(3))
        x = self.norm(x + each(self.feed_forward, F.silu(self.norm(x))))
        weights = each(self.pool_score, x).softmax(2)[..., None]
        pooled = (weights * each(self.pool_value, x).unflatten(-1, (NUM_HEADS, -1))).sum(2).flatten(2)  # [S, B, W]
        return self[0](obs) + self.output(pooled)


def each(layer: StackedLinear, x: Tensor) -> Tensor:
    """The layer at every entity: [S, B, E, in] -> [S, B, E, out]."""
    return layer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class DiffusionPolicy(nn.Module):
    """Denoisers of T steps (DDPM, Ho et al. 2020; v-prediction, Salimans and Ho 2022), one per agent or one for all."""

    def __init__(
        self,
        stack: int,
        obs_size: int,
        action_size: int,
        hidden: int,
        num_layers: int,
        num_steps: int,
        mask: Tensor,
        first_guess: bool,
    ):
        super().__init__()
        self.first_guess = first_guess
        self.observation = make_encoder(stack, obs_size, hidden, num_layers)
        self.time = nn.Parameter(0.3 * torch.randn(stack, num_steps + 1, hidden))
        self.noisy_action = stacked_weight(stack, action_size, hidden)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.velocity = StackedLinear(stack, hidden, action_size)
        nn.init.zeros_(self.velocity.weight)
        self.register_buffer("alphas_bar", noise_schedule(num_steps), persistent=False)
        self.register_buffer("mask", mask[:, None])  # [N, 1, D]

    def forward(self, context: Tensor, x_t: Tensor) -> Tensor:
        """v [N, B, D] of noisy actions [N, B, D]; context [N, B, H] is the first layer's sum over (observation, t)."""
        hidden = F.silu(affine(x_t, self.noisy_action, context))
        return self.velocity(F.silu(self.hidden(hidden))) * self.mask

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O], by ancestral sampling.

        Deterministic: from x_T = 0 and without noise. With first_guess it ends after one evaluation, at E[a | x_T = 0],
        which is almost the mean action, since x_T tells next to nothing.
        """
        shape = (*obs.shape[:2], self.mask.shape[-1])
        draw = torch.zeros if deterministic else torch.randn
        features = self.observation(obs)  # the same at every step, so computed once
        x_t = draw(shape, device=obs.device) * self.mask
        if deterministic and self.first_guess:
            v = self(features + self.time[:, -1, None], x_t)
            return (-(1 - self.alphas_bar[-1]).sqrt() * v).clamp(-1, 1)
        for t in range(len(self.alphas_bar) - 1, 0, -1):
            v = self(features + self.time[:, t, None], x_t)
            mean, std = denoise_step(x_t, v, t, self.alphas_bar)
            x_t = mean + std * draw(shape, device=obs.device) * self.mask
        return x_t


class GaussianPolicy(nn.Module):
    """tanh-Gaussians of the width of the denoisers, as in soft actor-critic (Haarnoja et al. 2018)."""

    def __init__(self, stack: int, obs_size: int, action_size: int, hidden: int, num_layers: int, mask: Tensor):
        super().__init__()
        self.observation = make_encoder(stack, obs_size, hidden, num_layers)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.mean_and_log_std = StackedLinear(stack, hidden, 2 * action_size)
        self.register_buffer("mask", mask[:, None])  # [N, 1, D]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation [N, B, D] before the tanh."""
        hidden = F.silu(self.hidden(F.silu(self.observation(obs))))
        mean, log_std = self.mean_and_log_std(hidden).chunk(2, dim=-1)
        return mean, -5 + 3.5 * (torch.tanh(log_std) + 1)  # in [-5, 2], the bounds of CleanRL's SAC

    def rsample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [N, B, D] and their log-density [N, B]."""
        mean, log_std = self(obs)
        noise = torch.randn_like(mean)
        u = mean + log_std.exp() * noise
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_det
        return torch.tanh(u) * self.mask, (log_prob * self.mask).sum(-1)

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O]. Deterministic: tanh of the mean."""
        if deterministic:
            mean, _ = self(obs)
            return torch.tanh(mean) * self.mask
        actions, _ = self.rsample(obs)
        return actions


def make_policy(
    args: Args, stack: int, obs_size: int, action_size: int, mask: Tensor
) -> DiffusionPolicy | GaussianPolicy:
    """The policies of N agents, a stack of N or 1 for all, of the arguments' class and size; mask is [N, D]."""
    sizes = stack, obs_size, action_size, args.actor_hidden
    if args.policy == "gaussian":
        policy = GaussianPolicy(*sizes, args.gaussian_encoder_layers, mask)
    else:
        policy = DiffusionPolicy(*sizes, args.encoder_layers, args.denoising_steps, mask, args.first_guess)
    if entities := observed_entities(args, len(mask)):
        policy.observation = EntityEncoder(stack, obs_size, args.actor_hidden, entities, args.entity_width)
    return policy


class CriticEnsemble(nn.Module):
    """K centralised critics Q_k(s, a_1..a_N) of the team reward. Their mean is Q; how they differ, how sure it is."""

    def __init__(
        self, num_critics: int, state_size: int, num_agents: int, action_size: int, hidden: int, layer_norm: bool
    ):
        super().__init__()
        self.state = StackedLinear(num_critics, state_size, hidden)
        self.actions = stacked_weight(num_critics, num_agents * action_size, hidden)
        self.hidden = StackedLinear(num_critics, hidden, hidden)
        self.value = StackedLinear(num_critics, hidden, 1)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False) if layer_norm else nn.Identity()

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        """Values [K, B] of states [B, S] and joint actions [N, B, D]."""
        num_critics = len(self.actions)
        state, joint = (x.expand(num_critics, -1, -1) for x in (state, actions.transpose(0, 1).flatten(1)))
        hidden = F.relu(self.norm(affine(joint, self.actions, self.state(state))))
        return self.value(F.relu(self.norm(self.hidden(hidden)))).squeeze(-1)

    @torch.no_grad()
    def score(self, state: Tensor, actions: Tensor, candidates: Tensor) -> Tensor:
        """Values [N, M, B] at states [B, S] where agent i plays each of its candidates [N, M, B, D].

        The others play their actions [N, B, D]. Each critic scores its share of the states, B / K of them: what is
        fitted to the scores learns the critics' mean, at the price of one. The candidates of a state share the first
        layer but for the agent's own action, so it costs next to nothing.
        """
        num_critics, (num_agents, num_candidates) = len(self.actions), candidates.shape[:2]
        joint = actions.transpose(0, 1).flatten(1).unflatten(0, (num_critics, -1))  # [K, B / K, N * D]
        actions = actions.unflatten(1, (num_critics, -1)).transpose(0, 1)  # [K, N, B / K, D]
        candidates = candidates.unflatten(2, (num_critics, -1)).permute(2, 0, 1, 3, 4)  # [K, N, M, B / K, D]
        own = self.actions.unflatten(1, (num_agents, -1))  # [K, N, D, H], the columns of each agent's own action
        shared = affine(joint, self.actions, self.state(state.unflatten(0, (num_critics, -1))))
        others = shared[:, None] - actions @ own  # [K, N, B / K, H]
        hidden = (candidates.flatten(2, 3) @ own).unflatten(2, (num_candidates, -1))  # [K, N, M, B / K, H]
        hidden = self.norm(hidden.add_(others[:, :, None])).relu_().flatten(1, 3)
        values = self.value(self.norm(self.hidden(hidden)).relu_()).view(candidates.shape[:4])
        return values.permute(1, 2, 0, 3).flatten(2)


class PooledCriticEnsemble(nn.Module):
    """The same, but each critic looks at one agent at a time, at its observation o_i and action a_i.

    What a critic learns of one agent so holds for all, and their order does not matter (PIC, Liu et al. 2019). Of each
    number that it sees the largest over the agents goes on (a max pool, as in PointNet, Qi et al. 2017): what counts is
    often that *some* agent is near, whichever it is.
    """

    def __init__(
        self, num_critics: int, state_size: int, num_agents: int, action_size: int, hidden: int, layer_norm: bool
    ):
        super().__init__()
        obs_size, view = state_size // num_agents, (hidden + 1) // 2
        self.observation = StackedLinear(num_critics, obs_size, view)
        self.action = stacked_weight(num_critics, action_size, view)
        self.view = StackedLinear(num_critics, view, view)
        self.pooled = StackedLinear(num_critics, view, hidden)
        self.value = StackedLinear(num_critics, hidden, 1)
        self.view_norm, self.norm = (
            nn.LayerNorm(size, elementwise_affine=False) if layer_norm else nn.Identity() for size in (view, hidden)
        )

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        """Values [K, B] of states [B, N * O], all observations concatenated, and joint actions [N, B, D]."""
        obs = state.unflatten(1, (len(actions), -1)).transpose(0, 1)  # [N, B, O]
        obs, actions = (x.expand(len(self.action), -1, -1, -1) for x in (obs, actions))
        return self.judge(self.see(self.context(obs), actions).amax(1))

    @torch.no_grad()
    def score(self, state: Tensor, actions: Tensor, candidates: Tensor) -> Tensor:
        """Values [N, M, B] as those of CriticEnsemble.score. Each agent is seen once, and then with its candidates."""
        num_critics, num_agents = len(self.action), len(actions)
        obs = state.unflatten(1, (num_agents, -1)).unflatten(0, (num_critics, -1)).transpose(1, 2)  # [K, N, B / K, O]
        actions = actions.unflatten(1, (num_critics, -1)).transpose(0, 1)  # [K, N, B / K, D]
        candidates = candidates.unflatten(2, (num_critics, -1)).permute(2, 0, 1, 3, 4)  # [K, N, M, B / K, D]
        context = self.context(obs)
        seen = self.see(context, actions)
        oneself = torch.eye(num_agents, dtype=torch.bool, device=seen.device)[:, :, None, None]
        others = seen[:, None].masked_fill(oneself, -math.inf).amax(2)  # [K, N, B / K, H]
        own = self.see(context[:, :, None], candidates)  # [K, N, M, B / K, H]
        values = self.judge(torch.maximum(own, others[:, :, None]).flatten(1, 3)).view(candidates.shape[:4])
        return values.permute(1, 2, 0, 3).flatten(2)

    def context(self, obs: Tensor) -> Tensor:
        """The first layer's share of observations [K, N, B, O]: [K, N, B, H]."""
        return self.observation(obs.flatten(1, 2)).unflatten(1, obs.shape[1:3])

    def see(self, context: Tensor, actions: Tensor) -> Tensor:
        """What is seen [K, ..., H] of agents whose observations give this context and who play actions [K, ..., D]."""
        hidden = context + (actions.flatten(1, -2) @ self.action).unflatten(1, actions.shape[1:-1])
        return self.view(F.relu(self.view_norm(hidden)).flatten(1, -2)).view(hidden.shape)

    def judge(self, seen: Tensor) -> Tensor:
        """Values [K, B] of the most that was seen of any agent [K, B, H]."""
        return self.value(F.relu(self.norm(self.pooled(seen)))).squeeze(-1)


class EntityCriticEnsemble(PooledCriticEnsemble):
    """The same, but a critic looks at one agent and one entity that it sees at a time: [..., H] is [..., E * W] here.

    So of every entity the largest over the agents goes on. Each is then judged by itself, and the mean of them at last:
    what a team lacks is often a sum over entities that no agent is near to. The layers are always normalised: otherwise
    they learn how far six agents are from their landmarks from more than four times as many examples.
    """

    def __init__(
        self,
        num_critics: int,
        state_size: int,
        num_agents: int,
        action_size: int,
        hidden: int,
        entities: Entities,
        width: int,
    ):
        super().__init__(num_critics, state_size, num_agents, action_size, hidden, layer_norm=True)
        # Layers for one entity in the place of those for a whole observation.
        self.entities, self.width = entities, width
        self.observation = StackedLinear(num_critics, entities.own, width)
        self.kinds = nn.ModuleList(StackedLinear(num_critics, size, width) for _, size in entities.kinds)
        self.action = stacked_weight(num_critics, action_size, width)
        self.view = StackedLinear(num_critics, width, width)
        self.entity = StackedLinear(num_critics, width, width)
        self.pooled = StackedLinear(num_critics, width, hidden)
        self.view_norm = nn.LayerNorm(width, elementwise_affine=False)

    def context(self, obs: Tensor) -> Tensor:
        own, *kinds = self.entities.split(obs.flatten(1, 2))
        entities = [each(layer, kind) for layer, kind in zip(self.kinds, kinds, strict=True)]
        context = torch.cat(entities, 2) + self.observation(own)[:, :, None]
        return context.flatten(2).unflatten(1, obs.shape[1:3])

    def see(self, context: Tensor, actions: Tensor) -> Tensor:
        hidden = (actions.flatten(1, -2) @ self.action).unflatten(1, actions.shape[1:-1])
        hidden = context.unflatten(-1, (-1, self.width)) + hidden[..., None, :]  # [K, ..., E, W]
        return self.view(F.relu(self.view_norm(hidden)).flatten(1, -2)).view(*hidden.shape[:-2], -1)

    def judge(self, seen: Tensor) -> Tensor:
        entities = F.relu(self.view_norm(seen.unflatten(-1, (-1, self.width))))  # [K, B, E, W]
        return super().judge(F.relu(each(self.entity, entities)).mean(2))


class LocalCritic(nn.Module):
    """Q_i(o_i, a_i) of each agent: the central Q, averaged over all that agent i neither sees nor decides.

    The energy of DDPL's policies. A softmax of the central Q itself would be averaged by the denoiser: a mean of
    softmaxes, broader than the softmax of the mean wherever Q depends on what agent i cannot know.
    """

    def __init__(self, stack: int, obs_size: int, action_size: int, hidden: int, num_layers: int):
        super().__init__()
        self.observation = make_encoder(stack, obs_size, hidden, num_layers)
        self.action = stacked_weight(stack, action_size, hidden)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.value = StackedLinear(stack, hidden, 1)

    def forward(self, obs: Tensor, candidates: Tensor) -> Tensor:
        """Values [N, M, B], up to a constant per observation, of candidates [N, M, B, D] at observations [N, B, O]."""
        hidden = (candidates.flatten(1, 2) @ self.action).unflatten(1, candidates.shape[1:3])
        hidden = hidden.add_(self.observation(obs)[:, None]).relu_().flatten(1, 2)
        return self.value(self.hidden(hidden).relu_()).view(candidates.shape[:3])


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
    """What training changes: policies, critics, temperatures and their optimisers, all on the device of mask [N, D].

    `policy` is what the gradients move and what acts in training. `average_policy`, the running average of its weights,
    which wavers less, is what plays in the end.

    The networks are drawn on the CPU first, so a seed starts with the same ones on every device.
    `alike`: whether the agents' observations and actions have one size, so that they can share a policy.
    """

    def __init__(self, args: Args, obs_size: int, state_size: int, mask: Tensor, alike: bool):
        super().__init__()
        self.args = args
        num_agents, action_size = mask.shape
        stack = 1 if args.shared_policy and alike else num_agents
        entities = observed_entities(args, num_agents)
        self.policy = make_policy(args, stack, obs_size, action_size, mask)
        if args.policy == "diffusion":
            sizes = obs_size, action_size, args.local_critic_hidden, args.encoder_layers
            self.local_critic = LocalCritic(stack, *sizes)
            if entities:
                sizes = obs_size, args.local_critic_hidden, entities, args.entity_width
                self.local_critic.observation = EntityEncoder(stack, *sizes)
        self.average_policy = deepcopy(self.policy).requires_grad_(False)
        sizes = args.num_critics, state_size, num_agents, action_size, args.critic_hidden, args.layer_norm
        ensemble = PooledCriticEnsemble if args.pooled_critics and alike else CriticEnsemble
        if entities and args.pooled_critics:
            ensemble, sizes = EntityCriticEnsemble, (*sizes[:-1], entities, args.entity_width)
        self.critic = ensemble(*sizes)
        self.target_critic = ensemble(*sizes)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_temperature = nn.Parameter(torch.full((num_agents,), math.log(args.init_temperature)))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("sigmas", torch.tensor(args.sigmas), persistent=False)
        self.to(mask.device)

        self.policy_optimizer = Adam(self.policy.parameters(), args.actor_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr)
        self.temperature_optimizer = Adam([self.log_temperature], args.temperature_lr)
        if args.policy == "diffusion":
            self.local_critic_optimizer = Adam(self.local_critic.parameters(), args.actor_lr)

    def optimizers(self) -> list[Adam]:
        return [value for value in vars(self).values() if isinstance(value, Adam)]


def update(learner: Learner, batch: "Batch") -> dict[str, Tensor]:
    """One update of critics, policies and temperatures; returns metrics, each a tensor [].

    The policies learn at the next observations: there the critic's target has just drawn their actions, which serve
    again as the centres of the proposals and as the other agents' actions a_-i.
    """
    next_actions = learner.policy.sample(batch.next_obs)
    metrics = update_critic(learner, batch, next_actions)
    if isinstance(learner.policy, GaussianPolicy):
        metrics |= update_gaussian(learner, batch.next_state, batch.next_obs)
    else:
        rows = slice(learner.args.actor_batch_size)
        metrics |= update_diffusion(learner, batch.next_state[rows], batch.next_obs[:, rows], next_actions[:, rows])
    step_towards(learner.average_policy, learner.policy, 1 - learner.args.average_decay)
    return metrics


def update_critic(learner: Learner, batch: "Batch", next_actions: Tensor) -> dict[str, Tensor]:
    """Move each critic to r + gamma (1 - terminated) Q'(s', a'); a truncated episode bootstraps.

    Q' lies below the target critics' mean by `pessimism` of their standard deviations: two critics and 0.71 make it the
    smaller of two, as in clipped double Q-learning (Fujimoto et al. 2018).
    """
    with torch.no_grad():
        next_q = learner.target_critic(batch.next_state, next_actions)
        next_value = next_q.mean(0) - learner.args.pessimism * next_q.std(0)
        target = batch.reward + learner.args.gamma * (1 - batch.terminated) * next_value
    q = learner.critic(batch.state, batch.actions)
    loss = (q - target).square().mean(1).sum()
    take_step(learner.critic_optimizer, loss)
    step_towards(learner.target_critic, learner.critic, learner.args.tau)
    return {"losses/critic": loss.detach(), "losses/q": q.detach().mean()}


def update_local_critic(
    learner: Learner, state: Tensor, obs: Tensor, actions: Tensor, candidates: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Move each Q_i(o_i, a_i) to the central Q at candidates [N, M, B, D], where the others play actions [N, B, D].

    Only the differences between the candidates of a state count, since the policy depends on nothing else: what the
    rest of the state adds to all of them alike would be noise. Returns Q_i [N, M, B] there, from before the step.
    """
    local_q = learner.local_critic(obs, candidates)
    loss = (local_q - learner.critic.score(state, actions, candidates)).var(1).mean()
    take_step(learner.local_critic_optimizer, loss)
    return local_q.detach(), {"losses/local_critic": loss.detach()}


def update_diffusion(learner: Learner, state: Tensor, obs: Tensor, actions: Tensor) -> dict[str, Tensor]:
    """One ISSM step of every agent's denoiser, at state [B, S], obs [N, B, O] and the policies' actions [N, B, D]."""
    args, mask, policy = learner.args, learner.mask, learner.policy

    # 1. Propose, a block of dimensions around the policy's own action (all of them, if it has few). To move the kernels
    # a Langevin step uphill first gained nothing.
    block = random_blocks(mask, args.block_size)
    num_dimensions = block.sum(-1)
    candidates, log_proposal = propose_actions(actions, learner.sigmas, args.num_uniform, args.num_per_kernel, block)
    candidates = candidates + (actions * (1 - block[:, None]))[:, None]

    # 2. Weigh. Where fewer than two candidates count, the entropy estimate stops falling with the temperature, so there
    # the temperature rises whatever the estimate says.
    energy, metrics = update_local_critic(learner, state, obs, actions, candidates)
    weights, entropy = issm_weights(energy, log_proposal, learner.log_temperature.detach().exp())
    entropy = entropy.mean(1)  # [N]
    sample_size = (1 / weights.square().sum(1)).mean(1)  # [N]
    excess = entropy - args.target_entropy * num_dimensions
    metrics |= update_temperature(learner, torch.where(sample_size < 2, sample_size - 2, excess))

    # 3. Match: noisy points around resampled candidates, each with its exact denoiser as the target.
    with torch.no_grad():
        num_agents, _, batch_size = weights.shape
        chances = weights.transpose(1, 2).flatten(0, 1).nan_to_num(1)  # multinomial raises at NaN; the loss shows it
        chosen = chances.multinomial(args.num_noise_draws, replacement=True)
        chosen = chosen.view(num_agents, batch_size, -1).transpose(1, 2)  # [N, R, B]
        x_0 = candidates.gather(1, chosen[..., None].expand(-1, -1, -1, candidates.shape[-1]))
        t = torch.randint(1, args.denoising_steps + 1, chosen.shape, device=chosen.device)
        alpha_bar = policy.alphas_bar[t]  # [N, R, B]
        signal_scale = alpha_bar.sqrt()[..., None]
        noise_scale = (1 - alpha_bar).sqrt()[..., None]
        noise = torch.randn(x_0.shape, device=x_0.device)  # not randn_like: compiled, x_0 may lie otherwise in memory
        x_t = (signal_scale * x_0 + noise_scale * noise) * mask[:, None, None]
        denoised = issm_target(x_t, alpha_bar, candidates, weights)
        velocity = (signal_scale * x_t - denoised) / noise_scale
        one_hot_t = F.one_hot(t, args.denoising_steps + 1).float().flatten(1, 2)  # [N, R * B, T + 1]
    features = policy.observation(obs).repeat(1, args.num_noise_draws, 1)
    prediction = policy(features + one_hot_t @ policy.time, x_t.flatten(1, 2))
    error = (prediction - velocity.flatten(1, 2)) * block[:, None]  # the other dimensions would learn from themselves
    loss = error.square().mean()
    take_step(learner.policy_optimizer, loss)
    return metrics | {
        "losses/actor": loss.detach(),
        "policy/effective_sample_size": sample_size.mean(),
        "policy/entropy": (entropy / num_dimensions).mean(),
    }


def update_gaussian(learner: Learner, state: Tensor, obs: Tensor) -> dict[str, Tensor]:
    """One step of every Gaussian down its KL to the energy-based policy, reparameterised, at state [B, S].

    The policies see obs [N, B, O]. One pass over the joint action serves all agents: the gradient for agent i goes
    through a_i alone.
    """
    temperature = learner.log_temperature.detach().exp()
    actions, log_prob = learner.policy.rsample(obs)
    loss = ((temperature[:, None] * log_prob).sum(0) - learner.critic(state, actions).mean(0)).mean()
    take_step(learner.policy_optimizer, loss)
    entropy = -log_prob.detach().mean(1)
    num_dimensions = learner.mask.sum(-1)
    metrics = update_temperature(learner, entropy - learner.args.target_entropy * num_dimensions)
    return metrics | {"losses/actor": loss.detach(), "policy/entropy": (entropy / num_dimensions).mean()}


def update_temperature(learner: Learner, excess: Tensor) -> dict[str, Tensor]:
    """Lower the temperature of an agent whose entropy exceeds its target, by excess [N]; raise it where that is < 0."""
    take_step(learner.temperature_optimizer, (learner.log_temperature * excess).sum())
    return {"policy/temperature": learner.log_temperature.detach().exp().mean()}


def take_step(optimizer: Adam, loss: Tensor) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only."""
    optimizer.descend(torch.autograd.grad(loss, optimizer.param_groups[0]["params"]))


@torch.no_grad()
def step_towards(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the weights of a running average a share of the way to the network's (Polyak averaging)."""
    torch._foreach_lerp_([*average.parameters()], [*network.parameters()], share)


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


@torch.no_grad()
def policy_spread(learner: Learner, obs: Tensor, num_samples: int = 16) -> float:
    """Standard deviation of actions drawn at the same observation [N, B, O], mean over observations and dimensions."""
    samples = learner.policy.sample(obs.repeat(1, num_samples, 1)).unflatten(1, (num_samples, -1))
    return ((samples.std(1).mean(1) * learner.mask).sum() / learner.mask.sum()).item()


# -------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    """Transitions, agents first: observations [N, B, O], actions [N, B, D], reward and terminated [B]."""

    obs: Tensor
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor

    @property
    def state(self) -> Tensor:
        """What the critics see [B, S]: all observations, concatenated."""
        return self.obs.transpose(0, 1).flatten(1)

    @property
    def next_state(self) -> Tensor:
        return self.next_obs.transpose(0, 1).flatten(1)


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


def make_env(env_id: str, num_agents: int | None = None, render_mode: str | None = None) -> ParallelEnv:
    """The mpe2 task `env_id` with continuous actions.

    Raises RunError, naming the choices, unless it is a cooperative task with continuous actions, and if it does not
    let you choose `num_agents`.
    """
    if f"mpe/{env_id}" not in mpe_environments:
        raise RunError(f"--env-id: {env_id!r} is not a task of mpe2; choose from {', '.join(cooperative_tasks())}")
    options = {} if num_agents is None else {"N": num_agents}
    try:
        env = mpe_environments[f"mpe/{env_id}"].parallel_env(
            continuous_actions=True, render_mode=render_mode, **options
        )
    except TypeError:
        raise RunError(f"--num-agents: {env_id} has a fixed number of agents; drop the flag") from None
    if why := unfit(env):
        raise RunError(f"--env-id: {env_id!r} has {why}; choose from {', '.join(cooperative_tasks())}")
    return env


def unfit(env: ParallelEnv) -> str | None:
    """Why DDPL cannot learn this task, or None."""
    if any(getattr(agent, "adversary", False) for agent in env.unwrapped.world.agents):
        return "adversaries"
    if not all(isinstance(env.action_space(agent), Box) for agent in env.possible_agents):
        return "discrete actions"
    return None


def cooperative_tasks() -> list[str]:
    """The tasks that fit, asked of the installed mpe2."""
    tasks = {name.removeprefix("mpe/"): module for name, module in mpe_environments.items()}
    return [name for name, module in tasks.items() if not unfit(module.parallel_env(continuous_actions=True))]


def observed_entities(args: Args, num_agents: int) -> Entities | None:
    """The landmarks and other agents that an agent of simple_spread_v3 sees, each by the way to it, x and y.

    In the other tasks entities differ by their place in the list alone, or agents by what they see. What others say is
    left out, since on simple_spread_v3 nobody can speak.
    """
    if not args.entities or args.env_id != "simple_spread_v3":
        return None
    require(args, "entity_width", args.entity_width % NUM_HEADS == 0, f"a multiple of {NUM_HEADS}")
    landmarks, others = (num_agents, 2), (num_agents - 1, 2)
    return Entities(4, (landmarks, others) if num_agents > 1 else (landmarks,))  # 4: one's velocity and place


class VectorMPE:
    """E copies of one mpe2 task as arrays, agents zero-padded to the largest observation and action.

    Actions lie in [-1, 1]. An agent's first two are its force along x and y (its five movement actions reduce to that:
    "none" does nothing and opposite pairs cancel), the rest its message. The reward is the mean over agents.
    All copies end at the same step, truncated by mpe2's limit of 25; none of these tasks terminates earlier.
    """

    def __init__(self, env_id: str, num_agents: int | None, num_envs: int, render_mode: str | None = None):
        self.envs = [make_env(env_id, num_agents, render_mode) for _ in range(num_envs)]
        env, world = self.envs[0], self.envs[0].unwrapped.world
        self.agents = env.possible_agents
        self.num_agents = len(self.agents)
        self.movable = [agent.movable for agent in world.agents]
        self.action_sizes = [2 * agent.movable + (0 if agent.silent else world.dim_c) for agent in world.agents]
        self.action_size = max(self.action_sizes)
        self.obs_sizes = [env.observation_space(agent).shape[0] for agent in self.agents]
        self.obs_size = max(self.obs_sizes)
        self.state_size = self.num_agents * self.obs_size
        self.episode_length = env.unwrapped.max_cycles

    @property
    def alike(self) -> bool:
        """Whether the observations and actions of all agents have one size."""
        return len(set(zip(self.obs_sizes, self.action_sizes))) == 1

    def action_mask(self) -> Tensor:
        """[N, D] float: 1 for an agent's real action dimensions, 0 for padding."""
        return (torch.arange(self.action_size) < torch.tensor(self.action_sizes)[:, None]).float()

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Start an episode in every copy, each from its own seed; returns observations [E, N, O] float32."""
        return self._pad([env.reset(seed=int(seed))[0] for env, seed in zip(self.envs, seeds, strict=True)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Actions [E, N, D] to the true next observations [E, N, O] and reward, terminated, truncated [E]."""
        actions = self._to_box(actions)
        steps = [env.step(dict(zip(self.agents, rows))) for env, rows in zip(self.envs, zip(*actions), strict=True)]
        obs, rewards, terminated, truncated, _ = zip(*steps, strict=True)
        reward = np.array([np.mean(list(r.values())) for r in rewards], np.float32)
        return self._pad(obs), reward, *(np.array([all(d.values()) for d in done]) for done in (terminated, truncated))

    def _to_box(self, actions: np.ndarray) -> list[np.ndarray]:
        """Per agent, the actions [E, D_i] in mpe2's own box [0, 1]: none, left, right, down, up, message."""
        boxes = []
        for i, (movable, size) in enumerate(zip(self.movable, self.action_sizes)):
            x, y, message = actions[:, i, 0:1], actions[:, i, 1:2], actions[:, i, 2 * movable : size]
            movement = [0 * x, -x, x, -y, y] if movable else []
            boxes.append(np.concatenate([*movement, (message + 1) / 2], axis=-1).clip(0, 1).astype(np.float32))
        return boxes

    def _pad(self, observations: Sequence[dict]) -> np.ndarray:
        padded = np.zeros((len(self.envs), self.num_agents, self.obs_size), np.float32)
        for i, (agent, size) in enumerate(zip(self.agents, self.obs_sizes)):
            padded[:, i, :size] = [obs[agent] for obs in observations]
        return padded


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


def evaluate(
    policy: nn.Module, args: Args, episodes: int, deterministic: bool, seed: int, video: Path | None = None
) -> np.ndarray:
    """Undiscounted team returns [episodes], played without touching training's random numbers.

    The first four episodes go to the GIF `video`, if given.
    """
    device = policy.mask.device
    env = VectorMPE(args.env_id, args.num_agents, min(episodes, 20), "rgb_array" if video else None)
    waves = []
    films = [[] for _ in env.envs[:4]]
    with forked_random_numbers(device):
        torch.manual_seed(seed)
        while len(waves) * len(env.envs) < episodes:
            obs = env.reset(episode_seeds(1, seed, len(waves), len(env.envs)))
            returns = np.zeros(len(env.envs))
            for _ in range(env.episode_length):
                if not np.isfinite(obs).all():
                    raise RunError(f"an observation of {args.env_id} is NaN or infinite in an evaluation")
                actions = policy.sample(torch.from_numpy(obs).to(device).transpose(0, 1), deterministic)
                obs, reward, _, _ = env.step(actions.transpose(0, 1).cpu().numpy())
                returns += reward
                if video and not waves:
                    for film, copy in zip(films, env.envs):
                        film.append(copy.render()[::2, ::2])
            if not np.isfinite(returns).all():
                raise RunError(f"a return of {args.env_id} is NaN or infinite in an evaluation")
            waves.append(returns)
    if video:
        import imageio

        imageio.mimsave(video, [frame for film in films for frame in film], duration=100, loop=0)
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
    """Train one team; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation;
    final_return, their mean; env_steps_per_second. Raises RunError for bad arguments and for NaN.
    `given` names arguments that count as asked for though they equal their defaults. When `signals` is no longer empty,
    the run saves a checkpoint at the end of the episode and raises Stopped.
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
        env = VectorMPE(args.env_id, args.num_agents, args.num_envs)
        mask = env.action_mask().to(device)
        learner = Learner(args, env.obs_size, env.state_size, mask, env.alike)
        observations, actions = (env.num_agents, env.obs_size), (env.num_agents, env.action_size)
        capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)
        buffer = ReplayBuffer(capacity, Batch(observations, actions, (), (), observations), device)
        progress = Progress()
        if checkpoint:
            progress = restore("--resume", run_dir, checkpoint, learner, buffer, device)
        else:
            run_dir = create_run(args, args.env_id)
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, env, learner, buffer, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    env: VectorMPE,
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
        check_learner(learner, progress.global_step)
        save_team(run_dir, args, learner.average_policy)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), learner, buffer)
        if signals:
            bar.close()
            raise Stopped(f"stopped at step {progress.global_step}; go on with --resume {run_dir}")

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode in ("stochastic", "deterministic"):
            deterministic = mode == "deterministic"
            film = video if deterministic else None
            returns = evaluate(learner.average_policy, args, episodes, deterministic, progress.global_step, film)
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
        if obs is None:  # all copies are between episodes: the environments have no state that a checkpoint would miss
            if signals or progress.global_step - last_checkpoint >= args.checkpoint_interval:
                save()
                last_checkpoint = progress.global_step
            obs = env.reset(episode_seeds(0, args.seed, progress.episode, args.num_envs))
            check_finite([("an observation", obs)], progress.global_step)
            (obs,) = to_device([obs], device)
            returns = np.zeros(args.num_envs)
            progress.episode += 1

        # Act.
        if progress.global_step < args.learning_starts:
            actions = (2 * torch.rand(args.num_envs, *learner.mask.shape, device=device) - 1) * learner.mask
        else:
            actions = learner.policy.sample(obs.transpose(0, 1)).transpose(0, 1)
        played = actions.cpu().numpy()
        check_finite([("the action", played)], progress.global_step)
        next_obs, reward, terminated, truncated = env.step(played)
        progress.global_step += args.num_envs

        # Store.
        check_finite([("an observation", next_obs), ("the reward", reward)], progress.global_step)
        returns += reward
        next_obs, reward, stored_terminated = to_device([next_obs, reward, terminated], device)
        buffer.add(obs, actions, reward, stored_terminated, next_obs)
        obs = next_obs

        # Learn.
        while args.learning_starts + progress.updates * args.steps_per_update < progress.global_step:
            if args.compile and not metrics:
                bar.set_postfix_str("compiling the update")
            metrics = update_step(learner, buffer.sample(args.batch_size))
            progress.updates += 1

        # Log.
        bar.update(args.num_envs)
        if (terminated | truncated).all():
            obs = None
            progress.episode_return = float(returns.mean())
        if due(args.log_interval) and metrics:
            scalars = {name: float(value) for name, value in metrics.items()}
            check_finite(scalars.items(), progress.global_step)
            with forked_random_numbers(device):
                scalars["policy/spread"] = policy_spread(learner, buffer.sample(64).obs)
            scalars["policy/target_entropy"] = args.target_entropy
            scalars["steps_per_second"] = (progress.global_step - first_step) / (time.monotonic() - started)
            scalars["returns/training"] = progress.episode_return
            for name, value in scalars.items():
                writer.add_scalar(name, value, progress.global_step)
            temperature = scalars["policy/temperature"]
            bar.set_postfix({"return": f"{progress.episode_return:.2f}", "temp": f"{temperature:.4f}"})
        if due(args.eval_interval) and progress.global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
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
    versions = {package: version(package) for package in ("torch", "numpy", "mpe2", "pettingzoo")}
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
    check_types(args, {"seed": 0, "learning_starts": 0, "num_uniform": 0, "denoising_steps": 2})
    check_run_args(args)
    require(args, "learning_starts", args.learning_starts < args.total_timesteps, "below --total-timesteps")
    require(args, "buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    require(args, "batch_size", args.batch_size <= args.buffer_size, f"at most --buffer-size, {args.buffer_size}")
    fewer = args.actor_batch_size <= args.batch_size
    require(args, "actor_batch_size", fewer, f"at most --batch-size, {args.batch_size}")
    for name in ("critic_lr", "actor_lr", "temperature_lr"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require(args, "tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    require(args, "gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require(args, "average_decay", 0 <= args.average_decay < 1, "a number from 0 to below 1")
    require(args, "num_critics", args.num_critics > 1, "at least 2")
    require(args, "pessimism", 0 <= args.pessimism < math.inf, "a number of at least 0")
    shares = args.policy == "gaussian" or args.actor_batch_size % args.num_critics == 0
    require(args, "actor_batch_size", shares, f"a multiple of --num-critics, {args.num_critics}")
    require(args, "init_temperature", 1e-6 <= args.init_temperature <= 1e6, "a number from 1e-6 to 1e6")
    entropies = "a number from -10 to below 0.69, the uniform policy's entropy"
    require(args, "target_entropy", -10 <= args.target_entropy < math.log(2), entropies)
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require(args, "num_per_kernel", candidates > 1, "large enough for two candidates")
    widths = args.sigmas and all(1e-3 <= sigma <= 1 for sigma in args.sigmas)
    require(args, "sigmas", widths, "one or more numbers from 0.001 to 1")


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


def save_team(run_dir: Path, args: Args, policy: nn.Module) -> None:
    """Write team.safetensors, whole: the policies, and the arguments but for those that are about one machine."""
    tensors = {name: tensor.cpu().numpy() for name, tensor in policy.state_dict().items()}
    of_a_machine = ("device", "compile", "num_threads", "exp_name", "wandb_project_name", "wandb_entity")
    shared = {name: value for name, value in run_arguments(args).items() if name not in of_a_machine}
    contents = json.dumps({"script": SCRIPT, "args": shared})
    with whole_file(run_dir / "team.safetensors") as path:
        path.write_bytes(safetensors.numpy.save(tensors, {"json": contents, "crc32": checksum(tensors, contents)}))


def read_team(
    flag: str, path: Path, args: Args, given: Collection[str], free: Collection[str]
) -> tuple[Args, nn.Module]:
    """The arguments, see stored_arguments, and the policies of a team's file. Loading executes no code."""
    if not path.is_file():
        raise RunError(f"{flag}: there is no file {path}; choose a team.safetensors or a run folder")
    with damage_reported(flag, path):
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["crc32"] != checksum(tensors, metadata["json"]):
            raise ValueError("checksum")
        contents = json.loads(metadata["json"])
        stored = {name: tuple(v) if isinstance(v, list) else v for name, v in contents["args"].items()}
    args = stored_arguments(flag, path, contents | {"args": stored}, args, given, free)
    with damage_reported(flag, path):
        stack, obs_size, _ = tensors["observation.0.weight"].shape
        mask = torch.from_numpy(tensors["mask"])[:, 0]
        policy = make_policy(args, stack, obs_size, mask.shape[-1], mask)
        copy_into(dict(policy.state_dict()), {name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return args, policy.requires_grad_(False)


def load_team(path: str | Path) -> tuple[nn.Module, Args]:
    """A trained team from its file, to be used from Python: policy.sample(obs) acts; see the policies' docstrings.

    Returns the policies and the arguments they were trained with. Raises RunError if the file is not such a team's.
    """
    args, policy = read_team("load_team", Path(path), Args(), (), ())
    return policy, args


def checksum(tensors: dict[str, np.ndarray], contents: str) -> str:
    """CRC-32 of a file's tensors, their names and its other contents; safetensors has none."""
    crc = zlib.crc32(contents.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


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


def team_to_play(
    args: Args, given: Collection[str], free: Collection[str]
) -> tuple[Path, Args, DiffusionPolicy | GaussianPolicy]:
    """The file of the team that --evaluate names, by itself or by its run folder, its arguments and its policies."""
    path = Path(args.evaluate)
    if path.suffix != ".safetensors":
        path = existing_run("--evaluate", args.evaluate) / "team.safetensors"
    args, policy = read_team("--evaluate", path, args, given, free)
    args = replace(args, compile=False)  # nothing is learned
    check_args(args)
    return path, args, policy.to(choose_device(args))


def check_sizes(path: Path, policy: DiffusionPolicy | GaussianPolicy, mask: Tensor, obs_size: int) -> None:
    """Raise RunError unless the policies are for agents with these actions, mask [N, D], and observations."""
    ours = *policy.mask[:, 0].shape, policy.observation[0].weight.shape[1]
    theirs = *mask.shape, obs_size
    if ours != theirs:
        sizes = f"(agents, actions, observations) = {ours}, and the task has {theirs}"
        raise RunError(f"--evaluate: {path} is for {sizes}; choose another")


def play(args: Args, given: Collection[str] = ()) -> None:
    """--evaluate: play the policy of a run or of a team's file, and print its returns."""
    path, args, policy = team_to_play(args, given, free=("seed", "final_eval_episodes", "first_guess"))
    torch.set_num_threads(args.num_threads)
    env = VectorMPE(args.env_id, args.num_agents, 1)
    check_sizes(path, policy, env.action_mask(), env.obs_size)
    for mode in ("stochastic", "deterministic"):
        video = path.with_name(f"{path.stem}_{mode}.gif") if args.capture_video else None
        returns = evaluate(policy, args, args.final_eval_episodes, mode == "deterministic", args.seed, video)
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
