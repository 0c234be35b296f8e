"""ddpl_smax_jax.py: the same maths as in PyTorch, battles, the compiled program, its run folders."""

import csv
import importlib.util
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from helpers import command, error_of, evaluations, wait_for
from jaxmarl.viz.visualizer import SMAXVisualizer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddpl_mamujoco
import ddpl_mpe
import ddpl_smax_jax as smax
from benchmark import ddpl_smax_jax_diagnosis as smax_diagnosis
from benchmark import ddpl_smax_jax_ippo as smax_ippo
from ddpl_smax_jax import Args, make_env, train

SMALL = dict(
    total_timesteps=384, num_envs=8, steps_per_update=8, learning_starts=64, log_interval=32, checkpoint_interval=128
)
SMALL |= dict(eval_interval=128, eval_episodes=2, final_eval_episodes=3, critic_hidden=16, actor_hidden=8)
SMALL |= dict(local_critic_hidden=8, batch_size=16, actor_batch_size=8, denoising_steps=3, buffer_size=200)
ONE_STEP = SMALL | dict(log_interval=8)  # of every battle in a chunk
N, E, O, S, B = 3, 2, 62, 7, 8  # noqa: E741, agents, enemies, sizes of observation and state, batch


@pytest.fixture(autouse=True, scope="module")
def compiled_fast_and_once(tmp_path_factory):
    """Compiled without optimisations, and by the first who needs it, be it here or in a process that a test starts.

    Within this process runs with the same arguments share even the program, which saves tracing it again.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in options}
    programs, compile_program = {}, smax.compiled

    def compiled(function, num_seeds, device="auto", donate=False):
        env, *others = function.args
        others = [str(smax.run_arguments(replace(x, seed=0))) if isinstance(x, Args) else x for x in others]
        key = function.func.__name__, type(env._env), env._env.max_steps, *others, num_seeds, device, donate
        if key not in programs:
            programs[key] = compile_program(function, num_seeds, device, donate)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(name.upper(), str(int(value) if isinstance(value, bool) else value))
            jax.config.update(name, value)
        patch.setattr(smax, "compiled", compiled)
        with jax.default_device(jax.devices()[0]):  # as train does: a program belongs to its default device
            yield
    for name, value in before.items():
        jax.config.update(name, value)


# ---- the same numbers as the PyTorch scripts


def both(*shape, low=None):
    """The same random numbers for JAX and PyTorch, normal or uniform from low to 1."""
    x = torch.randn(shape) if low is None else low + (1 - low) * torch.rand(shape)
    return jnp.asarray(x.numpy()), x


def assert_same(ours, theirs, tolerance=1e-5):
    np.testing.assert_allclose(ours, theirs.detach(), rtol=tolerance, atol=tolerance)


class TorchCritics(NamedTuple):
    """The central critics of the PyTorch scripts, which see one long state, in the place of this script's own."""

    state: smax.StackedLinear
    actions: jax.Array
    hidden: smax.StackedLinear
    value: smax.StackedLinear

    def __call__(self, state, actions):
        _, world = state
        joint = actions.transpose(1, 0, 2).reshape(actions.shape[1], -1)
        hidden = jax.nn.relu(self.state(world) + joint @ self.actions)
        return self.value(jax.nn.relu(self.hidden(hidden)))[..., 0]

    def score(self, state, actions, candidates):
        """Each critic scores its share of the states."""
        scores = []
        for critic in range(len(self.actions)):
            rows = slice(critic * B // len(self.actions), (critic + 1) * B // len(self.actions))
            mine = jax.tree.map(lambda x, critic=critic: x[critic : critic + 1], self)

            def score(agent, candidate, rows=rows, mine=mine):
                joint = actions[:, rows].at[agent].set(candidate)
                return mine((None, state[1][rows]), joint)[0]

            share = [[score(agent, one) for one in candidates[agent][:, rows]] for agent in range(N)]
            scores.append(jnp.array(share))
        return jnp.concatenate(scores, axis=-1)


def torch_critics(key, args):
    keys = jax.random.split(key, 4)
    shapes = (S, 16), (N * 4, 16), (16, 16), (16, 1)
    weights = [smax.stacked_weight(k, args.num_critics, *shape) for k, shape in zip(keys, shapes)]
    layers = [smax.StackedLinear(weight, jnp.zeros((len(weight), 1, weight.shape[2]))) for weight in weights]
    return TorchCritics(layers[0], weights[1], *layers[2:])


class UnitsFirst(ddpl_mpe.Entities):
    """Entities of observations that end with what one knows of oneself."""

    def split(self, obs):
        return super().split(torch.cat([obs[..., -self.own :], obs[..., : -self.own]], -1))


def torch_encoder(stack, obs_size, hidden, num_layers):
    """In the place of the layers of ddpl_mamujoco.py: those of ddpl_mpe.py, with a single head of attention."""
    return ddpl_mpe.EntityEncoder(stack, obs_size, hidden, UnitsFirst(10, ((N - 1, 13), (E, 13))), width=8)


@pytest.fixture(autouse=True)
def a_single_head(monkeypatch):
    monkeypatch.setattr(ddpl_mpe, "NUM_HEADS", 1)


def learners(policy="diffusion"):
    """The learner in JAX, and the same parameters in PyTorch."""
    sizes = dict(critic_hidden=16, actor_hidden=8, local_critic_hidden=8, actor_batch_size=B, entity_width=8)
    args = Args(policy=policy, shared_policy=False, **sizes)
    torch_args = ddpl_mamujoco.Args(
        first_guess=False, **{k: getattr(args, k) for k in smax.run_arguments(args) if k in TORCH_FIELDS}
    )
    ours = smax.Learner.create(jax.random.PRNGKey(0), args, N, O, S)
    critic = torch_critics(jax.random.PRNGKey(1), args)
    optimizers = ours.optimizers | {"critic": optax.adam(0.0).init(critic)}
    ours = ours._replace(critic=critic, optimizers=optimizers)
    ours = ours._replace(  # otherwise the denoiser says 0 and the target critic what the critic says
        policy=jax.tree.map(lambda x: x + 0.1, ours.policy),
        target_critic=jax.tree.map(lambda x: x - 0.05, ours.critic),
        log_temperature=jnp.log(jnp.array([0.05, 0.2, 1.0])),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpl_mamujoco, "make_encoder", torch_encoder)
        theirs = ddpl_mamujoco.Learner(torch_args, O, S, torch.ones(N, 4), alike=True)
    for name in ("policy", "critic", "target_critic", "local_critic"):
        if getattr(ours, name) is not None:
            weights = {key: torch.tensor(np.asarray(x)) for key, x in named_as_in_torch(getattr(ours, name)).items()}
            assert set(weights) == {key for key, _ in getattr(theirs, name).named_parameters()}
            getattr(theirs, name).load_state_dict(weights, strict=False)  # PyTorch's policies have a mask besides
    theirs.log_temperature.data = torch.tensor(np.asarray(ours.log_temperature))
    return args, ours, theirs


TORCH_FIELDS = {field for field in ddpl_mamujoco.run_arguments(ddpl_mamujoco.Args())} - {"num_envs"}


def named_as_in_torch(network):
    """Its arrays; in PyTorch an encoder numbers the layer that sees the whole observation and those of each kind."""

    def in_torch(name):
        for ours, theirs in (("whole", "0"), ("ally", "kinds.0"), ("enemy", "kinds.1")):
            name = name.replace(f".observation.{ours}.", f".observation.{theirs}.")
        return name[1:]

    return {in_torch(name): x for name, x in smax.named_arrays(network).items()}


def assert_same_learner(ours, theirs, names):
    """But for rounding, which Adam makes whole steps of where a gradient is nothing else."""
    for name in names:
        parameters, arrays = getattr(theirs, name).state_dict(), named_as_in_torch(getattr(ours, name))
        differences = [abs(np.asarray(x) - parameters[key].numpy()).flatten() for key, x in arrays.items()]
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
    anchor, torch_anchor = both(N, B, 4, low=-1)
    mask = jnp.array([[1.0, 1, 0, 1]] * N) if masked else None
    key = jax.random.PRNGKey(3)
    candidates, log_proposal = smax.propose_actions(key, anchor, jnp.array([0.1, 0.9]), 5, 6, mask)
    assert abs(candidates).max() <= 1
    uniform_key, noise_key = jax.random.split(key)
    monkeypatch.setattr(torch, "rand", drawn([jax.random.uniform(uniform_key, (N, 5, B, 4))]))
    monkeypatch.setattr(torch, "randn", drawn([jax.random.normal(noise_key, (2, N, 6, B, 4))]))
    torch_mask = torch.tensor(np.asarray(mask)) if masked else None
    sigmas = torch.tensor([0.1, 0.9])
    theirs = ddpl_mamujoco.propose_actions(torch_anchor, sigmas, 5, 6, torch_mask)
    assert_same(candidates, theirs[0])
    assert_same(log_proposal, theirs[1])


def test_weights_and_target():
    (energy, torch_energy), (log_proposal, torch_log_proposal) = both(N, 16, B), both(N, 16, B)
    (x, torch_x), (actions, torch_actions) = both(N, 4, B, 4), both(N, 16, B, 4, low=-1)
    alpha_bar, torch_alpha_bar = both(N, 4, B, low=0.01)
    temperature = [0.05, 0.3, 2.0]
    ours = smax.issm_weights(energy, log_proposal, jnp.array(temperature))
    theirs = ddpl_mamujoco.issm_weights(torch_energy, torch_log_proposal, torch.tensor(temperature))
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other, 2e-5)
    mine = smax.issm_target(x, 0.99 * alpha_bar, actions, ours[0])
    assert_same(mine, ddpl_mamujoco.issm_target(torch_x, 0.99 * torch_alpha_bar, torch_actions, theirs[0]))


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
        monkeypatch.setattr(torch, "randn", drawn([*noise, noise[0]]))  # the last is multiplied by 0
        assert_same(ours.local_critic(obs, candidates), theirs.local_critic(torch_obs, torch_candidates))
    else:
        monkeypatch.setattr(torch, "randn_like", drawn([jax.random.normal(key, (N, B, 4))] * 2))
        for mine, other in zip(ours.policy.rsample(key, obs), theirs.policy.rsample(torch_obs)):
            assert_same(mine, other)
    assert_same(ours.policy.sample(key, obs), theirs.policy.sample(torch_obs))
    assert_same(ours.critic((obs, state), actions), theirs.critic(torch_state, torch_actions))
    mine = ours.critic.score((obs, state), actions, candidates)
    assert_same(mine, theirs.critic.score(torch_state, torch_actions, torch_candidates))


