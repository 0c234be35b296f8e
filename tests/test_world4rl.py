"""world4rl.py: two-hot actions, EDM against closed forms, what is frozen, a toy task, resume."""

import csv
import importlib.util
import json
import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import checkpoint_of, command, equal, error_of, evaluations, kill_and_resume, scalars

import world4rl
from benchmark import world4rl_figures
from world4rl import Args, Episode, History, Learner, PointTask, Rollout

TOY = dict(env_id="point", horizon=40, hidden=64, model_hidden=128)
SMALL = TOY | dict(
    hidden=16,
    model_hidden=32,
    expert_episodes=2,
    random_episodes=2,
    clone_episodes=2,
    clone_steps=250,
    model_steps=250,
    rollout_episodes=8,
    num_minibatches=2,
    total_timesteps=1_000,
    eval_interval=500,
    eval_episodes=2,
    final_eval_episodes=3,
    checkpoint_interval=1,
)


def learner_of(**options):
    args = Args(**TOY | options)
    return Learner(args, PointTask)


def random_data(episodes=5, horizon=40):
    states = torch.randn(episodes, horizon + 1, PointTask.state_size)
    choices = 2 * torch.randn(episodes, horizon, PointTask.action_size)
    return Episode(states, choices, (torch.rand(episodes, horizon) < 0.2).float())


# ---- actions


def test_two_hot_loses_nothing():
    action = 2 * torch.rand(1_000) - 1
    weights = world4rl.two_hot(torch.cat([action, torch.tensor([-1.0, 0.0, 1.0])]))
    bins = torch.linspace(-1, 1, 21)
    assert weights.shape == (1_003, 21) and (weights >= 0).all() and ((weights > 0).sum(1) <= 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(1_003))
    torch.testing.assert_close((weights @ bins)[:1_000], action)
    assert weights[-3:].argmax(1).tolist() == [0, 10, 20] and weights[-3:].max(1).values.tolist() == [1, 1, 1]


def test_two_hot_is_the_papers_formula_and_linear_between_two_values():
    bins = torch.linspace(-1, 1, 21)
    for k in (0, 7, 19):
        inside = bins[k] + torch.linspace(0.05, 0.95, 9) * (bins[k + 1] - bins[k])
        weights = world4rl.two_hot(inside)
        torch.testing.assert_close(weights[:, k], (bins[k + 1] - inside) / (bins[k + 1] - bins[k]))
        torch.testing.assert_close(weights[:, k + 1], (inside - bins[k]) / (bins[k + 1] - bins[k]))
        torch.testing.assert_close(weights.diff(n=2, dim=0), torch.zeros(7, 21), atol=1e-5, rtol=0)


def test_other_encodings():
    action = torch.tensor([[-1.0, 0.26], [0.04, 1.0]])
    assert torch.equal(world4rl.encode(action, "raw"), action)
    nearest = world4rl.encode(action, "one-hot").view(2, 2, 21)
    torch.testing.assert_close(nearest.sum(-1), torch.ones(2, 2))
    assert nearest.argmax(-1).tolist() == [[0, 13], [10, 20]]
    torch.testing.assert_close(nearest.max(-1).values, torch.ones(2, 2), atol=1e-5, rtol=0)
    assert world4rl.encode(action, "two-hot").shape == (2, 42)


# ---- diffusion


def test_preconditioning_has_its_closed_form():
    """Inputs and targets of the network have unit variance, and out^2 is as small as it can be."""
    sigma = torch.tensor([0.002, 0.3, 1.0, 5.0], dtype=torch.float64)
    c = world4rl.preconditioning(sigma)
    data, noise = torch.randn(2, 400_000, 1, dtype=torch.float64)
    x = data + sigma * noise
    torch.testing.assert_close((c.into * x).var(0), torch.ones(4, dtype=torch.float64), atol=0.01, rtol=0)
    target = (data - c.skip * x) / c.out
    torch.testing.assert_close(target.var(0), torch.ones(4, dtype=torch.float64), atol=0.01, rtol=0)
    assert ((target * x).mean(0).abs() < 0.02).all()  # skip is the best linear prediction
    torch.testing.assert_close(c.noise, sigma.log() / 4)
    torch.testing.assert_close(c.out, sigma * c.skip.sqrt())


