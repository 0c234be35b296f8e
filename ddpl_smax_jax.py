"""DDPL on SMAX, the StarCraft micromanagement challenge in JAX: battles and learner in one compiled program.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction. SMAX is from Rutherford et al., "JaxMARL", arXiv 2311.10090 (2023).

    python ddpl_smax_jax.py --map-name 3m

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
The names are those of ddpl_mamujoco.py, in PyTorch; random functions take a key first. Its --compile has no place here,
where everything is compiled.
docs/ddpl_smax_jax.md numbers the implementation details, docs/runs.md explains the logged scalars.

A team that has been trained is one small file, which --evaluate plays, and which Python loads:

    from ddpl_smax_jax import load_team
    policy, args = load_team("benchmark/teams/2s3z.safetensors")
    actions = policy.sample(key, obs, deterministic=True)  # [N, B, O] -> [N, B, D], in [-1, 1]

To fork it for another environment in JAX, rewrite the section on the environment: make_env, and the arrays that reset,
step and living bring; and `units`, which says how an observation lists what an agent sees. A copy under another name
refuses this script's checkpoints.
"""

import csv
import io
import json
import math
import os
import random
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import datetime
from functools import partial, reduce
from importlib.metadata import version
from inspect import formatannotation
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.numpy
import tyro
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type


@contextmanager
def without_a_trace() -> Iterator[None]:
    """Inside nothing is printed, and the global random numbers and the streams stay what they were."""
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr", "__stdout__", "__stderr__")}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    sys.stdout = sys.__stdout__ = io.StringIO()
    try:
        yield
    finally:
        for name, stream in streams.items():
            setattr(sys, name, stream)
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


# On import, JAX draws waiting times for Kubernetes (jax._src.clusters) from NumPy; rich, which JaxMARL needs, draws a
# number for each of its styles from Python; and JaxMARL prints which environments it did not find, and that on
# sys.__stdout__, which it puts in the place of sys.stdout (jaxmarl.environments.mabrax).
with without_a_trace():
    import jax
    import jax.numpy as jnp
    import optax
    from jax import Array, lax
    from jax.flatten_util import ravel_pytree
    from jax.nn import one_hot, relu, sigmoid, silu, softmax, softplus
    from jax.scipy.special import logsumexp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxmarl.environments.smax import HeuristicEnemySMAX
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO, SMAX

SCRIPT = Path(__file__).stem


@dataclass(frozen=True)
class Task:
    """What is learned, and for how long."""

    map_name: str = "3m"
    """Map, such as 3m, 2s3z or 5m_vs_6m."""
    raw_actions: bool = False
    """Play the package's own continuous actions: probabilities, distance, angle, and shots that cannot be fired."""
    num_envs: int = 32
    """Battles at a time."""
    total_timesteps: int = 200_000
    """Environment steps in all, summed over the battles."""
    seed: int = 1
    """Seed of networks, exploration, replay and battles."""
    num_seeds: int = 1
    """Runs side by side in one program, with seeds from --seed on; on several devices, if there are."""


@dataclass(frozen=True)
class Algorithm:
    """Actor, critics and replay."""

    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """The policy class: DDPL's diffusion policy or the Gaussian baseline."""
    shared_policy: bool = True
    """One policy, and local critic, for all agents."""
    buffer_size: int = 200_000
    """Transitions the replay buffer holds."""
    learning_starts: int = 5_000
    """Environment steps of uniformly random actions before the first update."""
    steps_per_update: int = 16
    """Environment steps for each update of critic and actor; divides --num-envs."""
    batch_size: int = 128
    """Transitions in a critic update."""
    actor_batch_size: int = 64
    """Of those, how many states the diffusion policy learns from; each critic scores its share of them."""
    gamma: float = 0.99
    """Discount factor."""
    num_steps: int = 5
    """Steps of reward in the critics' target, before their own value of what comes after."""
    tau: float = 0.01
    """Step of the target critic towards the critic, each update."""
    average_decay: float = 0.99
    """What the average of a policy's weights keeps of itself, each update; evaluations play the average (0: none)."""
    critic_lr: float = 5e-4
    """Learning rate of the central critics."""
    actor_lr: float = 5e-4
    """Learning rate of the policies and of the diffusion policies' local critics."""
    num_critics: int = 2
    """K, central critics; the policies climb their mean."""
    pessimism: float = 0.6
    """How many of the critics' standard deviations the target lies below their mean."""
    entity_width: int = 32
    """Width of the layers that look at one of the units that an agent sees."""
    critic_hidden: int = 128
    """Width of the central critics' two hidden layers after them."""
    actor_hidden: int = 128
    """Width of the policies' two hidden layers."""


@dataclass(frozen=True)
class Temperature:
    """The temperature of the energy-based policy."""

    init_temperature: float = 0.05
    """Temperature of the energy-based policy at the start."""
    temperature_lr: float = 3e-3
    """Learning rate of the log-temperature."""
    target_entropy: float = -0.5
    """Entropy the temperature aims at, in nats per action dimension (uniform: 0.69)."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Run:
    """Evaluation, files and machine."""

    eval_interval: int = 40_000
    """Environment steps between evaluations."""
    eval_episodes: int = 64
    """Battles of each evaluation, once with sampled and once with deterministic actions, all at the same time."""
    final_eval_episodes: int = 256
    """Battles of the last evaluation, the one reported."""
    log_interval: int = 4_000
    """Environment steps in one call of the compiled program; the other intervals wait for its end."""
    checkpoint_interval: int = 40_000
    """Environment steps between checkpoints."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """JAX's platform, where battles, learner and replay buffer live; auto is JAX's own choice, CUDA if there is one."""
    capture_video: bool = False
    """Write a GIF of a battle to the run folder (with --evaluate: of both ways to play)."""
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


@dataclass(frozen=True)
class Args(Run, Diffusion, Temperature, Algorithm, Task):
    """Train agents with DDPL on SMAX; the defaults are those of the reported results."""


ACTION_SIZE = 4  # again at the last target, shoot, x, y; the first two: done where the number is not above 0
OWN_FEATURES, UNIT_FEATURES = 10, 13  # numbers in an observation about oneself, and about another unit
BATTLE = ("returns", "win_rate", "episode_length", "dead_allies")  # the numbers of a battle; returns are undiscounted
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "seed", "return_mean", "return_std", "episodes", *BATTLE[1:])

Metrics = dict[str, Array]


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


class Stopped(KeyboardInterrupt):
    """A run that SIGINT or SIGTERM has ended in order."""


# --------------------------------------------------------------------------------- diffusion and ISSM: pure functions


def noise_schedule(num_steps: int, log_snr_max: float = 7.0, log_snr_min: float = -5.0) -> Array:
    """alphas_bar [T + 1], the share of signal variance left after t steps; alphas_bar[0] is 1.

    alphas_bar[t] = sigmoid(log_snr[t]), and log_snr is linear in t.
    """
    log_snr = jnp.linspace(log_snr_max, log_snr_min, num_steps)
    return jnp.concatenate([jnp.ones(1), sigmoid(log_snr)])


def denoise_step(x_t: Array, v: Array, t: Array | int, alphas_bar: Array) -> tuple[Array, Array]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted v (DDPM, eq. 6-7).

    v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0 implies an x_0, which is clipped to [-1, 1].
    At t = 1 the mean is x_0 and the deviation 0.
    """
    alpha_bar = alphas_bar[t]
    alpha_bar_before = alphas_bar[t - 1]
    alpha = alpha_bar / alpha_bar_before
    x_0 = (jnp.sqrt(alpha_bar) * x_t - jnp.sqrt(1 - alpha_bar) * v).clip(-1, 1)
    of_x_0 = jnp.sqrt(alpha_bar_before) * (1 - alpha) * x_0
    of_x_t = jnp.sqrt(alpha) * (1 - alpha_bar_before) * x_t
    variance = (1 - alpha) * (1 - alpha_bar_before) / (1 - alpha_bar)
    return (of_x_0 + of_x_t) / (1 - alpha_bar), jnp.sqrt(variance)


