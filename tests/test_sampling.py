"""The rollout samples from the model it is given, records what it did, and masks what is over."""

import itertools
import math
from collections import Counter

import pytest
import torch
from small_models import (
    Numbers,
    left_padded,
    random_ids,
    sequences,
    small_model,
)

from engine.policy import Policy, sample_tokens
from engine.tree import TreePolicy
from train_grpo import rollout

PROMPTS = [random_ids(length, seed=length) for length in (3, 9, 12)]
BOTH = pytest.mark.parametrize("kind", [Policy, TreePolicy])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Policy, "gpt2"), (Policy, "lfm2"), (TreePolicy, "llama"), (TreePolicy, "gemma3")],
)
def test_greedy_rollout_equals_generate_token_for_token(kind, name):
    policy = kind(small_model(name))
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}

    def generate(prompt: list[int], **more) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = policy.model.generate(ids, attention_mask=mask, **options, **more)[0]
        return whole[len(prompt) :].tolist()

    end = generate(PROMPTS[0])[3]  # an end token that the first prompt is sure to meet early
    policy.model.generation_config.eos_token_id = end
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 2, 10, temperature=0)
    for prompt, completion in sequences(batch):
        assert completion == generate(prompt, eos_token_id=end)
    assert batch.mask[0].sum() <= 4


@torch.no_grad()
def exact_distribution(model, prompt, end: int, steps: int, temperature: float) -> dict:
    """Probability of every possible completion: those that end, and those that are truncated."""
    longest = list(itertools.product(range(model.config.vocab_size), repeat=steps))
    ids = torch.tensor([[*prompt, *completion] for completion in longest])
    chances = (model(input_ids=ids).logits.double() / temperature).softmax(dim=2)
    outcomes = {}
    for completion, row in zip(longest, chances[:, len(prompt) - 1 :].tolist(), strict=True):
        length = completion.index(end) + 1 if end in completion else steps
        outcomes[completion[:length]] = math.prod(row[t][completion[t]] for t in range(length))
    assert sum(outcomes.values()) == pytest.approx(1)
    return outcomes


def deviations(counts: Counter, probabilities: dict, samples: int) -> float:
    """How far counts are from what is expected, in standard deviations of chi-square."""
    pairs = [(counts[k], samples * p) for k, p in probabilities.items() if samples * p > 5]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    return (statistic - len(pairs)) / (2 * len(pairs)) ** 0.5


@pytest.mark.parametrize(("kind", "temperature"), [(Policy, 1.0), (TreePolicy, 0.5)])
def test_sampled_frequencies_fit_the_distribution_of_the_model(kind, temperature):
    end, steps, samples = 2, 3, 16_000
    prompts = [random_ids(length, seed=length, vocabulary=5) for length in (2, 7)]
    policy = kind(small_model("gpt2", eos_ids=end, vocabulary=5))
    batch = rollout(policy, Numbers(), left_padded(prompts), samples, steps, seeded(0), temperature)
    completions = [tuple(completion) for _, completion in sequences(batch)]
    for i, prompt in enumerate(prompts):
        counts = Counter(completions[i * samples : (i + 1) * samples])
        exact = exact_distribution(policy.model, prompt, end, steps, temperature)
        assert counts.keys() <= exact.keys() and deviations(counts, exact, samples) < 4
        # The same test has the power to tell a slightly wrong temperature.
        warmer = exact_distribution(policy.model, prompt, end, steps, 1.15 * temperature)
        assert deviations(counts, warmer, samples) > 4


@pytest.mark.parametrize("pad", [0, 2], ids=["own pad", "pad is end"])
@pytest.mark.parametrize("eos_ids", [2, [2], [2, 5, 7], None], ids=str)
@BOTH
def test_mask_holds_the_end_token_and_nothing_after_it(kind, eos_ids, pad):
    # The chat itself holds end tokens, as those of many models do after each turn.
    prompts = [[3, 2], [4, 2, 6, 3, 2, 7, 4]]
    policy = kind(small_model("gpt2", seed=3, eos_ids=eos_ids, vocabulary=8))
    ends = {2, 5, 7} if eos_ids == [2, 5, 7] else {2}  # the tokenizer's if the model has none
    batch = rollout(policy, Numbers(2), left_padded(prompts, pad), 32, 8, seeded(2))
    lengths = []
    for i, ids in enumerate(batch.completion_ids.tolist()):
        length = next((t + 1 for t, token in enumerate(ids) if token in ends), len(ids))
        assert batch.mask[i].tolist() == [1.0] * length + [0.0] * (len(ids) - length)
        assert batch.truncated[i] == (ids[length - 1] not in ends)
        assert batch.texts[i] == " ".join(str(token) for token in ids[:length] if token not in ends)
        assert (batch.sampled_logprobs[i, length:] == 0).all()
        lengths.append(length)
    assert min(lengths) == 1 and len(set(lengths)) > 3  # some end at once, the rest are ragged
    assert 0 < batch.truncated.sum() < 64


@BOTH
def test_sampling_stops_with_the_last_completion(kind):
    policy = kind(small_model("llama", eos_ids=list(range(1, 8)), vocabulary=8))
    batch = rollout(policy, Numbers(), left_padded([[3, 4], [5]]), 4, 50, seeded(0))
    assert batch.completion_ids.shape[1] == batch.mask.sum(dim=1).max() < 50