def test_noise_levels():
    levels = world4rl.noise_levels(3)
    middle = ((5 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert levels == pytest.approx([5, middle, 0.002, 0])


@pytest.mark.parametrize("num_steps", [3, 500])
def test_the_sampler_on_a_gaussian(num_steps):
    """Data N(m, s^2): the denoiser is known, each Euler step is linear, and many of them give the data's spread."""
    mean, std = 0.7, 0.6
    levels = world4rl.noise_levels(num_steps)
    noise = torch.randn(20_000, 1, dtype=torch.float64)
    denoise = lambda x, sigma: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)  # noqa: E731
    sampled = world4rl.sample_euler(denoise, noise, levels)
    factor = math.prod(1 + (after - s) * s / (s**2 + std**2) for s, after in zip(levels, levels[1:]))
    torch.testing.assert_close(sampled, mean + factor * (levels[0] * noise - mean))
    if num_steps == 500:
        exact = mean + std / math.sqrt(std**2 + 25) * (5 * noise - mean)  # of the differential equation
        torch.testing.assert_close(sampled, exact, atol=0.02, rtol=0)
        assert float(sampled.std()) == pytest.approx(std, abs=0.02)


@pytest.mark.parametrize("world_model", ["diffusion", "mlp"])
def test_the_model_learns_two_ways_to_go_on(world_model):
    """The next state is one of two: diffusion samples both, the MLP predicts the mean, which is neither."""
    learner = learner_of(world_model=world_model)
    states, actions = torch.randn(256, 4, 4), torch.rand(256, 4, 2)
    for _ in range(600):
        change = (torch.randint(2, (256, 1)) * 2.0 - 1).expand(256, 4)
        world4rl.take_step(learner.model_optimizer, learner.model.loss(change, states, actions), 1.0)
    sampled = learner.model.sample(states, actions)[:, 0]
    if world_model == "mlp":
        assert sampled.abs().mean() < 0.3
    else:
        assert (sampled.abs() - 1).abs().mean() < 0.25 and 0.3 < (sampled > 0).float().mean() < 0.7


def test_what_never_changes_stays():
    learner, data = learner_of(), random_data()
    data.states[..., 3] = torch.arange(5.0)[:, None]  # as a goal: constant in an episode
    world4rl.set_statistics(learner, data.states, "state")
    world4rl.set_statistics(learner, data.states.diff(dim=1), "change")
    batch = world4rl.windows(data, 4)
    after = learner.next_state(batch.states, batch.actions)
    assert torch.equal(after[:, 3], batch.states[:, -1, 3]) and not torch.equal(after[:, 2], batch.states[:, -1, 2])


def test_what_rests_stays_at_rest():
    """A change of an object by less than a tenth of its deviation is none; any other is what the model says."""
    task = PointTask()
    task.objects = (0, 1, 2)
    learner, data = Learner(Args(**SMALL), task), random_data()
    world4rl.set_statistics(learner, data.states.diff(dim=1), "change")
    batch = world4rl.windows(data, 4)
    wanted = learner.change_std * torch.tensor([0.09, -0.09, 0.11, 0.01])
    learner.model.sample = lambda states, actions: (wanted - learner.change_mean) / learner.change_std
    change = learner.next_state(batch.states, batch.actions) - batch.states[:, -1]
    assert (change[:, :2] == 0).all()
    torch.testing.assert_close(change[:, 2:], wanted[2:].expand(len(change), 2), atol=1e-5, rtol=0)


def test_the_classifier_sees_the_ways_between_things():
    """Whitened states, then differences of positions in units of 3 cm."""
    task = PointTask()
    task.between = ((0, 1),)
    learner = Learner(Args(**SMALL), task)
    learner.classifier = torch.nn.Identity()
    states = [[0.1, 0.2, 0.3, 0.6], [0.5, 0.2, 0.3, 0.6]]
    expected = [0.1, 0.2, 0.3, 0.6, -0.1 / 0.03, -0.1 / 0.03, -0.3 / 0.03]
    learner.classifier.forward = lambda seen: torch.testing.assert_close(seen[0], torch.tensor(expected)) or seen
    assert learner.classify(torch.tensor(states)).shape == (2,)


# ---- episodes


def test_windows_begin_with_the_initial_state_and_no_actions():
    data = random_data(2, 6)
    batch = world4rl.windows(data, 4)
    states, actions = batch.states.view(2, 6, 4, 4), batch.actions.view(2, 6, 4, 2)
    assert torch.equal(states[1, 1], data.states[1, [0, 0, 0, 1]]) and torch.equal(states[1, 5], data.states[1, 2:6])
    assert (actions[1, 1, :2] == 0).all() and torch.equal(actions[1, 1, 2:], data.choices[1, :2].clamp(-1, 1))
    assert torch.equal(batch.next_state.view(2, 6, 4), data.states[:, 1:])
    assert torch.equal(batch.success.view(2, 6), data.success)


def test_imagination_sees_what_the_model_was_trained_on():
    """Histories are built up in an episode as windows() cuts them out of the data."""
    data = random_data(3, 8)
    batch = world4rl.windows(data, 4)
    history, rows = History(data.states[:, 0], 4, 2), torch.arange(3)
    for t in range(8):
        history.act(data.choices[:, t].clamp(-1, 1), rows)
        assert torch.equal(history.states, batch.states.view(3, 8, 4, 4)[:, t])
        assert torch.equal(history.actions, batch.actions.view(3, 8, 4, 2)[:, t])
        history.move(data.states[:, t + 1], rows)


def test_imagined_episodes_end_at_success(monkeypatch):
    learner = learner_of()
    monkeypatch.setattr(learner, "next_state", lambda states, actions: states[:, -1] + 1)
    monkeypatch.setattr(learner, "succeeded", lambda state: state[:, 0] >= 5)
    start = torch.tensor([0.0, 2.5, -100.0])[:, None].expand(3, 4)
    played = world4rl.imagine(learner, learner.policy, start)
    assert played.running.sum(0).tolist() == [5, 3, 40] and played.reward.sum(0).tolist() == [1, 1, 0]
    assert played.reward[4, 0] == played.reward[2, 1] == 1 and torch.equal(played.terminated, played.reward)
    assert torch.equal(played.obs[1:5, 0], played.next_obs[:4, 0]) and (played.choice[5:, 0] == 0).all()


def test_advantages_stop_at_the_end_and_bootstrap_at_the_horizon():
    reward = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    running = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    rollout = Rollout(*(None,) * 2, reward, reward, 1 - running + reward, None, running)
    value, next_value = torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.tensor([[3.0, 4], [9, 6], [7, 8]])
    advantage = world4rl.advantages(rollout, value, next_value, 0.9, 0.5)
    first = 0.9 * 3 - 1 + 0.45 * (1 - 3)
    second = (0.9 * 4 - 2) + 0.45 * ((0.9 * 6 - 4) + 0.45 * (0.9 * 8 - 6))
    torch.testing.assert_close(advantage[0], torch.tensor([first, second]))


# ---- the policy


def test_standard_deviation_stays_within_its_bounds():
    learner = learner_of(min_log_std=-1.0, max_log_std=0.0)
    with torch.no_grad():
        learner.policy.network[-1].bias[2:] = torch.tensor([-50.0, 50.0])
    std = learner.policy(torch.randn(9, 4))[1].exp()
    torch.testing.assert_close(std, torch.tensor([math.exp(-1), 1.0]).expand(9, 2))


def test_distribution_against_pytorchs():
    policy = learner_of().policy
    p, q = policy(torch.randn(7, 4)), policy(torch.randn(7, 4)) + 0.3
    normals = [torch.distributions.Independent(torch.distributions.Normal(x[0], x[1].exp()), 1) for x in (p, q)]
    choice = policy.sample(p)
    torch.testing.assert_close(policy.log_prob(p, choice), normals[0].log_prob(choice))
    torch.testing.assert_close(policy.entropy(p), normals[0].entropy())
    torch.testing.assert_close(policy.kl(p, q), torch.distributions.kl_divergence(*normals))


# ---- the whole


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("small"))
    result = world4rl.train(Args(**SMALL))
    os.chdir(before)
    return result | {"run_dir": (tmp_path_factory.getbasetemp() / "small0" / result["run_dir"])}


