"""Bang-bang control: PPO in which the policy's distribution is the one thing that changes.

Seyde, Gilitschenski, Schwarting, Stellato, Riedmiller, Wulfmeier, Rus, "Is Bang-Bang Control All You Need? Solving
Continuous Control with Bernoulli Policies", NeurIPS 2021, arXiv 2111.02552. No code is public; the PPO here (Schulman
et al. 2017) has the settings of CleanRL's ppo_continuous_action.py, so that a Gaussian run is the usual baseline.

    python bang_bang.py --env-id HalfCheetah-v5 --policy bernoulli

1. --policy bernoulli plays each action dimension at one of its two bounds, with probability sigmoid(logit);
   --policy categorical at one of --bins evenly spaced values (3: bang-off-bang); --policy gaussian anywhere between.
2. A rollout is played; generalised advantages are estimated with a value function that bootstraps at time limits.
3. Policy and value function take minibatch steps on the clipped surrogate of the rollout.
4. Evaluation plays the mode of the distribution, and samples of it.

If the reward does not depend on the action, the optimal continuous-time policy maximises something linear in it, so it
lies at the bounds. --action-cost subtracts a cost of acting from the reward, and shows where that ends.
The README numbers the implementation details and explains every logged scalar.
"""

import csv
import json
import math
import os
import time
from collections.abc import Callable, Iterable
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
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    """Train PPO with a Bernoulli, categorical or Gaussian policy; the defaults are those of the reported results."""

    # Task
    env_id: str = "HalfCheetah-v5"
    """A Gymnasium task with a Box of continuous actions, such as Pendulum-v1 or dm_control/walker-walk-v0."""
    num_envs: int = 1
    """Copies of the task, stepped one after the other in this process."""
    total_timesteps: int = 200_000
    """Environment steps in all, summed over the copies (the last rollout is played to its end)."""
    seed: int = 1
    """Seed of networks, exploration, minibatches and episodes."""
    action_cost: float = 0.0
    """c, what acting costs: the reward loses c |a| (l1) or c / 2 a^2 (l2), summed over dimensions in [-1, 1]."""
    action_cost_form: Literal["l1", "l2"] = "l1"
    """Form of the cost."""

    # Policy
    policy: Literal["bernoulli", "categorical", "gaussian"] = "bernoulli"
    """Distribution of each action dimension: on its two bounds, on evenly spaced values, or a Gaussian."""
    bins: int = 3
    """Values of each action dimension of the categorical policy, from bound to bound."""
    squash: Literal["clip", "tanh"] = "clip"
    """How the Gaussian's actions are kept within the bounds."""
    hidden: int = 64
    """Width of all networks' two hidden layers."""

    # PPO
    num_steps: int = 2048
    """Steps of each copy in a rollout."""
    update_epochs: int = 10
    """Passes over a rollout."""
    num_minibatches: int = 32
    """Minibatches in a pass."""
    learning_rate: float = 3e-4
    """Learning rate at the start; it falls linearly to 0."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of the generalised advantages."""
    clip_coefficient: float = 0.2
    """How far the probability ratio may pay, and how far the values may move."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy in the loss."""
    value_coefficient: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Norm that gradients are clipped to."""

    # Run
    eval_interval: int = 40_000
    """Environment steps between evaluations (each waits for the end of a rollout)."""
    eval_episodes: int = 10
    """Episodes of each evaluation, once with sampled actions (stochastic), once with the mode (deterministic)."""
    final_eval_episodes: int = 50
    """Episodes of the last evaluation, the one reported."""
    checkpoint_interval: int = 20_000
    """Environment steps between checkpoints. Each also ends the copies' episodes early, as a time limit does."""
    num_threads: int = 1
    """Threads of PyTorch; networks this small gain nothing from more."""
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


SCRIPT = "bang_bang"
EVALUATION_COLUMNS = ("global_step", "seconds", "mode", "return_mean", "return_std", "episodes")
PLAY_COLUMNS = ("return_without_cost", "saturation", "switching_rate")  # further columns of evaluations.csv


class RunError(Exception):
    """A wrong argument or a failed run, told to the user in one sentence."""


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


