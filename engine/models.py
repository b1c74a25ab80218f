"""Find, load, check and save a model; its card."""

import copy
import dataclasses
import re
import shutil
import zlib
from pathlib import Path

import huggingface_hub
import safetensors
import torch
import transformers  # its parts are loaded when they are first used
from safetensors import SafetensorError
from torch import nn

from engine.files import (
    ROOT,
    UserError,
    first_line,
    out_of_memory,
    read_json,
    replace_folder,
    scratch_folder,
    write_json,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
PROMPT_FILE = "grpo_prompt.json"
SOURCE_FILE = "grpo_source.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json")
TOKENIZER_FILES += ("added_tokens.json", "chat_template*", "LICENSE*")
LFS_POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")
SCALE = re.compile(r"(.*weight)[._]?(scale|zero|absmax)")
QUANTISED = "its weights are quantised; name the unquantised model, which can be trained"


def fingerprint(model: nn.Module) -> int:
    """A checksum of a model's weights."""
    total = 0
    for p in model.parameters():
        total = zlib.crc32(p.detach().cpu().contiguous().numpy(), total)
    return total


def model_folder(name: str) -> Path | None:
    """The folder called `name`, here or in this repository; None if there is none."""
    return next((folder for folder in (Path(name), ROOT / name) if folder.is_dir()), None)


def read_model_json(name: str, file: str) -> dict | None:
    """A JSON file in the folder of a model; None if it has none."""
    folder = model_folder(name)
    return read_json(folder / file) if folder and (folder / file).exists() else None


def read_source(name: str) -> dict | None:
    """Where fetch_model.py got a model from; None if it did not fetch it."""
    return read_model_json(name, SOURCE_FILE)


def hub_source(name: str) -> str | None:
    """Where a hub id is available; None if nowhere. Waits for the hub for at most 3 seconds."""
    try:
        if huggingface_hub.try_to_load_from_cache(name, "config.json"):
            return "in the cache"
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().model_info(name, timeout=3)
            return "on the model hub"
    except Exception:  # no network, a proxy, no such model, no name that the hub allows, ...
        pass
    return None


def check_files(folder: Path) -> None:
    """Raise UserError if the files of a model show that it cannot be trained."""
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path.name} is only a Git LFS pointer; run `git lfs pull`")
    endings = {path.suffix for path in files}
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise UserError("it is an adapter; merge it into its base model, and name the merged model")
    if ".bin" in endings and ".safetensors" not in endings:
        raise UserError("its weights, .bin files, can run code; convert them to safetensors")
    dtypes = {}
    for path in folder.glob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            dtypes |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, dtype in dtypes.items():
        scaled = SCALE.match(name)
        if (scaled and scaled[1] in dtypes) or (name.endswith("weight") and dtype not in FLOATS):
            raise UserError(f"{name} shows that {QUANTISED}")


def read_model(name: str) -> tuple:
    """Load and check a model on the CPU. Returns (model, tokenizer, names of unused weights)."""
    folder = model_folder(name)
    if folder:
        check_files(folder)
    elif not hub_source(name):
        raise UserError(
            "no such folder, and no model of the hub that can be reached; name a folder, take the"
            " bundled model with --preset tiny, or run `python fetch_model.py`, which makes"
            " models/SmolLM2-135M-Instruct"
        )
    source, safe = str(folder or name), {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(source, **safe)
    if getattr(config, "quantization_config", None):
        raise UserError(QUANTISED)
    options = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
    found = transformers.AutoModelForCausalLM.from_pretrained(source, **options, **safe)
    model, loading = found
    if folder is None:  # it is in the cache now
        folder = Path(huggingface_hub.try_to_load_from_cache(name, "config.json")).parent
        check_files(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **safe)
    tokenizer.name_or_path = str(folder)  # whose files a trained model gets
    if loading["missing_keys"]:  # transformers would initialise them at random
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"its files lack weights: {missing}, ...")
    if tokenizer.chat_template is None:
        raise UserError("it has no chat template; use an instruction-tuned model")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError("its tokenizer has more tokens than the model; it belongs to another one")
    return model, tokenizer, sorted(loading["unexpected_keys"])


def load_model(name: str, device: torch.device):
    """(model, tokenizer) of a folder or hub id, with float32 weights. Raises UserError.

    Only safetensors are read, and no code that comes with a model is run.
    """
    try:
        model, tokenizer, unused = read_model(name)
        ends = eos_token_ids(model, tokenizer)
    except UserError as error:
        raise UserError(f"model {name}: {error}") from error
    except Exception as error:  # foreign files can cause any error
        if out_of_memory(error):
            raise
        raise UserError(f"model {name} cannot be loaded: {first_line(error)}") from error
    if unused:
        text = ", ".join(unused[:3])
        print(f"warning: model {name} has weights that it does not use: {text}, ...")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    freeze_beside_text(model)
    return model.to(device), tokenizer


