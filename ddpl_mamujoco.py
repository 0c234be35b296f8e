"""DDPL on multi-agent MuJoCo: one robot, whose joints are shared out among agents.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction.

    python ddpl_mamujoco.py --scenario HalfCheetah --agent-conf 2x3

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
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium_robotics import mamujoco_v1
from pettingzoo import ParallelEnv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train agents with DDPL on multi-agent MuJoCo; the defaults are those of the reported results."""

    # Task
    scenario: str = "HalfCheetah"
    """Robot and task, such as HalfCheetah, Hopper, Walker2d, Ant, Swimmer or Humanoid."""
    agent_conf: str = "2x3"
    """How its joints are shared out: for HalfCheetah 2x3 or 6x1 (agents x joints)."""
    agent_obsk: int = 1
    """How far along the body an agent sees: its own joints (0), their neighbours too (1), and so on."""
    num_envs: int = 8
    """Copies of the task."""
    async_envs: bool = False
    """Step every copy in a process of its own."""
    total_timesteps: int = 200_000
    """Environment steps in all, summed over the copies."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""

    # Algorithm
    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """The policy class: DDPL's diffusion policy or the Gaussian baseline."""
    buffer_size: int = 1_000_000
    """Transitions the replay buffer holds."""
    learning_starts: int = 5_000
    """Environment steps of uniformly random actions before the first update."""
    steps_per_update: int = 8
    """Environment steps for each update of critic and actor."""
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
    eval_interval: int = 20_000
    """Environment steps between evaluations."""
    eval_episodes: int = 10
    """Episodes of each evaluation, once with sampled and once with deterministic actions."""
    final_eval_episodes: int = 50
    """Episodes of the last evaluation, the one reported."""
    log_interval: int = 1_000
    """Environment steps between TensorBoard points."""
    checkpoint_interval: int = 20_000
    """Environment steps between checkpoints. Each also ends the copies' episodes early, as a time limit does."""
    num_threads: int = 1
    """Threads of PyTorch; networks this small gain little from more."""
    capture_video: bool = False
    """Write a GIF of the trained team to its run folder (with --evaluate: of both ways to play)."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


SCRIPT = "ddpl_mamujoco"
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")


CONFIGURATIONS = {  # the published factorisations of gymnasium-robotics that run with our MuJoCo
    "Ant": "2x4 2x4d 4x2",
    "HalfCheetah": "2x3 6x1",
    "Hopper": "3x1",
    "Humanoid": "9|8",
    "HumanoidStandup": "9|8",
    "ManySegmentAnt": "2x3 4x2 and so on",
    "ManySegmentSwimmer": "2x3 4x2 and so on",
    "Pusher": "3p",
    "Reacher": "2x1",
    "Swimmer": "2x1",
    "Walker2d": "2x3",
}


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


# ---------------------------------------------------------------------------------------------------- environment


def make_env(args: Args, render_mode: str | None = None) -> ParallelEnv:
    """The factorisation that `args` name. Raises RunError, naming the choices, unless gymnasium-robotics has it."""
    if args.scenario not in CONFIGURATIONS:
        choices = ", ".join(CONFIGURATIONS)
        raise RunError(f"--scenario: {args.scenario!r} is not a scenario that runs here; choose from {choices}")
    try:
        env = mamujoco_v1.parallel_env(args.scenario, args.agent_conf, args.agent_obsk, render_mode=render_mode)
    except Exception:  # the package raises a plain one
        choices = CONFIGURATIONS[args.scenario]
        raise RunError(f"--agent-conf: {args.scenario} has no {args.agent_conf!r}; choose from {choices}") from None
    # Two joints of Pusher share a label, by which the package orders what an agent sees: two copies would differ.
    for joints in (joints for distances in env.k_dicts for joints in distances.values()):
        joints.sort(key=lambda joint: (joint.label, joint.qpos_ids))
    return env


class StackedAgents(gym.Env):
    """A factorisation as one Gymnasium environment of arrays, agents zero-padded to the largest observation and action.

    Observations are a dict: what the agents see [N, O] and the state [S] of the whole robot. Actions [N, D] lie in
    [-1, 1] and are scaled to the agents' own bounds, which the task itself does not enforce. The reward is the team's.
    """

    def __init__(self, args: Args, render_mode: str | None = None):
        self.env, self.render_mode = make_env(args, render_mode), render_mode
        self.agents = self.env.possible_agents
        self.boxes = [self.env.action_space(agent) for agent in self.agents]
        self.obs_sizes = [self.env.observation_space(agent).shape[0] for agent in self.agents]
        shapes = {"obs": (len(self.agents), max(self.obs_sizes)), "state": self.env.state().shape}
        spaces = {name: Box(-np.inf, np.inf, shape, np.float32) for name, shape in shapes.items()}
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = Box(-1, 1, (len(self.agents), max(box.shape[0] for box in self.boxes)), np.float32)

    def action_mask(self) -> Tensor:
        """[N, D] float: 1 for an agent's real action dimensions, 0 for padding."""
        sizes = torch.tensor([box.shape[0] for box in self.boxes])
        return (torch.arange(self.action_space.shape[1]) < sizes[:, None]).float()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        return self._stack(self.env.reset(seed=seed)[0]), {}

    def step(self, actions: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        unit = np.clip(actions, -1, 1) / 2 + 0.5
        scaled = {
            agent: box.low + row[: len(box.low)] * (box.high - box.low)
            for agent, box, row in zip(self.agents, self.boxes, unit)
        }
        obs, rewards, terminated, truncated, _ = self.env.step(scaled)
        agent = self.agents[0]
        return self._stack(obs), float(rewards[agent]), bool(terminated[agent]), bool(truncated[agent]), {}

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    def _stack(self, observations: dict) -> dict:
        obs = np.zeros(self.observation_space["obs"].shape, np.float32)
        for row, agent, size in zip(obs, self.agents, self.obs_sizes):
            row[:size] = observations[agent]
        return {"obs": obs, "state": self.env.state().astype(np.float32)}


def make_vector_env(args: Args) -> SyncVectorEnv | AsyncVectorEnv:
    """Copies of the task that do not reset by themselves, so that every step returns the true next observation."""
    vector_env = AsyncVectorEnv if args.async_envs else SyncVectorEnv
    return vector_env([lambda: StackedAgents(args)] * args.num_envs, autoreset_mode=AutoresetMode.DISABLED)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ------------------------------------------------------------------------------------------------------- networks


def stacked_weight(stack: int, in_features: int, out_features: int) -> nn.Parameter:
    """`stack` weight matrices [S, in, out], one per agent or critic, each started as torch.nn.Linear starts its own."""
    bound = in_features**-0.5
    return nn.Parameter(torch.empty(stack, in_features, out_features).uniform_(-bound, bound))


class StackedLinear(nn.Module):
    """`stack` linear layers as one batched matrix product: [S, B, in] -> [S, B, out]."""

    def __init__(self, stack: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = stacked_weight(stack, in_features, out_features)
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class DiffusionPolicy(nn.Module):
    """N denoisers of T steps (DDPM, Ho et al. 2020; v-prediction, Salimans and Ho 2022), one per agent."""

    def __init__(self, num_agents: int, obs_size: int, action_size: int, hidden: int, num_steps: int, mask: Tensor):
        super().__init__()
        self.observation = StackedLinear(num_agents, obs_size, hidden)
        self.step = nn.Parameter(0.3 * torch.randn(num_agents, num_steps + 1, hidden))
        self.noisy_action = stacked_weight(num_agents, action_size, hidden)
        self.hidden = StackedLinear(num_agents, hidden, hidden)
        self.velocity = StackedLinear(num_agents, hidden, action_size)
        nn.init.zeros_(self.velocity.weight)
        self.register_buffer("alphas_bar", noise_schedule(num_steps), persistent=False)
        self.register_buffer("mask", mask[:, None], persistent=False)  # [N, 1, D]

    def forward(self, context: Tensor, x_t: Tensor) -> Tensor:
        """v [N, B, D] of noisy actions [N, B, D]; context [N, B, H] is the first layer's sum over (observation, t)."""
        hidden = F.silu(torch.baddbmm(context, x_t, self.noisy_action))
        return self.velocity(F.silu(self.hidden(hidden))) * self.mask

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [N, B, D] in [-1, 1] for observations [N, B, O], by ancestral sampling.

        Deterministic: from x_T = 0 and without noise.
        """
        noise_scale = 0.0 if deterministic else 1.0
        features = self.observation(obs)  # the same at every step, so computed once
        x_t = noise_scale * torch.randn(*obs.shape[:2], self.mask.shape[-1], device=obs.device) * self.mask
        for t in range(len(self.alphas_bar) - 1, 0, -1):
            mean, std = denoise_step(x_t, self(features + self.step[:, t, None], x_t), t, self.alphas_bar)
            x_t = mean + noise_scale * std * torch.randn_like(mean) * self.mask
        return x_t


class GaussianPolicy(nn.Module):
    """N tanh-Gaussian policies of the same size as the denoisers, as in soft actor-critic (Haarnoja et al. 2018)."""

    def __init__(self, num_agents: int, obs_size: int, action_size: int, hidden: int, mask: Tensor):
        super().__init__()
        self.observation = StackedLinear(num_agents, obs_size, hidden)
        self.hidden = StackedLinear(num_agents, hidden, hidden)
        self.mean_and_log_std = StackedLinear(num_agents, hidden, 2 * action_size)
        self.register_buffer("mask", mask[:, None], persistent=False)  # [N, 1, D]

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
        return torch.tanh(self(obs)[0]) * self.mask if deterministic else self.rsample(obs)[0]


class TwinCritic(nn.Module):
    """Two centralised critics Q(s, a_1..a_N) of the team reward."""

    def __init__(self, state_size: int, num_agents: int, action_size: int, hidden: int):
        super().__init__()
        self.state = StackedLinear(2, state_size, hidden)
        self.actions = stacked_weight(2, num_agents * action_size, hidden)
        self.hidden = StackedLinear(2, hidden, hidden)
        self.value = StackedLinear(2, hidden, 1)

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        """Values [2, B] of states [B, S] and joint actions [N, B, D]."""
        state, joint = (x.expand(2, -1, -1) for x in (state, actions.transpose(0, 1).flatten(1)))
        hidden = F.relu(torch.baddbmm(self.state(state), joint, self.actions))
        return self.value(F.relu(self.hidden(hidden))).squeeze(-1)

    @torch.no_grad()
    def score(self, state: Tensor, actions: Tensor, candidates: Tensor) -> Tensor:
        """Q1 [N, M, B] at states [B, S] where agent i plays each of its candidates [N, M, B, D].

        The others play their actions [N, B, D]. The candidates of a state share the first layer but for the agent's own
        action, so it costs next to nothing.
        """
        num_agents, num_candidates, batch_size, action_size = candidates.shape
        joint = actions.transpose(0, 1).flatten(1)
        own = self.actions[0].view(num_agents, action_size, -1)  # the columns of each agent's own action
        shared = torch.addmm(self.state.bias[0], state, self.state.weight[0])  # [B, H]
        shared = shared + joint @ self.actions[0] - actions @ own  # [N, B, H]
        hidden = (candidates.flatten(1, 2) @ own).view(num_agents, num_candidates, batch_size, -1)
        hidden = hidden.add_(shared[:, None]).relu_().flatten(0, 2)
        hidden = torch.addmm(self.hidden.bias[0], hidden, self.hidden.weight[0]).relu_()
        return (hidden @ self.value.weight[0] + self.value.bias[0]).view(candidates.shape[:3])


class LocalCritic(nn.Module):
    """One critic Q_i(o_i, a_i) per agent: the central Q, averaged over all that agent i neither sees nor decides.

    The energy of DDPL's policies. A softmax of the central Q itself would be averaged by the denoiser: a mean of
    softmaxes, broader than the softmax of the mean wherever Q depends on what agent i cannot know.
    """

    def __init__(self, num_agents: int, obs_size: int, action_size: int, hidden: int):
        super().__init__()
        self.observation = StackedLinear(num_agents, obs_size, hidden)
        self.action = stacked_weight(num_agents, action_size, hidden)
        self.hidden = StackedLinear(num_agents, hidden, hidden)
        self.value = StackedLinear(num_agents, hidden, 1)

    def forward(self, obs: Tensor, candidates: Tensor) -> Tensor:
        """Values [N, M, B], up to a constant per observation, of candidates [N, M, B, D] at observations [N, B, O]."""
        hidden = (candidates.flatten(1, 2) @ self.action).unflatten(1, candidates.shape[1:3])
        hidden = hidden.add_(self.observation(obs)[:, None]).relu_().flatten(1, 2)
        return self.value(self.hidden(hidden).relu_()).view(candidates.shape[:3])


# -------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    """Transitions, agents first: observations [N, B, O], actions [N, B, D], reward, terminated [B], states [B, S]."""

    obs: Tensor
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor
    state: Tensor
    next_state: Tensor


class ReplayBuffer:
    """The last `capacity` transitions, whose fields have `shapes`.

    `next_obs` is the true next observation, also where an episode was truncated.
    """

    def __init__(self, capacity: int, shapes: Batch):
        self.data = Batch(*(torch.empty(capacity, *shape) for shape in shapes))  # untouched pages take no memory
        self.capacity, self.added = capacity, 0

    @property
    def size(self) -> int:
        return min(self.added, self.capacity)

    def add(self, *transitions: Tensor) -> None:
        """Add E transitions, given in the order of Batch's fields, each [E, ...]."""
        rows = torch.arange(self.added, self.added + len(transitions[0])) % self.capacity
        for column, values in zip(self.data, transitions, strict=True):
            column[rows] = values.to(column.dtype)
        self.added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """A batch drawn uniformly with replacement, agents first where there are agents."""
        rows = torch.randint(self.size, (batch_size,))
        return Batch(*(column[rows].transpose(0, 1) if column.ndim > 2 else column[rows] for column in self.data))

    def state_dict(self) -> dict:
        return {"added": self.added, "data": [column[: self.size].clone() for column in self.data]}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for column, values in zip(self.data, state["data"], strict=True):
            column[: self.size] = values


# --------------------------------------------------------------------------------- diffusion and ISSM: pure functions


def noise_schedule(num_steps: int, log_snr_max: float = 7.0, log_snr_min: float = -5.0) -> Tensor:
    """alphas_bar [T+1], the share of signal variance left after t steps: sigmoid of a log-SNR linear in t; [0] is 1."""
    return torch.cat([torch.ones(1), torch.linspace(log_snr_max, log_snr_min, num_steps).sigmoid()])


def denoise_step(x_t: Tensor, v: Tensor, t: int, alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted v (DDPM, eq. 6-7).

    The implied x_0 is clipped to [-1, 1]. At t = 1 the mean is x_0 and the deviation 0.
    """
    signal, previous = alphas_bar[t], alphas_bar[t - 1]
    alpha = signal / previous
    x_0 = (signal.sqrt() * x_t - (1 - signal).sqrt() * v).clamp(-1, 1)
    mean = (previous.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - previous) * x_t) / (1 - signal)
    return mean, ((1 - alpha) * (1 - previous) / (1 - signal)).sqrt()


def propose_actions(
    anchor: Tensor, drift: Tensor, sigmas: Tensor, num_uniform: int, num_per_kernel: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Candidates [N, M, B, D] in [-1, 1] and their log-density [N, M, B] under the mixture that proposed them.

    The mixture: `num_uniform` uniform on the box, and for each of the J widths in `sigmas` [J] `num_per_kernel` from a
    Gaussian around anchor [N, B, D] + drift [J, N, B, D], reflected at the faces of the box. Every candidate is scored
    under the whole mixture (the balance heuristic, Veach and Guibas 1995). M = num_uniform + J * num_per_kernel.
    mask [N, D] marks real dimensions; the others stay 0 and add nothing to the density.
    """
    num_agents, batch_size, size = anchor.shape
    device = anchor.device
    mask = torch.ones(num_agents, 1, 1, size, device=device) if mask is None else mask[:, None, None]
    width = sigmas.view(-1, 1, 1, 1, 1)
    centre = (anchor + drift).clamp(-1, 1)[:, :, None]  # [J, N, 1, B, D]

    uniform = 2 * torch.rand(num_agents, num_uniform, batch_size, size, device=device) - 1
    noise = torch.randn(len(sigmas), num_agents, num_per_kernel, batch_size, size, device=device)
    kernel = centre + width * noise
    kernel = kernel - 2 * (kernel - 1).clamp(min=0) - 2 * (kernel + 1).clamp(max=0)  # beyond a face: mirrored back
    kernel = kernel.clamp(-1, 1).transpose(0, 1).flatten(1, 2)  # beyond both faces: as good as never
    candidates = torch.cat([uniform, kernel], dim=1) * mask

    # A reflected kernel's density sums its images in the two faces.
    images = torch.stack([centre, 2 - centre, -2 - centre])
    log_images = -0.5 * ((candidates - images) / width) ** 2 - (width * math.sqrt(2 * math.pi)).log()
    log_kernels = (log_images.logsumexp(0) * mask).sum(-1)  # [J, N, M, B]
    log_uniform = (-math.log(2) * mask.sum(-1)).expand(1, *log_kernels.shape[1:])
    counts = torch.tensor([num_uniform] + [num_per_kernel] * len(sigmas), device=device)
    log_shares = (counts / counts.sum()).log().view(-1, 1, 1, 1)
    return candidates, (torch.cat([log_uniform, log_kernels]) + log_shares).logsumexp(0)


def random_blocks(mask: Tensor, block_size: int) -> Tensor:
    """[N, D] float: 1 for `block_size` random dimensions of each agent among those that mask [N, D] marks (or all)."""
    rank = (mask + torch.rand_like(mask)).argsort(-1, descending=True).argsort(-1)
    return mask * (rank < block_size)


def issm_weights(q: Tensor, log_q: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-normalised importance weights [N, M, B] of candidates for the energy-based policy exp(q / temperature) / Z.

    q [N, M, B] is the energy and log_q [N, M, B] the candidates' log-density, temperature is [N].
    Also returns the estimates [N, B] of log Z and of the policy's entropy, log Z - E[q / temperature], in nats.
    """
    energy = (q - q.amax(1, keepdim=True)) / temperature[:, None, None]  # differences survive a low temperature
    log_weights = energy - log_q
    weights = log_weights.softmax(1)
    log_z = log_weights.logsumexp(1) - math.log(q.shape[1])
    entropy = log_z - (weights * energy).sum(1)
    return weights, log_z + q.amax(1) / temperature[:, None], entropy


def issm_target(x_t: Tensor, alpha_bar: Tensor, candidates: Tensor, weights: Tensor) -> Tensor:
    """The exact denoiser E[a | x_t] [N, R, B, D] of the weighted candidates [N, M, B, D], weights [N, M, B].

    x_t [N, R, B, D] is sqrt(alpha_bar) a + sqrt(1 - alpha_bar) noise, alpha_bar [N, R, B]. Every candidate counts, by
    its weight times its likelihood of x_t, so that the choice of the one behind x_t adds no variance.
    """
    x_t, candidates = x_t.transpose(1, 2), candidates.transpose(1, 2)  # [N, B, R, D], [N, B, M, D]
    signal = alpha_bar.transpose(1, 2)[..., None]  # [N, B, R, 1]
    # -|x_t - sqrt(signal) a|^2 / 2 without the term in x_t alone, which the softmax over candidates cancels
    fit = signal.sqrt() * (x_t @ candidates.mT) - 0.5 * signal * candidates.square().sum(-1)[:, :, None]
    posterior = (weights.transpose(1, 2).log()[:, :, None] + fit / (1 - signal)).softmax(-1)  # [N, B, R, M]
    return (posterior @ candidates).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------- learner


class Learner(nn.Module):
    """What training changes: policies, critics, temperatures and their optimisers."""

    def __init__(self, args: Args, num_agents: int, obs_size: int, action_size: int, state_size: int, mask: Tensor):
        super().__init__()
        sizes = num_agents, obs_size, action_size
        if args.policy == "diffusion":
            self.policy = DiffusionPolicy(*sizes, args.actor_hidden, args.denoising_steps, mask)
            self.local_critic = LocalCritic(*sizes, args.local_critic_hidden)
        else:
            self.policy = GaussianPolicy(*sizes, args.actor_hidden, mask)
        self.critic, self.target_critic = (
            TwinCritic(state_size, num_agents, action_size, args.critic_hidden) for _ in range(2)
        )
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_temperature = nn.Parameter(torch.full((num_agents,), math.log(args.init_temperature)))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.actor_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, fused=True)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], args.temperature_lr, fused=True)
        if args.policy == "diffusion":
            self.local_critic_optimizer = torch.optim.Adam(self.local_critic.parameters(), args.actor_lr, fused=True)
        self.args, self.mask, self.sigmas = args, mask, torch.tensor(args.sigmas)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [value for value in vars(self).values() if isinstance(value, torch.optim.Optimizer)]


def update(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """One update of critics, policies and temperatures; returns metrics, each a tensor [].

    The policies learn at the next observations: there the critic's target has just drawn their actions, which serve
    again as the centres of the proposals and as the other agents' actions a_-i.
    """
    next_actions = learner.policy.sample(batch.next_obs)
    metrics = update_critic(learner, batch, next_actions)
    if isinstance(learner.policy, GaussianPolicy):
        return metrics | update_gaussian(learner, batch.next_state, batch.next_obs)
    rows = slice(learner.args.actor_batch_size)
    return metrics | update_diffusion(learner, batch.next_state[rows], batch.next_obs[:, rows], next_actions[:, rows])


def update_critic(learner: Learner, batch: Batch, next_actions: Tensor) -> dict[str, Tensor]:
    """Move both critics to r + gamma (1 - terminated) min_k Q'_k(s', a'); a truncated episode bootstraps."""
    with torch.no_grad():
        next_value = learner.target_critic(batch.next_state, next_actions).min(0).values
        target = batch.reward + learner.args.gamma * (1 - batch.terminated) * next_value
    q = learner.critic(batch.state, batch.actions)
    loss = (q - target).square().mean(1).sum()
    take_step(learner.critic_optimizer, loss)
    with torch.no_grad():
        torch._foreach_lerp_([*learner.target_critic.parameters()], [*learner.critic.parameters()], learner.args.tau)
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
    args, mask = learner.args, learner.mask

    # 1. Propose, a block of dimensions around the policy's own action (all of them, if it has few). To move the kernels
    # a Langevin step uphill first gained nothing.
    block, no_drift = random_blocks(mask, args.block_size), torch.zeros(len(args.sigmas), 1, 1, 1)
    candidates, log_q = propose_actions(actions, no_drift, learner.sigmas, args.num_uniform, args.num_per_kernel, block)
    candidates = candidates + (actions * (1 - block[:, None]))[:, None]

    # 2. Weigh. Where fewer than two candidates count, the entropy estimate stops falling with the temperature, so there
    # the temperature rises whatever the estimate says.
    q, metrics = update_local_critic(learner, state, obs, actions, candidates)
    weights, _, entropy = issm_weights(q, log_q, learner.log_temperature.detach().exp())
    sample_size = (1 / weights.square().sum(1)).mean(1)  # [N]
    excess = entropy.mean(1) - args.target_entropy * block.sum(-1)
    metrics |= update_temperature(learner, torch.where(sample_size < 2, sample_size - 2, excess))

    # 3. Match: noisy points around resampled candidates, each with its exact denoiser as the target.
    with torch.no_grad():
        num_agents, num_candidates, batch_size = weights.shape
        chances = weights.transpose(1, 2).flatten(0, 1).nan_to_num(1)  # multinomial raises at NaN; the loss shows it
        draws = chances.multinomial(args.num_noise_draws, replacement=True)
        draws = draws.view(num_agents, batch_size, -1).transpose(1, 2)  # [N, R, B]
        x_0 = candidates.gather(1, draws[..., None].expand(-1, -1, -1, candidates.shape[-1]))
        t = torch.randint(1, args.denoising_steps + 1, draws.shape, device=draws.device)
        alpha_bar = learner.policy.alphas_bar[t]
        signal, noise = alpha_bar.sqrt()[..., None], (1 - alpha_bar).sqrt()[..., None]
        x_t = (signal * x_0 + noise * torch.randn_like(x_0)) * mask[:, None, None]
        velocity = (signal * x_t - issm_target(x_t, alpha_bar, candidates, weights)) / noise
        step = F.one_hot(t, args.denoising_steps + 1).float().flatten(1, 2)  # [N, R * B, T + 1]
    features = learner.policy.observation(obs).repeat(1, args.num_noise_draws, 1)
    prediction = learner.policy(features + step @ learner.policy.step, x_t.flatten(1, 2))
    error = (prediction - velocity.flatten(1, 2)) * block[:, None]  # the other dimensions would learn from themselves
    loss = error.square().mean()
    take_step(learner.policy_optimizer, loss)
    metrics |= {"losses/actor": loss.detach(), "policy/effective_sample_size": sample_size.mean()}
    return metrics | {"policy/entropy": (entropy.mean(1) / block.sum(-1)).mean()}


def update_gaussian(learner: Learner, state: Tensor, obs: Tensor) -> dict[str, Tensor]:
    """One step of every Gaussian down its KL to the energy-based policy, reparameterised, at state [B, S].

    The policies see obs [N, B, O]. One pass over the joint action serves all agents: the gradient for agent i goes
    through a_i alone.
    """
    temperature = learner.log_temperature.detach().exp()
    actions, log_prob = learner.policy.rsample(obs)
    loss = ((temperature[:, None] * log_prob).sum(0) - learner.critic(state, actions)[0]).mean()
    take_step(learner.policy_optimizer, loss)
    entropy = -log_prob.detach().mean(1)
    num_dimensions = learner.mask.sum(-1)
    metrics = update_temperature(learner, entropy - learner.args.target_entropy * num_dimensions)
    return metrics | {"losses/actor": loss.detach(), "policy/entropy": (entropy / num_dimensions).mean()}


def update_temperature(learner: Learner, excess: Tensor) -> dict[str, Tensor]:
    """Lower the temperature of an agent whose entropy exceeds its target, by excess [N]; raise it where that is < 0."""
    take_step(learner.temperature_optimizer, (learner.log_temperature * excess).sum())
    return {"policy/temperature": learner.log_temperature.detach().exp().mean()}


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@torch.no_grad()
def policy_spread(learner: Learner, obs: Tensor, num_samples: int = 16) -> float:
    """Standard deviation of actions drawn at the same observation [N, B, O], mean over observations and dimensions."""
    samples = learner.policy.sample(obs.repeat(1, num_samples, 1)).unflatten(1, (num_samples, -1))
    return ((samples.std(1).mean(1) * learner.mask).sum() / learner.mask.sum()).item()


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    policy: nn.Module, args: Args, episodes: int, deterministic: bool, seed: int, video: Path | None = None
) -> np.ndarray:
    """Undiscounted team returns [episodes], played without touching training's random numbers.

    The first episode goes to the GIF `video`, if given.
    """
    envs = [StackedAgents(args, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
    waves, film = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(waves) * len(envs) < episodes:
            seeds, returns = episode_seeds(1, seed, len(waves), len(envs)), np.zeros(len(envs))
            obs = np.stack([env.reset(seed=int(s))[0]["obs"] for env, s in zip(envs, seeds)])
            playing = list(range(len(envs)))
            while playing:
                if video and not waves and 0 in playing:
                    film.append(envs[0].render()[::2, ::2])
                actions = policy.sample(torch.from_numpy(obs[playing]).transpose(0, 1), deterministic)
                for i, action in zip(playing, actions.transpose(0, 1).numpy()):
                    stacked, reward, terminated, truncated, _ = envs[i].step(action)
                    obs[i], returns[i] = stacked["obs"], returns[i] + reward
                    if terminated or truncated:
                        playing = [j for j in playing if j != i]
            waves.append(returns)
    if video:
        import imageio

        imageio.mimsave(video, film[:: math.ceil(len(film) / 200)], duration=50, loop=0)
    return np.concatenate(waves)[:episodes]


# ------------------------------------------------------------------------------------------------- files of a run


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""

    def require(name: str, valid: bool, choices: str) -> None:
        if not valid:
            raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not valid; it must be {choices}")

    for field in fields(args):
        smallest, value = (
            int(field.name not in ("seed", "agent_obsk", "learning_starts", "num_uniform")),
            getattr(args, field.name),
        )
        if field.type in (int, int | None) and value is not None:
            require(field.name, value >= smallest, f"a whole number of at least {smallest}")
    require("buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    for name in ("critic_lr", "actor_lr", "temperature_lr", "init_temperature"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require("gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require("tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    require("target_entropy", args.target_entropy < math.log(2), "below 0.69, the uniform policy's entropy")
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require("num_per_kernel", candidates > 1, "large enough for two candidates")
    require("sigmas", args.sigmas and all(0 < s <= 1 for s in args.sigmas), "one or more numbers above 0, at most 1")
    if args.capture_video:
        env = make_env(args, "rgb_array")
        env.reset()
        try:
            env.render()
        except Exception as error:
            reason = f"{type(error).__name__}; on a machine without a display, MUJOCO_GL=egl or osmesa may help"
            raise RunError(f"--capture-video: {args.scenario} cannot be drawn here ({reason})") from None


def check_finite(named_values: Iterable[tuple[str, Tensor]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not value.isfinite().all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


def task_name(args: Args) -> str:
    """The task in the name of a run folder, such as HalfCheetah-2x3."""
    return f"{args.scenario}-{args.agent_conf.replace('|', '-')}"


def run_arguments(args: Args) -> dict:
    """The arguments that define a run, as opposed to what to do with it."""
    return {k: v for k, v in asdict(args).items() if k not in ("resume", "evaluate", "capture_video", "track")}


def save_checkpoint(run_dir: Path, contents: dict) -> None:
    """Write checkpoint.pt so that a kill at any moment leaves a whole one, the old or the new."""
    torch.save(contents, run_dir / "checkpoint.pt.tmp")
    os.replace(run_dir / "checkpoint.pt.tmp", run_dir / "checkpoint.pt")


def load_checkpoint(flag: str, run_dir: Path, args: Args, free: tuple[str, ...] = ()) -> tuple[Args, dict]:
    """A run's arguments and the contents of its checkpoint. Loading executes no code (weights_only).

    Raises RunError if the checkpoint is missing, damaged or another script's, or if `args` ask for another run than
    the one it holds. Arguments named in `free` may differ.
    """
    path = run_dir / "checkpoint.pt"
    if not path.is_file():
        runs = ", ".join(str(p.parent) for p in sorted(Path("runs").glob(f"{SCRIPT}__*/checkpoint.pt"))) or "none yet"
        raise RunError(f"{flag}: there is no checkpoint.pt in {str(run_dir)!r}; run folders here: {runs}")
    try:
        checkpoint = torch.load(path, weights_only=True)
        script, stored = checkpoint["script"], checkpoint["args"]
    except Exception as error:  # whatever torch.load raises at a truncated or foreign file
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
    return replace(args, **{name: value for name, value in stored.items() if name not in asked}), checkpoint


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
    """Train one team; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation;
    final_return, their mean; env_steps_per_second. Raises RunError for bad arguments and for NaN.
    """
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        args, checkpoint = load_checkpoint("--resume", run_dir, args)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    env, mask = make_vector_env(args), StackedAgents(args).action_mask()
    (num_agents, obs_size), (state_size,) = (env.single_observation_space[name].shape for name in ("obs", "state"))
    learner = Learner(args, num_agents, obs_size, mask.shape[1], state_size, mask)
    shapes = Batch((num_agents, obs_size), mask.shape, (), (), (num_agents, obs_size), (state_size,), (state_size,))
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps + args.num_envs), shapes)
    global_step, episode, updates, seconds, episode_return, rows = 0, 0, 0, 0.0, math.nan, []
    if checkpoint:
        learner.load_state_dict(checkpoint["learner"])
        for optimizer, state in zip(learner.optimizers(), checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        buffer.load_state_dict(checkpoint["buffer"])
        torch.set_rng_state(checkpoint["rng"])
        global_step, episode, updates, seconds, episode_return, rows = checkpoint["progress"]
    else:
        name = f"{SCRIPT}__{task_name(args)}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        run_dir = Path("runs") / name
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **run_arguments(args)}, indent=2))
    if args.track:
        start_tracking(args, run_dir)
    writer = SummaryWriter(run_dir, purge_step=global_step)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", desc=task_name(args), mininterval=1)
    first_step, started = global_step, time.monotonic()
    last_checkpoint = global_step if checkpoint else -args.checkpoint_interval

    def save() -> None:
        check_finite(learner.named_parameters(), global_step)
        contents = {
            "script": SCRIPT,
            "args": run_arguments(args),
            "progress": [global_step, episode, updates, seconds + time.monotonic() - started, episode_return, rows],
            "learner": learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers()],
            "buffer": buffer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(run_dir, contents)

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode in ("stochastic", "deterministic"):
            deterministic = mode == "deterministic"
            returns = evaluate(
                learner.policy, args, episodes, deterministic, global_step, video if deterministic else None
            )
            time_taken = round(seconds + time.monotonic() - started, 1)
            mean, std = float(returns.mean()), float(returns.std())
            rows.append(dict(zip(EVALUATION_COLUMNS, (global_step, time_taken, mode, mean, std, episodes))))
            writer.add_scalar(f"returns/{mode}", mean, global_step)
        write_evaluations(run_dir, rows)
        return returns  # of the deterministic policy

    def due(interval: int) -> bool:
        return global_step // interval > previous_step // interval

    obs, metrics = None, {}
    while global_step < args.total_timesteps:
        # A checkpoint cannot hold the state of any environment, so there all copies start anew, interrupted or not.
        if obs is None or global_step - last_checkpoint >= args.checkpoint_interval:
            if global_step - last_checkpoint >= args.checkpoint_interval:
                save()
                last_checkpoint = global_step
            seeds, returns = episode_seeds(0, args.seed, episode, args.num_envs), np.zeros(args.num_envs)
            obs = env.reset(seed=seeds.tolist())[0]
            episode += 1

        # Act.
        if global_step < args.learning_starts:
            actions = (2 * torch.rand(args.num_envs, *mask.shape) - 1) * mask
        else:
            actions = learner.policy.sample(torch.from_numpy(obs["obs"]).transpose(0, 1)).transpose(0, 1)
        check_finite([("the action", actions)], global_step)
        next_obs, reward, terminated, truncated, _ = env.step(actions.numpy())
        previous_step, global_step = global_step, global_step + args.num_envs

        # Store.
        check_finite([("the reward", torch.from_numpy(reward))], global_step)
        transition = obs["obs"], actions, reward, terminated, next_obs["obs"], obs["state"], next_obs["state"]
        buffer.add(*map(torch.as_tensor, transition))
        returns += reward
        ended = terminated | truncated
        if ended.any():
            episode_return = float(returns[ended].mean())
            next_obs, returns = env.reset(options={"reset_mask": ended})[0], np.where(ended, 0, returns)
        obs = next_obs

        # Learn.
        while args.learning_starts + updates * args.steps_per_update < global_step:
            metrics = update(learner, buffer.sample(args.batch_size))
            updates += 1

        # Log.
        progress.update(args.num_envs)
        if due(args.log_interval) and metrics:
            check_finite(metrics.items(), global_step)
            with torch.random.fork_rng(devices=[]):
                metrics["policy/spread"] = policy_spread(learner, buffer.sample(64).obs)
            metrics["policy/target_entropy"] = args.target_entropy
            metrics["steps_per_second"] = (global_step - first_step) / (time.monotonic() - started)
            metrics["returns/training"] = episode_return
            for name, value in metrics.items():
                writer.add_scalar(name, float(value), global_step)
            progress.set_postfix({"return": f"{episode_return:.2f}", "temp": f"{metrics['policy/temperature']:.4f}"})
        if due(args.eval_interval) and global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
    env_steps_per_second = (global_step - first_step) / (time.monotonic() - started)
    episodic_returns = log_evaluation(args.final_eval_episodes, run_dir / "final.gif" if args.capture_video else None)
    env.close()
    progress.close()
    writer.close()
    result = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("torch", "numpy", "gymnasium-robotics", "mujoco")}
    (run_dir / "result.json").write_text(json.dumps(result | {"versions": versions}, indent=2))
    return result


def play(args: Args) -> None:
    """--evaluate: play a run's policy and print its returns."""
    run_dir = Path(args.evaluate)
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, free=("seed", "final_eval_episodes", "num_threads"))
    check_args(args)
    env = StackedAgents(args)
    (num_agents, obs_size), (state_size,) = (env.observation_space[name].shape for name in ("obs", "state"))
    learner = Learner(args, num_agents, obs_size, env.action_space.shape[1], state_size, env.action_mask())
    learner.load_state_dict(checkpoint["learner"])
    for mode in ("stochastic", "deterministic"):
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        returns = evaluate(learner.policy, args, args.final_eval_episodes, mode == "deterministic", args.seed, video)
        print(f"{mode:13s} return {returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes")
        if video:
            print(f"{'':13s} video {video}")


def main(args: Args) -> None:
    """What the command line asks for; RunError becomes one line on standard error and exit code 1."""
    try:
        if args.evaluate:
            play(args)
        else:
            result = train(args)
            print(f"final return {result['final_return']:.2f}, run folder {result['run_dir']}")
    except RunError as error:
        raise SystemExit(f"{SCRIPT}.py: error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args))
