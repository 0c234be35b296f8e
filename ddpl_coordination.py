"""DDPL on a coordination game: why diffusion policies, in two minutes.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction.

    python ddpl_coordination.py

N agents act once, each with a number in [-1, 1]. Alone, -0.7 and +0.7 pay the same; the team earns a bonus only when
all stand at +0.7. An agent that drops either peak before the team has met there may have dropped the wrong one.

1. Agents act with diffusion policies pi_i(a_i); joint actions and rewards are stored.
2. A critic learns Q(a_1..a_N), and each agent's local critic what it means for its own action: E[Q(a_i, a_-i)].
3. Candidates for a_i, from a mixture of known density q, are weighed by w = exp(Q_i(a_i) / temperature_i) / q(a_i).
4. The denoiser learns E[a_i | x_t] under those weights (importance sampling score matching, ISSM).
5. temperature_i follows the entropy of the weights to a target entropy.

Compared with a Gaussian on the same critic, learned by the reparameterised KL as in soft actor-critic, and with uniform
actions. All seeds train side by side, in one stack of weights. A run is short, so there are no checkpoints to resume.

To fork it for another game of one step, rewrite own_payoff, team_reward and success. Where agents observe something or
act more than once, start from ddpl_mpe.py: what has the same name there means the same.
"""

