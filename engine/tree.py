"""The fast policy: the sequences of a batch form a tree, and each distinct prefix is read once.

Short completions of one prompt share most of their tokens. All distinct prefixes are packed into
one sequence that the model reads in one ordinary call: a token's position is its depth in the tree,
and a 4-dimensional attention mask lets it see its ancestors and itself.
"""

import copy
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.policy import Policy, Rollout, token_logprobs

# Nodes per pass: attention takes memory and time with their square. Measured on a CPU alone.
MAX_NODES = {"cpu": 640}
MAX_NODES_ELSEWHERE = 2048
# A pass with more nodes than this share of its tokens is faster without the tree.
MAX_SHARE = 0.7


class PrefixTree:
    """The distinct prefixes of R sequences, numbered so that ancestors come first.

    ids: (R, L), length: (R,) how many of the L tokens count.
    """

    def __init__(self, ids: Tensor, length: Tensor):
        self.columns = torch.arange(ids.shape[1])
        ids = ids.masked_fill(self.columns >= length[:, None], -1)
        # Sorted, so that sequences with common prefixes are neighbours; index: (R,).
        distinct, self.index = ids.unique(dim=0, return_inverse=True)
        new = distinct >= 0  # True where the prefix is not in the sequence above
        new[1:] &= (distinct[1:] == distinct[:-1]).long().cumprod(dim=1) == 0
        self.new, self.length = new, length
        number = new.flatten().cumsum(0).view(new.shape) - 1
        self.paths = number.masked_fill(~new, 0).cummax(dim=0).values
        self.first, self.depth = new.nonzero(as_tuple=True)  # (n,) the first sequence with it
        self.ids = distinct[new]  # (n,) the token that each prefix ends with
        self.nodes = self.paths[self.index]  # (R, L) the node at each token of each sequence

    def __len__(self) -> int:
        return len(self.ids)

    def growth(self, order: Tensor) -> tuple[list[int], list[int]]:
        """Of each sequence, in sorted order (R,): its length, and how many of its prefixes are not
        in the one before.
        """
        distinct = self.index[order]
        repeated = distinct.diff(prepend=distinct[:1] - 1) == 0
        new = self.new.sum(dim=1)[distinct].masked_fill(repeated, 0)
        return self.length[order].tolist(), new.tolist()

    @cached_property
    def visible(self) -> Tensor:
        """(n, n) bool: visible[i, j] says whether j is i or an ancestor of i."""
        above = self.columns <= self.depth[:, None]
        ancestors = self.paths[self.first].where(above, len(self))  # (n, L)
        visible = torch.zeros(len(self), len(self) + 1, dtype=torch.bool)
        return visible.scatter_(1, ancestors, True)[:, :-1]


class RolloutTree(PrefixTree):
    """The tree of a rollout's tokens that are read: all but the last of each completion.

    `keep` (K,) are the nodes whose logits are needed, `parents` (N*T,) which of them predicts each
    completion token.
    """

    def __init__(self, rollout: Rollout):
        ids, length = left_aligned(
            torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1),
            torch.cat([rollout.prompt_mask, rollout.mask.long()], dim=1),
        )
        super().__init__(ids, length - 1)
        prompt_length = rollout.prompt_mask.sum(dim=1, keepdim=True).cpu()
        steps = torch.arange(rollout.mask.shape[1])
        parents = self.nodes.gather(1, prompt_length - 1 + steps)  # (N, T)
        parents = parents.where(rollout.mask.cpu() > 0, parents[:, :1])
        self.keep, self.parents = parents.flatten().unique(return_inverse=True)

    def reversed(self) -> "RolloutTree":
        """Nodes numbered backwards, which changes nothing for a model that follows the mask."""
        tree = copy.copy(self)
        tree.visible = self.visible.flip(0, 1)
        tree.ids, tree.depth = self.ids.flip(0), self.depth.flip(0)
        tree.keep = len(self) - 1 - self.keep
        return tree


@dataclass(frozen=True)
class TreeRollout(Rollout):
    """A rollout with its tree, built once for all passes over it."""

    tree: RolloutTree


@dataclass
class TreeCache:
    """All nodes read so far, in one sequence, and the newest of them, the tips."""

    weights: dict[str, Tensor]
    model_cache: DynamicCache
    depth: Tensor  # (L,) of all nodes
    visible: Tensor  # (K, L) bool: the ancestors of each tip, and itself
    tip_depth: Tensor  # (K,)
    rows: Tensor  # (N,) the tip of each completion