def test_run_folder(small):
    run_dir = small["run_dir"]
    rows = evaluations(run_dir)
    assert tuple(rows[0]) == tuple(name for name in world4rl.EVALUATION_COLUMNS if name != "seconds")
    assert [(row["mode"], row["episodes"]) for row in rows[:2]] == [("stochastic", "3"), ("deterministic", "3")]
    assert rows[0]["global_step"] == "0" and int(rows[-1]["global_step"]) == small["global_step"] >= 1_000
    assert float(rows[-1]["success_rate"]) == small["final_return"] == np.mean(small["episodic_returns"])
    assert float(rows[1]["return_mean"]) == small["clone_return"] and small["real_steps"] == 6 * 40
    assert small["stage_seconds"].keys() == set(world4rl.STAGES)
    assert json.loads((run_dir / "result.json").read_text()).keys() == small.keys() | {"versions"}


def test_frozen_is_frozen(small, monkeypatch):
    """Refinement changes policy and value function, and nothing else."""
    rollouts = []
    update = world4rl.update
    monkeypatch.setattr(world4rl, "update", lambda learner, rollout: rollouts.append(1) or update(learner, rollout))
    before = checkpoint_of(world4rl.train(Args(**SMALL, stage="model")))
    assert not rollouts
    (run_dir,) = Path("runs").iterdir()
    after = checkpoint_of(world4rl.train(Args(resume=str(run_dir), stage="evaluate"), given=["stage"]))
    learned, was = after["learner"], before["learner"]
    changed = {name.split(".")[0] for name in learned if not equal(learned[name], was[name])}
    assert rollouts and changed == {"policy", "value"} and equal(after["data"], before["data"])
    assert equal(after["learner"], checkpoint_of(small)["learner"])  # stage by stage or in one go


