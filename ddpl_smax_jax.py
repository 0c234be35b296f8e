"""DDPL on SMAX, the StarCraft micromanagement challenge in JAX: battles and learner in one compiled program.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction. SMAX is from Rutherford et al., "JaxMARL", arXiv 2311.10090 (2023).

    python ddpl_smax_jax.py --map-name 3m

1. Every agent acts with its own T-step diffusion policy pi_i(a_i | o_i); transitions go to a replay buffer.
2. Twin critics learn Q(s, a_1..a_N) of the team reward; the target's next actions are drawn from the policies.
3. Agent i's local critic Q_i(o_i, a_i) learns what of Q agent i can know: the mean over the rest of s and a_-i ~ pi_-i.
4. Per state and agent, M actions are proposed from a mixture of known density q: uniform, and kernels around pi_i,
   and weighed by w = exp(Q_i(o_i, a_i) / temperature_i) / q(a_i), which estimates the energy-based policy.
5. The denoiser learns E[a_i | x_t] under those weights (importance sampling score matching, ISSM); no sample of the
   energy-based policy is ever needed.
6. temperature_i follows the weights' own entropy estimate to a target entropy.

--policy gaussian is the baseline that the paper argues against: the same energy-based policy projected on a
tanh-Gaussian by the reparameterised KL, as in soft actor-critic, with everything else equal.
The names are those of ddpl_mamujoco.py, in PyTorch; random functions take a key first.
The README numbers the implementation details and explains every logged scalar.
"""

import csv
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.nn import relu, sigmoid, silu, softplus
from jax.scipy.special import logsumexp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxmarl.environments.smax import HeuristicEnemySMAX
from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO, SMAX
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass(frozen=True)
class Args:
    """Train agents with DDPL on SMAX; the defaults are those of the reported results."""

    # Task
    map_name: str = "3m"
    """Map, such as 3m, 2s3z or 5m_vs_6m."""
    corpses_are_targets: bool = False
    """Keep the package's decoder of continuous actions, which also aims at the dead."""
    num_envs: int = 32
    """Battles at a time."""
    total_timesteps: int = 400_000
    """Environment steps in all, summed over the battles."""
    seed: int = 1
    """Seed of networks, exploration, replay and battles."""
    num_seeds: int = 1
    """Runs side by side in one program, with seeds from --seed on; on several devices, if there are."""

    # Algorithm
    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """The policy class: DDPL's diffusion policy or the Gaussian baseline."""
    buffer_size: int = 100_000
    """Transitions the replay buffer holds."""
    learning_starts: int = 5_000
    """Environment steps of uniformly random actions before the first update."""
    steps_per_update: int = 8
    """Environment steps for each update of critic and actor; divides --num-envs."""
    batch_size: int = 256
    """Transitions in a critic update."""
    actor_batch_size: int = 64
    """Of those, how many states the diffusion policy learns from (each costs M evaluations of two critics)."""
    gamma: float = 0.99
    """Discount factor."""
    tau: float = 0.01
    """Step of the target critic towards the critic, each update."""
    critic_lr: float = 1e-3
    """Learning rate of the central critics."""
    actor_lr: float = 3e-3
    """Learning rate of the policies and of the diffusion policies' local critics."""
    critic_hidden: int = 128
    """Width of the central critics' two hidden layers."""
    actor_hidden: int = 128
    """Width of the policies' two hidden layers."""

    # Temperature
    init_temperature: float = 0.05
    """Temperature of the energy-based policy at the start."""
    temperature_lr: float = 3e-3
    """Learning rate of the log-temperature."""
    target_entropy: float = -0.5
    """Entropy the temperature aims at, in nats per action dimension (uniform: 0.69)."""

    # Diffusion policy and ISSM
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

    # Run
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
    capture_video: bool = False
    """Write a GIF of a battle to the run folder (with --evaluate: of both ways to play)."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


SCRIPT = "ddpl_smax_jax"
ACTION_SIZE = 4  # shoot last enemy, do shoot, distance, angle; the first two are probabilities of NOT doing so


BATTLE = ("returns", "win_rate", "episode_length", "dead_allies")  # the numbers of a battle; returns are undiscounted


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


# ---------------------------------------------------------------------------------------------------- environment


class LivingTargetsSMAX(SMAX):
    """SMAX whose continuous actions aim at the living.

    The package's decoder shoots at the enemy nearest to the point aimed at, alive or dead, so that a team that has
    killed once goes on shooting at the corpse. Here the dead lie beyond the horizon while targets are chosen.
    """

    def _decode_continuous_actions(self, key: Array, state: Any, actions: Array) -> tuple[Array, Array]:
        positions = jnp.where(state.unit_alive[:, None], state.unit_positions, 1e6)
        return super()._decode_continuous_actions(key, state.replace(unit_positions=positions), actions)


def make_env(args: Args) -> HeuristicEnemySMAX:
    """The battle against the package's scripted enemy. Raises RunError, naming the choices, for an unknown map."""
    if args.map_name not in MAP_NAME_TO_SCENARIO:
        choices = ", ".join(MAP_NAME_TO_SCENARIO)
        raise RunError(f"--map-name: {args.map_name!r} is not a map of SMAX; choose from {choices}")
    options = {"scenario": MAP_NAME_TO_SCENARIO[args.map_name], "action_type": "continuous"}
    env = HeuristicEnemySMAX(**options)
    if not args.corpses_are_targets:
        env._env = LivingTargetsSMAX(**options)
    return env


def arrays(env: HeuristicEnemySMAX, observations: dict[str, Array]) -> tuple[Array, Array]:
    """Observations [N, O] of the agents and the state [S] of the battle, each unit's features brought to [0, 1]."""
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
    alive = after.state.unit_alive
    allies, enemies = alive[: env.num_agents].any(), alive[env.num_agents :].any()
    ended, dead = dones["__all__"], env.num_agents - alive[: env.num_agents].sum()
    result = Step(obs, state, rewards[env.agents[0]], ~allies | ~enemies, ended, allies & ~enemies, dead)
    going_on = jax.tree.map(partial(jnp.where, ended), reset(env, reset_key), (after, obs, state))
    return result, *going_on


