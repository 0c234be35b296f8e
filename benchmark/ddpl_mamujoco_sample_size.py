"""How many of ISSM's candidates count, against the dimensions of an agent's action and the way to propose.

    python benchmark/ddpl_mamujoco_sample_size.py     # half a minute

The energy is separable, with two unequal modes in every dimension, so its density, entropy and mean follow by
quadrature; its temperature is set so that the entropy is DDPL's target, -0.5 nats per dimension. Every proposal has 16
candidates. The anchor of the kernels is drawn from that density itself, as if the policy had learned it; for the last
column from the upper mode alone, as if the policy had collapsed: what share of the lower mode do the weights restore?
Writes benchmark/results/mamujoco/effective_sample_size.csv and prints it.
"""

import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpl_mamujoco import issm_weights, propose_actions, random_blocks  # noqa: E402

GRID = torch.linspace(-1, 1, 4001, dtype=torch.float64)
PROPOSALS = {  # name: number of uniform candidates, number per kernel (0.1 and 0.3), block size, uphill
    "uniform": (16, 0, 9, False),
    "kernels and 4 uniform": (4, 6, 9, False),
    "kernels": (0, 8, 9, False),
    "kernels, Langevin drift": (0, 8, 9, True),
    "blocks of 3, kernels and 4 uniform": (4, 6, 3, False),
    "blocks of 3, kernels": (0, 8, 3, False),
}
STATES, SIGMAS = 20_000, torch.tensor([0.1, 0.3])


def energy(a: Tensor) -> Tensor:
    """Energy of each dimension: modes at -0.5 and 0.4, the first slightly lower."""
    return torch.logaddexp(-((a + 0.5) ** 2) / 0.08 - 0.3, -((a - 0.4) ** 2) / 0.08)


def density(temperature: float) -> Tensor:
    """Share of each grid point under exp(energy / temperature)."""
    return (energy(GRID) / temperature).softmax(0)


def entropy(temperature: float) -> float:
    """In nats per dimension."""
    share = density(temperature)
    return float(-(share * (share / (GRID[1] - GRID[0])).log()).sum())


def propose_uphill(anchor: Tensor, temperature: float, num_per_kernel: int) -> tuple[Tensor, Tensor]:
    """propose_actions without uniform candidates, the anchor moved uphill before: by each kernel's own Langevin step.

    That is sigma^2 / 2 of the log-density's gradient, at most one sigma long.
    """
    slope = torch.autograd.functional.jacobian(lambda a: energy(a).sum() / temperature, anchor)
    width = SIGMAS.view(-1, 1, 1, 1)
    drift = width**2 / 2 * slope
    drift = drift * (width / drift.norm(dim=-1, keepdim=True).clamp(min=1e-8)).clamp(max=1)
    centre = (anchor + drift).clamp(-1, 1)[:, :, None]  # [J, N, 1, B, D]
    width = width[..., None]
    kernel = centre + width * torch.randn(len(SIGMAS), 1, num_per_kernel, *anchor.shape[1:])
    kernel = kernel - 2 * (kernel - 1).clamp(min=0) - 2 * (kernel + 1).clamp(max=0)
    candidates = kernel.clamp(-1, 1).transpose(0, 1).flatten(1, 2)
    images = torch.stack([centre, 2 - centre, -2 - centre])
    log_images = -0.5 * ((candidates - images) / width) ** 2 - (width * math.sqrt(2 * math.pi)).log()
    return candidates, log_images.logsumexp(0).sum(-1).logsumexp(0) - math.log(len(SIGMAS))


def propose_and_weigh(
    share: Tensor, dimensions: int, temperature: float, proposal: tuple[int, int, int, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Candidates, their weights, the estimated entropy and the proposed block; anchors are drawn from share."""
    num_uniform, num_per_kernel, block_size, uphill = proposal
    rows = share.multinomial(STATES * dimensions, replacement=True)
    anchor = GRID[rows].float().view(1, STATES, dimensions)
    block = random_blocks(torch.ones(1, dimensions), block_size)
    if uphill:  # all dimensions at once
        candidates, log_proposal = propose_uphill(anchor, temperature, num_per_kernel)
    else:
        candidates, log_proposal = propose_actions(anchor, SIGMAS, num_uniform, num_per_kernel, block)
        candidates = candidates + (anchor * (1 - block[:, None]))[:, None]
    weights, estimate = issm_weights(energy(candidates).sum(-1), log_proposal, torch.tensor([temperature]))
    return candidates, weights, estimate, block


def measure(dimensions: int, temperature: float, proposal: tuple[int, int, int, bool]) -> dict[str, float]:
    """Effective sample size; bias of the estimated entropy per proposed dimension; restored share of the lower mode."""
    share = density(temperature)
    _, weights, estimate, block = propose_and_weigh(share, dimensions, temperature, proposal)
    candidates, collapsed_weights, *_, shown = propose_and_weigh(share * (GRID > 0), dimensions, temperature, proposal)
    in_lower = ((candidates < 0) * shown[:, None]).sum(-1) / shown.sum()
    return {
        "effective_sample_size": float((1 / weights.square().sum(1)).mean()),
        "entropy_bias": float(estimate.mean() / block.sum()) - entropy(temperature),
        "restored": float((collapsed_weights * in_lower).sum(1).mean() / share[GRID < 0].sum()),
    }


def main() -> None:
    torch.manual_seed(0)
    temperature = brentq(lambda x: entropy(x) + 0.5, 0.01, 10)
    rows = []
    for name, proposal in PROPOSALS.items():
        for dimensions in (1, 2, 3, 4, 6, 9):
            values = measure(dimensions, temperature, proposal)
            rows.append({"proposal": name, "dimensions": dimensions} | {k: round(v, 3) for k, v in values.items()})
    with open(ROOT / "benchmark" / "results" / "mamujoco" / "effective_sample_size.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in PROPOSALS:
        chosen = [row for row in rows if row["proposal"] == name]
        print(f"{name:36s}", *(np.round([r[k] for r in chosen], 2) for k in list(rows[0])[2:]))


if __name__ == "__main__":
    main()
