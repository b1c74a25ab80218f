"""--chat_template_kwargs: variables that a model's chat template reads."""

import shutil

import pytest
import torch
from conftest import TINY
from processes import arguments, finish

from engine.cli import exit_code
from engine.models import encode_prompts, load_model, read_prompt
from train_grpo import main

SWITCH = "{% if brief is defined and brief %}<|system|>Reply only<|end|>{% endif %}"
KWARGS = '{"brief": true}'


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "not valid JSON"),
        ("{enable_thinking: false}", "not valid JSON"),
        ("{'enable_thinking': false}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["enable_thinking"]', "must be a JSON object"),
        ("false", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('{"tokenize": true}', "must be a JSON object of variables that the chat template reads"),
        ('{"brief": true, "add_generation_prompt": false}', "must be a JSON object of variables"),
        ('{"chat_template": "{{ 7 }}"}', "must be a JSON object of variables"),
        ('{"messages": []}', "must be a JSON object of variables"),
        (r'{"brief": "\ud800"}', r"control character '\ud800'"),
    ],
)
def test_bad_template_variables_are_one_error(text, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        exit_code(lambda: main(arguments("--num_iterations=1", f"--chat_template_kwargs={text}")))
        == 2
    )
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and complaint in err and len(err) < 1000
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def switched(tmp_path_factory):
    """The bundled model, with a chat template that has a switch."""
    folder = tmp_path_factory.mktemp("model") / "switched"
    shutil.copytree(TINY, folder)
    template = folder / "chat_template.jinja"
    template.write_text(SWITCH + template.read_text())
    return folder


def test_a_template_gets_its_switch_in_training_and_after(switched, tmp_path):
    flags = ("--model_name", switched, "--num_iterations", 1, "--eval_every", 0)
    assert "Reply only<|end|>" not in finish(tmp_path / "off", *flags)
    assert "Reply only<|end|>" in finish(tmp_path / "on", *flags, "--chat_template_kwargs", KWARGS)
    prompt = read_prompt(str(tmp_path / "on" / "saved_model"))
    assert prompt["chat_template_kwargs"] == {"brief": True}
    _, tokenizer = load_model(str(tmp_path / "on" / "saved_model"), torch.device("cpu"))
    ids, _ = encode_prompts(tokenizer, ["What is 1?"], prompt, "cpu")
    assert tokenizer.decode(ids[0]).startswith("<|system|>Reply only<|end|>")
    prompt["chat_template_kwargs"] = {}
    ids, _ = encode_prompts(tokenizer, ["What is 1?"], prompt, "cpu")
    assert not tokenizer.decode(ids[0]).startswith("<|system|>Reply only<|end|>")
