"""The updates of ddpl_mpe.py on small problems whose answer is known."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

import ddpl_mpe
from ddpl_mpe import (
    Args,
    Batch,
    CriticEnsemble,
    Entities,
    EntityCriticEnsemble,
    EntityEncoder,
    Learner,
    PooledCriticEnsemble,
    VectorMPE,
)

POLICIES = ["diffusion", "gaussian"]
SEEN = Entities(1, ((1, 2), (1, 1)))  # of an observation of four numbers


def entity_critics(*sizes_and_layer_norm):
    return EntityCriticEnsemble(*sizes_and_layer_norm[:-1], SEEN, 8)  # always normalised


ENSEMBLES = [CriticEnsemble, PooledCriticEnsemble, entity_critics]


def make_learner(policy="diffusion", mask=((1.0, 1), (1, 1), (1, 1)), obs_size=4, **options):
    """A learner whose agents have a policy each, unless the options say otherwise."""
    options = {"shared_policy": False, "entities": False} | options
    args = Args(policy=policy, actor_hidden=32, critic_hidden=32, actor_batch_size=16, **options)
    mask = torch.tensor(mask, dtype=torch.float32)
    return Learner(args, obs_size, len(mask) * obs_size, mask, alike=bool(mask.all()))


def gradients_of(optimizer):
    """The gradients of the optimizer's first step: Adam's first moments are then a tenth of them."""
    return [state["exp_avg"] / 0.1 for state in optimizer.state.values()]


def state_of(obs):
    return obs.transpose(0, 1).flatten(1)


def make_batch(learner, batch_size=16, obs_size=4):
    mask = learner.mask[:, None]
    num_agents, _, action_size = mask.shape
    obs, next_obs = torch.randn(2, num_agents, batch_size, obs_size)
    actions = (2 * torch.rand(num_agents, batch_size, action_size) - 1) * mask
    return Batch(obs, actions, torch.randn(batch_size), torch.zeros(batch_size), next_obs)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_scores_equal_the_critics_asked_one_candidate_at_a_time(ensemble, num_agents, layer_norm):
    """Each on its share of the states: the first critic on the first two, and so on."""
    critic = ensemble(4, 4 * num_agents, num_agents, 2, 32, layer_norm)
    state, actions = torch.randn(8, 4 * num_agents), torch.rand(num_agents, 8, 2)
    candidates = torch.rand(num_agents, 6, 8, 2)
    scores, b = critic.score(state, actions, candidates), torch.arange(8)
    for agent in range(num_agents):
        for m in range(6):
            joint = actions.clone()
            joint[agent] = candidates[agent, m]
            torch.testing.assert_close(scores[agent, m], critic(state, joint)[b // 2, b])


def test_pooled_critics_do_not_care_which_agent_is_which():
    """Values of agents in another order are the same. Flat critics' are not."""
    state, actions, order = torch.randn(8, 3, 4), torch.rand(3, 8, 2), [2, 0, 1]
    pooled, flat = PooledCriticEnsemble(4, 12, 3, 2, 32, False), CriticEnsemble(4, 12, 3, 2, 32, False)

    def change(critic):
        return critic(state[:, order].flatten(1), actions[order]) - critic(state.flatten(1), actions)

    assert change(pooled).abs().max() < 1e-6 < 1e-3 < change(flat).abs().max()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_pooled_critics_hear_of_each_number_only_the_largest(layer_norm):
    """By the pool written out: a network for one agent, the largest over the agents, a network for the team."""
    critic, state, actions = PooledCriticEnsemble(1, 12, 3, 2, 32, layer_norm), torch.randn(8, 12), torch.rand(3, 8, 2)
    norm = (lambda x: nn.functional.layer_norm(x, x.shape[-1:])) if layer_norm else nn.Identity()
    agents = []
    for obs, action in zip(state.split(4, dim=1), actions):
        first = obs @ critic.observation.weight[0] + critic.observation.bias[0] + action @ critic.action[0]
        agents.append(norm(first).relu() @ critic.view.weight[0] + critic.view.bias[0])
    seen = torch.stack(agents).max(0).values
    hidden = norm(seen @ critic.pooled.weight[0] + critic.pooled.bias[0]).relu()
    value = hidden @ critic.value.weight[0] + critic.value.bias[0]
    torch.testing.assert_close(critic(state, actions)[0], value[:, 0])