class ActionCost(gym.Wrapper):
    """Subtracts a cost of acting from the reward of a task with actions in [-1, 1]; info["action_cost"] is the cost."""

    def __init__(self, env: gym.Env, coefficient: float, form: str):
        super().__init__(env)
        self.coefficient, self.form = coefficient, form

    def step(self, action: np.ndarray) -> tuple:
        obs, reward, terminated, truncated, info = self.env.step(action)
        size = np.abs(action).sum() if self.form == "l1" else 0.5 * np.square(action).sum()
        cost = self.coefficient * float(size)
        return obs, reward - cost, terminated, truncated, info | {"action_cost": cost}


def make_costly_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The task of `args`, its cost of acting included."""
    return ActionCost(make_env(args.env_id, render_mode), args.action_cost, args.action_cost_form)


def episode_seeds(stream: int, seed: int, episode: int, num_envs: int) -> np.ndarray:
    """[E] seeds of the copies' next episode, in the stream of training (0) or evaluation (1) episodes.

    They depend on nothing but these numbers, so a resumed run plays the same episodes without saving the environments.
    """
    return np.random.SeedSequence([stream, seed, episode]).generate_state(num_envs)


# ------------------------------------------------------------------------------------------------------- policies


def mlp(in_features: int, hidden: int, out_features: int, last_gain: float) -> nn.Sequential:
    """A tanh network with two hidden layers, orthogonal weights and no biases at first, as CleanRL's."""
    layers = [nn.Linear(in_features, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, out_features)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain)):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class BernoulliPolicy(nn.Module):
    """Bang-bang: each dimension of the action at its upper bound with probability sigmoid(logit), or at its lower.

    A policy maps observations [..., O] to the parameters of its distribution. What it draws is a choice [..., D], here
    1 or 0 (upper or lower), that `action` turns into an action [..., D] in [-1, 1].
    """

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size, 0.01)

    def forward(self, obs: Tensor) -> Tensor:
        """Logits [..., D]."""
        return self.network(obs)

    def sample(self, logits: Tensor) -> Tensor:
        return torch.bernoulli(logits.sigmoid())

    def mode(self, logits: Tensor) -> Tensor:
        return (logits > 0).float()

    def action(self, choice: Tensor) -> Tensor:
        return 2 * choice - 1

    def log_prob(self, logits: Tensor, choice: Tensor) -> Tensor:
        """[...], of the whole choice."""
        return -F.binary_cross_entropy_with_logits(logits, choice, reduction="none").sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """[...] in nats, from 0 to D ln 2."""
        return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two logits."""
        return (p.sigmoid() * (p - q) - F.softplus(p) + F.softplus(q)).sum(-1)


class CategoricalPolicy(nn.Module):
    """Each dimension of the action at one of `bins` evenly spaced values, bounds included; 3 is bang-off-bang."""

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size * args.bins, 0.01)
        self.register_buffer("values", torch.linspace(-1, 1, args.bins), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """Log-probabilities [..., D, bins]."""
        return self.network(obs).unflatten(-1, (-1, len(self.values))).log_softmax(-1)

    def sample(self, log_probs: Tensor) -> Tensor:
        """The index of a value, for each dimension."""
        return log_probs.flatten(0, -2).exp().multinomial(1).view(log_probs.shape[:-1])

    def mode(self, log_probs: Tensor) -> Tensor:
        return log_probs.argmax(-1)

    def action(self, choice: Tensor) -> Tensor:
        return self.values[choice]

    def log_prob(self, log_probs: Tensor, choice: Tensor) -> Tensor:
        """[...], of the whole choice."""
        return log_probs.gather(-1, choice[..., None])[..., 0].sum(-1)

    def entropy(self, log_probs: Tensor) -> Tensor:
        """[...] in nats, from 0 to D ln(bins)."""
        return -(log_probs.exp() * log_probs).sum((-2, -1))

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two log-probabilities."""
        return (p.exp() * (p - q)).sum((-2, -1))