def propose_actions(
    key: Array, anchor: Array, sigmas: Array, num_uniform: int, num_per_kernel: int, mask: Array | None = None
) -> tuple[Array, Array]:
    """Candidates [N, M, B, D] in [-1, 1] and their log-density [N, M, B] under the mixture that proposed them.

    The mixture: `num_uniform` uniform on the box, and for each of the J widths in `sigmas` [J] `num_per_kernel` from a
    Gaussian around anchor [N, B, D], reflected at the faces of the box. M = num_uniform + J * num_per_kernel. Every
    candidate is scored under the whole mixture (the balance heuristic, Veach and Guibas 1995):

        q(a) = num_uniform / M * U(a) + sum_j num_per_kernel / M * K_j(a)

    mask [N, D] marks real dimensions; the others stay 0 and add nothing to the density.
    """
    num_agents, batch_size, action_size = anchor.shape
    num_widths = len(sigmas)
    mask = jnp.ones((num_agents, 1, 1, action_size)) if mask is None else mask[:, None, None]
    width = sigmas.reshape(-1, 1, 1, 1, 1)
    centre = anchor.clip(-1, 1)[:, None]  # [N, 1, B, D]

    uniform_key, noise_key = jax.random.split(key)
    uniform = 2 * jax.random.uniform(uniform_key, (num_agents, num_uniform, batch_size, action_size)) - 1
    noise = jax.random.normal(noise_key, (num_widths, num_agents, num_per_kernel, batch_size, action_size))
    kernel = centre + width * noise  # [J, N, num_per_kernel, B, D]
    kernel = kernel - 2 * relu(kernel - 1) - 2 * jnp.minimum(kernel + 1, 0)  # beyond a face: mirrored back
    kernel = kernel.clip(-1, 1).swapaxes(0, 1)  # beyond both faces: as good as never
    kernel = kernel.reshape(num_agents, -1, batch_size, action_size)
    candidates = jnp.concatenate([uniform, kernel], axis=1) * mask

    # A reflected kernel's density sums its images in the two faces.
    images = jnp.stack([centre, 2 - centre, -2 - centre])[:, None]  # [3, 1, N, 1, B, D]
    log_images = -0.5 * ((candidates - images) / width) ** 2 - jnp.log(width * math.sqrt(2 * math.pi))
    log_kernels = (logsumexp(log_images, axis=0) * mask).sum(-1)  # [J, N, M, B]
    log_uniform = jnp.broadcast_to(-math.log(2) * mask.sum(-1), (1, *log_kernels.shape[1:]))
    counts = jnp.array([num_uniform] + [num_per_kernel] * num_widths)
    shares = (counts / counts.sum()).reshape(-1, 1, 1, 1)
    return candidates, logsumexp(jnp.concatenate([log_uniform, log_kernels]) + jnp.log(shares), axis=0)


def random_blocks(key: Array, mask: Array, block_size: int) -> Array:
    """[N, D] float: 1 for `block_size` random dimensions of each agent among those that mask [N, D] marks (or all)."""
    rank = (-mask - jax.random.uniform(key, mask.shape)).argsort(-1).argsort(-1)
    return mask * (rank < block_size)


def issm_weights(energy: Array, log_proposal: Array, temperature: Array) -> tuple[Array, Array]:
    """Self-normalised importance weights [N, M, B] of candidates for the energy-based policy, and its entropy [N, B].

        pi(a) = exp(energy(a) / temperature) / Z        w(a) = exp(energy(a) / temperature) / q(a)
        Z = mean over candidates of w                   entropy = log Z - E_pi[energy / temperature], in nats

    energy [N, M, B] and log_proposal [N, M, B], the log-density q, are those of the candidates; temperature is [N].
    """
    highest = energy.max(1, keepdims=True)
    log_density = (energy - highest) / temperature[:, None, None]  # so that differences survive a low temperature
    log_weights = log_density - log_proposal
    weights = softmax(log_weights, axis=1)
    log_normalizer = logsumexp(log_weights, axis=1) - math.log(energy.shape[1])
    return weights, log_normalizer - (weights * log_density).sum(1)


def issm_target(x_t: Array, alpha_bar: Array, candidates: Array, weights: Array) -> Array:
    """The exact denoiser E[a | x_t] [N, R, B, D] of the weighted candidates [N, M, B, D], weights [N, M, B].

        x_t = sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise
        E[a | x_t] = sum_m p_m a_m,   p_m proportional to w_m exp(-|x_t - sqrt(alpha_bar) a_m|^2 / (2 (1 - alpha_bar)))

    x_t is [N, R, B, D], alpha_bar [N, R, B]. Every candidate counts, by its weight times its likelihood of x_t, so that
    the choice of the one behind x_t adds no variance.
    """
    x_t = x_t.swapaxes(1, 2)  # [N, B, R, D]
    candidates = candidates.swapaxes(1, 2)  # [N, B, M, D]
    alpha_bar = alpha_bar.swapaxes(1, 2)[..., None]  # [N, B, R, 1]
    log_weights = jnp.log(weights).swapaxes(1, 2)[:, :, None]  # [N, B, 1, M]
    # -|x_t - sqrt(alpha_bar) a|^2 / 2 without the term in x_t alone, which the softmax over candidates cancels
    fit = jnp.sqrt(alpha_bar) * (x_t @ candidates.mT) - 0.5 * alpha_bar * (candidates**2).sum(-1)[:, :, None]
    posterior = softmax(log_weights + fit / (1 - alpha_bar), axis=-1)  # [N, B, R, M]
    return (posterior @ candidates).swapaxes(1, 2)


# ------------------------------------------------------------------------------------------------------- networks


def stacked_weight(key: Array, stack: int, in_features: int, out_features: int) -> Array:
    """`stack` weight matrices [S, in, out], one per agent or critic, each started as torch.nn.Linear starts its own."""
    bound = in_features**-0.5
    return jax.random.uniform(key, (stack, in_features, out_features), minval=-bound, maxval=bound)


def product(x: Array, weight: Array) -> Array:
    """x [S, B, in] times weight [S or 1, in, out]: one product of two matrices where a stack of one serves all.

    Or x [..., in] times the weight [in, out] of one of the stack.
    """
    if weight.ndim == 2 or len(weight) > 1:
        return x @ weight
    return (x.reshape(-1, x.shape[-1]) @ weight[0]).reshape(*x.shape[:-1], -1)


class StackedLinear(NamedTuple):
    """`stack` linear layers as one batched matrix product: [S, B, in] -> [S, B, out]."""

    weight: Array
    bias: Array

    @classmethod
    def create(cls, key: Array, stack: int, in_features: int, out_features: int) -> "StackedLinear":
        return cls(stacked_weight(key, stack, in_features, out_features), jnp.zeros((stack, 1, out_features)))

    def __call__(self, x: Array) -> Array:
        return product(x, self.weight) + self.bias


def layer_norm(x: Array) -> Array:
    """x with mean 0 and variance 1 over its last axis (Ba et al. 2016), without weights."""
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def units(obs: Array) -> tuple[Array, Array, Array]:
    """What obs [N, ..., O] say of oneself [N, ..., own], of the other agents [N, ..., N - 1, F] and of the enemies.

    They have to be those of all N agents, since N - 1 is how many of the units are allies.
    """
    others = obs[..., :-OWN_FEATURES].reshape(*obs.shape[:-1], -1, UNIT_FEATURES)
    allies = len(obs) - 1
    return obs[..., -OWN_FEATURES:], others[..., :allies, :], others[..., allies:, :]


def each(layer: StackedLinear, x: Array) -> Array:
    """The layer at every unit: [S, B, E, in] -> [S, B, E, out]."""
    return layer(x.reshape(len(x), -1, x.shape[-1])).reshape(*x.shape[:3], -1)


class EntityEncoder(NamedTuple):
    """Layers that see an observation as a whole, and attend to the units that it lists.

    To the outcome of one layer comes what is made of the units: each is embedded together with what one knows of
    oneself, attends to the others in one block of a transformer (Vaswani et al. 2017) with a single head, and is pooled
    with them by a softmax over units.
    """

    whole: StackedLinear
    own: StackedLinear
    ally: StackedLinear
    enemy: StackedLinear
    embedding: StackedLinear
    query_key_value: StackedLinear
    attention_output: StackedLinear
    feed_forward: StackedLinear
    pool_score: StackedLinear
    pool_value: StackedLinear
    output: StackedLinear

    @classmethod
    def create(cls, key: Array, stack: int, obs_size: int, hidden: int, width: int) -> "EntityEncoder":
        sizes = {name: (width, width) for name in cls._fields}
        sizes |= {"whole": (obs_size, hidden), "own": (OWN_FEATURES, width), "output": (width, hidden)}
        sizes |= {"ally": (UNIT_FEATURES, width), "enemy": (UNIT_FEATURES, width)}
        sizes |= {"query_key_value": (width, 3 * width), "pool_score": (width, 1)}
        layers = zip(jax.random.split(key, len(sizes)), sizes.items())
        return cls(**{name: StackedLinear.create(k, stack, *size) for k, (name, size) in layers})

    def __call__(self, obs: Array) -> Array:
        """[N, B, O] -> [N, B, H], each agent's from its own observation; see `units` on why those of all N."""
        own, allies, enemies = units(obs)
        x = jnp.concatenate([each(self.ally, allies), each(self.enemy, enemies)], axis=2) + self.own(own)[:, :, None]
        x = each(self.embedding, silu(x))  # [N, B, E, W]
        query, key, value = jnp.split(each(self.query_key_value, layer_norm(x)), 3, axis=-1)
        attention = softmax(query @ key.mT / math.sqrt(query.shape[-1]), axis=-1)  # [N, B, E, E]
        x = x + each(self.attention_output, attention @ value)
        x = layer_norm(x + each(self.feed_forward, silu(layer_norm(x))))
        weights = softmax(each(self.pool_score, x).mT, axis=-1)  # [N, B, 1, E]
        return self.whole(obs) + self.output((weights @ each(self.pool_value, x))[:, :, 0])


