"""benchmark/policy_fit.py: regrets, and policies that learn from an energy that stands still."""

import sys
from pathlib import Path

import pytest
import torch

import ddpl_mpe as mpe

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import policy_fit


def bowl(obs, candidates):
    """Best at 0.3 in both dimensions, by all observations."""
    return -(candidates - 0.3).square().sum(-1)


class Around(torch.nn.Module):
    """Plays 0.3 +- 0.1, deterministically 0.4."""

    def sample(self, obs, deterministic=False):
        shape = (*obs.shape[:2], 2)
        return torch.full(shape, 0.4) if deterministic else 0.3 + 0.1 * torch.randn(shape)


def test_regret_is_what_is_lost_in_temperatures():
    sampled, deterministic = policy_fit.regrets(Around(), bowl, torch.zeros(3, 50, 4), torch.tensor([0.1, 0.1, 0.1]))
    assert sampled == pytest.approx(2 * 0.01 / 0.1, rel=0.1)  # two variances
    assert deterministic == pytest.approx(2 * 0.01 / 0.1, rel=1e-3)
    _, colder = policy_fit.regrets(Around(), bowl, torch.zeros(3, 50, 4), torch.tensor([0.05, 0.05, 0.05]))
    assert colder == pytest.approx(2 * deterministic)


def test_the_local_critics_count_each_agents_own_value():
    local_critic = mpe.LocalCritic(3, 4, 2, 8, 1)
    obs, actions = torch.randn(3, 5, 4), torch.rand(3, 5, 2)
    values = policy_fit.SumOfLocal(local_critic)(obs.transpose(0, 1).flatten(1), actions)
    torch.testing.assert_close(values, local_critic(obs, actions[:, None])[:, 0].sum(0, keepdim=True))


def test_new_policies_follow_a_run_that_stays_as_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("update_local_critic", "update_temperature"):  # put back what stand_still replaces
        monkeypatch.setattr(mpe, name, getattr(mpe, name))
    monkeypatch.setattr(policy_fit, "UPDATES", (1, 150))
    monkeypatch.setattr(policy_fit, "STATES", 30)
    few = dict(learning_starts=40, eval_episodes=2, final_eval_episodes=2, compile=False, actor_hidden=32)
    run_dir = mpe.train(mpe.Args(total_timesteps=400, **few))["run_dir"]
    run, buffer = policy_fit.load(run_dir)
    run.local_critic.value.weight.data *= 30  # a small run's has no opinion yet
    before = {name: value.clone() for name, value in run.state_dict().items()}
    policy_fit.stand_still(run.local_critic)
    made, learner = [], mpe.Learner
    monkeypatch.setattr(
        mpe, "Learner", lambda args, *sizes, **alike: made.append(args) or learner(args, *sizes, **alike)
    )
    for options in (dict(), dict(policy="gaussian")):
        *_, first, last, _ = policy_fit.row("new", options, run, buffer).split("|")
        assert float(last.split(",")[0]) < float(first.split(",")[0]) - 0.1
    assert [args.entities for args in made] == [False, False]  # layers for a whole observation are compared
    assert mpe.update_temperature(run, torch.ones(3)) == {}
    assert all(torch.equal(value, before[name]) for name, value in run.state_dict().items())

    other = mpe.train(mpe.Args(policy="gaussian", total_timesteps=80, **few))["run_dir"]
    for wrong, sentence in ((str(tmp_path), "RUN_DIR: there is no checkpoint.pt in"), (other, "policy gaussian, not")):
        with pytest.raises(SystemExit, match=sentence):
            policy_fit.main(wrong)
    monkeypatch.setattr(policy_fit, "ROWS", {"one": dict(actor_batch_size=8)})
    policy_fit.main(run_dir)
    assert len(capsys.readouterr().out.splitlines()) == 3
