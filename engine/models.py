"""Find, load, check and save a model; its chat prompt, its card; devices and the environment."""

import copy
import ctypes
import inspect
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import torch
import transformers  # its parts are loaded when they are first used
from safetensors import SafetensorError
from torch import Tensor, nn

from engine import distributed
from engine.checkpoint import read_json, replace_folder, write_json
from engine.cli import ROOT, UserError, check_text

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
PROMPT_FILE = "grpo_prompt.json"
SOURCE_FILE = "grpo_source.json"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def choose_device(name: str) -> torch.device:
    """`auto` is cuda if there is one, else cpu. Raises UserError if a named device is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = distributed.local_device(torch.device(name))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not on this machine; try --device auto") from error
    return device


def tune_cpu_memory(device: torch.device) -> None:
    """Keep freed memory for later tensors, and few compiled kernels."""
    # oneDNN keeps a kernel for each of the last 1,024 shapes, and here almost every pass has a new
    # shape: 50 MB more per iteration of SmolLM2, without end. It reads these at its first use.
    os.environ.setdefault("LRU_CACHE_CAPACITY", "10")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20")
    # By default glibc returns large blocks to the system, which must zero every page before handing
    # it out again: a tenth of an iteration or more.
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute type; `auto` is bfloat16 on a cuda device that computes in it natively."""
    if name == "auto":
        # Older cards (T4, V100) only emulate it: compute capability 8.0 is the first to have it.
        native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        name = "bfloat16" if native else "float32"
    return getattr(torch, name)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process so far, in MiB: on the host where known, and on cuda."""
    peak = {}
    try:
        import resource  # Unix only

        kibi = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak["peak_memory_mib"] = usage / kibi
    except ImportError:
        pass
    if device.type == "cuda":
        peak["peak_cuda_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def describe_environment(device: torch.device) -> dict:
    """What it takes to repeat a run: command, commit, versions, machine."""
    git = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": shlex.join([*distributed.launcher(), *sys.argv]),
        "git_commit": commit or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "device": device.type,
        "processes": distributed.world_size(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def fingerprint(model: nn.Module) -> int:
    """A checksum of a model's weights."""
    total = 0
    for p in model.parameters():
        total = zlib.crc32(p.detach().cpu().contiguous().numpy(), total)
    return total


def model_folder(name: str) -> Path | None:
    """The folder called `name`, here or in this repository; None if there is none."""
    return next((folder for folder in (Path(name), ROOT / name) if folder.is_dir()), None)


def read_source(name: str) -> dict | None:
    """Where fetch_model.py got a model from; None if it did not fetch it."""
    folder = model_folder(name)
    found = folder and (folder / SOURCE_FILE).exists()
    return read_json(folder / SOURCE_FILE) if found else None


def hub_source(name: str) -> str | None:
    """Where a hub id is available; None if nowhere. Waits for the hub for at most 3 seconds."""
    if huggingface_hub.try_to_load_from_cache(name, "config.json"):
        return "in the cache"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().model_info(name, timeout=3)
            return "on the model hub"
    except Exception:  # no network, a proxy, no such model, ...
        pass
    return None


def choose_preset(presets: dict[str, dict], model: str) -> tuple[str, str]:
    """(preset, reason): the largest model that this machine can get and train.

    `model` is the one that the reference preset trains.
    """
    if not torch.cuda.is_available():
        return "tiny", "the bundled model, since there is no CUDA device"
    where = hub_source(model)
    if where:
        return "reference", f"there is CUDA, and {model} is {where}"
    if model_folder(presets["smollm2"]["model_name"]):
        return "smollm2", f"there is CUDA, {model} is not available, SmolLM2 was fetched"
    return "tiny", f"the bundled model, since {model} is not available"


