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
import ddpl_smax_jax
import policy_transfer
import qvpo
import srvr_npg
import world4rl

DDPL = (ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab, ddpl_coordination)
SCRIPTS = (*DDPL, qvpo, bang_bang, srvr_npg, policy_transfer, world4rl)


def because(reason: str, names: str) -> dict[str, str]:
    """Names that differ for this reason."""
    return dict.fromkeys(names.split(), reason)


# Names that two scripts share but do not mean the same by, for each pair of scripts, and why. A name is here only for a
# pair whose texts differ: everything else, and these in every other pair, is one text.
SETTINGS = because("every script has its own settings", "Run Args check_args")
TASK = because("every script has its own settings", "Task Algorithm")
LOOP = because("every script has its own loop", "train training_loop")
BENCHMARK = because("another benchmark", "make_env evaluate play")
PROCESSES = because("several processes share a run", "take_step save_checkpoint restore main")
COUNTS = because("Isaac Lab's episodes are seeded by the step and count successes", "Progress EVALUATION_COLUMNS")
GAME = because(
    "the coordination game stacks seeds with agents, has no observations and no next state, and is over "
    "before a checkpoint",
    "Args check_args DiffusionPolicy GaussianPolicy Learner update_critic update_local_critic "
    "update_diffusion update_gaussian train main",
) | because("not compiled: it is over before", "StackedLinear take_step")
QVPO = because("another algorithm, with one agent", "DiffusionPolicy Learner update update_critic Batch")
PPO = because(
    "another algorithm, without a replay buffer, its settings CleanRL's",
    "GaussianPolicy Learner update save_checkpoint restore Progress EVALUATION_COLUMNS",
)
CLIPPED = because("gradients are clipped", "take_step")
ALIKE = because(
    "the particle environments' agents are alike, so their critics can be pooled, and may list entities",
    "Learner make_policy",
)
DIFFERENT = {
    (ddpl_mpe, ddpl_mamujoco): SETTINGS
    | TASK
    | LOOP
    | BENCHMARK
    | ALIKE
    | because("MuJoCo has a state of its own", "Batch"),
    (ddpl_mpe, ddpl_isaaclab): SETTINGS
    | TASK
    | LOOP
    | BENCHMARK
    | PROCESSES
    | COUNTS
    | ALIKE
    | because("the tasks have a state of their own", "Batch"),
    (ddpl_mamujoco, ddpl_isaaclab): SETTINGS
    | TASK
    | LOOP
    | BENCHMARK
    | PROCESSES
    | COUNTS
    | because("another benchmark", "StackedAgents"),
    (ddpl_mpe, ddpl_coordination): GAME,
    (ddpl_mamujoco, ddpl_coordination): GAME,
    (ddpl_isaaclab, ddpl_coordination): GAME,
    (ddpl_mpe, qvpo): SETTINGS | TASK | LOOP | BENCHMARK | QVPO | CLIPPED,
    (ddpl_mamujoco, qvpo): SETTINGS | TASK | LOOP | BENCHMARK | QVPO | CLIPPED,
    (ddpl_isaaclab, qvpo): SETTINGS | TASK | LOOP | BENCHMARK | QVPO | CLIPPED | COUNTS | PROCESSES,
    (ddpl_coordination, qvpo): because(
        "another algorithm",
        "Args check_args StackedLinear DiffusionPolicy Learner update_critic take_step train main",
    ),
    (ddpl_mpe, bang_bang): SETTINGS | LOOP | BENCHMARK | PPO | CLIPPED | because("another task", "Task"),
    (ddpl_mamujoco, bang_bang): SETTINGS | LOOP | BENCHMARK | PPO | CLIPPED | because("another task", "Task"),
    (ddpl_isaaclab, bang_bang): SETTINGS
    | LOOP
    | BENCHMARK
    | PPO
    | CLIPPED
    | PROCESSES
    | because("another task", "Task"),
    (ddpl_coordination, bang_bang): because(
        "another algorithm", "Args check_args GaussianPolicy Learner take_step train main"
    ),
    (qvpo, bang_bang): SETTINGS
    | LOOP
    | because(
        "statistics of observations", "ways_to_play evaluate play Progress EVALUATION_COLUMNS save_checkpoint restore"
    )
    | because("another algorithm", "Task Learner update"),
}
TRAJECTORIES = because(
    "another algorithm, on whole trajectories, which are its budget; not compiled",
    "Args Run Task check_args check_run_args Learner update Progress EVALUATION_COLUMNS make_env play save_checkpoint "
    "restore train training_loop",
)
DIFFERENT |= {
    (ddpl_mpe, srvr_npg): SETTINGS | TRAJECTORIES | TASK,
    (ddpl_mamujoco, srvr_npg): SETTINGS | TRAJECTORIES | TASK,
    (ddpl_isaaclab, srvr_npg): SETTINGS | TRAJECTORIES | TASK | because("several processes share a run", "main"),
    (ddpl_coordination, srvr_npg): because("another algorithm", "Args check_args Learner train main"),
    (qvpo, srvr_npg): SETTINGS | TRAJECTORIES | TASK,
    (bang_bang, srvr_npg): SETTINGS | TRAJECTORIES,
}
NO_NETWORK = "no network is trained, and nothing is resumed"
DIFFERENT |= {
    (script, policy_transfer): because(NO_NETWORK, "Args check_args evaluate train main")
    for script in SCRIPTS
    if script not in (ddpl_coordination, srvr_npg, policy_transfer, world4rl)
}
DIFFERENT[srvr_npg, policy_transfer] = because(NO_NETWORK, "Args check_args train main")
DIFFERENT[ddpl_coordination, policy_transfer] = because(NO_NETWORK, "Args check_args train main") | because(
    "other results", "print_table write_csv"
)
STAGES = because(
    "another algorithm, in stages; not compiled",
    "Args Run Task check_args Learner update Progress EVALUATION_COLUMNS play save_checkpoint restore train "
    "training_loop main",
)
CLONED = because("its deviation depends on the state", "GaussianPolicy")
RUNS = because("imagined episodes are evaluated, too", "evaluate")
COMPILED = because("not compiled", "check_run_args")
DIFFERENT |= {
    (ddpl_mpe, world4rl): STAGES | CLONED | RUNS | COMPILED | CLIPPED,
    (ddpl_mamujoco, world4rl): STAGES | CLONED | RUNS | COMPILED | CLIPPED,
    (ddpl_isaaclab, world4rl): STAGES | CLONED | RUNS | COMPILED | CLIPPED,
    (ddpl_coordination, world4rl): CLONED
    | CLIPPED
    | because("another algorithm", "Args check_args Learner main train"),
    (qvpo, world4rl): STAGES | RUNS | COMPILED,
    (bang_bang, world4rl): STAGES
    | CLONED
    | RUNS
    | COMPILED
    | because("episodes side by side, near a clone", "PPO Policy Rollout update_minibatch"),
    (srvr_npg, world4rl): STAGES | because("other tasks", "make_task"),
    (policy_transfer, world4rl): because("another algorithm", "Args check_args evaluate main train"),
}
# What JAX leaves as it is.
TWIN = (
    "RunError SCRIPT Stopped check_types create_run damage_reported fits locked noted_signals "
    "read_command_line read_progress require run_arguments start_logging whole_file write_evaluations"
).split()
# What only some of the three benchmarks need. Everything else is in all of them.
OWN = {
    ddpl_mpe: "Entities EntityCriticEnsemble EntityEncoder NUM_HEADS PooledCriticEnsemble VectorMPE cooperative_tasks "
    "each observed_entities unfit",
    ddpl_mamujoco: "CONFIGURATIONS PACKAGES StackedAgents make_vector_env task_name vector_env",
    ddpl_isaaclab: "FAILURES StackedAgents Step anneal_learning_rates average_gradients everyones gathered make_config "
    "process_seed rank together world_size",
}
# What Isaac Lab, all of it on the device, does without.
ON_THE_HOST = "forked_random_numbers random_state set_random_state to_device".split()
PURE = {"noise_schedule", "denoise_step", "propose_actions", "issm_weights", "issm_target"}