class DiffusionPolicy(NamedTuple):
    """Denoisers of T steps (DDPM, Ho et al. 2020; v-prediction, Salimans and Ho 2022), one per agent or one for all."""

    observation: EntityEncoder
    time: Array  # [S, T + 1, H]
    noisy_action: Array
    hidden: StackedLinear
    velocity: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, stack: int, obs_size: int) -> "DiffusionPolicy":
        hidden = args.actor_hidden
        keys = jax.random.split(key, 4)
        return cls(
            EntityEncoder.create(keys[0], stack, obs_size, hidden, args.entity_width),
            0.3 * jax.random.normal(keys[1], (stack, args.denoising_steps + 1, hidden)),
            stacked_weight(keys[2], stack, ACTION_SIZE, hidden),
            StackedLinear.create(keys[3], stack, hidden, hidden),
            StackedLinear(jnp.zeros((stack, hidden, ACTION_SIZE)), jnp.zeros((stack, 1, ACTION_SIZE))),
        )

    def __call__(self, context: Array, x_t: Array) -> Array:
        """v [N, B, D] of noisy actions [N, B, D]; context [N, B, H] is the first layer's sum over (observation, t)."""
        hidden = silu(context + product(x_t, self.noisy_action))
        return self.velocity(silu(self.hidden(hidden)))

    def sample(self, key: Array, obs: Array, deterministic: Array | bool = False) -> Array:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O], by ancestral sampling.

        Deterministic: from x_T = 0 and without noise.
        """
        num_steps = self.time.shape[1] - 1
        alphas_bar = noise_schedule(num_steps)
        features = self.observation(obs)  # the same at every step, so computed once
        draws = jax.random.normal(key, (num_steps, *obs.shape[:2], ACTION_SIZE)) * jnp.where(deterministic, 0, 1)
        x_t = draws[0]
        noise = jnp.concatenate([draws[1:], jnp.zeros_like(draws[:1])])  # the last step adds none

        def denoise(x_t: Array, t_and_noise: tuple[Array, Array]) -> tuple[Array, None]:
            t, noise = t_and_noise
            v = self(features + self.time[:, t, None], x_t)
            mean, std = denoise_step(x_t, v, t, alphas_bar)
            return mean + std * noise, None

        actions, _ = lax.scan(denoise, x_t, (jnp.arange(num_steps, 0, -1), noise))
        return actions


class GaussianPolicy(NamedTuple):
    """tanh-Gaussians of the same sizes as the denoisers, as in soft actor-critic (Haarnoja et al. 2018)."""

    observation: EntityEncoder
    hidden: StackedLinear
    mean_and_log_std: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, stack: int, obs_size: int) -> "GaussianPolicy":
        hidden = args.actor_hidden
        keys = jax.random.split(key, 3)
        return cls(
            EntityEncoder.create(keys[0], stack, obs_size, hidden, args.entity_width),
            StackedLinear.create(keys[1], stack, hidden, hidden),
            StackedLinear.create(keys[2], stack, hidden, 2 * ACTION_SIZE),
        )

    def __call__(self, obs: Array) -> tuple[Array, Array]:
        """Mean and log standard deviation [N, B, D] before the tanh."""
        hidden = silu(self.hidden(silu(self.observation(obs))))
        mean, log_std = jnp.split(self.mean_and_log_std(hidden), 2, axis=-1)
        return mean, -5 + 3.5 * (jnp.tanh(log_std) + 1)  # in [-5, 2], the bounds of CleanRL's SAC

    def rsample(self, key: Array, obs: Array) -> tuple[Array, Array]:
        """Reparameterised actions [N, B, D] and their log-density [N, B]."""
        mean, log_std = self(obs)
        noise = jax.random.normal(key, mean.shape)
        u = mean + jnp.exp(log_std) * noise
        log_det = 2 * (math.log(2) - u - softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_det
        return jnp.tanh(u), log_prob.sum(-1)

    def sample(self, key: Array, obs: Array, deterministic: Array | bool = False) -> Array:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O]. Deterministic: tanh of the mean."""
        mean, _ = self(obs)
        actions, _ = self.rsample(key, obs)
        return jnp.where(deterministic, jnp.tanh(mean), actions)


class CriticEnsemble(NamedTuple):
    """K centralised critics Q_k(s, a_1..a_N) of the team reward. Their mean is Q; how they differ, how sure it is.

    What an agent does means something by what stands around it. So each critic looks at one agent i and one unit that
    it sees at a time, with weights that all agents share. The action is also multiplied with this view: whether a
    vector points at an enemy is a product of the two. Of every unit the largest numbers over the agents go on (a max
    pool): what counts is often that *some* agent does a thing to it. This is judged by itself, and the mean over units
    together with the whole state. `context`, `see` and `judge` are of a single critic.
    """

    own: StackedLinear  # it and the next two: a view, and by what to multiply the action
    ally: StackedLinear
    enemy: StackedLinear
    action: Array
    look: StackedLinear
    unit: StackedLinear
    team: StackedLinear
    state: StackedLinear
    hidden: StackedLinear
    value: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, state_size: int) -> "CriticEnsemble":
        width, hidden = args.entity_width, args.critic_hidden
        unit = (UNIT_FEATURES, 2 * width)
        sizes = {"own": (OWN_FEATURES, 2 * width), "ally": unit, "enemy": unit}
        sizes |= {"look": (width, width), "unit": (width, width), "team": (width, hidden)}
        sizes |= {"state": (state_size, hidden), "hidden": (hidden, hidden), "value": (hidden, 1)}
        *keys, action_key = jax.random.split(key, len(cls._fields))
        named = zip(keys, sizes.items())
        layers = {name: StackedLinear.create(k, args.num_critics, *size) for k, (name, size) in named}
        return cls(action=stacked_weight(action_key, args.num_critics, ACTION_SIZE, width), **layers)

    def __call__(self, state: tuple[Array, Array], actions: Array) -> Array:
        """Values [K, B] of states, all agents' observations [N, B, O] and the world's [B, S], and actions [N, B, D]."""

        def value(critic: CriticEnsemble, obs: Array, world: Array) -> Array:
            seen = critic.see(critic.context(obs), actions)
            return critic.judge(reduce(jnp.maximum, seen), world)  # whose gradient is faster than that of max(0)

        return jax.vmap(value, in_axes=(0, None, None))(self, *state)

    def score(self, state: tuple[Array, Array], actions: Array, candidates: Array) -> Array:
        """Values [N, M, B] at states ([N, B, O], [B, S]) where agent i plays each of its candidates [N, M, B, D].

        The others play their actions [N, B, D]. Each critic scores its share of the states, B / K of them: what is
        fitted to the scores learns the critics' mean, at the price of one. Each agent is seen once, and then with its
        candidates.
        """
        num_critics = len(self.action)
        obs, world = state

        def share(critic: CriticEnsemble, obs: Array, world: Array, actions: Array, candidates: Array) -> Array:
            context = critic.context(obs)
            seen = critic.see(context, actions)  # [N, B / K, E, W]
            own = critic.see(context[:, None], candidates)  # [N, M, B / K, E, W]
            oneself = jnp.eye(len(seen), dtype=bool)[:, :, None, None, None]
            others = jnp.where(oneself, -jnp.inf, seen).max(1)
            return critic.judge(jnp.maximum(others[:, None], own), world)

        parts = (obs, 1), (world, 0), (actions, 1), (candidates, 2)
        parts = (jnp.stack(jnp.split(x, num_critics, axis)) for x, axis in parts)
        return jnp.concatenate([*jax.vmap(share)(self, *parts)], axis=-1)

    def context(self, obs: Array) -> Array:
        """The first layer's share of observations [N, B, O]: [N, B, E, 2 W]."""
        own, allies, enemies = units(obs)
        return jnp.concatenate([self.ally(allies), self.enemy(enemies)], axis=2) + self.own(own)[:, :, None]

    def see(self, context: Array, actions: Array) -> Array:
        """What is seen [..., E, W] of agents whose observations give this context and who play actions [..., D]."""
        view, gate = jnp.split(context, 2, axis=-1)
        return self.look(relu(layer_norm(view + (1 + gate) * (actions @ self.action)[..., None, :])))

    def judge(self, seen: Array, world: Array) -> Array:
        """Values [..., B] of the most that was seen of every unit [..., B, E, W], in the world's states [B, S]."""
        team = relu(self.unit(relu(layer_norm(seen)))).mean(-2)
        hidden = self.hidden(relu(layer_norm(self.team(team) + self.state(world))))
        return self.value(relu(layer_norm(hidden)))[..., 0]


