"""benchmark/hasac.py: our tasks as HARL steps them. HARL itself is not installed here; a stand-in takes its place."""

import csv
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import ddpl_mamujoco
import ddpl_mpe


class HARLsRunner:
    """HARL's loop after the warm-up, without steps, and three actors that only move where they may sample.

    `learning` holds the settings of the last one made.
    """

    learning = None

    def __init__(self, main_args, learning, task):
        HARLsRunner.learning = learning
        self.envs = sys.modules["harl.runners.off_policy_base_runner"].make_train_env()
        act = lambda obs, available, stochastic: torch.full((len(obs), 2), float(stochastic))  # noqa: E731
        self.actor = [SimpleNamespace(get_actions=act)] * 3

    def run(self):
        training = self.learning["train"]
        interval = training["eval_interval"]
        for step in range(interval, training["num_env_steps"] // 20 + 1, interval):
            self.eval(training["warmup_steps"] + 20 * step)


@pytest.fixture
def hasac(monkeypatch):
    for name in ("harl", "harl.runners", "harl.runners.off_policy_base_runner", "harl.runners.off_policy_ha_runner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["harl"].__file__ = "HARL/harl/__init__.py"
    sys.modules["harl.runners"].off_policy_base_runner = sys.modules["harl.runners.off_policy_base_runner"]
    sys.modules["harl.runners.off_policy_ha_runner"].OffPolicyHARunner = HARLsRunner
    yield importlib.import_module("benchmark.hasac")
    del sys.modules["benchmark.hasac"]


def test_its_copies_play_what_our_script_plays(hasac):
    """The same seeds and actions give the same observations and rewards, up to the last of an episode and beyond."""
    env = ddpl_mpe.VectorMPE("simple_speaker_listener_v4", None, 2)
    copies = hasac.Copies(hasac.Args(env_id="simple_speaker_listener_v4", seed=3), 2)
    obs, state, available = copies.reset()
    seeds = [ddpl_mpe.episode_seeds(0, 3, episode, 2) for episode in range(2)]
    assert np.array_equal(obs, env.reset(seeds[0])) and state.shape == (2, 2, env.state_size)
    assert [action is None for action in available] == [True, True]
    generator = np.random.default_rng(0)
    for step in range(1, 26):
        actions = generator.uniform(-1, 1, (2, 2, env.action_size))
        expected, reward, *_ = env.step(actions)
        obs, state, rewards, dones, infos, _ = copies.step(actions)
        total = 2 * reward  # of both agents, as HARL has it
        assert np.array_equal(rewards, np.broadcast_to(total[:, None, None], (2, 2, 1)))
        assert (dones == (step == 25)).all()
        assert all(info[0]["bad_transition"] == (step == 25) for info in infos)  # HARL's word for a time limit
        if step < 25:
            assert np.array_equal(obs, expected)
            assert np.array_equal(state, np.repeat(expected.reshape(2, 1, -1), 2, axis=1))
    assert np.array_equal([info[0]["original_obs"] for info in infos], expected)
    assert np.array_equal([info[0]["original_state"][1] for info in infos], expected.reshape(2, -1))
    assert np.array_equal(obs, env.reset(seeds[1]))


def test_a_robot_that_falls_is_no_time_limit(hasac):
    """A Hopper falls at another step in every copy; that one alone starts anew."""
    copies = hasac.Copies(hasac.Args(scenario="Hopper", agent_conf="3x1", observations="ours"), 2)
    assert copies.reward_scale == hasac.Copies(hasac.Args(temperature="ours"), 1).reward_scale == 1
    assert type(copies.envs[0]) is ddpl_mamujoco.StackedAgents
    obs, state, _ = copies.reset()
    assert state.shape == (2, 3, copies.envs[0].state_size)
    generator = np.random.default_rng(0)
    ended = set()
    while len(ended) < 2:
        obs, state, rewards, dones, infos, _ = copies.step(generator.uniform(-1, 1, (2, 3, 1)))
        for copy in np.flatnonzero(dones.all(1)):
            ended.add(copy)
            assert not infos[copy][0]["bad_transition"]
            assert not np.array_equal(infos[copy][0]["original_obs"], obs[copy])
        assert (dones.all(1) == dones.any(1)).all()
    assert (copies.episodes >= 2).all()


def test_a_fall_in_the_last_step_is_no_time_limit(hasac, monkeypatch):
    copies = hasac.Copies(hasac.Args(), 1)
    seen = copies.start(0)
    monkeypatch.setattr(copies.envs[0], "step", lambda actions: (seen, 0.0, True, True, {}))
    *_, dones, infos, _ = copies.step(np.zeros((1, 3, 2)))
    assert dones.all() and not infos[0][0]["bad_transition"]


def test_a_robots_agents_see_what_they_see_in_harl(hasac, monkeypatch):
    """The whole state and their number, each vector standardised over its own numbers; also in our evaluations."""
    args = hasac.Args(scenario="HalfCheetah", agent_conf="2x3", seed=4)
    copies = hasac.Copies(args, 1)
    ours = ddpl_mamujoco.StackedAgents(args.script)
    (obs,), (state,), _ = copies.reset()
    raw = ours.reset(seed=int(ddpl_mpe.episode_seeds(0, 4, 0, 1)[0]))[0]["state"]
    assert raw.shape == (17,) and copies.observation_space[0].shape == (19,)
    for _ in range(3):
        for agent, one_hot in enumerate(np.eye(2)):
            seen = np.append(raw, one_hot)
            np.testing.assert_allclose(obs[agent], (seen - seen.mean()) / seen.std(), atol=1e-5)
            np.testing.assert_allclose(state[agent], (raw - raw.mean()) / raw.std(), atol=1e-5)
        actions = np.random.default_rng(0).uniform(-1, 1, (2, 3))
        raw = ours.step(actions)[0]["state"]
        (obs,), (state,), *_ = copies.step(actions[None])

    seen = []

    def sample(obs, deterministic):
        seen.append(obs.shape)
        return torch.zeros(*obs.shape[:2], 3)

    policy = SimpleNamespace(ours=args, rows=[], started=0, run_dir=None, mask=torch.zeros(0), sample=sample)
    monkeypatch.setattr(ddpl_mamujoco, "write_evaluations", lambda *_: None)
    hasac.Runner.evaluate(policy, 0, 2)
    assert set(seen) == {(2, 2, 19)} and ddpl_mamujoco.StackedAgents is not hasac.SeeingAll


def test_a_run_keeps_harls_settings_and_evaluates_where_due(hasac, monkeypatch, tmp_path):
    """The steps of the warm-up are among those of the run."""
    algo, training = {"gamma": 0.9, "auto_alpha": False}, {"warmup_steps": 10_000, "n_rollout_threads": 20}
    learning = dict(algo=algo, train=training, seed={"seed": 1}, device={"cuda": True}, logger={"log_dir": "./results"})
    path = tmp_path / "pettingzoo_mpe" / "simple_spread_v2-continuous" / "hasac" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"algo_args": learning, "env_args": {}, "main_args": {}}))
    monkeypatch.setattr(hasac, "TUNED", tmp_path)

    def evaluate(policy, args, episodes, deterministic, seed):
        return np.full(episodes, policy.sample(torch.zeros(3, 1, 18), deterministic).mean().item())

    monkeypatch.setattr(ddpl_mpe, "evaluate", evaluate)
    hasac.main(hasac.Args(total_timesteps=16_000, eval_interval=4_000, seed=3))
    assert HARLsRunner.learning["algo"] == algo and HARLsRunner.learning["seed"] == {"seed": 3}
    assert HARLsRunner.learning["train"] == training | {"num_env_steps": 6_000, "eval_interval": 100}
    (run_dir,) = Path("runs").iterdir()
    rows = [list(row.values()) for row in csv.DictReader(open(run_dir / "evaluations.csv"))]
    assert [(int(step), mode, float(mean), int(n)) for step, _, mode, mean, _, n in rows] == [
        (step, mode, mode == "stochastic", episodes)
        for step, episodes in ((12_000, 40), (16_000, 200))
        for mode in ("stochastic", "deterministic")
    ]
    assert json.loads((run_dir / "result.json").read_text())["final_return"] == 0


