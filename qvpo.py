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
The README numbers the implementation details and explains every logged scalar.
"""

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
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
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train a diffusion policy with QVPO on a Gymnasium task; the defaults are those of the reported results."""

    # Task
    env_id: str = "Pendulum-v1"
    """A Gymnasium task with a Box of continuous actions, such as Hopper-v5 or dm_control/cartpole-swingup-v0."""
    num_envs: int = 1
    """Copies of the task, stepped one after the other in this process."""
    total_timesteps: int = 10_000
    """Environment steps in all, summed over the copies."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""

    # Algorithm. What is None comes from the preset.
    preset: Literal["laptop", "paper"] = "laptop"
    """Sizes to use where a flag does not say otherwise: for two cores, or the published ones."""
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

    # Run
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
    num_threads: int = 1
    """Threads of PyTorch."""
    capture_video: bool = False
    """Write a GIF of the trained policy to its run folder (with --evaluate: of both ways to play)."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


PRESETS = {
    "laptop": dict(hidden=128, denoising_steps=5, num_candidates=16, behavior_candidates=4, target_candidates=2)
    | dict(batch_size=128, policy_frequency=2, actor_lr=3e-4, learning_starts=1_000),
    "paper": dict(hidden=256, denoising_steps=20, num_candidates=64, behavior_candidates=4, target_candidates=4)
    | dict(batch_size=256, policy_frequency=1, actor_lr=1e-4, learning_starts=10_000),
}
SCRIPT = "qvpo"
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")
TIME_FEATURES = 32


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


def with_preset(args: Args) -> Args:
    """The arguments with every None that the preset knows filled in."""
    return replace(args, **{k: v for k, v in PRESETS[args.preset].items() if getattr(args, k) is None})


# ---------------------------------------------------------------------------------------------------- environment


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """The Gymnasium task `env_id` with flat float32 observations and actions in [-1, 1].

    Raises RunError unless Gymnasium knows it and its actions are a bounded Box.
    """
    if env_id.startswith("dm_control/"):
        import shimmy  # noqa: F401, registers the tasks of DM Control
    try:
        env = gym.make(env_id, render_mode=render_mode)
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise RunError(f"--env-id: {error} Choose a task with continuous actions, such as Hopper-v5") from None
    space = env.action_space
    if not isinstance(space, Box) or not space.is_bounded():
        raise RunError(f"--env-id: {env_id} has actions {space}; choose a task with a bounded Box, such as Hopper-v5")
    env = gym.wrappers.DtypeObservation(gym.wrappers.FlattenObservation(env), np.float32)
    return gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ------------------------------------------------------------------------------------------------------- networks


