"""Run folders of ddpl_mpe.py: kill and resume, evaluate, videos, and one clear sentence for every bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, error_about, error_of, evaluations, global_step, kill_and_resume

import ddpl_mpe
from ddpl_mpe import Args, VectorMPE, train

SMALL = dict(total_timesteps=2_000, learning_starts=200, eval_interval=500, eval_episodes=2, final_eval_episodes=3)
SMALL |= dict(
    compile=False,
    log_interval=100,
    checkpoint_interval=400,
    critic_hidden=32,
    actor_hidden=16,
    batch_size=32,
    actor_batch_size=32,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    subprocess.run(command(ddpl_mpe, **SMALL), cwd=folder, check=True, capture_output=True)
    return next(folder.glob("runs/*"))


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
def test_killed_and_resumed_equals_never_killed(policy):
    kill_and_resume(ddpl_mpe, kill_at=(400, 1200), policy=policy, **SMALL)


def test_resuming_a_finished_run_repeats_its_result(finished):
    before = json.loads((finished / "result.json").read_text())
    result = train(Args(resume=str(finished)))
    assert result["episodic_returns"] == before["episodic_returns"] and result["global_step"] == 2_000
    assert len(evaluations(finished)) == 8


def test_the_team_of_a_run_plays_its_last_evaluation_again(finished):
    """Its averaged weights, alone, give the numbers of the result."""
    policy, args = ddpl_mpe.load_team(finished / "team.safetensors")
    result = json.loads((finished / "result.json").read_text())
    again = ddpl_mpe.evaluate(policy, args, len(result["episodic_returns"]), True, result["global_step"])
    assert again.tolist() == result["episodic_returns"]
    learned = torch.load(finished / "checkpoint.pt", weights_only=True)["learner"]
    assert torch.equal(policy.hidden.weight, learned["average_policy.hidden.weight"])
    assert not torch.equal(policy.hidden.weight, learned["policy.hidden.weight"])


def test_evaluate_prints_returns_and_films(finished):
    flags = [*command(ddpl_mpe, evaluate=finished, final_eval_episodes=5, seed=7), "--capture-video"]
    done = subprocess.run(flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "stochastic" in done.stdout and "deterministic" in done.stdout and "5 episodes" in done.stdout
    for mode in ("stochastic", "deterministic"):
        assert (finished / f"team_{mode}.gif").read_bytes()[:3] == b"GIF"


# ---- bad input


def test_unknown_task_names_the_cooperative_ones():
    message = error_of(ddpl_mpe, env_id="simple_spred_v3")
    assert "--env-id" in message
    for task in ("simple_spread_v3", "simple_reference_v3", "simple_speaker_listener_v4"):
        assert task in message
    assert "simple_tag_v3" not in message and not Path("runs").exists()


def test_competitive_task():
    message = error_of(ddpl_mpe, env_id="simple_tag_v3")
    assert "adversaries" in message and "simple_spread_v3" in message


def test_discrete_task(monkeypatch):
    module = ddpl_mpe.mpe_environments["mpe/simple_spread_v3"]

    class DiscreteOnly:
        @staticmethod
        def parallel_env(continuous_actions=False, **options):
            return module.parallel_env(continuous_actions=False, **options)

    monkeypatch.setitem(ddpl_mpe.mpe_environments, "mpe/discrete_v0", DiscreteOnly)
    message = error_of(ddpl_mpe, env_id="discrete_v0")
    assert "discrete" in message and "simple_spread_v3" in message


def test_number_of_agents_where_the_task_fixes_it():
    assert "--num-agents" in error_of(ddpl_mpe, env_id="simple_reference_v3", num_agents=3)


@pytest.mark.parametrize(
    "options",
    [
        dict(num_envs=0),
        dict(num_agents=-1),
        dict(total_timesteps=-5),
        dict(batch_size=0),
        dict(actor_hidden=0),
        dict(seed=-1),
        dict(gamma=1.5),
        dict(tau=0.0),
        dict(critic_lr=float("nan")),
        dict(init_temperature=0.0),
        dict(target_entropy=1.0),
        dict(sigmas=()),
        dict(sigmas=(0.1, -0.1)),
        dict(num_per_kernel=1, num_uniform=0, sigmas=(0.1,)),
        dict(checkpoint_interval=0),
        dict(buffer_size=3),
    ],
    ids=str,
)
def test_invalid_numbers(options):
    error_about(ddpl_mpe, **options)


def test_invalid_choice_lists_the_choices():
    done = subprocess.run(command(ddpl_mpe, policy="gausian"), capture_output=True, text=True)
    assert done.returncode != 0 and "diffusion" in done.stderr and "gaussian" in done.stderr


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_missing_run_folder(flag, finished, monkeypatch):
    monkeypatch.chdir(finished.parent.parent)
    message = error_of(ddpl_mpe, **{flag: "runs/nothing_here"})
    assert f"--{flag}" in message and "nothing_here" in message and finished.name in message


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_damaged_checkpoint_is_left_as_it_is(flag, finished, tmp_path):
    half = (finished / "checkpoint.pt").read_bytes()[:5000]
    (tmp_path / "checkpoint.pt").write_bytes(half)
    assert "damaged" in error_of(ddpl_mpe, **{flag: str(tmp_path)})
    assert (tmp_path / "checkpoint.pt").read_bytes() == half


def test_checkpoint_of_another_task(finished):
    before = (finished / "checkpoint.pt").read_bytes()
    message = error_of(ddpl_mpe, resume=str(finished), env_id="simple_reference_v3")
    assert "--env-id simple_spread_v3" in message and "simple_reference_v3" in message
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_checkpoint_of_another_script(finished, tmp_path):
    contents = torch.load(finished / "checkpoint.pt", weights_only=True)
    torch.save(contents | {"script": "qvpo"}, tmp_path / "checkpoint.pt")
    assert "qvpo.py" in error_of(ddpl_mpe, resume=str(tmp_path))


def test_checkpoint_of_another_version(finished, tmp_path):
    contents = torch.load(finished / "checkpoint.pt", weights_only=True)
    contents["args"].pop("gamma")
    torch.save(contents, tmp_path / "checkpoint.pt")
    assert "another version" in error_of(ddpl_mpe, resume=str(tmp_path))


def test_nan_reward_stops_and_keeps_the_checkpoint(monkeypatch):
    step, calls = VectorMPE.step, []

    def poisoned(self, actions):
        obs, reward, terminated, truncated = step(self, actions)
        calls.append(self)
        return obs, reward * (np.nan if len(calls) == 100 else 1), terminated, truncated

    monkeypatch.setattr(VectorMPE, "step", poisoned)
    message = error_of(ddpl_mpe, **SMALL | dict(eval_interval=10_000))
    assert "reward is NaN or infinite at step 800" in message
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert global_step(checkpoint) == 400
    monkeypatch.setattr(VectorMPE, "step", step)
    assert train(Args(resume=str(checkpoint.parent)))["global_step"] == 2_000


def test_nan_weights_are_never_saved(monkeypatch):
    save_checkpoint = ddpl_mpe.save_checkpoint

    def poisoned(learner, batch):
        with torch.no_grad():
            learner.critic.hidden.weight[0, 0, 0] = float("nan")
        return {}

    monkeypatch.setattr(ddpl_mpe, "update", poisoned)
    assert "critic.hidden.weight is NaN or infinite" in error_of(ddpl_mpe, **SMALL | dict(log_interval=10_000))
    assert ddpl_mpe.save_checkpoint is save_checkpoint
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert torch.load(checkpoint, weights_only=True)["learner"]["critic.hidden.weight"].isfinite().all()


@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
@pytest.mark.parametrize("option", ["critic_lr", "actor_lr", "temperature_lr"])
def test_diverging_run_says_where(policy, option):
    options = {option: 1e30, "policy": policy, "log_interval": 10_000, "eval_interval": 10_000}
    message = error_of(ddpl_mpe, **SMALL | options)
    assert "the action is NaN or infinite at step" in message


def test_track_without_wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error_of(ddpl_mpe, **SMALL, track=True)


def test_exit_code_and_standard_error():
    done = subprocess.run(command(ddpl_mpe, num_envs=-1), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--num-envs" in done.stderr