def batches():
    (obs, torch_obs), (actions, torch_actions) = both(2, N, B, O), both(N, B, 4, low=-1)
    (reward, torch_reward), (state, torch_state) = both(B), both(2, B, S)
    ended = [0.0, 1, 0, 0, 1, 0, 0, 0]
    ours = smax.Batch(obs[0], actions, reward, jnp.array(ended), obs[1], *state, jnp.array(ended))
    theirs = torch_obs[0], torch_actions, torch_reward, torch.tensor(ended), torch_obs[1], *torch_state
    return ours, ddpl_mamujoco.Batch(*theirs)


def test_critics_and_temperature_learn_the_same():
    args, ours, theirs = learners()
    batch, torch_batch = batches()
    (actions, torch_actions), (candidates, torch_candidates) = both(N, B, 4, low=-1), both(N, 16, B, 4, low=-1)
    alive = jnp.ones((N, B))
    update_critic, update_local_critic, update_temperature = (
        jax.jit(function, static_argnames="args")
        for function in (smax.update_critic, smax.update_local_critic, smax.update_temperature)
    )
    for _ in range(3):
        ours, metrics = update_critic(ours, batch, actions, args)
        torch_metrics = ddpl_mamujoco.update_critic(theirs, torch_batch, torch_actions)
        at = (batch.obs, batch.state), batch.obs, actions
        ours, q, more = update_local_critic(ours, *at, alive, candidates, args)
        at = torch_batch.state, torch_batch.obs, torch_actions
        torch_q, torch_more = ddpl_mamujoco.update_local_critic(theirs, *at, torch_candidates)
        assert_same(q - q.mean(1, keepdims=True), torch_q - torch_q.mean(1, keepdim=True))
        excess = [0.3, -0.2, 1.0]
        ours, temperature = update_temperature(ours, jnp.array(excess), args)
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
        ours, metrics = smax.update_gaussian(ours, (batch.obs, batch.state), batch.obs, jnp.ones((N, B)), args, key)
        torch_metrics = ddpl_mamujoco.update_gaussian(theirs, torch_batch.state, torch_batch.obs)
        for name, value in metrics.items():
            assert_same(value, torch_metrics[name])
    assert_same_learner(ours, theirs, ["policy"])


def test_diffusion_learns_the_same(monkeypatch):
    """With the random numbers of JAX in PyTorch, step by step; one agent is so cold that its temperature rises."""
    args, ours, theirs = learners()
    ours = ours._replace(log_temperature=ours.log_temperature.at[0].set(-7))
    theirs.log_temperature.data[0] = -7
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
        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "categorical", spy)
            at = (batch.obs, batch.state), batch.obs, actions
            ours, metrics = smax.update_diffusion(ours, *at, jnp.ones((N, B)), args, key)
        chosen = draws[0].transpose(1, 2, 0).reshape(N * B, 4)
        with monkeypatch.context() as patch:
            patch.setattr(ddpl_mamujoco, "random_blocks", drawn([block]))
            patch.setattr(torch, "rand", drawn([uniform]))
            patch.setattr(torch, "randn", drawn([kernel, noise]))
            patch.setattr(torch, "randint", drawn([np.int64(t)]))  # indices are int64 in PyTorch
            patch.setattr(torch.Tensor, "multinomial", drawn([np.int64(chosen)]))
            torch_metrics = ddpl_mamujoco.update_diffusion(theirs, torch_batch.state, torch_batch.obs, torch_actions)
        for name, value in metrics.items():
            assert_same(value, torch_metrics[name], 1e-4)
    assert_same_learner(ours, theirs, ["policy", "local_critic"])


# ---- the central critics


@pytest.fixture
def critics():
    """Critics, what they see, actions and candidates."""
    args = Args(num_critics=4, entity_width=6, critic_hidden=16)
    ensemble = smax.CriticEnsemble.create(jax.random.PRNGKey(0), args, S)
    ensemble = jax.tree.map(lambda x: x + 0.1, ensemble)
    (obs, _), (world, _), (actions, _), (candidates, _) = both(N, B, O), both(B, S), both(N, B, 4), both(N, 16, B, 4)
    return ensemble, (obs, world), actions, candidates


