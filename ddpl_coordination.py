"""DDPL on a coordination game: why diffusion policies, in a minute.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction.

    python ddpl_coordination.py

N agents act once, each with a number in [-1, 1]. Alone, -0.7 and +0.7 pay the same; the team earns a bonus only when
all stand at +0.7. An agent that drops either peak before the team has met there may have dropped the wrong one.

1. Agents act with diffusion policies pi_i(a_i); joint actions and rewards go to a replay buffer.
2. A critic learns Q(a_1..a_N), and each agent's local critic what it means for its own action: E[Q(a_i, a_-i)].
3. Candidates for a_i, from a mixture of known density q, are weighed by w = exp(Q_i(a_i) / temperature_i) / q(a_i).
4. The denoiser learns E[a_i | x_t] under those weights (importance sampling score matching, ISSM).
5. temperature_i follows the entropy of the weights to a target entropy.

Compared with three others on the same critic: a Gaussian learned by the reparameterised KL, as in soft actor-critic;
the Gaussian with the mean and deviation of the energy-based policy, which needs no learning; and uniform actions.
All seeds train side by side, in one stack of weights. A run is short, so there are no checkpoints to resume.
"""

import csv
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize
from scipy.stats import binomtest, norm
from torch import Tensor, nn
from torch.nn import functional as F

Policy = Literal["diffusion", "gaussian", "moments", "uniform"]


@dataclass
class Args:
    """Run every policy on the coordination game, over all numbers of agents and seeds; write a figure and a CSV."""

    # Game
    game: Literal["joint", "match"] = "joint"
    """joint: a bonus when all agents stand at +0.7; match: a smooth one when all are on the same side."""
    num_agents: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of agents to play with, each from 1 to 8."""
    tolerance: float = 0.15
    """How close to +0.7 all agents must stand for the bonus."""
    bonus: float = 1.0
    """The team's bonus; an agent's own payoff is at most 1."""

    # Run
    policies: tuple[Policy, ...] = ("diffusion", "gaussian", "moments", "uniform")
    """Which policies to compare."""
    total_timesteps: int = 8_000
    """Joint actions in each run."""
    num_seeds: int = 20
    """Independent runs of each policy, trained side by side."""
    seed: int = 1
    """Seed of all runs."""
    num_processes: int = 2
    """Processes that share the work, one thread each."""
    full: bool = False
    """Also draw the figures that explain the result (one more minute)."""

    # Algorithm
    num_envs: int = 12
    """Joint actions played between updates."""
    learning_starts: int = 240
    """Joint actions played uniformly at first."""
    batch_size: int = 512
    """Joint actions in a critic update, and samples in a Gaussian's."""
    actor_batch_size: int = 16
    """Samples of the policy around which candidates are proposed."""
    hidden: int = 32
    """Width of all networks' two hidden layers."""
    critic_lr: float = 1e-2
    """Learning rate of the critics, central and local."""
    actor_lr: float = 1e-2
    """Learning rate of the diffusion policies."""
    gaussian_lr: float = 3e-2
    """Learning rate of the Gaussians, whose two parameters bear a higher one."""
    init_temperature: float = 0.05
    """Temperature of the energy-based policy at the start."""
    temperature_lr: float = 1e-2
    """Learning rate of the log-temperature."""
    target_entropy: float = -1.0
    """Entropy the temperature aims at, in nats (uniform: 0.69)."""
    denoising_steps: int = 10
    """T, the steps of the diffusion."""
    num_uniform: int = 4
    """Uniform candidates around each sample."""
    num_per_kernel: int = 3
    """Candidates per kernel width."""
    sigmas: tuple[float, ...] = (0.1, 0.3)
    """Widths of the kernels around the policy's sample."""
    num_noise_draws: int = 4
    """R, noisy points that the denoiser learns from around each sample."""


SCRIPT = "ddpl_coordination"
PEAK = 0.7  # of an agent's own payoff, and at -0.7
WIDTH = 0.2
GRID = torch.linspace(-1, 1, 201)[1::2]  # midpoints of 100 cells of the box, for quadrature


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


# ----------------------------------------------------------------------------------------------------------- game


def own_payoff(actions: Tensor) -> Tensor:
    """An agent's own payoff h(a_i) in (0, 1], with equal peaks at -0.7 and +0.7."""
    return torch.exp(-(((actions.abs() - PEAK) / WIDTH) ** 2) / 2)