# ------------------------------------------------------------------------------------------------------- networks


def stacked_weight(key: Array, stack: int, in_features: int, out_features: int) -> Array:
    """`stack` weight matrices [S, in, out], one per agent or critic, each started as torch.nn.Linear starts its own."""
    bound = in_features**-0.5
    return jax.random.uniform(key, (stack, in_features, out_features), minval=-bound, maxval=bound)


class StackedLinear(NamedTuple):
    """`stack` linear layers as one batched matrix product: [S, B, in] -> [S, B, out]."""

    weight: Array
    bias: Array

    @classmethod
    def create(cls, key: Array, stack: int, in_features: int, out_features: int) -> "StackedLinear":
        return cls(stacked_weight(key, stack, in_features, out_features), jnp.zeros((stack, 1, out_features)))

    def __call__(self, x: Array) -> Array:
        return x @ self.weight + self.bias


class DiffusionPolicy(NamedTuple):
    """N denoisers of T steps (DDPM, Ho et al. 2020; v-prediction, Salimans and Ho 2022), one per agent."""

    observation: StackedLinear
    step: Array  # [N, T + 1, H]
    noisy_action: Array
    hidden: StackedLinear
    velocity: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, obs_size: int) -> "DiffusionPolicy":
        keys, hidden = jax.random.split(key, 4), args.actor_hidden
        return cls(
            StackedLinear.create(keys[0], num_agents, obs_size, hidden),
            0.3 * jax.random.normal(keys[1], (num_agents, args.denoising_steps + 1, hidden)),
            stacked_weight(keys[2], num_agents, ACTION_SIZE, hidden),
            StackedLinear.create(keys[3], num_agents, hidden, hidden),
            StackedLinear(jnp.zeros((num_agents, hidden, ACTION_SIZE)), jnp.zeros((num_agents, 1, ACTION_SIZE))),
        )

    def __call__(self, context: Array, x_t: Array) -> Array:
        """v [N, B, D] of noisy actions [N, B, D]; context [N, B, H] is the first layer's sum over (observation, t)."""
        return self.velocity(silu(self.hidden(silu(context + x_t @ self.noisy_action))))

    def sample(self, key: Array, obs: Array, deterministic: Array | bool = False) -> Array:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O], by ancestral sampling.

        Deterministic: from x_T = 0 and without noise.
        """
        num_steps = self.step.shape[1] - 1
        alphas_bar, features = noise_schedule(num_steps), self.observation(obs)
        noise = jax.random.normal(key, (num_steps, *obs.shape[:2], ACTION_SIZE)) * jnp.where(deterministic, 0, 1)

        def denoise(x_t: Array, t_and_noise: tuple[Array, Array]) -> tuple[Array, None]:
            t, fresh = t_and_noise
            mean, std = denoise_step(x_t, self(features + self.step[:, t, None], x_t), t, alphas_bar)
            return mean + std * fresh, None

        fresh = jnp.concatenate([noise[1:], jnp.zeros_like(noise[:1])])  # the last step adds none
        return lax.scan(denoise, noise[0], (jnp.arange(num_steps, 0, -1), fresh))[0]


class GaussianPolicy(NamedTuple):
    """N tanh-Gaussian policies of the same size as the denoisers, as in soft actor-critic (Haarnoja et al. 2018)."""

    observation: StackedLinear
    hidden: StackedLinear
    mean_and_log_std: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, obs_size: int) -> "GaussianPolicy":
        sizes = (obs_size, args.actor_hidden, args.actor_hidden, 2 * ACTION_SIZE)
        layers = zip(jax.random.split(key, 3), sizes, sizes[1:])
        return cls(*(StackedLinear.create(k, num_agents, i, o) for k, i, o in layers))

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
        return jnp.where(deterministic, jnp.tanh(self(obs)[0]), self.rsample(key, obs)[0])


class TwinCritic(NamedTuple):
    """Two centralised critics Q(s, a_1..a_N) of the team reward."""

    state: StackedLinear
    actions: Array
    hidden: StackedLinear
    value: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, state_size: int) -> "TwinCritic":
        keys, hidden = jax.random.split(key, 4), args.critic_hidden
        return cls(
            StackedLinear.create(keys[0], 2, state_size, hidden),
            stacked_weight(keys[1], 2, num_agents * ACTION_SIZE, hidden),
            StackedLinear.create(keys[2], 2, hidden, hidden),
            StackedLinear.create(keys[3], 2, hidden, 1),
        )

    def __call__(self, state: Array, actions: Array) -> Array:
        """Values [2, B] of states [B, S] and joint actions [N, B, D]."""
        hidden = relu(self.state(state) + joint(actions) @ self.actions)
        return self.value(relu(self.hidden(hidden)))[..., 0]

    def score(self, state: Array, actions: Array, candidates: Array) -> Array:
        """Q1 [N, M, B] at states [B, S] where agent i plays each of its candidates [N, M, B, D].

        The others play their actions [N, B, D]. The candidates of a state share the first layer but for the agent's own
        action, so it costs next to nothing.
        """
        first = StackedLinear(*(leaf[0] for leaf in self.state))
        second, last = (StackedLinear(layer.weight[0], layer.bias[0]) for layer in (self.hidden, self.value))
        own = self.actions[0].reshape(len(actions), ACTION_SIZE, -1)  # the columns of each agent's own action
        shared = first(state) + joint(actions) @ self.actions[0] - actions @ own  # [N, B, H]
        hidden = relu(shared[:, None] + candidates @ own[:, None])
        return last(relu(second(hidden)))[..., 0]


def joint(actions: Array) -> Array:
    """Joint actions [B, N * D] of the agents' actions [N, B, D]."""
    return actions.transpose(1, 0, 2).reshape(actions.shape[1], -1)


