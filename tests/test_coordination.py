"""ddpl_coordination.py: the game, its quadrature, and that coordination is learned."""

import csv
import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

import ddpl_coordination
from ddpl_coordination import Args, Learner, RunError, learn, nash_gap, success, team_reward, train

JOINT, MATCH = Args(), Args(game="match")


# ---- the game


def test_rewards_of_the_joint_game_by_hand():
    actions = torch.tensor([[0.7, 0.7], [0.7, -0.7], [-0.7, -0.7], [0.7, 0.9], [0.84, 0.56], [0.0, 0.0]])
    near, off = math.exp(-(0.14**2) / 0.08), math.exp(-(0.2**2) / 0.08)
    expected = [2, 1, 1, (1 + off) / 2, near + 1, math.exp(-(0.7**2) / 0.08)]
    torch.testing.assert_close(team_reward(actions, JOINT), torch.tensor(expected))
    assert success(actions, JOINT).tolist() == [True, False, False, False, True, False]


def test_rewards_of_the_matching_game_by_hand():
    actions = torch.tensor([[0.7, 0.7], [0.7, -0.7], [-0.7, -0.7]])
    agreement = math.tanh(3.5) ** 2
    torch.testing.assert_close(team_reward(actions, MATCH), torch.tensor([1 + agreement, 1, 1 + agreement]))
    assert success(actions, MATCH).tolist() == [True, False, True]


@pytest.mark.parametrize("num_agents", [1, 2, 3])
def test_coordination_is_the_optimum(num_agents):
    """Of all joint actions on a grid of step 0.1, those that succeed are best, and own payoff has two equal peaks."""
    grid = torch.tensor(list(itertools.product(np.linspace(-1, 1, 21), repeat=num_agents)), dtype=torch.float32)
    plus = torch.full((num_agents,), 0.7)
    reward = team_reward(grid, JOINT)
    assert torch.isclose(reward, reward.max()).sum() == 1
    torch.testing.assert_close(grid[reward.argmax()], plus)
    reward = team_reward(grid, MATCH)
    best = grid[torch.isclose(reward, reward.max(), rtol=1e-3)]
    assert sorted(best[:, 0].sign().tolist()) == [-1, 1] and (best == best[:, :1]).all()
    torch.testing.assert_close(ddpl_coordination.own_payoff(-plus), ddpl_coordination.own_payoff(plus))


def test_nash_gap_of_known_teams():
    """Nothing to gain at +0.7; the bonus and its own payoff for the one out of place; its own payoff if two are."""
    teams = torch.tensor([[0.7, 0.7, 0.7], [0.7, 0.7, 0.0], [-0.7, -0.7, -0.7], [0.7, 0.0, 0.0]])[:, None]
    own = (1 - math.exp(-(0.7**2) / 0.08)) / 3
    torch.testing.assert_close(nash_gap(teams, JOINT), torch.tensor([0, 1 + own, 0, own]), atol=1e-3, rtol=0)


# ---- the learner