def test_critics_are_pooled_where_the_agents_have_one_size():
    """And only there: a speaker and a listener are not told apart by a pool."""
    alike, unlike = ((1.0, 1), (1, 1)), ((1.0, 1), (1, 0))
    assert isinstance(make_learner(mask=alike).critic, PooledCriticEnsemble)
    assert isinstance(make_learner(mask=alike, pooled_critics=False).critic, CriticEnsemble)
    assert isinstance(make_learner(mask=unlike).critic, CriticEnsemble)
    for critic in make_learner(mask=alike).critic, make_learner(mask=alike).target_critic:
        assert critic.pooled.weight.shape == (4, 16, 32)
    narrow = PooledCriticEnsemble(4, 12, 3, 2, 1, False)
    assert narrow(torch.randn(8, 12), torch.rand(3, 8, 2)).shape == (4, 8)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_critics_are_initialised_apart(ensemble):
    """Their disagreement is what makes the target pessimistic."""
    values = ensemble(4, 12, 3, 2, 32, False)(torch.randn(8, 12), torch.rand(3, 8, 2))
    assert values.shape == (4, 8) and values.std(0).min() > 0


@pytest.mark.parametrize("ensemble", ENSEMBLES[:2])
def test_layer_norm_bounds_the_values_of_states_never_seen(ensemble):
    """Hidden layers are brought to mean 0 and variance 1, so no value exceeds that of the longest such vector."""
    actions, far = torch.rand(3, 8, 2), 1e6 * torch.randn(8, 12)
    plain, normal = (ensemble(4, 12, 3, 2, 32, layer_norm) for layer_norm in (False, True))
    bound = 32**0.5 * normal.value.weight.norm(dim=1) + normal.value.bias.abs()[..., 0]
    assert (normal(far, actions).abs() < bound).all() and plain(far, actions).abs().max() > 1000 * bound.max()


def test_gaussian_log_prob_equals_torch_distributions():
    policy = make_learner("gaussian").policy
    obs = torch.randn(3, 50, 4)
    actions, log_prob = policy.rsample(obs)
    mean, log_std = policy(obs)
    tanh_normal = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform()
    )
    torch.testing.assert_close(log_prob, tanh_normal.log_prob(actions).sum(-1), atol=1e-3, rtol=1e-3)


