"""Hostile input: one line, exit code 2, no file changed, no code run."""

import io
import os
import pickle
import shutil
import sys
from dataclasses import fields

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from test_model_faults import edit

import evaluate
import inference
import plot_metrics
import train_grpo
from engine.files import exit_code

ASKING = ["What is 1?", "--model"]  # to be followed by a model, as is
TRAINING = ["--preset", "tiny", "--model_name"]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with a file that must not change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpo_metrics.json").write_text("an earlier run's")
    return tmp_path


def refuse(main, argv: list[str], folder, capsys) -> str:
    """The error, one line, with which `main(argv)` is refused; no file may have changed."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert exit_code(lambda: main(argv)) == 2, argv
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("model ")]
    assert len(err) == 1 and err[0].startswith("error: ") and len(err[0]) < 2000, err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return err[0]


BUNDLED = f"--model={TINY}"
BAD_FLAGS = {
    "unknown flag": (train_grpo, "--learning_rat 1", "--learning_rat"),
    "empty range": (train_grpo, "--min_operand 5 --max_operand 3", "--min_operand 5"),
    "too few problems": (train_grpo, "--min_operand 2 --max_operand 2", "widen"),
    "model not fetched": (train_grpo, "--model_name models/x", "python fetch_model.py"),
    "empty folder": (train_grpo, "--model_name empty", "config.json"),
    "output is a file": (train_grpo, "--output_dir grpo_metrics.json/out", "/out"),
    "missing metrics": (plot_metrics, "none.json", "none.json"),
    "damaged metrics": (plot_metrics, "grpo_metrics.json", "grpo_metrics.json"),
    "foreign metrics": (plot_metrics, "foreign.json", "foreign.json"),
    "greedy majority": (inference, "--num_samples 2 --temperature 0 1?", "--temperature 0"),
    "empty question": (inference, f"{BUNDLED} ", "empty"),
    "no sample": (evaluate, f"{BUNDLED} --num_samples 0", "--num_samples"),
    "no problem": (evaluate, f"{BUNDLED} --eval_problems 0", "--eval_problems"),
}


@pytest.mark.parametrize("script, flags, complaint", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_flags_that_cannot_work_are_refused(workplace, capsys, script, flags, complaint):
    (workplace / "empty").mkdir()
    (workplace / "foreign.json").write_text('{"iterations": [{"loss": 1}]}')
    preset = ["--preset", "tiny"] if script is train_grpo else []
    assert complaint in refuse(script.main, [*preset, *flags.split(" ")], workplace, capsys)


TEXTS = [
    *("--preset=small", "--resume=maybe", "--system_prompt=\x1b[31m", "--output_dir=a\0b"),
    *("--model_name=a/../b", "--device=tpu", "--device=cuda:99", "--device="),
]


def test_settings_out_of_their_limits_are_refused(workplace, capsys):
    flags = list(TEXTS)
    for field in fields(train_grpo.Config):
        low, high = field.metadata.get("limits", (None, None))
        values = [] if low is None else [low - 1, "nan", "many"]
        values += [] if high is None else [high + 1]
        flags += [f"--{field.name}={value}" for value in values]
    assert len(flags) > 70
    for flag in flags:
        refuse(train_grpo.main, [*TRAINING, str(TINY), flag], workplace, capsys)


@pytest.mark.parametrize(
    "question",
    ["7" * 5000, "7" * 600, "a\0b", "What is <|user|>?", "\x1b[31m1", "\ud800"],
    ids=["too long", "too long for the model", "NUL", "reserved", "escape", "half a character"],
)
def test_hostile_questions_are_refused(workplace, capsys, monkeypatch, question):
    text = io.BytesIO(question.encode("utf-8", "surrogatepass"))  # the last is no UTF-8
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text, "utf-8"))
    refuse(inference.main, [BUNDLED], workplace, capsys)
    refuse(inference.main, [BUNDLED, "--", question], workplace, capsys)


class Bomb:
    def __reduce__(self):  # called when it is unpickled
        return (open, ("executed", "w"))


def pickle_weights(model) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def holding(name: str, dtype: torch.dtype):
    def edit(model) -> None:
        weights = load_file(model / "model.safetensors") | {name: torch.ones(1).to(dtype)}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return edit


def leave_an_adapter(model) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def edited(file: str, **changes):
    return lambda model: edit(model / file, **changes)


def replaced(file: str, text: str):
    return lambda model: (model / file).write_text(text)


TEMPLATE = "chat_template.jinja"
POINTER = "version https://git-lfs.github.com/spec/v1"
CODE = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
CUSTOM_TOKENIZER = {"tokenizer_class": "Evil", "auto_map": CODE}
GPTQ = {"quant_method": "gptq"}  # a package that is not installed
QUANTISED = "its weights are quantised; name the unquantised model"
LOADING = "cannot be loaded: "  # and what transformers says
DAMAGE = {
    "a pickle": (pickle_weights, "convert them to safetensors"),
    "own code": (edited("config.json", model_type="x", auto_map=CODE), "custom code"),
    "own tokenizer": (edited("tokenizer_config.json", **CUSTOM_TOKENIZER), "custom code"),
    "an adapter": (leave_an_adapter, "merge it into its base model"),
    "a pointer of Git LFS": (replaced("model.safetensors", POINTER), "git lfs pull"),
    "quantised weights": (holding("model.norm.weight", torch.float8_e4m3fn), QUANTISED),
    "scales of quantised weights": (holding("model.norm.weight_scale", torch.float32), QUANTISED),
    "a quantised config": (edited("config.json", quantization_config=GPTQ), QUANTISED),
    "another kind of model": (edited("config.json", model_type="bert"), "lack weights"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), LOADING),
    "truncated weights": (lambda m: os.truncate(m / "model.safetensors", 100_000), LOADING),
    "too small a vocabulary": (edited("config.json", vocab_size=9), LOADING),
    "a damaged tokenizer": (replaced("tokenizer.json", "{"), LOADING),
    "no end token": (edited("generation_config.json", eos_token_id="x"), "no end-of-sequence"),
    "no template": (lambda m: (m / TEMPLATE).unlink(), "has no chat template"),
    "a template that fails": (replaced(TEMPLATE, "{{ messages[7].x }}"), "template fails: "),
    "a template that breaks out": (replaced(TEMPLATE, "{{ ''.__class__.__mro__ }}"), "is unsafe"),
    "a damaged prompt": (edited("grpo_prompt.json", max_new_tokens="16"), "is not a prompt"),
    "a prompt for no token": (edited("grpo_prompt.json", max_new_tokens=0), "is not a prompt"),
}


@pytest.mark.parametrize("damage, complaint", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_is_refused_and_runs_no_code(workplace, capsys, damage, complaint):
    model = shutil.copytree(TINY, workplace / "model", ignore=shutil.ignore_patterns("*.py*"))
    (model / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    damage(model)
    for main, flags in (inference.main, ASKING), (train_grpo.main, TRAINING):
        assert complaint in refuse(main, [*flags, str(model)], workplace, capsys)
    assert not (workplace / "executed").exists()
