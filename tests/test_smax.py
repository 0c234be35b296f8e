"""ddpl_smax_jax.py: the same maths as in PyTorch, battles, the compiled program, its run folders."""

import csv
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import command, error_of, evaluations, wait_for
from jaxmarl.viz.visualizer import SMAXVisualizer
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpl_mamujoco
import ddpl_smax_jax as smax
from benchmark import smax_diagnosis, smax_ippo
from ddpl_smax_jax import Args, make_env, train

SMALL = dict(total_timesteps=384, num_envs=8, learning_starts=64, log_interval=32, checkpoint_interval=128)
SMALL |= dict(eval_interval=128, eval_episodes=2, final_eval_episodes=3, critic_hidden=16, actor_hidden=8)
SMALL |= dict(local_critic_hidden=8, batch_size=16, actor_batch_size=8, denoising_steps=3, buffer_size=200)
N, O, S, B = 3, 5, 7, 6  # noqa: E741, agents, sizes of observation and state, batch


@pytest.fixture(autouse=True, scope="module")
def compiled_fast_and_once(tmp_path_factory):
    """Here and in the processes that the tests start: compiled without optimisations, and by the first who needs it."""
    options = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path_factory.mktemp("xla")), JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name, value)
            jax.config.update(name.lower(), value if "DIR" in name else True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- the same numbers as the PyTorch scripts


def both(*shape, low=None):
    """The same random numbers for JAX and PyTorch, normal or uniform from low to 1."""
    x = torch.randn(shape) if low is None else low + (1 - low) * torch.rand(shape)
    return jnp.asarray(x.numpy()), x


def assert_same(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


def learners(policy="diffusion"):
    """The learner in JAX, and the same parameters in PyTorch."""
    args = Args(policy=policy, critic_hidden=16, actor_hidden=8, local_critic_hidden=8, actor_batch_size=B)
    torch_args = ddpl_mamujoco.Args(**{k: getattr(args, k) for k in smax.run_arguments(args) if k in TORCH_FIELDS})
    ours = smax.Learner.create(jax.random.PRNGKey(0), args, N, O, S)
    ours = ours._replace(  # otherwise the denoiser says 0 and the target critic what the critic says
        policy=jax.tree.map(lambda x: x + 0.1, ours.policy),
        target_critic=jax.tree.map(lambda x: x - 0.05, ours.critic),
        log_temperature=jnp.log(jnp.array([0.05, 0.2, 1.0])),
    )
    theirs = ddpl_mamujoco.Learner(torch_args, N, O, 4, S, torch.ones(N, 4))
    for name in ("policy", "critic", "target_critic", "local_critic"):
        if getattr(ours, name) is not None:
            arrays = smax.named_arrays(getattr(ours, name)).items()
            getattr(theirs, name).load_state_dict({key[1:]: torch.tensor(np.asarray(x)) for key, x in arrays})
    theirs.log_temperature.data = torch.tensor(np.asarray(ours.log_temperature))
    return args, ours, theirs


TORCH_FIELDS = {field for field in ddpl_mamujoco.run_arguments(ddpl_mamujoco.Args())} - {"num_envs"}


def assert_same_learner(ours, theirs, names):
    """But for rounding, which Adam makes whole steps of where a gradient is nothing else."""
    for name in names:
        parameters, arrays = getattr(theirs, name).state_dict(), smax.named_arrays(getattr(ours, name))
        differences = [abs(np.asarray(x) - parameters[key[1:]].numpy()).flatten() for key, x in arrays.items()]
        assert (np.concatenate(differences) < 1e-4).mean() > 0.98, name
    assert_same(ours.log_temperature, theirs.log_temperature)


def drawn(arrays):
    """A stand-in for a random function of PyTorch that returns these arrays of JAX one by one."""
    queue = [torch.tensor(np.asarray(array)) for array in arrays]
    return lambda *_, **__: queue.pop(0)


@pytest.mark.parametrize("num_steps", [1, 10])
def test_schedule_and_denoising_step(num_steps):
    assert_same(smax.noise_schedule(num_steps), ddpl_mamujoco.noise_schedule(num_steps))
    (x, torch_x), (v, torch_v) = both(N, B, 4), both(N, B, 4)
    for t in range(1, num_steps + 1):
        ours = smax.denoise_step(x, v, t, smax.noise_schedule(num_steps))
        theirs = ddpl_mamujoco.denoise_step(torch_x, torch_v, t, ddpl_mamujoco.noise_schedule(num_steps))
        for mine, other in zip(ours, theirs):
            assert_same(mine, other)


@pytest.mark.parametrize("masked", [False, True])
def test_proposals(masked, monkeypatch):
    (anchor, torch_anchor), (drift, torch_drift) = both(N, B, 4, low=-1), both(2, N, B, 4)
    mask = jnp.array([[1.0, 1, 0, 1]] * N) if masked else None
    key = jax.random.PRNGKey(3)
    candidates, log_q = smax.propose_actions(key, anchor, drift, jnp.array([0.1, 0.9]), 5, 6, mask)
    assert abs(candidates).max() <= 1
    uniform_key, noise_key = jax.random.split(key)
    monkeypatch.setattr(torch, "rand", drawn([jax.random.uniform(uniform_key, (N, 5, B, 4))]))
    monkeypatch.setattr(torch, "randn", drawn([jax.random.normal(noise_key, (2, N, 6, B, 4))]))
    torch_mask = torch.tensor(np.asarray(mask)) if masked else None
    sigmas = torch.tensor([0.1, 0.9])
    theirs = ddpl_mamujoco.propose_actions(torch_anchor, torch_drift, sigmas, 5, 6, torch_mask)
    assert_same(candidates, theirs[0])
    assert_same(log_q, theirs[1])


def test_weights_and_target():
    (q, torch_q), (log_q, torch_log_q) = both(N, 16, B), both(N, 16, B)
    (x, torch_x), (actions, torch_actions) = both(N, 4, B, 4), both(N, 16, B, 4, low=-1)
    signal, torch_signal = both(N, 4, B, low=0.01)
    temperature = [0.05, 0.3, 2.0]
    ours = smax.issm_weights(q, log_q, jnp.array(temperature))
    theirs = ddpl_mamujoco.issm_weights(torch_q, torch_log_q, torch.tensor(temperature))
    for mine, other in zip(ours, theirs):
        assert_same(mine, other, 2e-5)
    mine = smax.issm_target(x, 0.99 * signal, actions, ours[0])
    assert_same(mine, ddpl_mamujoco.issm_target(torch_x, 0.99 * torch_signal, torch_actions, theirs[0]))


def test_blocks_mark_random_dimensions_among_the_real_ones():
    mask = jnp.array([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    blocks = jnp.stack([smax.random_blocks(key, mask, 3) for key in jax.random.split(jax.random.PRNGKey(0), 200)])
    assert (blocks.sum(-1) == jnp.array([3, 2])).all() and (blocks[:, 1] == mask[1]).all()
    np.testing.assert_allclose(blocks[:, 0].mean(0), 0.75, atol=0.12)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_networks(policy, monkeypatch):
    _, ours, theirs = learners(policy)
    (obs, torch_obs), (state, torch_state) = both(N, B, O), both(B, S)
    (actions, torch_actions), (candidates, torch_candidates) = both(N, B, 4, low=-1), both(N, 16, B, 4, low=-1)
    key = jax.random.PRNGKey(1)
    assert_same(ours.policy.sample(key, obs, True), theirs.policy.sample(torch_obs, deterministic=True))
    if policy == "diffusion":
        noise = jax.random.normal(key, (10, N, B, 4))
        monkeypatch.setattr(torch, "randn", drawn(noise[:1]))
        monkeypatch.setattr(torch, "randn_like", drawn([*noise[1:], noise[0]]))  # the last is multiplied by 0
        assert_same(ours.local_critic(obs, candidates), theirs.local_critic(torch_obs, torch_candidates))
    else:
        monkeypatch.setattr(torch, "randn_like", drawn([jax.random.normal(key, (N, B, 4))] * 2))
        for mine, other in zip(ours.policy.rsample(key, obs), theirs.policy.rsample(torch_obs)):
            assert_same(mine, other)
    assert_same(ours.policy.sample(key, obs), theirs.policy.sample(torch_obs))
    assert_same(ours.critic(state, actions), theirs.critic(torch_state, torch_actions))
    mine = ours.critic.score(state, actions, candidates)
    assert_same(mine, theirs.critic.score(torch_state, torch_actions, torch_candidates))


def batches():
    (obs, torch_obs), (actions, torch_actions) = both(2, N, B, O), both(N, B, 4, low=-1)
    (reward, torch_reward), (state, torch_state) = both(B), both(2, B, S)
    ended = [0.0, 1, 0, 0, 1, 0]
    ours = smax.Batch(obs[0], actions, reward, jnp.array(ended), obs[1], *state)
    theirs = torch_obs[0], torch_actions, torch_reward, torch.tensor(ended), torch_obs[1], *torch_state
    return ours, ddpl_mamujoco.Batch(*theirs)


def test_critics_and_temperature_learn_the_same():
    args, ours, theirs = learners()
    batch, torch_batch = batches()
    (actions, torch_actions), (candidates, torch_candidates) = both(N, B, 4, low=-1), both(N, 16, B, 4, low=-1)
    alive = jnp.ones((N, B))
    for _ in range(3):
        ours, metrics = smax.update_critic(ours, batch, actions, args)
        torch_metrics = ddpl_mamujoco.update_critic(theirs, torch_batch, torch_actions)
        at = batch.state, batch.obs, actions
        ours, q, more = smax.update_local_critic(ours, *at, alive, candidates, args)
        at = torch_batch.state, torch_batch.obs, torch_actions
        torch_q, torch_more = ddpl_mamujoco.update_local_critic(theirs, *at, torch_candidates)
        assert_same(q - q.mean(1, keepdims=True), torch_q - torch_q.mean(1, keepdim=True))
        excess = [0.3, -0.2, 1.0]
        ours, temperature = smax.update_temperature(ours, jnp.array(excess), args)
        torch_temperature = ddpl_mamujoco.update_temperature(theirs, torch.tensor(excess))
        metrics, torch_metrics = metrics | more | temperature, torch_metrics | torch_more | torch_temperature
        for name, value in metrics.items():
            assert_same(value, torch_metrics[name])
    assert_same_learner(ours, theirs, ["critic", "target_critic", "local_critic"])


def test_gaussian_learns_the_same(monkeypatch):
    args, ours, theirs = learners("gaussian")
    batch, torch_batch = batches()
    for number in range(3):
        key = jax.random.PRNGKey(number)
        monkeypatch.setattr(torch, "randn_like", drawn([jax.random.normal(key, (N, B, 4))]))
        ours, metrics = smax.update_gaussian(ours, batch.state, batch.obs, jnp.ones((N, B)), args, key)
        torch_metrics = ddpl_mamujoco.update_gaussian(theirs, torch_batch.state, torch_batch.obs)
        for name, value in metrics.items():
            assert_same(value, torch_metrics[name])
    assert_same_learner(ours, theirs, ["policy"])


def test_diffusion_learns_the_same(monkeypatch):
    """With the random numbers of JAX in PyTorch, step by step."""
    args, ours, theirs = learners()
    batch, torch_batch = batches()
    actions, torch_actions = both(N, B, 4, low=-1)
    for number in range(3):
        key = jax.random.PRNGKey(number)
        block_key, propose_key, draw_key, time_key, noise_key = jax.random.split(key, 5)
        block = smax.random_blocks(block_key, jnp.ones((N, 4)), args.block_size)
        uniform_key, kernel_key = jax.random.split(propose_key)
        uniform = jax.random.uniform(uniform_key, (N, 4, B, 4))
        kernel = jax.random.normal(kernel_key, (2, N, 6, B, 4))
        t = jax.random.randint(time_key, (N, 4, B), 1, args.denoising_steps + 1)
        noise = jax.random.normal(noise_key, (N, 4, B, 4))
        draws = []
        choose = jax.random.categorical
        spy = lambda *a, **k: (draws.append(choose(*a, **k)), draws[-1])[1]  # noqa: E731, B023
        monkeypatch.setattr(jax.random, "categorical", spy)
        alive = jnp.ones((N, B))
        ours, metrics = smax.update_diffusion(ours, batch.state, batch.obs, actions, alive, args, key)
        monkeypatch.setattr(jax.random, "categorical", choose)
        chosen = draws[0].transpose(1, 2, 0).reshape(N * B, 4)
        monkeypatch.setattr(ddpl_mamujoco, "random_blocks", drawn([block]))
        monkeypatch.setattr(torch, "rand", drawn([uniform]))
        monkeypatch.setattr(torch, "randn", drawn([kernel]))
        monkeypatch.setattr(torch, "randn_like", drawn([noise]))
        monkeypatch.setattr(torch, "randint", drawn([t.astype(jnp.int32)]))
        monkeypatch.setattr(torch.Tensor, "multinomial", drawn([chosen.astype(jnp.int32)]))
        with pytest.MonkeyPatch.context() as patch:  # indices are int64 in PyTorch
            patch.setattr(torch, "randint", lambda *_, t=t, **__: torch.tensor(np.asarray(t)).long())
            patch.setattr(torch.Tensor, "multinomial", lambda *_, c=chosen, **__: torch.tensor(np.asarray(c)).long())
            torch_metrics = ddpl_mamujoco.update_diffusion(theirs, torch_batch.state, torch_batch.obs, torch_actions)
        for name, value in metrics.items():
            assert_same(value, torch_metrics[name], 1e-4)
    assert_same_learner(ours, theirs, ["policy", "local_critic"])


# ---- the dead


def test_the_dead_learn_nothing():
    """What a dead agent saw and did changes neither its own parameters nor the temperature."""
    for policy in ("diffusion", "gaussian"):
        args, learner, _ = learners(policy)
        batch, _ = batches()
        alive = jnp.ones((N, B)).at[1].set(0)
        key = jax.random.PRNGKey(0)
        results = []
        for shift in (0.0, 3.0):
            moved = batch._replace(next_obs=batch.next_obs.at[1].add(shift))
            results.append(smax.update(learner, moved, jnp.ones((N, B)), alive, args, key)[0])
        for name in ("policy", "local_critic", "critic"):
            pairs = zip(jax.tree.leaves(getattr(results[0], name)), jax.tree.leaves(getattr(results[1], name)))
            for one, other in pairs:
                np.testing.assert_allclose(one, other, atol=1e-6)
        change = jax.tree.map(lambda new, old: abs(new - old)[1].max(), results[0].policy, learner.policy)
        assert max(jax.tree.leaves(change)) == 0
        assert max(jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y)[0].max(), results[0].policy, learner.policy)))


def test_the_living_are_those_with_health():
    env = make_env(Args())
    env_state, obs, _ = smax.reset(env, jax.random.PRNGKey(0))
    assert (smax.living(env, obs) == 1).all()
    state = env_state.state.replace(unit_alive=env_state.state.unit_alive.at[1].set(False))
    observations = env.get_obs(env_state.replace(state=state))
    observations["world_state"] = env.get_world_state(env_state.replace(state=state))
    obs, _ = smax.arrays(env, observations)
    assert smax.living(env, obs).tolist() == [1, 0, 1] and (obs[1] == 0).all()
    learner = learners()[1]._replace(policy=smax.DiffusionPolicy.create(jax.random.PRNGKey(0), Args(), N, obs.shape[1]))
    actions = smax.act(learner, env, jax.random.PRNGKey(0), obs[None])
    assert (actions[0, 1] == 0).all() and (actions[0, [0, 2]] != 0).all()


# ---- battles


@pytest.mark.parametrize("corpses_are_targets", [False, True])
def test_corpses_are_no_targets(corpses_are_targets):
    """The scripted team wins half of its battles, and none if it may not take its eyes off the dead."""
    env = make_env(Args(corpses_are_targets=corpses_are_targets))

    def battle(key):
        reset_key, key = jax.random.split(key)

        def play(carry, key):
            env_state, obs, playing, won = carry
            after, env_state, obs, _ = smax.step(env, key, env_state, smax_diagnosis.nearest(env, obs))
            return (env_state, obs, playing & ~after.ended, won | (playing & after.won)), None

        env_state, obs, _ = smax.reset(env, reset_key)
        start = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), env_state), obs, jnp.array(True), jnp.array(False)
        return jax.lax.scan(play, start, jax.random.split(key, 101))[0][3]

    wins = jax.jit(jax.vmap(battle))(jax.random.split(jax.random.PRNGKey(0), 64)).mean()
    assert wins < 0.1 if corpses_are_targets else wins > 0.3


