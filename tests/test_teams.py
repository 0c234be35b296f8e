"""team.safetensors, the policies of a run alone: what is in it, that it plays as the run does, what damaged ones do."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import error_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ddpl_isaaclab
import ddpl_mamujoco
import ddpl_mpe

SCRIPTS = [ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab]
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
TEAMS = Path(ddpl_mpe.__file__).parent / "benchmark" / "teams"
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
OBS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "script, name, random, trained",
    [(ddpl_mpe, "simple_spread_v3", -25.4, -9), (ddpl_mamujoco, "HalfCheetah_2x3", -284, 2500)],
    ids=["mpe", "mamujoco"],
)
def test_the_trained_teams_play(script, name, random, trained):
    """Far better than random play, and so in the way that the script's docstring loads them."""
    assert f'load_team("benchmark/teams/{name}.safetensors")' in script.__doc__
    policy, args = script.load_team(TEAMS / f"{name}.safetensors")
    returns = script.evaluate(policy, args, 40 if script is ddpl_mpe else 2, True, seed=1)
    assert returns.mean() > trained > random


def test_the_trained_teams_are_small():
    sizes = [path.stat().st_size for path in TEAMS.glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) < 300_000


def team(script, folder, stack=2, **options):
    """A team's file in the folder, of two agents that nobody trained; returns its arguments and policies."""
    args = script.Args(actor_hidden=8, denoising_steps=3, **options)
    policy = script.make_policy(args, stack, 12, 3, MASK)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a new policy's last layer is 0
    script.save_team(folder, args, policy)
    return args, policy


