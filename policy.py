"""The language model as GRPO sees it: load it, write prompts for it, score completions, save it.

Training, asking and the bundled model's script share it; the algorithm is in train_grpo.py.
"""

import copy
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import huggingface_hub
import torch
import transformers  # whose parts are loaded when they are first used
from safetensors import SafetensorError
from torch import Tensor, nn

import spread
from checkpoint import read_json, replace_folder, write_json
from cli import UserError
from task import EXAMPLES

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
HERE = Path(__file__).resolve().parent
PROMPT_FILE = "grpo_prompt.json"
WORTH_A_PASS = 128  # tokens that a pass over the common beginning must save
SOURCE_FILE = "grpo_source.json"


def choose_device(name: str) -> torch.device:
    """`auto` is cuda, else cpu. A device that is named and absent is an error, not a fallback.

    Of several processes on a machine, each takes a cuda device of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = spread.own_device(torch.device(name))
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: not on this machine; try --device auto") from error
    return device


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory that this process has held so far, in MiB, on the host and on cuda."""
    kibi = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss counts bytes there, KiB here
    peak = {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kibi}
    if device.type == "cuda":
        peak["peak_cuda_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


def describe_environment(device: torch.device) -> dict:
    """What a reader of the metrics needs to repeat a run: command, versions, machine, commit."""
    git = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "command": shlex.join([*spread.launcher(), *sys.argv]),
        "git_commit": commit or None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "device": device.type,
        "processes": spread.size(),
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
    """The folder that `name` means, seen from here or from this file; None if it is a hub id."""
    return next((folder for folder in (Path(name), HERE / name) if folder.is_dir()), None)


def read_source(name: str) -> dict | None:
    """Where fetch_model.py took a model from; None if it did not fetch it."""
    folder = model_folder(name)
    found = folder and (folder / SOURCE_FILE).exists()
    return read_json(folder / SOURCE_FILE) if found else None


def hub_source(name: str) -> str | None:
    """Where a hub id can be had, asking the hub once, for 3 seconds at most; None if nowhere."""
    if huggingface_hub.try_to_load_from_cache(name, "config.json"):
        return "in the cache"
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().model_info(name, timeout=3)
            return "on the model hub"
    except Exception:  # no network, a proxy, no such model, ...: all mean that it cannot be had
        pass
    return None


def choose_preset(presets: dict[str, dict], model: str) -> tuple[str, str]:
    """Return (preset, reason): the largest that this machine can have and can train.

    `model` is what the reference preset trains.
    """
    if not torch.cuda.is_available():
        return "tiny", "the bundled model, since there is no CUDA device"
    where = hub_source(model)
    if where:
        return "reference", f"there is CUDA, and {model} is {where}"
    if model_folder(presets["smollm2"]["model_name"]):
        return "smollm2", f"there is CUDA, {model} is out of reach, SmolLM2 was fetched"
    return "tiny", f"the bundled model, since {model} is out of reach"


def load_model(name: str, device: torch.device):
    """Return (model, tokenizer) of a folder or hub id, the weights in float32, or raise UserError.

    Only safetensors weights are read, and no code that a model brings along is run.
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
        end_token_ids(model, tokenizer)  # raises if there is none
    except Exception as error:  # the files are foreign: there is nothing that they cannot cause
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model {name} cannot be loaded: {reason}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"model {name} has no chat template; use an instruction-tuned model")
    if loading["missing_keys"]:  # which transformers would make up
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise UserError(f"model {name}: its files lack weights: {missing}, ...")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"model {name}: the tokenizer is another model's, with more tokens")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def end_token_ids(model: nn.Module, tokenizer) -> list[int]:
    """Every token that ends a completion: a model may name one or several, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token, int) for token in ids):
        raise UserError(f"the model names no token that ends an answer, but {ids}")
    return ids


def make_prompt(config) -> dict:
    """What surrounds a question: {"system": str, "examples": [[question, answer], ...]}."""
    examples = [[p.question, f"<answer>{p.answer}</answer>"] for p in EXAMPLES]
    return {"system": config.system_prompt, "examples": examples[: config.num_examples]}