def test_last_observation_and_time_limit():
    env = make_env(Args())
    env_state, obs, _ = smax.reset(env, jax.random.PRNGKey(0))
    play, actions = jax.jit(partial(smax.step, env)), jnp.ones((N, 4))  # everybody walks
    for number in range(101):
        late = env_state.replace(state=env_state.state.replace(step=jnp.array(number)))
        after, going_on, new_obs, _ = play(jax.random.PRNGKey(1), late, actions)
        if number < 100:
            assert not after.ended and going_on.state.step == number + 1 and (new_obs == after.obs).all()
    assert after.ended and not after.terminated and not after.won  # cut off, by nobody's death
    assert going_on.state.step == 0 and (new_obs != after.obs).any()
    moved = (after.obs - obs)[:, -9]  # one's own place, in widths of the map: half a second at 3.15 a second
    np.testing.assert_allclose(moved, 3.15 / 2 / 32, atol=0.01)  # the battle's own last observation, not the next one's

    dying = env_state.state.replace(unit_health=env_state.state.unit_health.at[N:].set(1e-3))
    positions = dying.unit_positions.at[N:, 0].set(-1)  # walls kill
    after, going_on, *_ = play(
        jax.random.PRNGKey(1), env_state.replace(state=dying.replace(unit_positions=positions)), actions
    )
    assert after.ended and after.terminated and after.won and after.dead_allies == 0 and after.reward > 1
    assert going_on.state.unit_alive.all()


