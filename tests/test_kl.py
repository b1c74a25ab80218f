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


@pytest.mark.parametrize("seed", range(3))
def test_expectations_are_kl_and_chi_square_less_kl(seed):
    logits, ref = distributions(seed)
    pi = logits.softmax(0)
    kl = kl_divergence(pi, ref.exp())
    for estimator, expected in (("k3", kl), ("k3_inverse", chi_square(pi, ref.exp()) - kl)):
        expectation = (pi * kl_term(pi.log(), ref, estimator)).sum()
        torch.testing.assert_close(expectation, expected, rtol=1e-10, atol=0)


def penalty_gradient(leaf, new, old, ref, chances, **settings) -> torch.Tensor:
    """The expected gradient in `leaf` of the loss's KL term, over completions that are enumerated.

    new, old, ref: log-probabilities (N, T) of all completions; chances (N,): how often each is
    sampled. These weigh the tokens where the loss has its mask.
    """
    nothing, weights = torch.zeros_like(chances), chances[:, None].expand_as(new)
    loss, _ = grpo_loss(new, old, ref, nothing, weights, Config(beta=1.0, **settings), length=1.0)
    return torch.autograd.grad(len(new) * loss, leaf, retain_graph=True)[0]


@pytest.mark.parametrize("moved", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("seed", range(3))
def test_of_one_token_each_term_has_its_divergences_gradient(seed, moved):
    logits, ref = distributions(seed)
    leaf = logits.clone().requires_grad_(True)
    drift = torch.linspace(-0.5, 0.7, 7, dtype=torch.float64) if moved else 0.0
    old = (logits + drift).log_softmax(0)
    inputs = leaf, leaf.log_softmax(0)[:, None], old[:, None], ref[:, None], old.exp()
    pi, q = leaf.softmax(0), ref.exp()
    kl, chi2 = kl_divergence(pi, q), chi_square(pi, q)
    targets = {
        ("k3", True): kl,
        ("k3_inverse", True): chi2 - kl,
        ("k3", False): kl_divergence(q, pi),
        ("k3_inverse", False): chi2 / 2,
    }
    [reverse] = torch.autograd.grad(kl, leaf, retain_graph=True)
    for (estimator, corrected), target in targets.items():
        settings = {"kl_estimator": estimator, "kl_correction": corrected}
        found = penalty_gradient(*inputs, **settings)
        if corrected or not moved:
            [expected] = torch.autograd.grad(target, leaf, retain_graph=True)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        if not corrected:
            assert (found - reverse).abs().max() > 0.02


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
    divergence = new - theirs
    sequences = (new.sum(1).exp() * divergence.sum(1)).sum()
    [whole] = torch.autograd.grad(sequences, leaf, retain_graph=True)
    for old in (both(leaf.detach()), both(moved)):
        chances = old.sum(1).exp()
        inputs = leaf, new, old, theirs, chances
        found = penalty_gradient(*inputs, kl_estimator="k3", kl_correction=True)
        # What it is: the gradient of each token's KL, over the prefixes of the old policy.
        first, second = (new.exp() * divergence).T
        prefixes = chances.view(2, 2).sum(1)
        tokens = first[[0, 2]].sum() + (prefixes * second.view(2, 2).sum(1)).sum()
        [expected] = torch.autograd.grad(tokens, leaf, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        plain = [penalty_gradient(*inputs, kl_estimator=estimator) for estimator in ESTIMATORS]
        assert all((x - whole).abs().max() > 0.02 for x in (found, *plain))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_sample_is_negative(estimator, dtype):
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (-9 + 11 * torch.rand(200_000, generator=generator, dtype=torch.float64))
    d = torch.cat([size, -size, torch.zeros(1)]).to(dtype)  # from 1e-9 to 100, both signs
    for zero in (torch.zeros_like(d), torch.full_like(d, -3.0)):
        assert kl_term(zero + d, zero, estimator).min() >= 0
    assert kl_term(torch.zeros_like(d), d, estimator).min() >= 0


# By type: relative and absolute error of a formula with exp(d) - 1.
ROUNDING = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 3e-7),
    torch.bfloat16: (0.01, 0.01),
}
DISTANCES = (-100.0, -19.75, -3.0, -1 / 1024, 0.0, 1 / 1024, 0.75, 5.0, 19.75, 20.5, 30.0, 100.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("d", DISTANCES)
def test_value_and_gradient_continue_by_a_tangent_beyond_twenty(estimator, d, dtype):
    sign = 1 if estimator == "k3_inverse" else -1
    logprobs = torch.tensor(sign * d, dtype=dtype, requires_grad=True)
    value = kl_term(logprobs, torch.zeros((), dtype=dtype), estimator)
    value.backward()
    steep = math.exp(min(d, 20))
    expected = steep * (1 + max(d - 20, 0)) - d - 1, sign * (steep - 1)
    relative, absolute = ROUNDING[dtype]
    found = value.item(), logprobs.grad.item()
    assert found == pytest.approx(expected, rel=relative, abs=absolute)