def rewrite(path, change):
    """The file again, with the checksum that it should have, after change(tensors, contents)."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        contents = json.loads(file.metadata()["json"])
    change(tensors, contents)
    text = json.dumps(contents)
    crc = ddpl_mpe.checksum({name: tensor.numpy() for name, tensor in tensors.items()}, text)
    save_file(tensors, path, {"json": text, "crc32": crc})


@every_script
@pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
@pytest.mark.parametrize("stack", [1, 2], ids=["one for all", "one each"])
def test_a_loaded_team_acts_as_the_saved_one(script, policy, stack, tmp_path):
    args, saved = team(script, tmp_path, stack, policy=policy, sigmas=(0.2, 0.4), seed=7, num_threads=3)
    loaded, loaded_args = script.load_team(tmp_path / "team.safetensors")
    assert loaded_args == replace(args, num_threads=script.Args().num_threads)
    for deterministic in (False, True):
        actions = []
        for one in (saved, loaded):
            torch.manual_seed(0)
            actions.append(one.sample(OBS, deterministic))
        assert torch.equal(*actions)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["team.safetensors"]


@every_script
@pytest.mark.parametrize("stack", [1, 2], ids=["one for all", "one each"])
def test_agents_act_on_their_own_observations(script, stack, tmp_path):
    """Decentralised: what one agent sees changes nothing in what the other does."""
    _, policy = team(script, tmp_path, stack)
    other = OBS.clone()
    other[1] += 1
    actions = []
    for obs in (OBS, other):
        torch.manual_seed(0)
        actions.append(policy.sample(obs))
    assert torch.equal(actions[0][0], actions[1][0]) and not torch.equal(actions[0][1], actions[1][1])


def remove_policy(tensors, contents):
    del tensors["hidden.weight"]


def add_nan(tensors, contents):
    tensors["hidden.weight"][0, 0, 0] = torch.nan


def reshape(tensors, contents):
    tensors["hidden.bias"] = tensors["hidden.bias"][..., :-1].contiguous()


def forget_arguments(tensors, contents):
    del contents["args"]


def change_type(tensors, contents):
    contents["args"]["gamma"] = "high"


@every_script
@pytest.mark.parametrize("change", [remove_policy, add_nan, reshape, forget_arguments, change_type])
def test_damaged_files_are_told(script, change, tmp_path):
    team(script, tmp_path)
    path = tmp_path / "team.safetensors"
    rewrite(path, change)
    assert f"{path} is damaged" in error_of(script, evaluate=str(path))
    with pytest.raises(script.RunError, match="is damaged"):
        script.load_team(path)


@every_script
def test_one_flipped_bit_is_noticed(script, tmp_path):
    team(script, tmp_path)
    path = tmp_path / "team.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-100] ^= 1
    path.write_bytes(contents)
    assert "is damaged (ValueError)" in error_of(script, evaluate=str(path))
    path.write_bytes(contents[:-50])
    assert "is damaged (SafetensorError)" in error_of(script, evaluate=str(path))


@every_script
def test_files_of_others(script, tmp_path):
    team(script, tmp_path)
    path = tmp_path / "team.safetensors"
    assert "there is no file" in error_of(script, evaluate=str(tmp_path / "else.safetensors"))
    rewrite(path, lambda _, contents: contents["args"].update(colour="red"))
    assert "is from another version" in error_of(script, evaluate=str(path))
    rewrite(path, lambda _, contents: contents.update(script="theirs"))
    assert f"belongs to theirs.py, not to {script.__name__}.py" in error_of(script, evaluate=str(path))


@every_script
def test_the_first_guess_is_what_the_denoiser_says_where_it_sees_noise_alone(script, tmp_path):
    """It is E[a | x_T = 0] = -sqrt(1 - alpha_bar) v; the command line may choose, whatever the team has."""
    team(script, tmp_path, first_guess=False)
    actions = []
    for ours in (script.Args(), script.Args(first_guess=True), script.Args(first_guess=False)):
        given = {"first_guess"} if actions else ()
        args, policy = script.read_team("--evaluate", tmp_path / "team.safetensors", ours, given, ("first_guess",))
        assert args.first_guess == (len(actions) == 1)
        actions.append(policy.sample(OBS, deterministic=True))
    with torch.no_grad():
        v = policy(policy.observation(OBS) + policy.time[:, -1, None], torch.zeros(2, 5, 3))
    guess = (-(1 - policy.alphas_bar[-1]).sqrt() * v).clamp(-1, 1)
    assert torch.equal(actions[1], guess)
    assert torch.equal(actions[0], actions[2]) and not torch.allclose(actions[0], guess, atol=0.01)
    sampled = policy.sample(OBS.repeat(1, 1000, 1)).unflatten(1, (1000, 5))
    assert not torch.allclose(sampled[:, 0], sampled[:, 1])  # with noise it goes all the way


def test_arguments_that_have_come_since_take_their_defaults(tmp_path):
    team(ddpl_mpe, tmp_path, tau=0.5, gamma=0.5)
    path = tmp_path / "team.safetensors"
    rewrite(path, lambda _, contents: contents["args"].pop("tau"))
    _, args = ddpl_mpe.load_team(path)
    assert (args.tau, args.gamma) == (ddpl_mpe.Args().tau, 0.5)


def test_a_team_plays_its_own_task_only(tmp_path):
    team(ddpl_mpe, tmp_path)
    path = str(tmp_path / "team.safetensors")
    message = error_of(ddpl_mpe, evaluate=path)
    assert "(agents, actions, observations) = (2, 3, 12), and the task has (3, 2, 18)" in message
    assert "drop --env-id" in error_of(ddpl_mpe, evaluate=path, env_id="simple_reference_v3")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    before = team(ddpl_mpe, tmp_path)[1]

    def fill_the_disk(self, contents):
        os.truncate(os.open(self, os.O_CREAT | os.O_WRONLY), 10)
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fill_the_disk)
        with pytest.raises(ddpl_mpe.RunError, match="no space left on device.*; the one before stays"):
            team(ddpl_mpe, tmp_path)
    policy, _ = ddpl_mpe.load_team(tmp_path / "team.safetensors")
    assert torch.equal(policy.sample(OBS, True), before.sample(OBS, True))
    assert [path.name for path in tmp_path.iterdir()] == ["team.safetensors"]