def reasons(one, other) -> dict[str, str]:
    """The names that may differ between two scripts."""
    return DIFFERENT.get((one, other)) or DIFFERENT.get((other, one)) or {}


@cache
def definitions(script) -> dict[str, str]:
    """Source of every top-level function, class and constant of a script."""
    source = Path(script.__file__).read_text()
    named = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = "".join(f"@{ast.unparse(decorator)}\n" for decorator in node.decorator_list)
            named[node.name] = decorators + ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = ast.get_source_segment(source, node)
    return named


def drifted(first: dict[str, str], second: dict[str, str], allowed: dict[str, str]) -> list[str]:
    """The names that both define with different texts, though they should not."""
    return [name for name in first.keys() & second.keys() - allowed.keys() if first[name] != second[name]]


pairs = pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda script: script.__name__)


@pairs
def test_shared_names_have_the_same_source(one, other):
    assert drifted(definitions(one), definitions(other), reasons(one, other)) == []


@pairs
def test_every_exception_is_needed(one, other):
    for name in reasons(one, other):
        assert name in definitions(one).keys() & definitions(other).keys(), (
            f"{name} is not in both: take it off the list"
        )
        assert definitions(one)[name] != definitions(other)[name], f"{name} no longer differs: take it off the list"


@pairs
def test_a_changed_line_is_noticed(one, other):
    """In every definition that the two share, whatever is excepted for other pairs."""
    shared = definitions(one).keys() & definitions(other).keys() - reasons(one, other).keys()
    for name in shared:
        changed = definitions(one) | {name: definitions(one)[name] + "  # changed"}
        assert drifted(changed, definitions(other), reasons(one, other)) == [name]