def test_stage_by_stage_loses_nothing(small, capsys):
    """Of the policy, the evaluations or the curves; --resume alone goes on to the end."""
    world4rl.main(Args(**SMALL, stage="clone"))
    (run_dir,) = Path("runs").iterdir()
    with pytest.raises(
        SystemExit, match=f"--evaluate: {run_dir} has not learned what it refines in; go on with --resume"
    ):
        world4rl.main(Args(evaluate=str(run_dir)))
    world4rl.main(Args(resume=str(run_dir), stage="model"), ["stage"])
    world4rl.main(Args(resume=str(run_dir)))
    assert "final return" in capsys.readouterr().out.splitlines()[-1]
    assert evaluations(run_dir) == evaluations(small["run_dir"])
    assert scalars(run_dir) == scalars(small["run_dir"])


def test_a_minibatch_of_one_row_is_left_out():
    """993 rows in 32 chunks of 32 leave one."""
    learner = learner_of(num_minibatches=32)
    running = (torch.arange(33 * 31) < 993).float().view(33, 31)
    obs, next_obs = torch.randn(2, 33, 31, 4)
    none = torch.zeros(33, 31)
    rollout = Rollout(obs, torch.randn(33, 31, 2), torch.randn(33, 31), none, none, next_obs, running)
    metrics = world4rl.update(learner, rollout)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.slow
def test_no_real_episode_flows_back(small, monkeypatch):
    """Refinement never steps the simulator; evaluations do, and however many there are, the policy is the same."""
    often = checkpoint_of(world4rl.train(Args(**SMALL | dict(eval_interval=100, eval_episodes=3))))
    assert equal(often["learner"], checkpoint_of(small)["learner"]) and equal(often["rng"], checkpoint_of(small)["rng"])
    monkeypatch.setattr(world4rl, "evaluate", lambda *_: (np.zeros(1), np.zeros(1)))
    step, steps = PointTask.step, []
    monkeypatch.setattr(PointTask, "step", lambda self, action: steps.append(1) or step(self, action))
    world4rl.train(Args(**SMALL))
    assert len(steps) == 6 * 40


@pytest.mark.parametrize("stage", world4rl.STAGES)
def test_stopped_in_a_stage_and_resumed_equals_never_stopped(stage, small):
    """In the middle of the stage: after its first round."""
    signals = []
    work = world4rl.work

    def stop_after(name, *options):
        if name == stage:
            signals.append(signal.SIGINT)
        return work(name, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world4rl, "work", stop_after)
        with pytest.raises(world4rl.Stopped, match=f"stopped in stage {stage}, .*; go on with --resume"):
            world4rl.train(Args(**SMALL), signals=signals)
    (run_dir,) = Path("runs").iterdir()
    result = world4rl.train(Args(resume=str(run_dir)))
    ours, theirs = checkpoint_of(result), checkpoint_of(small)
    for key in ours.keys() - {"progress"}:
        assert equal(ours[key], theirs[key]), key
    assert evaluations(run_dir) == evaluations(small["run_dir"])
    assert result["episodic_returns"] == small["episodic_returns"]


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed():
    kill_and_resume(world4rl, (0, 400), **SMALL | dict(total_timesteps=2_000, eval_interval=1_000))


