"""Both KL estimators, against sums over a vocabulary small enough to enumerate."""

import math

import pytest
import torch

from train_grpo import kl_term

ESTIMATORS = ("k3", "k3_inverse")


def distributions(seed: int, tokens: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy, and the log-probabilities of a reference, over a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, tokens, generator=generator, dtype=torch.float64) * 1.5
    return logits, other.log_softmax(0)


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


def chi_square(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return ((p - q) ** 2 / q).sum()


def exact_slope(d: float, estimator: str) -> float:
    """Derivative in log pi_theta of exp(d) - d - 1, `d` as that estimator defines it."""
    try:
        slope = math.exp(d) - 1
    except OverflowError:
        slope = math.inf
    return slope if estimator == "k3_inverse" else -slope


@pytest.mark.parametrize("seed", range(3))
def test_expectations_are_kl_and_chi_square_less_kl(seed):
    logits, ref = distributions(seed)
    pi = logits.softmax(0)
    kl = kl_divergence(pi, ref.exp())
    for estimator, expected in (("k3", kl), ("k3_inverse", chi_square(pi, ref.exp()) - kl)):
        expectation = (pi * kl_term(pi.log(), ref, estimator)).sum()
        torch.testing.assert_close(expectation, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_expected_gradients_are_forward_kls_and_half_chi_squares(seed):
    logits, ref = distributions(seed)
    leaf = logits.clone().requires_grad_(True)
    drawn = logits.softmax(0)  # how often each token is sampled: no gradient through it
    targets = {
        "k3": kl_divergence(ref.exp(), leaf.softmax(0)),
        "k3_inverse": chi_square(leaf.softmax(0), ref.exp()) / 2,
    }
    for estimator, target in targets.items():
        sampled = (drawn * kl_term(leaf.log_softmax(0), ref, estimator)).sum()
        [gradient], [expected] = (torch.autograd.grad(x, leaf) for x in (sampled, target))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_sample_is_negative(estimator, dtype):
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-9 + 11 * torch.rand(200_000, generator=generator, dtype=torch.float64))
    d = torch.cat([size, -size, torch.zeros(1)]).to(dtype)  # from 1e-9 to 100, both signs
    for zero in (torch.zeros_like(d), torch.full_like(d, -3.0)):
        assert kl_term(zero + d, zero, estimator).min() >= 0
    assert kl_term(torch.zeros_like(d), d, estimator).min() >= 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [-19.75, -3.0, -1 / 1024, 0.0, 1 / 1024, 0.75, 5.0, 19.75])
def test_value_and_gradient_are_the_formula_up_to_twenty(estimator, d, dtype):
    sign = 1 if estimator == "k3_inverse" else -1
    logprobs = torch.tensor(sign * d - 2.0, dtype=dtype, requires_grad=True)
    value = kl_term(logprobs, torch.tensor(-2.0, dtype=dtype), estimator)
    value.backward()
    # In float32 a slope near 1e-3 that is taken from 1 + 1e-3 keeps four digits.
    rel, digits = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 3e-7)
    assert value.item() == pytest.approx(math.exp(d) - d - 1, rel=rel, abs=digits)
    assert logprobs.grad.item() == pytest.approx(exact_slope(d, estimator), rel=rel, abs=digits)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("d", [20.5, 30.0, 100.0])
def test_beyond_twenty_the_value_continues_by_its_tangent(estimator, d):
    sign = 1 if estimator == "k3_inverse" else -1
    logprobs = torch.tensor(sign * d, dtype=torch.float64, requires_grad=True)
    value = kl_term(logprobs, torch.zeros((), dtype=torch.float64), estimator)
    value.backward()
    assert value.item() == pytest.approx(math.exp(20) * (1 + d - 20) - d - 1, rel=1e-12)
    assert logprobs.grad.item() == pytest.approx(sign * (math.exp(20) - 1), rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [-100.0, 100.0])
def test_far_away_value_and_gradient_are_finite_and_pull_back(estimator, dtype, d):
    far, near = torch.tensor([d - 1.0]).to(dtype), torch.tensor([-1.0]).to(dtype)
    # The policy is placed so that `d`, as the estimator defines it, is the one asked for.
    logprobs, ref = (far, near) if estimator == "k3_inverse" else (near, far)
    logprobs = logprobs.clone().requires_grad_(True)
    value = kl_term(logprobs, ref, estimator)
    value.sum().backward()
    assert value.isfinite().all() and value.item() > 50
    assert logprobs.grad.isfinite().all()
    assert math.copysign(1, logprobs.grad.item()) == math.copysign(1, exact_slope(d, estimator))
    assert abs(logprobs.grad.item()) > 0.9