def test_gaussian_gradient_is_each_agents_own_kl():
    """The joint pass gives agent i the gradient of its own KL with the others' actions held fixed."""
    learner = make_learner("gaussian", init_temperature=0.3)
    obs = torch.randn(3, 16, 4)
    torch.manual_seed(1)
    ddpl_mpe.update_gaussian(learner, state_of(obs), obs)
    together = gradients_of(learner.policy_optimizer)
    learner = (torch.manual_seed(0), make_learner("gaussian", init_temperature=0.3))[1]
    for agent in range(3):
        torch.manual_seed(1)
        actions, log_prob = learner.policy.rsample(obs)
        fixed = actions.detach().clone()
        fixed[agent] = actions[agent]
        loss = (0.3 * log_prob[agent] - learner.critic(state_of(obs), fixed).mean(0)).mean()
        alone = torch.autograd.grad(loss, list(learner.policy.parameters()))
        for ours, theirs in zip(together, alone):
            torch.testing.assert_close(ours[agent], theirs[agent], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("policy", POLICIES)
def test_truncation_bootstraps_and_termination_does_not(policy):
    """The critic's loss is that of the target written out; `terminated` alone cuts the bootstrap."""
    learner = make_learner(policy)
    batch = make_batch(learner)
    batch = batch._replace(terminated=(torch.arange(16) < 8).float())
    next_actions = learner.policy.sample(batch.next_obs)
    with torch.no_grad():
        values = learner.target_critic(batch.next_state, next_actions)
        value = values.mean(0) - 0.6 * values.std(0)
        target = batch.reward + 0.95 * torch.where(torch.arange(16) < 8, 0, value)
        expected = sum(((q - target) ** 2).mean() for q in learner.critic(batch.state, batch.actions))
    metrics = ddpl_mpe.update_critic(learner, batch, next_actions)
    torch.testing.assert_close(metrics["losses/critic"], expected)


def test_two_critics_can_give_their_minimum():
    """Their mean less their deviation / sqrt 2, which is half of their distance."""
    learner = make_learner(num_critics=2, pessimism=math.sqrt(0.5))
    batch = make_batch(learner)
    with torch.no_grad():
        value = torch.minimum(*learner.target_critic(batch.next_state, batch.actions))
        target = batch.reward + 0.95 * value
        expected = sum(((q - target) ** 2).mean() for q in learner.critic(batch.state, batch.actions))
    metrics = ddpl_mpe.update_critic(learner, batch, batch.actions)
    torch.testing.assert_close(metrics["losses/critic"], expected)


def test_target_critic_follows_slowly():
    learner = make_learner(tau=0.25)
    before = [p.detach().clone() for p in learner.target_critic.parameters()]
    batch = make_batch(learner)
    ddpl_mpe.update_critic(learner, batch, batch.actions)
    for old, new, online in zip(before, learner.target_critic.parameters(), learner.critic.parameters()):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)


@pytest.mark.parametrize("policy", POLICIES)
def test_average_of_the_weights(policy):
    """It equals one made by hand, and what is learned does not depend on it."""
    learned = []
    for decay in (0.0, 0.75):
        torch.manual_seed(0)
        learner = make_learner(policy, average_decay=decay)
        average = [weights.clone() for weights in learner.policy.parameters()]
        for _ in range(3):
            ddpl_mpe.update(learner, make_batch(learner))
            average = [decay * old + (1 - decay) * new for old, new in zip(average, learner.policy.parameters())]
        for ours, by_hand in zip(learner.average_policy.parameters(), average, strict=True):
            torch.testing.assert_close(ours, by_hand)
        learned.append(list(learner.policy.parameters()))
    assert all(map(torch.equal, *learned))
    assert not any(map(torch.equal, learner.average_policy.parameters(), learner.policy.parameters()))


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_never_leaks(policy):
    """Garbage in every weight that belongs to a padded action changes no metric and no real action."""
    mask, outcomes = torch.tensor([[1.0, 1, 1], [1, 0, 0]]), []
    for garbage in (0.0, 1e3):
        torch.manual_seed(0)
        learner = make_learner(policy, mask.tolist())
        with torch.no_grad():
            if policy == "diffusion":
                learner.policy.noisy_action[1, 1:] = garbage
                learner.policy.velocity.bias[1, :, 1:] = garbage
            else:
                learner.policy.mean_and_log_std.bias[1, :, [1, 2, 4, 5]] = garbage
            for critic in (learner.critic, learner.target_critic):
                critic.actions[:, 4:] = garbage
        torch.manual_seed(1)
        batch = make_batch(learner)
        metrics = [ddpl_mpe.update(learner, batch) for _ in range(3)]
        actions = learner.policy.sample(torch.randn(2, 100, 4))
        assert (actions[1, :, 1:] == 0).all() and (actions[0] != 0).any()
        outcomes.append([actions, *(value for row in metrics for value in row.values())])
    for clean, dirty in zip(*outcomes):
        torch.testing.assert_close(clean, dirty)