class LocalCritic(NamedTuple):
    """Q_i(o_i, a_i) of each agent: the central Q, averaged over all that agent i neither sees nor decides.

    The energy of DDPL's policies. A softmax of the central Q itself would be averaged by the denoiser: a mean of
    softmaxes, broader than the softmax of the mean wherever Q depends on what agent i cannot know.
    """

    observation: EntityEncoder
    action: Array
    hidden: StackedLinear
    value: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, stack: int, obs_size: int) -> "LocalCritic":
        hidden = args.local_critic_hidden
        keys = jax.random.split(key, 4)
        return cls(
            EntityEncoder.create(keys[0], stack, obs_size, hidden, args.entity_width),
            stacked_weight(keys[1], stack, ACTION_SIZE, hidden),
            StackedLinear.create(keys[2], stack, hidden, hidden),
            StackedLinear.create(keys[3], stack, hidden, 1),
        )

    def __call__(self, obs: Array, candidates: Array) -> Array:
        """Values [N, M, B], up to a constant per observation, of candidates [N, M, B, D] at observations [N, B, O]."""
        rows = candidates.reshape(len(candidates), -1, ACTION_SIZE)
        hidden = product(rows, self.action).reshape(*candidates.shape[:3], -1) + self.observation(obs)[:, None]
        hidden = relu(hidden).reshape(*rows.shape[:2], -1)
        return self.value(relu(self.hidden(hidden))).reshape(candidates.shape[:3])


# ------------------------------------------------------------------------------------------- learner and its updates


class Learner(NamedTuple):
    """What training changes: policies, critics, temperatures and the states of their optimisers.

    `policy` is what the gradients move and what acts in training. `average_policy`, the running average of its weights,
    which wavers less, is what plays in the end.
    """

    policy: DiffusionPolicy | GaussianPolicy
    average_policy: DiffusionPolicy | GaussianPolicy
    critic: CriticEnsemble
    target_critic: CriticEnsemble
    local_critic: LocalCritic | None
    log_temperature: Array
    optimizers: dict[str, Any]

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, obs_size: int, state_size: int) -> "Learner":
        policy_key, critic_key, local_critic_key = jax.random.split(key, 3)
        diffusion = args.policy == "diffusion"
        policy_class = DiffusionPolicy if diffusion else GaussianPolicy
        stack = 1 if args.shared_policy else num_agents
        learned = {
            "policy": policy_class.create(policy_key, args, stack, obs_size),
            "critic": CriticEnsemble.create(critic_key, args, state_size),
            "local_critic": LocalCritic.create(local_critic_key, args, stack, obs_size) if diffusion else None,
            "log_temperature": jnp.full(num_agents, math.log(args.init_temperature)),
        }
        optimizers = {name: optax.adam(0.0).init(value) for name, value in learned.items()}
        averages = {"average_policy": learned["policy"], "target_critic": learned["critic"]}
        return cls(optimizers=optimizers, **averages, **learned)

    def take_step(self, name: str, learning_rate: float, gradient: Any) -> "Learner":
        """One Adam step of the field `name` down its gradient."""
        changes, state = optax.adam(learning_rate).update(gradient, self.optimizers[name])
        value = optax.apply_updates(getattr(self, name), changes)
        return self._replace(**{name: value}, optimizers=self.optimizers | {name: state})


