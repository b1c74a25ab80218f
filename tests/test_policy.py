"""Policy computes what one unpadded, uncached forward per sequence computes."""

from dataclasses import replace

import pytest
import torch
from small_models import (
    ATTENTION,
    CONFIGS,
    OTHERS,
    RECURRENT,
    Numbers,
    assert_same_gradients,
    gradients,
    left_padded,
    ragged_batch,
    random_ids,
    small_model,
    unpadded_logprobs,
)

from engine.policy import Policy, frozen_copy, token_logprobs
from train_grpo import rollout

PROMPTS = [random_ids(length, seed=length) for length in (1, 9, 4)]
LENGTHS = (6, 1, 3, 5, 1, 6)  # of two completions each
COMPLETIONS = [random_ids(length, seed=100 + i) for i, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_equal_unpadded_forwards(name):
    policy, batch = Policy(small_model(name)), ragged_batch(PROMPTS, COMPLETIONS)
    scored, expected = policy(batch), unpadded_logprobs(policy.model, batch)
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(policy.model, scored), gradients(policy.model, expected))


@pytest.mark.parametrize("name", [*ATTENTION, *OTHERS, *RECURRENT])
@torch.no_grad()
def test_logprobs_recorded_while_sampling_equal_unpadded_forwards(name):
    policy = Policy(small_model(name, eos_ids=list(range(2, 12))))
    generator = torch.Generator().manual_seed(1)
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 3, 6, generator)
    assert len(set(batch.mask.sum(dim=1).tolist())) > 2  # ragged
    expected = unpadded_logprobs(policy.model, batch)
    torch.testing.assert_close(batch.sampled_logprobs, expected, rtol=0, atol=1e-5)


def test_the_mask_alone_says_where_a_completion_ends():
    policy = Policy(small_model("gpt2", eos_ids=2))
    batch = ragged_batch(PROMPTS, [[2, 5, 2, 7], [2], [3, 4], [5, 2, 2], [6], [2, 2]])
    scored = policy(batch)
    over = batch.mask == 0
    assert (scored[over] == 0).all() and (scored[~over] < 0).all()
    batch.completion_ids[over] = 2
    assert torch.equal(policy(batch), scored)


def test_a_model_is_given_only_what_its_forward_takes():
    model = small_model("bloom")
    whole = model.forward

    def forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None):
        return whole(input_ids, past_key_values, attention_mask, use_cache=use_cache)

    model.forward = forward
    policy, batch = Policy(model), ragged_batch(PROMPTS, COMPLETIONS)
    expected = unpadded_logprobs(model, batch)
    torch.testing.assert_close(policy(batch), expected, rtol=0, atol=1e-5)


def test_token_logprobs_are_log_softmax_with_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(7, 50, generator=generator)).requires_grad_()
    rows, ids = torch.tensor([0, 0, 6, 3, 0]), torch.tensor([49, 0, 7, 7, 49])
    weights = torch.randn(5, generator=generator)
    found, expected = token_logprobs(logits, rows, ids), logits.log_softmax(dim=1)[rows, ids]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    [gradient] = torch.autograd.grad(found, logits, weights)
    [its] = torch.autograd.grad(expected, logits, weights)
    torch.testing.assert_close(gradient, its, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "lfm2"])
def test_bfloat16_computes_nearly_the_same_with_float32_gradients(name):
    exact, policy = (Policy(small_model(name), d) for d in (torch.float32, torch.bfloat16))
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    scored, expected = policy(batch), exact(batch)
    assert scored.dtype == torch.float32 and (scored - expected).abs().max() > 1e-3
    torch.testing.assert_close(scored, expected, rtol=0, atol=0.15)
    found, its = gradients(policy.model, scored), gradients(exact.model, expected)
    for weight, gradient in its.items():
        assert found[weight].dtype == torch.float32
        assert (found[weight] - gradient).norm() <= 0.1 * gradient.norm(), weight


def test_the_reference_equals_a_bfloat16_policy_bit_for_bit():
    policy = Policy(small_model("llama"), torch.bfloat16)
    reference, batch = frozen_copy(policy), ragged_batch(PROMPTS, COMPLETIONS)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(reference(batch), policy(batch))


def test_a_selection_holds_its_rows_trimmed_to_the_longest():
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    batch = replace(
        batch,
        sampled_logprobs=torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0)),
        truncated=torch.arange(6) == 2,
        texts=list("abcdef"),
    )
    part = batch[torch.tensor([2, 1])]  # of three tokens and one
    for name in ("prompt_ids", "prompt_mask", "truncated"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[2, 1]])
    for name in ("completion_ids", "mask", "sampled_logprobs"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[2, 1], :3])
    assert part.texts == ["c", "b"] and len(part) == 2


def test_a_plain_pass_takes_any_number_of_completions():
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    [(rows, part)] = Policy(small_model("llama")).micro_batches(batch)
    assert rows.tolist() == list(range(6)) and len(part) == 6
