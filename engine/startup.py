"""What happens before the first iteration: the model is loaded, and its policy is proven.

The tree is taken where it computes what unpadded forward passes compute, else the plain policy.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.files import UserError, first_line, out_of_memory
from engine.machine import choose_device, choose_dtype, tune_memory
from engine.models import eos_token_ids, load_model
from engine.policy import Policy, Rollout, token_logprobs
from engine.problems import warn_of_long_answers
from engine.prompt import (
    check_length,
    check_prompt,
    check_question,
    encode_prompts,
    longest_last,
)
from engine.tree import TreePolicy, TreeRollout

TOLERANCE = 1e-3  # in float32: rounding stays far below it, a mistake far above


def load_policy(config, problems, prompt, group: int) -> tuple[Policy, Any]:
    """(policy, tokenizer) for the model, device and types of a Config. Raises UserError.

    Prints which policy it is, and the first prompt.
    """
    tune_memory()
    device, new_tokens = choose_device(config.device), prompt.max_new_tokens
    model, tokenizer = load_model(config.model_name, device)
    warn_of_long_answers(problems, tokenizer, new_tokens)
    questions = problems.questions()
    for question in questions:
        check_question(question, tokenizer, problems.where(question))
    # Of different lengths, so that padding is checked too.
    questions = longest_last(tokenizer, questions, prompt)
    check_prompt(tokenizer, questions, prompt, eos_token_ids(model, tokenizer))
    prompts = encode_prompts(tokenizer, questions, prompt, device)
    check_length(model, prompts[0], new_tokens, problems.where(questions[1]))
    dtype = choose_dtype(config.dtype, device)
    policy = choose_policy(config.policy, model, dtype, prompts, group, new_tokens)
    first = prompts[0][0][prompts[1][0] == 1]
    print(f"first prompt, {len(first)} tokens: {tokenizer.decode(first)!r}")
    return policy, tokenizer


def choose_policy(
    name: str,
    model: nn.Module,
    dtype: torch.dtype,
    prompts: tuple[Tensor, Tensor],
    group: int,
    new_tokens: int,
) -> Policy:
    """A TreePolicy where it computes what unpadded forward passes compute, else a plain Policy.

    name: auto, tree or plain; prompts: ids and mask (B, P). Raises UserError if the named one (for
    auto: even the plain one) computes something else. Prints one line that says why.
    """
    classes = {"auto": [TreePolicy, Policy], "tree": [TreePolicy], "plain": [Policy]}[name]
    prompts = tuple(x.repeat_interleave(group, dim=0) for x in prompts)  # (B*G, P)
    reasons, attention = [], model.config._attn_implementation
    for kind in classes:
        model.set_attn_implementation(attention)  # the one tried before may have changed it
        policy = kind(model)
        policy.max_share = 1.0  # samples at start-up share little, and the tree is to be proven
        problem = find_mismatch(policy, prompts, new_tokens)
        if problem is None:
            policy = kind(model, dtype)
            problem = find_failure(policy, prompts)
        if problem is None:
            print(f"policy {kind.name}: {'; '.join(reasons) or 'matches unpadded forward passes'}")
            return policy
        reasons.append(f"{kind.name} {problem}")
    remedy = "" if dtype == torch.float32 else "; try --dtype float32"
    what = f"a model of type {model.config.model_type} cannot be trained"
    raise UserError(f"{what}: {'; '.join(reasons)}{remedy}")


def sample_to_check(policy: Policy, prompts: tuple[Tensor, Tensor], new_tokens: int) -> Rollout:
    """Sample completions that no token ends, so that a window shorter than that matters."""
    no_eos, generator = prompts[0].new_zeros(0), torch.Generator().manual_seed(0)
    ids, mask, sampled, truncated = policy.sample(*prompts, new_tokens, no_eos, generator)
    return Rollout(*prompts, ids, mask.float(), sampled, truncated, [""] * len(ids))


def find_mismatch(policy: Policy, prompts: tuple[Tensor, Tensor], new_tokens: int) -> str | None:
    """Sample with a float32 policy and score the samples: what is wrong, or None.

    The first, the middle and the last sample are also scored by an unpadded forward pass each, with
    plain attention: fused kernels may leave out what a model asks for, in both passes alike.
    """
    model = policy.model
    attention = model.config._attn_implementation
    try:
        with torch.no_grad():
            rollout = sample_to_check(policy, prompts, new_tokens)
            ids, sampled = rollout.completion_ids, rollout.sampled_logprobs
            scored, gaps = torch.zeros_like(sampled), []
            for rows, chunk in policy.micro_batches(rollout):
                scored[rows] = policy(chunk)
                if isinstance(chunk, TreeRollout) and not gaps:
                    # A model that masks by column instead of by the given mask fails here.
                    backwards = policy(replace(chunk, tree=chunk.tree.reversed()))
                    gaps.append((backwards - scored[rows]).abs().max())
            gaps.append((scored - sampled).abs().max())
            model.set_attn_implementation("eager")
            for i in {0, len(ids) // 2, len(ids) - 1}:
                prompt = rollout.prompt_ids[i][rollout.prompt_mask[i] == 1]
                whole = torch.cat([prompt, ids[i]])[None]
                logits = model(input_ids=whole).logits[0, -1 - new_tokens : -1]
                rows = torch.arange(new_tokens, device=ids.device)
                gaps.append((token_logprobs(logits, rows, ids[i]) - scored[i]).abs().max())
            gap = torch.stack(gaps).max().item()
            model.set_attn_implementation(attention)
    except Exception as error:  # third-party code: any failure rules this policy out
        if out_of_memory(error):
            raise
        return f"fails ({first_line(error)})"
    return None if gap < TOLERANCE else f"changes log-probabilities by {gap:.2g}"


def find_failure(policy: Policy, prompts: tuple[Tensor, Tensor]) -> str | None:
    """Sample and train on a token each in the policy's own compute type: what fails, or None."""
    try:
        for _, chunk in policy.micro_batches(sample_to_check(policy, prompts, 2)):
            policy(chunk).sum().backward()
        policy.zero_grad()
    except Exception as error:  # third-party code
        if out_of_memory(error):
            raise
        return f"fails in {str(policy.compute_dtype).removeprefix('torch.')} ({first_line(error)})"
    return None
