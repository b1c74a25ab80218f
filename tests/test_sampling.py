"""The rollout samples from the model it is given, records what it did, and masks what is over."""

import itertools

import pytest
import torch
from small_models import (
    ARCHITECTURES,
    Numbers,
    Recorder,
    left_padded,
    naive_logprobs,
    random_ids,
    small_model,
)

import train_grpo
from policy import Policy, draw
from train_grpo import Config, rollout, update_policy

PROMPTS = [random_ids(length, seed=length) for length in (3, 9, 12)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_rollout_equals_generate_token_for_token(name):
    policy = Policy(small_model(name))
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}

    def generate(prompt: list[int], **more) -> list[int]:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        return policy.model.generate(ids, attention_mask=mask, **options, **more)[0].tolist()

    # An end token that the first prompt is sure to meet early.
    end = generate(PROMPTS[0])[len(PROMPTS[0]) + 3]
    policy.model.generation_config.eos_token_id = end
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 2, 10, temperature=0)
    for i, (ids, mask) in enumerate(zip(batch.completion_ids, batch.mask.bool(), strict=True)):
        prompt = PROMPTS[i // 2]
        assert ids[mask].tolist() == generate(prompt, eos_token_id=end)[len(prompt) :]
    assert batch.mask[0].sum() <= 4


def exact_distribution(model, prompt, end: int, steps: int, temperature: float = 1.0):
    """Probability of every completion that can be: those that end, and those cut off."""
    vocabulary = model.config.vocab_size
    outcomes = {}

    def extend(completion: tuple[int, ...], probability: float) -> None:
        if len(completion) == steps or (completion and completion[-1] == end):
            outcomes[completion] = probability
            return
        logits = model(input_ids=torch.tensor([prompt + list(completion)])).logits[0, -1]
        next_token = (logits.double() / temperature).softmax(0).tolist()
        for token in range(vocabulary):
            extend((*completion, token), probability * next_token[token])

    with torch.no_grad():
        extend((), 1.0)
    assert abs(sum(outcomes.values()) - 1) < 1e-9
    return outcomes


def chi_square_p_value(counts: dict, probabilities: dict, draws: int) -> float:
    """How likely counts at least this far from the probabilities are; rare outcomes pooled."""
    assert counts.keys() <= probabilities.keys()
    pairs = [(counts.get(k, 0), draws * p) for k, p in probabilities.items()]
    rare = [pair for pair in pairs if pair[1] < 5]
    bins = [pair for pair in pairs if pair[1] >= 5]
    bins += [tuple(map(sum, zip(*rare, strict=True)))] if rare else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in bins)
    half = torch.tensor([(len(bins) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(*half).item()


def test_sampled_frequencies_fit_the_distribution_of_the_model():
    end, steps, draws = 2, 3, 4000
    prompts = [random_ids(length, seed=length, vocabulary=5) for length in (2, 7)]
    policy = Policy(small_model("gpt2", end_ids=end, vocabulary=5))
    batch = rollout(policy, Numbers(), left_padded(prompts), draws, steps, seeded(0))
    for i, prompt in enumerate(prompts):
        rows = range(i * draws, (i + 1) * draws)
        drawn = [tuple(batch.completion_ids[r][batch.mask[r] == 1].tolist()) for r in rows]
        counts = {outcome: drawn.count(outcome) for outcome in set(drawn)}
        exact = exact_distribution(policy.model, prompt, end, steps)
        assert chi_square_p_value(counts, exact, draws) > 1e-3
        # The same test has the power to tell a slightly wrong temperature.
        warmer = exact_distribution(policy.model, prompt, end, steps, temperature=1.15)
        assert chi_square_p_value(counts, warmer, draws) < 1e-3


def test_temperature_divides_the_logits():
    end, draws = 2, 4000
    prompt = random_ids(4, seed=4, vocabulary=5)
    policy = Policy(small_model("llama", end_ids=end, vocabulary=5))
    batch = rollout(policy, Numbers(), left_padded([prompt]), draws, 2, seeded(0), temperature=0.5)
    drawn = [
        tuple(ids[mask == 1].tolist())
        for ids, mask in zip(batch.completion_ids, batch.mask, strict=True)
    ]
    counts = {outcome: drawn.count(outcome) for outcome in set(drawn)}
    exact = exact_distribution(policy.model, prompt, end, 2, temperature=0.5)
    assert chi_square_p_value(counts, exact, draws) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_recorded_while_sampling_are_those_of_the_first_update(name, monkeypatch):
    policy = Policy(small_model(name, end_ids=[2, 5, 9, 13, 17]))
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(1))
    used, real_loss = [], train_grpo.grpo_loss

    def spy(logprobs, old_logprobs, *rest):
        used.append((logprobs.detach().clone(), old_logprobs.clone()))
        return real_loss(logprobs, old_logprobs, *rest)

    monkeypatch.setattr(train_grpo, "grpo_loss", spy)
    config = Config(num_generations=4, num_inner_updates=1)
    metrics = update_policy(policy, policy, Recorder(policy), batch, torch.ones(12), config)
    [(logprobs, old_logprobs)] = used
    assert torch.equal(logprobs, old_logprobs)
    spoken = batch.mask == 1
    torch.testing.assert_close(batch.logprobs[spoken], old_logprobs[spoken], rtol=0, atol=1e-5)
    gap = (batch.logprobs - old_logprobs)[spoken].abs().max().item()
    assert metrics["sampling_gap"] == gap
    for i in range(12):
        completion = batch.completion_ids[i][spoken[i]].tolist()
        expected = naive_logprobs(policy.model, PROMPTS[i // 4], completion)
        torch.testing.assert_close(batch.logprobs[i][spoken[i]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("within", "expected"), [(1, 0.5), (0, 0.0)])
def test_sampling_gap_shows_a_wrong_record_but_not_what_follows_the_end(within, expected):
    policy = Policy(small_model("llama", end_ids=[2, 5, 9, 13, 17]))
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(1))
    row, token = (batch.mask == within).nonzero()[-1].tolist()
    batch.logprobs[row, token] += 0.5
    config = Config(num_generations=4, num_inner_updates=1)
    metrics = update_policy(policy, policy, Recorder(policy), batch, torch.ones(12), config)
    assert metrics["sampling_gap"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("pad", [0, 2], ids=["own pad", "pad is end"])
@pytest.mark.parametrize("end_ids", [2, [2], [2, 5, 7], None], ids=str)
def test_mask_holds_the_end_token_and_nothing_after_it(end_ids, pad):
    # The chat itself holds end tokens, as those of many models do after each turn.
    prompts = [[3, 2], [4, 2, 6, 3, 2, 7, 4]]
    policy = Policy(small_model("gpt2", seed=3, end_ids=end_ids, vocabulary=8))
    ends = {2, 5, 7} if end_ids == [2, 5, 7] else {2}  # the tokenizer's where the model has none
    batch = rollout(policy, Numbers(2), left_padded(prompts, pad), 32, 8, seeded(2))
    lengths = []
    for i, ids in enumerate(batch.completion_ids.tolist()):
        length = next((t + 1 for t, token in enumerate(ids) if token in ends), len(ids))
        assert batch.mask[i].tolist() == [1.0] * length + [0.0] * (len(ids) - length)
        spoken = [token for token in ids[:length] if token not in ends]
        assert batch.texts[i] == " ".join(map(str, spoken))
        expected = naive_logprobs(policy.model, prompts[i // 32], ids[:length])
        torch.testing.assert_close(batch.logprobs[i][:length], expected, rtol=0, atol=1e-5)
        lengths.append(length)
    assert min(lengths) == 1 and len(set(lengths)) > 3  # some stop at once, the rest are ragged


def test_sampling_stops_with_the_last_completion():
    policy = Policy(small_model("llama", end_ids=list(range(1, 8)), vocabulary=8))
    batch = rollout(policy, Numbers(), left_padded([[3, 4], [5]]), 4, 50, seeded(0))
    assert batch.completion_ids.shape[1] == batch.mask.sum(dim=1).max() < 50


def test_the_generator_alone_decides_what_is_drawn():
    policy = Policy(small_model("llama", end_ids=2))
    draws = []
    for noise, seed in itertools.product((0, 1), (3, 4)):
        torch.manual_seed(noise)  # the global generator, which must not matter
        batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(seed))
        draws.append(batch.completion_ids)
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0][:, :3], draws[1][:, :3])


def test_a_draw_takes_what_a_uniform_number_falls_on_and_nothing_impossible():
    generator = seeded(5)
    probabilities = torch.rand(2000, 7, generator=generator).softmax(dim=1)
    probabilities[:, [0, 3, 6]] = 0
    uniform = torch.rand(2000, 1, dtype=torch.double, generator=seeded(6))
    expected = []
    for row, at in zip(probabilities.double().tolist(), uniform[:, 0].tolist(), strict=True):
        sums = itertools.accumulate(row)
        expected.append(next(i for i, total in enumerate(sums) if at * sum(row) < total))
    drawn = draw(probabilities, seeded(6))
    assert drawn.tolist() == [[index] for index in expected] and set(expected) == {1, 2, 4, 5}


def test_a_draw_from_what_is_no_number_is_a_token_all_the_same():
    assert draw(torch.full((3, 5), torch.nan), seeded(0)).tolist() == [[4]] * 3
    policy = Policy(small_model("llama"))
    for parameter in policy.parameters():
        parameter.data.fill_(torch.nan)  # as weights that have exploded: losses then are no numbers
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, seeded(1))
    assert batch.completion_ids.max() < policy.model.config.vocab_size