class LocalCritic(NamedTuple):
    """One critic Q_i(o_i, a_i) per agent: the central Q, averaged over all that agent i neither sees nor decides.

    The energy of DDPL's policies. A softmax of the central Q itself would be averaged by the denoiser: a mean of
    softmaxes, broader than the softmax of the mean wherever Q depends on what agent i cannot know.
    """

    observation: StackedLinear
    action: Array
    hidden: StackedLinear
    value: StackedLinear

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, obs_size: int) -> "LocalCritic":
        keys, hidden = jax.random.split(key, 4), args.local_critic_hidden
        return cls(
            StackedLinear.create(keys[0], num_agents, obs_size, hidden),
            stacked_weight(keys[1], num_agents, ACTION_SIZE, hidden),
            StackedLinear.create(keys[2], num_agents, hidden, hidden),
            StackedLinear.create(keys[3], num_agents, hidden, 1),
        )

    def __call__(self, obs: Array, candidates: Array) -> Array:
        """Values [N, M, B], up to a constant per observation, of candidates [N, M, B, D] at observations [N, B, O]."""
        rows = candidates.reshape(len(candidates), -1, ACTION_SIZE)
        hidden = (rows @ self.action).reshape(*candidates.shape[:3], -1) + self.observation(obs)[:, None]
        hidden = relu(hidden).reshape(*rows.shape[:2], -1)
        return self.value(relu(self.hidden(hidden))).reshape(candidates.shape[:3])


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


def flat(transitions: Batch) -> Array:
    """Rows [B, W] of transitions whose fields are [B, ...]."""
    return jax.vmap(lambda one: ravel_pytree(one)[0])(transitions)


def sample_batch(key: Array, buffer: Array, size: Array, batch_size: int, shapes: Batch) -> Batch:
    """A batch drawn uniformly with replacement from the first `size` rows, agents first where there are agents."""
    rows = buffer[jax.random.randint(key, (batch_size,), 0, size)]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
    columns = (x.reshape(batch_size, *shape) for x, shape in zip(jnp.split(rows, ends, axis=1), shapes))
    return Batch(*(x.swapaxes(0, 1) if x.ndim > 2 else x for x in columns))


# --------------------------------------------------------------------------------- diffusion and ISSM: pure functions


def noise_schedule(num_steps: int, log_snr_max: float = 7.0, log_snr_min: float = -5.0) -> Array:
    """alphas_bar [T+1], the share of signal variance left after t steps: sigmoid of a log-SNR linear in t; [0] is 1."""
    return jnp.concatenate([jnp.ones(1), sigmoid(jnp.linspace(log_snr_max, log_snr_min, num_steps))])


