"""The matrix products that an iteration needs, counted on the tree of a real rollout."""

import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from engine.policy import Rollout
from engine.tree import RolloutTree


class Pass(NamedTuple):
    """One pass through the model."""

    products: Counter  # how often it multiplies (m, k) by (k, n), by (m, k, n)
    attention: int  # floating-point operations

    @property
    def flops(self) -> int:
        """A multiplication and an addition count as two."""
        return self.attention + sum(2 * math.prod(mkn) * n for mkn, n in self.products.items())


def forward_pass(model, depth: Tensor, logits: int) -> Pass:
    """Tree nodes at these depths read by a Llama-like `model` (a config), with `logits` rows out.

    Each node attends to its ancestors and itself.
    """
    hidden, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    products = Counter((len(depth), *shape) for shape in shapes * layers)
    products[logits, hidden, model.vocab_size] += 1
    return Pass(products, 4 * int((depth + 1).sum()) * queries * layers)


def backward_pass(forward: Pass) -> Pass:
    """Two products for each product of the forward pass: the gradients of both factors."""
    products = Counter()
    for (m, k, n), times in forward.products.items():
        products[m, n, k] += times
        products[n, m, k] += times
    return Pass(products, 2 * forward.attention)


def needed_passes(model, batch: Rollout, updates: int) -> dict[str, list[Pass]]:
    """The passes of one iteration, by phase.

    Each distinct prefix is read once per pass, the last token of a completion never; logits are
    computed where a completion token follows.
    """
    tree = RolloutTree(batch)
    parents = tree.keep[tree.parents].view(batch.mask.shape)  # (N, T)
    columns = zip(parents.T, batch.mask.T.cpu() > 0, strict=True)
    tips = [nodes[unfinished].unique() for nodes, unfinished in columns]  # sampled from, by step
    is_prompt = torch.ones(len(tree), dtype=torch.bool)
    for nodes in tips[1:]:
        is_prompt[nodes] = False
    prefill = forward_pass(model, tree.depth[is_prompt], len(tips[0]))
    decode = [forward_pass(model, tree.depth[nodes], len(nodes)) for nodes in tips[1:]]
    whole = forward_pass(model, tree.depth, len(tree.keep))
    return {
        "rollout": [prefill, *decode],
        "reference": [whole],
        "forward": [whole] * updates,
        "backward": [backward_pass(whole)] * updates,
    }
