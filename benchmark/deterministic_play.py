"""How a diffusion policy should play without noise: returns of trained teams for several ways to choose an action.

    python benchmark/deterministic_play.py TEAM.safetensors ...      # of ddpl_mpe.py or ddpl_mamujoco.py

Prints and writes benchmark/results/deterministic_play.csv: the mean return of 50 episodes (1,000 of the short ones of
ddpl_mpe.py), which begin alike for all ways. Then it prints how the first guess differs, with its 95 % interval.
"""

import csv
import json
import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpl_mamujoco  # noqa: E402
import ddpl_mpe  # noqa: E402

EPISODES = {"ddpl_mpe": 1_000, "ddpl_mamujoco": 50}


def samples(policy: nn.Module, obs: Tensor, count: int) -> Tensor:
    """Actions [N, K, B, D] of the policy at observations [N, B, O]."""
    return policy.sample(obs.repeat(1, count, 1)).unflatten(1, (count, -1))


def without_noise(policy: nn.Module, obs: Tensor, first_guess: bool) -> Tensor:
    """Actions [N, B, D] of the scripts' own two ways."""
    policy.first_guess = first_guess
    return policy.sample(obs, deterministic=True)


def probability_flow(policy: nn.Module, obs: Tensor) -> Tensor:
    """From x_T = 0 along DDIM's deterministic path (Song et al. 2021): where the middle of the noise leads."""
    features = policy.observation(obs)
    x_t = torch.zeros(*obs.shape[:2], policy.mask.shape[-1])
    for t in range(len(policy.alphas_bar) - 1, 0, -1):
        signal, noise = policy.alphas_bar[t].sqrt(), (1 - policy.alphas_bar[t]).sqrt()
        v = policy(features + policy.time[:, t, None], x_t)
        x_0, epsilon = (signal * x_t - noise * v).clamp(-1, 1), noise * x_t + signal * v
        before = policy.alphas_bar[t - 1]
        x_t = before.sqrt() * x_0 + (1 - before).sqrt() * epsilon
    return x_t * policy.mask


def medoid(policy: nn.Module, obs: Tensor) -> Tensor:
    """That of 32 samples from which the others are least far: in the largest mode where there are several."""
    actions = samples(policy, obs, 32).transpose(1, 2)  # [N, B, K, D]
    middle = torch.cdist(actions, actions).square().sum(-1).argmin(-1)
    return actions.gather(2, middle[..., None, None].expand(-1, -1, 1, actions.shape[-1]))[:, :, 0]


WAYS = {
    "sampled": lambda policy, obs: policy.sample(obs),
    "x_T = 0, no noise": lambda policy, obs: without_noise(policy, obs, first_guess=False),
    "probability flow": probability_flow,
    "first guess": lambda policy, obs: without_noise(policy, obs, first_guess=True),
    "mean of 32": lambda policy, obs: samples(policy, obs, 32).mean(1),
    "medoid of 32": medoid,
}


class Way(nn.Module):
    """A policy that plays in one of these ways."""

    def __init__(self, policy: nn.Module, name: str):
        super().__init__()
        self.policy, self.mask, self.name = policy, policy.mask, name

    @torch.no_grad()
    def sample(self, obs: Tensor, deterministic: bool = False) -> Tensor:
        return WAYS[self.name](self.policy, obs)


def main(paths: list[str]) -> None:
    if not paths:
        raise SystemExit("deterministic_play.py: error: name teams' files, of ddpl_mpe.py or ddpl_mamujoco.py")
    scripts = {script.SCRIPT: script for script in (ddpl_mpe, ddpl_mamujoco)}
    torch.set_num_threads(1)
    rows = []
    for path in paths:
        with safe_open(path, "pt") as file:
            script = scripts[json.loads(file.metadata()["json"])["script"]]
        policy, args = script.load_team(path)
        task = getattr(args, "env_id", None) or f"{args.scenario}_{args.agent_conf}"
        episodes = EPISODES[script.SCRIPT]
        returns = {}
        for name in WAYS:
            returns[name] = script.evaluate(Way(policy, name), args, episodes, False, seed=0)
            mean, error = returns[name].mean(), returns[name].std() / math.sqrt(episodes)
            row = {"task": task, "seed": args.seed, "way": name, "return_mean": round(float(mean), 2)}
            rows.append(row | {"standard_error": round(float(error), 2), "episodes": episodes})
            print(rows[-1], flush=True)
        gain = returns["first guess"] - returns["x_T = 0, no noise"]
        middle, margin = gain.mean(), 1.96 * gain.std() / math.sqrt(episodes)
        print(f"first guess minus the chain: {middle:+.2f} [{middle - margin:+.2f}, {middle + margin:+.2f}]")
    with open(ROOT / "benchmark" / "results" / "deterministic_play.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