@pytest.mark.parametrize("policy", POLICIES)
def test_agents_do_not_share_weights(policy):
    """A change of one agent's observation changes that agent's actions alone."""
    learner, obs = make_learner(policy), torch.randn(3, 8, 4)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.manual_seed(1)
    before = learner.policy.sample(obs)
    obs[1] += 1
    torch.manual_seed(1)
    after = learner.policy.sample(obs)
    assert (before[[0, 2]] == after[[0, 2]]).all() and (before[1] != after[1]).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_shared_policy_is_one_for_all(policy):
    """Shared, the gradient is the sum of those of agents that have a copy each; unlike agents never share."""
    shared, copies = make_learner(policy, shared_policy=True), make_learner(policy)
    for ours, theirs in zip(shared.parameters(), copies.parameters(), strict=True):
        if ours.shape != theirs.shape:
            ours.data.normal_(std=0.3)
            theirs.data.copy_(ours.expand(3, *ours.shape[1:]))
        else:
            theirs.data.copy_(ours)
    obs = torch.randn(3, 8, 4)
    actions = []
    for learner in (shared, copies):
        torch.manual_seed(1)
        actions.append(learner.policy.sample(obs))
        torch.manual_seed(2)
        if policy == "diffusion":
            ddpl_mpe.update_diffusion(learner, state_of(obs), obs, actions[0])
        else:
            ddpl_mpe.update_gaussian(learner, state_of(obs), obs)
    torch.testing.assert_close(*actions)
    for one, each in zip(gradients_of(shared.policy_optimizer), gradients_of(copies.policy_optimizer), strict=True):
        torch.testing.assert_close(one, each.sum(0, keepdim=True), atol=1e-6, rtol=1e-4)
    unlike = make_learner(policy, mask=((1, 1), (1, 0)), shared_policy=True)
    assert len(unlike.policy.hidden.weight) == 2


def test_temperature_falls_where_entropy_exceeds_its_target():
    learner = make_learner()
    before = learner.log_temperature.detach().clone()
    ddpl_mpe.update_temperature(learner, torch.tensor([-1.0, 0.0, 1.0]))
    change = learner.log_temperature.detach() - before
    assert change[0] > 0 and change[1] == 0 and change[2] < 0


def test_temperature_rises_where_one_candidate_decides():
    """Also if the entropy, which cannot be told from one candidate, seems to exceed its target."""
    learner = make_learner(init_temperature=1e-6, target_entropy=-50.0)
    metrics = ddpl_mpe.update(learner, make_batch(learner))
    assert metrics["policy/effective_sample_size"] < 1.5 and metrics["policy/entropy"] > -50
    assert (learner.log_temperature > math.log(1e-6)).all()


# ---- a single state and a known energy with two modes


class TwoModes(nn.Module):
    """Q of a joint action: the mean over agents of two equal bumps at +-0.7."""

    def forward(self, state, actions):
        return torch.exp(-((actions[..., 0].abs() - 0.7) ** 2) / 0.05).mean(0).expand(2, -1)

    @torch.no_grad()
    def score(self, state, actions, candidates):
        return torch.exp(-((candidates[..., 0].abs() - 0.7) ** 2) / 0.05) / candidates.shape[0]


def shares_of_modes(policy, num_updates=400):
    """The share [2 modes, N agents] of a trained policy's actions within 0.3 of -0.7 and of +0.7."""
    learner = make_learner(policy, mask=[[1.0], [1.0]], obs_size=1, denoising_steps=20)
    learner.critic, obs = TwoModes(), torch.ones(2, 256, 1)
    for _ in range(num_updates):
        learner.log_temperature.data.fill_(math.log(0.1))
        if policy == "diffusion":
            ddpl_mpe.update_diffusion(learner, state_of(obs), obs, learner.policy.sample(obs))
        else:
            ddpl_mpe.update_gaussian(learner, state_of(obs), obs)
    actions = learner.policy.sample(torch.ones(2, 5000, 1))[..., 0]
    return torch.stack([((actions - mode).abs() < 0.3).float().mean(1) for mode in (-0.7, 0.7)])


def test_diffusion_keeps_both_modes_of_a_known_energy():
    """Half of the mass at each mode, as the energy-based policy itself has it (by quadrature)."""
    shares = shares_of_modes("diffusion")

    def density(a):
        return math.exp(math.exp(-((abs(a) - 0.7) ** 2) / 0.05) / 2 / 0.1)

    exact = quad(density, 0.4, 1)[0] / (2 * quad(density, 0, 1)[0])
    assert (shares - 0.5).abs().max() < 0.1
    assert (shares - exact).abs().max() < 0.1


