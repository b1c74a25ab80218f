"""The plain policy: log-probabilities and next-token logits by ordinary calls of the model.

Nothing is shared between completions, so this is what any causal language model can do, and what
the faster `TreePolicy` is tested against.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Completions times max_new_tokens to sample in one cache. More would be slow in a tree, where each
# token attends to all nodes; less reads the weights more often.
MAX_SAMPLED = 32768


@dataclass(frozen=True)
class Rollout:
    """N sampled completions, each with its own copy of its prompt.

    A batch of B prompts with G completions each has N = B*G, ordered by group.
    """

    prompt_ids: Tensor  # (N, P), padded on the left
    prompt_mask: Tensor  # (N, P), 1 on real tokens
    completion_ids: Tensor  # (N, T), any tokens where the mask is 0
    mask: Tensor  # (N, T) float32, 1 up to and including the end token
    sampled_logprobs: Tensor  # (N, T) float32, recorded while sampling, 0 where masked
    truncated: Tensor  # (N,) bool, whether max_new_tokens came before an end token
    texts: list[str]  # N completions without their end tokens

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Tensor) -> "Rollout":
        """The given rows, trimmed to their longest completion."""
        width = int(self.mask[rows].sum(dim=1).max())
        return Rollout(
            self.prompt_ids[rows],
            self.prompt_mask[rows],
            self.completion_ids[rows, :width],
            self.mask[rows, :width],
            self.sampled_logprobs[rows, :width],
            self.truncated[rows],
            [self.texts[i] for i in rows.tolist()],
        )


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
        self.max_sampled = MAX_SAMPLED
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        if self.eager_attention():
            model.set_attn_implementation("eager")

    def eager_attention(self) -> bool:
        """Whether to compute attention plainly: where PyTorch's fused one is slower (in bfloat16 on
        a CPU), or leaves out the cap on attention scores that some models have.
        """
        capped = getattr(self.model.config.get_text_config(), "attn_logit_softcapping", None)
        slow = self.model.device.type == "cpu" and self.compute_dtype == torch.bfloat16
        return bool(capped) or slow

    def micro_batches(self, rollout: Rollout, size: int = 0) -> list[tuple[Tensor, Rollout]]:
        """Cut into parts of at most `size` completions (0: any), each with its rows (n,)."""
        rows = torch.arange(len(rollout), device=rollout.mask.device).split(size or len(rollout))
        return [(part, rollout[part]) for part in rows]

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

    def sample(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        eos_ids: Tensor,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        greedy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample a completion of each prompt (N, P), until all have ended with one of `eos_ids`.

        Of the rows that are `greedy` (N,) bool, and at temperature 0 of all, take the likeliest.
        Returns ids, mask and log-probabilities (N, T), and whether each was truncated (N,).
        """
        size, parts = max(1, self.max_sampled // max_new_tokens), []
        for start in range(0, len(prompt_ids), size):
            rows = slice(start, start + size)
            prompts = prompt_ids[rows], prompt_mask[rows], max_new_tokens, eos_ids
            likeliest = None if greedy is None else greedy[rows]
            parts.append(self.sample_part(*prompts, generator, temperature, likeliest))
        *columns, truncated = zip(*parts, strict=True)
        width = max(ids.shape[1] for ids in columns[0])
        wide = [[F.pad(x, (0, width - x.shape[1])) for x in column] for column in columns]
        return *(torch.cat(column) for column in wide), torch.cat(truncated)

    def sample_part(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        max_new_tokens: int,
        eos_ids: Tensor,
        generator: torch.Generator | None,
        temperature: float,
        greedy: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `sample`, in one cache."""
        with torch.no_grad():
            unfinished = torch.ones(len(prompt_ids), dtype=torch.bool, device=prompt_ids.device)
            logits, rows, cache = self.prefill(prompt_ids, prompt_mask)  # (K, V), (N,)
            steps = []  # T times (token, mask, logprob), (N,) each
            while True:
                token, logprob = sample_tokens(logits, rows, temperature, generator, greedy)
                steps.append((token, unfinished, logprob.where(unfinished, 0.0)))
                unfinished = unfinished & ~torch.isin(token, eos_ids)
                if len(steps) == max_new_tokens or not unfinished.any():
                    break
                logits, rows = self.decode(cache, token, unfinished)
            columns = zip(*steps, strict=True)
            ids, mask, logprobs = (torch.stack(column, dim=1) for column in columns)
        return ids, mask, logprobs, unfinished

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
    logits: Tensor,
    rows: Tensor,
    temperature: float,
    generator: torch.Generator | None,
    greedy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token for each of N sequences, with logits (K, V) and rows (N,) as in `prefill`.

    Temperature 0 takes the likeliest; so do the rows that are `greedy` (N,) at any other. There
    each sequence takes one uniform number from the generator, on the CPU, so that draws do not
    depend on the device's own generator. Returns the tokens and their log-probabilities at
    temperature 1, both (N,).
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
        if greedy is not None:
            token = torch.where(greedy, logprobs.argmax(dim=1)[rows], token)
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