def load_model(name: str, device: torch.device):
    """(model, tokenizer) of a folder or hub id, with float32 weights. Raises UserError.

    Only safetensors are read, and no code that comes with a model is run.
    """
    folder = model_folder(name)
    if folder is None and name.startswith("models/"):
        made = "models/SmolLM2-135M-Instruct"
        raise UserError(f"model {name}: no such folder; `python fetch_model.py` makes {made}")
    if folder is None and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"model {name}: no such folder, and not a hub id (owner/name)")
    if folder is not None and not (folder / "config.json").exists():
        raise UserError(f"model {name}: the folder holds no config.json")
    if folder is None and not hub_source(name):
        raise UserError(
            f"model {name}: not in the cache, and not on the model hub if that can be reached;"
            " name a folder, or take the bundled model with --preset tiny"
        )
    source = str(folder or name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        eos_token_ids(model, tokenizer)  # raises if there is none
    except Exception as error:  # foreign files can cause any error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {name} cannot be loaded: {reason}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model {name} has no chat template; use an instruction-tuned model")
    if loading["missing_keys"]:  # transformers would initialise them at random
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"model {name}: its files lack weights: {missing}, ...")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"model {name}: its tokenizer has more tokens than the model; it belongs to another one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def eos_token_ids(model: nn.Module, tokenizer) -> list[int]:
    """The tokens that end a completion: those the model names, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"the model names no end-of-sequence token, but {ids}")
    return ids


# Asked to see how far training moves a chat model on questions it is not trained on.
OFF_TASK = {
    "system": "",
    "questions": dict.fromkeys(
        [
            "What is the capital of France?",
            "Write one sentence about the sea.",
            "How do I boil an egg?",
            "Translate to French: good morning.",
            "Name three colours.",
            "Why is the sky blue?",
            "Who wrote Romeo and Juliet?",
            "Give me a word that rhymes with light.",
        ]
    ),
}


def template_kwargs(text: str) -> dict:
    """Read --chat_template_kwargs. Raises UserError."""
    flag = f"--chat_template_kwargs {text:.80}"
    try:
        kwargs = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: not valid JSON: {error}") from error
    apply = inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template)
    if not isinstance(kwargs, dict) or kwargs.keys() & {*apply.parameters, "messages"}:
        raise UserError(
            f"{flag}: must be a JSON object of variables that the chat template reads, like"
            ' {"enable_thinking": false}'
        )
    check_text("--chat_template_kwargs", json.dumps(kwargs, ensure_ascii=False))
    return kwargs


def make_prompt(config, examples: list[tuple], rewards_sha256: str) -> dict:
    """How to ask a model, as grpo_prompt.json keeps it beside the weights, from a Config.

    {"system": str, "examples": [[question, completion], ...], "chat_template_kwargs": {...},
    "max_new_tokens": int, "task": {settings}, "off_task": {"system": str, "questions": {question:
    answer, or None where there is no single one}}}
    """
    names = "problems", "min_operand", "max_operand", "rewards"
    return {
        "system": config.system_prompt,
        "examples": [[question, completion] for question, _, completion in examples],
        "chat_template_kwargs": template_kwargs(config.chat_template_kwargs),
        "max_new_tokens": config.max_new_tokens,
        "task": {n: getattr(config, n) for n in names} | {"rewards_sha256": rewards_sha256},
        "off_task": (read_prompt(config.model_name) or {}).get("off_task", OFF_TASK),
    }


def read_prompt(name: str) -> dict | None:
    """The grpo_prompt.json of a model; None if it has none. Raises UserError if it is damaged."""
    folder = model_folder(name)
    if folder is None or not (folder / PROMPT_FILE).exists():
        return None
    file = folder / PROMPT_FILE
    prompt = read_json(file)
    examples, tokens = prompt.get("examples"), prompt.get("max_new_tokens")
    off_task, task = prompt.get("off_task", OFF_TASK), prompt.get("task", {})
    if not (
        isinstance(prompt.get("system"), str)
        and isinstance(examples, list)
        and all(isinstance(e, list) and [type(t) for t in e] == [str, str] for e in examples)
        and (type(tokens) is int and tokens > 0)
        and isinstance(prompt.get("chat_template_kwargs", {}), dict)
        and isinstance(task, dict)
        and all(isinstance(task.get(n, ""), str) for n in ("problems", "rewards", "rewards_sha256"))
        and all(type(task.get(name, 0)) is int for name in ("min_operand", "max_operand"))
        and isinstance(off_task, dict)
        and isinstance(off_task.get("system"), str)
        and isinstance(off_task.get("questions"), dict)
        and all(a is None or type(a) is int for a in off_task["questions"].values())
    ):
        raise UserError(f"{file} is not a prompt as training writes it")
    texts = [prompt["system"], off_task["system"], *off_task["questions"]]
    for text in (*texts, *(text for example in examples for text in example)):
        check_text(str(file), text)
    return {"off_task": OFF_TASK, **prompt}  # files of earlier versions may have none


def encode_prompts(tokenizer, questions: list[str], prompt: dict, device) -> tuple[Tensor, Tensor]:
    """Put each question into the chat and tokenise, padded on the left.

    Returns (prompt_ids, prompt_mask), both (B, P) int64; the mask is 1 on real tokens.
    """
    opening = [{"role": "system", "content": prompt["system"]}] if prompt["system"] else []
    for question, answer in prompt.get("examples", []):
        opening.append({"role": "user", "content": question})
        opening.append({"role": "assistant", "content": answer})
    chats = [[*opening, {"role": "user", "content": question}] for question in questions]
    try:
        texts = tokenizer.apply_chat_template(
            chats,
            tokenize=False,
            add_generation_prompt=True,
            **prompt.get("chat_template_kwargs", {}),
        )
    except Exception as error:  # the template is foreign code, run in a sandbox
        raise UserError(f"the model's chat template fails: {error}") from error
    batch = tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def check_length(model: nn.Module, prompt_ids: Tensor, new_tokens: int) -> None:
    """Raise UserError if prompts (B, P) and new tokens exceed the model's context."""
    length = prompt_ids.shape[1] + new_tokens
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(f"prompt and answer need {length} tokens; this model's context is {limit}")


