"""The shared-prefix forward is the naive forward: same log-probabilities, same gradients."""

import math

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    Recorder,
    left_padded,
    naive_logprobs,
    nearby,
    ragged_batch,
    random_ids,
    small_model,
)
from transformers import AutoModelForCausalLM, Lfm2Config, Mamba2Config, MambaConfig

import policy as policy_module
import train_grpo
from checkpoint import StopRequest
from cli import UserError
from policy import Policy, check_shared_prefix, token_logprobs
from train_grpo import Config, update_policy

BEGINNING = random_ids(5, seed=5)
PROMPTS = [BEGINNING + random_ids(length, seed=length) for length in (1, 9, 7)]
LENGTHS = (7, 1, 4, 6, 1, 1, 1, 1, 2, 7, 3, 1)  # of four completions each; 1: stopped at once
COMPLETIONS = [random_ids(length, seed=100 + i) for i, length in enumerate(LENGTHS)]


def naive(model, prompts, completions) -> list[torch.Tensor]:
    """Log-probabilities of each completion, each from a forward over its own whole sequence."""
    group = len(completions) // len(prompts)
    return [naive_logprobs(model, prompts[i // group], c) for i, c in enumerate(completions)]


def assert_same_logprobs(policy: Policy, prompts, completions) -> None:
    batch = ragged_batch(prompts, completions)
    shared = policy(batch.prompt_ids, batch.prompt_mask, batch.completion_ids)
    assert shared.shape == batch.mask.shape
    for row, expected in zip(shared, naive(policy.model, prompts, completions), strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["prompts apart", "beginning shared"])
def beginning_shared(request, monkeypatch) -> bool:
    """Whether what the prompts begin with is read once for all of them."""
    if not request.param:
        monkeypatch.setattr(policy_module, "common_beginning", lambda *_: 0)
    return request.param


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_is_read_in_one_row_in_which_no_beginning_and_no_prompt_stands_twice(
    name, beginning_shared
):
    policy, batch = Policy(small_model(name)), ragged_batch(PROMPTS, COMPLETIONS)
    shapes = []
    policy.model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    policy(batch.prompt_ids, batch.prompt_mask, batch.completion_ids)
    prompts = len(BEGINNING) + 3 * 9 if beginning_shared else 3 * 14
    assert shapes == [(1, prompts + 12 * 6)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prefix_scores_ragged_completions_like_whole_sequences(name, beginning_shared):
    assert_same_logprobs(Policy(small_model(name)), PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_on_a_cpu_attends_as_the_model_itself_does(name):
    policy, batch = Policy(small_model(name), torch.bfloat16), ragged_batch(PROMPTS, COMPLETIONS)
    inputs = batch.prompt_ids, batch.prompt_mask, batch.completion_ids
    mine = policy(*inputs)
    grouped = "grouped" in policy.model.config._attn_implementation
    assert grouped == (name != "gemma2")  # which asks for its own eager one
    policy.compute_dtype = torch.float32
    exact, eager = policy(*inputs), small_model(name)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(exact, Policy(eager)(*inputs), rtol=0, atol=1e-5)
    assert (mine - exact)[batch.mask.bool()].abs().max() < 0.1
    assert exact.dtype == mine.dtype == torch.float32 and not torch.equal(mine, exact)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prefix_scores_completions_that_all_stop_at_once(name, beginning_shared):
    at_once = [completion[:1] for completion in COMPLETIONS]
    assert_same_logprobs(Policy(small_model(name)), PROMPTS, at_once)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_follows_the_end_of_a_completion_changes_nothing_before_it(name):
    policy = Policy(small_model(name))
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    scored = policy(batch.prompt_ids, batch.prompt_mask, batch.completion_ids)
    over = batch.mask == 0
    batch.completion_ids[over] = 63 - batch.completion_ids[over]
    again = policy(batch.prompt_ids, batch.prompt_mask, batch.completion_ids)
    assert not torch.equal(again[over], scored[over])
    torch.testing.assert_close(again[~over], scored[~over], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_log_probabilities_in_pieces_and_their_gradient_are_those_of_log_softmax(
    rows, dtype, monkeypatch
):
    monkeypatch.setattr(policy_module, "PIECE", rows * 50)
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn(7, 50, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(0, 50, (7, 4), generator=generator)
    ids[:, 3] = ids[:, 0]  # two completions of a group may begin alike
    pull = torch.randn(7, 4, generator=generator)
    mine, plain = token_logprobs(logits, ids), logits.float().log_softmax(dim=1).gather(1, ids)
    assert torch.equal(mine, plain)
    [expected] = torch.autograd.grad(plain, logits, pull)
    [gradient] = torch.autograd.grad(mine, logits, pull)
    assert gradient.dtype == dtype
    exact = {"rtol": 0, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.01, "atol": 1e-6}
    torch.testing.assert_close(gradient, expected, **exact)


def naive_gradients(policy, reference, advantages, config) -> dict[str, torch.Tensor]:
    """Gradient of the first update's loss, its factor for each token worked out by hand."""
    policy.zero_grad()
    scores = naive(policy.model, PROMPTS, COMPLETIONS)
    with torch.no_grad():
        references = naive(reference.model, PROMPTS, COMPLETIONS)
    total = 0.0
    for mine, its, advantage in zip(scores, references, advantages.tolist(), strict=True):
        for token in range(len(mine)):
            log_ratio = mine[token].item() - its[token].item()
            pull = math.exp(log_ratio) - 1  # derivative of exp(d) - d - 1
            factor = -(advantage - config.beta * pull) / len(mine) / len(scores)
            total = total + factor * mine[token]
    total.backward()
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.zero_grad()
    return gradients


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_equal_those_of_whole_sequences_in_any_micro_batches(name, beginning_shared):
    policy = Policy(small_model(name))
    reference = nearby(policy)
    advantages = torch.randn(len(COMPLETIONS), generator=torch.Generator().manual_seed(1))
    settings = {"num_generations": 4, "num_inner_updates": 1, "beta": 0.5, "clip_grad_norm": 1e9}
    expected = naive_gradients(policy, reference, advantages, Config(**settings))
    for size in (0, 1, 2, 4, 8):  # the last leaves a smaller rest
        config, recorder = Config(**settings, micro_batch_size=size), Recorder(policy)
        batch = ragged_batch(PROMPTS, COMPLETIONS)
        update_policy(policy, reference, recorder, batch, advantages, config)
        assert recorder.gradients.keys() == expected.keys()
        for parameter, gradient in recorder.gradients.items():
            error = (gradient - expected[parameter]).norm() / expected[parameter].norm()
            assert error <= 1e-4, f"{parameter}, micro-batches of {size}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_start_up_comparison_accepts_an_architecture_that_shares(name):
    check_shared_prefix(Policy(small_model(name)), *left_padded(PROMPTS))


RECURRENT = {
    "mamba": MambaConfig(vocab_size=111, hidden_size=32, num_hidden_layers=2, state_size=4),
    "mamba2": Mamba2Config(
        vocab_size=111, hidden_size=32, num_hidden_layers=2, state_size=4, num_heads=8, head_dim=8
    ),
    "lfm2": Lfm2Config(
        vocab_size=111,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_the_start_up_comparison_refuses_a_model_with_layers_that_do_not_attend(name):
    policy = Policy(AutoModelForCausalLM.from_config(RECURRENT[name]))
    with pytest.raises(UserError, match=f"a model of type {name} cannot be used here"):
        check_shared_prefix(policy, *left_padded(PROMPTS))


@pytest.mark.parametrize("ignored", ["position_ids", "context"])
def test_the_start_up_comparison_refuses_a_model_that_ignores_what_it_is_told(ignored):
    policy = Policy(small_model("gpt2"))
    forward = policy.model.forward

    def deaf(**inputs):
        return forward(**{name: value for name, value in inputs.items() if name != ignored})

    policy.model.forward = deaf
    with pytest.raises(UserError, match="a model of type gpt2 cannot be used here"):
        check_shared_prefix(policy, *left_padded(PROMPTS))


def test_the_start_up_comparison_refuses_a_window_that_it_is_not_told_of():
    policy = Policy(small_model("llama"))
    check_shared_prefix(policy, *left_padded(PROMPTS))
    policy.model.config.sliding_window = 1000  # far longer than what is compared
    with pytest.raises(UserError, match="which of its layers see how far"):
        check_shared_prefix(policy, *left_padded(PROMPTS))


def test_a_model_that_makes_its_own_mask_or_attends_elsewhere_is_refused_when_it_reads():
    policy = Policy(small_model("llama"))
    forward = policy.model.forward
    policy.model.forward = lambda attention_mask, **inputs: forward(**inputs)
    with pytest.raises(ValueError, match="an attention mask of its own"):
        policy.encode(*left_padded(PROMPTS), 1)
    policy.model.forward = lambda context, **inputs: forward(**inputs)
    with pytest.raises(UserError, match="a model of type llama cannot be used here"):
        policy.encode(*left_padded(PROMPTS), 1)


def test_the_start_up_comparison_comes_before_training(tiny, monkeypatch, tmp_path):
    unfit = AutoModelForCausalLM.from_config(RECURRENT["mamba"])
    monkeypatch.setattr(train_grpo, "load_model", lambda name, device: (unfit, tiny[1]))
    monkeypatch.setattr(train_grpo, "rollout", lambda *_: pytest.fail("sampled first"))
    with pytest.raises(UserError, match="choose another model"), StopRequest() as stop:
        train_grpo.train(Config(device="cpu", output_dir=str(tmp_path)), stop)
    assert not list(tmp_path.iterdir())
