"""QVPO's update as published, step by step and without any of qvpo.py's savings: what benchmark/speed.py compares with.

From the paper's Algorithm 1 and the constants of its official code. Every candidate carries its own copy of the state
and the step through the whole network, the step's embedding is computed once per row, and all rows go through at once.
tests/test_qvpo.py shows that it computes what qvpo.py computes, given the same activation.
"""

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qvpo import TIME_FEATURES, Batch, Learner, TwinCritic


class PublishedActor(nn.Module):
    """The noise predictor on concatenated rows of noisy action, step embedding and state."""

    def __init__(self, policy: nn.Module, activation: Callable):
        super().__init__()
        self.activation, self.num_steps, self.action_size = activation, policy.num_steps, policy.action_size
        self.time = deepcopy(nn.ModuleList([policy.embedding[0], policy.embedding[2]]))
        first = nn.Linear(self.action_size + TIME_FEATURES + policy.observation.in_features, policy.epsilon.in_features)
        parts = policy.noisy_action, policy.time, policy.observation
        first.weight.data = torch.cat([part.weight.data for part in parts], 1)
        first.bias.data = policy.observation.bias.data.clone()
        self.layers = nn.ModuleList([first, *deepcopy(policy.hidden), deepcopy(policy.epsilon)])
        angle = (torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps + 0.008) / 1.008 * math.pi / 2
        signal = angle.cos() ** 2
        betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        self.betas, self.alphas, self.alphas_bar = betas.float(), 1 - betas.float(), (1 - betas).cumprod(0).float()
        self.alphas_bar_before = torch.cat([torch.ones(1), self.alphas_bar[:-1]])

    def forward(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        half = TIME_FEATURES // 2
        angles = t[:, None] * torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        embedding = self.time[1](self.activation(self.time[0](torch.cat([angles.sin(), angles.cos()], 1))))
        hidden = torch.cat([x_t, embedding, states], 1)
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        return self.layers[-1](hidden)

    @torch.no_grad()
    def sample(self, states: Tensor) -> Tensor:
        """One action for each row of states."""
        x = torch.randn(len(states), self.action_size)
        for step in reversed(range(self.num_steps)):
            t = torch.full((len(states),), step)
            signal, before = self.alphas_bar[t, None], self.alphas_bar_before[t, None]
            alpha, beta = self.alphas[t, None], self.betas[t, None]
            x_0 = (x / signal.sqrt() - (1 / signal - 1).sqrt() * self(x, t, states)).clamp(-1, 1)
            mean = (beta * before.sqrt() * x_0 + (1 - before) * alpha.sqrt() * x) / (1 - signal)
            variance = beta * (1 - before) / (1 - signal)
            x = mean + (t > 0)[:, None] * variance.sqrt() * torch.randn_like(x)
        return x.clamp(-1, 1)


class PublishedCritic(nn.Module):
    """Two separate networks on concatenated state and action."""

    def __init__(self, critic: TwinCritic, activation: Callable):
        super().__init__()
        self.activation, self.networks = activation, nn.ModuleList()
        for k in range(2):
            first = torch.cat([critic.observation.weight[k], critic.action[k]]), critic.observation.bias[k, 0]
            others = ((layer.weight[k], layer.bias[k, 0]) for layer in (*critic.hidden, critic.value))
            layers = nn.ModuleList(nn.Linear(*weight.shape) for weight, _ in (first, first, first, first))
            for i, (weight, bias) in enumerate((first, *others)):
                layers[i].weight.data, layers[i].bias.data = weight.data.T.clone(), bias.data.clone()
            self.networks.append(layers)

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        values = []
        for layers in self.networks:
            hidden = torch.cat([states, actions], 1)
            for layer in layers[:-1]:
                hidden = self.activation(layer(hidden))
            values.append(layers[-1](hidden))
        return values[0], values[1]


class PublishedLearner:
    """Networks and optimisers with the weights of a learner of qvpo.py."""

    def __init__(self, learner: Learner, activation: Callable = F.mish):
        self.args = learner.args
        self.actor, self.target_actor = (
            PublishedActor(policy, activation) for policy in (learner.policy, learner.target_policy)
        )
        self.critic, self.target_critic = (
            PublishedCritic(critic, activation) for critic in (learner.critic, learner.target_critic)
        )
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), self.args.actor_lr, eps=1e-5)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), self.args.critic_lr, eps=1e-5)

    def candidates(self, actor: PublishedActor, critic: PublishedCritic, states: Tensor, num: int) -> tuple:
        """num actions for each of B states [num, B, D] and their lower Q [num, B]."""
        rows = states.repeat(num, 1)
        actions = actor.sample(rows)
        with torch.no_grad():
            q = torch.min(*critic(rows, actions))
        return actions.view(num, len(states), -1), q.view(num, len(states))

    def update(self, batch: Batch, states: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor]:
        """One update of critics and actor; returns both losses."""
        args, size = self.args, len(states)
        actions, q = self.candidates(self.target_actor, self.target_critic, batch.next_obs, args.target_candidates)
        chosen = actions[q.argmax(0), torch.arange(len(batch.obs))]
        with torch.no_grad():
            value = torch.min(*self.target_critic(batch.next_obs, chosen))
            target = batch.reward[:, None] + args.gamma * (1 - batch.terminated[:, None]) * value
        q1, q2 = self.critic(batch.obs, batch.actions)
        critic_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self.step(self.critic, self.critic_optimizer, critic_loss)

        actions, q = self.candidates(self.actor, self.critic, states, args.num_candidates)
        weights = (q.amax(0) - q.mean(0)).clamp(min=0)[:, None] if args.q_transform == "qadv" else None
        weights = q.amax(0).clamp(min=1)[:, None] if weights is None else weights
        rows, weights = (
            states.repeat(1 + args.num_uniform, 1),
            torch.cat([weights, entropy_weight * weights.repeat(args.num_uniform, 1)]),
        )
        uniform = torch.empty(args.num_uniform * size, actions.shape[-1]).uniform_(-1, 1)
        learned = torch.cat([actions[q.argmax(0), torch.arange(size)], uniform])
        t = torch.randint(0, args.denoising_steps, (len(rows),))
        noise, signal = torch.randn_like(learned), self.actor.alphas_bar[t, None]
        predicted = self.actor(signal.sqrt() * learned + (1 - signal).sqrt() * noise, t, rows)
        actor_loss = (weights * (predicted - noise) ** 2).mean()
        self.step(self.actor, self.actor_optimizer, actor_loss)

        for target, online in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
            for theirs, ours in zip(target.parameters(), online.parameters()):
                theirs.data.copy_(args.tau * ours.data + (1 - args.tau) * theirs.data)
        return critic_loss.detach(), actor_loss.detach()

    def step(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), self.args.max_grad_norm)
        optimizer.step()