@pytest.mark.parametrize("one, other", list(combinations(DDPL[:3], 2)), ids=lambda script: script.__name__)
def test_the_three_benchmarks_learn_by_one_text(one, other):
    """Whatever the coordination game needs: the learner and its updates are the same where there are observations."""
    algorithm = PURE | {"DiffusionPolicy", "GaussianPolicy", "CriticEnsemble", "LocalCritic", "Adam", "Learner"}
    algorithm |= {"update_critic", "update_local_critic", "update_diffusion", "update_gaussian", "update_temperature"}
    algorithm |= {"update", "compiled", "ReplayBuffer"}
    assert algorithm <= definitions(one).keys() & definitions(other).keys()
    assert algorithm & reasons(one, other).keys() <= {"Learner"}
    choices = """\
        ensemble = PooledCriticEnsemble if args.pooled_critics and alike else CriticEnsemble
        entities = observed_entities(args, num_agents)
        if entities and args.pooled_critics:
            ensemble, sizes = EntityCriticEnsemble, (*sizes[:-1], entities, args.entity_width)
            if entities:
                sizes = obs_size, args.local_critic_hidden, entities, args.entity_width
                self.local_critic.observation = EntityEncoder(stack, *sizes)
""".splitlines()
    learners = {
        tuple(line for line in definitions(script)["Learner"].splitlines() if line not in choices)
        for script in (one, other)
    }
    assert len({"\n".join(lines).replace(" CriticEnsemble(", " ensemble(") for lines in learners}) == 1


def test_the_three_benchmarks_have_the_same_parts():
    """A part that is renamed or missing in one of them is not compared any more."""
    assert all(set(OWN[script].split()) <= definitions(script).keys() for script in OWN)
    parts = {script: definitions(script).keys() - set(OWN[script].split()) for script in DDPL[:3]}
    assert parts[ddpl_mpe] == parts[ddpl_mamujoco] == parts[ddpl_isaaclab] | set(ON_THE_HOST)


@pytest.mark.parametrize("script", DDPL[1:3], ids=lambda script: script.__name__)
def test_the_three_benchmarks_refuse_the_same_arguments(script):
    """Each checks more of its own."""

    def checks(script):
        (function,) = ast.parse(definitions(script)["check_args"]).body
        return [ast.unparse(statement) for statement in function.body[2:]]  # after the docstring and check_types

    assert [check for check in checks(script) if check in checks(ddpl_mpe)] == checks(ddpl_mpe)


@pytest.mark.parametrize("name", TWIN)
def test_the_jax_twin_has_the_same_source(name):
    assert definitions(ddpl_smax_jax)[name] == definitions(ddpl_mpe)[name]


def test_an_imported_name_is_the_same_thing_everywhere():
    known = {}
    for script in {*SCRIPTS, ddpl_smax_jax} - {policy_transfer}:  # which calls numpy's array Array, as JAX does its own
        for node in ast.walk(ast.parse(Path(script.__file__).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    origin = f"{getattr(node, 'module', '')}.{alias.name}"
                    assert known.setdefault(alias.asname or alias.name, origin) == origin, script.__name__


@pytest.mark.parametrize(
    "script",
    [script for script in (*SCRIPTS, ddpl_smax_jax) if hasattr(script, "load_checkpoint")],
    ids=lambda script: script.__name__,
)
def test_a_run_is_either_gone_on_with_or_played(script):
    with pytest.raises(SystemExit, match="give one of them"):
        script.main(script.Args(resume="runs/one", evaluate="runs/other"))


@pytest.mark.parametrize("script", DDPL[1:], ids=lambda script: script.__name__)
def test_shared_maths_gives_the_same_numbers(script):
    """Also where a constant or another function that the source calls would differ."""

    def numbers(script):
        torch.manual_seed(0)
        anchor, sigmas = 0.5 * torch.randn(3, 7, 2), torch.tensor([0.1, 0.3])
        mask = torch.tensor([[1.0, 1], [1, 0], [1, 1]])
        candidates, log_proposal = script.propose_actions(anchor, sigmas, 4, 6, mask)
        weights, entropy = script.issm_weights(torch.randn(3, 16, 7), log_proposal, torch.tensor([0.1, 0.5, 2.0]))
        alphas_bar = script.noise_schedule(10)
        denoised = script.issm_target(torch.randn(3, 4, 7, 2), torch.full((3, 4, 7), 0.3), candidates, weights)
        step = script.denoise_step(torch.randn(5, 2), torch.randn(5, 2), 4, alphas_bar)
        layer = script.StackedLinear(3, 2, 5)
        return candidates, log_proposal, weights, entropy, alphas_bar, denoised, *step, layer(anchor)

    for ours, theirs in zip(numbers(script), numbers(ddpl_mpe), strict=True):
        assert torch.equal(ours, theirs)