def test_critics_in_numpy(critics):
    """One state of one critic, in plain words."""
    ensemble, (obs, world), actions, _ = critics
    q = ensemble((obs, world), actions)
    assert q.shape == (4, B)

    def normal(x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5)

    critic = jax.tree.map(lambda x: np.asarray(x[2], np.float64), ensemble)
    linear = lambda layer, x: x @ layer.weight + layer.bias[0]  # noqa: E731
    for row in range(B):
        team = []
        for unit in range(N - 1 + E):
            seen = []
            for agent in range(N):
                o, a = np.asarray(obs[agent, row]), np.asarray(actions[agent, row])
                layer = critic.ally if unit < N - 1 else critic.enemy
                first = linear(critic.own, o[-10:]) + linear(layer, o[13 * unit : 13 * unit + 13])
                hidden = first[:6] + (1 + first[6:]) * (a @ critic.action)
                seen.append(linear(critic.look, np.maximum(normal(hidden), 0)))
            most = normal(np.max(seen, axis=0))
            team.append(np.maximum(linear(critic.unit, np.maximum(most, 0)), 0))
        total = linear(critic.state, world[row]) + linear(critic.team, np.mean(team, axis=0))
        hidden = linear(critic.hidden, np.maximum(normal(total), 0))
        value = linear(critic.value, np.maximum(normal(hidden), 0))
        np.testing.assert_allclose(q[2, row], value[0], rtol=1e-4, atol=1e-4)


def test_scores_are_values_of_joint_actions(critics):
    """Of each agent's candidates, with the others' actions; and every critic has its share of the states."""
    ensemble, state, actions, candidates = critics
    scores = ensemble.score(state, actions, candidates)
    for agent in range(N):
        for number in range(0, 16, 5):
            q = ensemble(state, actions.at[agent].set(candidates[agent, number]))
            share = jnp.concatenate([q[k, k * B // 4 : (k + 1) * B // 4] for k in range(4)])
            np.testing.assert_allclose(scores[agent, number], share, rtol=1e-4, atol=1e-4)


def test_critics_treat_agents_alike(critics):
    """Who has which number does not matter, only what each sees and does."""
    ensemble, (obs, world), actions, _ = critics
    np.testing.assert_allclose(
        ensemble((obs, world), actions), ensemble((obs[::-1], world), actions[::-1]), rtol=1e-4, atol=1e-4
    )


def test_the_order_of_units_means_nothing(critics):
    """Neither to critics nor to what encoders make of the units, beside the one layer that sees all at once."""
    ensemble, (obs, world), actions, _ = critics
    *seen, own = (obs[..., first : first + 13] for first in range(0, O, 13))
    reordered = jnp.concatenate([seen[1], seen[0], seen[3], seen[2], own], axis=-1)
    np.testing.assert_allclose(
        ensemble((obs, world), actions), ensemble((reordered, world), actions), rtol=1e-4, atol=1e-4
    )
    encoder = smax.EntityEncoder.create(jax.random.PRNGKey(0), N, O, 16, 8)
    encoder = encoder._replace(whole=jax.tree.map(jnp.zeros_like, encoder.whole))
    np.testing.assert_allclose(encoder(obs), encoder(reordered), rtol=1e-4, atol=1e-5)
    kinds_swapped = jnp.concatenate([seen[2], seen[3], seen[0], seen[1], own], axis=-1)
    assert abs(encoder(obs) - encoder(kinds_swapped)).max() > 0.01


def test_units_are_where_the_package_puts_them():
    """Allies without oneself, then enemies, by what is seen of them: the way to them is theirs minus one's own."""
    env = make_env(Args(map_name="5m_vs_6m"))
    assert (len(env.own_features), len(env.unit_features)) == (smax.OWN_FEATURES, smax.UNIT_FEATURES)
    env_state, obs, _ = smax.reset(env, jax.random.PRNGKey(0))
    own, allies, enemies = smax.units(obs)
    assert (own.shape, allies.shape, enemies.shape) == ((5, 10), (5, 4, 13), (5, 6, 13))
    places = env_state.state.unit_positions
    np.testing.assert_allclose(own[:, 1:3] * jnp.array([env.map_width, env.map_height]), places[:5], rtol=1e-5)
    sight = env.unit_type_sight_ranges[env_state.state.unit_types[:5]]
    for agent in range(5):
        others = [unit for unit in range(5) if unit != agent]
        for units, numbers in ((allies, others), (enemies, range(5, 11))):
            for unit, number in zip(units[agent], numbers, strict=True):
                way = places[number] - places[agent]
                visible = jnp.linalg.norm(way) < sight[agent]
                np.testing.assert_allclose(unit[1:3] * sight[agent], jnp.where(visible, way, 0), atol=1e-5)


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
            moved = batch._replace(obs=batch.obs.at[1].add(shift))
            results.append(smax.update(learner, moved, alive, alive, args, key)[0])
        for name in ("policy", "local_critic", "log_temperature"):
            pairs = zip(jax.tree.leaves(getattr(results[0], name)), jax.tree.leaves(getattr(results[1], name)))
            for one, other in pairs:
                np.testing.assert_allclose(one, other, atol=1e-6)
        change = jax.tree.map(lambda new, old: abs(new - old)[1].max(), results[0].policy, learner.policy)
        assert max(jax.tree.leaves(change)) == 0
        assert max(jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y)[0].max(), results[0].policy, learner.policy)))


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_policies_learn_at_the_first_states(policy, monkeypatch):
    """With those who live there; the diffusion policy's actions there are its own."""
    args, learner, _ = learners(policy)
    args = replace(args, actor_batch_size=B // 2)
    batch, _ = batches()
    alive, next_alive = jnp.ones((N, B)).at[0, :3].set(0), jnp.ones((N, B)).at[1, :3].set(0)
    name, calls = f"update_{policy}", []
    monkeypatch.setattr(smax, name, lambda *given: calls.append(given) or (given[0], {}))
    smax.update(learner, batch, alive, next_alive, args, jax.random.PRNGKey(0))
    ((_, (seen, state), obs, *actions, living, _, _),) = calls
    rows = B // 2 if policy == "diffusion" else B
    assert (obs == batch.obs[:, :rows]).all() and (seen == obs).all() and (state == batch.state[:rows]).all()
    assert (living == alive[:, :rows]).all()
    for drawn in actions:
        assert drawn.shape == (N, rows, 4) and ((drawn == 0).all(-1) == (living == 0)).all()


def test_the_living_are_those_with_health():
    env = make_env(Args())
    env_state, obs, _ = jax.jit(partial(smax.reset, env))(jax.random.PRNGKey(0))
    assert (smax.living(env, obs) == 1).all()
    state = env_state.state.replace(unit_alive=env_state.state.unit_alive.at[1].set(False))

    @jax.jit
    def look(env_state):
        observations = env.get_obs(env_state) | {"world_state": env.get_world_state(env_state)}
        return smax.arrays(env, observations)[0]

    obs = look(env_state.replace(state=state))
    assert smax.living(env, obs).tolist() == [1, 0, 1] and (obs[1] == 0).all()
    learner = learners()[1]._replace(policy=smax.DiffusionPolicy.create(jax.random.PRNGKey(0), Args(), N, obs.shape[1]))
    actions = smax.act(learner.policy, env, jax.random.PRNGKey(0), obs[None])
    assert (actions[0, 1] == 0).all() and (actions[0, [0, 2]] != 0).all()


# ---- battles


@pytest.mark.parametrize("raw_actions", [False, True])
def test_scripted_teams_win(raw_actions):
    """Half of their battles, and none with the package's decoder, which does not take its eyes off the dead."""
    env = make_env(Args(raw_actions=raw_actions))
    chart = polar if raw_actions else lambda actions: actions

    def battle(key):
        reset_key, key = jax.random.split(key)

        def play(carry, key):
            env_state, obs, playing, won = carry
            after, env_state, obs, _ = smax.step(env, key, env_state, chart(smax_diagnosis.nearest(env, obs)))
            return (env_state, obs, playing & ~after.ended, won | (playing & after.won)), None

        env_state, obs, _ = smax.reset(env, reset_key)
        start = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), env_state), obs, jnp.array(True), jnp.array(False)
        return jax.lax.scan(play, start, jax.random.split(key, 101))[0][3]

    wins = jax.jit(jax.vmap(battle))(jax.random.split(jax.random.PRNGKey(0), 64)).mean()
    assert wins < 0.1 if raw_actions else wins > 0.3