def freeze_beside_text(model: nn.Module) -> None:
    """Do not train what text never passes through, like a vision tower: it gets no gradient."""
    if model.config.get_text_config() is model.config:
        return
    embeddings = model.get_input_embeddings(), model.get_output_embeddings()
    text = {p for module in (model.get_decoder(), *embeddings) for p in module.parameters()}
    beside = {name: p for name, p in model.named_parameters() if p not in text}
    for p in beside.values():
        p.requires_grad_(False)
    parts = sorted({".".join(name.split(".")[:2]) for name in beside})
    print(f"note: not trained, since text does not pass through: {', '.join(parts)}")


def eos_token_ids(model: nn.Module, tokenizer) -> list[int]:
    """The tokens that end a completion: those that the model names, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    ids = [i for i in dict.fromkeys([*named, tokenizer.eos_token_id]) if i is not None]
    if not ids or not all(isinstance(token, int) for token in ids):
        raise UserError(f"the model names no end-of-sequence token, but {named}")
    return ids


def write_model(model: nn.Module, tokenizer, prompt, folder: Path, card: str) -> None:
    """Write a model that plain `from_pretrained` loads, its Prompt and its card."""
    model = copy.copy(model)  # shallow, to change the generation config only here
    # Plain greedy, so that `generate` gives the greedy accuracy that was measured.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=eos_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=getattr(model.config.get_text_config(), "bos_token_id", None),
    )
    model.save_pretrained(folder)
    # The base model's own: transformers 5 rewrites them in a form that older readers refuse.
    base = Path(tokenizer.name_or_path or "no folder")
    copied = [path for pattern in TOKENIZER_FILES for path in base.glob(pattern) if path.is_file()]
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    if not copied:
        tokenizer.save_pretrained(folder)
    write_json(folder / PROMPT_FILE, dataclasses.asdict(prompt))
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_saving(model: nn.Module, tokenizer, prompt, output: Path) -> None:
    """Save a model to a scratch folder, read it back, compare. Raises UserError if it differs."""
    try:
        with scratch_folder(output / "saved_model.tmp") as folder:
            write_model(model, tokenizer, prompt, folder, card="")
            saved = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            weights = saved.state_dict()
            differ = [n for n, w in model.state_dict().items() if not w.cpu().equal(weights[n])]
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # third-party code
        raise UserError(f"this model cannot be saved and loaded again: {error}") from error
    if differ:
        raise UserError(f"this model is not saved as it is: {', '.join(differ[:3])} differ")


def save_model(model: nn.Module, tokenizer, prompt, output: Path, card: str) -> None:
    """Replace output/saved_model atomically by a trained model."""
    with scratch_folder(output / "saved_model.tmp") as folder:
        write_model(model, tokenizer, prompt, folder, card)
        replace_folder(folder, output / "saved_model")


def model_card(metrics: dict) -> str:
    """The README of a trained model, from the metrics of its run."""
    config, environment, best = (metrics[n] for n in ("config", "environment", "best_iteration"))
    source = environment["model_source"] or {}
    tests = [e for e in metrics["evaluations"] if e["split"] == "test"]
    drift = [e["off_task"]["kl"] for e in metrics["evaluations"] if e["iteration"] == best][-1]
    files = {n: Path(config[n]).name for n in ("problems", "rewards") if config[n]}
    accuracies = "\n".join(
        f"| {e['iteration']} | {kind} | {a['accuracy']:.1%} | {a['low']:.1%} to {a['high']:.1%} |"
        for e in tests
        for kind, a in e["accuracies"].items()
    )
    hashes = {n: environment[n] for n in ("problems_sha256", "rewards_sha256") if environment[n]}
    base = {f"base model: {name}": value for name, value in source.items()}
    recipe = "\n".join(f"| {n} | {v} |" for n, v in {**config, **files, **hashes, **base}.items())
    return f"""---
base_model: {source.get("model", config["model_name"])}
tags: [grpo]
---
# {config["model_name"]} after GRPO

Trained by `train_grpo.py` on {files.get("problems", "`What is (a op1 b) op2 c?`")}. This is the
policy after iteration {best}, the best of {len(metrics["iterations"])} by validation accuracy.
{PROMPT_FILE} holds the system line and the worked examples of its prompt.

## Measured on held-out test problems

Sampled is at temperature 1, one sample per problem.

| after iteration | answers | accuracy | 95% interval |
|---|---|---|---|
{accuracies}

Other skills of the base model may be lost: on questions off the task its answers are {drift:.2g}
nats per token away from the base model's. The weights are float32: at a learning rate of 1e-7,
rounding to bfloat16 would erase what was learned.

## Recipe

| setting | value |
|---|---|
{recipe}
"""
