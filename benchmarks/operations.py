"""What an iteration has to compute: its matrix products, phase by phase, and their count."""

import math
from collections import Counter
from typing import NamedTuple

from benchmarks.common import Work

PHASES = ("rollout", "reference", "forward", "backward")


class Op(NamedTuple):
    """A product that is made `times` times: linear (tokens, inputs, outputs) or
    attention (rows, heads, queries, context, head size)."""

    kind: str
    sizes: tuple[int, ...]
    times: int

    @property
    def flops(self) -> int:
        """A multiplication and an addition count as two; attention makes two products."""
        return (2 if self.kind == "linear" else 4) * math.prod(self.sizes) * self.times


class Part(NamedTuple):
    """`rows` sequences of `tokens` new tokens each, in the row of tokens that is read at once.

    They attend to `context` positions, themselves included (all of them, as the kernels compute
    it, though a causal mask then drops some).
    """

    rows: int
    tokens: int
    context: int


def forward_ops(model, parts: list[Part], logits: int) -> list[Op]:
    """One forward of a Llama-like `model` (a config); it projects `logits` positions to words."""
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    linear = Counter([(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)])
    linear += Counter([(hidden, inner), (hidden, inner), (inner, hidden)])
    row = sum(part.rows * part.tokens for part in parts)
    ops = [Op("linear", (row, *shape), n * layers) for shape, n in linear.items()]
    for rows, tokens, context in parts:
        shape = rows, model.num_attention_heads, tokens, context, model.head_dim
        ops.append(Op("attention", shape, layers))
    return [*ops, Op("linear", (logits, hidden, model.vocab_size), 1)]


def operations(model, work: Work) -> dict[str, list[Op]]:
    """What one iteration needs, by phase; "backward" lists the forward that is gone back through.

    Each prompt is read once per pass and serves its whole group, what all prompts begin with serves
    the whole batch; the last token of a completion is never read; logits are made where a token
    follows. A backward pass is two products per product.
    """
    c, prompt = work.config, work.prompt_tokens
    rows, new = c.batch_size * c.num_generations, c.max_new_tokens
    once = work.beginning if c.batch_size > 1 else 0
    prompts = [Part(1, once, once)] if once else []
    prompts.append(Part(c.batch_size, prompt - once, prompt))
    rollout = forward_ops(model, prompts, logits=c.batch_size)
    for step in range(1, new):
        rollout += forward_ops(model, [Part(rows, 1, prompt + step)], logits=rows)
    completions = [Part(rows, new - 1, prompt + new - 1)] if new > 1 else []
    whole = forward_ops(model, prompts + completions, logits=c.batch_size + rows * (new - 1))
    updates = [op._replace(times=op.times * c.num_inner_updates) for op in whole]
    return {"rollout": rollout, "reference": whole, "forward": updates, "backward": updates}


def count_flops(model, work: Work) -> dict[str, int]:
    """Floating-point operations of one iteration, by phase."""
    ops = operations(model, work)
    return {p: (2 if p == "backward" else 1) * sum(op.flops for op in ops[p]) for p in PHASES}


def optimizer_bytes(parameters: int) -> int:
    """What one AdamW step moves: it reads weight, gradient and two moments, and writes three."""
    return 7 * 4 * parameters
