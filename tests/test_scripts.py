"""What the scripts share stands in each of them, word for word."""

import ast
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import torch

import bang_bang
import ddpl_coordination
import ddpl_isaaclab
import ddpl_mamujoco
import ddpl_mpe
import qvpo

DDPL = (ddpl_mpe, ddpl_coordination, ddpl_mamujoco, ddpl_isaaclab)
SCRIPTS = (*DDPL, qvpo, bang_bang)

# Names that two DDPL scripts share but do not mean the same by, and why.
DIFFERENT = {
    "Args": "every script has its own settings",
    "SCRIPT": "its own name",
    "make_env": "another benchmark",
    "StackedAgents": "another benchmark",
    "Batch": "multi-agent MuJoCo has a state of its own",
    "evaluate": "episodes end at different times in multi-agent MuJoCo; Isaac Lab's count successes",
    "play": "another benchmark",
    "Learner": "the coordination game stacks seeds with agents and has no observations",
    "DiffusionPolicy": "no observations in the coordination game",
    "GaussianPolicy": "no observations in the coordination game",
    "update_critic": "no next state in the coordination game",
    "update_local_critic": "no observations in the coordination game",
    "update_diffusion": "no observations, padding or blocks in the coordination game",
    "update_gaussian": "no observations in the coordination game",
    "check_args": "every script has its own settings",
    "train": "every script has its own loop",
    "main": "the coordination game has no --evaluate; with several processes one prints the result",
}
# Names of another algorithm's script that are not DDPL's, and why.
OTHER_ALGORITHMS = {
    qvpo: {
        "Args": "every script has its own settings",
        "SCRIPT": "its own name",
        "make_env": "Gymnasium's tasks",
        "DiffusionPolicy": "one agent; the published network, which predicts the noise",
        "TwinCritic": "one agent; the published network",
        "Batch": "one agent",
        "Learner": "one agent, a target policy, no temperature",
        "update": "the policy learns at fresh observations, and has a target",
        "update_critic": "the target is the best of several candidates",
        "take_step": "gradients are clipped",
        "evaluate": "episodes end at different times",
        "check_args": "every script has its own settings",
        "train": "every script has its own loop",
        "play": "one agent",
        "main": "the coordination game has no --evaluate",
        "ways_to_play": "no statistics of observations",
    },
    bang_bang: {
        "Args": "every script has its own settings",
        "SCRIPT": "its own name",
        "make_env": "Gymnasium's tasks",
        "GaussianPolicy": "one agent; its deviation does not depend on the observation",
        "Learner": "another algorithm",
        "update": "another algorithm",
        "take_step": "gradients are clipped",
        "evaluate": "episodes end at different times",
        "check_args": "every script has its own settings",
        "train": "every script has its own loop",
        "play": "statistics of observations",
        "main": "the coordination game has no --evaluate",
        "ways_to_play": "statistics of observations",
    },
}
PURE = {"noise_schedule", "denoise_step", "propose_actions", "issm_weights", "issm_target"}


@cache
def definitions(script) -> dict[str, str]:
    """Source of every top-level function, class and constant of a script."""
    source = Path(script.__file__).read_text()
    named = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            named[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            named[node.targets[0].id] = ast.get_source_segment(source, node)
    return named


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda script: script.__name__)
def test_shared_names_have_the_same_source(one, other):
    first, second = definitions(one), definitions(other)
    shared = first.keys() & second.keys()
    assert PURE <= shared or {one, other} - set(DDPL)
    different = OTHER_ALGORITHMS.get(one, {}) | OTHER_ALGORITHMS.get(other, {}) or DIFFERENT
    for name in sorted(shared - different.keys()):
        assert first[name] == second[name], f"{name} differs between {one.__name__}.py and {other.__name__}.py"


def test_every_exception_is_needed():
    for name in DIFFERENT:
        sources = [definitions(script)[name] for script in DDPL if name in definitions(script)]
        assert len(set(sources)) > 1, f"{name} no longer differs: take it off the list"
    for script, names in OTHER_ALGORITHMS.items():
        for name in names:
            sources = [definitions(other)[name] for other in SCRIPTS if name in definitions(other)]
            assert set(sources) - {definitions(script)[name]}, f"{name} no longer differs: take it off the list"


@pytest.mark.parametrize("script", DDPL[1:], ids=lambda script: script.__name__)
def test_shared_maths_gives_the_same_numbers(script):
    """Also where a constant or another function that the source calls would differ."""

    def numbers(script):
        torch.manual_seed(0)
        anchor, drift, sigmas = 0.5 * torch.randn(3, 7, 2), 0.1 * torch.randn(2, 3, 7, 2), torch.tensor([0.1, 0.3])
        candidates, log_q = script.propose_actions(
            anchor, drift, sigmas, 4, 6, torch.tensor([[1.0, 1], [1, 0], [1, 1]])
        )
        weights, log_z, entropy = script.issm_weights(torch.randn(3, 16, 7), log_q, torch.tensor([0.1, 0.5, 2.0]))
        alphas_bar = script.noise_schedule(10)
        denoised = script.issm_target(torch.randn(3, 4, 7, 2), torch.full((3, 4, 7), 0.3), candidates, weights)
        step = script.denoise_step(torch.randn(5, 2), torch.randn(5, 2), 4, alphas_bar)
        layer = script.StackedLinear(3, 2, 5)
        return candidates, log_q, weights, log_z, entropy, alphas_bar, denoised, *step, layer(anchor)

    for ours, theirs in zip(numbers(script), numbers(ddpl_mpe), strict=True):
        assert torch.equal(ours, theirs)