def polar(actions):
    """Actions [..., 4] in [-1, 1] for the package's own decoder that mean the same."""
    x, y = actions[..., 2], actions[..., 3]
    distance, angle = jnp.hypot(x, y).clip(0, 1), jnp.arctan2(y, x) / (2 * jnp.pi) % 1
    return jnp.concatenate([actions[..., :2], 2 * jnp.stack([distance, angle], axis=-1) - 1], axis=-1)


def decoded(env, env_state, actions, seed=0):
    """Walks [N, 2] and shots [N] of the agents' actions [N, 4] in [-1, 1]."""
    everybody = jnp.ones((env.num_agents + env.num_enemies, 4)).at[: env.num_agents].set(actions / 2 + 0.5)
    results = env._env._decode_continuous_actions(jax.random.PRNGKey(seed), env_state.state, everybody)
    return tuple(x[: env.num_agents] for x in results)


@pytest.fixture(scope="module")
def battles_at_close_range():
    """The environment and the package's own, ten battles in which some are in range, and what they can do [N, 10]."""
    env, package = (make_env(Args(map_name="2s3z", raw_actions=raw)) for raw in (False, True))
    battles = [random_battle(env, seed)[0] for seed in range(10)]
    available = [env.get_avail_actions(battle) for battle in battles]
    return env, package, battles, [np.stack([can[agent] for agent in env.agents]) > 0 for can in available]


def test_the_chart_is_onto_and_can_be_inverted(battles_at_close_range):
    """Every distance and angle of the package is a vector, which walks the same way; a longer vector is cut."""
    env, package, battles, _ = battles_at_close_range
    distance, angle = (x.flatten() for x in jnp.meshgrid(jnp.linspace(0, 1, 6), jnp.linspace(0, 0.999, 25)))
    walk = jnp.ones_like(angle)
    theirs = jnp.stack([walk, walk, 2 * distance - 1, 2 * angle - 1], axis=-1)
    turn = 2 * jnp.pi * angle
    ours = jnp.stack([walk, walk, distance * jnp.cos(turn), distance * jnp.sin(turn)], axis=-1)
    assert abs(ours).max() <= 1
    back = polar(ours)
    np.testing.assert_allclose(jnp.where(distance[:, None] > 0, back - theirs, 0), 0, atol=1e-4)

    @partial(jax.jit, static_argnums=0)
    def walks(env, actions):
        return jax.vmap(lambda one: decoded(env, battles[0], jnp.tile(one, (env.num_agents, 1)))[0])(actions)

    np.testing.assert_allclose(walks(env, ours), walks(package, theirs), atol=1e-5)
    outside = ours.at[:, 2:].multiply(0.5 / distance[:, None].clip(0.1)).at[:, 2:].multiply(4)  # of length two
    longest = outside.at[:, 2:].divide(2)
    np.testing.assert_allclose(walks(env, outside)[distance > 0.1], walks(env, longest)[distance > 0.1], atol=1e-5)


def test_what_can_be_done_is_what_the_package_says(battles_at_close_range):
    """Whatever the action, shots are among get_avail_actions; who cannot shoot walks, who can and wants to shoots."""
    env, _, battles, available = battles_at_close_range
    first = env.num_movement_actions
    last = jnp.array([0, *range(first, first + env.num_enemies)])

    @jax.jit
    def play(battle, seed):
        actions = jax.random.uniform(jax.random.PRNGKey(seed), (env.num_agents, 4), minval=-1)
        state = battle.state
        before = jnp.resize(jnp.roll(last, seed), state.prev_attack_actions.shape)
        battle = battle.replace(state=state.replace(prev_attack_actions=before.astype(state.prev_attack_actions.dtype)))
        return actions, before, decoded(env, battle, actions, seed)

    seen = set()
    for battle, can in zip(battles, available):
        position = np.asarray(battle.state.unit_positions)
        for seed in range(24):
            actions, before, (walk, shot) = jax.tree.map(np.asarray, play(battle, seed))
            for agent in range(env.num_agents):
                walks = (walk[agent] != 0).any()
                assert walks == (shot[agent] == 0)  # a drawn vector is never 0
                assert walks or (shot[agent] >= first and can[agent, shot[agent]])
                assert walks or can[agent, first:].any()
                not_again, not_shoot = actions[agent, :2]
                if can[agent, first:].any():
                    assert walks == (not_shoot > 0)
                seen.add((bool(walks), bool(can[agent, first:].any())))
                if walks:
                    continue
                if not_again <= 0 and before[agent] >= first and can[agent, before[agent]]:
                    assert shot[agent] == before[agent]
                else:  # the nearest to the aim among those in range
                    aim = position[agent] + actions[agent, 2:] / max(np.linalg.norm(actions[agent, 2:]), 1)
                    gaps = np.linalg.norm(position[env.num_allies :] - aim, axis=1)
                    assert shot[agent] == first + np.where(can[agent, first:], gaps, np.inf).argmin()
    assert seen == {(True, True), (True, False), (False, True)}


@pytest.fixture(scope="module")
def step_of_3m():
    return jax.jit(partial(smax.step, make_env(Args())))


def test_last_observation_and_time_limit(step_of_3m):
    env = make_env(Args())
    env_state, obs, _ = smax.reset(env, jax.random.PRNGKey(0))
    actions = jnp.tile(jnp.array([1.0, 1, 1, 0]), (N, 1))  # everybody walks along x
    for number in range(101):
        late = env_state.replace(state=env_state.state.replace(step=jnp.array(number)))
        after, going_on, new_obs, _ = step_of_3m(jax.random.PRNGKey(1), late, actions)
        if number < 100:
            assert not after.ended and going_on.state.step == number + 1 and (new_obs == after.obs).all()
    assert after.ended and not after.terminated and not after.won  # cut off, by nobody's death
    assert going_on.state.step == 0 and (new_obs != after.obs).any()
    moved = (after.obs - obs)[:, -9]  # one's own place, in widths of the map: half a second at 3.15 a second
    np.testing.assert_allclose(moved, 3.15 / 2 / 32, atol=0.01)  # the battle's own last observation, not the next one's

    dying = env_state.state.replace(unit_health=env_state.state.unit_health.at[N:].set(1e-3))
    positions = dying.unit_positions.at[N:, 0].set(-1)  # walls kill
    dying = env_state.replace(state=dying.replace(unit_positions=positions))
    after, going_on, *_ = step_of_3m(jax.random.PRNGKey(1), dying, actions)
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
    """[N, E]: whom the decoder, tried with 50 times 360 aims, can let each agent shoot at."""
    distance, angle = (x.flatten() for x in jnp.meshgrid(jnp.linspace(0, 1, 50), jnp.linspace(0, 2 * jnp.pi, 360)))
    x, y = distance * jnp.cos(angle), distance * jnp.sin(angle)
    aims = jnp.stack([jnp.ones_like(x), jnp.zeros_like(x), x / 2 + 0.5, y / 2 + 0.5], axis=-1)
    everybody = jnp.tile(aims[:, None], (1, len(env_state.state.unit_positions), 1))
    decode = partial(env._env._decode_continuous_actions, jax.random.PRNGKey(0), env_state.state)
    shots = jax.vmap(decode)(everybody)[1][:, : env.num_agents] - env.num_movement_actions
    return (shots[..., None] == jnp.arange(env.num_enemies)).any(0)


@pytest.fixture(scope="module")
def battles_of_2s3z():
    """The environment, and ten of its random battles: states, observations, whom an aim can hit."""
    env = make_env(Args(map_name="2s3z"))

    @jax.jit
    def battle(seed):
        env_state, obs = random_battle(env, seed)
        return env_state, obs, targets_of_all_aims(env, env_state)

    return env, [battle(seed) for seed in range(10)]