def write_model(model: nn.Module, tokenizer, prompt: dict, folder: Path, card: str) -> None:
    """Write a model that plain `from_pretrained` loads, its prompt and its card."""
    model = copy.copy(model)  # shallow, to change the generation config only here
    # Plain greedy, so that `generate` gives the greedy accuracy that was measured.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=eos_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=model.config.bos_token_id,
    )
    folder.mkdir(exist_ok=True)  # no parents: save_pretrained would recreate a deleted output_dir
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / PROMPT_FILE, prompt)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_model(model: nn.Module, tokenizer, prompt: dict, output: Path, metrics: dict) -> None:
    """Replace output/saved_model atomically by a trained model."""
    beside = output / "saved_model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_model(model, tokenizer, prompt, beside, model_card(metrics))
        replace_folder(beside, output / "saved_model")
    except (OSError, SafetensorError):
        shutil.rmtree(beside, ignore_errors=True)  # frees the space if the disk is full
        raise


def model_card(metrics: dict) -> str:
    """The README of a trained model, from the metrics of its run."""
    config = metrics["config"]
    rows = [
        f"| {e['iteration']} | {kind} | {a['accuracy']:.1%} | {a['low']:.1%} to {a['high']:.1%} |"
        for e in metrics["evaluations"]
        if e["split"] == "test"
        for kind, a in e["accuracies"].items()
    ]
    measured = "\n".join(rows)
    best = metrics["best_iteration"]
    off_task = [e["off_task"]["kl"] for e in metrics["evaluations"] if e["iteration"] == best]
    source = metrics["environment"].get("model_source") or {}
    low, high = config["min_operand"], config["max_operand"]
    task = f"`What is (a op1 b) op2 c?`, for operands {low} to {high} and the operators + - *"
    if config["problems"]:
        file = Path(config["problems"]).name
        task = f"the questions of {file} (SHA-256 {metrics['environment']['problems_sha256']})"
    judge = Path(config["rewards"] or "rewards.py").name
    settings = config | {f"base model: {name}": value for name, value in source.items()}
    recipe = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
base_model: {source.get("model", config["model_name"])}
tags: [grpo]
---
# {config["model_name"]} after GRPO

Answers {task}. Trained by `train_grpo.py` from {config["model_name"]} with the rewards of {judge}
(SHA-256 {metrics["environment"]["rewards_sha256"]}). This is the policy after iteration {best},
the best of {len(metrics["iterations"])} by validation accuracy. {PROMPT_FILE} holds the system line
and the worked examples of its prompt.

## Measured on held-out test problems

Sampled is at temperature 1, one sample per problem.

| after iteration | answers | accuracy | 95% interval |
|---|---|---|---|
{measured}

Other skills of the base model may be lost: on questions off the task its answers are
{off_task[-1]:.2g} nats per token away from the base model's.

## Recipe

| setting | value |
|---|---|
{recipe}
"""
