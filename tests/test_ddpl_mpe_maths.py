"""The pure functions of diffusion and ISSM against closed forms, quadrature and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.integrate import quad

from ddpl_mpe import denoise_step, issm_target, issm_weights, noise_schedule, propose_actions


def test_schedule_is_linear_in_log_snr():
    alphas_bar = noise_schedule(10)
    assert alphas_bar[0] == 1 and alphas_bar.shape == (11,)
    torch.testing.assert_close(alphas_bar[1:].logit(), torch.linspace(7, -5, 10), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_steps", [2, 10, 25])
def test_denoise_step_equals_diffusers(num_steps):
    alphas_bar = noise_schedule(num_steps)
    scheduler = DDPMScheduler(
        num_steps,
        trained_betas=(1 - alphas_bar[1:] / alphas_bar[:-1]).numpy(),
        prediction_type="v_prediction",
        variance_type="fixed_small",
        clip_sample=True,
    )
    scheduler.set_timesteps(num_steps)
    for t in range(num_steps, 0, -1):  # ours counts noisy steps from 1, diffusers from 0
        x_t, v = torch.randn(64, 3), torch.randn(64, 3)
        mean, std = denoise_step(x_t, v, t, alphas_bar)
        theirs = scheduler.step(v, t - 1, x_t, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(t))
        torch.testing.assert_close(mean + std * noise, theirs, atol=1e-4, rtol=1e-4)
    assert std == 0 and mean.abs().max() <= 1


# ---- proposals


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_uniform", [0, 2])
def test_proposal_density_integrates_to_one(size, num_uniform):
    """The mean of f(a) / q(a) over proposals is the integral of f; here near two faces, so with reflected kernels."""
    batch_size = 200_000
    anchor = torch.tensor([0.95, -0.8]).repeat_interleave(batch_size // 2)[None, :, None].expand(-1, -1, size)
    candidates, log_proposal = propose_actions(anchor, torch.tensor([0.3, 0.5]), num_uniform, 2)
    assert candidates.abs().max() <= 1
    if num_uniform:  # without the uniform share, 1 / q has no finite variance
        torch.testing.assert_close((-log_proposal).exp().mean(), torch.tensor(2.0**size), rtol=0.02, atol=0)
    near = 0.8 * anchor.sign()[:, None]
    bump = torch.exp(-((candidates - near) ** 2).sum(-1) / (2 * 0.2**2))
    one_axis = quad(lambda a: math.exp(-((a - 0.8) ** 2) / (2 * 0.2**2)), -1, 1)[0]
    integral = (bump / log_proposal.exp()).mean()
    torch.testing.assert_close(integral, torch.tensor(one_axis**size).float(), rtol=0.02, atol=0)


def test_padded_proposals_equal_those_of_the_smaller_agent():
    """A padded dimension stays 0 and leaves the density what it is without that dimension."""
    anchor, mask = torch.rand(2, 50, 3), torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    anchor[1, :, 1:] = 0
    candidates, log_proposal = propose_actions(anchor, torch.tensor([0.1, 0.3]), 3, 4, mask)
    assert (candidates[1, ..., 1:] == 0).all() and (candidates[0] != 0).all()
    centre, a = anchor[1, None, :, 0], candidates[1, ..., 0]
    density = torch.full_like(a, 3 / 11 / 2)
    for sigma in (0.1, 0.3):
        images = (centre, 2 - centre, -2 - centre)
        density += 4 / 11 * sum(torch.distributions.Normal(c, sigma).log_prob(a).exp() for c in images)
    torch.testing.assert_close(log_proposal[1], density.log(), atol=1e-4, rtol=1e-4)


# ---- weights: an energy with two modes, temperature 0.2


def two_mode_energy(a):
    return 0.5 * torch.exp(-((a - 0.6) ** 2) / 0.05) + 0.4 * torch.exp(-((a + 0.6) ** 2) / 0.02)


def test_weights_estimate_entropy_and_means():
    temperature = 0.2

    def density(a):
        return math.exp(two_mode_energy(torch.tensor(a)).item() / temperature)

    z = quad(density, -1, 1)[0]
    entropy = -quad(lambda a: density(a) / z * math.log(density(a) / z), -1, 1)[0]
    mean = quad(lambda a: density(a) / z * a, -1, 1)[0]
    anchor = torch.tensor([0.6, -0.6]).repeat(25)[None, :, None]
    candidates, log_proposal = propose_actions(anchor, torch.tensor([0.1, 0.3]), 4000, 4000)
    actions = candidates[..., 0]
    weights, estimate = issm_weights(two_mode_energy(actions), log_proposal, torch.tensor([temperature]))
    torch.testing.assert_close(weights.sum(1), torch.ones(1, 50))
    assert abs((weights * actions).sum(1).mean().item() - mean) < 0.01
    assert abs(estimate.mean().item() - entropy) < 0.01


def test_each_agent_has_its_own_temperature():
    energy, log_proposal = torch.randn(2, 30, 5), torch.randn(2, 30, 5)
    together = issm_weights(energy, log_proposal, torch.tensor([0.1, 2.0]))
    for i, temperature in enumerate((0.1, 2.0)):
        alone = issm_weights(energy[i : i + 1], log_proposal[i : i + 1], torch.tensor([temperature]))
        for ours, theirs in zip(together, alone):
            torch.testing.assert_close(ours[i], theirs[0])


# ---- the regression target: exact denoisers in closed form


def gaussian_denoiser(x_t, alpha_bar, mean, variance):
    """E[a | x_t] for a ~ N(mean, variance)."""
    gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
    return mean + gain * (x_t - alpha_bar.sqrt() * mean)


def mixture_denoiser(x_t, alpha_bar, means, variance):
    """E[a | x_t] for an equal mixture of Gaussians of the same variance."""
    spread = (alpha_bar * variance + 1 - alpha_bar).sqrt()
    evidence = torch.stack([torch.distributions.Normal(alpha_bar.sqrt() * m, spread).log_prob(x_t) for m in means])
    each = torch.stack([gaussian_denoiser(x_t, alpha_bar, m, variance) for m in means])
    return (evidence.softmax(0) * each).sum(0)


def denoiser_error(means, variance, num_candidates, repeats=400):
    """Root mean squared error of issm_target, in one dimension, over noise levels and independent candidate sets."""
    anchor = torch.tensor(means).repeat(repeats)[:repeats][None, :, None]
    candidates, log_proposal = propose_actions(anchor, torch.tensor([0.3]), num_candidates // 2, num_candidates // 2)
    components = torch.stack([torch.distributions.Normal(m, variance**0.5).log_prob(candidates[..., 0]) for m in means])
    weights, _ = issm_weights(components.logsumexp(0), log_proposal, torch.ones(1))
    alpha_bar = torch.tensor([0.9, 0.5, 0.1])[None, :, None].expand(1, 3, repeats)
    mode = torch.tensor(means)[torch.randint(len(means), (1, 3, repeats))]
    spread = (alpha_bar * variance + 1 - alpha_bar).sqrt()
    x_t = alpha_bar.sqrt() * mode + spread * torch.randn(1, 3, repeats)
    estimate = issm_target(x_t[..., None], alpha_bar, candidates, weights)[..., 0]
    return (estimate - mixture_denoiser(x_t, alpha_bar, means, variance)).square().mean().sqrt().item()


@pytest.mark.parametrize("means", [[0.1], [-0.4, 0.4]], ids=["gaussian", "two modes"])
def test_target_converges_to_the_exact_denoiser(means):
    """The error falls as 1 / sqrt(M)."""
    sizes = [64, 256, 1024, 4096]
    errors = [denoiser_error(means, 0.12**2, size) for size in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.6 < slope < -0.4
    assert errors[-1] < 0.01


def test_target_is_exact_for_weighted_points():
    """Against the sum written out for one state, in two dimensions."""
    candidates, weights = torch.rand(1, 7, 1, 2) * 2 - 1, torch.rand(1, 7, 1).softmax(1)
    x_t, alpha_bar = torch.randn(1, 1, 1, 2), torch.tensor([[[0.3]]])
    likelihood = [math.exp(-((x_t - 0.3**0.5 * a) ** 2).sum() / (2 * 0.7)) for a in candidates[0, :, 0]]
    omega = weights[0, :, 0] * torch.tensor(likelihood)
    expected = (omega[:, None] * candidates[0, :, 0]).sum(0) / omega.sum()
    torch.testing.assert_close(issm_target(x_t, alpha_bar, candidates, weights)[0, 0, 0], expected)


# ---- the sampler


@pytest.mark.parametrize("num_steps, leak", [(5, 0.24), (10, 0.06), (20, 0.03)])
def test_sampling_with_the_exact_denoiser_gives_the_exact_policy(num_steps, leak):
    """Two modes at +-0.7 hold 98.4 %: as many samples on either, and the fewer off them the more steps there are."""
    grid = torch.linspace(-1, 1, 2001)
    log_density = (5 * torch.exp(-((grid.abs() - 0.7) ** 2) / 0.05)).log_softmax(0)
    alphas_bar, x_t = noise_schedule(num_steps), torch.randn(10_000, 1)
    for t in range(num_steps, 0, -1):
        alpha_bar = alphas_bar[t]
        posterior = (log_density - (x_t - alpha_bar.sqrt() * grid) ** 2 / (2 * (1 - alpha_bar))).softmax(1)
        v = (alpha_bar.sqrt() * x_t - posterior @ grid[:, None]) / (1 - alpha_bar).sqrt()
        mean, std = denoise_step(x_t, v, t, alphas_bar)
        x_t = mean + std * torch.randn_like(mean)
    shares = torch.stack([((x_t - mode).abs() < 0.3).float().mean() for mode in (-0.7, 0.7)])
    assert abs(1 - shares.sum().item() - leak) < 0.015
    assert (shares[0] - shares[1]).abs() < 0.03
