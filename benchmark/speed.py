"""Speed of the scripts as ratios, each of things measured side by side in this run (absolute times drift).

python benchmark/speed.py           # some ten minutes on an idle machine, most of them to compile and start
python benchmark/speed.py smax      # one part: mpe, compiled, mamujoco, isaaclab, processes, qvpo, bang_bang,
                                    # world4rl or smax
python benchmark/speed.py --full    # also the default run of ddpl_mpe.py, for its time and memory: some minutes more
"""

import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bang_bang  # noqa: E402
import ddpl_isaaclab  # noqa: E402
import ddpl_mamujoco  # noqa: E402
import ddpl_mpe  # noqa: E402
import ddpl_smax_jax  # noqa: E402
import qvpo  # noqa: E402
import world4rl  # noqa: E402
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


def spread_update(policy: str, num_agents: int, device: str = "cpu"):
    """A learner for simple_spread_v3 at the defaults and a batch of that shape."""
    args = ddpl_mpe.Args(policy=policy)
    obs_size = 4 + 2 * num_agents + 4 * (num_agents - 1)
    mask = torch.ones(num_agents, 2, device=device)
    learner = ddpl_mpe.Learner(args, obs_size, num_agents * obs_size, mask, alike=True)
    obs, next_obs = torch.randn(2, num_agents, args.batch_size, obs_size)
    actions = 2 * torch.rand(num_agents, args.batch_size, 2) - 1
    columns = obs, actions, torch.randn(args.batch_size), torch.zeros(args.batch_size), next_obs
    return learner, ddpl_mpe.Batch(*(column.to(device) for column in columns))


def measure_mpe() -> None:
    """ddpl_mpe.py: the update against the Gaussian's and with more agents, and the scoring of candidates."""
    runs = {f"{p} {n}": spread_update(p, n) for p, n in (("gaussian", 3), ("diffusion", 3), ("diffusion", 12))}
    ms = medians(100, **{name: lambda run=run: ddpl_mpe.update(*run) for name, run in runs.items()})
    print("ddpl_mpe.py, one update, simple_spread_v3   ms    " + "  ".join(f"{n}: {v:.1f}" for n, v in ms.items()))
    print(f"  diffusion / gaussian, N=3                 {ms['diffusion 3'] / ms['gaussian 3']:.2f}")
    print(f"  diffusion, N=12 / N=3                     {ms['diffusion 12'] / ms['diffusion 3']:.2f}")

    learner, batch = runs["diffusion 3"]
    args = learner.args
    obs = batch.obs[:, : args.actor_batch_size]
    num_candidates = args.num_uniform + len(args.sigmas) * args.num_per_kernel
    candidates = 2 * torch.rand(3, num_candidates, args.actor_batch_size, 2) - 1
    rows = torch.randn(3, num_candidates * args.actor_batch_size, args.local_critic_hidden)
    weight = learner.local_critic.hidden.weight.detach().expand(3, -1, -1)  # one for all agents
    with torch.no_grad():
        ms = medians(300, score=lambda: learner.local_critic(obs, candidates), gemm=lambda: torch.bmm(rows, weight))
    print(f"candidate scoring, share of a bare GEMM's rate   {ms['gemm'] / ms['score']:.0%}")


def finished(update, learner, batch):
    """A function that does an update and, on a GPU, waits for its end."""

    def call() -> None:
        update(learner, batch)
        if batch.reward.is_cuda:
            torch.cuda.synchronize()

    return call


