"""The figure of docs/issm.md: importance sampling score matching in one dimension.

    python benchmark/issm_figure.py     # half a minute; writes benchmark/results/issm.png

The functions are those of ddpl_mpe.py; the energy is known, so that nothing but ISSM itself is seen.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpl_mpe import Adam, DiffusionPolicy, issm_target, issm_weights, propose_actions, take_step  # noqa: E402

TEMPERATURE = torch.tensor([0.2])
SIGMAS, NUM_UNIFORM, NUM_PER_KERNEL = torch.tensor([0.1, 0.3]), 4, 6  # the defaults of ddpl_mpe.py
GRID = torch.linspace(-1, 1, 401)


def energy(a: Tensor) -> Tensor:
    """Two actions worth taking, of unequal width and value."""
    return 0.5 * torch.exp(-((a - 0.6) ** 2) / 0.05) + 0.4 * torch.exp(-((a + 0.5) ** 2) / 0.02)


def density() -> Tensor:
    """The energy-based policy on GRID, by quadrature."""
    unnormalised = (energy(GRID) / TEMPERATURE).exp()
    return unnormalised / torch.trapezoid(unnormalised, GRID)


def exact_denoiser(x: Tensor, alpha_bar: float) -> Tensor:
    """E[a | x_t = x] for x [K], by quadrature."""
    fit = -((x[:, None] - alpha_bar**0.5 * GRID) ** 2) / (2 * (1 - alpha_bar))
    posterior = (fit + energy(GRID) / TEMPERATURE).softmax(-1)
    return posterior @ GRID


def weighted_candidates(anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [1, M, B, 1] around anchor [1, B, 1], and their weights [1, M, B]."""
    candidates, log_proposal = propose_actions(anchor, SIGMAS, NUM_UNIFORM, NUM_PER_KERNEL)
    weights, _ = issm_weights(energy(candidates[..., 0]), log_proposal, TEMPERATURE)
    return candidates, weights


def learned_policy(num_updates: int = 3000, batch_size: int = 256) -> DiffusionPolicy:
    """A diffusion policy that has seen weighted candidates alone, proposed around its own actions."""
    policy = DiffusionPolicy(1, 1, 1, 64, 1, 20, torch.ones(1, 1), False)
    optimizer = Adam(policy.parameters(), 1e-3)
    obs = torch.zeros(1, batch_size, 1)
    for _ in range(num_updates):
        candidates, weights = weighted_candidates(policy.sample(obs))
        chosen = weights[0].T.multinomial(1)  # [B, 1]
        x_0 = candidates[0, :, :, 0].T.gather(1, chosen)[None]  # [1, B, 1]
        t = torch.randint(1, len(policy.alphas_bar), (1, batch_size))
        alpha_bar = policy.alphas_bar[t]
        signal_scale, noise_scale = alpha_bar.sqrt()[..., None], (1 - alpha_bar).sqrt()[..., None]
        x_t = signal_scale * x_0 + noise_scale * torch.randn(x_0.shape)
        denoised = issm_target(x_t[:, None], alpha_bar[:, None], candidates, weights)[:, 0]
        velocity = (signal_scale * x_t - denoised) / noise_scale
        time = F.one_hot(t, len(policy.alphas_bar)).float() @ policy.time
        take_step(optimizer, (policy(policy.observation(obs) + time, x_t) - velocity).square().mean())
    return policy


def draw(path: Path, num_updates: int = 3000) -> None:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), dpi=100)
    anchor = torch.tensor([[[0.5]]])
    candidates, weights = weighted_candidates(anchor)
    many, log_proposal = propose_actions(anchor.expand(1, 20_000, 1), SIGMAS, NUM_UNIFORM, NUM_PER_KERNEL)
    order = many.flatten().argsort()
    left.plot(GRID, density(), color="black", label="energy-based policy")
    left.plot(many.flatten()[order], log_proposal.flatten()[order].exp(), color="gray", label="proposal q")
    left.vlines(candidates.flatten(), 0, 10 * weights.flatten(), color="tab:blue")
    left.plot(candidates.flatten(), 10 * weights.flatten(), "o", color="tab:blue", markersize=4, label="weights, x 10")
    left.set(xlabel="action", title="propose and weigh")
    left.legend(fontsize=7)

    x = torch.linspace(-1.5, 1.5, 301)
    for alpha_bar, color in ((0.9, "tab:blue"), (0.6, "tab:green"), (0.2, "tab:orange")):
        ours = issm_target(x.view(1, 1, -1, 1).transpose(1, 2), torch.full((1, 301, 1), alpha_bar), candidates, weights)
        middle.plot(x, exact_denoiser(x, alpha_bar), color=color, label=f"signal variance {alpha_bar}")
        middle.plot(x, ours.flatten(), "--", color=color)
    middle.set(xlabel="x_t", title="E[a | x_t]: exact, and of the candidates")
    middle.legend(fontsize=7)

    actions = learned_policy(num_updates).sample(torch.zeros(1, 20_000, 1)).flatten().numpy()
    right.hist(actions, np.linspace(-1, 1, 61), density=True, color="tab:blue", alpha=0.6, label="diffusion policy")
    right.plot(GRID, density(), color="black", label="energy-based policy")
    right.set(xlabel="action", title="what is learned")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "benchmark" / "results" / "issm.png")
