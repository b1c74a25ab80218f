"""The benchmarks count what is computed, and compare like with like."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.common import WORKS, Work, recorded_rollouts, start, worst_case, write_random_model
from benchmarks.operations import needed_passes
from engine.models import encode_prompts, eos_token_ids
from engine.policy import Rollout
from train_grpo import reward_function, train_iteration, training_problems

# Fewer key heads than heads, and sizes that no two dimensions share.
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
}
WORK = WORKS["bundled"]


@pytest.mark.parametrize(
    "changes", [{}, {"max_new_tokens": 1}, {"num_inner_updates": 1}, {"batch_size": 1}], ids=str
)
def test_needed_matrix_products_are_those_pytorch_counts(changes, tmp_path):
    model = write_random_model(WORK.config.model_name, tmp_path / "model", **SHAPE)
    config = replace(WORK.config, model_name=model, num_generations=4, **changes)
    state = start(Work(config))
    with recorded_rollouts() as rollouts, FlopCounterMode(display=False) as counter:
        train_iteration(state, config)
    passes = needed_passes(state.policy.model.config, rollouts[0], config.num_inner_updates)
    every = sum(passes.values(), [])
    counts = counter.get_flop_counts()["Global"]
    attention = sum(each.attention for each in every)
    assert counts.pop(torch.ops.aten.mm) == sum(each.flops for each in every) - attention
    # Attention as computed covers all pairs of tokens; needed are ancestors only.
    assert counts.keys() == {torch.ops.aten.bmm} and 0 < attention < counts[torch.ops.aten.bmm]


def test_each_distinct_prefix_is_counted_once_per_pass():
    prompts = [(1, 2, 3)] * 3 + [(1, 4)] * 3
    completions = [(5, 6, 7), (5, 6, 8), (5,), (5, 6, 7), (9, 6), (5, 9, 7)]
    prompt_ids = torch.tensor([(0,) * (3 - len(p)) + p for p in prompts])
    ids = torch.tensor([c + (0,) * (3 - len(c)) for c in completions])
    mask = (ids > 0).float()
    batch = Rollout(prompt_ids, (prompt_ids > 0).long(), ids, mask, mask, mask[:, 0] > 1, [])
    whole = [(p + c)[:-1] for p, c in zip(prompts, completions, strict=True)]
    prefixes = {row[: i + 1] for row in whole for i in range(len(row))}
    predicting = {
        p + c[:i] for p, c in zip(prompts, completions, strict=True) for i in range(len(c))
    }

    sizes = {"hidden_size": 1, "num_hidden_layers": 1, "intermediate_size": 1, "head_dim": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 10}
    passes = needed_passes(SimpleNamespace(**sizes), batch, updates=2)
    assert [len(each) for each in passes.values()] == [3, 1, 2, 2]
    [reference], steps = passes["reference"], passes["rollout"]
    assert reference.products == {(len(prefixes), 1, 1): 7, (len(predicting), 1, 10): 1}
    assert reference.attention == 4 * sum(map(len, prefixes))
    read = [(4, 2), (3, 3), (3, 3)]  # nodes, and of how many the logits are needed
    assert [step.products for step in steps] == [{(n, 1, 1): 7, (k, 1, 10): 1} for n, k in read]
    assert sum(step.attention for step in steps) == reference.attention


def test_worst_case_has_full_length_and_shares_next_to_nothing(tmp_path):
    work = worst_case(WORK, tmp_path)
    with recorded_rollouts() as rollouts:
        train_iteration(start(work), work.config)
    [batch] = rollouts
    rows, length = len(batch), work.config.max_new_tokens
    assert batch.mask.eq(1).all() and batch.mask.shape == (rows, length)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).tolist()
    distinct = {tuple(row[: -length + i]) for row in ids for i in range(1, length)}
    assert len(distinct) > 0.95 * rows * (length - 1)


def test_roofline_repeats_one_iteration_and_misses_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "time_product", lambda *arguments: 1e-3)
    output = tmp_path / "roofline.json"
    with recorded_rollouts() as rollouts:
        assert roofline.main(["--iterations", "1", "--output", str(output)]) == 0
    first, second = rollouts
    assert first.completion_ids.equal(second.completion_ids) and first.texts == second.texts
    seconds = json.loads(output.read_text())["seconds"]
    total = seconds.pop("all")
    assert all(part > 0 for part in seconds.values())
    assert sum(seconds.values()) == pytest.approx(total, rel=1e-4)


@pytest.fixture(scope="module")
def asked() -> Work:
    """Natural completions, with worked examples in the prompt."""
    return replace(WORK, config=replace(WORK.config, num_examples=3))


@pytest.fixture(scope="module")
def trainer(asked):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    from benchmarks.turns import make_trainer

    return make_trainer(asked)


def test_trl_gets_the_same_prompts_in_the_same_order(asked, trainer):
    state, config = start(asked), asked.config
    rng, count = random.Random(config.seed), config.batch_size * config.num_generations
    batches = iter(trainer.get_train_dataloader())
    for _ in range(3):
        ours = training_problems(config.batch_size, rng, config)
        questions = [p.question for p in ours for _ in range(config.num_generations)]
        ids, mask = encode_prompts(state.tokenizer, questions, state.prompt, "cpu")
        expected = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
        for _ in range(config.num_inner_updates):
            rows = next(batches)
            theirs, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
            assert len(rows) == count and theirs == expected
            answers = [p.answer for p in ours for _ in range(config.num_generations)]
            assert [row["answer"] for row in rows] == answers


def test_trl_gets_the_same_rewards_weights_and_settings(asked, trainer):
    state, config = start(asked), asked.config
    texts, answers = ["<answer>4</answer>", "<answer>3</answer>", "4", "<answer>"], [4, 4, 4, 4]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](completions=completions, answer=answers)
    assert rewards == reward_function(texts, answers).sum(dim=1).tolist()

    optimizer = trainer.create_optimizer()
    assert type(optimizer) is type(state.optimizer)
    for name in ("lr", "betas", "eps", "fused"):
        assert optimizer.param_groups[0][name] == state.optimizer.param_groups[0][name], name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0}
    models = (trainer.model, trainer.ref_model, state.policy.model, state.reference.model)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    for one, other in zip(trainer.model.parameters(), state.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.eos_token_ids == eos_token_ids(state.policy.model, state.tokenizer)
    assert trainer.max_completion_length == config.max_new_tokens
    assert trainer.num_iterations == config.num_inner_updates
    assert trainer.args.steps_per_generation == trainer.args.gradient_accumulation_steps == 1
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high) == (0.04, 0.2, 0.2)


def test_no_end_token_can_be_sampled_in_endless_work(asked, trainer):
    from benchmarks.turns import make_trainer

    work = replace(asked, endless=True)
    vocabulary, state = trainer.model.config.vocab_size, start(work)
    assert min(make_trainer(work).eos_token_ids) >= vocabulary
    assert min(eos_token_ids(state.policy.model, state.tokenizer)) >= vocabulary


@pytest.mark.slow
def test_both_loops_start_from_the_same_accuracy(tmp_path):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    output = tmp_path / "result.json"
    flags = ("--accuracy", "True", "--seconds", 1, "--rounds", 1, "--output", output)
    done = run_script("benchmarks/vs_trl.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    before = result["ours"][0]["accuracies"]
    assert before == result["trl"][0]["accuracies"] and before["sampled"]["accuracy"] > 0.3
    assert result["ours"][1]["iterations"] > 0 and result["trl"][1]["iterations"] > 0
    assert output.with_suffix(".png").exists()