def test_the_generator_alone_decides_what_is_sampled():
    policy = TreePolicy(small_model("llama", eos_ids=2))
    sampled = []
    for noise, seed in itertools.product((0, 1), (3, 4)):
        torch.manual_seed(noise)  # the global generator, which must not matter
        batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(seed))
        sampled.append(batch.completion_ids)
    assert torch.equal(sampled[0], sampled[2]) and torch.equal(sampled[1], sampled[3])
    assert not torch.equal(sampled[0][:, :3], sampled[1][:, :3])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_sampled_token_is_where_its_uniform_number_falls(temperature):
    logits = torch.randn(9, 7, generator=seeded(5)) * temperature
    logits[:4, [0, 3, 6]] = -torch.inf
    rows = torch.randint(9, (2000,), generator=seeded(7))
    probabilities = (logits.double() / temperature).softmax(dim=1).tolist()
    uniform = torch.rand(2000, dtype=torch.double, generator=seeded(6)).tolist()
    expected = []
    for row, at in zip(rows.tolist(), uniform, strict=True):
        sums = itertools.accumulate(probabilities[row])
        expected.append(next(i for i, total in enumerate(sums) if at < total))
    token, logprob = sample_tokens(logits, rows, temperature, seeded(6))
    assert torch.equal(token, torch.tensor(expected)) and set(expected) == set(range(7))
    torch.testing.assert_close(logprob, logits.log_softmax(dim=1)[rows, token])


def test_greedy_and_sampled_rows_stand_side_by_side():
    logits, rows = torch.randn(9, 7, generator=seeded(5)).round(), torch.arange(200) % 9
    first = torch.tensor([row.index(max(row)) for row in logits.tolist()])  # of equal logits
    greedy = torch.arange(200) % 3 == 0
    token, logprob = sample_tokens(logits, rows, 0.5, seeded(6), greedy)
    drawn, _ = sample_tokens(logits, rows, 0.5, seeded(6))
    assert torch.equal(token, drawn.where(~greedy, first[rows]))
    torch.testing.assert_close(logprob, logits.log_softmax(dim=1)[rows, token])


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 1e-9, 3)])
def test_uniform_numbers_at_the_ends_draw_possible_tokens(monkeypatch, uniform, token):
    drawn = torch.full((50,), uniform, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda count, **options: drawn)
    logits = torch.randn(50, 5, generator=seeded(0))
    logits[:, [0, 4]] = -torch.inf
    assert sample_tokens(logits, torch.arange(50), 1.0, None)[0].tolist() == [token] * 50


def test_draws_are_exact_in_a_large_vocabulary():
    token, _ = sample_tokens(torch.zeros(2, 200_000), torch.arange(400) % 2, 1.0, seeded(0))
    uniform = torch.rand(400, dtype=torch.double, generator=seeded(0))
    assert torch.equal(token, (uniform * 200_000).long())


@BOTH
def test_weights_that_are_nan_crash_no_sampling(kind):
    policy = kind(small_model("llama"))
    for parameter in policy.parameters():
        parameter.data.fill_(torch.nan)  # as weights that have exploded
    for temperature in (1.0, 0.5, 0.0):
        batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(1), temperature)
        assert batch.completion_ids.max() < policy.model.config.vocab_size


@BOTH
def test_greedy_rows_are_those_of_a_greedy_rollout(kind):
    policy, prompts = kind(small_model("llama", eos_ids=list(range(2, 12)))), left_padded(PROMPTS)
    greedy = torch.tensor([True, False, False] * len(PROMPTS))
    if kind is TreePolicy:
        policy.max_sampled = 4 * 6  # in parts
    mixed = rollout(policy, Numbers(), prompts, 3, 6, seeded(1), 0.7, greedy)
    sampled = rollout(policy, Numbers(), prompts, 3, 6, seeded(1), 0.7)
    likeliest = rollout(policy, Numbers(), prompts, 3, 6, temperature=0.0)
    assert mixed.texts[::3] == likeliest.texts[::3] != sampled.texts[::3]
    assert mixed.texts[1] == sampled.texts[1] != likeliest.texts[1]


@BOTH
def test_the_temperature_is_1_unless_given(kind):
    policy, prompts = kind(small_model("llama")), left_padded(PROMPTS)
    expected = rollout(policy, Numbers(), prompts, 1, 6, seeded(1), 1.0).completion_ids
    found = rollout(policy, Numbers(), prompts, 1, 6, seeded(1)).completion_ids
    assert torch.equal(found, expected)
    assert torch.equal(policy.sample(*prompts, 6, torch.tensor([2]), seeded(1))[0], expected)


def test_texts_keep_special_tokens_and_spaces():
    class Untidy(Numbers):
        def batch_decode(self, rows, skip_special_tokens=True, clean_up_tokenization_spaces=True):
            assert skip_special_tokens is False and clean_up_tokenization_spaces is False
            return super().batch_decode(rows)

    assert rollout(Policy(small_model("llama")), Untidy(), left_padded(PROMPTS), 1, 2).texts


def test_sampling_makes_tensors_on_the_device_of_the_model(monkeypatch):
    """`meta` stands for a GPU: tensors made on the default device cannot meet the others."""
    uniform = torch.linspace(0, 0.9, 6, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda count, **options: uniform)
    policy, prompts = Policy(small_model("llama")), left_padded(PROMPTS)
    expected = rollout(policy, Numbers(), prompts, 2, 4)
    with torch.device("meta"):
        found = rollout(policy, Numbers(), prompts, 2, 4)
    assert torch.equal(found.completion_ids, expected.completion_ids)