def measure_compiled() -> None:
    """ddpl_mpe.py: the update through torch.compile against the eager one, on every device there is."""
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        functions, seconds = {}, {}
        for policy in ("gaussian", "diffusion"):
            eager, batch = spread_update(policy, 3, device)
            learner, _ = spread_update(policy, 3, device)
            update = ddpl_mpe.compiled(ddpl_mpe.update, learner)
            start = time.perf_counter()
            with torch._inductor.config.patch(force_disable_caches=True):  # as for the first time on a machine
                update(learner, batch)
            seconds[policy] = time.perf_counter() - start
            functions[policy] = finished(ddpl_mpe.update, eager, batch)
            functions[f"{policy} compiled"] = finished(update, learner, batch)
        ms = medians(100, **functions)
        print(f"ddpl_mpe.py, one update, {device:19s}ms    " + "  ".join(f"{n}: {v:.1f}" for n, v in ms.items()))
        for policy, compiling in seconds.items():
            share = ms[f"{policy} compiled"] / ms[policy]
            saved = ms[policy] - ms[f"{policy} compiled"]
            pays = 1e3 * compiling / saved if saved > 0 else float("inf")
            print(f"  {policy}, compiled / eager  {share:.2f}; {compiling:.0f} s to compile, {pays:.0f} updates")
        ratio = ms["diffusion compiled"] / ms["gaussian"]
        print(f"  diffusion compiled / gaussian eager       {ratio:.2f}")


def mamujoco_update(agent_conf: str, policy: str):
    """A learner for HalfCheetah at the defaults and a batch of that shape."""
    args = ddpl_mamujoco.Args(agent_conf=agent_conf, policy=policy)
    env = ddpl_mamujoco.StackedAgents(args)
    (num_agents, obs_size), action_size = env.observation_space["obs"].shape, env.action_space.shape[1]
    state_size, size = env.observation_space["state"].shape[0], args.batch_size
    learner = ddpl_mamujoco.Learner(args, obs_size, state_size, env.action_mask(), env.alike)
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
    print(f"  diffusion / gaussian, 2x3                 {ms['diffusion 2x3'] / ms['gaussian 2x3']:.2f}")
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
    print(f"  published / ours                          {ms['published'] / ms['float32']:.2f}")
    print(f"  published, with SiLU for Mish / ours      {ms['published_silu'] / ms['float32']:.2f}")
    print(f"  published / ours with --bfloat16          {ms['published'] / ms['bfloat16']:.2f}")

    learner = qvpo.Learner(qvpo.with_preset(qvpo.Args()), 17, 6)
    batch = qvpo.Batch(*(column[: learner.args.batch_size] for column in batch))
    both, critic = (lambda obs=obs: qvpo.update(learner, batch, obs, 0.02) for obs in (batch.obs, None))
    ms = medians(50, both=both, critic=critic)
    average = ms["critic"] + (ms["both"] - ms["critic"]) / learner.args.policy_frequency
    print(f"one update at --preset laptop, on average   ms    {average:.1f}")


def measure_bang_bang() -> None:
    """bang_bang.py on walker-walk, playing and learning: eight copies against one, and compiled."""
    eight = dict(num_envs=8, num_steps=256)
    variants = {"one copy": {}, "eight": eight, "eight, compiled": eight | dict(compile=True)}

    def seconds(steps: int, options: dict) -> float:
        args = bang_bang.Args("dm_control/walker-walk-v0", final_eval_episodes=1, total_timesteps=steps, **options)
        start = time.process_time()  # of one process and one thread, so other processes matter less
        bang_bang.train(args)
        return time.process_time() - start

    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        seconds(2_048, variants["eight, compiled"])  # the next ones compile from the cache
        start = {name: seconds(8_192, options) for name, options in variants.items()}
        ms = {name: 1e3 * (seconds(32_768, options) - start[name]) / 24_576 for name, options in variants.items()}
    print("bang_bang.py, one step, walker-walk         ms    " + "  ".join(f"{n}: {v:.2f}" for n, v in ms.items()))
    for name in ("eight", "eight, compiled"):
        print(f"  {name:15} / one copy                {ms[name] / ms['one copy']:.2f}")