def update(
    learner: Learner, batch: "Batch", alive: Array, next_alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One update of critics, policies and temperatures; returns metrics, each an array [].

    alive and next_alive [N, B] mark the living: the dead do nothing and learn nothing. The policies learn at the first
    states, where, unlike at the next ones, somebody always has to act: a third of those may be a battle's last.
    """
    sample_key, policy_key = jax.random.split(key)
    next_actions = learner.policy.sample(sample_key, batch.next_obs) * next_alive[..., None]
    learner, metrics = update_critic(learner, batch, next_actions, args)
    if isinstance(learner.policy, GaussianPolicy):
        learner, more = update_gaussian(learner, (batch.obs, batch.state), batch.obs, alive, args, policy_key)
    else:
        rows = slice(args.actor_batch_size)
        obs, state, alive = batch.obs[:, rows], batch.state[rows], alive[:, rows]
        actions = learner.policy.sample(jax.random.fold_in(sample_key, 1), obs) * alive[..., None]
        learner, more = update_diffusion(learner, (obs, state), obs, actions, alive, args, policy_key)
    average = optax.incremental_update(learner.policy, learner.average_policy, 1 - args.average_decay)
    return learner._replace(average_policy=average), metrics | more


def update_critic(learner: Learner, batch: "Batch", next_actions: Array, args: Args) -> tuple[Learner, Metrics]:
    """Move each critic to r + gamma (1 - terminated) Q'(s', a'); a truncated episode bootstraps.

    Q' lies below the target critics' mean by `pessimism` of their standard deviations: two critics and 0.71 make it the
    smaller of two, as in clipped double Q-learning (Fujimoto et al. 2018).
    """
    next_q = learner.target_critic((batch.next_obs, batch.next_state), next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0, ddof=1)
    target = batch.reward + args.gamma * (1 - batch.terminated) * next_value

    def squared_error(critic: CriticEnsemble) -> tuple[Array, Array]:
        q = critic((batch.obs, batch.state), batch.actions)
        return ((q - target) ** 2).mean(1).sum(), q

    (loss, q), gradient = jax.value_and_grad(squared_error, has_aux=True)(learner.critic)
    learner = learner.take_step("critic", args.critic_lr, gradient)
    target_critic = optax.incremental_update(learner.critic, learner.target_critic, args.tau)
    return learner._replace(target_critic=target_critic), {"losses/critic": loss, "losses/q": q.mean()}


def update_local_critic(
    learner: Learner, state: tuple, obs: Array, actions: Array, alive: Array, candidates: Array, args: Args
) -> tuple[Learner, Array, Metrics]:
    """Move each Q_i(o_i, a_i) to the central Q at candidates [N, M, B, D], where the others play actions [N, B, D].

    Only the differences between the candidates of a state count, since the policy depends on nothing else: what the
    rest of the state adds to all of them alike would be noise. Returns Q_i [N, M, B] there, from before the step.
    """
    q = learner.critic.score(state, actions, candidates)

    def variance(local_critic: LocalCritic) -> tuple[Array, Array]:
        local_q = local_critic(obs, candidates)
        return masked_mean((local_q - q).var(1, ddof=1), alive), local_q

    (loss, local_q), gradient = jax.value_and_grad(variance, has_aux=True)(learner.local_critic)
    learner = learner.take_step("local_critic", args.actor_lr, gradient)
    return learner, local_q, {"losses/local_critic": loss}


def update_diffusion(
    learner: Learner, state: tuple, obs: Array, actions: Array, alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One ISSM step of every agent's denoiser, where the critics see `state`, the policies obs [N, B, O].

    actions [N, B, D] are the policies' own.
    """
    block_key, propose_key, draw_key, time_key, noise_key = jax.random.split(key, 5)

    # 1. Propose, a block of dimensions around the policy's own action (all of them, if it has few). To move the kernels
    # a Langevin step uphill first gained nothing.
    block = random_blocks(block_key, jnp.ones((len(obs), ACTION_SIZE)), args.block_size)
    num_dimensions = block.sum(-1)
    sigmas = jnp.array(args.sigmas)
    candidates, log_proposal = propose_actions(
        propose_key, actions, sigmas, args.num_uniform, args.num_per_kernel, block
    )
    candidates = candidates + (actions * (1 - block[:, None]))[:, None]

    # 2. Weigh. Where fewer than two candidates count, the entropy estimate stops falling with the temperature, so there
    # the temperature rises whatever the estimate says.
    learner, energy, metrics = update_local_critic(learner, state, obs, actions, alive, candidates, args)
    weights, entropy = issm_weights(energy, log_proposal, jnp.exp(learner.log_temperature))
    entropy = masked_mean(entropy, alive, axis=1)  # [N]
    sample_size = masked_mean(1 / (weights**2).sum(1), alive, axis=1)  # [N]
    excess = entropy - args.target_entropy * num_dimensions
    learner, more = update_temperature(learner, jnp.where(sample_size < 2, sample_size - 2, excess), args)
    metrics |= more

    # 3. Match: noisy points around resampled candidates, each with its exact denoiser as the target.
    num_agents, _, batch_size = weights.shape
    shape = (args.num_noise_draws, num_agents, batch_size)
    chosen = jax.random.categorical(draw_key, jnp.log(weights), axis=1, shape=shape).swapaxes(0, 1)  # [N, R, B]
    x_0 = jnp.take_along_axis(candidates, chosen[..., None], axis=1)
    t = jax.random.randint(time_key, chosen.shape, 1, args.denoising_steps + 1)
    alpha_bar = noise_schedule(args.denoising_steps)[t]  # [N, R, B]
    signal_scale = jnp.sqrt(alpha_bar)[..., None]
    noise_scale = jnp.sqrt(1 - alpha_bar)[..., None]
    x_t = signal_scale * x_0 + noise_scale * jax.random.normal(noise_key, x_0.shape)
    denoised = issm_target(x_t, alpha_bar, candidates, weights)
    velocity = (signal_scale * x_t - denoised) / noise_scale
    one_hot_t = one_hot(t, args.denoising_steps + 1).reshape(num_agents, -1, args.denoising_steps + 1)

    def squared_error(policy: DiffusionPolicy) -> Array:
        features = jnp.tile(policy.observation(obs), (1, args.num_noise_draws, 1))
        prediction = policy(features + product(one_hot_t, policy.time), x_t.reshape(num_agents, -1, ACTION_SIZE))
        error = prediction.reshape(velocity.shape) - velocity
        error = error * block[:, None, None]  # the other dimensions would learn from themselves
        return masked_mean((error**2).mean((1, 3)), alive)

    loss, gradient = jax.value_and_grad(squared_error)(learner.policy)
    learner = learner.take_step("policy", args.actor_lr, gradient)
    return learner, metrics | {
        "losses/actor": loss,
        "policy/effective_sample_size": sample_size.mean(),
        "policy/entropy": (entropy / num_dimensions).mean(),
    }


def update_gaussian(
    learner: Learner, state: tuple, obs: Array, alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One step of every Gaussian down its KL to the energy-based policy, reparameterised.

    The critics see `state`, the policies obs [N, B, O]. One pass over the joint action serves all agents: the gradient
    for agent i goes through a_i alone.
    """
    temperature = jnp.exp(learner.log_temperature)

    def divergence(policy: GaussianPolicy) -> tuple[Array, Array]:
        actions, log_prob = policy.rsample(key, obs)
        q = learner.critic(state, actions * alive[..., None]).mean(0)
        return ((temperature[:, None] * log_prob * alive).sum(0) - q).mean(), log_prob

    (loss, log_prob), gradient = jax.value_and_grad(divergence, has_aux=True)(learner.policy)
    learner = learner.take_step("policy", args.actor_lr, gradient)
    entropy = masked_mean(-log_prob, alive, axis=1)
    learner, metrics = update_temperature(learner, entropy - args.target_entropy * ACTION_SIZE, args)
    return learner, metrics | {"losses/actor": loss, "policy/entropy": (entropy / ACTION_SIZE).mean()}


def update_temperature(learner: Learner, excess: Array, args: Args) -> tuple[Learner, Metrics]:
    """Lower the temperature of an agent whose entropy exceeds its target, by excess [N]; raise it where that is < 0."""
    learner = learner.take_step("log_temperature", args.temperature_lr, excess)
    return learner, {"policy/temperature": jnp.exp(learner.log_temperature).mean()}


def masked_mean(values: Array, mask: Array, axis: int | None = None) -> Array:
    """Mean of values where the mask of the same shape is 1; 0 where it is 1 nowhere."""
    return (values * mask).sum(axis) / mask.sum(axis).clip(1)


# -------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    """Transitions, agents first: observations [N, B, O], actions [N, B, D], reward, terminated [B], states [B, S].

    In the replay buffer a transition is one flat row, so that drawing one is reading one piece of memory. `next_obs` is
    the true next observation, also where a battle was cut off.
    """

    obs: Array
    actions: Array
    reward: Array
    terminated: Array
    next_obs: Array
    state: Array
    next_state: Array
    ended: Array


def flat(transitions: Batch) -> Array:
    """Rows [B, W] of transitions whose fields are [B, ...]."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(transitions)


def sample_batch(key: Array, buffer: Array, stored: Array, args: Args, shapes: Batch) -> Batch:
    """A batch drawn uniformly with replacement from the rows there are, `stored` ever; agents first where there are.

    It spans --num-steps steps, or those to the end of the battle or of what is stored: `reward` is their discounted sum
    and next_obs, next_state and ended are those of the last of them. `terminated` is the share of the value of what
    comes next that does not count: 1 after the end, and 1 - gamma^(n - 1) after n steps.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    first = jax.random.randint(key, (args.batch_size,), jnp.maximum(stored - len(buffer), 0), stored)

    def columns(rows: Array) -> Batch:
        return Batch(*(x.reshape(-1, *shape) for x, shape in zip(jnp.split(rows, ends, axis=1), shapes)))

    later = first + args.num_envs * jnp.arange(args.num_steps)[:, None]  # [num_steps, B], the rows of one battle
    names = ("reward", "ended")
    reward, ended = (buffer[later % len(buffer), ends[Batch._fields.index(name) - 1]] for name in names)
    going_on = jnp.concatenate([jnp.ones_like(ended[:1]), jnp.cumprod(1 - ended, axis=0)[:-1]])
    counts = going_on * (later < stored)
    last = counts.sum(0).astype(int) - 1
    discounts = args.gamma ** jnp.arange(args.num_steps)
    start = columns(buffer[first % len(buffer)])
    end = columns(buffer[(first + args.num_envs * last) % len(buffer)])
    batch = end._replace(
        obs=start.obs,
        actions=start.actions,
        state=start.state,
        reward=(counts * reward * discounts[:, None]).sum(0),
        terminated=1 - (1 - end.terminated) * discounts[last],
    )
    return Batch(*(x.swapaxes(0, 1) if x.ndim > 2 else x for x in batch))


# ---------------------------------------------------------------------------------------------------- environment


class AvailableActionsSMAX(SMAX):
    """SMAX whose continuous actions name decisions and a vector, and mean what an agent can do at the moment.

    The chart: the first two numbers are not the probabilities with which the package draws but decide: in the lower
    half it shoots, and again at the last target. The last two are not distance and angle but a vector (x, y), cut to
    length 1 where it is longer: where to walk, or the point to aim at. Everything it does, the package's own box does.
    Availability: the discrete game masks what get_avail_actions says cannot be done. The package's own decoder of
    continuous actions does not: it shoots at nobody, out of range, and at corpses. Here an agent with nobody in range
    walks, aims choose among the living in range, and the last target is shot at again only if it is one of them.
    """

    def _decode_continuous_actions(self, key: Array, state: Any, actions: Array) -> tuple[Array, Array]:
        """Walks [N, 2] and shots [N], numbered as in the discrete game (0: none), of actions [..., D] in [0, 1]."""
        allies, moves = self.num_allies, self.num_movement_actions
        available = self.get_avail_actions(state)
        available = jnp.stack([available[agent] for agent in self.agents[:allies]]) > 0
        targets = available[:, moves:]  # [N, E]
        not_again, not_shoot, *vector = actions[:allies].T
        vector = 2 * jnp.stack(vector, axis=-1) - 1
        vector = vector / jnp.linalg.norm(vector, axis=-1, keepdims=True).clip(1)

        walks = (not_shoot > 0.5) | ~targets.any(-1)
        own, enemies = state.unit_positions[:allies], state.unit_positions[allies:]
        gaps = jnp.linalg.norm(enemies - (own + vector)[:, None], axis=-1)
        aimed = jnp.where(targets, gaps, jnp.inf).argmin(-1) + moves
        last = state.prev_attack_actions[:allies]
        last_there = jnp.take_along_axis(available, last.astype(int)[:, None], axis=1)[:, 0] & (last >= moves)
        again = last_there & (not_again <= 0.5)
        return jnp.where(walks[:, None], vector, 0), jnp.where(walks, 0, jnp.where(again, last, aimed))


def make_env(args: Args) -> HeuristicEnemySMAX:
    """The battle against the package's scripted enemy. Raises RunError, naming the choices, for an unknown map."""
    if args.map_name not in MAP_NAME_TO_SCENARIO:
        choices = ", ".join(MAP_NAME_TO_SCENARIO)
        raise RunError(f"--map-name: {args.map_name!r} is not a map of SMAX; choose from {choices}")
    options = {"scenario": MAP_NAME_TO_SCENARIO[args.map_name], "action_type": "continuous"}
    env = HeuristicEnemySMAX(**options)
    if not args.raw_actions:
        env._env = AvailableActionsSMAX(**options)
    return env


def arrays(env: HeuristicEnemySMAX, observations: dict[str, Array]) -> tuple[Array, Array]:
    """Observations [N, O] of the agents and the state [S] of the battle, each unit's features scaled to [0, 1].

    But for a weapon's cooldown: the package lets it fall on below 0 until the next shot.
    """
    obs = jnp.stack([observations[agent] for agent in env.agents])
    units = env.num_agents + env.num_enemies
    longest_cooldown = env.unit_type_weapon_cooldowns.max()
    sizes = jnp.array([1, env.map_width, env.map_height, longest_cooldown] + [1] * env.unit_type_bits)
    scale = jnp.concatenate([jnp.tile(sizes, units), jnp.ones(units), jnp.full(units, env.unit_type_bits - 1.0)])
    return obs, observations["world_state"] / scale


def living(env: HeuristicEnemySMAX, obs: Array) -> Array:
    """[...] float: 1 for agents alive in their observations [..., O], 0 for the dead, who see nothing."""
    return (obs[..., -len(env.own_features)] > 0).astype(jnp.float32)  # one's own health


class Step(NamedTuple):
    """What a step of one battle brings: the true next observations, also at the end of a battle."""

    obs: Array
    state: Array
    reward: Array
    terminated: Array
    ended: Array
    won: Array
    dead_allies: Array


def reset(env: HeuristicEnemySMAX, key: Array) -> tuple[Any, Array, Array]:
    """A new battle: the environment's own state, observations [N, O] and the state [S]."""
    observations, env_state = env.reset(key)
    return env_state, *arrays(env, observations)


def step(env: HeuristicEnemySMAX, key: Array, env_state: Any, actions: Array) -> tuple[Step, Any, Array, Array]:
    """One step with actions [N, D] in [-1, 1], and what to go on with: after the end of a battle, a new one.

    The package's own auto-reset would drop the last observation. Its time limit, a truncation, comes at step 101.
    """
    step_key, reset_key = jax.random.split(key)
    unit_actions = dict(zip(env.agents, actions.clip(-1, 1) / 2 + 0.5))
    observations, after, rewards, dones, _ = env.step_env(step_key, env_state, unit_actions)
    obs, state = arrays(env, observations)
    allies = after.state.unit_alive[: env.num_agents]
    enemies = after.state.unit_alive[env.num_agents :]
    result = Step(
        obs,
        state,
        reward=rewards[env.agents[0]],
        terminated=~allies.any() | ~enemies.any(),
        ended=dones["__all__"],
        won=allies.any() & ~enemies.any(),
        dead_allies=env.num_agents - allies.sum(),
    )
    going_on = jax.tree.map(partial(jnp.where, result.ended), reset(env, reset_key), (after, obs, state))
    return result, *going_on


# ------------------------------------------------------------------------------------------ the compiled program


class Training(NamedTuple):
    """All that a run is in the middle of: the learner, E battles, the returns so far, replay rows and a key."""

    learner: Learner
    env_state: Any  # of the E battles
    obs: Array  # [E, N, O]
    state: Array  # [E, S]
    returns: Array  # [E]
    lengths: Array  # [E]
    buffer: Array  # [capacity, W]
    key: Array


def batch_shapes(env: HeuristicEnemySMAX) -> Batch:
    """Shapes of one transition's fields."""
    _, obs, state = jax.eval_shape(partial(reset, env), jax.random.PRNGKey(0))
    actions = (env.num_agents, ACTION_SIZE)
    return Batch(obs.shape, actions, (), (), obs.shape, state.shape, state.shape, ())


def begin(env: HeuristicEnemySMAX, args: Args, seed: Array) -> Training:
    """The start of a run."""
    key, learner_key, reset_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    env_state, obs, state = jax.vmap(partial(reset, env))(jax.random.split(reset_key, args.num_envs))
    shapes = batch_shapes(env)
    learner = Learner.create(learner_key, args, *shapes.obs, *shapes.state)
    capacity = min(args.buffer_size, args.total_timesteps + args.log_interval) // args.num_envs * args.num_envs
    buffer = jnp.zeros((capacity, sum(math.prod(shape) for shape in shapes)))
    returns = lengths = jnp.zeros(args.num_envs)
    return strongly_typed(Training(learner, env_state, obs, state, returns, lengths, buffer, key))


def strongly_typed(tree: Any) -> Any:
    """The pytree as a compiled program returns it. A program that goes on from weak types is compiled twice."""
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), tree)


