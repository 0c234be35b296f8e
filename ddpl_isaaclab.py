"""DDPL on Isaac Lab's multi-agent tasks: thousands of environments, replay buffer and learner on one device.

DDPL is from Zhang, Balim, Li, "Decentralized Diffusion Policy Learning for Enhanced Exploration in Cooperative
Multi-agent Reinforcement Learning", arXiv 2605.07101 (2026). Only its abstract could be read and no code is public, so
what stands here is a reconstruction. The README says how to install Isaac Lab (Mittal et al., arXiv 2511.04831, 2025).

    python ddpl_isaaclab.py --task Isaac-Pendulum-MARL-Direct
    torchrun --nproc-per-node 2 ddpl_isaaclab.py    # two processes, each with environments of its own

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

import atexit
import csv
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import tyro
from gymnasium.spaces import Box
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train agents with DDPL on Isaac Lab's multi-agent tasks; the defaults are those of the reported results."""

    # Task
    task: str = "Isaac-Pendulum-MARL-Direct"
    """A registered multi-agent task of Isaac Lab's direct workflow."""
    num_envs: int = 256
    """Environments, in every process."""
    device: str = "cpu"
    """Where simulation, replay buffer and learner live: cpu, cuda (under torchrun one for each process) or cuda:1."""
    total_timesteps: int = 230_400
    """Environment steps (frames) in all, summed over environments and processes."""
    seed: int = 1
    """Seed of networks, exploration, replay and episodes."""

    # Algorithm
    policy: Literal["diffusion", "gaussian"] = "diffusion"
    """The policy class: DDPL's diffusion policy or the Gaussian baseline."""
    buffer_size: int = 1_000_000
    """Transitions the replay buffer of every process holds."""
    learning_starts: int = 5_120
    """Environment steps of uniformly random actions before the first update."""
    steps_per_update: int = 32
    """Environment steps for each update of critic and actor."""
    batch_size: int = 256
    """Transitions in a critic update, in every process."""
    actor_batch_size: int = 64
    """Of those, how many states the diffusion policy learns from (each costs M evaluations of two critics)."""
    gamma: float = 0.98
    """Discount factor."""
    tau: float = 0.05
    """Step of the target critic towards the critic, each update."""
    critic_lr: float = 3e-3
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
    eval_interval: int = 76_800
    """Environment steps between evaluations: an episode in every environment, twice (sampled, deterministic)."""
    log_interval: int = 2_560
    """Environment steps between TensorBoard points."""
    checkpoint_interval: int = 76_800
    """Environment steps between checkpoints. These and evaluations end the running episodes, as a time limit does."""
    num_threads: int = 1
    """Threads of PyTorch; networks this small gain little from more."""
    track: bool = False
    """Mirror the TensorBoard scalars to Weights & Biases (needs `pip install wandb`)."""
    wandb_project_name: str = "diffusion-marl"
    """Project on Weights & Biases."""
    resume: str | None = None
    """Run folder to go on with, from its checkpoint and with its arguments."""
    evaluate: str | None = None
    """Run folder whose policy to load, play and print returns of, without training."""


SCRIPT = "ddpl_isaaclab"
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


# ---------------------------------------------------------------------------------------------------- environment


@contextmanager
def make_env(args: Args) -> Iterator["StackedAgents"]:
    """The task that `args` name, while its simulation runs; meanwhile new tensors live on its device.

    Isaac Lab 3.0 launches what the task needs (for Newton's physics nothing), 2.3 needs Isaac Sim. Raises RunError if
    Isaac Lab is not installed, and, naming the choices, if the task is none of its multi-agent tasks.
    """
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    try:
        from isaaclab import app
    except ModuleNotFoundError as error:
        install = "pip install --no-deps --ignore-requires-python -r requirements-isaaclab.txt"
        raise RunError(f"Isaac Lab is not installed ({error}); {install}") from None
    is_2 = not hasattr(app, "launch_simulation")
    if is_2:  # Isaac Sim has to run before anything else is imported, and its close() ends the process
        atexit.register(app.AppLauncher(headless=True, device=device).app.close)
    config, failure = make_config(args, device), None
    with nullcontext() if is_2 else app.launch_simulation(config, {}):
        env = gym.make(args.task, cfg=config).unwrapped
        try:
            with nullcontext() if device == "cpu" else torch.device(device):  # it makes every call of PyTorch slower
                yield StackedAgents(env)
        except RunError as error:  # kept from launch_simulation, which would print a traceback
            failure = error
        finally:
            env.close()
    if failure:
        raise failure


