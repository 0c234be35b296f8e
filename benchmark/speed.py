"""Speed of the scripts as ratios, each of things measured side by side in this run (absolute times drift).

python benchmark/speed.py           # two minutes
python benchmark/speed.py --full    # also the default run of ddpl_mpe.py, for its time and memory: some minutes more
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import ddpl_mamujoco  # noqa: E402
import ddpl_mpe  # noqa: E402
import qvpo  # noqa: E402
from benchmark.qvpo_published import PublishedLearner  # noqa: E402


def medians(repeats: int, warm_up: int = 5, **functions) -> dict[str, float]:
    """Median milliseconds of each function, called in turn so that all meet the same weather."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + warm_up):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def spread_update(policy: str, num_agents: int):
    """A learner for simple_spread_v3 at the defaults and a batch of that shape."""
    args = ddpl_mpe.Args(policy=policy)
    obs_size = 4 + 2 * num_agents + 4 * (num_agents - 1)
    learner = ddpl_mpe.Learner(args, num_agents, obs_size, 2, num_agents * obs_size, torch.ones(num_agents, 2))
    obs, next_obs = torch.randn(2, num_agents, args.batch_size, obs_size)
    actions = 2 * torch.rand(num_agents, args.batch_size, 2) - 1
    return learner, ddpl_mpe.Batch(obs, actions, torch.randn(args.batch_size), torch.zeros(args.batch_size), next_obs)


def measure_mpe() -> None:
    """ddpl_mpe.py: the update against the Gaussian's and with more agents, and the scoring of candidates."""
    runs = {f"{p} {n}": spread_update(p, n) for p, n in (("gaussian", 3), ("diffusion", 3), ("diffusion", 12))}
    ms = medians(100, **{name: lambda run=run: ddpl_mpe.update(*run) for name, run in runs.items()})
    print("ddpl_mpe.py, one update, simple_spread_v3   ms    " + "  ".join(f"{n}: {v:.1f}" for n, v in ms.items()))
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


def mamujoco_update(agent_conf: str, policy: str):
    """A learner for HalfCheetah at the defaults and a batch of that shape."""
    args = ddpl_mamujoco.Args(agent_conf=agent_conf, policy=policy)
    env = ddpl_mamujoco.StackedAgents(args)
    (num_agents, obs_size), action_size = env.observation_space["obs"].shape, env.action_space.shape[1]
    state_size, size = env.observation_space["state"].shape[0], args.batch_size
    learner = ddpl_mamujoco.Learner(args, num_agents, obs_size, action_size, state_size, env.action_mask())
    obs, next_obs = torch.randn(2, num_agents, size, obs_size)
    state, next_state = torch.randn(2, size, state_size)
    actions = 2 * torch.rand(num_agents, size, action_size) - 1
    batch = ddpl_mamujoco.Batch(obs, actions, torch.randn(size), torch.zeros(size), next_obs, state, next_state)
    return learner, batch


def play_step(env) -> None:
    """One step of every copy without forces; those that end start anew."""
    *_, terminated, truncated, _ = env.step(np.zeros(env.action_space.shape, np.float32))
    if (terminated | truncated).any():
        env.reset(options={"reset_mask": terminated | truncated})


def measure_mamujoco() -> None:
    """ddpl_mamujoco.py: the update against the Gaussian's and with more agents; copies in processes of their own."""
    runs = {f"{p} {c}": mamujoco_update(c, p) for c, p in product(("2x3", "6x1"), ("gaussian", "diffusion"))}
    ms = medians(100, **{name: lambda run=run: ddpl_mamujoco.update(*run) for name, run in runs.items()})
    print("ddpl_mamujoco.py, one update, HalfCheetah   ms    " + "  ".join(f"{n}: {v:.1f}" for n, v in ms.items()))
    print(f"  diffusion / gaussian, 2x3                 {ms['diffusion 2x3'] / ms['gaussian 2x3']:.2f}  (at most 2.5)")
    print(f"  diffusion, 6x1 / 2x3                      {ms['diffusion 6x1'] / ms['diffusion 2x3']:.2f}")

    for scenario, agent_conf in (("HalfCheetah", "2x3"), ("Ant", "4x2"), ("Humanoid", "9|8")):
        args = ddpl_mamujoco.Args(scenario=scenario, agent_conf=agent_conf)
        envs = {
            name: ddpl_mamujoco.make_vector_env(replace(args, async_envs=name == "async")) for name in ("sync", "async")
        }
        for env in envs.values():
            env.reset(seed=0)
        ms = medians(200, **{name: lambda env=env: play_step(env) for name, env in envs.items()})
        envs["async"].close()
        print(f"  {scenario}, {args.num_envs} copies in one process / in as many  {ms['sync'] / ms['async']:.2f}")


def measure_qvpo() -> None:
    """qvpo.py: the update of HalfCheetah's size at --preset paper against the published procedure, and the laptop's."""
    batch = qvpo.Batch(
        torch.randn(256, 17), torch.rand(256, 6), torch.randn(256), torch.zeros(256), torch.randn(256, 17)
    )
    learners = {
        name: qvpo.Learner(qvpo.with_preset(qvpo.Args(preset="paper", bfloat16=name == "bfloat16")), 17, 6)
        for name in ("float32", "bfloat16")
    }
    ours = {name: lambda x=x: qvpo.update(x, batch, batch.obs, 0.02) for name, x in learners.items()}
    published = {"published": PublishedLearner(learners["float32"])}
    published["published_silu"] = PublishedLearner(learners["float32"], F.silu)
    theirs = {name: lambda x=x: x.update(batch, batch.obs, 0.02) for name, x in published.items()}
    ms = medians(5, warm_up=1, **theirs, **ours)
    print("qvpo.py, one update at --preset paper       ms    " + "  ".join(f"{n}: {v:.0f}" for n, v in ms.items()))
    print(f"  published / ours                          {ms['published'] / ms['float32']:.2f}  (at least 1.7)")
    print(f"  published, with SiLU for Mish / ours      {ms['published_silu'] / ms['float32']:.2f}")
    print(f"  published / ours with --bfloat16          {ms['published'] / ms['bfloat16']:.2f}  (at least 3)")

    learner = qvpo.Learner(qvpo.with_preset(qvpo.Args()), 17, 6)
    batch = qvpo.Batch(*(column[: learner.args.batch_size] for column in batch))
    both, critic = (lambda obs=obs: qvpo.update(learner, batch, obs, 0.02) for obs in (batch.obs, None))
    ms = medians(50, both=both, critic=critic)
    average = ms["critic"] + (ms["both"] - ms["critic"]) / learner.args.policy_frequency
    print(f"one update at --preset laptop, on average   ms    {average:.1f}  (at most 40)")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measure_mpe()
    measure_mamujoco()
    measure_qvpo()
    if "--full" in sys.argv:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(ROOT / "ddpl_mpe.py")], cwd=folder, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        minutes = (time.perf_counter() - start) / 60
        print(f"default run: {minutes:.1f} minutes (at most 10), peak memory {peak:.2f} GB (below 1)")


if __name__ == "__main__":
    main()