def random_battle(env, seed):
    """The state of a battle in which everybody stands close together, the first enemy is dead, and observations."""
    env_state, *_ = smax.reset(env, jax.random.PRNGKey(0))
    state = env_state.state
    places = 14 + 5 * jax.random.uniform(jax.random.PRNGKey(seed), state.unit_positions.shape)
    alive = state.unit_alive.at[env.num_agents].set(False)
    health = state.unit_health.at[env.num_agents].set(0)
    env_state = env_state.replace(state=state.replace(unit_positions=places, unit_alive=alive, unit_health=health))
    observations = env.get_obs(env_state) | {"world_state": env.get_world_state(env_state)}
    return env_state, smax.arrays(env, observations)[0]


def targets_of_all_aims(env, env_state):
    """[N, E]: whom the package's own decoder, tried with 50 times 360 aims, can let each agent shoot at."""
    distance, angle = (x.flatten() for x in jnp.meshgrid(jnp.linspace(0, 1, 50), jnp.linspace(0, 1, 360)))
    aims = jnp.stack([jnp.ones_like(angle), jnp.zeros_like(angle), distance, angle], axis=-1)
    everybody = jnp.tile(aims[:, None], (1, len(env_state.state.unit_positions), 1))
    decode = partial(env._env._decode_continuous_actions, jax.random.PRNGKey(0), env_state.state)
    shots = jax.vmap(decode)(everybody)[1][:, : env.num_agents] - env.num_movement_actions
    return (shots[..., None] == jnp.arange(env.num_enemies)).any(0)