def test_scores_equal_the_critic_asked_one_candidate_at_a_time():
    learner = Learner(Args(num_seeds=2), "diffusion", 3)
    actions, candidates = torch.rand(6, 5, 1), torch.rand(6, 4, 5, 1)
    scores = learner.score(actions, candidates)
    for i, m in itertools.product(range(6), range(4)):
        alone = actions.clone()
        alone[i] = candidates[i, m]
        torch.testing.assert_close(scores[i, m], learner.critic(learner.joint(alone))[i // 3])


def test_local_critic_is_the_mean_over_the_others():
    """With Q = a_1 a_2 and the second at 0.5 on average, Q_1 has slope 0.5."""
    learner = Learner(Args(num_seeds=1), "diffusion", 2)
    learner.critic = lambda joint: joint.prod(-1)
    for _ in range(400):
        actions = torch.rand(2, 64, 1)
        ddpl_coordination.update_local_critic(learner, actions, 2 * torch.rand(2, 8, 64, 1) - 1)
    low, high = learner.local_critic(torch.tensor([-1.0, 1.0])[None, :, None].expand(2, -1, 1)).unbind(1)
    torch.testing.assert_close((high - low).detach() / 2, torch.full((2,), 0.5), atol=0.1, rtol=0)


def test_local_critic_ignores_what_the_others_add_to_all_candidates():
    outcomes = []
    for offset in (0.0, 5.0):
        torch.manual_seed(0)
        learner = Learner(Args(num_seeds=1), "diffusion", 2)
        actions, candidates = torch.rand(2, 16, 1), torch.rand(2, 8, 16, 1)
        q = learner.score(actions, candidates) + offset * torch.randn(16)
        learner.score = lambda *_, q=q: q
        ddpl_coordination.update_local_critic(learner, actions, candidates)
        outcomes.append([parameter.grad for parameter in learner.local_critic.parameters()])
    for clean, offset in zip(*outcomes):
        torch.testing.assert_close(clean, offset, atol=1e-4, rtol=1e-3)


UPDATES = {name: getattr(ddpl_coordination, f"update_{name}") for name in ("diffusion", "gaussian", "moments")}


@pytest.mark.parametrize("policy", UPDATES)
@pytest.mark.parametrize("target_entropy, sign", [(-5.0, -1), (0.69, 1)])
def test_temperature_follows_the_entropy(policy, target_entropy, sign):
    """It falls where the entropy exceeds its target, and rises where it does not, at a critic with one sharp peak."""
    learner = Learner(Args(num_seeds=1, target_entropy=target_entropy), policy, 2)
    learner.critic = lambda joint: -5 * joint.square().sum(-1)
    for _ in range(200):
        ddpl_coordination.update_local_critic(learner, torch.rand(2, 16, 1), 2 * torch.rand(2, 8, 16, 1) - 1)
    if policy == "gaussian":
        learner.policy.log_std.data.fill_(-3)
    before = learner.log_temperature.detach().clone()
    UPDATES[policy](learner, learner.policy.sample(16))
    assert ((learner.log_temperature - before).sign() == sign).all()


def test_gaussian_widens_where_all_actions_are_equal():
    learner = Learner(Args(num_seeds=1), "gaussian", 2)
    learner.critic = lambda joint: 0 * joint.sum(-1)
    learner.policy.log_std.data.fill_(-2)
    for _ in range(10):
        ddpl_coordination.update_gaussian(learner, None)
    assert (learner.policy.log_std > -1.9).all()


def test_moments_policy_matches_the_energy():
    """Mean, deviation and entropy of exp(3 a) on the box, against quadrature."""
    density = ddpl_coordination.boltzmann(3 * ddpl_coordination.GRID, 1.0)
    z = quad(lambda a: math.exp(3 * a), -1, 1)[0]
    mean = quad(lambda a: a * math.exp(3 * a) / z, -1, 1)[0]
    std = quad(lambda a: (a - mean) ** 2 * math.exp(3 * a) / z, -1, 1)[0] ** 0.5
    ours = [value.item() for value in ddpl_coordination.moments(density)]
    assert ours == pytest.approx([mean, std], abs=1e-3)
    assert ddpl_coordination.entropy_of(density).item() == pytest.approx(math.log(z) - 3 * mean, abs=1e-3)


def test_energy_policy_and_its_fits_without_learning_a_critic():
    """Chances at +0.7 against quadrature; ISSM keeps most of them, and the least KL sits on one mode."""
    chances = ddpl_coordination.chances(JOINT, ddpl_coordination.fit_issm(JOINT).sample(4000)[..., 0])

    def advantage(a):
        return math.exp(-(((a - 0.7) / 0.2) ** 2) / 2) - 1

    def integral(f, temperature, low=0.0, high=1.0):
        return quad(lambda a: f(a) * math.exp(advantage(a) / temperature), low, high, points=(0.7,), limit=200)[0]

    def entropy(temperature):
        z = 2 * integral(lambda a: 1, temperature)
        return math.log(z) - 2 * integral(advantage, temperature) / temperature / z

    temperature = brentq(lambda t: entropy(t) - JOINT.target_entropy, 1e-2, 10)
    z = 2 * integral(lambda a: 1, temperature)
    share = integral(lambda a: 1, temperature, 0.55, 0.85) / z
    window = np.diff(norm.cdf([0.55, 0.85], 0, (2 * integral(np.square, temperature) / z) ** 0.5))
    assert chances["energy-based policy"] == pytest.approx([share], abs=0.02)
    assert abs(chances["its ISSM fit"].mean() - share) < 0.1
    assert chances["Gaussian, its mean and deviation"] == pytest.approx(window, abs=0.01)
    assert chances["Gaussian, least KL"] == pytest.approx([1, 0], abs=0.05)


def test_meeting_of_teams():
    single, repeated = ddpl_coordination.meeting(np.array([1.0, 0.0]), 3)
    assert single == pytest.approx(1 / 8, abs=0.01) and repeated == pytest.approx(1 / 8, abs=0.01)
    single, repeated = ddpl_coordination.meeting(np.array([0.5]), 3, tries=10)
    assert single == pytest.approx(1 / 8) and repeated == pytest.approx(1 - (7 / 8) ** 10)


def test_issm_error_falls_with_the_root_of_candidates():
    sizes = [64, 256, 1024, 4096]
    errors, samples = zip(*(ddpl_coordination.issm_error(1, size, size // 4) for size in sizes))
    assert -0.65 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < -0.4
    assert all(1 <= used <= size for used, size in zip(samples, sizes))


# ---- learning


def test_diffusion_coordinates_where_moments_do_not():
    args = Args(num_seeds=4, total_timesteps=6000)
    diffusion, moments, uniform = (learn(args, policy, 2) for policy in ("diffusion", "moments", "uniform"))
    assert (diffusion["final_success"] > 0.5).sum() >= 3
    assert diffusion["final_success"].mean() > moments["final_success"].mean() + 0.2
    assert 1 <= uniform["first_success"].min() and np.median(uniform["first_success"]) < 200  # 44 on average
    assert uniform["final_success"].mean() == pytest.approx(0.15**2, abs=0.01)
    assert diffusion["nash_gap"].mean() < 0.3 < uniform["nash_gap"].mean()


def test_train_writes_what_it_returns():
    args = Args(num_seeds=2, total_timesteps=480, num_agents=(1, 2), num_processes=1)
    result = train(args)
    folder = Path(result["run_dir"])
    assert {path.name for path in folder.iterdir()} == {"args.json", "coordination.csv", "result.json", "success.png"}
    rows = list(csv.DictReader(open(folder / "coordination.csv")))
    assert len(rows) == 4 * 2 * 2 and result["global_step"] == 16 * 480
    returns = [float(r["final_return"]) for r in rows if r["policy"] == "diffusion" and r["num_agents"] == "2"]
    assert result["episodic_returns"] == pytest.approx(returns) and result["final_return"] == pytest.approx(
        np.mean(returns)
    )
    again = train(args)
    assert again["rows"] == result["rows"]


def test_full_draws_all_figures():
    args = Args(num_seeds=2, total_timesteps=480, num_agents=(2,), num_processes=1, policies=("diffusion",), full=True)
    folder = Path(train(args)["run_dir"])
    figures = {path.stem for path in folder.glob("*.png") if path.stat().st_size > 5_000}
    assert figures == {"success", "training", "nash_gap", "exact", "issm"}


@pytest.mark.parametrize("policy", ["diffusion", "gaussian", "moments"])
def test_diverging_run_says_where(policy):
    with pytest.raises(RunError, match=f"the actions of the {policy} policy are NaN after 300 joint actions"):
        learn(Args(num_seeds=2, total_timesteps=1000, critic_lr=1e30), policy, 2)


def test_a_run_is_the_same_with_and_without_its_figures():
    args = Args(num_seeds=2, total_timesteps=480)
    plain, full = learn(args, "diffusion", 2), learn(replace(args, full=True), "diffusion", 2)
    assert all(np.array_equal(plain[name], full[name]) for name in plain) and len(full["gaps"]) == 20


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_agents": (9,)}, "--num-agents"),
        ({"num_agents": ()}, "--num-agents"),
        ({"policies": ()}, "--policies"),
        ({"policies": ("uniform",), "full": True}, "--full"),
        ({"tolerance": 0.5}, "--tolerance"),
        ({"bonus": 0.0}, "--bonus"),
        ({"sigmas": ()}, "--sigmas"),
        ({"target_entropy": 1.0}, "--target-entropy"),
        ({"actor_lr": 0.0}, "--actor-lr"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"num_uniform": -1}, "--num-uniform"),
        ({"num_per_kernel": 1, "num_uniform": 0, "sigmas": (0.1,)}, "--num-per-kernel"),
        ({"total_timesteps": 10}, "--total-timesteps"),
    ],
)
def test_bad_arguments_name_the_flag(options, named):
    with pytest.raises(RunError, match=f"^{named}: .*must be"):
        train(Args(**options))
    assert not Path("runs").exists()


def test_command_line_answers_bad_input_in_one_line():
    script = Path(ddpl_coordination.__file__)
    process = subprocess.run([sys.executable, script, "--bonus", "-1"], capture_output=True, text=True)
    assert process.returncode == 1
    assert process.stderr.strip().startswith("ddpl_coordination.py: error: --bonus") and process.stderr.count("\n") == 1