def test_gaussian_does_not_keep_both_modes():
    shares = shares_of_modes("gaussian")
    assert (shares.min(0).values < 0.4).all()


# ---- the local critic: what an agent cannot know is averaged before the softmax, not after


class Coin(nn.Module):
    """Two agents; the second sees a coin z = +-1, the first does not. Q = slope z a_1 + 0.3 a_1 a_2 + 5 z."""

    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    @torch.no_grad()
    def score(self, state, actions, candidates):
        z = state[:, 1]
        first = self.slope * z * candidates[0, ..., 0] + 0.3 * candidates[0, ..., 0] * actions[1, :, 0] + 5 * z
        return torch.stack([first, 0 * candidates[1, ..., 0]])


def coin_learner(slope, **options):
    learner = make_learner(mask=[[1.0], [1.0]], obs_size=1, actor_lr=1e-2, **options)
    learner.critic = Coin(slope)
    return learner


def coin_obs(batch_size, share_of_heads):
    z = (torch.rand(batch_size) < share_of_heads).float() * 2 - 1
    return torch.stack([torch.zeros_like(z), z])[..., None]


def test_local_critic_is_the_mean_over_what_the_agent_does_not_know():
    """With heads in 3 of 4 states and E[a_2] = 0.5, the first agent's slope is 0.5 slope + 0.15; the second's is 0."""
    learner = coin_learner(0.4)
    for _ in range(1500):
        obs, actions, candidates = coin_obs(256, 0.75), torch.rand(2, 256, 1), 2 * torch.rand(2, 4, 256, 1) - 1
        ddpl_mpe.update_local_critic(learner, state_of(obs), obs, actions, candidates)
    ends = torch.tensor([-1.0, 1.0])[None, :, None, None].expand(2, 2, 1, 1)
    low, high = learner.local_critic(torch.zeros(2, 1, 1), ends)[..., 0].unbind(1)
    torch.testing.assert_close((high - low).detach() / 2, torch.tensor([0.35, 0.0]), atol=0.05, rtol=0)


def test_local_critic_ignores_what_a_state_adds_to_all_candidates():
    outcomes = []
    for offset in (0.0, 5.0):
        torch.manual_seed(0)
        learner = coin_learner(0.4)
        obs, actions, candidates = coin_obs(16, 0.5), torch.rand(2, 16, 1), torch.rand(2, 4, 16, 1)
        q = learner.critic.score(state_of(obs), actions, candidates) + offset * torch.randn(16)
        learner.critic.score = lambda *_, q=q: q
        ddpl_mpe.update_local_critic(learner, state_of(obs), obs, actions, candidates)
        outcomes.append(gradients_of(learner.local_critic_optimizer))
    for clean, offset in zip(*outcomes):
        torch.testing.assert_close(clean, offset, atol=1e-4, rtol=1e-3)


def test_policy_is_the_softmax_of_the_mean():
    """A fair coin leaves the first agent uniform; the mean of the two softmaxes would sit at the faces of the box."""
    learner = coin_learner(1.0)
    for _ in range(500):
        learner.log_temperature.data.fill_(math.log(0.2))
        obs = coin_obs(64, 0.5)
        ddpl_mpe.update_diffusion(learner, state_of(obs), obs, learner.policy.sample(obs))
    actions = learner.policy.sample(torch.zeros(2, 5000, 1))[0]
    centre = (actions.abs() < 0.5).float().mean()
    assert 0.4 < centre < 0.85  # uniform: 0.5, sampled with T = 10: 0.65; the mean of the softmaxes: 0.08


def test_local_critic_values_one_candidate_as_many():
    """One candidate at a time, and with no word from another agent."""
    critic = ddpl_mpe.LocalCritic(3, 4, 2, 32, 2)
    obs, candidates = torch.randn(3, 5, 4), torch.rand(3, 6, 5, 2)
    together = critic(obs, candidates)
    for m in range(6):
        torch.testing.assert_close(together[:, m], critic(obs, candidates[:, m : m + 1])[:, 0])
    obs[1] += 1
    changed = (critic(obs, candidates) != together).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