def test_targets_beyond_aim_are_those_that_no_action_hits(battles_of_2s3z):
    env, battles = battles_of_2s3z
    unreachable = jax.jit(partial(smax_diagnosis.unreachable, env))
    found, expected = [], []
    for _, obs, possible in battles:
        targets, missed = unreachable(obs)
        found.append(missed)
        expected.append(targets & ~possible)
    found, expected = np.stack(found), np.stack(expected)
    assert (found == expected).mean() > 0.98 and 0.1 < expected.mean() < 0.9  # slivers between two aims may differ
    assert not found[:, :, 0].any()  # the dead


def test_discrete_choices_are_translated(battles_of_2s3z):
    """Walking exactly, shots wherever an aim can hit, and again at the last target wherever it is in range."""
    env, battles = battles_of_2s3z
    units, first = env.num_agents + env.num_enemies, env.num_movement_actions

    @jax.jit
    def translated(env_state, choice):
        choices = jnp.full(env.num_agents, choice)
        actions = jnp.ones((units, 4)).at[: env.num_agents].set(smax_ippo.translated(env, env_state, choices))
        decoded = env._env._decode_continuous_actions(jax.random.PRNGKey(0), env_state.state, actions)
        return actions, *(x[: env.num_agents] for x in decoded)

    def walk_and_shot(env_state, choice):
        actions, walk, shot = (np.asarray(x) for x in translated(env_state, choice))
        assert 0 <= actions.min() and actions.max() <= 1
        return walk, shot

    walks = [env._decode_discrete_actions(jnp.full(env.num_agents, choice))[0] for choice in range(first)]
    hits = []
    for env_state, _, possible in battles:
        for choice in range(first):
            walk, shot = walk_and_shot(env_state, choice)
            np.testing.assert_allclose(walk, walks[choice], atol=1e-5)
            assert (shot < first).all()
        for enemy in range(1, env.num_enemies):  # the first is dead
            available = env.get_avail_actions(env_state)
            in_range = np.array([available[agent][first + enemy] for agent in env.agents], bool)
            walk, shot = walk_and_shot(env_state, first + enemy)
            assert (walk == 0)[in_range].all()
            hits.append((shot == first + enemy)[np.asarray(possible)[:, enemy]])
            before = jnp.full(units, first + enemy)
            again = env_state.replace(state=env_state.state.replace(prev_attack_actions=before))
            _, shot = walk_and_shot(again, first + enemy)
            assert (shot == first + enemy)[in_range].all()
    assert np.concatenate(hits).mean() > 0.98  # slivers between two aims


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
    args = Args(batch_size=50, num_steps=1, num_envs=1)
    drawn_batch = smax.sample_batch(jax.random.PRNGKey(0), rows, jnp.array(2), args, shapes)
    chosen = jax.random.randint(jax.random.PRNGKey(0), (50,), 0, 2)
    for ours, theirs in zip(drawn_batch, batch):
        np.testing.assert_allclose(ours, theirs[:, chosen] if theirs.ndim > 2 else theirs[chosen], rtol=1e-6)
    assert set(chosen.tolist()) == {0, 1}


@pytest.mark.parametrize("stored", [14, 24, 46])
def test_rewards_of_several_steps(stored):
    """A buffer of 24 rows of two battles, filled in part, once, and nearly twice; a row's observation is its number.

    Battles end at every fifth step, every other time for good.
    """
    steps = np.arange(stored)
    obs, ended = steps[:, None, None] * np.ones((1, N, 1)), (steps // 2 % 5 == 4) * 1.0
    terminated = ended * (steps // 10 % 2)
    whole = smax.Batch(obs, np.zeros((stored, N, 4)), steps**2.0, terminated, obs + 2, obs[:, 0], obs[:, 0] + 2, ended)
    rows = smax.flat(jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), whole))
    buffer = jnp.zeros((24, rows.shape[1])).at[steps[-24:] % 24].set(rows[-24:])
    args = Args(batch_size=400, num_steps=3, num_envs=2, gamma=0.9)
    shapes = smax.Batch(*(x.shape[1:] for x in whole))
    batch = smax.sample_batch(jax.random.PRNGKey(0), buffer, jnp.array(stored), args, shapes)
    assert set(np.asarray(batch.obs[0, :, 0]).tolist()) == set(steps[-24:].tolist())
    for number in range(400):
        first = int(batch.obs[0, number, 0])
        span = [first]
        while len(span) < 3 and not ended[span[-1]] and span[-1] + 2 < stored:
            span.append(span[-1] + 2)
        reward = sum(0.9**n * step**2 for n, step in enumerate(span))
        np.testing.assert_allclose(batch.reward[number], reward, rtol=1e-5)
        assert (batch.next_obs[:, number] == span[-1] + 2).all() and batch.next_state[number] == span[-1] + 2
        # in the critics' target, what comes next counts for gamma (1 - terminated)
        weight = 0.9 ** len(span) * (1 - terminated[span[-1]])
        np.testing.assert_allclose(0.9 * (1 - batch.terminated[number]), weight, rtol=1e-4, atol=1e-6)


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
    stochastic, deterministic = ([row | {"mode": ""} for row in pair] for pair in (rows[-4:-2], rows[-2:]))
    assert stochastic != deterministic  # the same seeds
    returns = [float(r["return_mean"]) for r in rows[-2:]]  # the deterministic ones, seed by seed
    assert returns == pytest.approx(np.reshape(two_seeds["episodic_returns"], (2, 3)).mean(1))
    events = EventAccumulator(str(run_dir))
    events.Reload()
    assert [point.step for point in events.Scalars("losses/critic")] == list(range(96, 385, 32))


@pytest.mark.slow
def test_a_step_stores_what_happened(step_of_3m):
    """At the time limit too, where the stored next observations are the last ones of the old battles."""
    args = Args(**ONE_STEP)
    env = make_env(args)
    seeds = smax.begin_seeds(env, args)
    state = seeds.env_state.state.replace(step=jnp.array([[0, 100] * 4]))
    seeds = seeds._replace(env_state=seeds.env_state.replace(state=state))
    seeds = seeds._replace(returns=jnp.ones((1, 8)), lengths=5 * jnp.ones((1, 8)))
    seeds = jax.device_put(seeds, smax.sharding_of_seeds(args))
    training = jax.tree.map(lambda leaf: leaf[0].copy(), seeds)  # the program takes the memory of the other
    chunk = smax.compiled(partial(smax.run_chunk, env, args, True), 1, donate=True)
    new, metrics = jax.tree.map(lambda leaf: leaf[0], chunk(seeds, 3))

    _, act_key, step_key, _ = jax.random.split(training.key, 4)
    actions = jax.jit(lambda learner, obs: smax.act(learner.policy, env, act_key, obs))(training.learner, training.obs)
    battles = (jax.tree.map(lambda leaf, n=n: leaf[n], (training.env_state, actions)) for n in range(8))
    steps = [step_of_3m(key, *battle)[0] for key, battle in zip(jax.random.split(step_key, 8), battles, strict=True)]
    after = jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)
    assert after.ended.tolist() == [False, True] * 4
    there = after.obs, training.state, after.state, after.ended.astype(jnp.float32)
    batch = smax.Batch(training.obs, actions, after.reward, jnp.zeros(8), *there)
    np.testing.assert_allclose(new.buffer[24:32], smax.flat(batch), atol=1e-5)
    assert not new.buffer[:24].any() and not new.buffer[32:].any()
    np.testing.assert_allclose(new.returns, jnp.where(after.ended, 0, 1 + after.reward), atol=1e-5)
    assert new.lengths.tolist() == [6, 0] * 4
    assert metrics["episode_length/training"] == 6  # of the four battles that ended
    np.testing.assert_allclose(metrics["returns/training"], (1 + after.reward)[1::2].mean(), atol=1e-5)