def test_temperatures_start_and_aim_as_ours(hasac):
    """The listener's third dimension is padding, whose entropy is free, so that it is log 2 in the end."""
    copies = hasac.Copies(hasac.Args(env_id="simple_speaker_listener_v4"), 1)
    log_alpha = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    runner = SimpleNamespace(log_alpha=log_alpha[:2], critic=SimpleNamespace(log_alpha=log_alpha[2]), envs=copies)
    script = ddpl_mpe.Args(init_temperature=0.05, target_entropy=-0.5)
    hasac.Runner.start_temperatures_like(runner, script)
    assert [float(value) for value in (*runner.alpha, runner.critic.alpha)] == pytest.approx([0.05] * 3)
    assert [value.exp().item() for value in log_alpha] == pytest.approx([0.05] * 3)
    assert copies.envs[0].action_sizes == [3, 2]
    assert runner.target_entropy == pytest.approx([-1.5, -1 + np.log(2)])


def test_it_looks_for_the_settings_of_its_task(hasac, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    particle_tasks = "simple_reference_v2-continuous", "simple_spread_v2-discrete"
    for name in ("mamujoco/Ant-v2-4x2", *(f"pettingzoo_mpe/{task}" for task in particle_tasks)):
        (tmp_path / name / "hasac").mkdir(parents=True)
        (tmp_path / name / "hasac" / "config.json").touch()
    monkeypatch.setattr(hasac, "TUNED", tmp_path)
    robot, particles = hasac.Args(scenario="Ant", agent_conf="4x2"), hasac.Args(env_id="simple_reference_v3")
    assert [hasac.tuned_settings(args).parent.parent.name for args in (robot, particles)] == [
        "Ant-v2-4x2",
        "simple_reference_v2-continuous",
    ]
    assert robot.script.scenario == "Ant" and robot.task == "Ant_4x2"
    for args, choices in ((hasac.Args(scenario="Swimmer"), "Ant-v2-4x2$"), (hasac.Args(), "simple_reference_v2-")):
        with pytest.raises(SystemExit, match=f"no settings for {args.task}, only for {choices}"):
            hasac.main(args)
    for wrong in ({"eval_interval": 500}, {"total_timesteps": 10_000}):
        with pytest.raises(SystemExit, match="must be multiples of 1000"):
            hasac.main(hasac.Args(**wrong))
    assert not Path("runs").exists()
