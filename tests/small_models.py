"""Small random models of seven architectures, and the slow, plain way to score a completion.

Weights are larger than a fresh model's, so that attention is sharp and its mistakes show.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from policy import Policy
from train_grpo import Rollout

VOCABULARY = 64
WINDOW = 5  # of sliding attention: shorter than any sequence the tests use

ROPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, ROPE),
    "qwen2": (Qwen2Config, ROPE),
    "qwen3": (Qwen3Config, ROPE),
    # Its positions are absolute, and its config asks for dropout.
    "gpt2": (
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    ),
    "gpt_neox": (GPTNeoXConfig, {k: v for k, v in ROPE.items() if k != "num_key_value_heads"}),
    "mistral": (MistralConfig, {**ROPE, "sliding_window": WINDOW}),
    "gemma2": (
        Gemma2Config,
        {
            **ROPE,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            # Low enough to bend most values; only the eager kernel caps attention.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 2.0,
            "attn_implementation": "eager",
        },
    ),
}
ARCHITECTURES = list(CONFIGS)


class Numbers:
    """As much of a tokenizer as a rollout uses; a text is its token ids."""

    def __init__(self, eos_token_id: int = 2):
        self.eos_token_id = eos_token_id

    def batch_decode(self, rows: list[list[int]], **options) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def small_model(name: str, seed: int = 0, end_ids=None, vocabulary: int = VOCABULARY) -> nn.Module:
    """A random model of an architecture, in training mode; `end_ids` end its completions."""
    torch.manual_seed(seed)
    make, settings = CONFIGS[name]
    nowhere = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    model = AutoModelForCausalLM.from_config(make(vocab_size=vocabulary, **settings, **nowhere))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and gains start at 0 and 1, where errors can hide
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = end_ids
    return model.train()


def random_ids(length: int, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Token ids from 3 up: the tests keep 0 to 2 for padding and end tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def left_padded(prompts: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, P) of prompts of any lengths."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def naive_logprobs(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Log-probability of each completion token, (T,), from one unpadded, uncached forward."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return torch.stack([logits[i].log_softmax(0)[t] for i, t in zip(at, completion, strict=True)])


def nearby(policy: Policy, distance: float = 0.02) -> Policy:
    """A copy with every weight moved a little: a reference from which the policy has strayed."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return other


def ragged_batch(prompts: list[list[int]], completions: list[list[int]], pad: int = 0) -> Rollout:
    """A rollout of these prompts and completions, with any tokens where a completion has ended."""
    steps = max(map(len, completions))
    ids = [c + random_ids(steps - len(c), seed=len(c)) for c in completions]
    mask = [[1.0] * len(c) + [0.0] * (steps - len(c)) for c in completions]
    mask = torch.tensor(mask)
    return Rollout(*left_padded(prompts, pad), torch.tensor(ids), mask, torch.zeros_like(mask), [])


class Recorder:
    """Stands in for an optimiser: keeps the gradients of its last step and changes no weight."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def step(self) -> None:
        named = self.policy.model.named_parameters()
        self.gradients = {name: parameter.grad.clone() for name, parameter in named}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.policy.zero_grad()