def denoise_step(x_t: Array, v: Array, t: Array | int, alphas_bar: Array) -> tuple[Array, Array]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted v (DDPM, eq. 6-7).

    The implied x_0 is clipped to [-1, 1]. At t = 1 the mean is x_0 and the deviation 0.
    """
    signal, previous = alphas_bar[t], alphas_bar[t - 1]
    alpha = signal / previous
    x_0 = (jnp.sqrt(signal) * x_t - jnp.sqrt(1 - signal) * v).clip(-1, 1)
    mean = (jnp.sqrt(previous) * (1 - alpha) * x_0 + jnp.sqrt(alpha) * (1 - previous) * x_t) / (1 - signal)
    return mean, jnp.sqrt((1 - alpha) * (1 - previous) / (1 - signal))


def propose_actions(
    key: Array,
    anchor: Array,
    drift: Array,
    sigmas: Array,
    num_uniform: int,
    num_per_kernel: int,
    mask: Array | None = None,
) -> tuple[Array, Array]:
    """Candidates [N, M, B, D] in [-1, 1] and their log-density [N, M, B] under the mixture that proposed them.

    The mixture: `num_uniform` uniform on the box, and for each of the J widths in `sigmas` [J] `num_per_kernel` from a
    Gaussian around anchor [N, B, D] + drift [J, N, B, D], reflected at the faces of the box. Every candidate is scored
    under the whole mixture (the balance heuristic, Veach and Guibas 1995). M = num_uniform + J * num_per_kernel.
    mask [N, D] marks real dimensions; the others stay 0 and add nothing to the density.
    """
    num_agents, batch_size, size = anchor.shape
    mask = jnp.ones((num_agents, 1, 1, size)) if mask is None else mask[:, None, None]
    width = sigmas.reshape(-1, 1, 1, 1, 1)
    centre = (anchor + drift).clip(-1, 1)[:, :, None]  # [J, N, 1, B, D]

    uniform_key, noise_key = jax.random.split(key)
    uniform = 2 * jax.random.uniform(uniform_key, (num_agents, num_uniform, batch_size, size)) - 1
    noise = jax.random.normal(noise_key, (len(sigmas), num_agents, num_per_kernel, batch_size, size))
    kernel = centre + width * noise
    kernel = kernel - 2 * relu(kernel - 1) - 2 * jnp.minimum(kernel + 1, 0)  # beyond a face: mirrored back
    kernel = kernel.clip(-1, 1).swapaxes(0, 1).reshape(num_agents, -1, batch_size, size)
    candidates = jnp.concatenate([uniform, kernel], axis=1) * mask

    # A reflected kernel's density sums its images in the two faces.
    images = jnp.stack([centre, 2 - centre, -2 - centre])
    log_images = -0.5 * ((candidates - images) / width) ** 2 - jnp.log(width * math.sqrt(2 * math.pi))
    log_kernels = (logsumexp(log_images, axis=0) * mask).sum(-1)  # [J, N, M, B]
    log_uniform = jnp.broadcast_to(-math.log(2) * mask.sum(-1), (1, *log_kernels.shape[1:]))
    counts = jnp.array([num_uniform] + [num_per_kernel] * len(sigmas))
    log_shares = jnp.log(counts / counts.sum()).reshape(-1, 1, 1, 1)
    return candidates, logsumexp(jnp.concatenate([log_uniform, log_kernels]) + log_shares, axis=0)


def random_blocks(key: Array, mask: Array, block_size: int) -> Array:
    """[N, D] float: 1 for `block_size` random dimensions of each agent among those that mask [N, D] marks (or all)."""
    rank = (-mask - jax.random.uniform(key, mask.shape)).argsort(-1).argsort(-1)
    return mask * (rank < block_size)


def issm_weights(q: Array, log_q: Array, temperature: Array) -> tuple[Array, Array, Array]:
    """Self-normalised importance weights [N, M, B] of candidates for the energy-based policy exp(q / temperature) / Z.

    q [N, M, B] is the energy and log_q [N, M, B] the candidates' log-density, temperature is [N].
    Also returns the estimates [N, B] of log Z and of the policy's entropy, log Z - E[q / temperature], in nats.
    """
    energy = (q - q.max(1, keepdims=True)) / temperature[:, None, None]  # differences survive a low temperature
    log_weights = energy - log_q
    weights = jax.nn.softmax(log_weights, axis=1)
    log_z = logsumexp(log_weights, axis=1) - math.log(q.shape[1])
    entropy = log_z - (weights * energy).sum(1)
    return weights, log_z + q.max(1) / temperature[:, None], entropy


def issm_target(x_t: Array, alpha_bar: Array, candidates: Array, weights: Array) -> Array:
    """The exact denoiser E[a | x_t] [N, R, B, D] of the weighted candidates [N, M, B, D], weights [N, M, B].

    x_t [N, R, B, D] is sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise, alpha_bar [N, R, B]. Every candidate counts, by
    its weight times its likelihood of x_t, so that the choice of the one behind x_t adds no variance.
    """
    x_t, candidates = x_t.swapaxes(1, 2), candidates.swapaxes(1, 2)  # [N, B, R, D], [N, B, M, D]
    signal = alpha_bar.swapaxes(1, 2)[..., None]  # [N, B, R, 1]
    # -|x_t - sqrt(signal) a|^2 / 2 without the term in x_t alone, which the softmax over candidates cancels
    fit = jnp.sqrt(signal) * (x_t @ candidates.mT) - 0.5 * signal * (candidates**2).sum(-1)[:, :, None]
    posterior = jax.nn.softmax(jnp.log(weights).swapaxes(1, 2)[:, :, None] + fit / (1 - signal), axis=-1)
    return (posterior @ candidates).swapaxes(1, 2)


# -------------------------------------------------------------------------------------------------------- learner


class Learner(NamedTuple):
    """What training changes: policies, critics, temperatures and the states of their optimisers."""

    policy: DiffusionPolicy | GaussianPolicy
    critic: TwinCritic
    target_critic: TwinCritic
    local_critic: LocalCritic | None
    log_temperature: Array
    optimizers: dict[str, Any]

    @classmethod
    def create(cls, key: Array, args: Args, num_agents: int, obs_size: int, state_size: int) -> "Learner":
        keys, diffusion = jax.random.split(key, 3), args.policy == "diffusion"
        policy = (DiffusionPolicy if diffusion else GaussianPolicy).create(keys[0], args, num_agents, obs_size)
        critic = TwinCritic.create(keys[1], args, num_agents, state_size)
        local_critic = LocalCritic.create(keys[2], args, num_agents, obs_size) if diffusion else None
        log_temperature = jnp.full(num_agents, math.log(args.init_temperature))
        learned = {"policy": policy, "critic": critic, "local_critic": local_critic, "log_temperature": log_temperature}
        optimizers = {name: optax.adam(0.0).init(value) for name, value in learned.items()}
        return cls(target_critic=critic, optimizers=optimizers, **learned)

    def take_step(self, name: str, learning_rate: float, gradient: Any) -> "Learner":
        """One Adam step of the field `name` down its gradient."""
        changes, state = optax.adam(learning_rate).update(gradient, self.optimizers[name])
        value = optax.apply_updates(getattr(self, name), changes)
        return self._replace(**{name: value}, optimizers=self.optimizers | {name: state})


Metrics = dict[str, Array]


def update(
    learner: Learner, batch: Batch, alive: Array, next_alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One update of critics, policies and temperatures; returns metrics, each an array [].

    alive and next_alive [N, B] mark the living: the dead do nothing and learn nothing. The policies learn at the next
    observations: there the critic's target has just drawn their actions, which serve again as the centres of the
    proposals and as the other agents' actions a_-i.
    """
    sample_key, policy_key = jax.random.split(key)
    next_actions = learner.policy.sample(sample_key, batch.next_obs) * next_alive[..., None]
    learner, metrics = update_critic(learner, batch, next_actions, args)
    if isinstance(learner.policy, GaussianPolicy):
        at = batch.next_state, batch.next_obs, next_alive
        learner, more = update_gaussian(learner, *at, args, policy_key)
    else:
        rows = slice(args.actor_batch_size)
        at = batch.next_state[rows], batch.next_obs[:, rows], next_actions[:, rows], next_alive[:, rows]
        learner, more = update_diffusion(learner, *at, args, policy_key)
    return learner, metrics | more


def update_critic(learner: Learner, batch: Batch, next_actions: Array, args: Args) -> tuple[Learner, Metrics]:
    """Move both critics to r + gamma (1 - terminated) min_k Q'_k(s', a'); a truncated episode bootstraps."""
    next_value = learner.target_critic(batch.next_state, next_actions).min(0)
    target = batch.reward + args.gamma * (1 - batch.terminated) * next_value

    def squared_error(critic: TwinCritic) -> tuple[Array, Array]:
        q = critic(batch.state, batch.actions)
        return ((q - target) ** 2).mean(1).sum(), q

    (loss, q), gradient = jax.value_and_grad(squared_error, has_aux=True)(learner.critic)
    learner = learner.take_step("critic", args.critic_lr, gradient)
    target_critic = optax.incremental_update(learner.critic, learner.target_critic, args.tau)
    return learner._replace(target_critic=target_critic), {"losses/critic": loss, "losses/q": q.mean()}