def encode_prompts(
    tokenizer, questions: list[str], prompt: dict, device, multiple: int | None = None
) -> tuple[Tensor, Tensor]:
    """Write each question into the chat and tokenise, padded on the left (to a `multiple`).

    Returns (prompt_ids, prompt_mask), both (B, P) int64; the mask is 1 on real tokens.
    """
    opening = [{"role": "system", "content": prompt["system"]}] if prompt["system"] else []
    for question, answer in prompt["examples"]:
        opening.append({"role": "user", "content": question})
        opening.append({"role": "assistant", "content": answer})
    chats = [[*opening, {"role": "user", "content": question}] for question in questions]
    try:
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # the template is foreign code, run in a sandbox
        raise UserError(f"the model's chat template fails: {error}") from error
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        pad_to_multiple_of=multiple,
        return_tensors="pt",
    )
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def grouped_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention in plain steps, in which the heads that share a key share one matrix product.

    query: (N, H, S, D); key, value: (N, K, L, D); attention_mask: (N, 1, S, L), added. As the
    transformers library wants it, returns ((N, S, H, D), None).
    """
    rows, heads, steps, size = query.shape
    shared = query.reshape(rows, key.shape[1], -1, size)  # (N, K, H/K*S, D)
    scores = (shared @ key.transpose(2, 3) * scaling).view(rows, heads, steps, -1)
    weights = (scores + attention_mask).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = weights.view(*shared.shape[:3], -1) @ value  # (N, K, H/K*S, D)
    return mixed.view(query.shape).transpose(1, 2).contiguous(), None


@dataclass
class Context:
    """What a model has read so far, of N sequences: all that it needs to read on."""

    weights: dict[str, Tensor]  # what it computes with, where those are not its own
    cache: "transformers.DynamicCache"
    mask: Tensor  # (N, S): 1 on real tokens

    def repeat(self, count: int) -> None:
        """Repeat each sequence `count` times, in place."""
        self.cache.batch_repeat_interleave(count)
        self.mask = self.mask.repeat_interleave(count, dim=0)


class Policy(nn.Module):
    """A causal language model as GRPO sees it: completions in, their log-probabilities out.

    Each prompt is encoded once and its key-value cache repeated for the G completions of its group,
    both to sample and, with gradients flowing through the cache, to train.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.eval()  # no dropout: the ratio compares two passes over the same tokens
        self.compute_dtype = compute_dtype
        if compute_dtype == torch.bfloat16 and model.device.type == "cpu":
            # There PyTorch's fused attention takes more than twice the time.
            fused = model.config._attn_implementation == "sdpa"
            transformers.AttentionInterface.register("grouped", grouped_attention)
            masks = transformers.AttentionMaskInterface
            masks.register("grouped", masks()["eager"])
            model.set_attn_implementation("grouped" if fused else "eager")

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor) -> Tensor:
        """Return the log-probability of each completion token given all that stands before it.

        prompt_ids, prompt_mask: (B, P); completion_ids: (B*G, T), group after group.
        Returns (B*G, T) float32.
        """
        group = len(completion_ids) // len(prompt_ids)
        logits, context = self.encode(prompt_ids, prompt_mask, group)
        if completion_ids.shape[1] > 1:
            rest = self.read(completion_ids[:, :-1], context)
            logits = torch.cat([logits, rest], dim=1)  # (B*G, T, V)
        return token_logprobs(logits, completion_ids)

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor, group: int) -> tuple[Tensor, Context]:
        """Read prompts (B, P), repeat each `group` times: logits (B*G, 1, V), and the context.

        What all prompts begin with is read once, where that is worth a pass of its own.
        """
        # One cast for all that is read, through which gradients flow back to the float32 weights.
        cast = self.compute_dtype != torch.float32
        parameters = self.model.named_parameters() if cast else ()
        weights = {name: p.to(self.compute_dtype) for name, p in parameters}
        context = Context(weights, transformers.DynamicCache(), prompt_mask[:, :0])
        padding = prompt_ids.shape[1] - prompt_mask.sum(dim=1, keepdim=True)  # (B, 1)
        begin = self.common_beginning(prompt_ids, padding)
        if begin:
            context.mask = prompt_mask[:1, :0]
            start = int(padding[0])
            self.read(prompt_ids[:1, start : start + begin], context, keep=1)
            context.repeat(len(prompt_ids))
        rest = prompt_ids[:, begin:]
        mask = torch.arange(rest.shape[1], device=rest.device) >= padding
        logits = self.read(rest, context, keep=1, mask=mask.to(prompt_mask.dtype))
        context.repeat(group)
        return logits.repeat_interleave(group, dim=0), context

    def common_beginning(self, prompt_ids: Tensor, padding: Tensor) -> int:
        """How many tokens all prompts (B, P) begin with; 0 where it does not pay to read them once.

        A GPU has tokens to spare, but no passes. And a sliding window would count the padding that
        comes to stand between the beginning and the rest.
        """
        rows, width = prompt_ids.shape
        sliding = getattr(self.model.config, "sliding_window", None)
        if rows == 1 or prompt_ids.device.type != "cpu" or sliding:
            return 0
        columns = padding + torch.arange(width)  # (B, P)
        ids = prompt_ids.gather(1, columns.clamp(max=width - 1))  # without the padding
        longest = width - int(padding.max()) - 1  # the rest needs a token
        begin = int((ids == ids[0]).all(dim=0)[:longest].cumprod(dim=0).sum())
        return begin if begin * (rows - 1) >= WORTH_A_PASS else 0

    def read(self, ids: Tensor, context: Context, keep: int = 0, mask=None) -> Tensor:
        """Read ids (N, S) after what the context holds, which grows by them.

        mask: (N, S), all ones by default. Returns the logits of the token after each of the last
        `keep` of them, (N, keep, V), or after all if that is 0.
        """
        mask = torch.ones_like(ids) if mask is None else mask
        context.mask = torch.cat([context.mask, mask], dim=1)
        # Counted over real tokens, so that left padding does not shift a prompt's positions.
        positions = (context.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # (N, S)
        # By index, not by count: a slice is not contiguous, and a product with it would first copy
        # the vocabulary's whole matrix for each sequence.
        kept = torch.arange(ids.shape[1], device=ids.device)[-keep:] if keep else 0
        inputs = {
            "input_ids": ids,
            "attention_mask": context.mask,
            "position_ids": positions,
            "past_key_values": context.cache,
            "use_cache": True,
            "logits_to_keep": kept,
        }
        return torch.func.functional_call(self.model, context.weights, kwargs=inputs).logits


def frozen_copy(policy: Policy) -> Policy:
    """A policy to stay as it is: a copy whose weights are in the type that it computes in.

    Frozen, as no optimiser holds it and it runs under no_grad. Not by requires_grad_(False): for
    that PyTorch picks kernels that round differently, and kl would not start at exactly 0.
    """
    reference = copy.deepcopy(policy)
    for p in reference.parameters():  # not its buffers: the angles of positions stay float32
        p.data = p.data.to(policy.compute_dtype)
    return reference


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of ids (N, T) under logits (N, T, V), in float32: (N, T)."""
    return logits.float().log_softmax(dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def micro_batches(mask: Tensor, config, trim: bool) -> list[tuple[slice, tuple[slice, slice]]]:
    """Cut B*G completions into pieces of micro_batch_size: (prompts, (completions, tokens)).

    mask: (B*G, T). With `trim` each piece is as wide as its own longest completion, else T.
    """
    rows, group, pieces = len(mask), config.num_generations, []
    size = config.micro_batch_size or rows
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        width = int(mask[start:stop].sum(dim=1).max()) if trim else mask.shape[1]
        prompts = slice(start // group, math.ceil(stop / group))
        pieces.append((prompts, (slice(start, stop), slice(width))))
    return pieces


def check_shared_prefix(policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
    """Raise UserError unless sharing prompts (B, P) gives what whole unpadded sequences give."""
    completion_ids = prompt_ids[:, -4:].flip(1)  # (B, 4): any tokens will do
    try:
        with torch.no_grad():
            shared = policy(prompt_ids, prompt_mask, completion_ids.repeat_interleave(2, dim=0))
            whole = []
            for row, mask, completion in zip(prompt_ids, prompt_mask, completion_ids, strict=True):
                ids = torch.cat([row[mask == 1], completion])[None]
                logits = policy.model(input_ids=ids, use_cache=False, logits_to_keep=5).logits
                whole += 2 * [token_logprobs(logits[:, :-1], completion[None])]
        gap = (shared - torch.cat(whole)).abs().max().item()
        problem = f"changes its log-probabilities by {gap:.2g}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        gap, problem = math.inf, f"fails ({str(error).splitlines()[0]})"
    if not gap < (1e-3 if policy.compute_dtype == torch.float32 else 0.5):
        raise UserError(
            f"a model of type {policy.model.config.model_type} cannot be trained here: sharing the"
            f" encoded prompt {problem}; choose another model"
        )


def check_length(model: nn.Module, prompt_ids: Tensor, new_tokens: int) -> None:
    """Raise UserError if prompts (B, P) and what follows are longer than the model can read."""
    length = prompt_ids.shape[1] + new_tokens
    limit = getattr(model.config, "max_position_embeddings", None) or length
    if length > limit:
        raise UserError(f"prompt and answer need {length} tokens; this model reads {limit}")


def check_fit(policy: Policy, tokenizer, questions: list[str], prompt: dict, length: int) -> None:
    """Raise UserError unless the policy can be trained on such questions and that many tokens."""
    prompts = encode_prompts(tokenizer, questions, prompt, policy.model.device)
    check_length(policy.model, prompts[0], length)
    check_shared_prefix(policy, *prompts)


def write_model(model: nn.Module, tokenizer, prompt: dict, folder: Path, card: str) -> None:
    """Write a model that plain `from_pretrained` loads, how to ask it, and its card."""
    model = copy.copy(model)  # shallow: the weights are shared, the generation config is not
    # Greedy without penalties, so that plain `generate` agrees with the greedy accuracy measured.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        eos_token_id=end_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=model.config.bos_token_id,
    )
    folder.mkdir(exist_ok=True)  # without parents: save_pretrained would bring back a deleted one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / PROMPT_FILE, prompt)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_model(model: nn.Module, tokenizer, prompt: dict, output: Path, metrics: dict) -> None:
    """Put a trained model in place of output/saved_model, whole or not at all."""
    beside = output / "saved_model.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write_model(model, tokenizer, prompt, beside, model_card(metrics))
        replace_folder(beside, output / "saved_model")
    except (OSError, SafetensorError):
        shutil.rmtree(beside, ignore_errors=True)  # on a full disk, half a model is in the way
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
    moved = [e["off_task"]["kl"] for e in metrics["evaluations"] if e["iteration"] == best]
    off_task = f"on prompts off the task its answers lie {moved[-1]:.2g} nats per token from them."
    source = metrics["environment"].get("model_source") or {}
    settings = config | {f"base model: {name}": value for name, value in source.items()}
    recipe = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
base_model: {source.get("model", config["model_name"])}
tags: [grpo, arithmetic]
---
# {config["model_name"]} after GRPO on arithmetic

Answers `What is (a op1 b) op2 c?` with `<answer>N</answer>`, for operands {config["min_operand"]}
to {config["max_operand"]} and the operators + - *. Trained by `train_grpo.py` from
{config["model_name"]}: the policy after iteration {best}, the best by
validation accuracy of {len(metrics["iterations"])} so far. {PROMPT_FILE} holds the system line and
the worked examples that it was asked with.

## Measured on held-out test problems

Sampled is at temperature 1, one sample per problem.

| after iteration | answers | accuracy | 95% interval |
|---|---|---|---|
{measured}

Other skills of the base model may have been lost: {off_task}

## Recipe

| setting | value |
|---|---|
{recipe}
"""
