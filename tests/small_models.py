"""Small random models of many architectures, and the slow, obvious way to score a completion.

Weights are larger than a fresh model's, so that attention is sharp and its mistakes show.
"""

import copy
import random

import torch
import transformers
from torch import Tensor, nn

from engine.policy import Policy, Rollout
from train_grpo import Config, Learner, update_policy

VOCABULARY = 64
WINDOW = 5  # of sliding attention: shorter than any sequence the tests use

WIDE = {"initializer_range": 0.2}
ROPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **WIDE}
ROPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = {**ROPE, "sliding_window": WINDOW}
MIXED = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
# Low enough to bend most values; only the eager kernel caps attention.
CAPPED = {**SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}
CAPPED |= {"query_pre_attn_scalar": 8, "attn_implementation": "eager"}
GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, **WIDE}
CHUNKED = {**ROPE, "attention_chunk_size": 8, "no_rope_layers": [1, 0]}
CHUNKED |= {"layer_types": ["chunked_attention", "full_attention"], "num_local_experts": 2}
CHUNKED |= {"num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": []}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **WIDE}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
GRANITE = {**{k: v for k, v in ROPE.items() if k != "head_dim"}, **MAMBA_HEADS}
GRANITE |= {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64}
GRANITE |= {"num_local_experts": 0, "num_experts_per_tok": 0}
DELTA = {**ROPE, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
DELTA |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "mlp_only_layers": [0, 1]}
DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}

# By name: the class of the config, and its settings.
ATTENTION = {  # attends by the mask it is given: what TreePolicy can read
    "llama": ("Llama", ROPE),
    "qwen2": ("Qwen2", ROPE),
    "qwen2_sliding": ("Qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", ROPE),
    # Its positions are absolute, and its config asks for dropout.
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **WIDE}),
    "gpt_neox": ("GPTNeoX", {k: v for k, v in ROPE.items() if k != "num_key_value_heads"}),
    "mistral": ("Mistral", SLIDING),
    "gemma2": ("Gemma2", CAPPED),
    "gemma3": ("Gemma3Text", MIXED),
    "smollm3": ("SmolLM3", {**MIXED, "use_sliding_window": True}),
    "olmo2": ("Olmo2", ROPE),
    "phi3": ("Phi3", SLIDING),
    "stablelm": ("StableLm", ROPE),
}
OTHERS = {
    "gpt_neo": ("GPTNeo", GPT_NEO),
    # Attends within chunks of positions, which the tree's mask does not reproduce.
    "llama4": ("Llama4Text", CHUNKED),
    # Takes no position_ids: it derives distances from the attention mask.
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **WIDE}),
}
RECURRENT = {
    "mamba2": ("Mamba2", {**MAMBA, "num_heads": 8, "head_dim": 8}),
    "lfm2": ("Lfm2", {**ROPE, "layer_types": ["conv", "full_attention"]}),
    "granite_hybrid": ("GraniteMoeHybrid", GRANITE),
    "falcon_h1": ("FalconH1", {**ROPE, **MAMBA_HEADS, "mamba_d_ssm": 64}),
    "qwen3_next": ("Qwen3Next", DELTA),
}
MAMBA_1 = {"mamba": ("Mamba", MAMBA)}  # cannot be decoded behind left padding
CONFIGS = {**ATTENTION, **OTHERS, **RECURRENT, **MAMBA_1}


class Numbers:
    """As much of a tokenizer as a rollout uses; a text is its token ids."""

    def __init__(self, eos_token_id: int = 2):
        self.eos_token_id = eos_token_id

    def __len__(self) -> int:
        return 10**9

    def batch_decode(self, rows: list[list[int]], **options) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def small_model(
    name: str, seed: int = 0, eos_ids=None, vocabulary: int = VOCABULARY, **settings
) -> nn.Module:
    """A random model of an architecture, in training mode; `eos_ids` end its completions."""
    torch.manual_seed(seed)
    kind, own = CONFIGS[name]
    nowhere = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")
    config = config(**{"vocab_size": vocabulary, **nowhere, **own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and gains start at 0 and 1, where errors can hide
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = eos_ids
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


def ragged_batch(prompts: list[list[int]], completions: list[list[int]], pad: int = 0) -> Rollout:
    """A rollout of these prompts and completions, with any tokens where a completion has ended."""
    group, steps = len(completions) // len(prompts), max(map(len, completions))
    ids = [c + random_ids(steps - len(c), seed=len(c)) for c in completions]
    mask = torch.tensor([[1.0] * len(c) + [0.0] * (steps - len(c)) for c in completions])
    prompt_ids, prompt_mask = (x.repeat_interleave(group, dim=0) for x in left_padded(prompts, pad))
    truncated, texts = torch.zeros(len(ids), dtype=torch.bool), [""] * len(ids)
    return Rollout(
        prompt_ids, prompt_mask, torch.tensor(ids), mask, torch.zeros_like(mask), truncated, texts
    )


def sequences(batch: Rollout) -> list[tuple[list[int], list[int]]]:
    """The prompt and the completion of each row, without padding and without what is masked."""
    prompts = zip(batch.prompt_ids, batch.prompt_mask.bool(), strict=True)
    completions = zip(batch.completion_ids, batch.mask.bool(), strict=True)
    return [
        (p[real].tolist(), c[kept].tolist())
        for (p, real), (c, kept) in zip(prompts, completions, strict=True)
    ]


def unpadded_logprobs(model: nn.Module, batch: Rollout) -> Tensor:
    """Log-probabilities (N, T) by one unpadded, uncached forward per sequence, 0 where masked."""
    rows = []
    for prompt, completion in sequences(batch):
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        scores = [logits[i].log_softmax(0)[t] for i, t in zip(at, completion, strict=True)]
        rows.append(torch.stack(scores))
    return torch.stack([nn.functional.pad(r, (0, batch.mask.shape[1] - len(r))) for r in rows])


def gradients(model: nn.Module, logprobs: Tensor) -> dict[str, Tensor]:
    """Gradient of a random weighted sum of log-probabilities, by parameter; 0 where unused."""
    weights = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = (weights * logprobs).sum()
    found = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-4 of the norm of each parameter's gradient."""
    assert found.keys() == expected.keys() and any(g.any() for g in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def nearby(policy: Policy, distance: float = 0.02) -> Policy:
    """A copy with every weight moved a little: a reference from which the policy has strayed."""
    other = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return other


class Recorder:
    """Stands in for an optimizer: keeps the gradients of its last step and changes no weight."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def step(self) -> None:
        named = self.policy.model.named_parameters()
        self.gradients = {name: parameter.grad.clone() for name, parameter in named}

    def zero_grad(self) -> None:
        self.policy.zero_grad()


def update(
    policy: Policy, reference: Policy, optimizer, batch: Rollout, advantages: Tensor, config: Config
) -> dict[str, float]:
    """`update_policy` with a learner of these parts."""
    rngs = random.Random(0), torch.Generator()
    learner = Learner(policy, policy, reference, optimizer, *rngs)
    return update_policy(learner, batch, advantages, config)