class TreePolicy(Policy):
    """A policy with the numbers of `Policy`, for models whose layers attend by the given mask."""

    name = "tree"

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype = torch.float32):
        super().__init__(model, compute_dtype)
        self.max_nodes = MAX_NODES.get(model.device.type, MAX_NODES_ELSEWHERE)
        self.max_share = MAX_SHARE

    def eager_attention(self) -> bool:
        """As in `Policy`; on a CPU also in float32, because fused attention is slow with a mask."""
        return self.model.device.type == "cpu" or super().eager_attention()

    def micro_batches(self, rollout: Rollout, size: int = 0) -> list[tuple[Tensor, Rollout]]:
        """As in `Policy`, of at most max_nodes nodes each, but at least one completion.

        Neighbours in the tree, which share most, go together.
        """
        tree, parts, nodes = RolloutTree(rollout), [], 0
        order = tree.index.argsort(stable=True)
        for row, length, new in zip(order.tolist(), *tree.growth(order), strict=True):
            if not parts or len(parts[-1]) == size or nodes + new > self.max_nodes:
                parts.append([])
                nodes, new = 0, length
            parts[-1].append(row)
            nodes += new
        micro_batches = []
        for part in parts:
            rows = torch.tensor(sorted(part), device=rollout.mask.device)
            chunk = rollout[rows]
            its_tree = tree if chunk.mask.shape == rollout.mask.shape else RolloutTree(chunk)
            micro_batches.append((rows, TreeRollout(**vars(chunk), tree=its_tree)))
        return micro_batches

    def forward(self, rollout: Rollout) -> Tensor:
        """Log-probability of every completion token, (N, T) float32, exactly 0 where masked."""
        tree = rollout.tree if isinstance(rollout, TreeRollout) else RolloutTree(rollout)
        if len(tree) > self.max_share * (rollout.prompt_mask.sum() + rollout.mask.sum()):
            return super().forward(rollout)  # little is shared
        device = rollout.mask.device
        depth, keep, parents = (x.to(device) for x in (tree.depth, tree.keep, tree.parents))
        logits, _ = self.call_model(
            self.cast_weights(),
            keep,
            input_ids=tree.ids[None].to(device),
            position_ids=depth[None],
            attention_mask=self.attention_mask(tree.visible.to(device), depth, depth),
            use_cache=False,
        )
        logprobs = token_logprobs(logits[0], parents, rollout.completion_ids.flatten())
        return logprobs.view(rollout.mask.shape).where(rollout.mask > 0, 0.0)

    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, TreeCache]:
        """As in `Policy`, with one row of logits for each distinct prompt."""
        device = prompt_ids.device
        ids, length = left_aligned(prompt_ids, prompt_mask)
        tree = PrefixTree(ids, length)
        last = tree.nodes.gather(1, length[:, None] - 1).flatten()
        ends, rows = (x.to(device) for x in last.unique(return_inverse=True))
        ids, depth, visible = (x.to(device) for x in (tree.ids, tree.depth, tree.visible))
        cache = TreeCache(
            self.cast_weights(), DynamicCache(), depth[:0], visible[ends], depth[ends], rows
        )
        logits = []
        for start in range(0, len(tree), self.max_nodes):
            chunk = slice(start, start + self.max_nodes)
            keep = ends[(ends >= start) & (ends < chunk.stop)] - start
            seen = visible[chunk, : chunk.stop]
            logits.append(self.append(cache, ids[chunk], depth[chunk], seen, keep))
        return torch.cat(logits), rows, cache

    def decode(self, cache: TreeCache, token: Tensor, unfinished: Tensor) -> tuple[Tensor, Tensor]:
        """As in `Policy`, with one row of logits for each distinct unfinished completion."""
        [live] = unfinished.nonzero(as_tuple=True)
        pairs = torch.stack([cache.rows[live], token[live]], dim=1)
        pairs, index = pairs.unique(dim=0, return_inverse=True)
        parents, ids = pairs.T
        own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        cache.visible = torch.cat([cache.visible[parents], own], dim=1)
        cache.tip_depth = cache.tip_depth[parents] + 1
        cache.rows = torch.zeros_like(cache.rows).index_copy(0, live, index)
        keep = torch.arange(len(ids), device=ids.device)
        return self.append(cache, ids, cache.tip_depth, cache.visible, keep), cache.rows

    def append(
        self, cache: TreeCache, ids: Tensor, depth: Tensor, visible: Tensor, keep: Tensor
    ) -> Tensor:
        """Forward M new nodes after the cached ones. Returns the logits of `keep` among them."""
        cache.depth = torch.cat([cache.depth, depth])
        logits, _ = self.call_model(
            cache.weights,
            keep.to(ids.device),
            input_ids=ids[None],
            position_ids=depth[None],
            attention_mask=self.attention_mask(visible, depth, cache.depth),
            past_key_values=cache.model_cache,
            use_cache=True,
        )
        return logits[0]

    def attention_mask(self, visible: Tensor, depth: Tensor, all_depth: Tensor):
        """What to add to attention scores, (1, 1, M, L); by kind of layer where the model asks so.

        visible: (M, L) bool; depth: (M,) of the query nodes; all_depth: (L,) of the key nodes.
        """

        def additive(window: int | None) -> Tensor:
            seen = visible & (depth[:, None] - all_depth < window) if window else visible
            # On CUDA, PyTorch copies a mask in each layer unless its rows start at multiples of 8.
            width = math.ceil(seen.shape[1] / 8) * 8
            mask = torch.zeros(len(seen), width, dtype=self.compute_dtype, device=seen.device)
            mask = mask[:, : seen.shape[1]]
            return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[None, None]

        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or [])
        if not kinds:
            return additive(window)
        return {kind: additive(window if kind == "sliding_attention" else None) for kind in kinds}


def left_aligned(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row (R, L) to its beginning. Returns ids and lengths (R,)."""
    ids, mask = ids.cpu(), mask.cpu()
    return ids.gather(1, mask.argsort(dim=1, descending=True, stable=True)), mask.sum(dim=1)
