"""ddpl_coordination.py: the game, that coordination is learned, files and errors; its figures."""

import csv
import itertools
import json
import math
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import OnMeta, command, equal, wait_for
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

import ddpl_coordination
from benchmark import ddpl_coordination_figures as coordination_figures
from benchmark.ddpl_coordination_figures import WatchedLearner, nash_gap, watched
from ddpl_coordination import Args, Learner, RunError, learn, main, success, team_reward, train

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


# ---- the learner


class Known(torch.nn.Module):
    """A critic that is given as a function of joint actions."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


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
    learner.critic = Known(lambda joint: joint.prod(-1))
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


LEARNED = ("diffusion", "gaussian", "moments")


def update(learner):
    """One update, from random joint actions and what the policies have drawn."""
    actions = 2 * torch.rand(learner.args.num_seeds, 64, learner.num_agents) - 1
    ddpl_coordination.update_critic(learner, actions, team_reward(actions, learner.args))
    learner.update_policy(learner.policy.sample(16))


@pytest.mark.parametrize("policy", LEARNED)
def test_an_update_changes_the_networks_of_its_policy_and_no_others(policy):
    learner = WatchedLearner(Args(num_seeds=2), policy, 2)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    update(learner)
    parts = {"critic", "local_critic", "policy", "log_temperature"}
    changed = {name.split(".")[0] for name, value in learner.state_dict().items() if not equal(value, before[name])}
    assert changed == parts - ({"local_critic"} if policy == "gaussian" else set())


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_whole_update_stays_on_its_device(policy, monkeypatch):
    monkeypatch.setattr(ddpl_coordination, "Adam", lambda *args, fused: torch.optim.Adam(*args))  # fused: CPU and GPUs
    with torch.device("meta"), OnMeta():
        learner = Learner(Args(num_seeds=2), policy, 3)
        actions = torch.rand(2, 64, 3)
        ddpl_coordination.update_critic(learner, actions, team_reward(actions, learner.args))
        learner.update_policy(learner.policy.sample(16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", ["diffusion", "gaussian", "uniform"])
def test_a_run_on_the_gpu(policy):
    with torch.device("cuda"):
        outcomes = learn(Args(num_seeds=2, total_timesteps=480), policy, 2)
    assert all(np.isfinite(values).all() for values in outcomes.values())


@pytest.mark.parametrize("policy", LEARNED)
@pytest.mark.parametrize("target_entropy, sign", [(-5.0, -1), (0.69, 1)])
def test_temperature_follows_the_entropy(policy, target_entropy, sign, monkeypatch):
    """It falls where the entropy exceeds its target, and rises where it does not, at a critic with one sharp peak."""
    learner = WatchedLearner(Args(num_seeds=1, target_entropy=target_entropy), policy, 2)
    learner.critic = Known(lambda joint: -5 * joint.square().sum(-1))
    for _ in range(200):
        ddpl_coordination.update_local_critic(learner, torch.rand(2, 16, 1), 2 * torch.rand(2, 8, 16, 1) - 1)
    if policy == "gaussian":
        learner.policy.log_std.data.fill_(-3)
    before = learner.log_temperature.detach().clone()
    monkeypatch.setattr(ddpl_coordination, "update_critic", lambda *_: None)  # it is known
    update(learner)
    assert ((learner.log_temperature - before).sign() == sign).all()


def test_gaussian_widens_where_all_actions_are_equal():
    learner = Learner(Args(num_seeds=1), "gaussian", 2)
    learner.critic = Known(lambda joint: 0 * joint.sum(-1))
    learner.policy.log_std.data.fill_(-2)
    for _ in range(10):
        ddpl_coordination.update_gaussian(learner)
    assert (learner.policy.log_std > -1.9).all()


def test_gaussian_climbs_the_critic():
    """Its mean goes to where the critic is highest, from either side."""
    learner = Learner(Args(num_seeds=1), "gaussian", 2)
    learner.critic = Known(lambda joint: -(joint - torch.tensor([0.5, -0.5])).square().sum(-1))
    for _ in range(200):
        ddpl_coordination.update_gaussian(learner)
    mean = learner.joint(learner.policy.sample(2000)).mean((0, 1))
    torch.testing.assert_close(mean, torch.tensor([0.5, -0.5]), atol=0.1, rtol=0)


# ---- learning


def test_diffusion_coordinates_where_moments_do_not():
    args = Args(num_seeds=4, total_timesteps=6000)
    diffusion, moments, uniform = watched(args, "diffusion", 2), watched(args, "moments", 2), learn(args, "uniform", 2)
    assert (diffusion["final_success"] > 0.5).sum() >= 3
    assert diffusion["final_success"].mean() > moments["final_success"].mean() + 0.2
    assert 1 <= uniform["first_success"].min() and np.median(uniform["first_success"]) < 200  # 44 on average
    assert uniform["final_success"].mean() == pytest.approx(0.15**2, abs=0.01)
    assert diffusion["gaps"][-1].mean() < 0.3 < nash_gap(2 * torch.rand(4, 200, 2) - 1, args).mean()


def test_train_writes_what_it_returns(capsys):
    args = Args(num_seeds=2, total_timesteps=480, num_agents=(1, 2))
    result = train(args)
    folder = Path(result["run_dir"])
    assert folder.name.startswith("ddpl_coordination__joint__1__")
    assert {path.name for path in folder.iterdir()} == {"args.json", "coordination.csv", "result.json", "success.png"}
    assert json.loads((folder / "result.json").read_text()) == result
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments.items() >= {"num_seeds": 2, "num_agents": [1, 2], "script": "ddpl_coordination"}.items()
    rows = list(csv.DictReader(open(folder / "coordination.csv")))
    assert len(rows) == 3 * 2 * 2 and result["global_step"] == 12 * 480
    returns = [float(r["final_return"]) for r in rows if r["policy"] == "diffusion" and r["num_agents"] == "2"]
    assert result["episodic_returns"] == pytest.approx(returns)
    assert result["final_return"] == pytest.approx(np.mean(returns))
    ours = [row for row in rows if row["policy"] == "gaussian" and row["num_agents"] == "2"]
    for name, values in learn(args, "gaussian", 2).items():
        assert [float(row[name]) for row in ours] == values.tolist()
    table = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert table == [[policy, n] for policy in ("diffusion", "gaussian", "uniform") for n in "12"]


@pytest.mark.parametrize("policy", LEARNED)
@pytest.mark.parametrize("total_timesteps", [1000, 264])
def test_diverging_run_says_where(policy, total_timesteps):
    """While it learns, and where only the last update went wrong."""
    with pytest.raises(RunError, match=f"the actions of the {policy} policy are NaN after 2[5-7]. joint actions"):
        learn(Args(num_seeds=2, total_timesteps=total_timesteps, critic_lr=1e30), policy, 2, WatchedLearner)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_agents": (9,)}, "--num-agents"),
        ({"num_agents": ()}, "--num-agents"),
        ({"num_agents": (2, 2)}, "--num-agents"),
        ({"num_agents": 2}, "--num-agents"),
        ({"game": "chess"}, "--game"),
        ({"seed": -1}, "--seed"),
        ({"batch_size": 64.0}, "--batch-size"),
        ({"batch_size": 2 * 10**9}, "--batch-size"),
        ({"learning_starts": 8000}, "--learning-starts"),
        ({"total_timesteps": 480, "learning_starts": 479}, "--learning-starts"),  # no step is left to learn from
        ({"total_timesteps": 480, "num_envs": 4096}, "--learning-starts"),
        ({"tolerance": 0.5}, "--tolerance"),
        ({"bonus": 0.0}, "--bonus"),
        ({"bonus": 1e38}, "--bonus"),
        ({"sigmas": ()}, "--sigmas"),
        ({"target_entropy": 1.0}, "--target-entropy"),
        ({"target_entropy": -math.inf}, "--target-entropy"),
        ({"init_temperature": 1e-300}, "--init-temperature"),
        ({"actor_lr": 0.0}, "--actor-lr"),
        ({"num_seeds": 0}, "--num-seeds"),
        ({"num_uniform": -1}, "--num-uniform"),
        ({"denoising_steps": 1}, "--denoising-steps"),
        ({"num_per_kernel": 1, "num_uniform": 0, "sigmas": (0.1,)}, "--num-per-kernel"),
        ({"total_timesteps": 10}, "--learning-starts"),
        ({"total_timesteps": 2**32 - 1}, "--total-timesteps"),
        ({"hidden": 10**6}, "--hidden"),
    ],
)
def test_bad_arguments_name_the_flag(options, named, monkeypatch):
    monkeypatch.setattr(ddpl_coordination, "learn", None)
    with pytest.raises(RunError, match=f"^{named}: .*must be"):
        train(Args(**options))
    assert not Path("runs").exists()


# ---- errors and signals


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ddpl_coordination, "write_csv", full)
    with pytest.raises(SystemExit) as stopped:
        main(Args(num_agents=(1,), num_seeds=1, total_timesteps=480))
    message = str(stopped.value.code)
    assert message.startswith("ddpl_coordination.py: error: ") and "No space left" in message and "\n" not in message
    assert list(Path("runs").glob("*/args.json")) and not list(Path("runs").glob("*/result.json"))


@pytest.mark.parametrize("options", [dict(denoising_steps=2**32 - 1), dict(num_uniform=2**32 - 1)])
def test_memory_that_is_not_there_is_told_in_one_line(options):
    with pytest.raises(SystemExit) as stopped:
        main(Args(num_agents=(2,), num_seeds=2, total_timesteps=480, learning_starts=12, **options))
    message = str(stopped.value.code)
    assert message.startswith("ddpl_coordination.py: error: out of memory") and "\n" not in message


def test_exit_code_and_standard_error():
    done = subprocess.run(command(ddpl_coordination, bonus=-1), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--bonus" in done.stderr
    done = subprocess.run(command(ddpl_coordination, game="chess"), capture_output=True, text=True)
    assert done.returncode and all(word in done.stderr for word in ("--game", "joint", "match"))
    assert not Path("runs").exists()


def test_ctrl_c_ends_the_script_in_one_line():
    command_line = command(ddpl_coordination, total_timesteps=1_000_000)
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    try:
        wait_for(process, lambda: list(Path().glob("runs/*/args.json")))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.startswith("stopped before the end") and errors.count("\n") == 1
    assert [path.name for path in Path("runs").glob("*/*")] == ["args.json"]


# ---- benchmark/ddpl_coordination_figures.py


def test_moments_policy_matches_the_energy():
    """Mean, deviation and entropy of exp(3 a) on the box, against quadrature."""
    density = coordination_figures.boltzmann(3 * coordination_figures.GRID, 1.0)
    z = quad(lambda a: math.exp(3 * a), -1, 1)[0]
    mean = quad(lambda a: a * math.exp(3 * a) / z, -1, 1)[0]
    std = quad(lambda a: (a - mean) ** 2 * math.exp(3 * a) / z, -1, 1)[0] ** 0.5
    ours = [value.item() for value in coordination_figures.moments(density)]
    assert ours == pytest.approx([mean, std], abs=1e-3)
    assert coordination_figures.entropy_of(density).item() == pytest.approx(math.log(z) - 3 * mean, abs=1e-3)


def test_nash_gap_of_known_teams():
    """Nothing to gain at +0.7; the bonus and its own payoff for the one out of place; its own payoff if two are."""
    teams = torch.tensor([[0.7, 0.7, 0.7], [0.7, 0.7, 0.0], [-0.7, -0.7, -0.7], [0.7, 0.0, 0.0]])[:, None]
    own = (1 - math.exp(-(0.7**2) / 0.08)) / 3
    torch.testing.assert_close(nash_gap(teams, JOINT), torch.tensor([0, 1 + own, 0, own]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_a_run_is_the_same_when_watched(policy):
    args = Args(num_seeds=2, total_timesteps=480, learning_starts=24)
    plain, seen = learn(args, policy, 2), watched(args, policy, 2)
    assert all(np.array_equal(values, seen[name]) for name, values in plain.items())
    assert seen["looks"].tolist() == list(range(48, 481, 24))
    shapes = {name: seen[name].shape for name in seen.keys() - plain.keys() - {"looks"}}
    assert shapes == {"gaps": (19, 2), "snapshots": (19, 2, 500), "energy": (2, 100)}


def test_all_figures_are_drawn(monkeypatch):
    fit_issm = coordination_figures.fit_issm
    monkeypatch.setattr(coordination_figures, "fit_issm", lambda args: fit_issm(args, num_updates=10))
    monkeypatch.setattr(coordination_figures, "issm_error", partial(coordination_figures.issm_error, repeats=20))
    args = Args(num_seeds=2, total_timesteps=480, num_agents=(2,))
    coordination_figures.draw(args, Path("figures"))
    figures = {path.stem for path in Path("figures").glob("*.png") if path.stat().st_size > 5_000}
    assert figures == {"success", "first_success", "training", "nash_gap", "exact", "issm"}


def test_energy_policy_and_its_fits_without_learning_a_critic():
    """Chances at +0.7 against quadrature; ISSM keeps most of them, and the least KL sits on one mode."""
    chances = coordination_figures.chances(JOINT, coordination_figures.fit_issm(JOINT).sample(4000)[..., 0])

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
    single, repeated = coordination_figures.meeting(np.array([1.0, 0.0]), 3)
    assert single == pytest.approx(1 / 8, abs=0.01) and repeated == pytest.approx(1 / 8, abs=0.01)
    single, repeated = coordination_figures.meeting(np.array([0.5]), 3, tries=10)
    assert single == pytest.approx(1 / 8) and repeated == pytest.approx(1 - (7 / 8) ** 10)


def test_issm_error_falls_with_the_root_of_candidates():
    sizes = [64, 256, 1024, 4096]
    errors, samples = zip(*(coordination_figures.issm_error(1, size, size // 4) for size in sizes))
    assert -0.65 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < -0.4
    assert all(1 <= used <= size for used, size in zip(samples, sizes))
