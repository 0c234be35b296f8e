"""benchmark/ddpl_mpe_diagnosis.py: scripted teams, and what critics say beside what happens."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpl_mpe as mpe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import ddpl_mpe_diagnosis as diagnosis


def test_scripts_see_where_everything_is():
    env = mpe.VectorMPE(diagnosis.TASK, 4, 2)
    obs = env.reset(np.arange(2))
    agents, landmarks = diagnosis.positions(env)
    seen_landmarks, seen_others = diagnosis.places(obs)
    np.testing.assert_allclose(seen_landmarks, landmarks[:, None] - agents[:, :, None], atol=1e-6)
    others = [np.delete(agents, i, axis=1) - agents[:, i : i + 1] for i in range(4)]
    np.testing.assert_allclose(seen_others, np.stack(others, axis=1), atol=1e-6)


def test_examples_are_observations_of_the_task():
    """Of agents at rest, as after a reset."""
    env = mpe.VectorMPE(diagnosis.TASK, 4, 2)
    obs = env.reset(np.arange(2))
    agents, landmarks = (torch.from_numpy(places).float() for places in diagnosis.positions(env))
    np.testing.assert_allclose(diagnosis.observe(agents, landmarks), obs, atol=1e-6)


def test_pooled_critics_learn_more_from_examples(monkeypatch):
    """Of two agents already. And critics that are told the answer know all of it."""

    class Told(mpe.CriticEnsemble):
        def forward(self, state, actions):
            ways = state.unflatten(1, (2, -1))[..., 4:8].unflatten(-1, (2, 2))
            values = -ways.norm(dim=-1).amin(1).sum(-1)
            return values + 0 * super().forward(state, actions)

    def numbers(ensemble, *more):
        row = diagnosis.example_row("", ensemble, *more, num_agents=2, updates=(300,))
        return [float(number) for number in row.split("|")[2].split(",")]

    assert numbers(Told) == [1, 1]
    pooled = numbers(mpe.PooledCriticEnsemble)
    assert all(p > f + 0.05 for p, f in zip(pooled, numbers(mpe.CriticEnsemble)))
    one_by_one = numbers(mpe.EntityCriticEnsemble, mpe.observed_entities(mpe.Args(), 2), 32)
    assert all(o > p + 0.05 for o, p in zip(one_by_one, pooled))


def test_policies_learn_from_the_script(monkeypatch):
    monkeypatch.setattr(diagnosis, "EPISODES", 20)
    errors = []
    for num_layers in 3, None:
        cells = diagnosis.imitation_row(3, num_layers, (1, 300)).split("|")[2:4]
        (before, left), (after, reached) = (map(float, cell.split(",")) for cell in cells)
        assert before > 0.8 and after < 0.75 and reached > left + 3
        errors.append(after)
    assert errors[1] < 0.8 * errors[0]  # attention sees who is nearer


def test_the_better_the_script_the_higher_the_return(monkeypatch):
    monkeypatch.setattr(diagnosis, "EPISODES", 10)
    scripts = diagnosis.still, diagnosis.nearest, diagnosis.assigned
    rows = [diagnosis.team_row(script.__name__, 3, script).strip("| ").split(" | ") for script in scripts]
    returns, before, after = (np.array([float(row[column]) for row in rows]) for column in (1, 2, 3))
    assert (np.diff(returns) > 3).all() and (np.diff(after) < 0).all() and after[2] < 0.05
    assert len(set(before)) == 1


def test_collisions_are_counted_once_a_pair_and_step(monkeypatch):
    monkeypatch.setattr(diagnosis, "EPISODES", 1)
    together = np.zeros((1, 3, 2)), np.ones((1, 3, 2))
    monkeypatch.setattr(diagnosis, "positions", lambda env: together)
    assert diagnosis.team_row("", 3, diagnosis.still).split("|")[-2].strip() == str(25 * 3)


def test_a_force_brings_what_the_environment_says():
    """One agent alone: the better, the closer the force is to the way to its landmark; and time can be turned back."""
    env = mpe.VectorMPE(diagnosis.TASK, 1, 30)
    obs = env.reset(np.arange(30))
    start = diagnosis.snapshot(env)
    first = [env.step(np.ones((30, 1, 2)))[1] for _ in range(3)]
    diagnosis.restore(env, start)
    assert np.array_equal(first, [env.step(np.ones((30, 1, 2)))[1] for _ in range(3)])
    diagnosis.restore(env, start)

    def towards(state, actions):  # critics [2, B] that know
        x, y = state[:, 4:6].T
        return ((actions[0, :, 0] * x + actions[0, :, 1] * y) / torch.hypot(x, y)).expand(2, -1)

    said, brought = diagnosis.compare(env, obs, diagnosis.still, towards, 0.95)
    assert brought.shape == (8, diagnosis.ROLLOUTS, 30) and (brought == brought[:, :1]).all()  # nothing is random here
    brought = brought[:, 0]
    diagnosis.restore(env, start)
    forces = [np.tile([1.0, 0.0], (30, 1, 1)), *[np.zeros((30, 1, 2))] * 18]
    np.testing.assert_allclose(
        brought[0], sum(0.95**k * env.step(force)[1] for k, force in enumerate(forces)), rtol=1e-5
    )
    said, brought = said - said.mean(0), brought - brought.mean(0)
    far = np.linalg.norm(obs[:, 0, 4:6], axis=-1) > 0.5
    assert far.sum() > 10 and np.corrcoef(said[:, far].ravel(), brought[:, far].ravel())[0, 1] > 0.95


def test_all_forces_are_tried_with_the_same_random_numbers(monkeypatch):
    """Only the first agent's first action differs between forces; critics see it among those of the other agents."""
    played = []

    class Env:
        def step(self, actions):
            played.append(actions.copy())
            return np.zeros((4, 3, 5), dtype=np.float32), np.zeros(4)

    for name in ("snapshot", "restore"):
        monkeypatch.setattr(diagnosis, name, lambda *_: None)

    def critics(state, actions):  # [2, E], of actions [N, E, D]
        return actions.sum((0, 2)) * torch.tensor([[1.0], [3.0]])

    obs = np.zeros((4, 3, 5), dtype=np.float32)
    said, _ = diagnosis.compare(Env(), obs, lambda seen: torch.randn(4, 3, 2).numpy(), critics, 0.9)
    tried = np.stack(played).reshape(8, diagnosis.ROLLOUTS, diagnosis.STEPS_TRIED, 4, 3, 2)
    angles = np.arange(8)[:, None, None] * np.pi / 4
    for axis, function in enumerate((np.cos, np.sin)):
        assert np.allclose(tried[:, :, 0, :, 0, axis], function(angles), atol=1e-6)
    np.testing.assert_allclose(said, 2 * tried[:, :, 0].sum((-1, -2)).mean(1), rtol=1e-4, atol=1e-5)
    tried[:, :, 0, :, 0] = 0
    assert (tried == tried[:1]).all() and (tried[:, 0, 0, :, 1:] != tried[:, 1, 0, :, 1:]).all()
    assert 0.8 < tried[:, :, 0, :, 1:].std() < 1.2