def make_config(args: Args, device: str) -> Any:
    """The task's configuration with our settings. Raises RunError, naming the choices, if it is no multi-agent task."""
    import isaaclab_tasks  # noqa: F401, registers the tasks
    from isaaclab_tasks.utils.parse_cfg import parse_env_cfg

    known = [name for name in gym.registry if name.startswith("Isaac-")]
    choices = ", ".join(name for name in known if "MARL" in name or "Double-Pendulum" in name or "over-Direct" in name)
    if args.task not in gym.registry:
        raise RunError(f"--task: Isaac Lab knows no {args.task!r}; choose a multi-agent task, such as {choices}")
    config = parse_env_cfg(args.task, device=device, num_envs=args.num_envs)
    if not hasattr(config, "possible_agents"):
        raise RunError(f"--task: {args.task} has a single agent; choose a multi-agent task, such as {choices}")
    config.seed = args.seed
    if hasattr(config, "compute_final_obs"):  # 2.3 cannot
        config.compute_final_obs = True
    return config


class Step(NamedTuple):
    """What a step of E environments brings. An environment whose episode ends starts the next one in the same step."""

    obs: Tensor  # [E, N, O], to go on with
    state: Tensor  # [E, S], likewise
    next_obs: Tensor  # [E, N, O], of the old episode where one has ended
    next_state: Tensor  # [E, S], likewise
    reward: Tensor  # [E]
    terminated: Tensor  # [E]; also where an episode has ended and the true next_obs or next_state is not known
    ended: Tensor  # [E], terminated or truncated
    successes: Tensor  # [], of the episodes that have ended


class StackedAgents:
    """Isaac Lab's dicts of agents as arrays, agents zero-padded to the largest observation and action.

    Actions lie in [-1, 1] and reach the task as they are, or scaled to an agent's bounds if it has any. The reward is
    the mean over agents. The state is the task's own or, if it has none, all observations, concatenated.
    """

    def __init__(self, env: Any):
        self.env, self.agents = env, env.possible_agents
        boxes = [env.action_space(agent) for agent in self.agents]
        spaces = [env.observation_space(agent) for agent in self.agents]
        if not all(isinstance(space, Box) and len(space.shape) == 1 for space in boxes + spaces):
            raise RunError("--task: it must have vectors as observations and actions, for every agent")
        self.obs_sizes, self.action_sizes = ([space.shape[0] for space in group] for group in (spaces, boxes))
        self.bounds = [(torch.tensor(b.low), torch.tensor(b.high)) if b.is_bounded() else None for b in boxes]
        state_space = env.cfg.state_space  # 0: none; negative: the observations, concatenated
        self.own_state = not (isinstance(state_space, int) and state_space <= 0)
        self.obs_shape = (len(self.agents), max(self.obs_sizes))
        self.state_size = env.state_space.shape[0] if self.own_state else sum(self.obs_sizes)

    def action_mask(self) -> Tensor:
        """[N, D] float: 1 for an agent's real action dimensions, 0 for padding."""
        sizes = torch.tensor(self.action_sizes)
        return (torch.arange(max(self.action_sizes)) < sizes[:, None]).float()

    def reset(self, seed: int) -> tuple[Tensor, Tensor]:
        """Observations [E, N, O] and states [E, S] of new episodes; all random numbers of the process start anew."""
        with torch.device("cpu"):  # Isaac Lab expects PyTorch's own default
            obs, _ = self.env.reset(seed=seed)
        return self._stack(obs), self._state(self._stack(obs))

    def step(self, actions: Tensor) -> Step:
        """One step with actions [E, N, D] in [-1, 1]."""
        actions = [action[:, :size] for action, size in zip(actions.unbind(1), self.action_sizes)]
        for i, bounds in enumerate(self.bounds):
            if bounds:
                actions[i] = bounds[0] + (actions[i] / 2 + 0.5) * (bounds[1] - bounds[0])
        with torch.device("cpu"):
            after, rewards, *ends, extras = self.env.step(dict(zip(self.agents, actions)))
        # An environment starts anew when all its agents have terminated, or all have run out of time.
        terminated, truncated = (torch.stack([end[agent] for agent in self.agents]).all(0) for end in ends)
        ended = terminated | truncated
        obs = next_obs = self._stack(after)
        state = next_state = self._state(obs)
        has_final_obs = "final_obs" in extras[self.agents[0]]  # of the last step in which an episode ended; not in 2.3
        if has_final_obs:
            final_obs = self._stack({agent: extras[agent]["final_obs"] for agent in self.agents})
            next_obs = torch.where(ended[:, None, None], final_obs, obs)
            next_state = state if self.own_state else self._state(next_obs)
        # The task's own state is known after the reset alone.
        no_future = terminated if has_final_obs and not self.own_state else ended
        # The task's rate, if it has one, is that of the episodes which ended in the last step in which any did.
        rate = extras.get("log", {}).get("Metrics/success_rate")
        successes = (truncated & ~terminated).sum() if rate is None else rate * ended.sum()
        reward = torch.stack([rewards[agent] for agent in self.agents]).mean(0)
        return Step(obs, state, next_obs, next_state, reward, no_future, ended, successes)

    def _stack(self, obs: dict) -> Tensor:
        widest = max(self.obs_sizes)
        return torch.stack([F.pad(obs[a], (0, widest - size)) for a, size in zip(self.agents, self.obs_sizes)], dim=1)

    def _state(self, obs: Tensor) -> Tensor:
        if self.own_state:
            with torch.device("cpu"):
                return self.env.state().clone()
        return torch.cat([row[:, :size] for row, size in zip(obs.unbind(1), self.obs_sizes)], dim=1)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ------------------------------------------------------------------------------------------------------ processes


