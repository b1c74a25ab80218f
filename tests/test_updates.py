"""The inner updates: what they compute, what they move, and what stays where it was."""

import copy
import random
from statistics import fmean

import pytest
import torch
from conftest import TINY
from short_runs import saved_weights, short_config, short_training
from small_models import (
    Recorder,
    naive_logprobs,
    nearby,
    ragged_batch,
    random_ids,
    small_model,
)

import train_grpo
from policy import Policy
from train_grpo import (
    Config,
    TrainState,
    make_prompt,
    reward_function,
    train_iteration,
    training_problems,
    update_policy,
)

PROMPTS = [random_ids(length, seed=length) for length in (4, 9)]
LENGTHS = (5, 1, 3, 6, 2, 6)
COMPLETIONS = [random_ids(length, seed=50 + i) for i, length in enumerate(LENGTHS)]
ADVANTAGES = torch.tensor([1.2, -0.9, -0.3, 0.8, 0.5, -1.3])
GROUP = 3


def plain_logprobs(model) -> list[torch.Tensor]:
    return [naive_logprobs(model, PROMPTS[i // GROUP], c) for i, c in enumerate(COMPLETIONS)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_first_inner_update_has_the_gradient_of_reinforce(name):
    policy = Policy(small_model(name))
    config = Config(num_generations=GROUP, num_inner_updates=1, beta=0, clip_grad_norm=1e9)
    recorder, batch = Recorder(policy), ragged_batch(PROMPTS, COMPLETIONS)
    update_policy(policy, nearby(policy), recorder, batch, ADVANTAGES, config)
    # REINFORCE: the gradient of log pi, weighted by the advantage, averaged over tokens and rows.
    scores = plain_logprobs(policy.model)
    gain = mean_of([a * s.mean() for a, s in zip(ADVANTAGES, scores, strict=True)])
    parameters = dict(policy.model.named_parameters())
    expected = torch.autograd.grad(-gain, list(parameters.values()))
    for parameter, gradient in zip(parameters, expected, strict=True):
        error = (recorder.gradients[parameter] - gradient).norm()
        assert error <= 1e-4 * gradient.norm(), parameter


def mean_of(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


@pytest.mark.parametrize("micro_batch_size", [0, 1, 6])
def test_first_inner_update_clips_nothing_even_in_a_range_of_no_width(micro_batch_size):
    policy = Policy(small_model("llama"))
    config = Config(
        num_generations=GROUP, num_inner_updates=1, epsilon=0, micro_batch_size=micro_batch_size
    )
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    done = update_policy(policy, nearby(policy), Recorder(policy), batch, ADVANTAGES, config)
    assert done["clip_fraction"] == 0
    assert done["kl"] > 0  # against a reference from which it has strayed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batch_size", [0, 2, 8])
def test_in_the_first_iteration_kl_is_exactly_zero(tiny, dtype, micro_batch_size):
    policy = Policy(copy.deepcopy(tiny[0].model), dtype)
    reference = copy.deepcopy(policy)
    config = short_config("", num_generations=4, micro_batch_size=micro_batch_size, batch_size=4)
    state, prompt = fresh_state(policy, config), make_prompt(config)
    first = train_iteration(state, reference, tiny[1], prompt, config)
    assert first["kl"] == first["kl_penalty"] == 0
    assert first["grad_norm"] > 0
    second = train_iteration(state, reference, tiny[1], prompt, config)
    assert second["kl"] > 0 and second["kl_penalty"] > 0


def fresh_state(policy: Policy, config: Config) -> TrainState:
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0)
    return TrainState(policy, adamw, random.Random(0), torch.Generator().manual_seed(0), {})


def plain_updates(policy: Policy, reference: Policy, config: Config, rate: float):
    """GRPO with plain gradient descent, one whole sequence at a time. Returns (model, metrics)."""
    model = copy.deepcopy(policy.model)
    old = [score.detach() for score in plain_logprobs(model)]
    ref = [score.detach() for score in plain_logprobs(reference.model)]
    updates = []
    for _ in range(config.num_inner_updates):
        losses, kls, penalties, held = [], [], [], []
        for i, score in enumerate(plain_logprobs(model)):
            ratio, advantage = torch.exp(score - old[i]), ADVANTAGES[i]
            inside = (ratio > 1 - config.epsilon) & (ratio < 1 + config.epsilon)
            edge = 1 + config.epsilon if advantage > 0 else 1 - config.epsilon
            beyond = ~inside & ((ratio > 1) == (advantage > 0))
            surrogate = torch.where(beyond, torch.tensor(edge), ratio) * advantage
            strayed = torch.exp(score - ref[i])  # pi_theta / pi_ref
            penalty = strayed - 1 - torch.log(strayed)
            losses.append((config.beta * penalty - surrogate).mean())
            penalties.append(penalty.mean().item())
            kls.append((1 / strayed - 1 + torch.log(strayed)).mean().item())
            held.append(beyond.float().mean().item())
        loss = mean_of(losses)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient * min(1, config.clip_grad_norm / norm)
        updates.append((loss.item(), fmean(held), norm, fmean(kls), fmean(penalties)))
    loss, clip_fraction, norm = (fmean(u[i] for u in updates) for i in range(3))
    metrics = {"loss": loss, "clip_fraction": clip_fraction, "grad_norm": norm}
    return model, {**metrics, "kl": updates[0][3], "kl_penalty": updates[0][4]}


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("clip_grad_norm", [0.5, 1e9])
def test_all_inner_updates_equal_a_plain_loop(micro_batch_size, clip_grad_norm):
    policy = Policy(small_model("llama"))
    start, reference, rate = copy.deepcopy(policy.model), nearby(policy), 0.05
    config = Config(
        num_generations=GROUP,
        num_inner_updates=4,
        beta=0.3,
        clip_grad_norm=clip_grad_norm,
        micro_batch_size=micro_batch_size,
    )
    model, expected = plain_updates(policy, reference, config, rate)
    optimizer = torch.optim.SGD(policy.parameters(), rate)
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    done = update_policy(policy, reference, optimizer, batch, ADVANTAGES, config)
    del done["sampling_gap"]  # this batch was never sampled
    assert done.pop("skipped_updates") == 0
    assert done == pytest.approx(expected, rel=1e-3)
    assert done["clip_fraction"] > 0 and done["grad_norm"] > 0.5
    for before, mine, its in zip(
        start.parameters(), policy.parameters(), model.parameters(), strict=True
    ):
        assert (mine - its).norm() <= 1e-3 * (its - before).norm()


def test_each_completion_is_scored_against_the_answer_of_its_own_prompt(tiny, monkeypatch):
    policy, tokenizer = Policy(copy.deepcopy(tiny[0].model)), tiny[1]
    config = short_config("", batch_size=3, num_generations=4)
    asked, scored = [], []

    def spy_rollout(*arguments, **options):
        batch = real_rollout(*arguments, **options)
        asked.extend(tokenizer.batch_decode(batch.prompt_ids))
        return batch

    def spy_reward(texts, answers):
        scored.extend(answers)
        return reward_function(texts, answers)

    real_rollout = train_grpo.rollout
    monkeypatch.setattr(train_grpo, "rollout", spy_rollout)
    monkeypatch.setattr(train_grpo, "reward_function", spy_reward)
    state = fresh_state(policy, config)
    train_iteration(state, copy.deepcopy(policy), tokenizer, make_prompt(config), config)
    problems = training_problems(3, random.Random(0), config)
    assert len(asked) == 3 and len({problem.answer for problem in problems}) == 3
    for i, problem in enumerate(problems):
        assert problem.question in asked[i]
        assert scored[4 * i : 4 * i + 4] == [problem.answer] * 4


def test_training_moves_the_policy_and_leaves_the_reference_bit_identical(monkeypatch, tmp_path):
    seen, real_iteration = [], train_grpo.train_iteration

    def spy(state, reference, *rest):
        seen.append(reference)
        return real_iteration(state, reference, *rest)

    monkeypatch.setattr(train_grpo, "train_iteration", spy)
    _, trained = short_training(tmp_path)
    base = saved_weights(TINY)
    assert len(seen) == 3 and all(reference is seen[0] for reference in seen)
    frozen = seen[0].model.state_dict()
    assert base.keys() <= trained.keys() == frozen.keys()
    for name, weight in base.items():
        assert torch.equal(frozen[name], weight), name
        assert not torch.equal(trained[name], weight), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_rate_1e_7_the_policy_still_moves(tmp_path, dtype):
    _, trained = short_training(tmp_path, learning_rate=1e-7, dtype=dtype, batch_size=4)
    for name, weight in saved_weights(TINY).items():
        assert trained[name].dtype == torch.float32
        assert (trained[name] != weight).float().mean() > 0.5, name
        assert (trained[name] - weight).abs().max() < 1e-5