def team_reward(actions: Tensor, args: Args) -> Tensor:
    """Reward [...] of joint actions [..., N]: the mean own payoff and the bonus for coordination.

    joint: the bonus for all agents within the tolerance of +0.7, so the best joint action is all +0.7. match: the bonus
    times the squared mean of the agents' smoothed signs, so all +0.7 and all -0.7 are equally best.
    """
    if args.game == "joint":
        agreement = success(actions, args).float()
    else:
        agreement = torch.tanh(actions / WIDTH).mean(-1).square()
    return own_payoff(actions).mean(-1) + args.bonus * agreement


def success(actions: Tensor, args: Args) -> Tensor:
    """Whether joint actions [..., N] stand within the tolerance of a best one: all +0.7 (match: or all -0.7)."""
    plus = ((actions - PEAK).abs() < args.tolerance).all(-1)
    return plus | ((actions + PEAK).abs() < args.tolerance).all(-1) if args.game == "match" else plus


def nash_gap(actions: Tensor, args: Args) -> Tensor:
    """What one agent could gain at most by its best response [S], from samples [S, K, N] of the joint policies.

    Responses are tried on a grid of 100 points; the samples of the others stand for their policies.
    """
    current, gaps = team_reward(actions, args).mean(1), []
    for agent in range(actions.shape[-1]):
        deviations = actions[:, None].repeat(1, len(GRID), 1, 1)  # [S, grid, K, N]
        deviations[..., agent] = GRID[:, None]
        gaps.append(team_reward(deviations, args).mean(2).amax(1) - current)
    return torch.stack(gaps).amax(0)


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


class MLP(nn.Module):
    """`stack` critics: [S, B, in] -> [S, B]. The joint actions' Q of every seed, and every agent's local Q_i(a_i)."""

    def __init__(self, stack: int, in_features: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList(StackedLinear(stack, *sizes) for sizes in ((in_features, hidden), (hidden, hidden)))
        self.value = StackedLinear(stack, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu_()
        return self.value(x).squeeze(-1)


class DiffusionPolicy(nn.Module):
    """`stack` denoisers of T steps of one action without observation (DDPM, Ho et al. 2020; v-prediction)."""

    def __init__(self, stack: int, hidden: int, num_steps: int):
        super().__init__()
        self.step = nn.Parameter(0.3 * torch.randn(stack, num_steps + 1, hidden))
        self.noisy_action = stacked_weight(stack, 1, hidden)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.velocity = StackedLinear(stack, hidden, 1)
        nn.init.zeros_(self.velocity.weight)
        self.alphas_bar = noise_schedule(num_steps)

    def forward(self, step: Tensor, x_t: Tensor) -> Tensor:
        """v [S, B, 1] of noisy actions [S, B, 1]; step [S, B or 1, H] is the embedding of t."""
        return self.velocity(F.silu(self.hidden(F.silu(torch.baddbmm(step, x_t, self.noisy_action)))))

    @torch.no_grad()
    def sample(self, batch_size: int) -> Tensor:
        """Actions [S, B, 1] in [-1, 1], by ancestral sampling."""
        x_t = torch.randn(len(self.step), batch_size, 1)
        for t in range(len(self.alphas_bar) - 1, 0, -1):
            mean, std = denoise_step(x_t, self(self.step[:, t, None], x_t), t, self.alphas_bar)
            x_t = mean + std * torch.randn_like(mean)
        return x_t


class GaussianPolicy(nn.Module):
    """`stack` tanh-Gaussians of one action without observation: a mean and a log standard deviation each."""

    def __init__(self, stack: int):
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(stack, 1, 1))
        self.log_std = nn.Parameter(torch.full((stack, 1, 1), -0.5))

    def rsample(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Reparameterised actions [S, B, 1] and their log-density [S, B]."""
        noise = torch.randn(len(self.mean), batch_size, 1)
        u = self.mean + self.log_std.exp() * noise
        log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
        log_prob = -0.5 * noise**2 - self.log_std - 0.5 * math.log(2 * math.pi) - log_det
        return torch.tanh(u), log_prob.sum(-1)

    @torch.no_grad()
    def sample(self, batch_size: int) -> Tensor:
        """Actions [S, B, 1] in [-1, 1]."""
        return self.rsample(batch_size)[0]


class MomentsPolicy(nn.Module):
    """`stack` Gaussians, clipped to [-1, 1], whose mean and deviation are set from outside."""

    def __init__(self, stack: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(stack, 1, 1))
        self.register_buffer("std", torch.ones(stack, 1, 1))

    def sample(self, batch_size: int) -> Tensor:
        """Actions [S, B, 1] in [-1, 1]."""
        return (self.mean + self.std * torch.randn(len(self.mean), batch_size, 1)).clamp(-1, 1)


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


# ------------------------------------------------------------------------------------- quadrature over one action


def boltzmann(energy: Tensor, temperature: Tensor | float) -> Tensor:
    """Density [..., G] on GRID of the policy proportional to exp(energy / temperature), energy [..., G]."""
    return (energy / temperature).softmax(-1) * len(GRID) / 2


def moments(density: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [...] of a density [..., G] on GRID."""
    mass = density * 2 / len(GRID)
    mean = (mass * GRID).sum(-1)
    return mean, (mass * (GRID - mean[..., None]) ** 2).sum(-1).sqrt()


def entropy_of(density: Tensor) -> Tensor:
    """Entropy [...] in nats of a density [..., G] on GRID."""
    return torch.special.entr(density).sum(-1) * 2 / len(GRID)


# -------------------------------------------------------------------------------------------------------- learner


class Learner:
    """What training changes. The stack of policies holds the N agents of seed 1, then those of seed 2, and so on."""

    def __init__(self, args: Args, policy: Policy, num_agents: int):
        self.args, self.num_agents, self.num_seeds = args, num_agents, args.num_seeds
        stack = args.num_seeds * num_agents
        self.critic = MLP(args.num_seeds, num_agents, args.hidden)
        self.local_critic = MLP(stack, 1, args.hidden)
        self.log_temperature = nn.Parameter(torch.full((stack,), math.log(args.init_temperature)))
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, fused=True)
        self.local_critic_optimizer = torch.optim.Adam(self.local_critic.parameters(), args.critic_lr, fused=True)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], args.temperature_lr, fused=True)
        if policy == "diffusion":
            self.policy = DiffusionPolicy(stack, args.hidden, args.denoising_steps)
        else:
            self.policy = GaussianPolicy(stack) if policy == "gaussian" else MomentsPolicy(stack)
        if policy in ("diffusion", "gaussian"):
            learning_rate = args.actor_lr if policy == "diffusion" else args.gaussian_lr
            self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), learning_rate, fused=True)

    def joint(self, actions: Tensor) -> Tensor:
        """Actions [S N, B, 1] of the stack as joint actions [S, B, N]."""
        return actions.view(self.num_seeds, self.num_agents, -1).transpose(1, 2)

    def score(self, actions: Tensor, candidates: Tensor) -> Tensor:
        """Q [S N, M, B] where an agent plays each of its candidates [S N, M, B, 1], the others actions [S N, B, 1]."""
        own = torch.eye(self.num_agents)[:, None, None]
        joint = self.joint(actions)[:, None, None] * (1 - own)  # [S, N, 1, B, N]
        joint = joint + candidates.view(self.num_seeds, self.num_agents, *candidates.shape[1:]) * own
        with torch.no_grad():
            return self.critic(joint.flatten(1, 3)).view(candidates.shape[:3])


