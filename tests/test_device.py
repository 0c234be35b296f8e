"""Updates on any device, and compiled: a tensor left behind raises on PyTorch's meta device, even without a GPU."""

import signal
from pathlib import Path

import pytest
import torch
from helpers import OnMeta, checkpoint_of, equal

import ddpl_isaaclab
import ddpl_mamujoco
import ddpl_mpe

ddpl_scripts = pytest.mark.parametrize(
    "script", [ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab], ids=lambda script: script.__name__
)
policies = pytest.mark.parametrize("policy", ["diffusion", "gaussian"])
MASK = torch.tensor([[1.0, 1], [1, 1], [1, 0]])
NUM_AGENTS, OBS_SIZE, STATE_SIZE, BATCH_SIZE = 3, 5, 15, 16


def make_learner(script, policy, device="cpu"):
    options = dict(policy=policy, actor_hidden=16, critic_hidden=16, actor_batch_size=8, denoising_steps=2)
    if script is ddpl_mpe:
        options["entities"] = False
    torch.manual_seed(0)
    return script.Learner(script.Args(**options), OBS_SIZE, STATE_SIZE, MASK.to(device), alike=False)


def make_buffer(script, device="cpu"):
    """A replay buffer of twenty random transitions."""
    shapes = dict(obs=(NUM_AGENTS, OBS_SIZE), actions=MASK.shape, reward=(), terminated=())
    shapes |= dict(next_obs=(NUM_AGENTS, OBS_SIZE), state=(STATE_SIZE,), next_state=(STATE_SIZE,))
    shapes = script.Batch(**{name: shapes[name] for name in script.Batch._fields})
    buffer = script.ReplayBuffer(20, shapes, torch.device(device))
    torch.manual_seed(1)
    buffer.add(*(torch.rand(20, *shape).to(device) for shape in shapes))
    return buffer


def tensors_of(learner):
    """All that a learner holds: networks, buffers and optimisers."""
    states = [state for optimizer in learner.optimizers() for state in optimizer.state.values()]
    return [*learner.parameters(), *learner.buffers(), *(tensor for state in states for tensor in state.values())]


# ---- devices


@pytest.fixture
def stepped(monkeypatch):
    """The parameters that Adam has stepped, itself replaced by a check: it has no kernel for the meta device."""
    calls = []

    def check_adam(parameters, gradients, *states, **_):
        tensors = [*parameters, *gradients, *(tensor for group in states for tensor in group)]
        assert all(tensor.is_meta for tensor in tensors)
        calls.append(parameters)

    for script in (ddpl_mpe, ddpl_mamujoco, ddpl_isaaclab):
        monkeypatch.setattr(script, "adam", check_adam)
    return calls


@ddpl_scripts
@policies
def test_an_update_leaves_no_tensor_behind(script, policy, stepped):
    learner = make_learner(script, policy, "meta")
    buffer = make_buffer(script, "meta")
    with OnMeta():
        batch = buffer.sample(BATCH_SIZE)
        metrics = script.update(learner, batch)
    assert all(tensor.is_meta for tensor in (*metrics.values(), *tensors_of(learner)))
    assert len(stepped) == len(learner.optimizers())
    assert learner.policy.sample(batch.obs, deterministic=True).is_meta


def spread(policy, device="cpu"):
    """A learner for three agents of simple_spread_v3, whose networks look at one entity at a time, and a batch."""
    options = dict(policy=policy, actor_hidden=16, critic_hidden=16, actor_batch_size=8, denoising_steps=2)
    torch.manual_seed(0)
    learner = ddpl_mpe.Learner(ddpl_mpe.Args(**options), 18, 54, torch.ones(3, 2).to(device), alike=True)
    assert isinstance(learner.critic, ddpl_mpe.EntityCriticEnsemble)
    shapes = (3, BATCH_SIZE, 18), (3, BATCH_SIZE, 2), (BATCH_SIZE,), (BATCH_SIZE,), (3, BATCH_SIZE, 18)
    torch.manual_seed(1)
    return learner, ddpl_mpe.Batch(*(torch.rand(shape).to(device) for shape in shapes))


@policies
def test_networks_for_entities_leave_no_tensor_behind(policy, stepped):
    learner, batch = spread(policy, "meta")
    with OnMeta():
        metrics = ddpl_mpe.update(learner, batch)
    assert all(tensor.is_meta for tensor in (*metrics.values(), *tensors_of(learner)))
    assert len(stepped) == len(learner.optimizers())