def seconds_of(function) -> float:
    """Seconds until the arrays that function returns are there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def measure_world4rl() -> None:
    """world4rl.py: a decision imagined in 256 episodes at once against one in the simulator (door-lock-v3)."""
    args = world4rl.Args(horizon=10)
    try:
        task = world4rl.make_task(args)
    except world4rl.RunError as error:  # without Meta-World
        print(error)
        return
    learner = world4rl.Learner(args, task)
    learner.classifier[-1].bias.data.fill_(-100)  # no episode ends
    start = torch.from_numpy(task.reset(0)).float().expand(256, -1)
    action = np.zeros(task.action_size, dtype=np.float32)
    ms = medians(
        10,
        imagined=lambda: world4rl.imagine(learner, learner.policy, start),
        simulator=lambda: task.step(action),
    )
    ratio = ms["simulator"] / (ms["imagined"] / (256 * args.horizon))
    print(f"world4rl.py, simulator's time for a decision over that of an imagined one: {ratio:.1f}")
    task.close()


def measure_smax() -> None:
    """ddpl_smax_jax.py on 3m: the compiled loop, its parts, the same driven from Python, and seeds side by side."""
    args = ddpl_smax_jax.Args(log_interval=1_600)  # a short chunk, whose rates are those of a longer one
    env, length = ddpl_smax_jax.make_env(args), args.log_interval // args.num_envs

    def begin(num_seeds: int):
        return jax.jit(jax.vmap(partial(ddpl_smax_jax.begin, env, args)))(jnp.arange(num_seeds))

    def chunk(learning: bool, num_seeds: int):
        """Seconds to compile, and a function that runs a chunk (the state is donated, so it is handed on)."""
        run = ddpl_smax_jax.compiled(partial(ddpl_smax_jax.run_chunk, env, args, learning), num_seeds, donate=True)
        states = [begin(num_seeds)]

        def go() -> jax.Array:
            states[0], metrics = run(states[0], length)
            return metrics

        return seconds_of(go), go

    compile_seconds, whole = chunk(True, 1)
    _, simulation = chunk(False, 1)
    _, eight_seeds = chunk(True, 8)

    training = jax.tree.map(lambda leaf: leaf[0], begin(1))
    step = partial(ddpl_smax_jax.step, env)

    @jax.jit
    def act(training, key):
        return ddpl_smax_jax.act(training.learner.policy, env, key, training.obs)

    @jax.jit
    def acting(training, key):
        return lax.scan(lambda _, k: (act(training, k), None), act(training, key), jax.random.split(key, length))[0]

    # The same loop as separate compiled functions, called from Python step by step.
    step_all = jax.jit(jax.vmap(step))
    store = jax.jit(lambda buffer, rows, first: lax.dynamic_update_slice(buffer, rows, (first, 0)), donate_argnums=0)
    rows_of, shapes = jax.jit(ddpl_smax_jax.flat), ddpl_smax_jax.batch_shapes(env)

    @jax.jit
    def learn(learner, buffer, key):
        batch = ddpl_smax_jax.sample_batch(key, buffer, len(buffer), args, shapes)
        alive = (ddpl_smax_jax.living(env, obs) for obs in (batch.obs, batch.next_obs))
        return ddpl_smax_jax.update(learner, batch, *alive, args, key)

    def from_python(state=training) -> jax.Array:
        learner, buffer, key = state.learner, state.buffer.copy(), state.key
        env_state, obs, states, returns = state.env_state, state.obs, state.state, np.zeros(args.num_envs)
        for index in range(length):
            key, act_key, step_key, *learn_keys = jax.random.split(key, 3 + args.num_envs // args.steps_per_update)
            actions = act(state._replace(learner=learner, obs=obs), act_key)
            keys = jax.random.split(step_key, args.num_envs)
            after, env_state, next_obs, next_states = step_all(keys, env_state, actions)
            ended = after.terminated.astype(jnp.float32)
            rows = rows_of(
                ddpl_smax_jax.Batch(obs, actions, after.reward, ended, after.obs, states, after.state, ended)
            )
            buffer = store(buffer, rows, index * args.num_envs)
            returns = np.where(after.ended, 0, returns + after.reward)
            obs, states = next_obs, next_states
            for learn_key in learn_keys:
                learner, _ = learn(learner, buffer, learn_key)
        return learner

    from_python()
    functions = {"whole": whole, "simulation": simulation, "python": from_python, "eight": eight_seeds}
    functions["acting"] = lambda: acting(training, training.key)
    ms = medians(3, warm_up=1, **{name: lambda f=f: jax.block_until_ready(f()) for name, f in functions.items()})
    rates = {name: args.log_interval / ms[name] * 1e3 for name in ("whole", "simulation", "python")}
    print(f"ddpl_smax_jax.py, 3m, compiled in {compile_seconds:.0f} s     steps/s  {rates['whole']:.0f}")
    print(f"  random actions, nothing learned                    {rates['simulation']:.0f}")
    print(f"  the same loop driven from Python                   {rates['python']:.0f}")
    print(f"  compiled / driven from Python                      {ms['python'] / ms['whole']:.2f}")
    shares = ms["simulation"] / ms["whole"], ms["acting"] / ms["whole"]
    print(
        f"  share of simulation, acting, learning              {shares[0]:.0%}, {shares[1]:.0%}, {1 - sum(shares):.0%}"
    )
    print(f"  eight seeds side by side / eight runs              {ms['eight'] / 8 / ms['whole']:.2f}")
    for policy in ("diffusion", "gaussian"):
        parts = smax_update_milliseconds(replace(args, policy=policy), env)
        print(f"  {policy}, ms of an update: " + ", ".join(f"{name} {value:.1f}" for name, value in parts.items()))


def smax_update_milliseconds(args: ddpl_smax_jax.Args, env) -> dict[str, float]:
    """Milliseconds of an update and of its parts, each many times in one compiled loop, as in training."""
    shapes, keys = ddpl_smax_jax.batch_shapes(env), jax.random.split(jax.random.key(0), 16)
    learner = ddpl_smax_jax.begin(env, args, 0).learner
    transitions = [jax.random.normal(key, (args.batch_size, *shape)).clip(-1, 1) for key, shape in zip(keys, shapes)]
    batch = ddpl_smax_jax.Batch(*(x.swapaxes(0, 1) if x.ndim > 2 else x for x in transitions))
    alive = jnp.ones(batch.obs.shape[:2])

    def update(learner, key):
        return ddpl_smax_jax.update(learner, batch, alive, alive, args, key)[0]

    def sample(learner, key):
        change = learner.policy.sample(key, batch.next_obs).mean()  # so that the compiler leaves nothing out
        return learner._replace(log_temperature=learner.log_temperature + 1e-9 * change)

    def update_critic(learner, key):
        return ddpl_smax_jax.update_critic(learner, batch, batch.actions, args)[0]

    def score(learner, key):
        rows = slice(args.actor_batch_size)
        state, actions = (batch.obs[:, rows], batch.state[rows]), batch.actions[:, rows]
        candidates = jax.random.uniform(key, (len(actions), 16, *actions.shape[1:]))
        change = learner.critic.score(state, actions, candidates).mean()
        return learner._replace(log_temperature=learner.log_temperature + 1e-9 * change)

    parts = {"in all": update, "actions": sample, "central critics": update_critic}
    if args.policy == "diffusion":
        parts["scores"] = score
    loops = {
        name: jax.jit(lambda learner, part=part: lax.scan(lambda x, key: (part(x, key), None), learner, keys)[0])
        for name, part in parts.items()
    }
    ms = medians(10, warm_up=1, **{name: lambda f=f: jax.block_until_ready(f(learner)) for name, f in loops.items()})
    ms = {name: value / len(keys) for name, value in ms.items()}
    return ms | {"the policy's step, scores included": ms["in all"] - ms["actions"] - ms["central critics"]}


def isaaclab_milliseconds(num_envs: int) -> dict[str, float] | str:
    """Milliseconds of a step's parts with so many environments, or why not. A process can have one simulation only."""
    os.environ.setdefault("ISAACSIM_ASSET_ROOT", str(ROOT / "tests/assets"))
    torch.set_num_threads(1)
    args = ddpl_isaaclab.Args(device="cpu", num_envs=num_envs)
    try:
        with ddpl_isaaclab.make_env(args) as env:
            obs, state = env.reset(0)
            actions, mask = torch.rand(num_envs, 2, 1), env.action_mask()
            after = env.step(actions)
            columns = obs, actions, after.reward, after.terminated.float(), after.obs, state, after.state
            capacity = max(num_envs, args.buffer_size // 10)
            shapes = ddpl_isaaclab.Batch(*(column.shape[1:] for column in columns))
            buffer = ddpl_isaaclab.ReplayBuffer(capacity, shapes)
            while buffer.size < capacity:  # full, so that its memory is really there
                buffer.add(*columns)
            functions = {
                "simulation": lambda: env.step(actions),
                "replay": lambda: (buffer.add(*columns), buffer.sample(args.batch_size)),
            }
            for policy in ("diffusion", "gaussian"):
                own = replace(args, policy=policy)
                learner = ddpl_isaaclab.Learner(own, env.obs_size, env.state_size, mask, env.alike)
                batch = buffer.sample(args.batch_size)
                functions[f"{policy} acts"] = lambda x=learner: x.policy.sample(obs.transpose(0, 1))
                functions[f"{policy} learns"] = lambda x=learner, b=batch: ddpl_isaaclab.update(x, b)
            return medians(60, **functions) | {"bytes": sum(c.nbytes for c in buffer.data) / capacity}
    except ddpl_isaaclab.RunError as error:
        return str(error)


def measure_isaaclab() -> None:
    """ddpl_isaaclab.py: what a step of all environments is made of, with 64, 256 and 1,024 of them."""
    for num_envs in (64, 256, 1024):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            ms = process.submit(isaaclab_milliseconds, num_envs).result()
        if isinstance(ms, str):
            print(f"ddpl_isaaclab.py: not measured; {ms}")
            return
        size = ms.pop("bytes")
        parts = "  ".join(f"{name}: {value:.1f}" for name, value in ms.items())
        print(f"ddpl_isaaclab.py, {num_envs:4} environments         ms    {parts}")
        updates = num_envs / ddpl_isaaclab.Args.steps_per_update
        for policy in ("diffusion", "gaussian"):
            acts, learns = ms[f"{policy} acts"] / ms["simulation"], updates * ms[f"{policy} learns"] / ms["simulation"]
            print(f"  {policy}: acting, learning / simulation     {acts:.2f}, {learns:.2f}  ({updates:.0f} updates)")
    print(f"  a transition in the replay buffer         {size:.0f} bytes")


def measure_processes() -> None:
    """ddpl_isaaclab.py under torchrun: steps a second of one, two and four processes, each with 256 environments.

    An update learns from the batches of all processes, so there are fewer of them to a step: each process has the same
    work whatever their number.
    """
    rates = {}
    for processes in (1, 2, 4):
        steps = processes * 15_360
        flags = f"--device cpu --total-timesteps {steps} --learning-starts {steps // 3}"
        flags += f" --steps-per-update {32 * processes}"
        command = f"-m torch.distributed.run --nproc-per-node {processes} {ROOT / 'ddpl_isaaclab.py'} {flags}"
        environment = {"ISAACSIM_ASSET_ROOT": str(ROOT / "tests/assets"), "OMP_NUM_THREADS": "1"} | os.environ
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, *command.split()], cwd=folder, env=environment, check=True)
            (result,) = Path(folder).glob("runs/*/result.json")
            rates[processes] = json.loads(result.read_text())["env_steps_per_second"]
    print("ddpl_isaaclab.py, steps/s of processes      " + "  ".join(f"{n}: {rate:.0f}" for n, rate in rates.items()))
    for processes in (2, 4):
        share = rates[processes] / (processes * rates[1])
        print(f"  {processes} processes, share of as many alone      {share:.2f}  ({os.cpu_count()} cores)")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = (
        measure_mpe,
        measure_compiled,
        measure_mamujoco,
        measure_isaaclab,
        measure_processes,
        measure_qvpo,
        measure_bang_bang,
        measure_world4rl,
        measure_smax,
    )
    chosen = [part for part in parts if part.__name__.removeprefix("measure_") in sys.argv]
    for measure in chosen or parts:
        measure()
    if "--full" in sys.argv:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, str(ROOT / "ddpl_mpe.py")], cwd=folder, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        minutes = (time.perf_counter() - start) / 60
        print(f"default run: {minutes:.1f} minutes, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