def update_critic(learner: Learner, actions: Tensor, reward: Tensor) -> None:
    """Fit Q to the rewards [S, B] of joint actions [S, B, N]: there is no next state."""
    take_step(learner.critic_optimizer, (learner.critic(actions) - reward).square().mean(1).sum())


def update_local_critic(learner: Learner, actions: Tensor, candidates: Tensor) -> Tensor:
    """Move each Q_i(a_i) to Q at candidates [S N, M, B, 1], where the others play actions [S N, B, 1].

    What the others add to all candidates alike is noise, so only differences between candidates count. Returns Q_i
    [S N, M, B] there, from before the step.
    """
    local_q = learner.local_critic(candidates.flatten(1, 2)).view(candidates.shape[:3])
    take_step(learner.local_critic_optimizer, (local_q - learner.score(actions, candidates)).var(1).mean(1).sum())
    return local_q.detach()


def update_diffusion(learner: Learner, actions: Tensor) -> None:
    """One ISSM step of every agent's denoiser, at actions [S N, B, 1] that the policies have just drawn."""
    candidates, log_q = propose(learner.args, actions)
    q = update_local_critic(learner, actions, candidates)
    weights, _, entropy = issm_weights(q, log_q, learner.log_temperature.detach().exp())
    update_temperature(learner, entropy.mean(1) - learner.args.target_entropy)
    match(learner, candidates, weights)