def truncated_normal(weight: Tensor, fan_in: int) -> None:
    """Draw a weight as the official code does: normal of deviation 1 / (2 sqrt(fan_in)), cut at two deviations."""
    std = 0.5 * fan_in**-0.5
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


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
    """A denoiser of T steps (DDPM, Ho et al. 2020; epsilon-prediction): an MLP of (noisy action, t, observation).

    Its first layer is a sum of three parts, so that those of t and the observation are computed once for many actions.
    """

    def __init__(self, obs_size: int, action_size: int, hidden: int, num_steps: int):
        super().__init__()
        self.action_size, self.num_steps = action_size, num_steps
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, TIME_FEATURES))
        self.observation = nn.Linear(obs_size, hidden)
        self.step = nn.Linear(TIME_FEATURES, hidden, bias=False)
        self.noisy_action = nn.Linear(action_size, hidden, bias=False)
        self.hidden = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2))
        self.epsilon = nn.Linear(hidden, action_size)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                first = layer in (self.observation, self.step, self.noisy_action)
                fan_in = obs_size + action_size + TIME_FEATURES if first else layer.in_features
                truncated_normal(layer.weight, fan_in)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.register_buffer("alphas_bar", cosine_schedule(num_steps), persistent=False)
        frequencies = torch.exp(torch.arange(TIME_FEATURES // 2) * -(math.log(10_000) / (TIME_FEATURES // 2 - 1)))
        angles = torch.arange(num_steps)[:, None] * frequencies  # step t of the paper is row t - 1
        self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], -1), persistent=False)

    def step_features(self) -> Tensor:
        """The first layer's share [T, H] of every step t = 1..T, from sinusoids (Vaswani et al. 2017) and an MLP."""
        return self.step(self.time(self.sinusoids))

    def forward(self, context: Tensor, x_t: Tensor) -> Tensor:
        """The noise in actions [K, B, D]; context [K or 1, B, H] is the first layer's sum for observation and step."""
        hidden = F.silu(self.noisy_action(x_t) + context)
        for layer in self.hidden:
            hidden = F.silu(layer(hidden))
        return self.epsilon(hidden)

    @torch.no_grad()
    def sample(self, obs: Tensor, num_candidates: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Candidate actions [K, B, D] in [-1, 1] for observations [B, O], by ancestral sampling.

        The network runs in `dtype`, the chain itself in float32.
        """
        network = self if dtype == torch.float32 else deepcopy(self).to(dtype)
        observation, steps = self.observation(obs).to(dtype), self.step_features().to(dtype)
        x_t = torch.randn(num_candidates, len(obs), self.action_size, device=obs.device)
        for t in range(self.num_steps, 0, -1):
            epsilon = network((observation + steps[t - 1])[None], x_t.to(dtype)).float()
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


# -------------------------------------------------------------------------------------------------- replay buffer


class Batch(NamedTuple):
    """Transitions: observations [B, O], actions [B, D] in [-1, 1], reward and terminated [B]."""

    obs: Tensor
    actions: Tensor
    reward: Tensor
    terminated: Tensor
    next_obs: Tensor


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


# -------------------------------------------------------------------------- diffusion and Q-weighting: pure functions


def cosine_schedule(num_steps: int, offset: float = 0.008) -> Tensor:
    """alphas_bar [T+1], the share of signal variance left after t steps; [0] is 1 (Nichol and Dhariwal 2021, eq. 17).

    No step's beta exceeds 0.999.
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = ((time + offset) / (1 + offset) * math.pi / 2).cos().square()
    alphas = (signal[1:] / signal[:-1]).clamp(min=0.001)
    return torch.cat([torch.ones(1), alphas.cumprod(0).float()])


def ddpm_step(x_t: Tensor, epsilon: Tensor, t: int, alphas_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [..., D] and standard deviation [] of x_{t-1} given x_t and the predicted noise (DDPM, eq. 6-7, 15).

    The implied x_0 is clipped to [-1, 1]. At t = 1 the mean is x_0 and the deviation 0.
    """
    signal, previous = alphas_bar[t], alphas_bar[t - 1]
    alpha = signal / previous
    x_0 = ((x_t - (1 - signal).sqrt() * epsilon) / signal.sqrt()).clamp(-1, 1)
    mean = (previous.sqrt() * (1 - alpha) * x_0 + alpha.sqrt() * (1 - previous) * x_t) / (1 - signal)
    return mean, ((1 - alpha) * (1 - previous) / (1 - signal)).sqrt()


@torch.no_grad()
def draw_candidates(
    policy: DiffusionPolicy, critic: TwinCritic, obs: Tensor, num_candidates: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Candidate actions [K, B, D] at observations [B, O] and their min_k Q_k [K, B].

    In chunks of some 2,048 rows, whose activations stay in a processor's cache.
    """
    size = max(1, 2048 // len(obs))
    chunks = [policy.sample(obs, min(size, num_candidates - done), dtype) for done in range(0, num_candidates, size)]
    return torch.cat(chunks), torch.cat([critic(obs, chunk).amin(0) for chunk in chunks])


def best_of(candidates: Tensor, q: Tensor) -> Tensor:
    """The candidate [B, D] of highest q [K, B] among candidates [K, B, D]."""
    return candidates[q.argmax(0), torch.arange(q.shape[1], device=q.device)]


def q_weights(q: Tensor, transform: str) -> Tensor:
    """Weight [B] of the best of K candidates with values q [K, B]; none is negative (paper, section 4.2).

    qadv: its advantage over their mean, which estimates V. qcut: its value, raised to 1 if it is lower.
    """
    return q.amax(0) - q.mean(0) if transform == "qadv" else q.amax(0).clamp(min=1)


def denoising_loss(policy: DiffusionPolicy, obs: Tensor, actions: Tensor, weights: Tensor) -> Tensor:
    """Squared error [] of the predicted noise at random steps, weighted: actions [K, B, D], weights [K, B], obs [B, O].

    The mean over all actions and dimensions; for equal weights DDPM's simplified bound (eq. 14), a behaviour cloning.
    """
    t = torch.randint(1, policy.num_steps + 1, weights.shape, device=obs.device)
    alpha_bar, noise = policy.alphas_bar[t][..., None], torch.randn_like(actions)
    x_t = alpha_bar.sqrt() * actions + (1 - alpha_bar).sqrt() * noise
    error = policy(policy.observation(obs) + policy.step_features()[t - 1], x_t) - noise
    return (weights[..., None] * error.square()).mean()


def entropy_coefficient(args: Args, global_step: int) -> float:
    """Weight of the uniform actions: linear from args.entropy_coefficient towards 0, but not below its minimum."""
    decayed = args.entropy_coefficient * (1 - global_step / args.total_timesteps)
    return min(args.entropy_coefficient, max(args.min_entropy_coefficient, decayed))


# -------------------------------------------------------------------------------------------------------- learner


class Learner(nn.Module):
    """What training changes: policy, critics, their targets and optimisers."""

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.policy = DiffusionPolicy(obs_size, action_size, args.hidden, args.denoising_steps)
        self.critic = TwinCritic(obs_size, action_size, args.hidden)
        self.target_policy, self.target_critic = deepcopy(self.policy), deepcopy(self.critic)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.actor_lr, eps=1e-5, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, eps=1e-5, fused=True)
        self.args, self.sampling_dtype = args, torch.bfloat16 if args.bfloat16 else torch.float32

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [value for value in vars(self).values() if isinstance(value, torch.optim.Optimizer)]

    def act(self, obs: Tensor, num_candidates: int) -> Tensor:
        """Actions [B, D] for observations [B, O]: the best of several candidates, by the minimum of both critics."""
        return best_of(*draw_candidates(self.policy, self.critic, obs, num_candidates))


def update(learner: Learner, batch: Batch, obs: Tensor | None, entropy_weight: float) -> dict[str, Tensor]:
    """One update of the critics and, at fresh observations obs [B, O] if given, of the policy; returns metrics []."""
    metrics = update_critic(learner, batch)
    if obs is not None:
        metrics |= update_policy(learner, obs, entropy_weight)
    with torch.no_grad():
        for target, online in ((learner.target_policy, learner.policy), (learner.target_critic, learner.critic)):
            torch._foreach_lerp_([*target.parameters()], [*online.parameters()], learner.args.tau)
    return metrics


def update_critic(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """Move both critics to r + gamma (1 - terminated) max over K_t of min_k Q'_k(s', a'); truncation bootstraps."""
    args = learner.args
    with torch.no_grad():
        policy, critic = learner.target_policy, learner.target_critic
        _, next_q = draw_candidates(policy, critic, batch.next_obs, args.target_candidates, learner.sampling_dtype)
        target = batch.reward + args.gamma * (1 - batch.terminated) * next_q.amax(0)
    q = learner.critic(batch.obs, batch.actions[None])[:, 0]
    loss = (q - target).square().mean(1).sum()
    take_step(learner.critic_optimizer, loss, args.max_grad_norm)
    return {"losses/critic": loss.detach(), "losses/q": q.detach().mean()}


def update_policy(learner: Learner, obs: Tensor, entropy_weight: float) -> dict[str, Tensor]:
    """One step of the denoiser at obs [B, O], towards the best of its own candidates and towards uniform actions."""
    args = learner.args
    with torch.no_grad():
        policy, critic = learner.policy, learner.critic
        candidates, q = draw_candidates(policy, critic, obs, args.num_candidates, learner.sampling_dtype)
        actions, weights = best_of(candidates, q)[None], q_weights(q, args.q_transform)[None]
        metrics = {"losses/weight": weights.mean(), "policy/spread": candidates.std(0).mean()}
        if entropy_weight > 0:
            uniform = 2 * torch.rand(args.num_uniform, *actions.shape[1:], device=obs.device) - 1
            actions = torch.cat([actions, uniform])
            weights = torch.cat([weights, entropy_weight * weights.expand(args.num_uniform, -1)])
    loss = denoising_loss(learner.policy, obs, actions, weights)
    take_step(learner.policy_optimizer, loss, args.max_grad_norm)
    return metrics | {"losses/actor": loss.detach()}


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only, their gradient clipped."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    act: Callable[[Tensor], Tensor], args: Args, episodes: int, seed: int, video: Path | None = None
) -> np.ndarray:
    """Undiscounted returns [episodes] of act, observations [B, O] to actions [B, D] in [-1, 1].

    Played without touching training's random numbers. The first episode goes to the GIF `video`, if given.
    """
    envs = [make_env(args.env_id, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
    waves, film = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while len(waves) * len(envs) < episodes:
            seeds, returns = episode_seeds(1, seed, len(waves), len(envs)), np.zeros(len(envs))
            obs = [env.reset(seed=int(s))[0] for env, s in zip(envs, seeds)]
            playing = list(range(len(envs)))
            while playing:
                if video and not waves and 0 in playing:
                    film.append(envs[0].render()[::2, ::2])
                for i, action in zip(playing, act(torch.from_numpy(np.stack([obs[i] for i in playing]))).numpy()):
                    obs[i], reward, terminated, truncated, _ = envs[i].step(action)
                    returns[i] += reward
                    if terminated or truncated:
                        playing = [j for j in playing if j != i]
            waves.append(returns)
    for env in envs:
        env.close()  # else DM Control's renderer fails at the interpreter's exit
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
        smallest = {"seed": 0, "learning_starts": 0, "num_candidates": 2}.get(field.name, 1)
        if field.type in (int, int | None):
            require(field.name, getattr(args, field.name) >= smallest, f"a whole number of at least {smallest}")
    require("buffer_size", args.buffer_size >= args.num_envs, f"at least --num-envs, {args.num_envs}")
    for name in ("critic_lr", "actor_lr", "max_grad_norm"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require("gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require("tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    for name in ("entropy_coefficient", "min_entropy_coefficient"):
        require(name, 0 <= getattr(args, name) < math.inf, "a number of at least 0")
    if args.capture_video:
        try:
            env = make_env(args.env_id, "rgb_array")
            env.reset()
            env.render()
            env.close()
        except Exception as error:
            reason = f"{type(error).__name__}; on a machine without a display, MUJOCO_GL=egl or osmesa may help"
            raise RunError(f"--capture-video: {args.env_id} cannot be drawn here ({reason})") from None


def check_finite(named_values: Iterable[tuple[str, Tensor]], global_step: int) -> None:
    """Stop the run if a value is NaN or infinite. Called before every checkpoint, so that no checkpoint holds one."""
    for name, value in named_values:
        if not value.isfinite().all():
            raise RunError(f"{name} is NaN or infinite at step {global_step}; the last checkpoint is from before")


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
    """Train one policy; returns a dict, also written to RUN_DIR/result.json.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation;
    final_return, their mean; env_steps_per_second. Raises RunError for bad arguments and for NaN.
    """
    checkpoint = None
    if args.resume:
        run_dir = Path(args.resume)
        args, checkpoint = load_checkpoint("--resume", run_dir, args)
    args = with_preset(args)
    check_args(args)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    env = SyncVectorEnv([lambda: make_env(args.env_id)] * args.num_envs, autoreset_mode=AutoresetMode.DISABLED)
    sizes = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    learner = Learner(args, *sizes)
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)
    buffer = ReplayBuffer(capacity, Batch(sizes[:1], sizes[1:], (), (), sizes[:1]))
    global_step, episode, updates, seconds, episode_return, rows = 0, 0, 0, 0.0, math.nan, []
    if checkpoint:
        learner.load_state_dict(checkpoint["learner"])
        for optimizer, state in zip(learner.optimizers(), checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        buffer.load_state_dict(checkpoint["buffer"])
        torch.set_rng_state(checkpoint["rng"])
        global_step, episode, updates, seconds, episode_return, rows = checkpoint["progress"]
    else:
        name = f"{SCRIPT}__{args.env_id.replace('/', '-')}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        run_dir = Path("runs") / name
        run_dir.mkdir(parents=True)
        (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **run_arguments(args)}, indent=2))
    if args.track:
        start_tracking(args, run_dir)
    writer = SummaryWriter(run_dir, purge_step=global_step)
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", desc=args.env_id, mininterval=1)
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
        for mode, act in ways_to_play(learner).items():
            returns = evaluate(act, args, episodes, global_step, video if mode == "deterministic" else None)
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
            actions = 2 * torch.rand(args.num_envs, sizes[1]) - 1
        else:
            actions = learner.act(torch.from_numpy(obs), args.behavior_candidates)
        check_finite([("the action", actions)], global_step)
        next_obs, reward, terminated, truncated, _ = env.step(actions.numpy())
        previous_step, global_step = global_step, global_step + args.num_envs

        # Store.
        check_finite([("the reward", torch.from_numpy(reward))], global_step)
        buffer.add(*map(torch.as_tensor, (obs, actions, reward, terminated, next_obs)))
        returns += reward
        ended = terminated | truncated
        if ended.any():
            episode_return = float(returns[ended].mean())
            next_obs, returns = env.reset(options={"reset_mask": ended})[0], np.where(ended, 0, returns)
        obs = next_obs

        # Learn.
        while args.learning_starts + updates * args.steps_per_update < global_step:
            fresh = buffer.sample(args.batch_size).obs if updates % args.policy_frequency == 0 else None
            metrics |= update(learner, buffer.sample(args.batch_size), fresh, entropy_coefficient(args, global_step))
            updates += 1

        # Log.
        progress.update(args.num_envs)
        if due(args.log_interval) and metrics:
            check_finite(metrics.items(), global_step)
            metrics["policy/entropy_coefficient"] = entropy_coefficient(args, global_step)
            metrics["steps_per_second"] = (global_step - first_step) / (time.monotonic() - started)
            metrics["returns/training"] = episode_return
            for name, value in metrics.items():
                writer.add_scalar(name, float(value), global_step)
            progress.set_postfix({"return": f"{episode_return:.2f}"})
            metrics = {}
        if due(args.eval_interval) and global_step < args.total_timesteps:
            log_evaluation(args.eval_episodes)

    save()
    env_steps_per_second = (global_step - first_step) / (time.monotonic() - started)
    episodic_returns = log_evaluation(args.final_eval_episodes, run_dir / "final.gif" if args.capture_video else None)
    progress.close()
    writer.close()
    result = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "env_steps_per_second": env_steps_per_second,
    }
    versions = {package: version(package) for package in ("torch", "numpy", "gymnasium", "mujoco")}
    (run_dir / "result.json").write_text(json.dumps(result | {"versions": versions}, indent=2))
    return result


def ways_to_play(learner: Learner) -> dict[str, Callable[[Tensor], Tensor]]:
    """stochastic: as while training, the best of K_b candidates; deterministic: the best of many, hardly random."""
    return {
        "stochastic": lambda obs: learner.act(obs, learner.args.behavior_candidates),
        "deterministic": lambda obs: learner.act(obs, learner.args.eval_candidates),
    }


def play(args: Args) -> None:
    """--evaluate: play a run's policy and print its returns."""
    run_dir = Path(args.evaluate)
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, free=("seed", "final_eval_episodes", "num_threads"))
    check_args(args)
    env = make_env(args.env_id)
    learner = Learner(args, env.observation_space.shape[0], env.action_space.shape[0])
    learner.load_state_dict(checkpoint["learner"])
    for mode, act in ways_to_play(learner).items():
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        returns = evaluate(act, args, args.final_eval_episodes, args.seed, video)
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