def test_resuming_a_finished_run_repeats_its_result(small):
    before = (small["run_dir"] / "evaluations.csv").read_text().splitlines()
    result = world4rl.train(Args(resume=str(small["run_dir"])))
    assert result["episodic_returns"] == small["episodic_returns"]
    assert len((small["run_dir"] / "evaluations.csv").read_text().splitlines()) == len(before)


@pytest.mark.parametrize("options", [dict(world_model="mlp"), dict(action_encoding="raw"), dict(random_episodes=0)])
def test_other_settings_run(options):
    result = world4rl.train(Args(**SMALL | dict(action_encoding="one-hot", history=2) | options))
    assert 0 <= result["final_return"] <= 1


def test_refinement_in_the_simulator_starts_from_the_same_clone(small, capsys):
    """And has no imagined success: there is no model."""
    result = world4rl.train(Args(**SMALL, refine_in="simulator"))
    ours, theirs = checkpoint_of(result)["learner"], checkpoint_of(small)["learner"]
    assert all(equal(ours[name], theirs[name]) for name in ours if name.startswith("clone."))
    assert result["real_steps"] == 4 * 40 + result["global_step"]
    assert result["clone_return"] == small["clone_return"]
    rows = csv.DictReader(open(Path(result["run_dir"]) / "evaluations.csv"))
    assert {row["imagined_success_rate"] for row in rows} == {"nan"}
    world4rl.main(Args(evaluate=result["run_dir"], final_eval_episodes=2))
    assert "imagined" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--capture-video: .* a model to film"):
        world4rl.main(Args(evaluate=result["run_dir"], capture_video=True), {"capture_video"})
    assert world4rl.train(Args(resume=result["run_dir"]))["final_return"] == result["final_return"]


@pytest.mark.slow
def test_the_pipeline_improves_a_poor_clone():
    """On the double integrator, in about a minute of an idle core; real success was seen to go from 0.48 to 0.74."""
    options = TOY | dict(
        model_hidden=64,
        expert_episodes=2,
        random_episodes=30,
        clone_episodes=60,
        clone_steps=50,
        model_steps=1_000,
        total_timesteps=50_000,
        num_minibatches=4,
        learning_rate=1e-3,
        kl_coef=0.02,
        eval_interval=1_000_000,
        final_eval_episodes=50,
    )
    result = world4rl.train(Args(**options))
    assert result["clone_return"] < 0.6 and result["final_return"] > result["clone_return"] + 0.1


def test_evaluate_prints_clone_and_policy(small, capsys):
    world4rl.main(Args(evaluate=str(small["run_dir"]), final_eval_episodes=4, capture_video=True))
    assert (small["run_dir"] / "imagined.gif").read_bytes()[:3] == b"GIF"
    printed = capsys.readouterr().out
    for words in (
        "clone  stochastic",
        "clone  deterministic",
        "policy stochastic",
        "policy deterministic",
        "4 episodes",
    ):
        assert words in printed


def test_a_replay_follows_the_real_episode_where_the_model_is_the_simulator(monkeypatch):
    learner, task = learner_of(), PointTask()
    rng = np.random.default_rng(0)
    episode = world4rl.play_episode(task, 1, lambda state: rng.uniform(-2, 2, 2), 20, stop=False)

    def exact(states, actions):
        moved = []
        for state, action in zip(states[:, -1], actions[:, -1]):
            task.state = state.numpy()
            moved.append(task.step(action.numpy())[0])
        return torch.tensor(np.array(moved)).float()

    monkeypatch.setattr(learner, "next_state", exact)
    for imagined in world4rl.replay(learner, episode, samples=2):
        torch.testing.assert_close(imagined, episode.states)