def act(
    policy: DiffusionPolicy | GaussianPolicy,
    env: HeuristicEnemySMAX,
    key: Array,
    obs: Array,
    deterministic: Array | bool = False,
) -> Array:
    """Actions [E, N, D] of the policies at observations [E, N, O]; the dead do nothing."""
    actions = policy.sample(key, obs.swapaxes(0, 1), deterministic).swapaxes(0, 1)
    return actions * living(env, obs)[..., None]


def play_and_learn(
    env: HeuristicEnemySMAX, args: Args, learning: bool, training: Training, index: Array
) -> tuple[Training, Metrics]:
    """Step number `index` of every battle, and the updates that are due."""
    key, act_key, step_key, learn_key = jax.random.split(training.key, 4)

    # Act: at random, before learning has started.
    if learning:
        actions = act(training.learner.policy, env, act_key, training.obs)
    else:
        uniform = jax.random.uniform(act_key, (*training.obs.shape[:2], ACTION_SIZE), minval=-1, maxval=1)
        actions = uniform * living(env, training.obs)[..., None]
    keys = jax.random.split(step_key, args.num_envs)
    after, env_state, obs, state = jax.vmap(partial(step, env))(keys, training.env_state, actions)

    # Store.
    terminated, ended = after.terminated.astype(jnp.float32), after.ended.astype(jnp.float32)
    before, there = (training.obs, training.state), (after.obs, after.state)
    rows = flat(Batch(before[0], actions, after.reward, terminated, there[0], before[1], there[1], ended))
    first = index * args.num_envs % len(training.buffer)
    buffer = lax.dynamic_update_slice(training.buffer, rows, (first, 0))
    returns = training.returns + after.reward
    lengths = training.lengths + 1
    numbers = dict(zip(BATTLE, (returns, after.won, lengths, after.dead_allies)))
    metrics = {"battles": ended.sum()} | {name: (ended * value).sum() for name, value in numbers.items()}

    # Learn.
    learner = training.learner
    if learning:
        shapes = batch_shapes(env)

        def learn(learner: Learner, key: Array) -> tuple[Learner, Metrics]:
            batch_key, update_key = jax.random.split(key)
            batch = sample_batch(batch_key, buffer, (index + 1) * args.num_envs, args, shapes)
            return update(learner, batch, living(env, batch.obs), living(env, batch.next_obs), args, update_key)

        keys = jax.random.split(learn_key, args.num_envs // args.steps_per_update)
        learner, more = lax.scan(learn, learner, keys)
        metrics |= jax.tree.map(jnp.mean, more)
    returns = (1 - ended) * returns
    lengths = (1 - ended) * lengths
    return Training(learner, env_state, obs, state, returns, lengths, buffer, key), metrics


def run_chunk(
    env: HeuristicEnemySMAX, args: Args, learning: bool, training: Training, start: Array
) -> tuple[Training, Metrics]:
    """--log-interval environment steps; counts of what happened, and means of the updates' metrics."""
    indices = start + jnp.arange(args.log_interval // args.num_envs)
    training, metrics = lax.scan(partial(play_and_learn, env, args, learning), training, indices)
    battles, *sums = (metrics.pop(name).sum() for name in ("battles", *BATTLE))
    averages = jax.tree.map(jnp.mean, metrics)
    return training, averages | {f"{name}/training": total / battles for name, total in zip(BATTLE, sums)}


def choose_devices(device: str) -> list[jax.Device]:
    """The devices that --device names; auto is JAX's own choice, CUDA if there is one."""
    return jax.devices(None if device == "auto" else device)


def mesh_of_seeds(num_seeds: int, device: str = "auto") -> Mesh:
    """As many of the devices as can share the seeds equally."""
    devices = choose_devices(device)
    return Mesh(devices[: math.gcd(num_seeds, len(devices))], ("seeds",))


def compiled(function: Callable, num_seeds: int, device: str = "auto", donate: bool = False) -> Callable:
    """A function of (what has a leading axis of seeds, what all seeds share), for all seeds at once.

    It is compiled when first called. With several devices, each takes its share of the seeds.
    """
    over_seeds, for_all = PartitionSpec("seeds"), PartitionSpec()
    program = jax.shard_map(
        jax.vmap(function, in_axes=(0, None)),
        mesh=mesh_of_seeds(num_seeds, device),
        in_specs=(over_seeds, for_all),
        out_specs=over_seeds,
        check_vma=False,
    )
    return jax.jit(program, donate_argnums=(0,) if donate else ())


def begin_seeds(env: HeuristicEnemySMAX, args: Args) -> Training:
    """The start of the runs of all seeds, each on the device that has its share of them."""
    seeds = np.arange(args.seed, args.seed + args.num_seeds, dtype=np.uint32)
    training = jax.jit(jax.vmap(partial(begin, env, args)), out_shardings=sharding_of_seeds(args))(seeds)
    return jax.block_until_ready(training)  # raises here if there is no memory; to read an array would wait for ever


def sharding_of_seeds(args: Args) -> NamedSharding:
    """The seeds spread over the devices that share them."""
    return NamedSharding(mesh_of_seeds(args.num_seeds, args.device), PartitionSpec("seeds"))


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    env: HeuristicEnemySMAX, episodes: int, policy: DiffusionPolicy | GaussianPolicy, key_and_mode: tuple[Array, Array]
) -> dict[str, Array]:
    """Plays `episodes` battles at a time; returns the numbers of BATTLE, each [episodes].

    The mode: whether the policies are deterministic.
    """
    key, deterministic = key_and_mode
    reset_key, play_key = jax.random.split(key)
    start = jax.vmap(partial(reset, env))(jax.random.split(reset_key, episodes))

    def play_step(carry: tuple, key: Array) -> tuple[tuple, None]:
        (env_state, obs, _), playing, totals = carry
        act_key, step_key = jax.random.split(key)
        actions = act(policy, env, act_key, obs, deterministic)
        after, *going_on = jax.vmap(partial(step, env))(jax.random.split(step_key, episodes), env_state, actions)
        last = playing * after.ended
        gains = after.reward, last * after.won, 1, last * after.dead_allies  # in the order of BATTLE
        totals = tuple(total + playing * gain for total, gain in zip(totals, gains))
        return (tuple(going_on), playing * (1 - after.ended), totals), None

    carry = start, jnp.ones(episodes), (jnp.zeros(episodes),) * 4
    keys = jax.random.split(play_key, env.max_steps + 1)  # the limit comes one step late
    _, _, totals = lax.scan(play_step, carry, keys)[0]
    return dict(zip(BATTLE, totals))


def evaluator(env: HeuristicEnemySMAX, args: Args) -> Callable[[Any, int, bool, int], dict[str, np.ndarray]]:
    """A function of (policies [seeds, ...], number of battles, deterministic?, seed) that is compiled only once."""
    play = compiled(partial(evaluate, env, args.eval_episodes), args.num_seeds, args.device)

    def evaluate_seeds(policies: Any, episodes: int, deterministic: bool, seed: int) -> dict[str, np.ndarray]:
        """What evaluate returns, each [seeds, episodes]."""
        keys = jax.random.split(jax.random.PRNGKey(seed), math.ceil(episodes / args.eval_episodes))
        waves = [jax.device_get(play(policies, (key, jnp.array(deterministic)))) for key in keys]
        if not all(np.isfinite(wave["returns"]).all() for wave in waves):
            raise RunError("a return is NaN or infinite in an evaluation")
        # In the order of BATTLE: JAX returns a dict in that of its keys.
        return {name: np.concatenate([wave[name] for wave in waves], 1)[:, :episodes] for name in BATTLE}

    return evaluate_seeds


def write_video(
    env: HeuristicEnemySMAX, policy: DiffusionPolicy | GaussianPolicy, deterministic: bool, key: Array, path: Path
) -> None:
    """A GIF of one battle, drawn by SMAX's own renderer."""
    import matplotlib

    matplotlib.use("Agg")
    from jaxmarl.viz.visualizer import SMAXVisualizer

    reset_key, key = jax.random.split(key)
    env_state, obs, _ = strongly_typed(reset(env, reset_key))
    choose = jax.jit(lambda key, obs: act(policy, env, key, obs[None], deterministic)[0])
    play_step = jax.jit(partial(step, env))
    moves = []
    ended = False
    while not ended:
        key, act_key, step_key = jax.random.split(key, 3)
        actions = choose(act_key, obs)
        moves.append((step_key, env_state, dict(zip(env.agents, actions.clip(-1, 1) / 2 + 0.5))))
        after, env_state, obs, _ = play_step(step_key, env_state, actions)
        ended = bool(after.ended)
    film = SMAXVisualizer(env, moves)
    film.expand_state_seq()
    with jax.disable_jit():  # the renderer would compile a branch for every unit of every frame
        film.animate(save_fname=str(path), view=False)


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Progress:
    """Where a run stands."""

    global_step: int = 0
    seconds: float = 0.0
    rows: list[dict[str, int | float | str]] = field(default_factory=list)  # of evaluations.csv


def train(args: Args, given: Collection[str] = (), signals: Sequence[int] = ()) -> dict:
    """Train one team per seed; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation, seed by
    seed; final_return, their mean; win_rates, one per seed; env_steps_per_second, of all seeds together. Raises
    RunError for bad arguments and for NaN.
    `given` names arguments that count as asked for though they equal their defaults. When `signals` is no longer empty,
    the run saves a checkpoint at the end of the chunk and raises Stopped.
    """
    with ExitStack() as held:
        checkpoint = None
        if args.resume is not None:
            run_dir = existing_run("--resume", args.resume)
            held.enter_context(locked(run_dir))
            args, checkpoint = load_checkpoint("--resume", run_dir, args, given, free=("device",))
        check_args(args)
        env = make_env(args)
        held.enter_context(jax.default_device(choose_devices(args.device)[0]))
        progress = Progress()
        if checkpoint:
            training, progress = restore("--resume", run_dir, checkpoint, env, args)
            training = jax.device_put(training, sharding_of_seeds(args))
        else:
            training = begin_seeds(env, args)
            run_dir = create_run(args, args.map_name)
            held.enter_context(locked(run_dir))
        return training_loop(args, run_dir, env, training, progress, signals)


def training_loop(
    args: Args,
    run_dir: Path,
    env: HeuristicEnemySMAX,
    training: Training,
    progress: Progress,
    signals: Sequence[int],
) -> dict:
    """Run chunks, log, evaluate and save, from where `progress` stands to the end."""
    evaluate_seeds = evaluator(env, args)
    chunks = {
        learning: compiled(partial(run_chunk, env, args, learning), args.num_seeds, args.device, donate=True)
        for learning in (False, True)
    }
    first_step = progress.global_step
    started = time.monotonic()
    writer = start_logging(args, run_dir, first_step)
    bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", desc=args.map_name, mininterval=1)

    def seconds() -> float:
        return progress.seconds + time.monotonic() - started

    def check_observations() -> None:
        check_finite([("an observation", training.obs), ("a state", training.state)], progress.global_step)

    def save() -> None:
        check_observations()
        filled = training._replace(buffer=training.buffer[:, : progress.global_step])
        tensors = {name: np.asarray(tensor) for name, tensor in named_arrays(filled).items()}
        check_transitions(tensors[".buffer"], progress.global_step, args.num_envs)
        check_finite(tensors.items(), progress.global_step)
        save_team(run_dir, args, training.learner.average_policy)
        save_checkpoint(run_dir, args, replace(progress, seconds=seconds()), tensors)
        if signals:
            bar.close()
            raise Stopped(f"stopped at step {progress.global_step}; go on with --resume {run_dir}")

    def log_evaluation(episodes: int) -> dict[str, np.ndarray]:
        policies = training.learner.average_policy
        for mode in ("stochastic", "deterministic"):
            played = evaluate_seeds(policies, episodes, mode == "deterministic", progress.global_step)
            time_taken = round(seconds(), 1)
            for number in range(args.num_seeds):
                mean, *others = (float(values[number].mean()) for values in played.values())
                std = float(played["returns"][number].std())
                row = progress.global_step, time_taken, mode, args.seed + number, mean, std, episodes, *others
                progress.rows.append(dict(zip(EVALUATION_COLUMNS, row)))
            for name, values in played.items():
                writer.add_scalar(f"{name}/{mode}", values.mean(), progress.global_step)
        write_evaluations(run_dir, progress.rows)
        return played  # by the deterministic policies

    def due(interval: int) -> bool:
        return progress.global_step // interval > (progress.global_step - args.log_interval) // interval

    while progress.global_step < args.total_timesteps:
        if signals or due(args.checkpoint_interval):
            save()

        # Act, store and learn.
        learning = progress.global_step >= args.learning_starts
        training, metrics = chunks[learning](training, progress.global_step // args.num_envs)
        progress.global_step += args.log_interval

        # Log.
        scalars = {name: float(np.mean(values)) for name, values in jax.device_get(metrics).items()}
        check_observations()
        learned = (item for item in scalars.items() if item[0].startswith(("losses", "policy")))
        check_finite(learned, progress.global_step)
        num_steps = args.num_seeds * (progress.global_step - first_step)
        scalars["steps_per_second"] = num_steps / (time.monotonic() - started)
        for name, value in scalars.items():
            writer.add_scalar(name, value, progress.global_step)
        bar.update(args.log_interval)
        mean_return, win_rate = scalars["returns/training"], scalars["win_rate/training"]
        bar.set_postfix({"return": f"{mean_return:.2f}", "wins": f"{win_rate:.2f}"})
        if due(args.eval_interval) and progress.global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
    env_steps_per_second = args.num_seeds * progress.global_step / seconds()
    played = log_evaluation(args.final_eval_episodes)
    bar.close()
    writer.close()
    if args.capture_video:
        first = jax.tree.map(lambda leaf: leaf[0], training.learner.average_policy)
        write_video(env, first, True, jax.random.PRNGKey(args.seed), run_dir / "final.gif")
    result = {
        "run_dir": str(run_dir),
        "global_step": progress.global_step,
        "final_return": float(played["returns"].mean()),
        "episodic_returns": played["returns"].flatten().tolist(),
        "win_rates": played["win_rate"].mean(1).tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("jax", "jaxmarl", "optax", "numpy")}
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
    for argument in fields(args):
        value = getattr(args, argument.name)
        small = argument.name == "seed" or not fits(value, int) or value < 2**31
        require(args, argument.name, small, f"at most {2**31 - 1}, since JAX counts in 32 bits")
    counted = args.total_timesteps + args.log_interval < 2**31
    require(args, "total_timesteps", counted, f"below {2**31} - --log-interval, since JAX counts in 32 bits")
    require(args, "num_seeds", args.seed + args.num_seeds <= 2**32, f"at most {2**32} - --seed")
    require(args, "learning_starts", args.learning_starts < args.total_timesteps, "below --total-timesteps")
    require(args, "buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    divisor = args.num_envs % args.steps_per_update == 0
    require(args, "steps_per_update", divisor, f"a divisor of --num-envs, {args.num_envs}")
    multiple = args.log_interval % args.num_envs == 0
    require(args, "log_interval", multiple, f"a multiple of --num-envs, {args.num_envs}")
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
    try:
        choose_devices(args.device)
    except RuntimeError:
        require(args, "device", False, "auto or cpu on this machine, where JAX finds no CUDA")
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise RunError("--track needs Weights & Biases: pip install wandb, or drop the flag") from None


def check_finite(named_values: Iterable[tuple[str, Any]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not np.isfinite(value).all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


def check_transitions(rows: np.ndarray, global_step: int, num_envs: int) -> None:
    """As check_finite, for the rows [seeds, size, W] of the replay buffer; names the step that the oldest came from."""
    finite = np.isfinite(rows).all((0, 2))
    if not finite.all():
        later = (global_step - 1 - np.flatnonzero(~finite)) % len(finite)  # transitions that were stored after it
        step_of_oldest = global_step - later.max() // num_envs * num_envs
        raise RunError(f"a transition is NaN or infinite at step {step_of_oldest}; the last checkpoint is from before")


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
    if folder and (Path(folder) / "checkpoint.safetensors").is_file():
        return Path(folder)
    runs = ", ".join(str(path.parent) for path in sorted(Path("runs").glob("*/checkpoint.safetensors"))) or "none yet"
    raise RunError(f"{flag}: there is no checkpoint.safetensors in {folder!r}; run folders here: {runs}")


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


def named_arrays(tree: Any) -> dict[str, Array]:
    """The leaves of a pytree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def checksum(tensors: dict[str, np.ndarray], contents: str) -> str:
    """CRC-32 of a checkpoint's tensors, their names and its other contents; safetensors has none."""
    crc = zlib.crc32(contents.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(np.ascontiguousarray(tensors[name]), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


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


def write_file(path: Path, tensors: dict[str, np.ndarray], **contents: Any) -> None:
    """Write tensors as safetensors, whole, everything else as JSON in its header."""
    text = json.dumps({"script": SCRIPT, **contents})
    with whole_file(path) as unfinished:
        try:  # save_file takes no memory, save twice that of the tensors
            safetensors.numpy.save_file(tensors, unfinished, {"json": text, "crc32": checksum(tensors, text)})
        except safetensors.SafetensorError as error:  # a full disk
            raise OSError(error) from None


def save_checkpoint(run_dir: Path, args: Args, progress: Progress, tensors: dict[str, np.ndarray]) -> None:
    """Write checkpoint.safetensors, whole."""
    contents = {"args": run_arguments(args), "progress": asdict(progress)}
    write_file(run_dir / "checkpoint.safetensors", tensors, **contents)


def save_team(run_dir: Path, args: Args, policies: Any) -> None:
    """Write team.safetensors, whole: the policies [seeds, ...], and the arguments but for those about one machine."""
    tensors = {name: np.asarray(tensor) for name, tensor in named_arrays(policies).items()}
    of_a_machine = ("device", "exp_name", "wandb_project_name", "wandb_entity")
    shared = {name: value for name, value in run_arguments(args).items() if name not in of_a_machine}
    write_file(run_dir / "team.safetensors", tensors, args=shared)


def read_team(flag: str, path: Path, args: Args, given: Collection[str], free: Collection[str]) -> tuple[Args, Any]:
    """The arguments, see stored_arguments, and the policies [seeds, ...] of a team's file."""
    if not path.is_file():
        raise RunError(f"{flag}: there is no file {path}; choose a team.safetensors or a run folder")
    tensors, contents = read_file(flag, path)
    args = stored_arguments(flag, path, contents, args, given, free)
    with damage_reported(flag, path):
        stack, obs_size = tensors[".observation.whole.weight"].shape[1:3]
        policy_class = DiffusionPolicy if args.policy == "diffusion" else GaussianPolicy
        create = partial(policy_class.create, args=args, stack=stack, obs_size=obs_size)
        shapes = jax.eval_shape(jax.vmap(create), jax.random.split(jax.random.PRNGKey(0), args.num_seeds))
        return args, filled(shapes, tensors)


def load_team(path: str | Path, number: int = 0) -> tuple[DiffusionPolicy | GaussianPolicy, Args]:
    """A trained team from its file, to be used from Python: policy.sample(key, obs) acts; see the policies' docstrings.

    The observations are those of all agents, though each acts on its own alone (`units`). Returns the policies of the
    run's seed with this number and the arguments they were trained with. Raises RunError if the file is not such a
    team's.
    """
    args, policies = read_team("load_team", Path(path), Args(), (), ())
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[number]), policies), args


def filled(shapes: Any, tensors: dict[str, np.ndarray]) -> Any:
    """A pytree of these shapes with the tensors in it. ValueError unless names, shapes and types are the same, or at a
    NaN or infinite value."""
    if tensors.keys() != named_arrays(shapes).keys():
        raise ValueError("other names")

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        stored = tensors[jax.tree_util.keystr(path)]
        if (stored.shape, stored.dtype) != (shape.shape, shape.dtype) or not np.isfinite(stored).all():
            raise ValueError("another shape or type, or NaN")
        return stored

    return jax.tree_util.tree_map_with_path(leaf, shapes)


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
    return replace(args, **{name: value for name, value in stored.items() if name not in asked})


def read_file(flag: str, path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of a file that write_file wrote, and its other contents. Loading executes no code."""
    with damage_reported(flag, path):
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata["crc32"] != checksum(tensors, metadata["json"]):
            raise ValueError("checksum")
        contents = json.loads(metadata["json"])
        stored = {name: tuple(v) if isinstance(v, list) else v for name, v in contents["args"].items()}
        return tensors, contents | {"args": stored}


def load_checkpoint(
    flag: str, run_dir: Path, args: Args, given: Collection[str], free: Collection[str]
) -> tuple[Args, dict]:
    """A run's arguments, see stored_arguments, and the contents of its checkpoint, among them its tensors."""
    path = run_dir / "checkpoint.safetensors"
    tensors, checkpoint = read_file(flag, path)
    run_args = stored_arguments(flag, path, checkpoint, args, given, free)
    if len(checkpoint["args"]) < len(run_arguments(args)):
        raise RunError(f"{flag}: {path} is from another version of {SCRIPT}.py; choose another")
    return run_args, checkpoint | {"tensors": tensors}


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
    flag: str, run_dir: Path, checkpoint: dict, env: HeuristicEnemySMAX, args: Args
) -> tuple[Training, Progress]:
    """The state of a run, in NumPy's arrays, and where it stands.

    Raises RunError if the checkpoint is damaged: if names, shapes and types are not those of a run with these
    arguments, or at a NaN or infinite value.
    """
    shapes = jax.eval_shape(jax.vmap(partial(begin, env, args)), np.zeros(args.num_seeds, np.uint32))
    with damage_reported(flag, run_dir / "checkpoint.safetensors"):
        progress = read_progress(checkpoint["progress"])
        tensors = checkpoint["tensors"]
        rows = tensors[".buffer"]
        tensors[".buffer"] = np.zeros(shapes.buffer.shape, rows.dtype)
        tensors[".buffer"][:, : progress.global_step] = rows
        return filled(shapes, tensors), progress


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
    """--evaluate: play the policies of a run or of a team's file, and print their returns."""
    path = Path(args.evaluate)
    if path.suffix != ".safetensors":
        path = existing_run("--evaluate", args.evaluate) / "team.safetensors"
    args, policies = read_team("--evaluate", path, args, given, free=("seed", "final_eval_episodes", "eval_episodes"))
    check_args(args)
    env = make_env(args)
    with jax.default_device(choose_devices(args.device)[0]):
        policies = jax.device_put(policies, sharding_of_seeds(args))
        evaluate_seeds = evaluator(env, args)
        for mode in ("stochastic", "deterministic"):
            deterministic = mode == "deterministic"
            all_played = evaluate_seeds(policies, args.final_eval_episodes, deterministic, args.seed)
            for number, played in enumerate(zip(*all_played.values())):
                returns, wins, lengths, dead = played
                spread = f"return {returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} battles"
                others = f"win rate {wins.mean():.2f}  length {lengths.mean():.0f}  dead {dead.mean():.1f}"
                print(f"{mode:13s} {spread}  {others}")
                if args.capture_video:
                    video = path.with_name(f"{path.stem}_{mode}{number or ''}.gif")
                    one = jax.tree.map(lambda leaf, n=number: leaf[n], policies)
                    write_video(env, one, deterministic, jax.random.PRNGKey(args.seed), video)
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
            wins = ", ".join(f"{rate:.2f}" for rate in result["win_rates"])
            print(f"final return {result['final_return']:.2f}, win rate {wins}, run folder {result['run_dir']}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        raise SystemExit(128 + signals[0]) from None
    except KeyboardInterrupt:  # while playing
        raise SystemExit(130) from None
    except (RunError, OSError, MemoryError) as error:
        raise SystemExit(f"{SCRIPT}.py: error: {str(error) or 'out of memory'}") from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{SCRIPT}.py: error: out of memory; choose smaller numbers ({reason})") from None


if __name__ == "__main__":
    main(*read_command_line())
