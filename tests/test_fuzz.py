"""Hostile input: one line, exit code 2, no file changed, no code run."""

import io
import json
import shutil
import sys

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inference
import plot_metrics
import train_grpo
from engine.cli import exit_code
from train_grpo import Config

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
FUZZ = {"max_examples": 60, "deadline": None, "suppress_health_check": QUIET, "derandomize": True}
TRAINING = ["--preset", "tiny", "--model_name", str(TINY)]
CONTROL = st.sampled_from("\0\x01\x07\x08\x1b\x7f\x85\x9f\ud800\udfff\r\x0b")


def snapshot(folder) -> dict:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The current folder, with files that must not change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grpo_metrics.json").write_text("an earlier run's")
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "notes").write_text("an earlier run's")
    return tmp_path


def refuse(main, argv: list[str], folder, capsys) -> None:
    """Check that `main(argv)` is refused in one line and changes no file."""
    before = snapshot(folder)
    capsys.readouterr()
    assert exit_code(lambda: main(argv)) == 2, argv
    err = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("model ")]
    assert len(err) == 1 and err[0].startswith("error: "), err
    assert len(err[0]) < 2000
    assert snapshot(folder) == before


NUMBERS = [
    name
    for name, field in Config.__dataclass_fields__.items()
    if field.type in (int, float) and field.metadata.get("metavar")
]
NOT_A_NUMBER = st.text(st.characters(exclude_categories=["Nd", "Cs"]), max_size=20).filter(
    lambda text: text.strip().lower().lstrip("+-") not in ("nan", "inf", "infinity")
)


def out_of_range(name: str):
    allowed = Config.__dataclass_fields__[name].metadata["metavar"]
    numbers = [st.integers(-(10**30), int(allowed.low) - 1)]
    if allowed.high is not None:
        numbers.append(st.integers(int(allowed.high) + 1, 10**30))
    return st.one_of(*numbers).map(lambda number: [f"--{name}={number}"])


BAD_SETTINGS = st.one_of(
    st.sampled_from(NUMBERS).flatmap(out_of_range),
    st.tuples(st.sampled_from(NUMBERS), NOT_A_NUMBER).map(lambda t: [f"--{t[0]}={t[1]}"]),
    st.text(min_size=1).map(lambda text: ["--preset=" + text + "?"]),
    st.text("abc", min_size=1).map(lambda text: ["--resume=" + text]),
    st.tuples(st.text(max_size=9), CONTROL).map(lambda t: ["--system_prompt=" + "".join(t)]),
    st.tuples(st.text(max_size=9), CONTROL).map(lambda t: ["--output_dir=" + "".join(t)]),
    st.tuples(
        st.sampled_from(["model_name", "problems", "rewards"]), st.text("abc/.~", min_size=1)
    ).map(lambda t: [f"--{t[0]}=/no/such/{t[1]}"]),
    (st.lists(st.integers()) | st.floats() | st.text() | st.none()).map(
        lambda junk: ["--chat_template_kwargs=" + json.dumps(junk)]
    ),
    st.sampled_from(["tpu9", "cuda:99", "cpu:x", "", "\0", "mps:7", "meta2"]).map(
        lambda text: ["--device=" + text]
    ),
)


@settings(**FUZZ)
@given(flags=BAD_SETTINGS)
def test_bad_settings_are_refused(workplace, capsys, flags):
    refuse(train_grpo.main, [*TRAINING, *flags], workplace, capsys)


@pytest.mark.parametrize(
    "question",
    ["7" * 1_000_000, "7" * 600, "a\0b", "What is <|user|>?", "\x1b[31m1", "\ud800"],
    ids=["too long", "too long for the model", "NUL", "reserved", "escape", "half a character"],
)
def test_hostile_questions_are_refused(workplace, capsys, monkeypatch, question):
    monkeypatch.setattr(sys, "stdin", io.StringIO(question))
    refuse(inference.main, [f"--model={TINY}"], workplace, capsys)
    refuse(inference.main, [f"--model={TINY}", "--", question], workplace, capsys)


