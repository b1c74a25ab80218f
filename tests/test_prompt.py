"""--chat_template_kwargs: variables that a model's chat template reads."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from processes import arguments, finish

from engine.files import UserError
from engine.models import load_model
from engine.prompt import encode_prompts, read_prompt
from train_grpo import main

SWITCH = "{% if brief is defined and brief %}<|system|>Reply only<|end|>{% endif %}"


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("{enable_thinking: false}", "--chat_template_kwargs {enable_thinking: false}: not valid"),
        ("false", "not an object"),
        ('{"tokenize": true}', "chat template fails: .* multiple values .*'tokenize'"),
    ],
)
def test_bad_template_variables_are_one_error(text, complaint):
    with pytest.raises(UserError, match=complaint):
        main(arguments("--chat_template_kwargs", text))


def test_a_template_gets_its_switch_in_training_and_after(tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(SWITCH + template.read_text())
    flags = ("--model_name", model, "--num_iterations", 1, "--eval_every", 0)
    assert "Reply only<|end|>" not in finish(tmp_path / "off", *flags)
    switched = (*flags, "--chat_template_kwargs", '{"brief": true}')
    assert "Reply only<|end|>" in finish(tmp_path / "on", *switched)
    saved = str(tmp_path / "on" / "saved_model")
    _, tokenizer = load_model(saved, torch.device("cpu"))
    for kwargs, begins in ({"brief": True}, True), ({}, False):
        prompt = replace(read_prompt(saved), chat_template_kwargs=kwargs)
        ids, _ = encode_prompts(tokenizer, ["What is 1?"], prompt, "cpu")
        assert tokenizer.decode(ids[0]).startswith("<|system|>Reply only<|end|>") == begins
    assert read_prompt(saved).chat_template_kwargs == {"brief": True}
