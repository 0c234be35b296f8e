"""benchmark/results.py, random_play.py, deterministic_play.py: where runs go, curves beside them, ways to play."""

import csv
import json
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
    obs = torch.randn(3, 5, policy.observation[0].weight.shape[1])
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
    guess = deterministic_play.WAYS["first guess"](policy, torch.randn(3, 5, policy.observation[0].weight.shape[1]))
    torch.testing.assert_close(guess, torch.full((3, 5, 2), 0.3), atol=0.001, rtol=0)


def test_the_probability_flow_of_an_exact_denoiser_keeps_the_place_in_the_distribution():
    """For actions N(0.3, 0.4^2): the end lies as many deviations below their mean as x_T = 0 below that of x_T."""
    policy, _ = ddpl_mpe.load_team(TEAM)
    policy.alphas_bar = ddpl_mpe.noise_schedule(10, log_snr_min=0.0)  # else 0 lies close to that mean
    remaining = list(policy.alphas_bar[1:])

    def velocity(context, x_t):
        alpha_bar = remaining.pop()
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        gain = signal * 0.4**2 / (signal**2 * 0.4**2 + noise**2)
        denoised = 0.3 + gain * (x_t - signal * 0.3)
        return (signal * x_t - denoised) / noise

    policy.forward = velocity
    end = deterministic_play.probability_flow(policy, torch.randn(3, 5, policy.observation[0].weight.shape[1]))
    deviations = -(0.5**0.5) * 0.3 / (0.5 * 0.4**2 + 0.5) ** 0.5
    torch.testing.assert_close(end, torch.full((3, 5, 2), 0.3 + deviations * 0.4), atol=0.015, rtol=0)


def test_every_team_has_a_row_for_each_way(monkeypatch, tmp_path):
    (tmp_path / "benchmark" / "results").mkdir(parents=True)
    monkeypatch.setattr(deterministic_play, "ROOT", tmp_path)
    monkeypatch.setitem(deterministic_play.EPISODES, "ddpl_mpe", 3)
    deterministic_play.main([str(TEAM)])
    rows = list(csv.DictReader(open(tmp_path / "benchmark" / "results" / "deterministic_play.csv")))
    assert [row["way"] for row in rows] == list(deterministic_play.WAYS)
    assert all(-30 < float(row["return_mean"]) < -5 for row in rows)  # random play: -36


