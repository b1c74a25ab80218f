"""What an iteration has to compute: its matrix products, phase by phase, and their count."""

import math
from collections import Counter
from types import SimpleNamespace
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


def forward_ops(model, rows: int, tokens: int, context: int, logits: int) -> list[Op]:
    """One forward of a Llama-like `model` (a config): `rows` sequences of `tokens` new tokens each.

    They attend to `context` positions, themselves included (all of them, as the kernels compute
    it, though a causal mask then drops some); `logits` positions are projected to the vocabulary.
    """
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    linear = Counter([(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)])
    linear += Counter([(hidden, inner), (hidden, inner), (inner, hidden)])
    ops = [Op("linear", (rows * tokens, *shape), n * layers) for shape, n in linear.items()]
    shape = rows, model.num_attention_heads, tokens, context, model.head_dim
    return [
        *ops,
        Op("attention", shape, layers),
        Op("linear", (logits, hidden, model.vocab_size), 1),
    ]


def only_cached(model, tokens: int) -> list[Op]:
    """What one sequence takes whose keys and values alone are used: the rest of the last layer, and
    the logits, get no gradient."""
    below = SimpleNamespace(**{**vars(model), "num_hidden_layers": model.num_hidden_layers - 1})
    keys = model.num_key_value_heads * model.head_dim
    *ops, _ = forward_ops(below, 1, tokens, tokens, logits=0)
    return [*ops, Op("linear", (tokens, model.hidden_size, keys), 2)]


def operations(model, work: Work) -> dict[str, list[Op]]:
    """What one iteration needs, by phase; "backward" lists the forward that is gone back through.

    Each prompt is read once per pass and serves its whole group (and what all prompts begin with
    serves the whole batch, where that pays); the last token of a completion is
    never read; logits are made where a token follows. A backward pass is two products per product.
    """
    c, prompt = work.config, work.prompt_tokens
    rows, new = c.batch_size * c.num_generations, c.max_new_tokens
    once = work.read_once
    first = forward_ops(model, 1, once, once, logits=1) if once else []
    prefix = forward_ops(model, c.batch_size, prompt - once, prompt, logits=c.batch_size)
    steps = [forward_ops(model, rows, 1, prompt + step, logits=rows) for step in range(1, new)]
    rest = rows * (new - 1)
    whole = prefix + (forward_ops(model, rows, new - 1, prompt + new - 1, rest) if rest else [])

    def updates(ops: list[Op]) -> list[Op]:
        return [op._replace(times=op.times * c.num_inner_updates) for op in ops]

    return {
        "rollout": first + prefix + [op for step in steps for op in step],
        "reference": first + whole,
        "forward": updates(first + whole),
        "backward": updates((only_cached(model, once) if once else []) + whole),
    }


def count_flops(model, work: Work) -> dict[str, int]:
    """Floating-point operations of one iteration, by phase."""
    ops = operations(model, work)
    return {p: (2 if p == "backward" else 1) * sum(op.flops for op in ops[p]) for p in PHASES}


def optimizer_bytes(parameters: int) -> int:
    """What one AdamW step moves: it reads weight, gradient and two moments, and writes three."""
    return 7 * 4 * parameters
