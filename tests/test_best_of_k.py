"""benchmark/best_of_k.py: the Gaussian with a local critic, and both policies playing the best of four samples."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ddpl_mamujoco
import ddpl_mpe
from benchmark import best_of_k

SMALL = {"total_timesteps": 400, "learning_starts": 200, "eval_episodes": 2, "final_eval_episodes": 2, "compile": False}


def test_the_best_of_its_own_samples():
    class Counting(nn.Module):
        """The K B-th of all samples is (its agent, its number)."""

        mask = torch.ones(3, 1, 2)

        def sample(self, obs):
            agents, rows, _ = obs.shape
            number = torch.arange(rows).expand(agents, rows)
            return torch.stack([torch.arange(agents)[:, None].expand(agents, rows), number], -1).float() + obs[..., :1]

    def third_for_agent_1_else_first(obs, samples):
        """[N, K, B]"""
        agents, count, rows = samples.shape[:3]
        wanted = torch.tensor([0, 2, 0])[:, None, None]
        return (torch.arange(count)[None, :, None] == wanted).float().expand(agents, count, rows)

    obs = torch.zeros(3, 5, 7)
    obs[..., 0] = 100 * torch.arange(5)  # is added to the actions, which tells whose sample was played
    actions = best_of_k.BestOfK(Counting(), third_for_agent_1_else_first).sample(obs)
    numbers = torch.stack([torch.arange(5), 10 + torch.arange(5), torch.arange(5)])
    assert torch.equal(actions[..., 1], obs[..., 0] + numbers)
    assert torch.equal(actions[..., 0], obs[..., 0] + torch.arange(3)[:, None])


@pytest.fixture
def control(monkeypatch):
    """A script under control, which is itself again after the test."""

    def controlled(script):
        for name, value in best_of_k.controlled(script).items():
            monkeypatch.setattr(script, name, value)
        return script

    return controlled


@pytest.mark.parametrize("policy", ["gaussian", "diffusion"])
def test_a_run_under_control(control, policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    played = []
    sample = best_of_k.BestOfK.sample
    monkeypatch.setattr(best_of_k.BestOfK, "sample", lambda *args: played.append(args) or sample(*args))
    script = control(ddpl_mpe)
    result = script.train(ddpl_mpe.Args(policy=policy, **SMALL))
    assert len(played) == 25  # the steps of the last evaluation's episodes, deterministic
    with open(Path(result["run_dir"]) / "evaluations.csv") as file:
        assert [row["mode"] for row in csv.DictReader(file)] == ["stochastic", "deterministic"]
    team, _ = script.load_team(Path(result["run_dir"]) / "team.safetensors")
    assert not any("local" in name for name in team.state_dict())


@pytest.mark.parametrize("words, script", [(["--num-agents", "6"], ddpl_mpe), (["--scenario=Ant"], ddpl_mamujoco)])
def test_the_flags_name_the_script(monkeypatch, words, script):
    monkeypatch.setattr(sys, "argv", ["best_of_k.py", *words])
    monkeypatch.setattr(best_of_k, "controlled", lambda module: {"main": lambda *given: ran.append((module, *given))})
    for name in ("main", "SCRIPT"):
        monkeypatch.setattr(script, name, getattr(script, name))  # and back in the end
    ran = []
    best_of_k.main(*best_of_k.read_command_line())
    ((module, args, given),) = ran
    assert module is script and isinstance(args, script.Args) and given
    assert args.exp_name == script.SCRIPT == f"best_of_k_{script.__name__}"  # the script itself refuses its runs


@pytest.mark.parametrize("option", [dict(evaluate="runs/x"), dict(policy="gaussian", actor_batch_size=30)], ids=str)
def test_what_a_control_cannot_do_is_told(option):
    with pytest.raises(SystemExit, match="error: --(evaluate|actor-batch-size)"):
        best_of_k.main(ddpl_mpe.Args(**option))


@pytest.mark.parametrize("script, stack", [(ddpl_mpe, 1), (ddpl_mamujoco, 3)])
def test_the_gaussians_local_critic_learns_beside_it(control, script, stack):
    """Its local critic comes to rank an action's candidates as the central critic does, and the policy is as it was."""
    sizes = {"obs_size": 4, "state_size": 12, "mask": torch.ones(3, 2), "alike": script is ddpl_mpe}
    flat = {"entities": False} if script is ddpl_mpe else {}
    learners = []
    for under_control in (False, True):
        torch.manual_seed(0)
        module = control(script) if under_control else script
        learners.append(module.Learner(script.Args(policy="gaussian", **flat), **sizes))
        torch.manual_seed(1)
        state, obs = torch.randn(256, 12), torch.randn(3, 256, 4)
        metrics = module.update_gaussian(learners[-1], state, obs)
    plain, learner = learners
    assert "losses/local_critic" in metrics and len(learner.optimizers()) == len(plain.optimizers()) + 1
    for ours, theirs in zip(plain.policy.parameters(), learner.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    before = [parameter.clone() for parameter in learner.local_critic.parameters()]
    assert len(before[0]) == stack
    losses = [float(script.update_gaussian(learner, state, obs)["losses/local_critic"]) for _ in range(200)]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