def write_returns(folder: Path, **finals: float | list[float]) -> None:
    """Curves of three points, the best in the middle, for each arm, a seed for each of its deterministic final returns.

    Stochastic ones are higher by 0.5, rates a hundredth of the returns; the seeds take a minute, two minutes, ...
    """
    folder.mkdir(parents=True)
    for arm, of_seeds in finals.items():
        for seed, final in enumerate(np.atleast_1d(of_seeds), start=1):
            lines = ["global_step,seconds,mode,return_mean,success_rate"]
            for step, gain in enumerate((-20, 90, 0), start=1):
                for mode, score in (("deterministic", final + gain), ("stochastic", final + gain + 0.5)):
                    lines.append(f"{1000 * step},{20 * step * seed},{mode},{score},{score / 100}")
            (folder / f"{arm.replace('_', '-')}_{seed}.csv").write_text("\n".join(lines))


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_rows_are_of_the_final_policies_of_unpaired_seeds(monkeypatch, tmp_path):
    """Of three seeds equally far apart. Of their resamples 1 in 27 has the lowest mean, of both arms' 1 in 729."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    write_returns(tmp_path / "mpe" / "task", diffusion=[2, 1, 3], gaussian=[12, 11, 13])
    assert [cells(row) for row in results.table_rows(tmp_path / "mpe" / "task")] == [
        ["task", "diffusion", "2.00 [1.00, 3.00]", "2.50 [1.50, 3.50]", "2.0 1.0 3.0", "", "2.0"],
        ["task", "gaussian", "12.00 [11.00, 13.00]", "12.50 [11.50, 13.50]", "12.0 11.0 13.0", "", "2.0"],
        ["", "difference", "-10.00 [-11.33, -8.67]", "", "", "", ""],
    ]
    write_returns(tmp_path / "isaaclab" / "task", diffusion=[120, 118, 122], gaussian=[7, 5, 9])
    assert [cells(row) for row in results.success_rows(tmp_path / "isaaclab" / "task")] == [
        ["diffusion, deterministic", "1.200 [1.180, 1.220]", "1.200 1.180 1.220", "1k 2k 1k"],
        ["diffusion, stochastic", "1.205 [1.185, 1.225]", "1.205 1.185 1.225", "1k 2k 1k"],
        ["gaussian, deterministic", "0.070 [0.050, 0.090]", "0.070 0.050 0.090", "- - 2k"],
        ["gaussian, stochastic", "0.075 [0.055, 0.095]", "0.075 0.055 0.095", "- - 2k"],
        ["difference, deterministic", "+1.130 [+1.103, +1.157]", "", ""],
        ["difference, stochastic", "+1.130 [+1.103, +1.157]", "", ""],
    ]


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
    def write(name: str, wins: list[float]) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        lines = ["global_step,seconds,mode,win_rate"]
        lines += [f"{step},1,{mode},{win + more}" for step, win in enumerate(wins) for mode, more in MODES]
        (tmp_path / name).write_text("\n".join(lines))

    MODES = ("deterministic", 0), ("stochastic", 7)
    for seed, win in enumerate((0.2, 0.1, 0.3), start=1):
        write(f"smax/3m/gaussian_{seed}.csv", [0, win, 9])
        write(f"smax/3m/diffusion_{seed}.csv", [9, 9, 9])
        write(f"smax_whole/3m/gaussian-one-step_{seed}.csv", [9, win + 0.5])
    (row,) = results.ablation_rows(tmp_path / "smax_whole" / "3m", tmp_path / "smax" / "3m")
    expected = ["3m", "gaussian-one-step", "smax", "1", "0.70 0.60 0.80", "0.20 0.10 0.30", "+0.50 [+0.37, +0.63]"]
    assert cells(row) == expected


def test_a_task_is_compared_with_its_longest_budget(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for folder, final in (("mpe/a", 1.0), ("mpe/b", 1.0), ("mpe_long/b", 3.0)):
        write_returns(tmp_path / folder, diffusion=3 * [final], gaussian=3 * [1.0])
    lines = ["task,return_mean", "mpe/a,-1", "mpe/b,-2", "mpe_long/b,0"]
    (tmp_path / "random.csv").write_text("\n".join(lines))
    groups = results.compared()
    assert list(groups) == ["mpe", "all"] and [task.name for task in groups["all"]] == ["a", "b"]
    assert [set(task.ours) for task in groups["mpe"]] == [{1}, {1.5}]  # 3 of a mean of 2, above random play's 0
    write_returns(tmp_path / "isaaclab" / "c", diffusion=[50, 25, 0], gaussian=[75, 50, 50])
    write_returns(tmp_path / "isaaclab" / "d", diffusion=[50, 25, 0], gaussian=[75, 50])  # too few to compare
    (task,) = results.compared()["isaaclab"]
    assert task.ours.tolist() == [0.5, 0.25, 0] and task.theirs.tolist() == [0.75, 0.5, 0.5]  # rates, as they are


def test_a_run_of_several_seeds_is_collected_seed_by_seed(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    args = {"script": "ddpl_smax_jax", "map_name": "3m", "total_timesteps": 200_000, "policy": "diffusion"}
    (run / "args.json").write_text(json.dumps(args | {"raw_actions": False, "seed": 4}))
    (run / "result.json").touch()
    header, *rows = "global_step,seed,win_rate", "10,4,0.1", "10,5,0.2", "20,4,0.3", "20,5,0.4"
    (run / "evaluations.csv").write_text("\n".join([header, *rows]))
    results.collect(tmp_path / "runs")
    files = {path.name: path.read_text().splitlines() for path in (tmp_path / "results" / "smax" / "3m").iterdir()}
    assert files == {"diffusion_4.csv": [header, *rows[::2]], "diffusion_5.csv": [header, *rows[1::2]]}


def test_random_play_is_uniform_from_end_to_end():
    actions = random_play.RandomPolicy(torch.tensor([[1.0, 1], [1, 0]])).sample(torch.empty(2, 10_000, 5))
    assert actions.shape == (2, 10_000, 2) and (actions[1, :, 1] == 0).all()
    for free in (actions[0, :, 0], actions[0, :, 1], actions[1, :, 0]):
        assert -1 <= free.min() < -0.99 and 0.99 < free.max() <= 1
        assert free.mean().abs() < 0.03 and free.std().item() == pytest.approx(3**-0.5, abs=0.02)
    assert (
        torch.corrcoef(torch.stack([actions[0, :, 0], actions[0, :, 1], actions[1, :, 0]])).triu(1).abs().max() < 0.05
    )