def update_local_critic(
    learner: Learner, state: Array, obs: Array, actions: Array, alive: Array, candidates: Array, args: Args
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
    learner: Learner, state: Array, obs: Array, actions: Array, alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One ISSM step of every agent's denoiser, at state [B, S], obs [N, B, O] and the policies' actions [N, B, D]."""
    block_key, propose_key, draw_key, time_key, noise_key = jax.random.split(key, 5)

    # 1. Propose, a block of dimensions around the policy's own action.
    block = random_blocks(block_key, jnp.ones((len(obs), ACTION_SIZE)), args.block_size)
    sigmas, no_drift = jnp.array(args.sigmas), jnp.zeros((len(args.sigmas), 1, 1, 1))
    counts = args.num_uniform, args.num_per_kernel
    candidates, log_q = propose_actions(propose_key, actions, no_drift, sigmas, *counts, block)
    candidates = candidates + (actions * (1 - block[:, None]))[:, None]

    # 2. Weigh. Where fewer than two candidates count, the entropy estimate stops falling with the temperature, so there
    # the temperature rises whatever the estimate says.
    learner, q, metrics = update_local_critic(learner, state, obs, actions, alive, candidates, args)
    weights, _, entropy = issm_weights(q, log_q, jnp.exp(learner.log_temperature))
    sample_size = masked_mean(1 / (weights**2).sum(1), alive, axis=1)  # [N]
    entropy = masked_mean(entropy, alive, axis=1)
    excess = entropy - args.target_entropy * block.sum(-1)
    learner, more = update_temperature(learner, jnp.where(sample_size < 2, sample_size - 2, excess), args)

    # 3. Match: noisy points around resampled candidates, each with its exact denoiser as the target.
    num_agents, _, batch_size = weights.shape
    shape = (args.num_noise_draws, num_agents, batch_size)
    draws = jax.random.categorical(draw_key, jnp.log(weights), axis=1, shape=shape).swapaxes(0, 1)  # [N, R, B]
    x_0 = jnp.take_along_axis(candidates, draws[..., None], axis=1)
    t = jax.random.randint(time_key, draws.shape, 1, args.denoising_steps + 1)
    alpha_bar = noise_schedule(args.denoising_steps)[t]
    signal, noise = jnp.sqrt(alpha_bar)[..., None], jnp.sqrt(1 - alpha_bar)[..., None]
    x_t = signal * x_0 + noise * jax.random.normal(noise_key, x_0.shape)
    velocity = (signal * x_t - issm_target(x_t, alpha_bar, candidates, weights)) / noise
    step = jax.nn.one_hot(t, args.denoising_steps + 1).reshape(num_agents, -1, args.denoising_steps + 1)

    def squared_error(policy: DiffusionPolicy) -> Array:
        features = jnp.tile(policy.observation(obs), (1, args.num_noise_draws, 1))
        prediction = policy(features + step @ policy.step, x_t.reshape(num_agents, -1, ACTION_SIZE))
        error = prediction.reshape(velocity.shape) - velocity
        error = error * block[:, None, None]  # the other dimensions would learn from themselves
        return masked_mean((error**2).mean((1, 3)), alive)

    loss, gradient = jax.value_and_grad(squared_error)(learner.policy)
    learner = learner.take_step("policy", args.actor_lr, gradient)
    metrics |= more | {"losses/actor": loss, "policy/effective_sample_size": sample_size.mean()}
    return learner, metrics | {"policy/entropy": (entropy / block.sum(-1)).mean()}


def update_gaussian(
    learner: Learner, state: Array, obs: Array, alive: Array, args: Args, key: Array
) -> tuple[Learner, Metrics]:
    """One step of every Gaussian down its KL to the energy-based policy, reparameterised, at state [B, S].

    The policies see obs [N, B, O]. One pass over the joint action serves all agents: the gradient for agent i goes
    through a_i alone.
    """
    temperature = jnp.exp(learner.log_temperature)

    def divergence(policy: GaussianPolicy) -> tuple[Array, Array]:
        actions, log_prob = policy.rsample(key, obs)
        q = learner.critic(state, actions * alive[..., None])[0]
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
    return Batch(obs.shape, actions, (), (), obs.shape, state.shape, state.shape)


def begin(env: HeuristicEnemySMAX, args: Args, seed: Array) -> Training:
    """The start of a run."""
    key, learner_key, reset_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    env_state, obs, state = jax.vmap(partial(reset, env))(jax.random.split(reset_key, args.num_envs))
    shapes = batch_shapes(env)
    learner = Learner.create(learner_key, args, *shapes.obs, *shapes.state)
    capacity = min(args.buffer_size, args.total_timesteps + args.log_interval) // args.num_envs * args.num_envs
    buffer = jnp.zeros((capacity, sum(math.prod(shape) for shape in shapes)))
    zeros = jnp.zeros(args.num_envs)
    training = Training(learner, env_state, obs, state, zeros, zeros, buffer, key)
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), training)  # not weakly typed, else all compiles twice


def act(
    learner: Learner, env: HeuristicEnemySMAX, key: Array, obs: Array, deterministic: Array | bool = False
) -> Array:
    """Actions [E, N, D] of the policies at observations [E, N, O]; the dead do nothing."""
    actions = learner.policy.sample(key, obs.swapaxes(0, 1), deterministic).swapaxes(0, 1)
    return actions * living(env, obs)[..., None]


def play_and_learn(
    env: HeuristicEnemySMAX, args: Args, learning: bool, training: Training, index: Array
) -> tuple[Training, Metrics]:
    """Step number `index` of every battle, and the updates that are due."""
    # Act: at random, before learning has started.
    key, act_key, step_key, learn_key = jax.random.split(training.key, 4)
    if learning:
        actions = act(training.learner, env, act_key, training.obs)
    else:
        uniform = jax.random.uniform(act_key, (*training.obs.shape[:2], ACTION_SIZE), minval=-1, maxval=1)
        actions = uniform * living(env, training.obs)[..., None]
    keys = jax.random.split(step_key, args.num_envs)
    after, env_state, obs, state = jax.vmap(partial(step, env))(keys, training.env_state, actions)

    # Store.
    transitions = Batch(training.obs, actions, after.reward, after.terminated, after.obs, training.state, after.state)
    rows = flat(transitions._replace(terminated=after.terminated.astype(jnp.float32)))
    first = index * args.num_envs % len(training.buffer)
    buffer = lax.dynamic_update_slice(training.buffer, rows, (first, 0))
    returns, lengths = training.returns + after.reward, training.lengths + 1
    ended = after.ended.astype(jnp.float32)
    numbers = dict(zip(BATTLE, (returns, after.won, lengths, after.dead_allies)))
    metrics = {"battles": ended.sum()} | {name: (ended * value).sum() for name, value in numbers.items()}

    # Learn.
    learner, shapes = training.learner, batch_shapes(env)
    if learning:
        size = jnp.minimum((index + 1) * args.num_envs, len(buffer))

        def learn(learner: Learner, key: Array) -> tuple[Learner, Metrics]:
            batch_key, update_key = jax.random.split(key)
            batch = sample_batch(batch_key, buffer, size, args.batch_size, shapes)
            return update(learner, batch, living(env, batch.obs), living(env, batch.next_obs), args, update_key)

        keys = jax.random.split(learn_key, args.num_envs // args.steps_per_update)
        learner, more = lax.scan(learn, learner, keys)
        metrics |= jax.tree.map(jnp.mean, more)
    going_on = (1 - ended) * returns, (1 - ended) * lengths
    return Training(learner, env_state, obs, state, *going_on, buffer, key), metrics


def run_chunk(
    env: HeuristicEnemySMAX, args: Args, learning: bool, training: Training, start: Array
) -> tuple[Training, Metrics]:
    """--log-interval environment steps; counts of what happened, and means of the updates' metrics."""
    indices = start + jnp.arange(args.log_interval // args.num_envs)
    training, metrics = lax.scan(partial(play_and_learn, env, args, learning), training, indices)
    battles, *sums = (metrics.pop(name).sum() for name in ("battles", *BATTLE))
    averages = jax.tree.map(jnp.mean, metrics)
    return training, averages | {f"{name}/training": total / battles for name, total in zip(BATTLE, sums)}


def evaluate(
    env: HeuristicEnemySMAX, episodes: int, learner: Learner, key_and_mode: tuple[Array, Array]
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
        actions = act(learner, env, act_key, obs, deterministic)
        after, *going_on = jax.vmap(partial(step, env))(jax.random.split(step_key, episodes), env_state, actions)
        last = playing * after.ended
        gains = after.reward, last * after.won, 1, last * after.dead_allies
        totals = tuple(total + playing * gain for total, gain in zip(totals, gains))
        return (tuple(going_on), playing * (1 - after.ended), totals), None

    carry = start, jnp.ones(episodes), (jnp.zeros(episodes),) * 4
    keys = jax.random.split(play_key, env.max_steps + 1)  # the limit comes one step late
    _, _, totals = lax.scan(play_step, carry, keys)[0]
    return dict(zip(BATTLE, totals))


def mesh_of_seeds(num_seeds: int) -> Mesh:
    """As many of the devices as can share the seeds equally."""
    return Mesh(jax.devices()[: math.gcd(num_seeds, len(jax.devices()))], ("seeds",))


def compiled(function: Any, num_seeds: int, donate: bool = False) -> Any:
    """A function of (what has a leading axis of seeds, what all seeds share), for all seeds at once.

    It is compiled when first called. With several devices, each takes its share of the seeds.
    """
    over_seeds, for_all = PartitionSpec("seeds"), PartitionSpec()
    program = jax.shard_map(
        jax.vmap(function, in_axes=(0, None)),
        mesh=mesh_of_seeds(num_seeds),
        in_specs=(over_seeds, for_all),
        out_specs=over_seeds,
        check_vma=False,
    )
    return jax.jit(program, donate_argnums=(0,) if donate else ())


def evaluator(env: HeuristicEnemySMAX, args: Args) -> Any:
    """A function of (learner, number of battles, deterministic?, seed) that is compiled only once."""
    play = compiled(partial(evaluate, env, args.eval_episodes), args.num_seeds)

    def evaluate_seeds(learner: Learner, episodes: int, deterministic: bool, seed: int) -> dict[str, np.ndarray]:
        """What evaluate returns, each [seeds, episodes]."""
        keys = jax.random.split(jax.random.PRNGKey(seed), math.ceil(episodes / args.eval_episodes))
        waves = [jax.device_get(play(learner, (key, jnp.array(deterministic)))) for key in keys]
        # In the order of BATTLE: JAX returns a dict in that of its keys.
        return {name: np.concatenate([wave[name] for wave in waves], 1)[:, :episodes] for name in BATTLE}

    return evaluate_seeds


def write_video(env: HeuristicEnemySMAX, learner: Learner, deterministic: bool, key: Array, path: Path) -> None:
    """A GIF of one battle, drawn by SMAX's own renderer."""
    import matplotlib

    matplotlib.use("Agg")
    from jaxmarl.viz.visualizer import SMAXVisualizer

    reset_key, key = jax.random.split(key)
    env_state, obs, _ = reset(env, reset_key)
    play, moves, ended = jax.jit(partial(step, env)), [], False
    while not ended:
        key, act_key, step_key = jax.random.split(key, 3)
        actions = act(learner, env, act_key, obs[None], deterministic)[0]
        moves.append((step_key, env_state, dict(zip(env.agents, actions.clip(-1, 1) / 2 + 0.5))))
        after, env_state, obs, _ = play(step_key, env_state, actions)
        ended = bool(after.ended)
    film = SMAXVisualizer(env, moves)
    film.expand_state_seq()
    with jax.disable_jit():  # the renderer would compile a branch for every unit of every frame
        film.animate(save_fname=str(path), view=False)


# ------------------------------------------------------------------------------------------------- files of a run


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""

    def require(name: str, valid: bool, choices: str) -> None:
        if not valid:
            raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not valid; it must be {choices}")

    for field in fields(args):
        smallest = int(field.name not in ("seed", "learning_starts", "num_uniform"))
        if field.type is int:
            require(field.name, getattr(args, field.name) >= smallest, f"a whole number of at least {smallest}")
    require("buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    require("steps_per_update", args.num_envs % args.steps_per_update == 0, f"a divisor of --num-envs, {args.num_envs}")
    require("log_interval", args.log_interval % args.num_envs == 0, f"a multiple of --num-envs, {args.num_envs}")
    for name in ("critic_lr", "actor_lr", "temperature_lr", "init_temperature"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require("gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require("tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    require("target_entropy", args.target_entropy < math.log(2), "below 0.69, the uniform policy's entropy")
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require("num_per_kernel", candidates > 1, "large enough for two candidates")
    require("sigmas", args.sigmas and all(0 < s <= 1 for s in args.sigmas), "one or more numbers above 0, at most 1")


def check_finite(named_values: Iterable[tuple[str, Array]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not np.isfinite(value).all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


def run_arguments(args: Args) -> dict:
    """The arguments that define a run, as opposed to what to do with it."""
    return {k: v for k, v in asdict(args).items() if k not in ("resume", "evaluate", "capture_video", "track")}


def named_arrays(tree: Any) -> dict[str, Array]:
    """The leaves of a pytree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_checkpoint(run_dir: Path, tensors: dict[str, Array], contents: dict) -> None:
    """Write checkpoint.safetensors so that a kill at any moment leaves a whole one, the old or the new.

    Besides the tensors it holds `contents`, as JSON.
    """
    path = run_dir / "checkpoint.safetensors.tmp"
    save_file({name: np.asarray(tensor) for name, tensor in tensors.items()}, path, {"json": json.dumps(contents)})
    os.replace(path, run_dir / "checkpoint.safetensors")


def load_checkpoint(flag: str, run_dir: Path, args: Args, free: tuple[str, ...] = ()) -> tuple[Args, dict, dict]:
    """A run's arguments, and the tensors and other contents of its checkpoint. Loading executes no code.

    Raises RunError if the checkpoint is missing, damaged or another script's, or if `args` ask for another run than
    the one it holds. Arguments named in `free` may differ.
    """
    path = run_dir / "checkpoint.safetensors"
    if not path.is_file():
        runs = sorted(Path("runs").glob(f"{SCRIPT}__*/checkpoint.safetensors"))
        choices = ", ".join(str(p.parent) for p in runs) or "none yet"
        raise RunError(f"{flag}: there is no checkpoint.safetensors in {str(run_dir)!r}; run folders here: {choices}")
    try:
        with safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            contents = json.loads(file.metadata()["json"])
        script, stored = contents["script"], contents["args"] | {"sigmas": tuple(contents["args"]["sigmas"])}
    except Exception as error:  # whatever safetensors raises at a truncated or foreign file
        raise RunError(f"{flag}: {path} is damaged ({type(error).__name__}); choose another run folder") from None
    if script != SCRIPT:
        raise RunError(f"{flag}: {path} belongs to {script}.py; choose a folder named runs/{SCRIPT}__...")
    if stored.keys() != run_arguments(args).keys():
        raise RunError(f"{flag}: {path} is from another version of {SCRIPT}.py; choose another run folder")
    asked = {field.name for field in fields(args) if getattr(args, field.name) != field.default}
    for name in (asked & stored.keys()) - set(free):
        ours, theirs, option = getattr(args, name), stored[name], f"--{name.replace('_', '-')}"
        if ours != theirs:
            raise RunError(f"{flag}: {run_dir} ran with {option} {theirs}, not {ours}; drop {option}")
    arguments = replace(args, **{name: value for name, value in stored.items() if name not in asked})
    return arguments, tensors, contents


def restore(tree: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The pytree with its leaves from the checkpoint; a leaf with fewer rows there keeps its own behind them."""

    def leaf(path: tuple, value: Array) -> Array:
        stored = tensors[jax.tree_util.keystr(path)]
        return jnp.asarray(stored) if stored.shape == value.shape else value.at[:, : stored.shape[1]].set(stored)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def write_evaluations(run_dir: Path, rows: list[dict]) -> None:
    """Write evaluations.csv, whole."""
    with open(run_dir / "evaluations.csv.tmp", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(run_dir / "evaluations.csv.tmp", run_dir / "evaluations.csv")


def start_tracking(args: Args, run_dir: Path) -> None:
    """Mirror TensorBoard's scalars to Weights & Biases."""
    try:
        import wandb
    except ImportError:
        raise RunError("--track needs Weights & Biases: pip install wandb, or drop --track") from None
    wandb.init(project=args.wandb_project_name, name=run_dir.name, config=run_arguments(args), sync_tensorboard=True)


# -------------------------------------------------------------------------------------------------------- training


def train(args: Args) -> dict:
    """Train one team per seed; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation, seed by
    seed; final_return, their mean; win_rates, one per seed; env_steps_per_second, of all seeds together. Raises
    RunError for bad arguments and for NaN.
    """
    tensors = None
    if args.resume:
        run_dir = Path(args.resume)
        args, tensors, contents = load_checkpoint("--resume", run_dir, args)
    check_args(args)
    env, seeds = make_env(args), range(args.seed, args.seed + args.num_seeds)
    sharding = NamedSharding(mesh_of_seeds(args.num_seeds), PartitionSpec("seeds"))
    training = jax.jit(jax.vmap(partial(begin, env, args)), out_shardings=sharding)(jnp.array(seeds))
    global_step, seconds, rows = 0, 0.0, []
    if tensors is not None:
        training = jax.device_put(restore(training, tensors), sharding)
        global_step, seconds, rows = contents["progress"]
    else:
        name = f"{SCRIPT}__{args.map_name}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        run_dir = Path("runs") / name
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **run_arguments(args)}, indent=2))
    if args.track:
        start_tracking(args, run_dir)
    evaluate_seeds = evaluator(env, args)
    chunks = {x: compiled(partial(run_chunk, env, args, x), args.num_seeds, donate=True) for x in (False, True)}
    writer = SummaryWriter(run_dir, purge_step=global_step)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", desc=args.map_name, mininterval=1)
    first_step, started = global_step, time.monotonic()

    def save() -> None:
        learner = named_arrays(training.learner)
        check_finite(learner.items(), global_step)
        filled = training._replace(buffer=training.buffer[:, :global_step])
        elapsed = seconds + time.monotonic() - started
        contents = {"script": SCRIPT, "args": run_arguments(args), "progress": [global_step, elapsed, rows]}
        save_checkpoint(run_dir, named_arrays(filled), contents)

    def log_evaluation(episodes: int) -> dict[str, np.ndarray]:
        for mode in ("stochastic", "deterministic"):
            played = evaluate_seeds(training.learner, episodes, mode == "deterministic", global_step)
            time_taken = round(seconds + time.monotonic() - started, 1)
            for seed, returns, *others in zip(seeds, *played.values()):
                row = {"global_step": global_step, "seconds": time_taken, "mode": mode, "seed": seed}
                row |= {"return_mean": float(returns.mean()), "return_std": float(returns.std()), "episodes": episodes}
                rows.append(row | {k: float(v.mean()) for k, v in zip(list(played)[1:], others)})
            for name, values in played.items():
                writer.add_scalar(f"{name}/{mode}", values.mean(), global_step)
        write_evaluations(run_dir, rows)
        return played  # by the deterministic policies

    def due(interval: int) -> bool:
        return global_step // interval > previous_step // interval

    while global_step < args.total_timesteps:
        learning = global_step >= args.learning_starts
        training, metrics = chunks[learning](training, global_step // args.num_envs)
        previous_step, global_step = global_step, global_step + args.log_interval
        metrics = jax.device_get(metrics)
        check_finite(((k, v) for k, v in metrics.items() if k.startswith(("losses", "policy"))), global_step)
        metrics["steps_per_second"] = args.num_seeds * (global_step - first_step) / (time.monotonic() - started)
        for name, values in metrics.items():
            writer.add_scalar(name, float(np.mean(values)), global_step)
        progress.update(args.log_interval)
        win_rate, mean_return = (metrics[f"{name}/training"].mean() for name in ("win_rate", "returns"))
        progress.set_postfix({"return": f"{mean_return:.2f}", "wins": f"{win_rate:.2f}"})
        if due(args.eval_interval) and global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)
        if due(args.checkpoint_interval) and global_step < args.total_timesteps:
            save()

    save()
    env_steps_per_second = args.num_seeds * (global_step - first_step) / (time.monotonic() - started)
    played = log_evaluation(args.final_eval_episodes)
    progress.close()
    writer.close()
    if args.capture_video:
        first = jax.tree.map(lambda leaf: leaf[0], training.learner)
        write_video(env, first, True, jax.random.PRNGKey(args.seed), run_dir / "final.gif")
    result = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "final_return": float(played["returns"].mean()),
        "episodic_returns": played["returns"].flatten().tolist(),
        "win_rates": played["win_rate"].mean(1).tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("jax", "jaxmarl", "optax", "numpy")}
    (run_dir / "result.json").write_text(json.dumps(result | {"versions": versions}, indent=2))
    return result


def play(args: Args) -> None:
    """--evaluate: play a run's policies and print their returns."""
    run_dir = Path(args.evaluate)
    args, tensors, _ = load_checkpoint("--evaluate", run_dir, args, free=("seed", "final_eval_episodes"))
    check_args(args)
    env = make_env(args)
    training = jax.jit(jax.vmap(partial(begin, env, args)))(jnp.arange(args.num_seeds))
    learner, evaluate_seeds = restore(training, tensors).learner, evaluator(env, args)
    for mode in ("stochastic", "deterministic"):
        deterministic, key = mode == "deterministic", jax.random.PRNGKey(args.seed)
        all_played = evaluate_seeds(learner, args.final_eval_episodes, deterministic, args.seed)
        for number, played in enumerate(zip(*all_played.values())):
            returns, wins, lengths, dead = played
            spread = f"return {returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} battles"
            print(
                f"{mode:13s} {spread}  win rate {wins.mean():.2f}  length {lengths.mean():.0f}  dead {dead.mean():.1f}"
            )
            if args.capture_video:
                video = run_dir / f"{mode}{number or ''}.gif"
                write_video(env, jax.tree.map(lambda leaf, n=number: leaf[n], learner), deterministic, key, video)
                print(f"{'':13s} video {video}")


def main(args: Args) -> None:
    """What the command line asks for; RunError becomes one line on standard error and exit code 1."""
    try:
        if args.evaluate:
            play(args)
        else:
            result = train(args)
            wins = ", ".join(f"{rate:.2f}" for rate in result["win_rates"])
            print(f"final return {result['final_return']:.2f}, win rate {wins}, run folder {result['run_dir']}")
    except RunError as error:
        raise SystemExit(f"{SCRIPT}.py: error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args))