import csv
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from inspect import formatannotation
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """Run every policy on the coordination game, over all numbers of agents and seeds; write a figure and a CSV."""

    # What is played, and how often
    game: Literal["joint", "match"] = "joint"
    """joint: a bonus when all agents stand at +0.7; match: a smooth one when all are on the same side."""
    num_agents: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of agents to play with, each from 1 to 8."""
    tolerance: float = 0.15
    """How close to +0.7 all agents must stand for the bonus."""
    bonus: float = 1.0
    """The team's bonus; an agent's own payoff is at most 1."""
    total_timesteps: int = 8_000
    """Joint actions in each run."""
    num_seeds: int = 20
    """Independent runs of each policy, trained side by side."""
    seed: int = 1
    """Seed of all runs."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    """Where to train: auto is CUDA if there is one. Networks as small as these are no faster there."""

    # Critics, policies and ISSM
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


Runs = dict[tuple[str, int], dict[str, np.ndarray]]  # what learn returns, for each policy and number of agents
PEAK = 0.7  # of an agent's own payoff, and at -0.7
WIDTH = 0.2
# What is compared, and its colours
POLICY_COLORS = {"diffusion": "tab:blue", "gaussian": "tab:orange", "uniform": "tab:gray"}


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


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
    at_plus = ((actions - PEAK).abs() < args.tolerance).all(-1)
    at_minus = ((actions + PEAK).abs() < args.tolerance).all(-1)
    return at_plus | at_minus if args.game == "match" else at_plus


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


class Critic(nn.Module):
    """`stack` critics: [S, B, in] -> [S, B]. The joint actions' Q of every seed, and every agent's local Q_i(a_i)."""

    def __init__(self, stack: int, in_features: int, hidden: int):
        super().__init__()
        self.actions = StackedLinear(stack, in_features, hidden)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.value = StackedLinear(stack, hidden, 1)

    def forward(self, actions: Tensor) -> Tensor:
        hidden = self.actions(actions).relu_()
        return self.value(self.hidden(hidden).relu_()).squeeze(-1)


class DiffusionPolicy(nn.Module):
    """`stack` denoisers of T steps of one action without observation (DDPM, Ho et al. 2020; v-prediction)."""

    def __init__(self, stack: int, hidden: int, num_steps: int):
        super().__init__()
        self.time = nn.Parameter(0.3 * torch.randn(stack, num_steps + 1, hidden))
        self.noisy_action = stacked_weight(stack, 1, hidden)
        self.hidden = StackedLinear(stack, hidden, hidden)
        self.velocity = StackedLinear(stack, hidden, 1)
        nn.init.zeros_(self.velocity.weight)
        self.register_buffer("alphas_bar", noise_schedule(num_steps))

    def forward(self, time: Tensor, x_t: Tensor) -> Tensor:
        """v [S, B, 1] of noisy actions [S, B, 1]; time [S, B or 1, H] is the embedding of t."""
        hidden = F.silu(torch.baddbmm(time, x_t, self.noisy_action))
        return self.velocity(F.silu(self.hidden(hidden)))

    @torch.no_grad()
    def sample(self, batch_size: int) -> Tensor:
        """Actions [S, B, 1] in [-1, 1], by ancestral sampling."""
        x_t = torch.randn(len(self.time), batch_size, 1)
        for t in range(len(self.alphas_bar) - 1, 0, -1):
            v = self(self.time[:, t, None], x_t)
            mean, std = denoise_step(x_t, v, t, self.alphas_bar)
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
        actions, _ = self.rsample(batch_size)
        return actions


# ------------------------------------------------------------------------------------------- learner and its updates


class Learner(nn.Module):
    """What training changes. The stack of policies holds the N agents of seed 1, then those of seed 2, and so on."""

    def __init__(self, args: Args, policy: str, num_agents: int):
        super().__init__()
        self.args = args
        self.num_agents = num_agents
        stack = args.num_seeds * num_agents
        self.critic = Critic(args.num_seeds, num_agents, args.hidden)
        self.local_critic = Critic(stack, 1, args.hidden)
        self.log_temperature = nn.Parameter(torch.full((stack,), math.log(args.init_temperature)))
        self.critic_optimizer = Adam(self.critic.parameters(), args.critic_lr, fused=True)
        self.local_critic_optimizer = Adam(self.local_critic.parameters(), args.critic_lr, fused=True)
        self.temperature_optimizer = Adam([self.log_temperature], args.temperature_lr, fused=True)
        if policy == "diffusion":
            self.policy = DiffusionPolicy(stack, args.hidden, args.denoising_steps)
            self.policy_optimizer = Adam(self.policy.parameters(), args.actor_lr, fused=True)
        elif policy == "gaussian":
            self.policy = GaussianPolicy(stack)
            self.policy_optimizer = Adam(self.policy.parameters(), args.gaussian_lr, fused=True)

    def update_policy(self, drawn: Tensor) -> None:
        """One update of policies and temperatures, at actions [S N, B, 1] that the policies have just drawn."""
        if isinstance(self.policy, DiffusionPolicy):
            update_diffusion(self, drawn)
        else:
            update_gaussian(self)

    def joint(self, actions: Tensor) -> Tensor:
        """Actions [S N, B, 1] of the stack as joint actions [S, B, N]."""
        return actions.view(self.args.num_seeds, self.num_agents, -1).transpose(1, 2)

    @torch.no_grad()
    def score(self, actions: Tensor, candidates: Tensor) -> Tensor:
        """Q [S N, M, B] where an agent plays each of its candidates [S N, M, B, 1], the others actions [S N, B, 1]."""
        own = torch.eye(self.num_agents)[:, None, None]  # [N, 1, 1, N]
        others = self.joint(actions)[:, None, None] * (1 - own)  # [S, N, 1, B, N]
        candidates_of_seed = candidates.view(self.args.num_seeds, self.num_agents, *candidates.shape[1:])
        joint = others + candidates_of_seed * own  # [S, N, M, B, N]
        return self.critic(joint.flatten(1, 3)).view(candidates.shape[:3])


def update_critic(learner: Learner, actions: Tensor, reward: Tensor) -> None:
    """Fit Q to the reward [S, B] of joint actions [S, B, N]: there is no next state."""
    error = learner.critic(actions) - reward
    take_step(learner.critic_optimizer, error.square().mean(1).sum())


def update_local_critic(learner: Learner, actions: Tensor, candidates: Tensor) -> Tensor:
    """Move each Q_i(a_i) to Q at candidates [S N, M, B, 1], where the others play actions [S N, B, 1].

    What the others add to all candidates alike is noise, so only differences between candidates count. Returns Q_i
    [S N, M, B] there, from before the step.
    """
    local_q = learner.local_critic(candidates.flatten(1, 2)).view(candidates.shape[:3])
    error = local_q - learner.score(actions, candidates)
    take_step(learner.local_critic_optimizer, error.var(1).mean(1).sum())
    return local_q.detach()


def update_diffusion(learner: Learner, actions: Tensor) -> None:
    """One ISSM step of every agent's denoiser, at actions [S N, B, 1] that the policies have just drawn."""
    args = learner.args

    # 1. Propose.
    sigmas = torch.tensor(args.sigmas)
    candidates, log_proposal = propose_actions(actions, sigmas, args.num_uniform, args.num_per_kernel)

    # 2. Weigh.
    energy = update_local_critic(learner, actions, candidates)
    weights, entropy = issm_weights(energy, log_proposal, learner.log_temperature.detach().exp())
    update_temperature(learner, entropy.mean(1) - args.target_entropy)

    # 3. Match.
    match_denoisers(learner, candidates, weights)


