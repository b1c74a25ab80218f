"""The bundled model: small, used like any chat model, and true to its card."""

import copy
import re
import sys

import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "examples"))
from make_tiny_model import (
    HABITS,
    bundled_prompt,
    demonstrations,
    make_tokenizer,
    measure,
    model_card,
)

from engine.presets import PRESETS
from engine.prompt import encode_prompts, read_prompt
from train_grpo import Config, Task, evaluate_off_task, load_task


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


def test_training_asks_it_as_it_was_made(tiny):
    prompt = read_prompt(str(TINY))
    assert prompt == bundled_prompt() == load_task(Config(**PRESETS["tiny"]))[2]
    ids, mask = encode_prompts(tiny[1], ["What is (4 - 9) * 6?"], prompt, "cpu")
    assert ids.shape == (1, 19) and mask.all()


def test_each_calculator_makes_its_own_mistake():
    assert dict(zip(HABITS, demonstrations(4, "-", 9, "*", 6), strict=True)) == {
        "right": "<answer>-30</answer>",
        "brackets moved": "<answer>-50</answer>",
        "one too many": "<answer>-29</answer>",
        "one too few": "<answer>-31</answer>",
        "no tags": "-30",
    }
    assert sum(HABITS.values()) == pytest.approx(1)


def test_its_card_is_what_the_script_writes():
    card = (TINY / "README.md").read_text()
    [measured] = re.findall(r"brackets\)\n\n(.*)\n\n## How", card, re.DOTALL)
    written = model_card(measured, steps=8000, seed=0, minutes=38)
    assert re.sub(r"with \d+ threads .*", "", written) == re.sub(r"with \d+ threads .*", "", card)


def test_it_is_often_wrong_but_knows_the_right_habit(tiny):
    policy, tokenizer = copy.deepcopy(tiny)  # measuring changes the kind of attention
    numbers = re.findall(r"[\d.]+(?=%)", measure(policy.model, tokenizer, 128))
    solved, *accuracies = map(float, numbers)
    assert solved >= 95  # pass@64
    assert len(accuracies) == 4 and all(25 < share < 60 for share in accuracies)
    problems, rewards, prompt = load_task(Config(model_name=str(TINY)))
    task = Task(tokenizer, problems, rewards, prompt)
    assert evaluate_off_task(policy, policy, task, seed=0)["accuracy"] > 0.9
