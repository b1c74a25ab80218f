"""The bundled model: small, used like any chat model, and true to its card."""

import sys

import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "tiny_model"))
from make import HABITS, demonstrations, make_prompt, make_tokenizer, measure

from engine.metrics import describe
from engine.models import encode_prompts, read_prompt
from engine.tree import TreePolicy
from train_grpo import PRESETS, Config, Problem, TrainState, evaluate, load_task


def test_it_has_a_million_weights_in_under_5_mb(tiny):
    assert (TINY / "model.safetensors").stat().st_size < 5_000_000
    assert 1_000_000 < tiny[0].model.num_parameters() < 1_100_000


def test_prompt_words_are_whole_and_digits_single(tiny):
    tokenizer = tiny[1]
    tokens = tokenizer.tokenize("What is (10 - 9) * 6?")
    assert tokens == ["What is", " (", "1", "0", " - ", "9", ")", " * ", "6", "?"]
    assert tokenizer.tokenize("<answer>-30</answer>") == ["<answer>", "-", "3", "0", "</answer>"]


def test_every_printable_text_survives_the_tokenizer():
    tokenizer = make_tokenizer()
    text = "".join(map(chr, range(32, 127))) + "\n What is (3 + 4) - 5? <answer>7</answer>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_is_asked_as_training_asks_it(tiny):
    prompt = read_prompt(str(TINY))
    assert prompt == make_prompt() == load_task(Config(**PRESETS["tiny"]))[2]
    ids, mask = encode_prompts(tiny[1], ["What is (4 - 9) * 6?"], prompt, "cpu")
    assert ids.shape == (1, 19) and mask.all()


def test_each_calculator_makes_its_own_mistake():
    answers = demonstrations(Problem(4, "-", 9, "*", 6))
    assert dict(zip(HABITS, answers, strict=True)) == {
        "right": "<answer>-30</answer>",
        "brackets moved": "<answer>-50</answer>",
        "one too many": "<answer>-29</answer>",
        "one too few": "<answer>-31</answer>",
        "no tags": "-30",
    }
    assert sum(HABITS.values()) == pytest.approx(1)


def test_it_is_often_wrong_but_knows_the_right_habit(tiny):
    policy, config = TreePolicy(tiny[0].model), Config(eval_problems=128)
    state = TrainState(policy, policy, tiny[1], *load_task(config)[:2], make_prompt())
    results = evaluate(state, policy, "validation", config, seed=0)
    assert 0.25 < results["accuracies"]["sampled"]["accuracy"] < 0.45
    assert results["accuracies"]["greedy"]["accuracy"] < 0.55
    assert results["off_task"]["accuracy"] > 0.9
    [solved, validation, test] = measure(policy, tiny[1], config).splitlines()
    assert float(solved.removeprefix("- pass@64, validation: ").rstrip("%")) >= 95
    assert validation == f"- accuracy, validation: {describe(results['accuracies'])}"
    assert test.startswith("- accuracy, test: sampled ")
