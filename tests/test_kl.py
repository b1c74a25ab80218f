"""Both KL estimators, against sums over a vocabulary small enough to enumerate."""

import math

import pytest
import torch

from train_grpo import Config, grpo_loss, kl_term

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


def penalty_gradient(leaf, new, old, ref, chances, **settings) -> torch.Tensor:
    """The expected gradient in `leaf` of the loss's KL term, over completions that are enumerated.

    new, old, ref: log-probabilities (N, T) of all completions; chances (N,): how often each is
    sampled. Times T, because the loss takes the mean over tokens.
    """
    config, nothing = Config(beta=1.0, **settings), torch.zeros(1, dtype=new.dtype)
    losses = []
    for i in range(len(new)):
        row = slice(i, i + 1)
        mask = torch.ones_like(new[row])
        losses.append(grpo_loss(new[row], old[row], ref[row], nothing, mask, config)[0])
    total = new.shape[1] * (chances * torch.stack(losses)).sum()
    return torch.autograd.grad(total, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("seed", range(3))
def test_of_one_token_the_corrected_term_has_the_gradient_of_kl(seed, moved):
    logits, ref = distributions(seed)
    leaf = logits.clone().requires_grad_(True)
    drift = torch.linspace(-0.5, 0.7, 7, dtype=torch.float64) if moved else 0.0
    old = (logits + drift).log_softmax(0)
    columns = leaf.log_softmax(0)[:, None], old[:, None], ref[:, None]
    found = {
        (estimator, corrected): penalty_gradient(
            leaf, *columns, old.exp(), kl_estimator=estimator, kl_correction=corrected
        )
        for estimator in ESTIMATORS
        for corrected in (False, True)
    }
    pi = leaf.softmax(0)
    kl, chi2 = kl_divergence(pi, ref.exp()), chi_square(pi, ref.exp())
    [reverse] = torch.autograd.grad(kl, leaf, retain_graph=True)
    [other] = torch.autograd.grad(chi2 - kl, leaf)
    torch.testing.assert_close(found["k3", True], reverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["k3_inverse", True], other, rtol=1e-9, atol=1e-12)
    for estimator in ESTIMATORS:  # without the ratio neither has that gradient
        assert (found[estimator, False] - reverse).abs().max() > 0.02
    if not moved:
        forward = torch.autograd.grad(kl_divergence(ref.exp(), leaf.softmax(0)), leaf)[0]
        torch.testing.assert_close(found["k3", False], forward, rtol=1e-9, atol=1e-12)


def test_of_two_tokens_no_term_has_the_gradient_of_kl_between_sequences():
    # Logits of token 1 first, after a 0, after a 1: all there is to completions of two bits.
    leaf = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-0.4, 0.6, 1.1], dtype=torch.float64)
    moved = torch.tensor([0.7, -0.2, 0.1], dtype=torch.float64)

    def both(logits) -> torch.Tensor:
        """Log-probabilities (4, 2) of 00, 01, 10, 11."""
        off, on = torch.nn.functional.logsigmoid(torch.stack([-logits, logits]))
        rows = [[off[0], off[1]], [off[0], on[1]], [on[0], off[2]], [on[0], on[2]]]
        return torch.stack([torch.stack(row) for row in rows])

    new, theirs = both(leaf), both(ref)
    sequences = (new.sum(1).exp() * (new - theirs).sum(1)).sum()
    [whole] = torch.autograd.grad(sequences, leaf, retain_graph=True)
    for old in (both(leaf.detach()), both(moved)):
        chances = old.sum(1).exp()
        found = penalty_gradient(
            leaf, new, old, theirs, chances, kl_estimator="k3", kl_correction=True
        )
        # What it is: the gradient of each token's KL, over the prefixes of the old policy.
        first = (new[:, 0].exp() * (new - theirs)[:, 0])[[0, 2]].sum()
        given = [(new[i : i + 2, 1].exp() * (new - theirs)[i : i + 2, 1]).sum() for i in (0, 2)]
        prefixes = chances.view(2, 2).sum(1)
        tokens = first + (prefixes * torch.stack(given)).sum()
        [expected] = torch.autograd.grad(tokens, leaf, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert (found - whole).abs().max() > 0.02
        for estimator in ESTIMATORS:
            plain = penalty_gradient(leaf, new, old, theirs, chances, kl_estimator=estimator)
            assert (plain - whole).abs().max() > 0.02


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