def test_average_policies_play_and_critics_are_asked_about_the_sampled_ones(monkeypatch):
    for name in ("EPISODES", "STATES", "ROLLOUTS"):
        monkeypatch.setattr(diagnosis, name, 2)
    played = []

    class Policy:
        def __init__(self, name):
            self.name = name

        def sample(self, obs, deterministic=False):
            played.append((self.name, deterministic))
            return torch.zeros(*obs.shape[:2], 2)

    learner = SimpleNamespace(
        args=mpe.Args(),
        mask=torch.ones(3, 2),
        policy=Policy("policy"),
        average_policy=Policy("average"),
        critic=lambda state, actions: actions[0, :, 0].expand(2, -1),
    )
    monkeypatch.setattr(diagnosis, "load", lambda folder: learner)
    diagnosis.main(["run"])
    assert list(dict.fromkeys(played)) == [("average", True), ("policy", False)]


def test_a_row_says_how_sure_it_is(monkeypatch):
    """Every second rollout brings what the critics say, the others noise: the mean goes with it by 1 / sqrt(2)."""
    monkeypatch.setattr(diagnosis, "STATES", 40)
    generator = np.random.default_rng(0)
    said, noise = generator.normal(size=(2, 8, 40))
    outcomes = np.stack([said, noise] * 4, axis=1)  # [8, ROLLOUTS, E]
    monkeypatch.setattr(diagnosis, "compare", lambda *_: (said, outcomes))
    args = mpe.Args()
    env = mpe.VectorMPE(diagnosis.TASK, None, 1)
    learner = mpe.Learner(args, env.obs_size, env.state_size, env.action_mask(), env.alike)
    _, _, correlation, halves, *_ = diagnosis.critic_row("", learner).split("|")
    middle, low, high = (float(number.strip(" [],")) for number in correlation.split())
    assert middle == pytest.approx(0.5**0.5, abs=0.05) and abs(float(halves)) < 0.15
    assert 0.02 < middle - low < 0.15 and 0.02 < high - middle < 0.15


def test_a_run_has_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("EPISODES", "STATES", "ROLLOUTS"):
        monkeypatch.setattr(diagnosis, name, 2)
    few = {"total_timesteps": 80, "learning_starts": 40, "eval_episodes": 2, "final_eval_episodes": 2}
    run_dir = mpe.train(mpe.Args(policy="gaussian", compile=False, **few))["run_dir"]
    other = mpe.train(mpe.Args(env_id="simple_reference_v3", compile=False, **few))["run_dir"]
    diagnosis.main([run_dir])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 3 agents, gaussian, seed 1 |") for line in lines) == 2
    for wrong, sentence in (
        (str(tmp_path), "RUN_DIR: there is no checkpoint.pt in"),
        (other, "env-id simple_reference_v3, not"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            diagnosis.main([run_dir, wrong])
        assert not capsys.readouterr().out
