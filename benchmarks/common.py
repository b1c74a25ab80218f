"""What the benchmarks share: the work that is timed, its memory, and how results are written down.

Every benchmark trains on problems with operands 0 to 9, so that all prompts have the same number of
tokens, and with an end token that no model can sample, so that all completions have too.
"""

import json
import random
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spread
from bookkeeping import new_metrics
from checkpoint import prepare_output_dir, write_json
from cli import Parser, check_ranges
from policy import (
    Policy,
    describe_environment,
    encode_prompts,
    frozen_copy,
    keep_freed_memory,
    load_model,
    peak_memory,
)
from task import Problem
from train_grpo import Config, TrainState, make_prompt, train_iteration

HERE = Path(__file__).resolve().parent
BUNDLED = HERE.parent / "tiny_model"
CPU = torch.device("cpu")
NEVER = "<|never|>"  # ends a completion, and has an id that no model here can sample

# Of which the last 9 tokens are the question, less its first words, and the turn.
LONG_PROMPTS = {"prompt_tokens": 82, "beginning": 73}
# What `--shape 135m` is: SmolLM2-135M's shape, with random weights.
SMOLLM2 = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
}


@dataclass
class Work:
    """A model and what is asked of it: the same for each loop that is compared."""

    model: str = str(BUNDLED)  # folder
    dtype: torch.dtype = torch.float32  # compute; the weights are float32
    prompt_tokens: int = 22  # the system line is filled up to make so many; 0: as it stands
    beginning: int = 13  # tokens that all prompts begin with
    endless: bool = True  # every completion has max_new_tokens tokens
    # k3, as that is the one KL term which TRL has too.
    config: Config = field(
        default_factory=lambda: Config(min_operand=0, max_operand=9, kl_estimator="k3")
    )

    def describe(self) -> dict:
        """The work as a result file names it."""
        names = ("batch_size", "num_generations", "max_new_tokens", "num_inner_updates")
        names += ("learning_rate", "beta", "kl_estimator", "epsilon", "clip_grad_norm")
        names += ("micro_batch_size",)
        config = {name: value for name, value in asdict(self.config).items() if name in names}
        here = {"dtype": str(self.dtype), "prompt_tokens": self.prompt_tokens or None}
        return {**here, "end_token": not self.endless, **config}


def read_settings(settings: type, description: str, argv: list[str] | None):
    """A benchmark's settings from its command line; raises UserError for what is out of range."""
    parser = Parser(settings, description=description.split("\n")[0], allow_abbrev=False)
    found = settings(**vars(parser.parse_args(sys.argv[1:] if argv is None else argv)))
    check_ranges(found)
    return found


def large_work(folder: str) -> Work:
    """The work of `--shape 135m`; its model is written into `folder`."""
    model = in_own_process(write_random_model, Path(folder) / "model", SMOLLM2)
    return Work(model=model, dtype=torch.bfloat16, **LONG_PROMPTS)


def write_random_model(folder: Path, shape: dict) -> str:
    """Write an untrained Llama of `shape`, with the bundled tokenizer grown to its vocabulary."""
    description = json.loads((BUNDLED / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = description["model"]["vocab"]
    shape = {"vocab_size": len(pieces), **shape}
    # Ideographs that no prompt holds: any id can be decoded.
    pieces += [[chr(0x20000 + i), -20.0] for i in range(shape["vocab_size"] - len(pieces))]
    prepare_output_dir(folder)
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(BUNDLED / name, folder)
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(tie_word_embeddings=True, max_position_embeddings=512, **shape, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def load(work: Work):
    """Return (model, tokenizer, prompt) of a work; its prompts have work.prompt_tokens tokens."""
    model, tokenizer = load_model(work.model, CPU)
    if work.endless:
        tokenizer.add_special_tokens({"eos_token": NEVER})
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        assert tokenizer.eos_token_id >= model.config.vocab_size, "the model could sample it"
    prompt = make_prompt(work.config)
    if work.prompt_tokens:
        questions = [Problem(1, "+", 2, "*", 3).question, Problem(2, "-", 3, "+", 4).question]
        length = encode_prompts(tokenizer, questions, prompt, CPU)[0].shape[1]
        prompt["system"] += "." * (work.prompt_tokens - length)
        ids, _ = encode_prompts(tokenizer, questions, prompt, CPU)
        assert ids.shape[1] == work.prompt_tokens, f"a prompt has {length} tokens already"
        assert (ids[0] == ids[1]).long().cumprod(0).sum() == work.beginning
    return model, tokenizer, prompt


def start(work: Work):
    """Return (state, reference, tokenizer, prompt, config): what `train_iteration` takes."""
    keep_freed_memory(CPU)
    model, tokenizer, prompt = load(work)
    policy, config = Policy(model, work.dtype), work.config
    adamw = torch.optim.AdamW(policy.parameters(), config.learning_rate, weight_decay=0, fused=True)
    sampler = torch.Generator().manual_seed(spread.stream(config.seed))
    problems = random.Random(config.seed)
    state = TrainState(policy, adamw, problems, sampler, new_metrics(config, model))
    return state, frozen_copy(policy), tokenizer, prompt, config


def time_work(work: Work, seconds: float, least: int = 3) -> dict:
    """Seconds per iteration of this loop after one to warm up, and this process's memory."""
    inputs = start(work)
    rest = memory("VmRSS")
    train_iteration(*inputs)
    samples = []
    while len(samples) < least or sum(samples) < seconds:
        started = time.perf_counter()
        metrics = train_iteration(*inputs)
        samples.append(time.perf_counter() - started)
        assert not work.endless or metrics["completion_length"] == work.config.max_new_tokens
    return {
        "parameters": inputs[0].policy.model.num_parameters(),
        "seconds": median(samples),
        "samples": samples,
        "memory_before_mib": rest,
        "peak_memory_mib": memory(),
    }


def in_own_process(function: Callable, *arguments):
    """Call a function in a fresh process: its peak memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def memory(name: str = "VmHWM") -> float:
    """MiB that this process has held at most, or (`VmRSS`) holds now.

    Not by getrusage where it can be helped: on Linux a new process starts from its parent's peak.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory(CPU)["peak_memory_mib"]
    return int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1]) / 2**10


def machine() -> dict:
    """What it was measured on, and when."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    described = {**describe_environment(CPU), "cpu": found[1] if found else None}
    with suppress(PackageNotFoundError):
        described["trl"] = version("trl")
    return {"date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "environment": described}


def write_result(path: Path, result: dict) -> None:
    """Write a result as JSON, with what it was measured on."""
    prepare_output_dir(path.parent)
    write_json(path, {**machine(), **result})
    print(f"wrote {path}")