def match_denoisers(learner: Learner, candidates: Tensor, weights: Tensor) -> None:
    """Teach the denoisers the exact denoiser of the weighted candidates, at noisy points around resampled ones."""
    args, policy = learner.args, learner.policy
    stack, _, batch_size = weights.shape
    chances = weights.transpose(1, 2).flatten(0, 1).nan_to_num(1)  # multinomial raises at NaN; the loss shows it
    chosen = chances.multinomial(args.num_noise_draws, replacement=True)
    chosen = chosen.view(stack, batch_size, -1).transpose(1, 2)  # [S N, R, B]
    x_0 = candidates.gather(1, chosen[..., None])
    t = torch.randint(1, args.denoising_steps + 1, chosen.shape)
    alpha_bar = policy.alphas_bar[t]  # [S N, R, B]
    signal_scale = alpha_bar.sqrt()[..., None]
    noise_scale = (1 - alpha_bar).sqrt()[..., None]
    x_t = signal_scale * x_0 + noise_scale * torch.randn_like(x_0)
    denoised = issm_target(x_t, alpha_bar, candidates, weights)
    velocity = (signal_scale * x_t - denoised) / noise_scale
    one_hot_t = F.one_hot(t, args.denoising_steps + 1).float().flatten(1, 2)  # [S N, R * B, T + 1]
    error = policy(one_hot_t @ policy.time, x_t.flatten(1, 2)) - velocity.flatten(1, 2)
    take_step(learner.policy_optimizer, error.square().mean((1, 2)).sum())


def update_gaussian(learner: Learner) -> None:
    """One step of every Gaussian down its KL to the energy-based policy, at reparameterised actions of its own."""
    temperature = learner.log_temperature.detach().exp()
    actions, log_prob = learner.policy.rsample(learner.args.batch_size)
    q = learner.critic(learner.joint(actions))
    take_step(learner.policy_optimizer, (temperature[:, None] * log_prob).mean(1).sum() - q.mean(1).sum())
    update_temperature(learner, -log_prob.detach().mean(1) - learner.args.target_entropy)


def update_temperature(learner: Learner, excess: Tensor) -> dict[str, Tensor]:
    """Lower the temperature of an agent whose entropy exceeds its target, by excess [N]; raise it where that is < 0."""
    take_step(learner.temperature_optimizer, (learner.log_temperature * excess).sum())
    return {"policy/temperature": learner.log_temperature.detach().exp().mean()}


def take_step(optimizer: Adam, loss: Tensor) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


# -------------------------------------------------------------------------------------------------------- training