def test_targets_beyond_aim_are_those_that_no_action_hits():
    env, found, expected = make_env(Args(map_name="2s3z")), [], []
    for seed in range(10):
        env_state, obs = random_battle(env, seed)
        targets, missed = smax_diagnosis.unreachable(env, obs)
        found.append(missed)
        expected.append(targets & ~targets_of_all_aims(env, env_state))
    found, expected = jnp.stack(found), jnp.stack(expected)
    assert (found == expected).mean() > 0.98 and 0.1 < expected.mean() < 0.9  # slivers between two aims may differ
    assert not found[:, :, 0].any()  # the dead


def test_discrete_choices_are_translated():
    """Walking exactly, shots wherever an aim can hit, and again at the last target wherever it is."""
    env, hits = make_env(Args(map_name="2s3z")), []
    units, first = env.num_agents + env.num_enemies, env.num_movement_actions
    for seed in range(10):
        env_state, _ = random_battle(env, seed)

        def decoded(choice, env_state=env_state):
            choices = jnp.full(env.num_agents, choice)
            actions = jnp.ones((units, 4)).at[: env.num_agents].set(smax_ippo.translated(env, env_state, choices))
            assert 0 <= actions.min() and actions.max() <= 1
            return (
                x[: env.num_agents]
                for x in env._env._decode_continuous_actions(jax.random.PRNGKey(0), env_state.state, actions)
            )

        for choice in range(first):
            walk, shot = decoded(choice)
            expected = env._decode_discrete_actions(jnp.full(env.num_agents, choice))[0]
            np.testing.assert_allclose(walk, expected, atol=1e-5)
            assert (shot < first).all()
        possible = targets_of_all_aims(env, env_state)
        for enemy in range(1, env.num_enemies):  # the first is dead
            walk, shot = decoded(first + enemy)
            assert (walk == 0).all()
            hits.append((shot == first + enemy)[possible[:, enemy]])
            before = jnp.full(units, first + enemy)
            again = env_state.replace(state=env_state.state.replace(prev_attack_actions=before))
            assert (list(decoded(first + enemy, again))[1] == first + enemy).all()
    assert jnp.concatenate(hits).mean() > 0.98  # slivers between two aims