@pytest.mark.slow
def test_evaluation_plays_to_the_time_limit():
    args = Args(**ONE_STEP)
    env = make_env(args)
    policies = smax.begin_seeds(env, args).learner.average_policy
    env._env.max_steps = 4  # hence the fifth
    assert smax.evaluator(env, args)(policies, 2, False, 0)["episode_length"].tolist() == [[5, 5]]


def after_four_updates(first_seed, num_seeds, **options):
    """The state of runs of these seeds, before rounding errors have grown."""
    args = Args(**SMALL | options, seed=first_seed, num_seeds=num_seeds)
    env = make_env(args)
    training = smax.begin_seeds(env, args)
    chunk = smax.compiled(partial(smax.run_chunk, env, args, True), num_seeds, donate=True)
    for number in range(32 // args.log_interval):
        training, _ = chunk(training, number)
    return {name: np.asarray(values, np.float64) for name, values in smax.named_arrays(training).items()}


def assert_same_run(ours, theirs):
    """But for rounding, which Adam makes steps of where a gradient is nothing else."""
    differences = np.concatenate([abs(values - theirs[name]).flatten() for name, values in ours.items()])
    assert (differences < 1e-3).mean() > 0.99


@pytest.fixture(scope="module")
def side_by_side():
    return after_four_updates(1, 2)


def test_seeds_side_by_side_equal_single_runs(side_by_side):
    """Whose chunks may be shorter, too."""
    single = after_four_updates(2, 1, log_interval=8)
    assert_same_run(single, {name: values[1:] for name, values in side_by_side.items()})
    assert side_by_side[".buffer"][:, :32].any(-1).all() and not side_by_side[".buffer"][:, 32:].any()
    learned = side_by_side[".learner.policy.velocity.weight"]
    assert (learned[0] != learned[1]).any() and (learned != 0).any()


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory):
    """The folder where a new process, with two devices, has left what importing the script changed, and two runs."""
    program = f"""
import json, random, sys
from functools import partial
import numpy as np, numpy.random

def state():
    numbers = str(random.getstate()), str(np.random.get_state()[1].tolist())
    return *numbers, *(id(stream) for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__))

before = state()
import ddpl_smax_jax as smax
json.dump([before, state()], open("states.json", "w"))

import jax
from ddpl_smax_jax import Args, make_env
SMALL = {SMALL}
{inspect.getsource(after_four_updates)}
np.savez("two", num_devices=smax.mesh_of_seeds(2).size, **after_four_updates(1, 2))
"""
    folder = tmp_path_factory.mktemp("fresh")
    flags = {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(smax.__file__).parent),
    }
    with open(folder / "printed", "w") as printed:
        options = dict(cwd=folder, env=os.environ | flags, stdout=printed, stderr=subprocess.STDOUT)
        subprocess.run([sys.executable, "-c", program], check=True, **options)
    return folder


@pytest.mark.slow
def test_importing_leaves_no_trace(fresh_process):
    """JAX and JaxMARL draw global random numbers, print, and take sys.stdout away."""
    before, after = json.loads((fresh_process / "states.json").read_text())
    assert before == after and (fresh_process / "printed").read_text() == ""


@pytest.mark.slow
def test_two_devices_share_the_seeds(side_by_side, fresh_process):
    two = np.load(fresh_process / "two.npz")
    assert two["num_devices"] == 2
    assert_same_run(side_by_side, two)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(two_seeds):
    """A killed one from its last checkpoint, one that a signal stops where it stood, at the end of the next chunk."""
    process = subprocess.Popen(command(smax, **SMALL, num_seeds=2), stderr=subprocess.DEVNULL)
    wait_for(process, lambda: Path("runs").exists() and list(Path("runs").iterdir()))
    (run_dir,) = Path("runs").iterdir()
    wait_for(process, lambda: global_step(run_dir) >= 128)  # has learned
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run_dir / "result.json").exists()
    signals, check_finite = [], smax.check_finite

    def signalled(named_values, step):
        check_finite(named_values, step)
        if step == 320:
            signals.append(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smax, "check_finite", signalled)
        with pytest.raises(smax.Stopped, match=f"stopped at step 320; go on with --resume {run_dir}"):
            train(Args(resume=str(run_dir)), signals=signals)
    assert global_step(run_dir) == 320 and not (run_dir / "result.json").exists()
    train(Args(resume=str(run_dir)))
    ours, theirs = (load_file(f"{folder}/checkpoint.safetensors") for folder in (run_dir, two_seeds["run_dir"]))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert evaluations(run_dir) == evaluations(two_seeds["run_dir"])


def contents(run_dir):
    """All that a checkpoint holds besides its tensors."""
    with safe_open(Path(run_dir) / "checkpoint.safetensors", "numpy") as file:
        return json.loads(file.metadata()["json"])


def global_step(run_dir):
    return contents(run_dir)["progress"]["global_step"] if (run_dir / "checkpoint.safetensors").exists() else 0


@pytest.mark.slow
def test_evaluate_plays_and_films(two_seeds, capsys, monkeypatch):
    """With the last evaluation's random numbers it plays the last evaluation's battles."""
    films, drawn = [], []
    film, checkpoint = smax.write_video, load_file(Path(two_seeds["run_dir"]) / "checkpoint.safetensors")

    class Spy(SMAXVisualizer):
        def expand_state_seq(self):
            drawn.extend(action for *_, actions in self.state_seq for action in actions.values())
            super().expand_state_seq()

    def film_last(env, policy, deterministic, key, path):
        films.append(path.name)
        assert path.name.startswith("team_deterministic" if deterministic else "team_stochastic")
        seed = int(path.stem.endswith("1"))
        average = checkpoint[".learner.average_policy.velocity.weight"][seed]
        np.testing.assert_array_equal(policy.velocity.weight, average)
        assert (average != checkpoint[".learner.policy.velocity.weight"][seed]).any()
        if films[-1] == "team_deterministic1.gif":
            env._env.max_steps = 1  # drawing is slow
            film(env, policy, deterministic, key, path)

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
    assert films == ["team_stochastic.gif", "team_stochastic1.gif", "team_deterministic.gif", "team_deterministic1.gif"]
    assert (Path(two_seeds["run_dir"]) / films[-1]).stat().st_size > 10_000
    assert drawn and all(0 <= action.min() and action.max() <= 1 for action in drawn)  # as the package takes them


@pytest.mark.parametrize(
    "options",
    [
        dict(map_name="4m"),
        dict(steps_per_update=7),
        dict(log_interval=100),
        dict(num_seeds=0),
        dict(num_seeds=2, seed=2**32 - 1),
        dict(tau=0.0),
        dict(gamma=1.1),
        dict(sigmas=()),
        dict(sigmas=[0.1]),
        dict(target_entropy=0.7),
        dict(actor_lr=float("inf")),
        dict(init_temperature=1e-300),
        dict(num_per_kernel=0, num_uniform=1),
        dict(learning_starts=400_000),
        dict(actor_batch_size=300),
        dict(actor_batch_size=31),  # not a multiple of two critics
        dict(num_critics=1),
        dict(denoising_steps=1),  # would start from what is no noise
        dict(pessimism=-0.1),
        dict(batch_size=200, buffer_size=100),
        dict(total_timesteps=2**31 - 1),
        dict(block_size=2**31),
        dict(raw_actions=1),
        dict(policy="beta"),
        dict(device="tpu"),
    ],
    ids=str,
)
def test_invalid_arguments_are_named_in_one_sentence(options):
    message = error_of(smax, **options)
    assert f"--{next(iter(options)).replace('_', '-')}" in message and ("must be" in message or "3m, 2s3z" in message)
    assert not Path("runs").exists()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu():
    assert "--device: 'cuda' is not valid; it must be auto or cpu on this machine" in error_of(smax, device="cuda")
    args = Args(device="cpu")
    assert smax.sharding_of_seeds(args) == smax.sharding_of_seeds(Args())