def learn(
    args: Args, policy: str, num_agents: int, make_learner: Callable[..., Learner] = Learner
) -> dict[str, np.ndarray]:
    """Train `policy` with all seeds side by side; returns three arrays [S].

    first_success: joint actions until the first success, or total_timesteps + 1 if there was none.
    final_success, final_return: means over 1,000 joint actions of the final policies.
    """
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    steps = range(0, args.total_timesteps, args.num_envs)
    learning_starts = args.total_timesteps if policy == "uniform" else args.learning_starts
    learner = make_learner(args, policy, num_agents)
    actions = torch.empty(args.num_seeds, len(steps) * args.num_envs, num_agents)
    rewards = torch.empty(actions.shape[:2])

    def play_uniform(count: int) -> Tensor:
        return 2 * torch.rand(args.num_seeds, count, num_agents) - 1

    for step in steps:
        # Act.
        learning = step >= learning_starts
        if learning:
            drawn = learner.policy.sample(args.num_envs + args.actor_batch_size)
            new = learner.joint(drawn[:, : args.num_envs])
        else:
            new = play_uniform(args.num_envs)

        # Store.
        played = step + args.num_envs
        require_finite(new, policy, step)
        actions[:, step:played] = new
        rewards[:, step:played] = team_reward(new, args)

        # Learn.
        if learning:
            rows = torch.randint(played, (args.batch_size,))
            update_critic(learner, actions[:, rows], rewards[:, rows])
            learner.update_policy(drawn[:, args.num_envs :])

    final = play_uniform(1000) if policy == "uniform" else learner.joint(learner.policy.sample(1000))
    require_finite(final, policy, args.total_timesteps)
    won = success(actions[:, : args.total_timesteps], args)
    first_success = torch.where(won.any(1), won.int().argmax(1), args.total_timesteps) + 1
    return {
        "first_success": first_success.cpu().numpy(),
        "final_success": success(final, args).float().mean(1).cpu().numpy(),
        "final_return": team_reward(final, args).mean(1).cpu().numpy(),
    }


def require_finite(actions: Tensor, policy: str, step: int) -> None:
    """Raise RunError where a policy's actions are not numbers."""
    if not actions.isfinite().all():
        raise RunError(f"the actions of the {policy} policy are NaN after {step} joint actions")


def train(args: Args) -> dict:
    """Train every policy with every number of agents; print a table, write a CSV and a figure to the run folder.

    Returns a dict, also written to RUN_DIR/result.json. Keys: run_dir; global_step, joint actions in all;
    episodic_returns, of the diffusion policies with the most agents, one per seed; final_return, their mean; and
    env_steps_per_second. Raises RunError for bad arguments and NaN.
    """
    check_args(args)
    run_dir = Path("runs") / f"{SCRIPT}__{args.game}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **asdict(args)}, indent=2))
    started = time.monotonic()
    device = choose_device(args)
    with device if device.type == "cuda" else nullcontext():  # it makes every tensor there, and costs a third on a CPU
        runs = {pair: learn(args, *pair) for pair in product(POLICY_COLORS, args.num_agents)}
    global_step = len(runs) * args.num_seeds * args.total_timesteps
    episodic_returns = runs["diffusion", max(args.num_agents)]["final_return"].tolist()
    result = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "final_return": float(np.mean(episodic_returns)),
        "episodic_returns": episodic_returns,
        "env_steps_per_second": global_step / (time.monotonic() - started),
    }
    print_table(args, runs)
    write_csv(runs, run_dir / "coordination.csv")
    plot_success(args, runs, POLICY_COLORS, run_dir / "success.png")
    (run_dir / "result.json").write_text(json.dumps(result, indent=2))
    return result


# -------------------------------------------------------------------------------------------------------- results


def print_table(args: Args, runs: Runs) -> None:
    """One line for every policy and number of agents."""
    print(f"{'policy':10} agents  first success (median)  final teams that coordinate  return")
    for (policy, num_agents), run in runs.items():
        median = np.median(run["first_success"])
        first = f"{median:.0f}" if median <= args.total_timesteps else "never"
        wins = f"{(run['final_success'] > 0.5).sum()} of {args.num_seeds}"
        print(f"{policy:10} {num_agents:6}  {first:>22}  {wins:>27}  {run['final_return'].mean():6.2f}")


