"""benchmark/results.py and random_play.py: where runs go, the curves beside them and the zero of the scores."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))  # results.py imports its neighbour as a script does
import random_play  # noqa: E402
import results  # noqa: E402

BANG_BANG = {"script": "bang_bang", "policy": "gaussian", "squash": "clip", "ent_coef": 0.0}


@pytest.mark.parametrize(
    "args, expected",
    [
        (
            {"script": "ddpl_mamujoco", "scenario": "Humanoid", "agent_conf": "9|8", "policy": "diffusion"},
            ("mamujoco", "Humanoid_9-8", "diffusion"),
        ),
        (
            {"script": "ddpl_mpe", "env_id": "simple_spread_v3", "num_agents": None, "policy": "gaussian"},
            ("mpe", "simple_spread_v3_N3", "gaussian"),
        ),
        (
            BANG_BANG | {"env_id": "dm_control/walker-walk-v0", "num_envs": 8},
            ("bang_bang", "dm_control-walker-walk-v0", "gaussian-8-copies"),
        ),
        (BANG_BANG | {"env_id": "Pendulum-v1", "num_envs": 4}, ("bang_bang", "Pendulum-v1", "gaussian")),
        ({"script": "qvpo", "env_id": "Pendulum-v1", "bfloat16": True}, ("qvpo", "Pendulum-v1", "qvpo-bfloat16")),
    ],
)
def test_runs_have_their_place(args, expected):
    assert results.place(args) == expected


def test_curves_of_ippo_are_means_over_windows(monkeypatch, tmp_path):
    (tmp_path / "smax").mkdir()
    with open(tmp_path / "smax" / "ippo.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["map", "seed", "global_step", "win_rate", "returns"])
        for seed in (1, 2):
            writer.writerows(["3m", seed, step, 0.001 * step * seed, 0] for step in range(0, 101, 10))
        writer.writerow(["8m", 1, 10, 1.0, 0])
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    first, second = results.ippo_curves("3m", window=40)
    assert np.allclose(first, [[40, 0.025], [80, 0.065]])  # of the steps 10 to 40, and 50 to 80
    assert np.allclose(second, first * [1, 2])


def test_random_play_has_a_row_for_each_task_with_returns(monkeypatch, tmp_path):
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    (tmp_path / "benchmark" / "experiments.toml").write_text(
        '["mpe/simple_spread_v3_N3"]\nscript = "ddpl_mpe.py"\nflags = "--final-eval-episodes 3"\n'
        '["smax/3m"]\nscript = "ddpl_smax_jax.py"\nflags = "--map-name 3m"\n'
        '["mamujoco/Swimmer_2x1"]\nscript = "ddpl_mamujoco.py"\n'
        'flags = "--scenario Swimmer --agent-conf 2x1 --final-eval-episodes 1"\n'
    )
    monkeypatch.setattr(random_play, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["random_play.py"])
    random_play.main()
    rows = list(csv.DictReader(open(tmp_path / "benchmark" / "results" / "random.csv")))
    assert [row["task"] for row in rows] == ["mpe/simple_spread_v3_N3", "mamujoco/Swimmer_2x1"]
    assert [row["episodes"] for row in rows] == ["3", "1"]
    assert -60 < float(rows[0]["return_mean"]) < -10  # 25 steps, some one to two from the landmarks
    assert -30 < float(rows[1]["return_mean"]) < 30