def rank() -> int:
    """The number of this process, of those that torchrun has started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes torchrun has started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_seed(stream: int, seed: int, episode: int) -> int:
    """Seed of this process's episodes, and of whatever else it draws until their end."""
    return int(episode_seeds(stream, seed, episode, world_size())[rank()])


def gathered(value: Any) -> list:
    """In the first process the values of all, in the others their own alone."""
    values = [value] * (world_size() if rank() == 0 else 1)
    if world_size() > 1:
        dist.gather_object(value, values if rank() == 0 else None)
    return values


def average_gradients(optimizer: torch.optim.Optimizer, *_) -> None:
    """Replace the gradients by their means over all processes, in one message: a hook to run before each step."""
    gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(joined)
    means = (joined / world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means):
        gradient.copy_(mean.view_as(gradient))


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


def evaluate(policy: nn.Module, env: StackedAgents, deterministic: bool, seed: int) -> tuple[np.ndarray, float]:
    """Undiscounted team returns of one episode in every environment (of every process), and the share of successes.

    Training's episodes and random numbers have to start anew afterwards.
    """
    obs, _ = env.reset(process_seed(1, seed, 0))
    returns, successes, playing = torch.zeros(len(obs)), torch.zeros(()), torch.ones(len(obs), dtype=torch.bool)
    while playing.any():
        after = env.step(policy.sample(obs.transpose(0, 1), deterministic).transpose(0, 1))
        returns, obs = returns + playing * after.reward, after.obs
        # Of the further episodes of environments that have ended early, none should count.
        successes = successes + torch.minimum(after.successes, (playing & after.ended).sum())
        playing = playing & ~after.ended
    success_rate = float(np.mean(gathered(float(successes) / len(obs))))
    return torch.cat(gathered(returns.cpu())).numpy(), success_rate


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
    for name in ("critic_lr", "actor_lr", "temperature_lr", "init_temperature"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    require("gamma", 0 <= args.gamma <= 1, "a number from 0 to 1")
    require("tau", 0 < args.tau <= 1, "a number above 0, at most 1")
    require("target_entropy", args.target_entropy < math.log(2), "below 0.69, the uniform policy's entropy")
    candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    require("num_per_kernel", candidates > 1, "large enough for two candidates")
    require("sigmas", args.sigmas and all(0 < s <= 1 for s in args.sigmas), "one or more numbers above 0, at most 1")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices = ["cpu", "cuda", *gpus] if gpus else ["cpu"]
    require("device", args.device in devices, f"one of {', '.join(devices)} on this machine")


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
    """Train one team; returns a dict, also written to RUN_DIR/result.json. With several processes, each calls it.

    Keys: run_dir; global_step; episodic_returns, the list of returns of the final deterministic evaluation;
    final_return, their mean; success_rate, theirs; env_steps_per_second. The returns and the rate are those of all
    processes in the first, of its own in any other. Raises RunError for bad arguments and for NaN.
    """
    run_dir, checkpoint = None, None
    if args.resume:
        run_dir = Path(args.resume)
        args, checkpoint = load_checkpoint("--resume", run_dir, args)
        if len(checkpoint["buffers"]) != world_size():
            raise RunError(f"--resume: {run_dir} ran in {len(checkpoint['buffers'])} processes, not {world_size()}")
    check_args(args)
    torch.set_num_threads(args.num_threads)
    with make_env(args) as env:
        return train_in(env, args, run_dir, checkpoint)


def train_in(env: StackedAgents, args: Args, run_dir: Path | None, checkpoint: dict | None) -> dict:
    """What train does while the simulation runs."""
    torch.manual_seed(args.seed)  # in all processes, so that they start with the same networks
    mask, step_size = env.action_mask(), args.num_envs * world_size()
    learner = Learner(args, *env.obs_shape, mask.shape[1], env.state_size, mask)
    shapes = Batch(env.obs_shape, mask.shape, (), (), env.obs_shape, (env.state_size,), (env.state_size,))
    buffer = ReplayBuffer(min(args.buffer_size, args.total_timesteps // world_size() + args.num_envs), shapes)
    global_step, updates, seconds, rows = 0, 0, 0.0, []
    if checkpoint:
        learner.load_state_dict(checkpoint["learner"])
        for optimizer, stored in zip(learner.optimizers(), checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        buffer.load_state_dict(checkpoint["buffers"][rank()])
        global_step, updates, seconds, rows = checkpoint["progress"]
    else:
        name = [f"{SCRIPT}__{args.task}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"]
        if world_size() > 1:
            dist.broadcast_object_list(name)
        run_dir = Path("runs") / name[0]
        if rank() == 0:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **run_arguments(args)}, indent=2))
    if world_size() > 1:
        for optimizer in learner.optimizers():
            optimizer.register_step_pre_hook(average_gradients)
    if args.track and rank() == 0:
        start_tracking(args, run_dir)
    writer = SummaryWriter(run_dir, purge_step=global_step) if rank() == 0 else None
    bar = dict(total=args.total_timesteps, initial=global_step, unit="step", desc=args.task, mininterval=1)
    progress = tqdm(**bar, disable=rank() > 0)
    first_step, started = global_step, time.monotonic()
    last_checkpoint = global_step if checkpoint else -args.checkpoint_interval

    def save() -> None:
        check_finite(learner.named_parameters(), global_step)
        stored = buffer.state_dict()
        contents = {
            "script": SCRIPT,
            "args": run_arguments(args),
            "progress": [global_step, updates, seconds + time.monotonic() - started, rows],
            "learner": learner.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers()],
            "buffers": gathered(stored | {"data": [column.cpu() for column in stored["data"]]}),
        }
        if rank() == 0:
            save_checkpoint(run_dir, contents)

    def log_evaluation() -> tuple[np.ndarray, float]:
        nonlocal started
        before = time.monotonic()
        time_taken = round(seconds + before - started, 1)  # without evaluations, which last longer than the training
        for mode in ("stochastic", "deterministic"):
            returns, success_rate = evaluate(learner.policy, env, mode == "deterministic", global_step)
            mean, std = float(returns.mean()), float(returns.std())
            row = dict(zip(EVALUATION_COLUMNS, (global_step, time_taken, mode, mean, std, len(returns))))
            rows.append(row | {"success_rate": success_rate})
            if writer:
                writer.add_scalar(f"returns/{mode}", mean, global_step)
                writer.add_scalar(f"success_rate/{mode}", success_rate, global_step)
        if rank() == 0:
            write_evaluations(run_dir, rows)
        started += time.monotonic() - before
        return returns, success_rate  # of the deterministic policy

    def due(interval: int) -> bool:
        return global_step // interval > previous_step // interval

    obs, metrics, finished = None, {}, torch.zeros(3)
    while global_step < args.total_timesteps:
        # A checkpoint cannot hold the state of the simulation, so there all episodes start anew, interrupted or not;
        # with them the random numbers, which need not be saved therefore.
        if obs is None or global_step - last_checkpoint >= args.checkpoint_interval:
            if global_step - last_checkpoint >= args.checkpoint_interval:
                save()
                last_checkpoint = global_step
            obs, state = env.reset(process_seed(0, args.seed, global_step))
            returns = torch.zeros(args.num_envs)

        # Act.
        if global_step < args.learning_starts:
            actions = (2 * torch.rand(args.num_envs, *mask.shape) - 1) * mask
        else:
            actions = learner.policy.sample(obs.transpose(0, 1)).transpose(0, 1)
        after = env.step(actions)
        previous_step, global_step = global_step, global_step + step_size

        # Store.
        buffer.add(obs, actions, after.reward, after.terminated, after.next_obs, state, after.next_state)
        returns = returns + after.reward
        finished = finished + torch.stack([(returns * after.ended).sum(), after.successes, after.ended.sum()])
        obs, state, returns = after.obs, after.state, returns * ~after.ended  # NaN stays

        # Learn.
        while args.learning_starts + updates * args.steps_per_update < global_step:
            metrics = update(learner, buffer.sample(args.batch_size))
            updates += 1

        # Log.
        progress.update(step_size)
        if due(args.log_interval) or due(args.eval_interval):  # not at every step: the host would wait for the device
            check_finite([("the action", actions), ("the reward", returns), *metrics.items()], global_step)
        if due(args.log_interval) and metrics:
            scalars = metrics | {
                "policy/spread": policy_spread(learner, buffer.sample(64).obs),
                "policy/target_entropy": args.target_entropy,
                "steps_per_second": (global_step - first_step) / (time.monotonic() - started),
                "returns/training": finished[0] / finished[2],  # NaN if none has finished
                "success_rate/training": finished[1] / finished[2],
            }
            finished = torch.zeros(3)
            for name, value in scalars.items() if writer else ():
                writer.add_scalar(name, float(value), global_step)
        if due(args.eval_interval) and global_step < args.total_timesteps:
            log_evaluation()
            obs = None

    save()
    env_steps_per_second = (global_step - first_step) / (time.monotonic() - started)
    episodic_returns, success_rate = log_evaluation()
    progress.close()
    result = {
        "run_dir": str(run_dir),
        "global_step": global_step,
        "final_return": float(episodic_returns.mean()),
        "episodic_returns": episodic_returns.tolist(),
        "success_rate": success_rate,
        "env_steps_per_second": env_steps_per_second,
    }
    if writer:
        writer.close()
        versions = {package: version(package) for package in ("torch", "numpy", "isaaclab")}
        (run_dir / "result.json").write_text(json.dumps(result | {"versions": versions}, indent=2))
    return result