@ddpl_scripts
def test_the_same_seed_starts_with_the_same_networks_on_every_device(script, monkeypatch):
    """They are drawn on the CPU and then moved."""
    drawn = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: (drawn.append(self), self)[1])
    make_learner(script, "diffusion", "meta")
    monkeypatch.undo()
    ours, theirs = (dict(learner.named_parameters()) for learner in (drawn[0], make_learner(script, "diffusion")))
    assert equal(ours, theirs)


def test_one_transfer_brings_all_arrays():
    arrays = [torch.rand(4, 3, 2).numpy(), torch.rand(4).numpy(), torch.tensor([True, False, True, True]).numpy()]
    for array, tensor in zip(arrays, ddpl_mpe.to_device(arrays, torch.device("cpu")), strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(tensor, torch.from_numpy(array).float())
    assert all(tensor.is_meta for tensor in ddpl_mpe.to_device(arrays, torch.device("meta")))


def test_another_devices_checkpoint_goes_on_with_new_random_numbers():
    torch.manual_seed(0)
    ours = ddpl_mpe.random_state(torch.device("cpu"))
    torch.rand(3)
    ddpl_mpe.set_random_state(ours, torch.device("cpu"), 7)
    assert torch.equal(torch.get_rng_state(), ours["rng"])
    ddpl_mpe.set_random_state({"device": "cuda", "rng": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"), 7)
    assert torch.initial_seed() == 7


# ---- compiled


def smooth(learner):
    """Second moments of one: otherwise Adam's first step is the sign of a gradient, even of one that is rounding."""
    for optimizer in learner.optimizers():
        for state in optimizer.state.values():
            state["exp_avg_sq"].fill_(1)
            state["step"].fill_(1000)
    return learner


def assert_compiled_equals_eager(script, make):
    """Three updates of what `make` makes, a learner and a batch."""
    results = []
    for compiling in (False, True):
        learner, batch = make()
        learner = smooth(learner)
        update = script.compiled(script.update, learner) if compiling else script.update
        torch.manual_seed(2)
        metrics = [update(learner, batch) for _ in range(3)]
        results.append([*tensors_of(learner), *(value for row in metrics for value in row.values())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "script",
    [ddpl_mpe, *(pytest.param(script, marks=pytest.mark.slow) for script in (ddpl_mamujoco, ddpl_isaaclab))],
    ids=lambda script: script.__name__,
)
@policies
def test_a_compiled_update_equals_the_eager_one(script, policy):
    batch = make_buffer(script).sample(BATCH_SIZE)
    assert_compiled_equals_eager(script, lambda: (make_learner(script, policy), batch))


@pytest.mark.slow
@policies
def test_a_compiled_update_of_networks_for_entities_equals_the_eager_one(policy):
    assert_compiled_equals_eager(ddpl_mpe, lambda: spread(policy))


SMALL = dict(total_timesteps=600, learning_starts=200, eval_interval=300, eval_episodes=1, final_eval_episodes=1)
SMALL |= dict(checkpoint_interval=200, critic_hidden=16, actor_hidden=16, batch_size=32, actor_batch_size=16)


class StopAtTheSecondEpisode(list):
    """A signal that arrives while the third checkpoint is due."""

    asked = 0

    def __bool__(self):
        self.asked += 1
        return self.asked > 4


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit():
    options = SMALL | dict(compile=True, policy="gaussian")
    whole = checkpoint_of(ddpl_mpe.train(ddpl_mpe.Args(**options)))
    with pytest.raises(ddpl_mpe.Stopped) as stopped:
        ddpl_mpe.train(ddpl_mpe.Args(**options), signals=StopAtTheSecondEpisode([signal.SIGINT]))
    run_dir = str(stopped.value).split("--resume ")[1]
    resumed = checkpoint_of(ddpl_mpe.train(ddpl_mpe.Args(resume=run_dir)))
    assert 200 < int(str(stopped.value).split("step ")[1].split(";")[0]) < 600
    assert all(equal(whole[name], resumed[name]) for name in ("learner", "optimizers", "buffer"))


# ---- a GPU, where there is one


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


@needs_cuda
@policies
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("script", [ddpl_mpe, ddpl_mamujoco], ids=lambda script: script.__name__)
def test_cuda_trains_and_its_checkpoint_goes_on_anywhere(script, policy, compiling):
    options = SMALL | dict(policy=policy, device="cuda", compile=compiling)
    result = script.train(script.Args(**options))
    assert checkpoint_of(result)["device"] == "cuda"
    contents = torch.load(Path(result["run_dir"]) / "checkpoint.pt", weights_only=True)
    contents["progress"]["global_step"] = 400
    torch.save(contents, Path(result["run_dir"]) / "checkpoint.pt")
    for device in ("cuda", "cpu"):
        again = script.train(script.Args(resume=result["run_dir"], device=device))
        assert again["global_step"] == 600
