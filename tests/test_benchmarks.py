"""The benchmarks count what is computed, and compare like with like."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, limit
from benchmarks.common import Work, load, start, write_random_model
from benchmarks.operations import count_flops
from policy import encode_prompts
from task import training_problems
from train_grpo import reward_function, train_iteration

# Fewer key heads than heads, and sizes that no two dimensions share.
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Work:
    """A random model, 2 problems of 3 completions of 5 tokens, 2 updates."""
    work = Work(model=write_random_model(tmp_path_factory.mktemp("model"), SHAPE))
    changes = {"batch_size": 2, "num_generations": 3, "max_new_tokens": 5, "num_inner_updates": 2}
    return replace(work, config=replace(work.config, **changes))


def load_eager(work: Work):
    """PyTorch's counter knows no formula for the fused attention of a CPU."""
    model, *others = load(work)
    model.set_attn_implementation("eager")
    return model, *others


CHANGES = [{}, {"max_new_tokens": 1}, {"num_inner_updates": 1}, {"batch_size": 1}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_operations_counted_are_those_that_an_iteration_makes(small, changes, monkeypatch):
    monkeypatch.setattr("benchmarks.common.load", load_eager)
    work = replace(small, config=replace(small.config, **changes))
    inputs = start(work)
    with FlopCounterMode(display=False) as counter:
        metrics = train_iteration(*inputs)
    assert metrics["completion_length"] == work.config.max_new_tokens
    expected = sum(count_flops(inputs[0].policy.model.config, work).values())
    # It also counts the angles of the rotary embedding, an outer product: 0.1% of so small a model.
    # The two problems drawn happen to differ in the first word that they can differ in.
    assert expected <= counter.get_total_flops() <= 1.005 * expected


@pytest.fixture(scope="module")
def trainer(small):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    from benchmarks.turns import make_trainer

    model, tokenizer, prompt = load(small)
    return make_trainer(small, model, tokenizer, prompt)


def test_trl_is_given_the_same_prompts_in_the_same_order(small, trainer):
    _, _, tokenizer, prompt, config = start(small)
    rng, count = random.Random(config.seed), config.batch_size * config.num_generations
    batches = iter(trainer.get_train_dataloader())
    for _ in range(3):
        ours = training_problems(config.batch_size, rng, config)
        expected, _ = encode_prompts(tokenizer, [p.question for p in ours], prompt, "cpu")
        for _ in range(config.num_inner_updates):
            rows = next(batches)
            ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
            assert len(rows) == count
            assert ids == expected.repeat_interleave(config.num_generations, dim=0).tolist()
            answers = [p.answer for p in ours for _ in range(config.num_generations)]
            assert [row["answer"] for row in rows] == answers
    assert expected.shape[1] == small.prompt_tokens


def test_trl_is_given_the_same_rewards_and_settings(small, trainer):
    state, reference, tokenizer, _, config = start(small)
    texts, answers = ["<answer>4</answer>", "<answer>3</answer>", "4", "<answer>"], [4, 4, 4, 4]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](completions=completions, answer=answers)
    assert rewards == reward_function(texts, answers).sum(dim=1).tolist()

    optimizer = trainer.create_optimizer()
    assert type(optimizer) is type(state.optimizer)
    for name in ("lr", "betas", "eps", "fused"):
        assert optimizer.param_groups[0][name] == state.optimizer.param_groups[0][name], name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0}
    models = (trainer.model, trainer.ref_model, state.policy.model, reference.model)
    kernels = {model.config._attn_implementation for model in models}
    assert {kernel.removeprefix("branching ") for kernel in kernels} == {"sdpa"}
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    for one, other in zip(trainer.model.parameters(), state.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert min(trainer.eos_token_ids) >= trainer.model.config.vocab_size
    assert trainer.num_iterations == config.num_inner_updates
    assert trainer.args.steps_per_generation == trainer.args.gradient_accumulation_steps == 1
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high) == (0.04, 0.2, 0.2)


def test_the_fit_finds_overhead_and_rate_and_neither_is_below_zero():
    flops = [10**9, 10**10, 10**11]
    overhead, slope = growth.fit(flops, [0.2 + 2e-11 * n for n in flops])
    assert overhead == pytest.approx(0.2) and slope == pytest.approx(2e-11)
    overhead, slope = growth.fit(flops, [2e-11 * n - 0.01 for n in flops])
    assert overhead == 0 and slope == pytest.approx(2e-11, rel=0.6)
    assert growth.fit(flops, [0.3, 0.2, 0.1])[1] == 0


def call(function, *arguments):
    return function(*arguments)


def call_once(function, copies: int) -> float:
    function(0)
    return 1.0


@pytest.mark.slow
def test_growth_writes_its_figures_and_its_picture(tmp_path, monkeypatch):
    axes = {"batch_size": (1, 2), "batch_size in micro-batches": (1, 2), "parameters": ((1, 32),)}
    monkeypatch.setattr(growth, "AXES", axes)
    monkeypatch.setattr(growth, "in_own_process", call)
    output = tmp_path / "growth.json"
    assert growth.main(["--seconds", "0", "--micro_batch_size", "8", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [p["value"] for p in result["axes"]["batch_size"]["points"]] == [1, 2]
    assert all(p["seconds"] > 0 for axis in result["axes"].values() for p in axis["points"])
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_limit_writes_its_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(limit, "in_own_process", call)
    monkeypatch.setattr(limit, "seconds_per_call", call_once)
    output = tmp_path / "limit.json"
    assert limit.main(["--iterations", "1", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    parts = {name: seconds for name, seconds in result["seconds"].items() if name != "all"}
    assert sum(parts.values()) == pytest.approx(result["seconds"]["all"], rel=1e-3)
    for name in ("rollout", "reference", "forward", "backward", "optimiser", "tokenising"):
        assert parts[name] > 0, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    ["--rounds 1 --iterations 1 --trl_iterations 1", "--accuracy True --rounds 1 --seconds 1"],
)
def test_both_loops_take_turns_and_are_written_down(flags, tmp_path):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    output = tmp_path / "result.json"
    done = run_script("benchmarks/vs_trl.py", *flags.split(), "--output", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    if "accuracy" in flags:
        assert [len(result[loop]) for loop in ("ours", "trl")] == [2, 2]
        before = result["ours"][0]["accuracies"]
        assert before == result["trl"][0]["accuracies"] and before["sampled"]["accuracy"] > 0.3
        assert output.with_suffix(".png").exists()
    else:
        assert all(result[loop]["completion_length"] == 16 for loop in ("ours", "trl"))
        assert result["ratio"] > 0 and len(result["ratio_by_round"]) == 1