def play(args: Args) -> None:
    """--evaluate: play a run's policy and print its returns."""
    run_dir = Path(args.evaluate)
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, free=("seed", "num_envs", "num_threads"))
    check_args(args)
    torch.set_num_threads(args.num_threads)
    with make_env(args) as env:
        mask = env.action_mask()
        learner = Learner(args, *env.obs_shape, mask.shape[1], env.state_size, mask)
        learner.load_state_dict(checkpoint["learner"])
        for mode in ("stochastic", "deterministic"):
            returns, success_rate = evaluate(learner.policy, env, mode == "deterministic", args.seed)
            spread = f"{returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes"
            print(f"{mode:13s} return {spread}, success rate {success_rate:.3f}")


def main(args: Args) -> None:
    """What the command line asks for; RunError becomes one line on standard error and exit code 1."""
    try:
        if "RANK" in os.environ:  # started by torchrun
            dist.init_process_group()
        if args.evaluate:
            play(args)
        else:
            result = train(args)
            if rank() == 0:
                print(f"final return {result['final_return']:.2f}, run folder {result['run_dir']}")
        if dist.is_initialized():
            dist.destroy_process_group()
    except RunError as error:
        raise SystemExit(f"{SCRIPT}.py: error: {error}") from None


if __name__ == "__main__":
    main(tyro.cli(Args))
