"""Faults of models as people have them: refused, mended or warned of before the first iteration."""

import json
import re
import shutil
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import TINY
from processes import finish
from safetensors.torch import load_file, save_file
from small_models import nearby

from engine.files import UserError, exit_code
from engine.models import check_saving, load_model, save_model
from engine.policy import Policy
from engine.prompt import Prompt, check_prompt, decode, encode_prompts, longest_last, read_prompt
from rewards import score
from train_grpo import answer_questions

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path):
    """A copy of the bundled model that may be damaged; without its prompt file."""
    unwanted = shutil.ignore_patterns("grpo_prompt.json", "README.md")
    return shutil.copytree(TINY, tmp_path / "model", ignore=unwanted)


def edit(path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({n: value for n, value in content.items() if value is not None}))


def test_weights_that_the_model_does_not_use_are_named(model, capsys):
    weights = load_file(model / "model.safetensors") | {"value_head.weight": torch.ones(3)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    load_model(str(model), CPU)
    assert "does not use: value_head.weight" in capsys.readouterr().out


def test_a_model_that_is_saved_otherwise_is_refused(tiny, tmp_path):
    parts = tiny[0].model, tiny[1], read_prompt(str(TINY)), tmp_path
    check_saving(*parts)
    other = nearby(tiny[0]).model
    loads_another = patch.object(
        transformers.AutoModelForCausalLM, "from_pretrained", return_value=other
    )
    with loads_another, pytest.raises(UserError, match="not saved as it is: .* differ"):
        check_saving(*parts)
    assert list(tmp_path.iterdir()) == []


def test_a_vision_tower_is_neither_trained_nor_lost(model, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes["num_attention_heads"] = 4
    text = {**sizes, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    text |= {"vocab_size": 128, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    config = transformers.Gemma3Config(
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        **{"image_token_index": 120, "boi_token_index": 121, "eoi_token_index": 122},
        mm_tokens_per_image=4,
    )
    (model / "generation_config.json").unlink()
    whole = transformers.Gemma3ForConditionalGeneration(config)
    whole.generation_config.eos_token_id = [2]
    whole.save_pretrained(model)
    flags = ("--model_name", model, "--learning_rate", "1e-3")
    out = finish(tmp_path / "run", *flags, "--num_iterations", 2, "--eval_every", 0)
    assert "not trained, since text does not pass through: model.multi_modal_projector" in out
    before, after = (
        load_file(f / "model.safetensors") for f in (model, tmp_path / "run/saved_model")
    )
    assert before.keys() == after.keys()
    assert all(w.equal(after[n]) for n, w in before.items() if "vision" in n)
    with pytest.raises(UserError, match="need .* tokens; this model's context is 128"):
        finish(tmp_path / "long", *flags, "--max_new_tokens", 200)


def test_the_tokenizers_end_token_ends_completions_too(model, tiny, capsys):
    for file in ("config.json", "generation_config.json"):
        edit(model / file, eos_token_id=1)  # never sampled
    other, tokenizer = load_model(str(model), CPU)
    inputs = tokenizer, read_prompt(str(TINY)), ["What is (1 + 2) * 3?"], None, 0.0
    [text], [expected] = (answer_questions(p, *inputs) for p in (Policy(other), tiny[0]))
    assert text == expected and "<|end|>" not in text


PROMPT = Prompt(system="Reply.", examples=[["What is 1?", "<answer>1</answer>"]], max_new_tokens=4)
TEMPLATE = (TINY / "chat_template.jinja").read_text()
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}"
NO_SYSTEM += "{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize(
    "template, told",
    [
        (TEMPLATE, "$"),  # nothing
        (TEMPLATE.replace("messages", "messages[1:]"), "warning: .* out the system line"),
        (TEMPLATE.replace("messages", "messages[-1:]"), "warning: .* out the worked examples"),
        (TEMPLATE.replace("<|end|>", "<|user|>"), r"warning: .* ends an answer with '<\|user\|>'"),
        (TEMPLATE + "{# {{ strftime_now('%d') }} #}", "warning: .* writes the date"),
        (PARTS, r"error: .* leaves out the question 'What is 2\?'"),
        (NO_SYSTEM + TEMPLATE, 'error: .* not supported; .*--system_prompt ""'),
    ],
)
def test_a_template_that_loses_a_part_is_named(tiny, monkeypatch, capsys, template, told):
    monkeypatch.setattr(tiny[1], "chat_template", template)
    exit_code(lambda: check_prompt(tiny[1], ["What is 2?"], PROMPT, [2]))
    assert re.match(told, "".join(capsys.readouterr()), re.DOTALL)


def test_a_tokenizer_without_pad_and_end_tokens_serves(model):
    edit(model / "tokenizer_config.json", pad_token=None, eos_token=None)
    edit(model / "tokenizer.json", padding=None)
    tokenizer = load_model(str(model), CPU)[1]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    ids, mask = encode_prompts(tokenizer, ["What is 1?", "What is 1234?"], PROMPT, "cpu")
    assert ids.shape == mask.shape and mask[0].sum() < mask[1].sum()


def test_the_longest_question_is_the_one_of_most_tokens(tiny):
    words = "Reply only with , where N is the number." * 3  # more characters, a few tokens
    digits = "1234567890" * 4
    assert longest_last(tiny[1], [words, "7", digits], PROMPT) == ["7", digits]


def test_tokens_that_the_tokenizer_lacks_are_shown_and_earn_nothing(tiny):
    tokenizer = tiny[1]
    right = tokenizer("<answer>4</answer>", add_special_tokens=False)["input_ids"]
    texts = decode(tokenizer, [right, [*right, len(tokenizer) + 5], [len(tokenizer) + 5]])
    assert [score(text, 4).exact for text in texts] == [True, False, False]
    assert not any(any(score(text, 4)) for text in texts[1:])
    assert all(str(len(tokenizer) + 5) in text for text in texts[1:])


def test_a_saved_model_has_its_bases_own_tokenizer_files(model, tmp_path):
    (model / "LICENSE").write_text("as the base model's")
    (model / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    save_model(*load_model(str(model), CPU), PROMPT, tmp_path, card="")
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE")
    for name in (*names, "special_tokens_map.json"):
        assert (tmp_path / "saved_model" / name).read_bytes() == (model / name).read_bytes(), name