def test_state_is_normalised():
    env = make_env(Args(map_name="2s3z"))
    _, obs, state = smax.reset(env, jax.random.PRNGKey(0))
    assert obs.shape == (5, env.obs_size) and state.shape == (env.state_size,)
    assert 0 <= state.min() and state.max() == 1


def test_replay_rows_keep_their_fields():
    batch, _ = batches()
    transitions = smax.Batch(*(x.swapaxes(0, 1) if x.ndim > 2 else x for x in batch))
    rows = smax.flat(transitions)
    shapes = smax.Batch(*(x.shape[1:] for x in transitions))
    drawn_batch = smax.sample_batch(jax.random.PRNGKey(0), rows, jnp.array(2), 50, shapes)
    chosen = jax.random.randint(jax.random.PRNGKey(0), (50,), 0, 2)
    for ours, theirs in zip(drawn_batch, batch):
        assert (ours == (theirs[:, chosen] if theirs.ndim > 2 else theirs[chosen])).all()
    assert set(chosen.tolist()) == {0, 1}


# ---- the program


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    """A finished run of two seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("two_seeds"))
        result = train(Args(**SMALL, num_seeds=2))
        return result | {"run_dir": str(Path(result["run_dir"]).absolute())}


def test_train_returns_and_files(two_seeds):
    run_dir = Path(two_seeds["run_dir"])
    assert two_seeds["global_step"] == 384 and len(two_seeds["episodic_returns"]) == 2 * 3
    assert two_seeds["final_return"] == pytest.approx(np.mean(two_seeds["episodic_returns"]))
    assert json.loads((run_dir / "result.json").read_text())["win_rates"] == two_seeds["win_rates"]
    rows = list(csv.DictReader(open(run_dir / "evaluations.csv")))
    modes = ("stochastic", "deterministic")
    expected = [(step, mode, seed) for step in (128, 256, 384) for mode in modes for seed in (1, 2)]
    assert [(int(r["global_step"]), r["mode"], int(r["seed"])) for r in rows] == expected
    assert all(0 <= float(r["win_rate"]) <= 1 for r in rows)
    assert all(float(r["episode_length"]) < 101 for r in rows)  # the untrained lose before the time limit
    assert rows[-4]["return_mean"] != rows[-2]["return_mean"]  # the same seed, stochastic and deterministic
    returns = [float(r["return_mean"]) for r in rows[-2:]]  # the deterministic ones, seed by seed
    assert returns == pytest.approx(np.reshape(two_seeds["episodic_returns"], (2, 3)).mean(1))
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [point.step for point in events.Scalars("losses/critic")] == list(range(96, 385, 32))


def test_a_step_stores_what_happened():
    """At the time limit too, where the stored next observations are the last ones of the old battles."""
    args = Args(**SMALL)
    env = make_env(args)
    training = smax.begin(env, args, 1)
    state = training.env_state.state.replace(step=jnp.array([0, 100] * 4))
    training = training._replace(env_state=training.env_state.replace(state=state), returns=jnp.ones(8))
    training = training._replace(lengths=jnp.full(8, 5.0))
    new, metrics = jax.jit(partial(smax.play_and_learn, env, args, True))(training, 3)
    _, act_key, step_key, _ = jax.random.split(training.key, 4)
    actions = smax.act(training.learner, env, act_key, training.obs)
    after = jax.vmap(partial(smax.step, env))(jax.random.split(step_key, 8), training.env_state, actions)[0]
    assert after.ended.tolist() == [False, True] * 4
    batch = smax.Batch(training.obs, actions, after.reward, jnp.zeros(8), after.obs, training.state, after.state)
    np.testing.assert_allclose(new.buffer[24:32], smax.flat(batch), atol=1e-5)
    assert not new.buffer[:24].any() and not new.buffer[32:].any()
    np.testing.assert_allclose(new.returns, jnp.where(after.ended, 0, 1 + after.reward), atol=1e-5)
    assert new.lengths.tolist() == [6, 0] * 4
    assert metrics["battles"] == 4 and metrics["episode_length"] == 4 * 6


def test_evaluation_plays_to_the_time_limit():
    args = Args(**SMALL)
    env = make_env(args)
    env._env.max_steps = 4  # hence the fifth
    learner = smax.begin(env, args, 1).learner
    played = smax.evaluate(env, 2, learner, (jax.random.PRNGKey(0), jnp.array(False)))
    assert played["episode_length"].tolist() == [5, 5]


def after_four_updates(*seeds):
    """The state of runs of these seeds, before rounding errors have grown."""
    args = Args(**SMALL)
    env = make_env(args)
    training = jax.jit(jax.vmap(partial(smax.begin, env, args)))(jnp.array(seeds))
    training, _ = smax.compiled(partial(smax.run_chunk, env, args, True), len(seeds))(training, 0)
    return {name: np.asarray(values, np.float64) for name, values in smax.named_arrays(training).items()}


def assert_same_run(ours, theirs):
    """But for rounding, which Adam makes steps of where a gradient is nothing else."""
    differences = np.concatenate([abs(values - theirs[name]).flatten() for name, values in ours.items()])
    assert (differences < 1e-3).mean() > 0.99


@pytest.fixture(scope="module")
def side_by_side():
    return after_four_updates(1, 2)


def test_seeds_side_by_side_equal_single_runs(side_by_side):
    assert_same_run(after_four_updates(2), {name: values[1:] for name, values in side_by_side.items()})
    assert side_by_side[".buffer"][:, :32].any(-1).all() and not side_by_side[".buffer"][:, 32:].any()
    learned = side_by_side[".learner.policy.velocity.weight"]
    assert (learned[0] != learned[1]).any() and (learned != 0).any()


def test_two_devices_share_the_seeds(side_by_side):
    program = (
        "import numpy, test_smax as t; numpy.savez('two', n=t.smax.mesh_of_seeds(2).size, **t.after_four_updates(1, 2))"
    )
    folders = [str(Path(__file__).parent), str(Path(smax.__file__).parent)]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": os.pathsep.join(folders)}
    subprocess.run([sys.executable, "-c", program], env=os.environ | flags, check=True, capture_output=True)
    two = np.load("two.npz")
    assert two["n"] == 2
    assert_same_run(side_by_side, two)


def test_a_killed_run_resumes_bit_for_bit(two_seeds):
    process = subprocess.Popen(command(smax, **SMALL, num_seeds=2), stderr=subprocess.DEVNULL)
    wait_for(process, lambda: Path("runs").exists() and list(Path("runs").iterdir()))
    (run_dir,) = Path("runs").iterdir()
    wait_for(process, lambda: progress(run_dir) >= 256)  # has learned
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "result.json").exists()
    train(Args(resume=str(run_dir)))
    ours, theirs = (load_file(f"{folder}/checkpoint.safetensors") for folder in (run_dir, two_seeds["run_dir"]))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert evaluations(run_dir) == evaluations(two_seeds["run_dir"])


def progress(run_dir):
    path = run_dir / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["json"])["progress"][0]


def test_evaluate_plays_and_films(two_seeds, capsys, monkeypatch):
    """With the last evaluation's random numbers it plays the last evaluation's battles."""
    films, drawn = [], []
    film, checkpoint = smax.write_video, load_file(Path(two_seeds["run_dir"]) / "checkpoint.safetensors")

    class Spy(SMAXVisualizer):
        def expand_state_seq(self):
            drawn.extend(action for *_, actions in self.state_seq for action in actions.values())
            super().expand_state_seq()

    def film_last(env, learner, deterministic, key, path):
        films.append(path.name)
        assert path.name.startswith("deterministic" if deterministic else "stochastic")
        seed = int(path.stem.endswith("1"))
        np.testing.assert_array_equal(learner.log_temperature, checkpoint[".learner.log_temperature"][seed])
        if films[-1] == "deterministic1.gif":
            env._env.max_steps = 1  # drawing is slow
            film(env, learner, deterministic, key, path)

    monkeypatch.setattr("jaxmarl.viz.visualizer.SMAXVisualizer", Spy)
    monkeypatch.setattr(smax, "write_video", film_last)
    smax.main(Args(evaluate=two_seeds["run_dir"], capture_video=True, seed=two_seeds["global_step"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if "win rate" in line]
    rows = list(csv.DictReader(open(Path(two_seeds["run_dir"]) / "evaluations.csv")))[-4:]
    for line, row in zip(lines, rows, strict=True):
        numbers = (
            f"return {float(row['return_mean']):.2f} +- {float(row['return_std']):.2f}",
            f"win rate {float(row['win_rate']):.2f}",
        )
        assert line.startswith(row["mode"]) and all(number in line for number in numbers)
        assert f"length {float(row['episode_length']):.0f}  dead {float(row['dead_allies']):.1f}" in line
    assert films == ["stochastic.gif", "stochastic1.gif", "deterministic.gif", "deterministic1.gif"]
    assert (Path(two_seeds["run_dir"]) / films[-1]).stat().st_size > 10_000
    assert drawn and all(0 <= action.min() and action.max() <= 1 for action in drawn)  # as the package takes them


def test_invalid_arguments_are_named_in_one_sentence():
    for options in (
        dict(map_name="4m"),
        dict(steps_per_update=7),
        dict(log_interval=100),
        dict(num_seeds=0),
        dict(tau=0.0),
        dict(gamma=1.1),
        dict(sigmas=()),
        dict(target_entropy=0.7),
        dict(actor_lr=float("inf")),
        dict(num_uniform=1, num_per_kernel=0),
    ):
        message = error_of(smax, **options)
        name = "num-per-kernel" if "num_uniform" in options else next(iter(options)).replace("_", "-")
        assert f"--{name}" in message and ("must be" in message or "choose from" in message)
        assert not Path("runs").exists()
    assert "3m, 2s3z" in error_of(smax, map_name="4m")


def test_unfit_run_folders_are_named(two_seeds, tmp_path):
    assert "no checkpoint.safetensors" in error_of(smax, resume="runs/none")
    assert "drop --seed" in error_of(smax, resume=two_seeds["run_dir"], seed=2)
    damaged = tmp_path / "runs" / "ddpl_smax_jax__3m"
    damaged.mkdir(parents=True)
    whole = (Path(two_seeds["run_dir"]) / "checkpoint.safetensors").read_bytes()
    (damaged / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in error_of(smax, resume=str(damaged))
    assert damaged.name in error_of(smax, resume="runs/none")


def test_nan_stops_the_run(monkeypatch):
    """Instead of the compiled program: one whose critics diverge."""
    diverged = {"losses/critic": np.array([np.nan])}
    monkeypatch.setattr(smax, "compiled", lambda *_, **__: lambda training, _: (training, diverged))
    assert "losses/critic is NaN or infinite at step 32" in error_of(smax, **SMALL)
    assert not list(Path("runs").glob("*/checkpoint.safetensors"))


def test_learning_beats_the_random_team():
    """The team before any learning is the random one: 3m pays the share of health shot away, and 1 for a won battle."""
    args = Args(total_timesteps=9_600, learning_starts=2_000, log_interval=1_600, final_eval_episodes=128)
    env = make_env(args)
    learner = jax.vmap(partial(smax.begin, env, args))(jnp.array([1])).learner
    before = smax.evaluator(env, args)(learner, 128, False, 0)["returns"].mean()
    result = train(args)
    rows = list(csv.DictReader(open(Path(result["run_dir"]) / "evaluations.csv")))
    assert [float(row["return_mean"]) for row in rows if row["mode"] == "stochastic"][-1] > before + 0.1
