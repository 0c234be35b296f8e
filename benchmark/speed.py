"""Speed of ddpl_mpe.py as ratios, each of things measured side by side in this run (absolute times drift).

python benchmark/speed.py           # a minute
python benchmark/speed.py --full    # also the default run, for its time and peak memory: some minutes
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ddpl_mpe import Args, Batch, Learner, update  # noqa: E402


def medians(repeats: int, **functions) -> dict[str, float]:
    """Median milliseconds of each function, called in turn so that all meet the same weather."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 5):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= 5:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def spread_update(policy: str, num_agents: int):
    """A learner for simple_spread_v3 at the defaults and a batch of that shape."""
    args = Args(policy=policy)
    obs_size = 4 + 2 * num_agents + 4 * (num_agents - 1)
    learner = Learner(args, num_agents, obs_size, 2, torch.ones(num_agents, 2))
    obs, next_obs = torch.randn(2, num_agents, args.batch_size, obs_size)
    actions = 2 * torch.rand(num_agents, args.batch_size, 2) - 1
    return learner, Batch(obs, actions, torch.randn(args.batch_size), torch.zeros(args.batch_size), next_obs)


def main() -> None:
    torch.set_num_threads(Args.num_threads)
    torch.manual_seed(0)
    runs = {f"{p} {n}": spread_update(p, n) for p, n in (("gaussian", 3), ("diffusion", 3), ("diffusion", 12))}
    ms = medians(100, **{name: lambda run=run: update(*run) for name, run in runs.items()})
    print("one update, simple_spread_v3, defaults      ms    " + "  ".join(f"{n}: {v:.1f}" for n, v in ms.items()))
    print(f"  diffusion / gaussian, N=3                 {ms['diffusion 3'] / ms['gaussian 3']:.2f}  (at most 2.5)")
    print(f"  diffusion, N=12 / N=3                     {ms['diffusion 12'] / ms['diffusion 3']:.2f}  (at most 4.4)")

    learner, batch = runs["diffusion 3"]
    args = learner.args
    obs = batch.obs[:, : args.actor_batch_size]
    num_candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    candidates = 2 * torch.rand(3, num_candidates, args.actor_batch_size, 2) - 1
    rows = torch.randn(3, num_candidates * args.actor_batch_size, args.local_critic_hidden)
    weight = learner.local_critic.hidden.weight.detach()
    with torch.no_grad():
        ms = medians(300, score=lambda: learner.local_critic(obs, candidates), gemm=lambda: torch.bmm(rows, weight))
    print(f"candidate scoring, share of a bare GEMM's rate   {ms['gemm'] / ms['score']:.0%}  (at least 50 %)")

    if "--full" in sys.argv:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(ROOT / "ddpl_mpe.py")], cwd=folder, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        minutes = (time.perf_counter() - start) / 60
        print(f"default run: {minutes:.1f} minutes (at most 10), peak memory {peak:.2f} GB (below 1)")


if __name__ == "__main__":
    main()
