"""benchmark/results.py, random_play.py, deterministic_play.py: where runs go, curves beside them, ways to play."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))  # results.py imports its neighbour as a script does
import deterministic_play  # noqa: E402
import random_play  # noqa: E402
import results  # noqa: E402

import ddpl_mpe  # noqa: E402

TEAM = Path(__file__).parent.parent / "benchmark" / "teams" / "simple_spread_v3.safetensors"
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


def test_ways_to_play_are_actions_and_all_but_sampling_are_steadier_than_it():
    policy, _ = ddpl_mpe.load_team(TEAM)
    obs = torch.randn(3, 5, policy.observation.weight.shape[1])
    for name in deterministic_play.WAYS:
        way = deterministic_play.Way(policy, name)
        plays = torch.stack([way.sample(obs) for _ in range(8)])
        assert plays.shape == (8, 3, 5, 2) and plays.abs().max() <= 1
        spread = plays.std(0).mean()
        assert spread > 0.1 if name == "sampled" else spread < 0.1
        assert (spread == 0) == (name in ("x_T = 0, no noise", "probability flow", "first guess"))


def test_the_first_guess_of_an_exact_denoiser_is_the_mean():
    """For actions N(0.3, 0.2^2) E[a | x_T] = 0.3 + gain (x_T - sqrt(alpha_bar) 0.3), and v is what implies it."""
    policy, _ = ddpl_mpe.load_team(TEAM)
    signal, noise = policy.alphas_bar[-1].sqrt(), (1 - policy.alphas_bar[-1]).sqrt()

    def velocity(context, x_t):
        gain = signal * 0.2**2 / (signal**2 * 0.2**2 + noise**2)
        denoised = 0.3 + gain * (x_t - signal * 0.3)
        return (signal * x_t - denoised) / noise

    policy.forward = velocity
    guess = deterministic_play.WAYS["first guess"](policy, torch.randn(3, 5, policy.observation.weight.shape[1]))
    torch.testing.assert_close(guess, torch.full((3, 5, 2), 0.3), atol=0.001, rtol=0)


def test_every_team_has_a_row_for_each_way(monkeypatch, tmp_path):
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    monkeypatch.setattr(deterministic_play, "ROOT", tmp_path)
    monkeypatch.setitem(deterministic_play.EPISODES, "ddpl_mpe", 3)
    deterministic_play.main([str(TEAM)])
    rows = list(csv.DictReader(open(tmp_path / "benchmark" / "results" / "deterministic_play.csv")))
    assert [row["way"] for row in rows] == list(deterministic_play.WAYS)
    assert all(-30 < float(row["return_mean"]) < -5 for row in rows)  # random play: -36


def write_returns(folder: Path, **finals: float) -> None:
    """A curve of two points for each of these arms, with one seed."""
    folder.mkdir(parents=True)
    for arm, final in finals.items():
        lines = ["global_step,seconds,mode,return_mean,success_rate"]
        lines += [f"{step},{step},{mode},{final},1" for step in (1, 2) for mode in ("stochastic", "deterministic")]
        (folder / f"{arm.replace('_', '-')}_1.csv").write_text("\n".join(lines))


def test_other_peoples_arms_stand_behind_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    write_returns(tmp_path / "mamujoco" / "Ant_4x2", diffusion=3.0, gaussian=1.0, gaussian_local=7.0)
    write_returns(tmp_path / "mamujoco" / "Hopper_3x1", diffusion=3.0, gaussian=1.0)
    write_returns(tmp_path / "hasac" / "Ant_4x2", hasac=5.0, hasac_our_temperature=6.0)
    tables = [results.table_rows(tmp_path / "mamujoco" / task) for task in ("Ant_4x2", "Hopper_3x1")]
    arms = ["diffusion", "gaussian", "difference", "gaussian-local", "hasac", "hasac-our-temperature"]
    assert [[row.split("|")[2].strip() for row in rows] for rows in tables] == [arms, arms[:3]]
    returns = [row.split("|")[3].split()[0] for row in tables[0]]
    assert returns == ["3.00", "1.00", "+2.00", "7.00", "5.00", "6.00"]
    assert list(results.arms_of(tmp_path / "mamujoco" / "Ant_4x2")) == [*arms[:2], *arms[4:]]


def test_an_ablation_is_compared_with_the_defaults_at_its_last_step(monkeypatch, tmp_path):
    def write(name: str, finals: list[float]) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = ["global_step,seconds,mode,win_rate"]
        lines += [f"{step},1,{mode},{win}" for step, win in enumerate(finals) for mode in ("deterministic", "other")]
        (tmp_path / name).write_text("\n".join(lines))

    for seed, finals in enumerate(([0, 0.5, 9], [0, 0.5, 9], [0, 0.5, 9]), start=1):
        write(f"smax/3m/gaussian_{seed}.csv", finals)
        write(f"smax/3m/diffusion_{seed}.csv", [9, 9, 9])
    for seed, final in enumerate((0.75, 0.5), start=1):
        write(f"smax_ablations/3m/gaussian-one-step_{seed}.csv", [9, final])
    (row,) = results.ablation_rows(tmp_path / "smax_ablations" / "3m", tmp_path / "smax" / "3m")
    expected = ["3m", "gaussian-one-step", "1", "0.75 0.50", "0.50 0.50 0.50", "+0.12 [+0.00, +0.25]"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == expected


def test_a_task_is_compared_with_its_longest_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for folder, final in (("mpe/a", 1.0), ("mpe/b", 1.0), ("mpe_long/b", 3.0)):
        write_returns(tmp_path / folder, diffusion=final, gaussian=1.0)
    lines = ["task,return_mean", "mpe/a,-1", "mpe/b,-2", "mpe_long/b,0"]
    (tmp_path / "random.csv").write_text("\n".join(lines))
    groups = results.compared()
    assert list(groups) == ["mpe", "all"] and [task.name for task in groups["all"]] == ["a", "b"]
    assert [task.ours.item() for task in groups["mpe"]] == [1, 1.5]  # 3 of a mean of 2, above random play's 0
    write_returns(tmp_path / "isaaclab" / "c", diffusion=0.0, gaussian=0.0)
    assert results.compared()["isaaclab"][0].ours.item() == 1  # a rate, as it is