# ---- encoders


def test_encoders_are_normalised_between_their_layers():
    """What the first layer gives at ten times the size comes to the same, agent by agent."""
    encoder, obs = ddpl_mpe.make_encoder(2, 4, 16, 3), torch.randn(2, 5, 4)
    features = encoder(obs)
    layers = [layer for layer in encoder if isinstance(layer, ddpl_mpe.StackedLinear)]
    assert len(layers) == 3 and features.shape == (2, 5, 16)
    layers[0].weight.data *= 10
    torch.testing.assert_close(encoder(obs), features, rtol=1e-3, atol=1e-3)
    obs[0] += 1
    changed = (encoder(obs) - features).abs().flatten(1).amax(1) > 0.01
    assert changed.tolist() == [True, False]
    layers[2].weight.data *= 10  # behind the last layer nothing is normalised
    assert encoder(obs).std() > 5 * features.std()
    assert len(ddpl_mpe.make_encoder(2, 4, 16, 1)) == 1


# ---- networks that look at one landmark or agent at a time


def spread(num_agents, **options):
    """A learner for simple_spread_v3, and observations [N, 8, O] of eight copies of it, each with its own weights."""
    env = VectorMPE("simple_spread_v3", num_agents, 8)
    obs = torch.from_numpy(env.reset(ddpl_mpe.episode_seeds(0, 1, 0, 8))).transpose(0, 1)
    learner = Learner(Args(**options), env.obs_size, env.state_size, env.action_mask(), env.alike)
    obs[..., :2] = torch.randn(num_agents, 8, 2)  # at rest otherwise
    return learner, obs, env


@pytest.mark.parametrize("num_agents", [1, 2, 4])
def test_entities_are_where_the_task_says(num_agents):
    """The ways to landmarks and to other agents, by where they are in the simulation."""
    _, obs, env = spread(num_agents)
    own, landmarks, *others = ddpl_mpe.observed_entities(Args(), num_agents).split(obs)
    for e, copy in enumerate(env.envs):
        world = copy.unwrapped.world
        places, goals = (
            torch.tensor(np.array([x.state.p_pos for x in group])) for group in (world.agents, world.landmarks)
        )
        for i in range(num_agents):
            rest = torch.arange(num_agents) != i
            torch.testing.assert_close(own[i, e, 2:].double(), places[i], atol=1e-6, rtol=0)
            torch.testing.assert_close(landmarks[i, e].double(), goals - places[i], atol=1e-6, rtol=0)
            if num_agents > 1:
                torch.testing.assert_close(others[0][i, e].double(), places[rest] - places[i], atol=1e-6, rtol=0)


def test_only_simple_spread_lists_entities_and_the_flag_turns_them_off():
    reference = VectorMPE("simple_reference_v3", None, 1)
    sizes = reference.obs_size, reference.state_size, reference.action_mask(), reference.alike
    for learner in Learner(Args(env_id="simple_reference_v3"), *sizes), spread(3, entities=False)[0]:
        networks = learner.policy.observation, learner.local_critic.observation, learner.critic
        assert not any(isinstance(network, EntityEncoder | EntityCriticEnsemble) for network in networks)
    learner, *_ = spread(3)
    assert isinstance(learner.critic, EntityCriticEnsemble) and isinstance(learner.target_critic, EntityCriticEnsemble)
    for policy in "diffusion", "gaussian":
        assert isinstance(spread(3, policy=policy)[0].policy.observation, EntityEncoder)
    assert isinstance(learner.local_critic.observation, EntityEncoder)
    assert isinstance(spread(3, pooled_critics=False)[0].critic, CriticEnsemble)
    with pytest.raises(ddpl_mpe.RunError, match="--entity-width: 30 is not valid; it must be a multiple of 4"):
        spread(3, entity_width=30)