def propose(args: Args, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [S, M, B, 1] around actions [S, B, 1], and their log-density, without a Langevin step."""
    sigmas = torch.tensor(args.sigmas)
    no_drift = torch.zeros(len(sigmas), 1, 1, 1)
    return propose_actions(actions, no_drift, sigmas, args.num_uniform, args.num_per_kernel)


def match(learner: Learner, candidates: Tensor, weights: Tensor) -> None:
    """Teach the denoisers the exact denoiser of the weighted candidates, at noisy points around resampled ones."""
    args, policy = learner.args, learner.policy
    chances = weights.transpose(1, 2).flatten(0, 1).nan_to_num(1)  # multinomial raises at NaN; the loss shows it
    draws = chances.multinomial(args.num_noise_draws, replacement=True)
    draws = draws.view(len(weights), -1, args.num_noise_draws).transpose(1, 2)  # [S N, R, B]
    x_0 = candidates.gather(1, draws[..., None])
    t = torch.randint(1, args.denoising_steps + 1, draws.shape)
    alpha_bar = policy.alphas_bar[t]
    signal, noise = alpha_bar.sqrt()[..., None], (1 - alpha_bar).sqrt()[..., None]
    x_t = signal * x_0 + noise * torch.randn_like(x_0)
    velocity = (signal * x_t - issm_target(x_t, alpha_bar, candidates, weights)) / noise
    step = F.one_hot(t, args.denoising_steps + 1).float().flatten(1, 2)
    error = policy(step @ policy.step, x_t.flatten(1, 2)) - velocity.flatten(1, 2)
    take_step(learner.policy_optimizer, error.square().mean((1, 2)).sum())


def update_gaussian(learner: Learner, _: Tensor) -> None:
    """One step of every Gaussian down its KL to the energy-based policy, at reparameterised actions of its own."""
    temperature = learner.log_temperature.detach().exp()
    actions, log_prob = learner.policy.rsample(learner.args.batch_size)
    q = learner.critic(learner.joint(actions))
    take_step(learner.policy_optimizer, (temperature[:, None] * log_prob).mean(1).sum() - q.mean(1).sum())
    update_temperature(learner, -log_prob.detach().mean(1) - learner.args.target_entropy)


def update_moments(learner: Learner, actions: Tensor) -> None:
    """Give every Gaussian the mean and deviation of its energy-based policy, by quadrature of the local critic."""
    candidates = 2 * torch.rand(len(actions), 8, *actions.shape[1:]) - 1
    update_local_critic(learner, actions, candidates)
    with torch.no_grad():
        q = learner.local_critic(GRID[:, None].expand(len(actions), -1, -1))
    density = boltzmann(q, learner.log_temperature.detach().exp()[:, None])
    mean, std = moments(density)
    learner.policy.mean, learner.policy.std = mean[:, None, None], std[:, None, None]
    update_temperature(learner, entropy_of(density) - learner.args.target_entropy)


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


# ------------------------------------------------------------------------------------------------------- training


def learn(args: Args, policy: Policy, num_agents: int) -> dict[str, np.ndarray]:
    """Train `policy` with all seeds side by side; returns arrays.

    first_success [S]: joint actions until the first success, or total_timesteps + 1 if there was none.
    final_success, final_return, nash_gap [S]: of 1,000 joint actions of the final policies.
    With --full also gaps [20, S]: Nash gaps over training; snapshots [20, N, 500]: actions of the first seed's agents
    over training; and energy [N, G]: what they are worth at the end, E[Q(a_i, a_-i)] on GRID.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    learner = Learner(args, policy, num_agents)
    update_policy = {"diffusion": update_diffusion, "gaussian": update_gaussian, "moments": update_moments}.get(policy)
    steps = range(0, args.total_timesteps, args.num_envs)
    actions = torch.empty(args.num_seeds, len(steps) * args.num_envs, num_agents)
    rewards = torch.empty(actions.shape[:2])
    first_success = torch.full((args.num_seeds,), args.total_timesteps + 1)
    snapshots, gaps = [], []
    for step in steps:
        # Act.
        if step < args.learning_starts or policy == "uniform":
            new = 2 * torch.rand(args.num_seeds, args.num_envs, num_agents) - 1
        else:
            drawn = learner.policy.sample(args.num_envs + args.actor_batch_size)
            new = learner.joint(drawn[:, : args.num_envs])
        hits = success(new, args)
        when = torch.where(hits, step + 1 + torch.arange(args.num_envs), args.total_timesteps + 1)
        first_success = torch.minimum(first_success, when.amin(1))

        # Store.
        played = step + args.num_envs
        actions[:, step:played], rewards[:, step:played] = new, team_reward(new, args)

        # Learn.
        if step >= args.learning_starts and update_policy:
            rows = torch.randint(played, (args.batch_size,))
            update_critic(learner, actions[:, rows], rewards[:, rows])
            update_policy(learner, drawn[:, args.num_envs :])

        # Look.
        if played * 20 // args.total_timesteps > step * 20 // args.total_timesteps:
            if not new.isfinite().all():
                raise RunError(f"the actions of the {policy} policy are NaN after {played} joint actions")
            if args.full and policy != "uniform":
                with torch.random.fork_rng(devices=[]):  # a run is the same with and without its figures
                    snapshot = learner.joint(learner.policy.sample(500))
                snapshots.append(snapshot[0].T)
                gaps.append(nash_gap(snapshot[:, :100], args))

    outcome = {"first_success": first_success}
    if policy == "uniform":
        final = 2 * torch.rand(args.num_seeds, 1000, num_agents) - 1
    else:
        final = learner.joint(learner.policy.sample(1000))
    if args.full and policy != "uniform":
        others = learner.policy.sample(200)
        energy = learner.score(others, GRID[:, None, None].expand(len(others), -1, 200, 1))[:num_agents].mean(2)
        outcome |= {"snapshots": torch.stack(snapshots), "gaps": torch.stack(gaps), "energy": energy}
    outcome["final_success"] = success(final, args).float().mean(1)
    outcome["final_return"] = team_reward(final, args).mean(1)
    outcome["nash_gap"] = nash_gap(final[:, :200], args)
    return {name: value.numpy() for name, value in outcome.items()}


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""

    def require(name: str, valid: bool, choices: str) -> None:
        if not valid:
            raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not valid; it must be {choices}")

    require("num_agents", args.num_agents and all(1 <= n <= 8 for n in args.num_agents), "one or more of 1 to 8")
    require("policies", args.policies, "one or more of diffusion, gaussian, moments, uniform")
    require("full", not args.full or set(args.policies) != {"uniform"}, "used with a policy that learns")
    require("tolerance", 0 < args.tolerance <= 1 - PEAK, "above 0, at most 0.3, so that it stays inside the box")
    require("bonus", 0 < args.bonus < math.inf, "a number above 0, or there is nothing to coordinate")
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require("num_per_kernel", candidates > 1, "large enough for two candidates")
    require("sigmas", args.sigmas and all(0 < s <= 1 for s in args.sigmas), "one or more numbers above 0, at most 1")
    require("target_entropy", args.target_entropy < math.log(2), "below 0.69, the uniform policy's entropy")
    for name in ("critic_lr", "actor_lr", "gaussian_lr", "init_temperature", "temperature_lr"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    for name in ("num_seeds", "num_processes", "num_envs", "batch_size", "actor_batch_size", "hidden"):
        require(name, getattr(args, name) >= 1, "a whole number of at least 1")
    for name in ("denoising_steps", "num_per_kernel", "num_noise_draws", "learning_starts"):
        require(name, getattr(args, name) >= 1, "a whole number of at least 1")
    require("num_uniform", args.num_uniform >= 0, "a whole number of at least 0")
    require("total_timesteps", args.total_timesteps >= 20 * args.num_envs, "at least 20 times --num-envs")


def train(args: Args) -> dict:
    """Train every policy with every number of agents; write a CSV and figures to the run folder.

    Returns run_dir; global_step, the joint actions of all runs; episodic_returns, the final return of each seed of the
    first policy with the most agents, and final_return, their mean; env_steps_per_second; and rows, those of the CSV.
    Raises RunError for bad arguments and for NaN.
    """
    check_args(args)
    started = time.monotonic()
    run_dir = Path("runs") / f"{SCRIPT}__{args.game}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2))
    jobs = sorted(product(args.policies, args.num_agents), key=lambda job: -job[1])  # the longest first
    with ProcessPoolExecutor(args.num_processes, get_context("spawn")) as pool:
        runs = dict(zip(jobs, pool.map(learn, repeat(args), *zip(*jobs))))
    rows = [
        {"policy": policy, "num_agents": n, "seed": seed}
        | {name: runs[policy, n][name][seed].item() for name in OUTCOMES}
        for policy, n in product(args.policies, args.num_agents)
        for seed in range(args.num_seeds)
    ]
    with open(run_dir / "coordination.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot_success(args, runs, run_dir / "success.png")
    if args.full:
        plot_training(args, runs, run_dir / "training.png")
        plot_nash_gap(args, runs, run_dir / "nash_gap.png")
        plot_exact(args, run_dir / "exact.png")
        plot_issm(args, run_dir / "issm.png")
    episodic_returns = runs[args.policies[0], max(args.num_agents)]["final_return"].tolist()
    result = {
        "run_dir": str(run_dir),
        "global_step": len(rows) * args.total_timesteps,
        "final_return": float(np.mean(episodic_returns)),
        "episodic_returns": episodic_returns,
        "env_steps_per_second": len(rows) * args.total_timesteps / (time.monotonic() - started),
    }
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    return result | {"rows": rows}


# -------------------------------------------------------------------------------------------------------- figures

COLORS = {"diffusion": "tab:blue", "gaussian": "tab:orange", "moments": "tab:green", "uniform": "tab:gray"}
OUTCOMES = ("first_success", "final_success", "final_return", "nash_gap")


def interval(values: np.ndarray, statistic=np.mean, repeats: int = 2000) -> np.ndarray:
    """95 % percentile bootstrap [2, ...] of a statistic over the first axis, the seeds."""
    rows = np.random.default_rng(0).integers(len(values), size=(repeats, len(values)))
    return np.percentile(statistic(values[rows], axis=1), [2.5, 97.5], axis=0)


def solved(run: dict) -> np.ndarray:
    """[S] which seeds' final teams succeed in more than half of their plays."""
    return run["final_success"] > 0.5


def plot_success(args: Args, runs: dict, path: Path) -> None:
    """Samples to the first success, and the share of seeds whose final team succeeds, against the number of agents."""
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="tight")
    left, right = figure.subplots(1, 2)
    for policy, shift in zip(args.policies, np.linspace(-0.12, 0.12, len(args.policies))):
        color, ns = COLORS[policy], np.array(args.num_agents) + shift
        first = [runs[policy, n]["first_success"] for n in args.num_agents]
        median = np.array([np.median(values) for values in first])
        bars = np.abs(np.array([interval(values, np.median) for values in first]).T - median)
        left.errorbar(ns, median, bars, color=color, marker="o", capsize=3, label=policy)
        wins = [solved(runs[policy, n]).sum() for n in args.num_agents]
        share = np.array(wins) / args.num_seeds
        wilson = [binomtest(int(k), args.num_seeds).proportion_ci(method="wilson") for k in wins]
        bars = np.abs(np.array([(ci.low, ci.high) for ci in wilson]).T - share)
        right.errorbar(ns, share, bars, color=color, marker="o", capsize=3)
    left.axhline(args.total_timesteps, color="black", linewidth=0.5, linestyle=":")
    left.set(yscale="log", ylabel="joint actions to the first success (median)")
    right.set(ylim=(-0.05, 1.05), ylabel=f"final teams that coordinate (of {args.num_seeds} seeds)")
    for axes in (left, right):
        axes.set(xlabel="agents", xticks=args.num_agents)
    left.legend()
    figure.savefig(path)


def plot_training(args: Args, runs: dict, path: Path) -> None:
    """One run of each policy: every agent's density over training, and the final energy (its local critic)."""
    n, policies = max(args.num_agents), [policy for policy in args.policies if policy != "uniform"]
    figure = Figure(figsize=(2.2 * (n + 1), 2.1 * len(policies)), dpi=70, layout="tight")
    for row, policy in zip(figure.subplots(len(policies), n + 1, squeeze=False, sharey=True), policies):
        run = runs[policy, n]
        for agent in range(n):
            drawn = run["snapshots"][:, agent]  # [20, 500]
            density = [np.histogram(actions, bins=50, range=(-1, 1), density=True)[0] for actions in drawn]
            extent = (0, args.total_timesteps, -1, 1)
            row[agent].imshow(np.array(density).T, origin="lower", aspect="auto", extent=extent, vmax=3)
            row[agent].set(title=f"{policy}, agent {agent + 1}", xlabel="joint actions")
            row[agent].tick_params(labelsize=7)
            energy = run["energy"][agent]
            row[n].plot(energy - energy.max(), GRID, label=f"agent {agent + 1}")
        row[0].set(ylabel="action")
        row[n].set(title="energy at the end")
    figure.savefig(path)


def plot_nash_gap(args: Args, runs: dict, path: Path) -> None:
    """What one agent could gain alone, over training: mean and interval over seeds, for every number of agents."""
    figure = Figure(figsize=(2.6 * len(args.num_agents), 2.8), dpi=90, layout="tight")
    (axes,) = figure.subplots(1, len(args.num_agents), squeeze=False, sharey=True)
    for n, plot in zip(args.num_agents, axes):
        for policy in (policy for policy in args.policies if policy != "uniform"):
            gaps = runs[policy, n]["gaps"]  # [20, S]
            steps = np.linspace(0, args.total_timesteps, len(gaps) + 1)[1:]
            plot.plot(steps, gaps.mean(1), color=COLORS[policy], label=policy)
            plot.fill_between(steps, *interval(gaps.T), color=COLORS[policy], alpha=0.2, linewidth=0)
        plot.set(title=f"{n} agents" if n > 1 else "1 agent", xlabel="joint actions")
    axes[0].set(ylabel="gain of the best response")
    axes[0].legend()
    figure.savefig(path)


def before_the_bonus(args: Args) -> Tensor:
    """Density [G] of the energy-based policy of an agent that knows its own payoff alone, at the target entropy.

    The critic's scale and the number of agents cancel against the temperature, so this holds for any N.
    """
    payoff = own_payoff(GRID)
    excess = lambda temperature: (entropy_of(boltzmann(payoff, temperature)) - args.target_entropy).item()  # noqa: E731
    return boltzmann(payoff, brentq(excess, 1e-3, 1e3))


def gaussian_kl(density: Tensor) -> tuple[float, float]:
    """Mean and standard deviation, before the tanh, of the tanh-Gaussian of least KL to a density [G] on GRID.

    The reverse KL, which the reparameterised gradient descends. Started right of 0, it finds the right-hand mode.
    """

    def kl(parameters) -> float:
        u = np.random.default_rng(0).normal(size=4000) * math.exp(parameters[1]) + parameters[0]
        a = np.tanh(u)
        log_prob = -0.5 * ((u - parameters[0]) / math.exp(parameters[1])) ** 2 - parameters[1] - np.log1p(-(a**2))
        return float(np.mean(log_prob - np.interp(a, GRID.numpy(), density.log().numpy())))

    mean, log_std = minimize(kl, (0.8, -1.5), method="Nelder-Mead").x
    return mean, math.exp(log_std)


def fit_issm(args: Args, num_updates: int = 1000) -> DiffusionPolicy:
    """num_seeds denoisers trained by ISSM on the energy of before_the_bonus itself: no critic, a fixed temperature."""
    torch.manual_seed(args.seed)
    learner, log_density = Learner(args, "diffusion", 1), before_the_bonus(args).log()
    for _ in range(num_updates):
        candidates, log_q = propose(args, learner.policy.sample(args.actor_batch_size))
        cells = ((candidates[..., 0] + 1) / 2 * len(GRID)).long().clamp(0, len(GRID) - 1)
        weights, _, _ = issm_weights(log_density[cells], log_q, torch.ones(len(candidates)))
        match(learner, candidates, weights)
    return learner.policy


def chances(args: Args, fits: Tensor) -> dict[str, np.ndarray]:
    """Each policy's chance [K] to stand within the tolerance of +0.7 while it knows its own payoff alone.

    K is the number of equally likely outcomes: the fits of fit_issm, of which `fits` [K, B] are samples, and the two
    modes that the reverse KL may pick.
    """
    density, low, high = before_the_bonus(args), PEAK - args.tolerance, PEAK + args.tolerance
    mean, std = (value.item() for value in moments(density))
    kl_mean, kl_std = gaussian_kl(density)

    def between(mean: float, std: float, low: float, high: float) -> float:
        return norm.cdf(high, mean, std) - norm.cdf(low, mean, std)

    chosen = [between(sign * kl_mean, kl_std, math.atanh(low), math.atanh(high)) for sign in (1, -1)]
    return {
        "energy-based policy": density[(GRID > low) & (GRID < high)].sum(0, keepdim=True).numpy() * 2 / len(GRID),
        "its ISSM fit": ((fits - PEAK).abs() < args.tolerance).float().mean(1).numpy(),
        "Gaussian, its mean and deviation": np.array([between(mean, std, low, high)]),
        "Gaussian, least KL": np.array(chosen),
        "uniform": np.array([args.tolerance]),
    }


def meeting(chance: np.ndarray, num_agents: int, tries: int = 1000) -> tuple[float, float]:
    """Chance to meet at +0.7 in one try, and in at least one of many, of a team that draws its agents from `chance`."""
    team = np.random.default_rng(0).choice(chance, (20_000, num_agents)).prod(1)
    return team.mean(), (1 - (1 - team) ** tries).mean()


def plot_exact(args: Args, path: Path) -> None:
    """What each policy class makes of the same energy, and the chance that N agents meet at +0.7: no learned critic."""
    figure = Figure(figsize=(12, 3.4), dpi=90, layout="tight")
    left, one, many = figure.subplots(1, 3)
    density, grid = before_the_bonus(args), GRID.numpy()
    left.plot(grid, density, color="black")
    fits = fit_issm(args).sample(4000)[..., 0]
    left.hist(fits.flatten().numpy(), bins=100, range=(-1, 1), density=True, color=COLORS["diffusion"], alpha=0.5)
    mean, std = (value.item() for value in moments(density))
    left.plot(grid, norm.pdf(grid, mean, std), color=COLORS["moments"])
    mean, std = gaussian_kl(density)
    left.plot(grid, norm.pdf(np.arctanh(grid), mean, std) / (1 - grid**2), color=COLORS["gaussian"])
    left.set(xlabel="action", ylabel="density")
    colors = ["black", COLORS["diffusion"], COLORS["moments"], COLORS["gaussian"], COLORS["uniform"]]
    ns = np.arange(1, 9)
    for (name, chance), color in zip(chances(args, fits).items(), colors):
        single, repeated = np.array([meeting(chance, n) for n in ns]).T
        one.plot(ns, single, marker="o", color=color)
        many.plot(ns, repeated, marker="o", color=color, label=name)
    one.set(yscale="log", title="all at +0.7, in one try")
    many.set(ylim=(-0.05, 1.05), title="at least once in 1,000 tries")
    for axes in (one, many):
        axes.set(xlabel="agents", xticks=ns)
    many.legend(fontsize=7)
    figure.savefig(path)


def issm_error(dim: int, num_candidates: int, num_uniform: int, repeats: int = 400) -> tuple[float, float]:
    """Root mean squared error per dimension of ISSM's score, and the effective sample size.

    The target has two modes per dimension, a mixture of Gaussians at +-0.4 of deviation 0.12; its score at the noise
    level alpha_bar = 0.5 is known in closed form. Of the candidates num_uniform are uniform, the rest kernels of widths
    0.1 and 0.3 around a sample of the target.
    """
    alpha_bar, variance = torch.tensor(0.5), 0.12**2
    sign = torch.randint(2, (2, 1, repeats, dim)) * 2.0 - 1
    anchor, x_0 = 0.4 * sign + variance**0.5 * torch.randn(2, 1, repeats, dim)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * torch.randn_like(x_0)
    kernels = (num_candidates - num_uniform) // 2
    sigmas = torch.tensor([0.1, 0.3]) if kernels else torch.empty(0)
    no_drift = torch.zeros(len(sigmas), 1, 1, 1)
    candidates, log_q = propose_actions(anchor, no_drift, sigmas, num_uniform, kernels)
    log_p = torch.logaddexp(*(-((candidates - m) ** 2) / (2 * variance) for m in (-0.4, 0.4))).sum(-1)
    weights, _, _ = issm_weights(log_p, log_q, torch.ones(1))
    estimate = issm_target(x_t[:, None], alpha_bar.expand(1, 1, repeats), candidates, weights)[:, 0]
    marginal = alpha_bar * variance + 1 - alpha_bar  # variance of either mode of x_t
    modes = alpha_bar.sqrt() * torch.tensor([-0.4, 0.4])
    share = (-((x_t[..., None] - modes) ** 2) / (2 * marginal)).softmax(-1)
    score = ((modes - x_t[..., None]) / marginal * share).sum(-1)
    error = (alpha_bar.sqrt() * estimate - x_t) / (1 - alpha_bar) - score
    return error.square().mean().sqrt().item(), (1 / weights.square().sum(1)).mean().item()


def plot_issm(args: Args, path: Path) -> None:
    """Error of ISSM's score against the number of candidates, and the effective sample size against the dimension."""
    torch.manual_seed(args.seed)
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="tight")
    left, right = figure.subplots(1, 2)
    sizes = np.array([16, 64, 256, 1024, 4096])
    for dim in (1, 2, 4):
        errors = [issm_error(dim, size, size // 4)[0] for size in sizes]
        slope = np.polyfit(np.log(sizes[1:]), np.log(errors[1:]), 1)[0]
        left.loglog(sizes, errors, marker="o", label=f"d = {dim}, slope {slope:.2f}")
    left.set(xlabel="candidates M", ylabel="error of the score, per dimension")
    dims = [1, 2, 3, 4, 6, 9]
    for num_uniform, name in ((16, "uniform"), (8, "half uniform"), (4, "a quarter uniform"), (0, "kernels alone")):
        right.plot(dims, [issm_error(dim, 16, num_uniform)[1] for dim in dims], marker="o", label=name)
    right.set(xlabel="dimension of the action", ylabel="effective sample size of 16 candidates", xticks=dims)
    left.legend()
    right.legend()
    figure.savefig(path)


def print_table(args: Args, rows: list[dict]) -> None:
    """One line for every policy and number of agents."""
    print(f"{'policy':10} agents  first success (median)  final teams that coordinate  return  Nash gap")
    for policy, n in product(args.policies, args.num_agents):
        first, wins, returns, gap = (
            np.array([row[name] for row in rows if row["policy"] == policy and row["num_agents"] == n])
            for name in OUTCOMES
        )
        median = f"{np.median(first):.0f}" if np.median(first) <= args.total_timesteps else "never"
        coordinated = f"{(wins > 0.5).sum()} of {len(wins)}"
        print(f"{policy:10} {n:6}  {median:>22}  {coordinated:>27}  {returns.mean():6.2f}  {gap.mean():8.2f}")


def main(args: Args) -> None:
    """What the command line asks for; RunError becomes one line on standard error and exit code 1."""
    try:
        result = train(args)
    except RunError as error:
        raise SystemExit(f"{SCRIPT}.py: error: {error}") from None
    print_table(args, result["rows"])
    print(f"run folder {result['run_dir']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