def test_main_says_which_stage_is_done(capsys):
    world4rl.main(Args(**SMALL, stage="data"))
    assert "data is done, run folder runs/world4rl__point__1__" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(expert_episodes=0), "from 1 to"),
        (dict(random_episodes=-1), "from 0 to"),
        (dict(history=0), "from 1 to"),
        (dict(denoising_steps=1), "2 or more"),
        (dict(min_log_std=-11.0), "from -10 to 2"),
        (dict(max_log_std=-3.0), "from --min-log-std to 2"),
        (dict(max_log_std=2.5), "from --min-log-std to 2"),
        (dict(world_model="rssm"), "'diffusion', 'mlp'"),
        (dict(action_encoding="vq-vae"), "'two-hot', 'raw', 'one-hot'"),
        (dict(refine_in="reality"), "'model', 'simulator'"),
        (dict(stage="first"), "'data', 'clone', 'rollouts', 'model', 'refine', 'evaluate', 'all'"),
        (dict(horizon=251), "at most 250"),
        (dict(rollout_episodes=10**6), "1e7 steps or fewer"),
        (dict(num_minibatches=200), "at most half the episodes"),
        (dict(gamma=1.5), "from 0 to 1"),
        (dict(kl_coef=-0.1), "from 0 to 1e6"),
        (dict(learning_rate=math.nan), "above 0"),
        (dict(model_lr=0.0), "above 0"),
        (dict(capture_video=True), "without --evaluate"),
    ],
)
def test_invalid_values_are_refused_by_name(options, words):
    message = error_of(world4rl, **options)
    assert f"--{next(iter(options)).replace('_', '-')}" in message and words in message and "must be" in message
    assert not Path("runs").exists()


def test_without_meta_world_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "metaworld.env_dict", None)
    message = error_of(world4rl)
    assert "pip install --no-deps -r requirements-world4rl.txt" in message and "--env-id point" in message


def test_a_run_with_other_arguments_is_left_as_it_is(small):
    message = error_of(world4rl, resume=str(small["run_dir"]), world_model="mlp")
    assert "ran with --world-model diffusion, not mlp" in message


def test_damaged_checkpoints(small, tmp_path):
    contents = torch.load(small["run_dir"] / "checkpoint.pt", weights_only=True)
    for name, value in (("data", {}), ("progress", {}), ("learner", {}), ("optimizers", []), ("rng", 7)):
        torch.save(contents | {name: value}, tmp_path / "checkpoint.pt")
        assert "is damaged" in error_of(world4rl, resume=str(tmp_path))
    contents["data"]["states"][0, 0, 0] = math.nan
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert "is damaged" in error_of(world4rl, resume=str(tmp_path))


def test_nan_of_the_task_stops_the_run(monkeypatch):
    monkeypatch.setattr(PointTask, "step", lambda self, action: (self.state * math.nan, False))
    assert "NaN or infinite in a real episode" in error_of(world4rl, **SMALL)


def test_a_diverging_model_says_where():
    assert "is NaN or infinite" in error_of(world4rl, **SMALL | dict(model_lr=1e30))


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", command(world4rl, world_model="mlp", seed=1)[1:])
    args, given = world4rl.read_command_line()
    assert args == Args(world_model="mlp") and given == {"world_model", "seed"}


# ---- the real tasks


META_WORLD = importlib.util.find_spec("metaworld") is not None or "METAWORLD_REQUIRED" in os.environ
real = pytest.mark.skipif(not META_WORLD, reason="Meta-World is not installed (requirements-world4rl.txt)")


@real
@pytest.mark.parametrize("env_id", ["door-lock-v3", "lever-pull-v3", "coffee-pull-v3", "soccer-v3"])
def test_experts_of_meta_world(env_id):
    """They succeed from most starts; an episode depends on its seed and its actions alone."""
    task = world4rl.MetaWorldTask(env_id, 2)
    expert = lambda state: task.expert()  # noqa: E731
    played = [world4rl.play_episode(task, seed, expert, 75, stop=True) for seed in (3, 4, 5)]
    assert sum(float(episode.success.max()) for episode in played) >= 2
    first = played[0]
    choices = iter(first.choices.numpy())
    again = world4rl.play_episode(task, 3, lambda state: next(choices), len(first.choices), stop=False)
    assert torch.equal(again.states, first.states) and first.states.shape[1] == task.state_size
    assert not torch.equal(played[0].states[0], played[1].states[0])
    task.close()


@real
def test_the_state_shows_what_pulls_the_hand():
    """An action moves the place that the hand is pulled to, by a centimetre per unit and simulator step."""
    task = world4rl.MetaWorldTask("door-lock-v3", 2)
    down = np.array([0.0, 0.5, -0.5, 0.0])
    states = world4rl.play_episode(task, 3, lambda state: down, 8, stop=False).states
    hand, pull = states[:, :3], states[:, -3:]
    expected = torch.tensor([0, 0.01, -0.01]).expand(8, 3)
    torch.testing.assert_close((hand + pull).diff(dim=0), expected, atol=1e-6, rtol=0)
    assert pull[0].norm() < 0.02 < pull[-1].norm()
    task.close()