def in_another_order(obs, landmarks, others):
    """Observations [N, B, O] of four agents that list landmarks and other agents in these orders."""
    own, rest = obs[..., :4], obs[..., 18:]
    _, *kinds = ddpl_mpe.observed_entities(Args(), 4).split(obs)
    kinds = [kind[:, :, order].flatten(2) for kind, order in zip(kinds, (landmarks, others), strict=True)]
    return torch.cat([own, *kinds, rest], dim=-1)


def test_the_order_of_entities_means_nothing():
    """Neither to critics nor to what encoders make of entities, beside the one layer that sees all at once."""
    learner, obs, _ = spread(4)
    actions = torch.rand(4, 8, 2)
    mixed = in_another_order(obs, [2, 0, 3, 1], [1, 2, 0])
    swapped = torch.cat([obs[..., :10], obs[..., 12:14], obs[..., 10:12], obs[..., 14:]], dim=-1)
    for network in learner.policy.observation, learner.local_critic.observation:
        network[0].weight.data.zero_()
        torch.testing.assert_close(network(mixed), network(obs))
        assert (network(swapped) - network(obs)).abs().max() > 1e-3  # a landmark in the place of another agent
    value = learner.critic(state_of(obs), actions)
    torch.testing.assert_close(learner.critic(state_of(mixed), actions), value)
    order = [1, 3, 0, 2]
    torch.testing.assert_close(learner.critic(state_of(obs[order]), actions[order]), value)
    assert (learner.critic(state_of(swapped), actions) - value).abs().max() > 1e-4


def test_encoders_attend_as_torch_does():
    """The whole network written out for one agent, with torch.nn.MultiheadAttention."""
    encoder = EntityEncoder(1, 11, 16, Entities(3, ((2, 2), (3, 1))), 8).requires_grad_(False)
    obs = torch.randn(1, 5, 11)
    attention = nn.MultiheadAttention(8, ddpl_mpe.NUM_HEADS, batch_first=True).requires_grad_(False)
    for ours, weight, bias in (
        (encoder.query_key_value, attention.in_proj_weight, attention.in_proj_bias),
        (encoder.attention_output, attention.out_proj.weight, attention.out_proj.bias),
    ):
        ours.bias.normal_()
        weight.copy_(ours.weight[0].T)
        bias.copy_(ours.bias[0, 0])

    def apply(layer, x):
        return x @ layer.weight[0] + layer.bias[0, 0]

    rows = []
    for row in obs[0]:
        own, first, second = row[:3], row[3:7].view(2, 2), row[7:10].view(3, 1)
        entities = torch.cat([apply(encoder.kinds[0], first), apply(encoder.kinds[1], second)])
        x = apply(encoder.embedding, nn.functional.silu(entities + apply(encoder.own, own)))
        normal = nn.functional.layer_norm(x, (8,))[None]
        x = x + attention(normal, normal, normal)[0][0]
        x = x + apply(encoder.feed_forward, nn.functional.silu(nn.functional.layer_norm(x, (8,))))
        x = nn.functional.layer_norm(x, (8,))
        weights = apply(encoder.pool_score, x).softmax(0).repeat_interleave(2, dim=1)  # two numbers a head
        rows.append(apply(encoder[0], row) + apply(encoder.output, (weights * apply(encoder.pool_value, x)).sum(0)))
    torch.testing.assert_close(encoder(obs)[0], torch.stack(rows))


def test_encoders_of_a_stack_are_each_ones_own():
    stack, obs = EntityEncoder(3, 4, 16, SEEN, 8), torch.randn(3, 5, 4)
    for i in range(3):
        alone = EntityEncoder(1, 4, 16, SEEN, 8)
        alone.load_state_dict({name: weight[i : i + 1] for name, weight in stack.state_dict().items()})
        torch.testing.assert_close(alone(obs[i : i + 1]), stack(obs)[i : i + 1])
        torch.testing.assert_close(alone(obs)[i], stack(obs)[i])  # a stack of one serves all


