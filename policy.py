"""The language model as GRPO sees it: load it, write prompts for it, score completions, save it.

Training, asking and the bundled model's script share it; the algorithm is in train_grpo.py.
"""

import copy
import ctypes
import math
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
import zlib
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

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
SOURCE_FILE = "grpo_source.json"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
PIECE = 2**20  # logits that a CPU handles at a time: in float32, 4 MiB


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


def keep_freed_memory(device: torch.device) -> None:
    """Have the C library keep what is freed, for the tensors to come, where they are on the CPU.

    By default it hands large blocks back to the system, which must zero each page before it gives
    it out again: up to a tenth of an iteration of a large model.
    """
    here = sys.platform == "linux" and device.type == "cpu"
    libc = ctypes.CDLL(None) if here else None
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


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


class Part(NamedTuple):
    """Tokens to be read: R sequences of S each."""

    ids: Tensor  # (R, S)
    mask: Tensor  # (R, S) bool: true on real tokens
    keep: int  # of how many of the last of the S tokens logits are wanted


def unpadded(ids: Tensor, keep: int) -> Part:
    """A part of which all tokens are real."""
    return Part(ids, torch.ones_like(ids, dtype=torch.bool), keep)


class Context:
    """What a model has read so far, of N sequences: all that it needs to read on."""

    def __init__(self, weights: dict[str, Tensor], mask: Tensor):
        self.weights = weights  # what the model computes with, where those are not its own
        self.mask = mask  # (N, L) bool: true on real tokens
        self.cache: dict[int, list[Tensor]] = {}  # by layer: keys and values, (N, K, L, D)
        # Of what is being read, part by part: its mask, the positions of all before it and its
        # own, both (R, L), and its length S; and what `attention_mask` has made of them.
        self.parts: list[tuple[Tensor, Tensor, int]] = []
        self.masks: dict[tuple[int, int | None], Tensor] = {}

    def append(self, part: Part) -> Tensor:
        """Take in a part that is about to be read. Returns the positions of its tokens, (R, S)."""
        self.mask = torch.cat([fan_out(self.mask, len(part.ids)), part.mask], dim=1)  # (R, L)
        # Counted over real tokens, so that left padding does not shift a prompt's positions.
        positions = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)  # (R, L)
        self.parts.append((self.mask, positions, part.ids.shape[1]))
        return positions[:, -part.ids.shape[1] :]

    def attention_mask(self, index: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """What to add to the attention scores of a part: (R, 1, S, L), 0 where a token may look."""
        if (index, window) not in self.masks:
            real, positions, steps = self.parts[index]
            column = torch.arange(real.shape[1], device=real.device)
            row = column[-steps:, None]  # (S, 1)
            allowed = real[:, None] & (column <= row)  # (R, S, L)
            if window:
                allowed &= positions[:, None] > positions[:, -steps:, None] - window
            mask = torch.zeros_like(allowed, dtype=dtype)
            mask.masked_fill_(~allowed, torch.finfo(dtype).min)
            self.masks[index, window] = mask[:, None]
        return self.masks[index, window]


def fan_out(tensor: Tensor, rows: int) -> Tensor:
    """Repeat each row of a tensor, so that there are `rows`; no copy where there are already."""
    count = rows // len(tensor)
    return tensor.unsqueeze(1).expand(-1, count, *tensor.shape[1:]).flatten(0, 1)


def branching_attention(
    attend, module, query, key, value, attention_mask, context=None, sliding_window=None, **options
):
    """Attention of parts that stand one after another in a single row of N tokens.

    The sequences of a part go on from those of the part before it (of the context, for the first):
    they branch, where they are more. query: (1, H, N, D); key, value: (1, K, N, D). `attend` is
    what computes it for sequences apart; without a context, it is called as if for itself.
    """
    if attend is None:  # each architecture has an eager one of its own
        attend = sys.modules[type(module).__module__].eager_attention_forward
    if context is None:
        options["sliding_window"] = sliding_window
        return attend(module, query, key, value, attention_mask, **options)
    if attention_mask.numel() > 1:
        raise ValueError("the model makes an attention mask of its own")
    past, mixed = context.cache.get(module.layer_idx), []
    tokens = [len(real) * steps for real, _, steps in context.parts]
    parts = zip(*(x.squeeze(0).split(tokens, dim=1) for x in (query, key, value)), strict=True)
    for index, part in enumerate(parts):
        mask = context.attention_mask(index, sliding_window, query.dtype)  # (R, 1, S, L)
        # (H or K, R*S, D) to (R, H or K, S, D)
        q, *own = (x.unflatten(1, (len(mask), -1)).transpose(0, 1) for x in part)
        if past:
            before = (fan_out(x, len(mask)) for x in past)
            own = [torch.cat(both, dim=2) for both in zip(before, own, strict=True)]
        past = own
        mixed.append(attend(module, q, *own, mask, **options)[0].flatten(0, 1))  # (R*S, H, D)
    context.cache[module.layer_idx] = past
    return (torch.cat(mixed) if mixed[1:] else mixed[0]).unsqueeze(0), None


class Policy(nn.Module):
    """A causal language model as GRPO sees it: completions in, their log-probabilities out.

    Each prompt is read once and serves the G completions of its group, both to sample and, with
    gradients flowing through what was read, to train. All that is to be read, beginnings, prompts
    and completions, stands in one row of tokens: few large matrix products instead of many small
    ones. Only attention tells the sequences apart.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.eval()  # no dropout: the ratio compares two passes over the same tokens
        self.compute_dtype = compute_dtype
        name, masks = model.config._attn_implementation, transformers.AttentionMaskInterface
        if name.startswith("branching"):
            return  # it has been a policy's before
        attend = transformers.AttentionInterface().get(name)
        if name == "sdpa" and compute_dtype == torch.bfloat16 and model.device.type == "cpu":
            # There PyTorch's fused attention takes more than twice the time.
            name, attend = "grouped", grouped_attention
        branching = f"branching {name}"
        transformers.AttentionInterface.register(branching, partial(branching_attention, attend))
        masks.register(branching, masks()["eager" if name == "grouped" else name])
        model.set_attn_implementation(branching)

    def forward(self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor) -> Tensor:
        """Return the log-probability of each completion token given all that stands before it.

        prompt_ids, prompt_mask: (B, P); completion_ids: (B*G, T), group after group.
        Returns (B*G, T) float32.
        """
        context, parts = self.begin(prompt_ids, prompt_mask)
        first, others = completion_ids[:, :1], completion_ids[:, 1:]
        if others.shape[1]:
            body = completion_ids[:, :-1]
            parts.append(unpadded(body, body.shape[1]))
            *_, last, logits = self.read(context, *parts)
            later = token_logprobs(logits.flatten(0, 1), others.flatten()[:, None])
        else:
            *_, last = self.read(context, *parts)
            later = first.float()[:, :0]
        # The logits after a prompt serve its whole group.
        firsts = token_logprobs(last.squeeze(1), first.view(len(last), -1))  # (B, G)
        return torch.cat([firsts.view(first.shape), later.view(others.shape)], dim=1)

    def encode(self, prompt_ids: Tensor, prompt_mask: Tensor, group: int) -> tuple[Tensor, Context]:
        """Read prompts (B, P): the logits of the token after each, `group` times, and the context.

        The logits are (B*G, V); the context has B sequences, each of which may go on in many ways.
        """
        context, parts = self.begin(prompt_ids, prompt_mask)
        *_, logits = self.read(context, *parts)  # (B, 1, V)
        return logits.squeeze(1).repeat_interleave(group, dim=0), context

    def go_on(self, context: Context, token: Tensor) -> Tensor:
        """Read one token more of each sequence, (B*G, 1): the logits of the next, (B*G, V)."""
        [logits] = self.read(context, unpadded(token, 1))
        return logits.squeeze(1)

    def begin(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Context, list[Part]]:
        """An empty context, and the parts that prompts (B, P) are read in.

        What all prompts begin with is a part of its own, to be read once.
        """
        # One cast for all that is read, through which gradients flow back to the float32 weights.
        cast = self.compute_dtype != torch.float32
        parameters = self.model.named_parameters() if cast else ()
        weights = {name: p.to(self.compute_dtype) for name, p in parameters}
        padding = prompt_ids.shape[1] - prompt_mask.sum(dim=1, keepdim=True)  # (B, 1)
        begin, parts = common_beginning(prompt_ids, padding), []
        if begin:
            start = int(padding[0])
            ids = prompt_ids[:1, start : start + begin]  # (1, begin)
            parts.append(unpadded(ids, 0))
        rest = prompt_ids[:, begin:]
        mask = torch.arange(rest.shape[1], device=rest.device) >= padding
        parts.append(Part(rest, mask, 1))
        return Context(weights, prompt_mask[: len(parts[0].ids), :0].bool()), parts

    def read(self, context: Context, *parts: Part) -> list[Tensor]:
        """Read parts, one after another, after what the context holds, which grows by them.

        Each has as many sequences as the one before it, or a multiple: then that many, in order,
        go on from each. Returns the logits of the token after each that is kept: (R, keep, V).
        """
        positions, kept, start = [], [], 0
        context.parts, context.masks = [], {}
        for part in parts:
            positions.append(context.append(part).flatten())
            index = torch.arange(part.ids.numel(), device=part.ids.device).view(part.ids.shape)
            kept.append(start + index[:, part.ids.shape[1] - part.keep :].flatten())
            start += part.ids.numel()
        inputs = {
            "input_ids": torch.cat([part.ids.flatten() for part in parts]).unsqueeze(0),  # (1, N)
            "position_ids": torch.cat(positions).unsqueeze(0),
            # Of four dimensions, so that the model leaves it alone: the context has the real ones.
            "attention_mask": context.mask[None, None, :1, :1],
            "use_cache": False,
            "logits_to_keep": torch.cat(kept),
            "context": context,
        }
        if context.weights:
            output = torch.func.functional_call(self.model, context.weights, kwargs=inputs)
        else:
            output = self.model(**inputs)
        if len(context.cache) < self.model.config.num_hidden_layers:
            raise UserError(
                f"a model of type {self.model.config.model_type} cannot be used here: some of its"
                " layers do not attend as transformers has it; choose another model"
            )
        logits = output.logits.squeeze(0).split([len(index) for index in kept])
        shapes = ((len(part.ids), part.keep, output.logits.shape[-1]) for part in parts)
        return [some.view(shape) for some, shape in zip(logits, shapes, strict=True)]


def common_beginning(prompt_ids: Tensor, padding: Tensor) -> int:
    """How many tokens all prompts (B, P) begin with, after padding (B, 1); 0 if that is no matter.

    A GPU has tokens to spare, and would have to be waited for.
    """
    rows, width = prompt_ids.shape
    if rows == 1 or prompt_ids.device.type != "cpu":
        return 0
    columns = padding + torch.arange(width)  # (B, P)
    ids = prompt_ids.gather(1, columns.clamp(max=width - 1))  # without the padding
    longest = width - int(padding.max()) - 1  # the rest needs a token
    return int((ids == ids[0]).all(dim=0)[:longest].cumprod(dim=0).sum())


def frozen_copy(policy: Policy) -> Policy:
    """A policy to stay as it is: a copy whose weights are in the type that it computes in.

    Frozen, as no optimiser holds it and it runs under no_grad. Not by requires_grad_(False): for
    that PyTorch picks kernels that round differently, and kl would not start at exactly 0.
    """
    reference = copy.deepcopy(policy)
    for p in reference.parameters():  # not its buffers: the angles of positions stay float32
        p.data = p.data.to(policy.compute_dtype)
    return reference


class TokenLogprobs(torch.autograd.Function):
    """`token_logprobs`, on a CPU a few rows at a time.

    PyTorch's own steps hold, and there wait for, three float32 numbers for each token of the
    vocabulary at each position.
    """

    @staticmethod
    def forward(context, logits: Tensor, ids: Tensor) -> Tensor:
        context.save_for_backward(logits, ids)
        pieces = in_pieces(logits, ids)
        return torch.cat([some.float().log_softmax(dim=1).gather(1, id) for some, id in pieces])

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        """d log p(id) / d logits = onehot(id) - p."""
        logits, ids = context.saved_tensors
        slopes = []
        for some, id, pull in in_pieces(logits, ids, gradient):
            slope = some.float().softmax(dim=1).mul_(-pull.sum(dim=1, keepdim=True))
            slopes.append(slope.scatter_add_(1, id, pull).to(logits.dtype))
        return torch.cat(slopes), None


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of ids (N, K) under logits (N, V), in float32: (N, K)."""
    return TokenLogprobs.apply(logits, ids)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw an index from each row of probabilities (N, V): (N, 1).

    By one uniform number each, looked up among the cumulated probabilities; torch.multinomial draws
    one for each index there is, and has a GPU waited for.
    """
    # In double, or what is unlikely would be rounded away; mps has none.
    wide = torch.float if probabilities.device.type == "mps" else torch.double
    cumulated = probabilities.to(wide).cumsum(dim=1)
    uniform = torch.empty_like(cumulated[:, :1]).uniform_(generator=generator)
    index = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)
    return index.clamp(max=probabilities.shape[1] - 1)  # past the end, if they are not numbers


def in_pieces(logits: Tensor, *others: Tensor):
    """Cut tensors of N rows, the first of them logits (N, V), into pieces for a CPU's cache."""
    rows = max(1, PIECE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


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
    config, dtype = policy.model.config, policy.compute_dtype
    chunked = getattr(config, "attention_chunk_size", None)
    branching = config._attn_implementation
    policy.compute_dtype = torch.float32  # in which a mistake shows
    try:
        with torch.no_grad():
            _, context = policy.encode(prompt_ids, prompt_mask, 1)
            windows = [window for _, window in context.masks if window]
            if not windows and (getattr(config, "sliding_window", None) or chunked):
                raise ValueError("it does not say which of its layers see how far")
            shared = policy(prompt_ids, prompt_mask, completion_ids.repeat_interleave(2, dim=0))
            # The model by itself; some look at the name of their attention.
            plain = branching.removeprefix("branching ").replace("grouped", "sdpa")
            policy.model.set_attn_implementation(plain)
            whole = []
            for row, mask, completion in zip(prompt_ids, prompt_mask, completion_ids, strict=True):
                ids = torch.cat([row[mask == 1], completion])[None]
                logits = policy.model(input_ids=ids, use_cache=False, logits_to_keep=5).logits
                whole += 2 * [token_logprobs(logits[0, :-1], completion[:, None]).T]
        gap = (shared - torch.cat(whole)).abs().max().item()
        problem = f"changes its log-probabilities by {gap:.2g}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        gap, problem = math.inf, f"fails ({str(error).splitlines()[0]})"
    finally:
        policy.compute_dtype = dtype
        policy.model.set_attn_implementation(branching)
    if not gap < 1e-3:
        raise UserError(
            f"a model of type {config.model_type} cannot be used here: sharing what was read of a"
            f" prompt {problem}; choose another model"
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