def write_csv(runs: Runs, path: Path) -> None:
    """One row for every policy, number of agents and seed."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["policy", "num_agents", "seed", *next(iter(runs.values()))])
        for (policy, num_agents), run in runs.items():
            for seed, outcomes in enumerate(zip(*(values.tolist() for values in run.values()))):
                writer.writerow([policy, num_agents, seed, *outcomes])


def plot_success(args: Args, runs: Runs, colors: dict[str, str], path: Path) -> None:
    """The share of seeds whose final team coordinates, with Wilson's intervals, against the number of agents."""
    figure = Figure(figsize=(5, 3.8), dpi=100, layout="tight")
    axes = figure.subplots()
    shifts = np.linspace(-0.12, 0.12, len(colors))  # so that the bars stand side by side
    for (policy, color), shift in zip(colors.items(), shifts):
        wins = [int((runs[policy, n]["final_success"] > 0.5).sum()) for n in args.num_agents]
        shares = np.array(wins) / args.num_seeds
        wilson = [binomtest(k, args.num_seeds).proportion_ci(method="wilson") for k in wins]
        bars = np.abs(np.array([(bounds.low, bounds.high) for bounds in wilson]).T - shares)
        positions = np.array(args.num_agents) + shift
        axes.errorbar(positions, shares, bars, label=policy, color=color, marker="o", capsize=3)
    axes.set(ylim=(-0.05, 1.05), ylabel=f"final teams that coordinate (of {args.num_seeds} seeds)")
    axes.set(xlabel="agents", xticks=args.num_agents)
    axes.legend()
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------- command line


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
    check_types(args, {"seed": 0, "num_uniform": 0, "denoising_steps": 2})
    different = 0 < len(set(args.num_agents)) == len(args.num_agents)
    teams = different and all(1 <= n <= 8 for n in args.num_agents)
    require(args, "num_agents", teams, "one or more whole numbers from 1 to 8, each named once")
    for name in ("num_seeds", "num_envs", "batch_size", "actor_batch_size"):
        require(args, name, getattr(args, name) <= 4096, "a whole number from 1 to 4096")
    seeds = f"with --num-seeds {args.num_seeds}, so that all fit into memory"
    longest, widest = 10**8 // args.num_seeds, math.isqrt(10**7 // args.num_seeds)
    require(args, "total_timesteps", args.total_timesteps <= longest, f"at most {longest} {seeds}")
    require(args, "hidden", args.hidden <= widest, f"at most {widest} {seeds}")
    require(args, "tolerance", 0 < args.tolerance <= 1 - PEAK, "above 0, at most 0.3, so that it stays inside the box")
    require(args, "bonus", 0 < args.bonus <= 1e3, "above 0, or there is nothing to coordinate, and at most 1000")
    last = (args.total_timesteps - 1) // args.num_envs * args.num_envs  # what has been played before the last step
    require(args, "learning_starts", args.learning_starts <= last, f"at most {last}, or nothing is learned")
    for name in ("critic_lr", "actor_lr", "gaussian_lr", "temperature_lr"):
        require(args, name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require(args, "init_temperature", 1e-6 <= args.init_temperature <= 1e6, "a number from 1e-6 to 1e6")
    entropies = "a number from -10 to below 0.69, the uniform policy's entropy"
    require(args, "target_entropy", -10 <= args.target_entropy < math.log(2), entropies)
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require(args, "num_per_kernel", candidates > 1, "large enough for two candidates")
    widths = args.sigmas and all(1e-3 <= sigma <= 1 for sigma in args.sigmas)
    require(args, "sigmas", widths, "one or more numbers from 0.001 to 1")
    cuda = torch.cuda.is_available()
    require(args, "device", args.device != "cuda" or cuda, "auto or cpu on this machine, where PyTorch finds no CUDA")


def choose_device(args: Args) -> torch.device:
    """The device that --device names; auto is CUDA if there is one."""
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def main(args: Args) -> None:
    """What the command line asks for; a failure is one line on standard error and exit code 1, Ctrl-C 130."""
    try:
        result = train(args)
    except KeyboardInterrupt:
        print("stopped before the end, so there are no results; start again for the same numbers", file=sys.stderr)
        raise SystemExit(130) from None
    except (RunError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"{SCRIPT}.py: error: {str(error) or 'out of memory'}") from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch says where the CPU has no memory left
            raise
        raise SystemExit(f"{SCRIPT}.py: error: out of memory; choose smaller numbers ({error})") from None
    print(f"run folder {result['run_dir']}")


if __name__ == "__main__":
    main(tyro.cli(Args))