def test_entity_critics_judge_one_entity_at_a_time():
    """Written out: a network for an agent and an entity, the largest over agents, one for each entity, their mean."""
    critic = EntityCriticEnsemble(1, 12, 3, 2, 16, SEEN, 8).requires_grad_(False)
    state, actions = torch.randn(8, 12), torch.rand(3, 8, 2)

    def norm(x):
        return nn.functional.layer_norm(x, x.shape[-1:])

    def apply(layer, x):
        return x @ layer.weight[0] + layer.bias[0]

    judged = []
    for kind, columns in (0, slice(1, 3)), (1, slice(3, 4)):
        seen = []
        for obs, action in zip(state.split(4, dim=1), actions):
            first = apply(critic.observation, obs[:, :1]) + apply(critic.kinds[kind], obs[:, columns])
            seen.append(apply(critic.view, norm(first + action @ critic.action[0]).relu()))
        judged.append(apply(critic.entity, norm(torch.stack(seen).amax(0)).relu()).relu())
    hidden = norm(apply(critic.pooled, torch.stack(judged).mean(0))).relu()
    torch.testing.assert_close(critic(state, actions)[0], apply(critic.value, hidden)[:, 0])


@pytest.mark.parametrize("policy, flag", [("diffusion", "encoder_layers"), ("gaussian", "gaussian_encoder_layers")])
def test_the_flags_choose_the_layers(policy, flag):
    learner = make_learner(policy, **{flag: 2})
    networks = [learner.policy, learner.local_critic] if policy == "diffusion" else [learner.policy]
    for network in networks:
        assert sum(isinstance(layer, ddpl_mpe.StackedLinear) for layer in network.observation) == 2


# ---- blocks of dimensions


def test_random_blocks_are_real_dimensions_and_all_come_up():
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [0, 1, 0, 1, 0]])
    blocks = torch.stack([ddpl_mpe.random_blocks(mask, 3) for _ in range(2000)])
    assert (blocks.sum(-1) == torch.tensor([3, 2])).all()
    torch.testing.assert_close(blocks.mean(0), mask * torch.tensor([[0.6], [1.0]]), atol=0.04, rtol=0)


def test_candidates_change_one_block_of_the_policys_own_action(monkeypatch):
    learner = make_learner(mask=[[1.0] * 6, [1.0] * 2 + [0.0] * 4], block_size=3)
    obs, seen, score = torch.randn(2, 16, 4), [], learner.critic.score
    actions = learner.policy.sample(obs)
    monkeypatch.setattr(learner.critic, "score", lambda *inputs: (seen.append(inputs[2]), score(*inputs))[1])
    ddpl_mpe.update_diffusion(learner, state_of(obs), obs, actions)
    changed = (seen[0] != actions[:, None]).float().mean((1, 2))
    assert changed.gt(0.9).sum(-1).tolist() == [3, 2] and changed.eq(0).sum(-1).tolist() == [3, 4]


class Bowl(nn.Module):
    """A Gaussian energy-based policy: at temperature 0.08, mean 0.4 and standard deviation 0.2 in every dimension."""

    def forward(self, state, actions):
        return -(actions - 0.4).square().sum((0, 2)).expand(2, -1)

    @torch.no_grad()
    def score(self, state, actions, candidates):
        return -(candidates - 0.4).square().sum(-1)


def test_blocks_learn_all_of_twelve_dimensions():
    learner = make_learner(mask=[[1.0] * 12], obs_size=1)
    learner.critic, obs = Bowl(), torch.ones(1, 64, 1)
    for _ in range(1200):
        learner.log_temperature.data.fill_(math.log(0.08))
        ddpl_mpe.update_diffusion(learner, state_of(obs), obs, learner.policy.sample(obs))
    actions = learner.policy.sample(torch.ones(1, 4000, 1))[0]
    assert abs(actions.mean() - 0.4) < 0.1
    assert 0.16 < actions.std(0).mean() < 0.24


def test_update_reports_what_it_did():
    learner = make_learner()
    metrics = ddpl_mpe.update(learner, make_batch(learner))
    assert all(value.shape == () and value.isfinite() for value in metrics.values())
    assert 1 <= metrics["policy/effective_sample_size"] <= 16