@real
def test_the_policy_does_not_see_what_pulls_the_hand():
    """But the model does."""
    task = world4rl.MetaWorldTask("door-lock-v3", 2)
    learner = Learner(Args(), task)
    state = torch.randn(5, task.state_size)
    pulled = state + torch.cat([torch.zeros(21), torch.ones(3)])
    for policy in (learner.policy, learner.clone):
        assert torch.equal(policy(state), policy(pulled))
    action = torch.zeros(5, 4, task.action_size)
    seen, other = (learner.model.see(x[:, None].expand(-1, 4, -1), action) for x in (state, pulled))
    assert not torch.allclose(seen, other)
    task.close()


@real
def test_a_short_run_on_meta_world():
    result = world4rl.train(Args(**SMALL | dict(env_id="door-lock-v3", horizon=20)))
    assert result["real_steps"] == 6 * 20 and len(result["episodic_returns"]) == 3


@real
def test_unknown_tasks_list_the_known():
    message = error_of(world4rl, env_id="door-lock-v2")
    assert "--env-id" in message and "door-lock-v3" in message and not Path("runs").exists()


# ---- benchmark/world4rl_figures.py


def test_gains_of_the_page(tmp_path, monkeypatch):
    """Final success less the clone's, of every seed; over all tasks seeds are resampled within each."""

    def write(path, last):
        points = [(0, 0.5, 0.3), (100, 0.6, 0.4), (200, last, 1.0)]
        lines = [f"{step},{mode},{real},{dreamt}" for step, real, dreamt in points for mode in world4rl_figures.MODES]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["global_step,mode,success_rate,imagined_success_rate", *lines]))

    for task, refined in (("easy", (0.7, 0.9)), ("hard", (0.1, 0.1))):
        for seed, last in enumerate(refined, 1):
            write(tmp_path / task / f"diffusion_{seed}.csv", last)
        write(tmp_path / task / "mlp_1.csv", 0.6)
    rows = world4rl_figures.gains([tmp_path / "easy", tmp_path / "hard"])
    assert len(rows) == 2 * 7
    easy = "| easy, diffusion, stochastic | 0.50 0.50 | 0.70 0.90 | 0.30 0.30 | 1.00 1.00 | +0.30 [+0.20, +0.40] |"
    assert rows[0] == easy
    assert rows[4] == "| **all 2 tasks**, diffusion, stochastic | | | | | -0.05 [-0.10, +0.00] |"
    assert rows[6].startswith("| diffusion less mlp, stochastic | | | | | -0.20 ")

    for task in ("easy", "hard"):
        write(tmp_path / task / "diffusion_4.csv", 0.6)
    (fresh,) = [row for row in world4rl_figures.gains([tmp_path / "easy", tmp_path / "hard"])[:8] if "alone" in row]
    assert fresh == "| seeds 4 and 5 alone, diffusion, stochastic | | | | | +0.10 [+0.10, +0.10] |"

    write(tmp_path / "ablations" / "easy" / "raw_2.csv", 0.8)
    monkeypatch.setattr(world4rl_figures, "RESULTS", tmp_path)
    first, _ = world4rl_figures.ablations(tmp_path / "ablations" / "easy")
    assert first.startswith("| easy, raw, stochastic | 0.50 | 0.80 |") and first.endswith(" -0.10 [-0.10, -0.10] |")


def test_figures_of_what_is_measured(tmp_path, monkeypatch, capsys):
    """Fidelity of a run's model, the figure, and the tables, from a run folder and its collected evaluations."""
    result = world4rl.train(Args(**SMALL))
    (tmp_path / "point").mkdir()
    shutil.copy(Path(result["run_dir"]) / "evaluations.csv", tmp_path / "point" / "diffusion_1.csv")
    for name, value in {"RESULTS": tmp_path, "AHEAD": (1, 5), "EPISODES": 2}.items():
        monkeypatch.setattr(world4rl_figures, name, value)
    world4rl_figures.main([Path(result["run_dir"])])
    rows = list(csv.DictReader(open(tmp_path / "fidelity.csv")))
    assert [row["ahead"] for row in rows] == ["1", "5", "1", "5"] and all(float(row["error"]) > 0 for row in rows)
    assert (tmp_path / "world4rl.png").exists() and "| point, diffusion, clone | " in capsys.readouterr().out