class GaussianPolicy(nn.Module):
    """A Gaussian whose mean depends on the observation and whose deviation does not, clipped to the bounds or squashed.

    The choice is the Gaussian's own value. Clipped, log-probability and entropy are those of the choice, as in CleanRL:
    the gradient does not know that values beyond a bound act alike. Under tanh they are those of the action.
    """

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.network = mlp(obs_size, args.hidden, action_size, 0.01)
        self.log_std = nn.Parameter(torch.zeros(action_size))
        self.tanh = args.squash == "tanh"
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        self.register_buffer("nodes", torch.tensor(nodes, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "node_weights", torch.tensor(weights / weights.sum(), dtype=torch.float32), persistent=False
        )

    def forward(self, obs: Tensor) -> Tensor:
        """Mean and log standard deviation [2, ..., D]."""
        mean = self.network(obs)
        return torch.stack([mean, self.log_std.expand_as(mean)])

    def sample(self, parameters: Tensor) -> Tensor:
        return torch.normal(parameters[0], parameters[1].exp())

    def mode(self, parameters: Tensor) -> Tensor:
        """The Gaussian's mean."""
        return parameters[0]

    def action(self, choice: Tensor) -> Tensor:
        return choice.tanh() if self.tanh else choice.clamp(-1, 1)

    def log_prob(self, parameters: Tensor, choice: Tensor) -> Tensor:
        """[...], of the choice (clip) or of the action (tanh)."""
        mean, log_std = parameters
        log_prob = -0.5 * ((choice - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        return (log_prob - self.log_slope(choice) if self.tanh else log_prob).sum(-1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """[...] in nats, of the choice (clip) or of the action (tanh; by Gauss-Hermite quadrature)."""
        mean, log_std = parameters
        entropy = log_std + 0.5 * math.log(2 * math.pi * math.e)
        if self.tanh:
            choices = mean[..., None] + log_std.exp()[..., None] * self.nodes
            entropy = entropy + self.log_slope(choices) @ self.node_weights
        return entropy.sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p || q) [...] in nats, between the distributions of two parameters; tanh does not change it."""
        (p_mean, p_log_std), (q_mean, q_log_std) = p, q
        ratio, distance = (2 * (p_log_std - q_log_std)).exp(), ((p_mean - q_mean) / q_log_std.exp()) ** 2
        return (0.5 * (ratio + distance - 1) - (p_log_std - q_log_std)).sum(-1)

    @staticmethod
    def log_slope(choice: Tensor) -> Tensor:
        """log(1 - tanh(choice)^2), without cancellation."""
        return 2 * (math.log(2) - choice - F.softplus(-2 * choice))


POLICIES = {"bernoulli": BernoulliPolicy, "categorical": CategoricalPolicy, "gaussian": GaussianPolicy}


# -------------------------------------------------------------------------------------------------- normalisation


class Normalizer:
    """Running statistics that bring observations to zero mean and unit variance, and returns to unit variance."""

    def __init__(self, obs_size: int, num_envs: int, gamma: float):
        self.obs, self.returns = RunningMeanStd(shape=(obs_size,)), RunningMeanStd(shape=())
        self.discounted, self.gamma = np.zeros(num_envs), gamma

    def __call__(self, obs: np.ndarray) -> Tensor:
        """Observations [..., O] by the statistics so far, float32, at most 10 from zero."""
        scaled = (obs - self.obs.mean) / np.sqrt(self.obs.var + 1e-8)
        return torch.from_numpy(scaled.clip(-10, 10).astype(np.float32))

    def scale_reward(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Rewards [E] over the deviation of the discounted returns that they add to, at most 10 from zero."""
        self.discounted = self.discounted * self.gamma + reward
        self.returns.update(self.discounted)
        self.discounted[ended] = 0
        return (reward / np.sqrt(self.returns.var + 1e-8)).clip(-10, 10)

    def state_dict(self) -> dict:
        statistics = [x for rms in (self.obs, self.returns) for x in (rms.mean, rms.var, rms.count)]
        return {"statistics": [torch.as_tensor(x, dtype=torch.float64) for x in statistics]}

    def load_state_dict(self, state: dict) -> None:
        for rms, start in ((self.obs, 0), (self.returns, 3)):
            rms.mean, rms.var, rms.count = (x.numpy() for x in state["statistics"][start : start + 3])


# ------------------------------------------------------------------------------------------------------------ PPO


class Rollout(NamedTuple):
    """What was played: [T, E, ...], observations and rewards normalised, values those of observation and next one."""

    obs: Tensor
    choice: Tensor
    reward: Tensor
    terminated: Tensor
    ended: Tensor
    next_obs: Tensor


class Learner(nn.Module):
    """What training changes: policy, value function and their optimiser."""

    def __init__(self, args: Args, obs_size: int, action_size: int):
        super().__init__()
        self.policy = POLICIES[args.policy](args, obs_size, action_size)
        self.value = mlp(obs_size, args.hidden, 1, 1.0)
        self.optimizer = torch.optim.Adam(self.parameters(), args.learning_rate, eps=1e-5, fused=True)
        self.args = args

    @torch.no_grad()
    def act(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        """Actions [B, D] in [-1, 1] for normalised observations [B, O]."""
        parameters = self.policy(obs)
        return self.policy.action(self.policy.mode(parameters) if deterministic else self.policy.sample(parameters))


def advantages(rollout: Rollout, value: Tensor, next_value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantages [T, E] (Schulman et al. 2016, eq. 16) from the values [T, E] of obs and next_obs.

    A terminated step has no future; one that was cut off bootstraps, but nothing after it counts.
    """
    delta = rollout.reward + gamma * (1 - rollout.terminated) * next_value - value
    decay = gamma * gae_lambda * (1 - rollout.ended)
    result, advantage = np.empty(delta.shape, np.float32), np.float32(0)
    for t, (d, k) in reversed(list(enumerate(zip(delta.numpy(), decay.numpy())))):
        result[t] = advantage = d + k * advantage
    return torch.from_numpy(result)


def update(learner: Learner, rollout: Rollout) -> dict[str, Tensor]:
    """Epochs of minibatch steps on the clipped surrogate (Schulman et al. 2017, eq. 7 and 9); returns metrics []."""
    args, policy = learner.args, learner.policy
    with torch.no_grad():
        old = policy(rollout.obs)
        value, next_value = learner.value(rollout.obs)[..., 0], learner.value(rollout.next_obs)[..., 0]
        advantage = advantages(rollout, value, next_value, args.gamma, args.gae_lambda).flatten()
        log_prob, value = policy.log_prob(old, rollout.choice).flatten(), value.flatten()
        target = advantage + value
    obs, choice = rollout.obs.flatten(0, 1), rollout.choice.flatten(0, 1)
    for _ in range(args.update_epochs):
        for rows in torch.randperm(len(obs)).chunk(args.num_minibatches):
            parameters = policy(obs[rows])
            ratio = (policy.log_prob(parameters, choice[rows]) - log_prob[rows]).exp()
            a = advantage[rows]
            a = (a - a.mean()) / (a.std() + 1e-8)
            clipped = ratio.clamp(1 - args.clip_coefficient, 1 + args.clip_coefficient)
            policy_loss = -torch.minimum(ratio * a, clipped * a).mean()
            entropy = policy.entropy(parameters).mean()
            new_value = learner.value(obs[rows])[:, 0]
            near = value[rows] + (new_value - value[rows]).clamp(-args.clip_coefficient, args.clip_coefficient)
            errors = (new_value - target[rows]).square(), (near - target[rows]).square()
            value_loss = 0.5 * torch.maximum(*errors).mean()
            loss = policy_loss - args.entropy_coefficient * entropy + args.value_coefficient * value_loss
            take_step(learner.optimizer, loss, args.max_grad_norm)
    with torch.no_grad():
        kl = policy.kl(old, policy(rollout.obs)).mean()
        explained = 1 - (target - value).var() / target.var()
    metrics = {"losses/policy": policy_loss, "losses/value": value_loss, "losses/explained_variance": explained}
    metrics |= {"policy/entropy": entropy, "policy/kl": kl}
    return {name: metric.detach() for name, metric in metrics.items()}


def take_step(optimizer: torch.optim.Optimizer, loss: Tensor, max_grad_norm: float) -> None:
    """One gradient step down the loss, on the optimizer's own parameters only, their gradient clipped."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()


def saturation(actions: Tensor) -> Tensor:
    """Share [] of actions in [-1, 1] that lie within 5 % of their range from a bound."""
    return (actions.abs() >= 0.9).float().mean()


# ------------------------------------------------------------------------------------------------------ evaluation


def evaluate(
    act: Callable[[np.ndarray], Tensor], args: Args, episodes: int, seed: int, video: Path | None = None
) -> dict[str, np.ndarray]:
    """Plays act, raw observations [B, O] to actions [B, D] in [-1, 1], without touching training's random numbers.

    Returns, each [episodes]: return (undiscounted), return_without_cost, saturation, and switching_rate, the share of
    steps and dimensions where the action changes sides. The first episode goes to the GIF `video`, if given.
    """
    envs = [make_costly_env(args, "rgb_array" if video else None) for _ in range(min(episodes, 25))]
    film, results = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for wave in range(math.ceil(episodes / len(envs))):
            obs = [env.reset(seed=int(s))[0] for env, s in zip(envs, episode_seeds(1, seed, wave, len(envs)))]
            rewards, costs, played = ([[] for _ in envs] for _ in range(3))
            playing = list(range(len(envs)))
            while playing:
                if video and not wave and 0 in playing:
                    film.append(envs[0].render()[::2, ::2])
                for i, action in zip(playing, act(np.stack([obs[i] for i in playing])).numpy()):
                    obs[i], reward, terminated, truncated, info = envs[i].step(action)
                    rewards[i].append(reward)
                    costs[i].append(info["action_cost"])
                    played[i].append(action)
                    if terminated or truncated:
                        playing = [j for j in playing if j != i]
            for r, c, a in zip(rewards, costs, map(np.array, played)):
                switching_rate = (a[1:] * a[:-1] < 0).mean() if len(a) > 1 else 0.0
                results.append((sum(r), sum(r) + sum(c), saturation(torch.from_numpy(a)).item(), switching_rate))
    for env in envs:
        env.close()  # else DM Control's renderer fails at the interpreter's exit
    if video:
        import imageio

        imageio.mimsave(video, film[:: math.ceil(len(film) / 200)], duration=50, loop=0)
    return dict(zip(("return", *PLAY_COLUMNS), np.array(results[:episodes]).T))


def ways_to_play(learner: Learner, normalizer: Normalizer) -> dict[str, Callable[[np.ndarray], Tensor]]:
    """stochastic: sampled actions; deterministic: the mode of the distribution."""
    return {
        "stochastic": lambda obs: learner.act(normalizer(obs)),
        "deterministic": lambda obs: learner.act(normalizer(obs), deterministic=True),
    }


# ------------------------------------------------------------------------------------------------- files of a run


def check_args(args: Args) -> None:
    """Raise RunError for the first argument that makes no sense."""

    def require(name: str, valid: bool, choices: str) -> None:
        if not valid:
            raise RunError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not valid; it must be {choices}")

    for field in fields(args):
        smallest = {"seed": 0, "bins": 2}.get(field.name, 1)
        if field.type is int:
            require(field.name, getattr(args, field.name) >= smallest, f"a whole number of at least {smallest}")
    size = args.num_steps * args.num_envs // args.num_minibatches
    require("num_minibatches", size > 1, "small enough for two steps of a rollout in each")
    for name in ("learning_rate", "max_grad_norm", "clip_coefficient"):
        require(name, 0 < getattr(args, name) < math.inf, "a number above 0")
    for name in ("gamma", "gae_lambda"):
        require(name, 0 <= getattr(args, name) <= 1, "a number from 0 to 1")
    for name in ("action_cost", "entropy_coefficient", "value_coefficient"):
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
    check_args(args)
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    env = SyncVectorEnv([lambda: make_costly_env(args)] * args.num_envs, autoreset_mode=AutoresetMode.DISABLED)
    obs_size, action_size = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    learner, normalizer = Learner(args, obs_size, action_size), Normalizer(obs_size, args.num_envs, args.gamma)
    global_step, episode, seconds, episode_return, rows = 0, 0, 0.0, math.nan, []
    if checkpoint:
        learner.load_state_dict(checkpoint["learner"])
        learner.optimizer.load_state_dict(checkpoint["optimizer"])
        normalizer.load_state_dict(checkpoint["normalizer"])
        torch.set_rng_state(checkpoint["rng"])
        global_step, episode, seconds, episode_return, rows = checkpoint["progress"]
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
            "progress": [global_step, episode, seconds + time.monotonic() - started, episode_return, rows],
            "learner": learner.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "normalizer": normalizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_checkpoint(run_dir, contents)

    def log_evaluation(episodes: int, video: Path | None = None) -> np.ndarray:
        for mode, act in ways_to_play(learner, normalizer).items():
            played = evaluate(act, args, episodes, global_step, video if mode == "deterministic" else None)
            returns, time_taken = played["return"], round(seconds + time.monotonic() - started, 1)
            values = (global_step, time_taken, mode, float(returns.mean()), float(returns.std()), episodes)
            rows.append(dict(zip(EVALUATION_COLUMNS, values)) | {k: float(played[k].mean()) for k in PLAY_COLUMNS})
            writer.add_scalar(f"returns/{mode}", values[3], global_step)
        write_evaluations(run_dir, rows)
        return returns  # of the deterministic policy

    obs = None
    while global_step < args.total_timesteps:
        # A checkpoint cannot hold the state of any environment, so there all copies start anew, interrupted or not.
        if obs is None or global_step - last_checkpoint >= args.checkpoint_interval:
            if global_step - last_checkpoint >= args.checkpoint_interval:
                save()
                last_checkpoint = global_step
            seeds, returns = episode_seeds(0, args.seed, episode, args.num_envs), np.zeros(args.num_envs)
            obs = env.reset(seed=seeds.tolist())[0]
            normalizer.discounted[:] = 0
            episode += 1

        # Play a rollout.
        previous_step, steps, finished = global_step, [], []
        for _ in range(args.num_steps):
            normalizer.obs.update(obs)
            x = normalizer(obs)
            with torch.no_grad():
                choice = learner.policy.sample(learner.policy(x))
                actions = learner.policy.action(choice)
            next_obs, reward, terminated, truncated, _ = env.step(actions.numpy())
            ended, returns = terminated | truncated, returns + reward
            scaled = normalizer.scale_reward(reward, ended)
            steps.append((x, choice, *map(torch.from_numpy, (scaled, terminated, ended)), normalizer(next_obs)))
            if ended.any():
                finished.extend(returns[ended])
                next_obs, returns = env.reset(options={"reset_mask": ended})[0], np.where(ended, 0, returns)
            obs = next_obs
        global_step += args.num_steps * args.num_envs
        rollout = Rollout(*(torch.stack(column) for column in zip(*steps)))
        rollout = rollout._replace(**{k: getattr(rollout, k).float() for k in ("reward", "terminated", "ended")})
        check_finite([("the reward", rollout.reward)], global_step)

        # Learn.
        learner.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - previous_step / args.total_timesteps)
        metrics = update(learner, rollout)

        # Log.
        check_finite([*metrics.items(), *learner.named_parameters()], global_step)
        episode_return = float(np.mean(finished)) if finished else episode_return
        metrics["policy/saturation"] = saturation(learner.policy.action(rollout.choice))
        metrics["steps_per_second"] = (global_step - first_step) / (time.monotonic() - started)
        metrics["returns/training"] = episode_return
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), global_step)
        progress.update(global_step - previous_step)
        progress.set_postfix({"return": f"{episode_return:.2f}"})
        if (
            global_step // args.eval_interval > previous_step // args.eval_interval
            and global_step < args.total_timesteps
        ):
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


def play(args: Args) -> None:
    """--evaluate: play a run's policy and print its returns."""
    run_dir = Path(args.evaluate)
    args, checkpoint = load_checkpoint("--evaluate", run_dir, args, free=("seed", "final_eval_episodes", "num_threads"))
    check_args(args)
    env = make_costly_env(args)
    obs_size, action_size = env.observation_space.shape[0], env.action_space.shape[0]
    learner, normalizer = Learner(args, obs_size, action_size), Normalizer(obs_size, 1, args.gamma)
    learner.load_state_dict(checkpoint["learner"])
    normalizer.load_state_dict(checkpoint["normalizer"])
    for mode, act in ways_to_play(learner, normalizer).items():
        video = run_dir / f"{mode}.gif" if args.capture_video else None
        played = evaluate(act, args, args.final_eval_episodes, args.seed, video)
        returns, others = played["return"], "  ".join(f"{name} {played[name].mean():.2f}" for name in PLAY_COLUMNS)
        spread = f"{returns.mean():.2f} +- {returns.std():.2f} (std) over {len(returns)} episodes"
        print(f"{mode:13s} return {spread}  {others}")
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