def test_every_seed_has_its_own_start():
    """Also those beyond the whole numbers of 32 bits that have a sign."""
    args = Args(**SMALL, seed=2**32 - 2, num_seeds=2)
    keys = smax.begin_seeds(make_env(args), args).key
    for key, seed in zip(keys, (2**32 - 2, 2**32 - 1), strict=True):
        assert (key == jax.random.split(jnp.array([0, seed], jnp.uint32), 3)[0]).all()


# ---- run folders


def test_unfit_run_folders_are_named(two_seeds, tmp_path):
    assert "no checkpoint.safetensors" in error_of(smax, resume="runs/none")
    assert "no checkpoint.safetensors" in error_of(smax, resume="")
    assert "drop --seed" in error_of(smax, resume=two_seeds["run_dir"], seed=2)
    damaged = tmp_path / "runs" / "ddpl_smax_jax__3m"
    damaged.mkdir(parents=True)
    whole = (Path(two_seeds["run_dir"]) / "checkpoint.safetensors").read_bytes()
    (damaged / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "is damaged" in error_of(smax, resume=str(damaged))
    assert damaged.name in error_of(smax, resume="runs/none")


def rewritten(run_dir, change):
    """A copy of a run's checkpoint in this folder, changed, with the checksum that belongs to it."""
    tensors, others = load_file(Path(run_dir) / "checkpoint.safetensors"), contents(run_dir)
    metadata = change(tensors, others) or {}
    text = json.dumps(others)
    metadata = {"json": text, "crc32": smax.checksum(tensors, text)} | metadata
    save_file(tensors, "checkpoint.safetensors", {name: value for name, value in metadata.items() if value})


@pytest.mark.parametrize("where", ["tensor", "json"])
def test_a_flipped_byte_is_refused(two_seeds, where):
    for flag, file in (("resume", "checkpoint.safetensors"), ("evaluate", "team.safetensors")):
        content = bytearray((Path(two_seeds["run_dir"]) / file).read_bytes())
        place = len(content) - 100 if where == "tensor" else content.index(b"gamma") + len("gamma") + 6
        content[place] ^= 1
        Path(file).write_bytes(content)
        assert f"{file} is damaged (ValueError)" in error_of(smax, **{flag: "."})


def nan_weight(tensors, _):
    tensors[".learner.policy.velocity.weight"][0, 0, 0, 0] = np.nan


def nan_position(tensors, _):
    tensors[".env_state.state.unit_positions"][0, 0, 0] = np.nan


def fewer_rows(tensors, _):
    tensors[".buffer"] = tensors[".buffer"][:, :-8]


def more_rows(tensors, _):
    tensors[".buffer"] = np.concatenate([tensors[".buffer"]] * 2, axis=1)


DAMAGES = {
    "no arguments": lambda tensors, others: others.pop("args") and None,
    "arguments of a wrong type": lambda tensors, others: others["args"].update(gamma="high"),
    "no progress": lambda tensors, others: others.pop("progress") and None,
    "progress that is a list": lambda tensors, others: others.update(progress=[128, 1.0, []]),
    "step of a wrong type": lambda tensors, others: others["progress"].update(global_step="128"),
    "step below 0": lambda tensors, others: others["progress"].update(global_step=-8),
    "another column": lambda tensors, others: others["progress"]["rows"][0].update(more=1),
    "no key": lambda tensors, others: tensors.pop(".key") is None or None,
    "a tensor too many": lambda tensors, others: tensors.update(more=tensors[".key"]),
    "key of a wrong type": lambda tensors, others: tensors.update({".key": tensors[".key"].astype(np.int32)}),
    "key of a wrong size": lambda tensors, others: tensors.update({".key": tensors[".key"][:1]}),
    "fewer rows": fewer_rows,
    "more rows": more_rows,
    "a NaN weight": nan_weight,
    "a NaN position": nan_position,
}


@pytest.fixture(scope="module")
def traced_once():
    """The shapes of a run, which restore asks for: the same for all checkpoints of the same arguments."""
    shapes, eval_shape = {}, jax.eval_shape

    def once(function, *inputs):
        if not isinstance(inputs[0], np.ndarray):
            return eval_shape(function, *inputs)
        if "known" not in shapes:
            shapes["known"] = eval_shape(function, *inputs)
        return shapes["known"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "eval_shape", once)
        yield


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_of_a_checkpoint(two_seeds, traced_once, damage):
    rewritten(two_seeds["run_dir"], DAMAGES[damage])
    before = Path("checkpoint.safetensors").read_bytes()
    assert "checkpoint.safetensors is damaged" in error_of(smax, resume=".")
    assert Path("checkpoint.safetensors").read_bytes() == before


def test_a_team_of_a_run(two_seeds):
    """The file of the policies alone: its policies act as the run's, and a damaged one is told."""
    run_dir = Path(two_seeds["run_dir"])
    checkpoint = load_file(run_dir / "checkpoint.safetensors")
    for number in (0, 1):
        policy, args = smax.load_team(run_dir / "team.safetensors", number)
        for name, weights in smax.named_arrays(policy).items():
            np.testing.assert_array_equal(weights, checkpoint[f".learner.average_policy{name}"][number])
    assert args == replace(Args(**SMALL, num_seeds=2), device=args.device)
    obs = jax.random.uniform(jax.random.PRNGKey(0), (2, N, B, policy.observation.whole.weight.shape[1]))
    actions = [policy.sample(jax.random.PRNGKey(1), one) for one in (obs[0], obs[0].at[1].set(obs[1][1]))]
    assert (actions[0][0] == actions[1][0]).all() and (actions[0][1] != actions[1][1]).any()  # decentralised
    tensors, others = smax.read_file("load_team", run_dir / "team.safetensors")
    name = next(iter(tensors))
    damages = {
        "NaN": (tensors | {name: tensors[name] * np.nan}, others["args"]),
        "a size": (tensors | {name: tensors[name][..., :1]}, others["args"]),
        "a name": ({more: tensor for more, tensor in tensors.items() if more != name}, others["args"]),
        "a type": (tensors, others["args"] | {"gamma": "high"}),
    }
    for damaged, stored in damages.values():
        smax.write_file(Path("team.safetensors"), damaged, args=stored)
        assert "team.safetensors is damaged" in error_of(smax, evaluate="team.safetensors")
    smax.write_file(Path("team.safetensors"), tensors, args=others["args"] | {"colour": "red"})
    assert "is from another version" in error_of(smax, evaluate="team.safetensors")
    assert "there is no file" in error_of(smax, evaluate="none.safetensors")


def test_the_trained_team_plays():
    """So in the way that the script's docstring loads it. Untrained teams win nothing here."""
    name = "benchmark/teams/2s3z.safetensors"
    assert f'load_team("{name}")' in smax.__doc__
    policy, args = smax.load_team(Path(smax.__file__).parent / name)
    battles = jax.jit(partial(smax.evaluate, make_env(args), 64))(policy, (jax.random.PRNGKey(0), jnp.array(True)))
    assert battles["win_rate"].mean() > 0.85


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_shared_policy_is_one_for_all(policy):
    """It acts as copies of it would, and an update keeps it one."""
    args, learner, _ = learners(policy)
    one = jax.tree.map(lambda weights: weights[:1], learner.policy)
    copies = jax.tree.map(lambda weights: jnp.broadcast_to(weights, (N, *weights.shape[1:])), one)
    obs = jax.random.uniform(jax.random.PRNGKey(0), (N, B, O))
    actions = [policy.sample(jax.random.PRNGKey(1), obs) for policy in (one, copies)]
    np.testing.assert_allclose(*actions, atol=1e-6)
    learner = smax.Learner.create(jax.random.PRNGKey(0), replace(args, shared_policy=True), N, O, S)
    assert {len(weights) for weights in jax.tree.leaves((learner.policy, learner.local_critic))} == {1}
    batch, _ = batches()
    after, _ = smax.update(learner, batch, jnp.ones((N, B)), jnp.ones((N, B)), args, jax.random.PRNGKey(1))
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, learner)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_average_of_the_weights(policy):
    """It equals one made by hand."""
    args, learner, _ = learners(policy)
    args = replace(args, average_decay=0.75)
    learner = learner._replace(average_policy=jax.tree.map(lambda weights: weights + 1, learner.policy))
    batch, _ = batches()
    after, _ = smax.update(learner, batch, jnp.ones((N, B)), jnp.ones((N, B)), args, jax.random.PRNGKey(1))
    by_hand = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, learner.average_policy, after.policy)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after.average_policy, by_hand)


