"""The plain policy: log-probabilities and next-token logits by ordinary calls of the model.

Nothing is shared between completions, so this is what any causal language model can do, and what
the faster `TreePolicy` is tested against.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Rollout:
    """N completions, each with its own copy of its prompt, and what it takes to train on them.

    A batch of B prompts with G completions each has N = B*G, ordered by group.
    """

    prompt_ids: Tensor  # (N, P), padded on the left
    prompt_mask: Tensor  # (N, P), 1 on real tokens
    completion_ids: Tensor  # (N, T), any tokens where the mask is 0
    mask: Tensor  # (N, T) float32, 1 up to and including the end token
    sampled_logprobs: Tensor  # (N, T) float32, recorded while sampling, 0 where masked
    truncated: Tensor  # (N,) bool, whether max_new_tokens came before an end token
    texts: list[str]  # N completions without their end tokens
    advantages: Tensor | None = None  # (N,)
    ref_logprobs: Tensor | None = None  # (N, T)
    old_logprobs: Tensor | None = None  # (N, T), of the first inner update
    tree: Any = None  # what TreePolicy computes with, built once

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice) -> "Rollout":
        """The given rows, trimmed to their longest completion."""
        width = int(self.mask[rows].sum(dim=1).max())
        wide = ("completion_ids", "mask", "sampled_logprobs", "ref_logprobs", "old_logprobs")
        cut = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tree"}
        cut = {name: value if value is None else value[rows] for name, value in cut.items()}
        cut |= {name: cut[name][:, :width] for name in wide if cut[name] is not None}
        return Rollout(**cut)

    def micro_batches(self, size: int, fits: Callable[["Rollout"], bool]) -> list["Rollout"]:
        """Cut into as few equal parts as possible, of at most `size` completions (0: any) that fit.

        A single completion is never cut, even if it does not fit.
        """
        count = math.ceil(len(self) / (size or len(self)))
        while True:
            rows = math.ceil(len(self) / count)
            chunks = [self[i : i + rows] for i in range(0, len(self), rows)]
            if rows == 1 or all(fits(chunk) for chunk in chunks):
                return chunks
            count += 1


@dataclass
class Cache:
    """What has been read of N sequences so far."""

    weights: dict[str, Tensor]  # cast once for all steps
    mask: Tensor  # (N, L)
    model_cache: dict[str, Any]  # the model's own cache, by the name of its argument


class Policy(nn.Module):
    """A causal language model of transformers that computes in `compute_dtype`."""

    name = "plain"

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model = model.eval()  # dropout would move the ratio away from 1
        self.compute_dtype = compute_dtype
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        if self.eager_attention():
            model.set_attn_implementation("eager")

    def eager_attention(self) -> bool:
        """Whether plain attention is faster than PyTorch's fused one: in bfloat16 on a CPU."""
        return self.model.device.type == "cpu" and self.compute_dtype == torch.bfloat16

    def fits(self, rollout: Rollout) -> bool:
        """Whether one pass can take these completions; the plain policy sets no bound."""
        return True

    def forward(self, rollout: Rollout) -> Tensor:
        """Log-probability of every completion token, (N, T) float32, exactly 0 where masked."""
        ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)  # (N, P+T)
        mask = torch.cat([rollout.prompt_mask, rollout.mask.long()], dim=1)
        # The logits that predict a completion are those from the last prompt token on.
        keep = torch.arange(rollout.prompt_ids.shape[1] - 1, ids.shape[1] - 1, device=ids.device)
        logits, _ = self.call_model(
            self.cast_weights(), keep, input_ids=ids, use_cache=False, **positions(mask)
        )
        targets = rollout.completion_ids.flatten()
        rows = torch.arange(len(targets), device=ids.device)
        logprobs = token_logprobs(logits.flatten(0, 1), rows, targets).view(rollout.mask.shape)
        return logprobs.where(rollout.mask > 0, 0.0)

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, Cache]:
        """Read prompts (N, P), left-padded. Returns logits (K, V), rows (N,) and the cache.

        `logits[rows[i]]` predicts the next token of sequence i. Here K = N.
        """
        cache = Cache(self.cast_weights(), prompt_mask[:, :0], {})
        logits, rows = self.read(cache, prompt_ids, prompt_mask)
        return logits, rows, cache

    def decode(self, cache: Cache, token: Tensor, unfinished: Tensor) -> tuple[Tensor, Tensor]:
        """Read one more token (N,) of each sequence; `unfinished` (N,) bool says which count.

        Returns logits and rows as `prefill` does.
        """
        return self.read(cache, token[:, None], unfinished[:, None].to(cache.mask.dtype))

    def read(self, cache: Cache, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        cache.mask = torch.cat([cache.mask, mask], dim=1)
        inputs = positions(cache.mask)
        inputs["position_ids"] = inputs["position_ids"][:, -ids.shape[1] :]
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        logits, output = self.call_model(
            cache.weights, last, input_ids=ids, use_cache=True, **inputs, **cache.model_cache
        )
        for name in ("past_key_values", "cache_params"):  # the latter in Mamba
            if getattr(output, name, None) is not None:
                cache.model_cache = {name: getattr(output, name)}
        return logits[:, 0], torch.arange(len(ids), device=ids.device)

    def cast_weights(self) -> dict[str, Tensor]:
        """The weights in the compute type, through which gradients flow to the float32 ones."""
        if self.compute_dtype == torch.float32:
            return {}
        return {n: p.to(self.compute_dtype) for n, p in self.model.named_parameters()}

    def call_model(self, weights: dict[str, Tensor], keep: Tensor, **inputs) -> tuple[Tensor, Any]:
        """Run the model on what its forward accepts. Returns logits at columns `keep`, and all."""
        inputs["logits_to_keep"] = keep
        inputs = {n: v for n, v in inputs.items() if n in self.accepted}
        output = torch.func.functional_call(self.model, weights, kwargs=inputs)
        kept = "logits_to_keep" in inputs
        return (output.logits if kept else output.logits[:, keep]), output


def positions(mask: Tensor) -> dict[str, Tensor]:
    """Attention mask and position ids for a mask (N, L): padding does not shift positions."""
    return {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}


def token_logprobs(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits[rows])[ids] in float32: logits (K, V); rows, ids and the result (M,)."""
    logits = logits.float()
    # Lookups of scalars, by index_select: the gradient of x[index] adds in an order that changes.
    chosen = logits.flatten().index_select(0, rows * logits.shape[1] + ids)
    return chosen - logits.logsumexp(dim=1).index_select(0, rows)


def sample_tokens(
    logits: Tensor, rows: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw a token for each of N sequences, with logits (K, V) and rows (N,) as in `prefill`.

    Temperature 0 is greedy. Else each sequence takes one uniform number from the generator, on the
    CPU, so that a seed means the same on every device. Returns the tokens and their
    log-probabilities at temperature 1, both (N,).
    """
    logprobs = logits.float().log_softmax(dim=1)  # (K, V)
    if temperature == 0:
        token = logprobs.argmax(dim=1)[rows]
    else:
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        scaled = logprobs if temperature == 1 else (logprobs / temperature).log_softmax(dim=1)
        if scaled.device.type == "mps":
            scaled = scaled.cpu()  # mps has no float64
        cdf = scaled.exp().cumsum(dim=1, dtype=torch.float64)  # (K, V)
        # One sorted sequence for a single search: row k runs from k to k + 1.
        start = torch.arange(len(cdf), device=cdf.device)[:, None]
        steps = (cdf / cdf[:, -1:] + start).flatten()
        row = rows.to(cdf.device)
        found = torch.searchsorted(steps, row + uniform.to(cdf.device), right=True)
        # The clamp is for a draw that rounds up to the end of its row, and for NaN weights.
        token = (found - row * cdf.shape[1]).clamp(0, cdf.shape[1] - 1).to(rows.device)
    return token, logprobs.flatten()[rows * logprobs.shape[1] + token]


def frozen_copy(policy: Policy) -> Policy:
    """The reference: a copy whose weights are in the compute type, which no optimizer holds.

    Not frozen by requires_grad_(False): PyTorch would pick kernels that round differently, and kl
    would not start at exactly 0.
    """
    reference = copy.deepcopy(policy)
    for p in reference.parameters():  # not the buffers: rotary angles stay float32
        p.data = p.data.to(policy.compute_dtype)
    return reference