def test_standard_input_that_is_not_text_is_refused(workplace, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x80"), "utf-8"))
    refuse(inference.main, [f"--model={TINY}"], workplace, capsys)


SOUND = {
    "iterations": [{"reward": 0.5, "accuracy": 0.5, "kl": 0.1, "kl_penalty": 0.1}],
    "evaluations": [
        {
            "iteration": 0,
            "split": "validation",
            "accuracies": {
                kind: {"accuracy": 0.5, "low": 0.4, "high": 0.6} for kind in ("sampled", "greedy")
            },
        }
    ],
}
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["iterations", "evaluations", "reward"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
NOT_NUMBERS = st.one_of(
    st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=2), st.just(10**400)
)


def broken(spot: tuple[str, ...], value) -> str:
    metrics = json.loads(json.dumps(SOUND))
    place = metrics
    for key in spot[:-1]:
        place = place[key][0] if isinstance(place[key], list) else place[key]
    place[spot[-1]] = value
    return json.dumps(metrics)


SPOTS = [
    ("iterations", "reward"),
    ("iterations", "kl"),
    ("evaluations", "iteration"),
    ("evaluations", "split"),
    ("evaluations", "accuracies"),
    ("evaluations", "accuracies", "sampled", "low"),
    ("evaluations", "accuracies", "greedy", "accuracy"),
]
BAD_METRICS = st.one_of(
    st.binary(max_size=40),
    JUNK.map(lambda junk: json.dumps(junk).encode()),
    st.integers(0, len(json.dumps(SOUND)) - 1).map(lambda n: json.dumps(SOUND)[:n].encode()),
    st.tuples(st.sampled_from(SPOTS), NOT_NUMBERS).map(lambda t: broken(*t).encode()),
    st.sampled_from(SPOTS[2:]).map(lambda spot: broken(spot, None).encode()),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}"]),
)


@settings(**FUZZ)
@given(content=BAD_METRICS)
def test_bad_metrics_are_refused(workplace, capsys, content):
    (workplace / "bad.json").write_bytes(content)
    refuse(plot_metrics.main, ["bad.json"], workplace, capsys)


# Fewer lines than splits, so even sound ones are refused.
BAD_PROBLEMS = st.one_of(
    st.binary(max_size=40),
    JUNK.map(lambda junk: json.dumps(junk).encode()),
    st.dictionaries(
        st.sampled_from(["question", "answer", "split", "completion"]),
        JUNK | CONTROL | st.just("9" * 5000) | st.just(10**4000),
    ).map(lambda line: json.dumps(line).encode()),
    st.sampled_from([b"[" * 100_000, b'{"answer":' * 100_000, b"9" * 5000, b"\xef\xbb\xbf{}"]),
)


@settings(**FUZZ)
@given(content=BAD_PROBLEMS)
def test_bad_problems_are_refused(workplace, capsys, content):
    (workplace / "bad.jsonl").write_bytes(content)
    refuse(train_grpo.main, [*TRAINING, "--problems=bad.jsonl"], workplace, capsys)


@pytest.mark.parametrize("argv", [["none.json"], ["."], ["--nonsense"], ["a\0b"]])
def test_missing_metrics_are_refused(workplace, capsys, argv):
    refuse(plot_metrics.main, argv, workplace, capsys)


def copy_of_tiny(folder):
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder / "model"


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def pickle_weights(model) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Bomb()}, model / "pytorch_model.bin")


def edit(path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def custom_code(model) -> None:
    (model / "evil.py").write_text("open('executed', 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    edit(model / "config.json", model_type="evil", auto_map=auto)


def custom_tokenizer(model) -> None:
    custom_code(model)
    shutil.copy(TINY / "config.json", model / "config.json")
    (model / "tokenizer.json").unlink()
    auto = {"AutoTokenizer": ["evil.Evil", None]}
    edit(model / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto)


def template(text: str):
    def write(model) -> None:
        (model / "chat_template.jinja").write_text(text)

    return write


DAMAGE = {
    "a pickle": pickle_weights,
    "custom code": custom_code,
    "a tokenizer with custom code": custom_tokenizer,
    "no chat template": lambda model: (model / "chat_template.jinja").unlink(),
    "a template that fails": template("{{ messages[7].content.x.y }}"),
    "a template that breaks out": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "truncated weights": lambda model: (model / "model.safetensors").write_bytes(
        (TINY / "model.safetensors").read_bytes()[:100_000]
    ),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "a model of another kind": lambda model: edit(model / "config.json", model_type="bert"),
    "a vocabulary that is too small": lambda model: edit(model / "config.json", vocab_size=9),
    "a tokenizer of garbage": lambda model: (model / "tokenizer.json").write_text("{"),
    "an end token that is no token": lambda model: edit(
        model / "generation_config.json", eos_token_id="stop"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_refused_and_runs_no_code(workplace, capsys, damage):
    model = copy_of_tiny(workplace)
    DAMAGE[damage](model)
    refuse(inference.main, ["--model", str(model), "What is (1 + 2) * 3?"], workplace, capsys)
    refuse(train_grpo.main, [*TRAINING, "--model_name", str(model)], workplace, capsys)
    assert not (workplace / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"system": 1},
        {"system": "\ud800"},
        {"examples": [["a"]]},
        {"max_new_tokens": 0},
        {"off_task": 1},
        {"chat_template_kwargs": [1]},
        {"task": 1},
        {"task": {"rewards": 1}},
        {"task": {"min_operand": "0"}},
    ],
)
def test_a_damaged_prompt_file_is_refused(workplace, capsys, changes):
    model = copy_of_tiny(workplace)
    edit(model / "grpo_prompt.json", **changes)
    refuse(inference.main, ["--model", str(model), "What is (1 + 2) * 3?"], workplace, capsys)