def test_a_run_is_used_by_one_process_at_a_time(two_seeds):
    with smax.locked(Path(two_seeds["run_dir"])):
        assert "is in use by process" in error_of(smax, resume=two_seeds["run_dir"])


def test_a_given_default_counts_as_asked_for(two_seeds):
    default = Args().total_timesteps
    message = error_of(smax, given=["total_timesteps"], resume=two_seeds["run_dir"])
    assert f"ran with --total-timesteps 384, not {default}; drop --total-timesteps" in message


def test_signals_end_the_command_in_order(two_seeds, monkeypatch, capsys):
    """Training and playing."""

    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise smax.Stopped("stopped at step 7")

    monkeypatch.setattr(smax, "training_loop", interrupt)
    with pytest.raises(SystemExit) as stopped:
        smax.main(Args(**SMALL))
    assert stopped.value.code == 143 and "stopped at step 7" in capsys.readouterr().err

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(smax, "evaluator", ctrl_c)
    with pytest.raises(SystemExit) as stopped:
        smax.main(Args(evaluate=two_seeds["run_dir"]))
    assert stopped.value.code == 130


def test_nan_in_an_evaluation(two_seeds, monkeypatch):
    nan = {name: np.full((2, 2), np.nan) for name in smax.BATTLE}
    monkeypatch.setattr(smax, "compiled", lambda *_, **__: lambda *_: nan)
    assert "a return is NaN or infinite in an evaluation" in error_of(smax, evaluate=two_seeds["run_dir"])


def test_command_line_in_groups(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--num-envs", "3", "--seed=1", "--exp_name", "trial"])
    args, given = smax.read_command_line()
    assert args == Args(num_envs=3, exp_name="trial") and given == {"num_envs", "seed", "exp_name"}
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    with pytest.raises(SystemExit):
        smax.read_command_line()
    text = capsys.readouterr().out
    titles = [text.index(f"{group.__name__} options") for group in reversed(Args.__bases__)]
    assert len(titles) > 2 and titles == sorted(titles)


def test_a_renamed_copy_refuses_the_originals_checkpoints(two_seeds, tmp_path):
    path = shutil.copy(smax.__file__, tmp_path / "my_fork.py")
    spec = importlib.util.spec_from_file_location("my_fork", path)
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "my_fork", copy)
        spec.loader.exec_module(copy)
    assert "belongs to ddpl_smax_jax.py, not to my_fork.py" in error_of(copy, resume=two_seeds["run_dir"])


def test_checkpoints_of_another_script_or_version(two_seeds):
    rewritten(two_seeds["run_dir"], lambda tensors, others: others.update(script="ddpl_mpe"))
    assert "belongs to ddpl_mpe.py, not to ddpl_smax_jax.py" in error_of(smax, resume=".")
    rewritten(two_seeds["run_dir"], lambda tensors, others: others["args"].pop("device") and None)
    assert "is from another version of ddpl_smax_jax.py" in error_of(smax, resume=".")
    rewritten(two_seeds["run_dir"], lambda tensors, others: {"crc32": ""})
    assert "is damaged" in error_of(smax, resume=".")


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_a_full_disk_leaves_the_checkpoint_before(where, monkeypatch):
    """Here a limit on the size of files, which the same system call reports."""
    args, run_dir = Args(), Path(".")
    smax.save_checkpoint(run_dir, args, smax.Progress(), {"small": np.zeros(3)})
    before = Path("checkpoint.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if where == "writing":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    else:
        monkeypatch.setattr(os, "replace", full)
    try:
        with pytest.raises(smax.RunError, match="cannot write checkpoint.safetensors .*; the one before"):
            smax.save_checkpoint(run_dir, args, smax.Progress(), {"large": np.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path("checkpoint.safetensors").read_bytes() == before and not Path("checkpoint.safetensors.tmp").exists()


def test_without_memory(monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 4800000000000 bytes.")

    monkeypatch.setattr(smax, "begin_seeds", exhausted)
    assert "out of memory; choose smaller numbers (RESOURCE_EXHAUSTED: Out of memory)" in error_of(smax)


# ---- NaN


@pytest.mark.parametrize("what", ["losses/critic", "an observation", "a state", "a transition"])
def test_nan_stops_the_run_and_enters_no_checkpoint(what, monkeypatch):
    """Instead of the compiled program: one that brings a NaN in the third chunk."""
    args = Args(**SMALL | dict(eval_interval=1000))
    poisons = {"an observation": "obs", "a state": "state", "a transition": "buffer"}

    def chunk(training, start):
        metrics = {name: np.ones(1) for name in ("losses/critic", "returns/training", "win_rate/training")}
        if start == 8:
            if what in metrics:
                metrics[what][:] = np.nan
            else:
                values = getattr(training, poisons[what])
                place = (0, 72) if what == "a transition" else 0
                training = training._replace(**{poisons[what]: values.at[place].set(np.nan)})
        return training, metrics

    monkeypatch.setattr(smax, "compiled", lambda *_, **__: chunk)
    step = 80 if what == "a transition" else 96
    with pytest.raises(smax.RunError, match=f"{what} is NaN or infinite at step {step}; the last checkpoint is from"):
        train(args)
    (run_dir,) = Path("runs").iterdir()
    assert global_step(run_dir) == 0 and "progress" in contents(run_dir)


def test_the_step_of_the_oldest_nan():
    """In a buffer of 16 rows that has been overwritten: steps 24 to 40 of 8 battles, of which row 4 came at step 40."""
    rows = np.zeros((2, 16, 3))
    smax.check_transitions(rows, 40, 8)
    rows[1, 4, 2] = np.inf
    with pytest.raises(smax.RunError, match="a transition is NaN or infinite at step 40;"):
        smax.check_transitions(rows, 40, 8)
    rows[0, 15, 0] = np.nan
    with pytest.raises(smax.RunError, match="a transition is NaN or infinite at step 32;"):
        smax.check_transitions(rows, 40, 8)


@pytest.mark.slow
def test_learning_beats_the_random_team():
    """The team before any learning is the random one: 3m pays the share of health shot away, and 1 for a won battle."""
    small = dict(critic_hidden=32, actor_hidden=32, local_critic_hidden=32, batch_size=64, actor_batch_size=16)
    small |= dict(denoising_steps=5, eval_episodes=128, final_eval_episodes=128)
    args = Args(total_timesteps=16_000, learning_starts=0, log_interval=1_600, **small)
    env = make_env(args)
    random_team = smax.begin_seeds(env, args).learner.policy
    before = smax.evaluator(env, args)(random_team, 128, False, 0)["returns"].mean()
    result = train(args)
    rows = list(csv.DictReader(open(Path(result["run_dir"]) / "evaluations.csv")))
    assert [float(row["return_mean"]) for row in rows if row["mode"] == "stochastic"][-1] > before + 0.5
