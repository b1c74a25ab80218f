"""The text of one_iteration.md: one iteration of GRPO with real numbers, step by step.

Two problems, four completions each, two updates. `python docs/pages.py` writes the page.
"""

import math
from collections.abc import Iterator
from statistics import fmean, stdev

import torch
from torch import Tensor

from engine.policy import Policy, Rollout
from engine.presets import PRESETS
from engine.prompt import encode_prompts
from train_grpo import (
    Config,
    Learner,
    Task,
    completion_mean,
    group_advantages,
    grpo_loss,
    kl_term,
    reward_function,
    rollout,
    set_up,
    update_policy,
)

# A batch this small moves some ratios beyond the clipping range in one update.
CHANGED = {
    "seed": 35,
    "device": "cpu",
    "batch_size": 2,
    "num_generations": 4,
    "num_inner_updates": 2,
}
CONFIG = Config(**{**PRESETS["tiny"], **CHANGED})


def table(header: list[str], rows: list[list]) -> str:
    # A bar inside a cell would end it.
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in (header, *rows)]
    first, *lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([first, "|---" * len(header) + "|", *lines])


def code(text: str) -> str:
    """Text as Markdown code, its white space visible."""
    return f"`{text}`" if text == text.strip() and "\n" not in text else f"`{text!r}`"


def words(task: Task, ids: Tensor) -> list[str]:
    return [code(task.tokenizer.decode([token])) for token in ids.tolist()]


def tree_lines(rows: list[list[str]], indent: str = "") -> Iterator[str]:
    """Draw completions (lists of tokens) as a tree: each distinct prefix is one line."""
    for first in dict.fromkeys(row[0] for row in rows if row):
        rest = [row[1:] for row in rows if row and row[0] == first]
        yield f"{indent}{first}" + (f"   ({len(rest)} completions)" if len(rest) > 1 else "")
        yield from tree_lines(rest, indent + "  ")


def token_table(task: Task, batch: Rollout, columns: dict[str, Tensor]) -> str:
    """A line per token."""
    lines = []
    for i in range(len(batch)):
        tokens = words(task, batch.completion_ids[i][batch.mask[i] == 1])
        for t, token in enumerate(tokens):
            numbers = [f"{column[i, t]:.4f}" for column in columns.values()]
            lines.append([i + 1 if t == 0 else "", token, *numbers])
    return table(["completion", "token", *columns], lines)


def probabilities(logprobs: Tensor, mask: Tensor) -> list[float]:
    return (logprobs * mask).sum(dim=1).exp().tolist()


@torch.no_grad()
def logprobs_of(policy: Policy, batch: Rollout) -> Tensor:
    [(_, whole)] = policy.micro_batches(batch)
    return policy(whole)


def updates(
    learner: Learner, batch: Rollout, advantages: Tensor
) -> tuple[dict[str, float], list[Tensor]]:
    """Update the policy. Returns the metrics, and the log-probabilities (N, T) of each update."""
    passes: list[Tensor] = []
    hook = learner.trained.register_forward_hook(lambda *call: passes.append(call[-1].detach()))
    metrics = update_policy(learner, batch, advantages, CONFIG)
    hook.remove()
    return metrics, passes


def loss_by_hand(inputs: tuple[Tensor, ...]) -> tuple[list[list[str]], float]:
    """Equation 3 in Python floats: a line per completion, and the loss."""
    new, old, ref, advantages, mask = (x.tolist() for x in inputs)
    lines, objectives = [], []
    for i, advantage in enumerate(advantages):
        terms = []
        for t in range(int(sum(mask[i]))):
            ratio = math.exp(new[i][t] - old[i][t])
            clipped = min(max(ratio, 1 - CONFIG.epsilon), 1 + CONFIG.epsilon)
            d = ref[i][t] - new[i][t]
            surrogate = min(ratio * advantage, clipped * advantage)
            terms.append(surrogate - CONFIG.beta * (math.exp(d) - d - 1))
        objectives.append(sum(terms) / len(terms))
        written = " ".join(f"{x:+.4f}" for x in terms)
        lines.append([i + 1, f"({written}) / {len(terms)}", f"{objectives[-1]:+.4f}"])
    return lines, -sum(objectives) / len(objectives)


def advantage_lines(rewards: Tensor, advantages: Tensor) -> list[list[str]]:
    """A line per completion; rewards and advantages (G,) of one group."""
    mean, std = fmean(rewards.tolist()), stdev(rewards.tolist())
    return [
        [f"{r:.1f}", f"({r:.1f} - {mean:.4f}) / ({std:.4f} + 0.0001)", f"{a:+.4f}"]
        for r, a in zip(rewards.tolist(), advantages.tolist(), strict=True)
    ]


def page() -> str:
    """The text of one_iteration.md."""
    task, learner = set_up(CONFIG)
    group, length = CONFIG.num_generations, CONFIG.max_new_tokens
    beta, epsilon = CONFIG.beta, CONFIG.epsilon
    problems = task.problems.draw(CONFIG.batch_size, learner.problem_rng)
    prompts = encode_prompts(task.tokenizer, [p.question for p in problems], task.prompt, "cpu")
    batch = rollout(learner.policy, task.tokenizer, prompts, group, length, learner.token_rng)
    answers = [p.answer for p in problems for _ in range(group)]
    rewards, parts = reward_function(batch.texts, answers, task.reward_file)
    advantages = group_advantages(rewards, group)

    ref = logprobs_of(learner.reference, batch)
    metrics, (old, now) = updates(learner, batch, advantages)
    after = logprobs_of(learner.policy, batch)
    inputs = now, old, ref, advantages, batch.mask
    by_code, stats = grpo_loss(*inputs, CONFIG)
    hand_lines, by_hand = loss_by_hand(inputs)
    penalty = completion_mean(kl_term(now, ref, CONFIG.kl_estimator), batch.mask)

    groups = [range(k * group, (k + 1) * group) for k in range(len(problems))]
    everyone = range(len(batch))
    prompt_ids = prompts[0][0][prompts[1][0] == 1]
    tokens = [words(task, batch.completion_ids[i][batch.mask[i] == 1]) for i in everyone]
    ratio = (now - old).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    columns = {
        "log p, old": old,
        "log p, now": now,
        "ratio": ratio,
        "clipped": clipped,
        "ratio A": ratio * advantages[:, None],
        "clipped A": clipped * advantages[:, None],
        "KL term": kl_term(now, ref, CONFIG.kl_estimator),
    }
    moments = [probabilities(x, batch.mask) for x in (old, now, after)]
    trees = [
        f"{problems[k].question}\n" + "\n".join(tree_lines([tokens[i] for i in rows], "  "))
        for k, rows in enumerate(groups)
    ]
    distinct = sum(text.count("\n") for text in trees)
    compared = [
        [i + 1, *line]
        for rows in groups
        for i, line in zip(rows, advantage_lines(rewards[rows], advantages[rows]), strict=True)
    ]
    outside = int(((ratio != clipped) & (batch.mask == 1)).sum())
    newline = "\n\n"
    weights = " + ".join(f"{weight} {name}" for name, weight in task.reward_file.weights.items())
    return f"""# One iteration, by hand

`python docs/pages.py` writes this page. It runs one iteration of `train_grpo.py` on the bundled
model, with {len(problems)} problems, {group} completions of each, and two updates. Every
number comes from the trainer's own functions. [The page of a whole run](report.html) shows the
same numbers for each logged group. The learning rate is the preset's,
{CONFIG.learning_rate:g}; in a batch this small, one update moves some ratios beyond the clipping
range.

## 1. Two problems become prompts

`task.problems.draw` draws {code(problems[0].question)} and {code(problems[1].question)}.
`encode_prompts` puts each into the chat. The first, {len(prompt_ids)} tokens, between bars:

```
{"|".join(task.tokenizer.decode([token]) for token in prompt_ids.tolist())}
```

## 2. The policy answers, {group} times each

`rollout` samples. Below each token is its log-probability at that moment, as `rollout` recorded it.
The last token of each completion ends it.

{newline.join(completion_table(i, tokens[i], batch.sampled_logprobs[i]) for i in everyone)}

## 3. The completions are a tree

Completions of one prompt share tokens. Each distinct prefix is one line here, and one node for
`TreePolicy`: {distinct} nodes for {int(batch.mask.sum())} tokens.

```
{newline.join(trees)}
```

## 4. Rewards

`reward_function` scores each text; the reward is {weights}.

{
        table(
            ["completion", "text", "truth", *task.reward_file.weights, "reward"],
            [
                [
                    i + 1,
                    code(batch.texts[i]),
                    answers[i],
                    *(f"{part[i]:g}" for part in parts.values()),
                    f"{rewards[i].item():.1f}",
                ]
                for i in everyone
            ],
        )
    }

## 5. Advantages

`group_advantages` compares each reward with its own group: (r - mean) / (std + 0.0001). Where all
rewards of a group are equal, every advantage is 0 and the group teaches nothing.

{table(["completion", "reward", "arithmetic", "advantage A"], compared)}

## 6. First update

The policy has not moved since it sampled, so every ratio is 1 and nothing is clipped. The reference
is the policy, so the KL term is 0. The loss is minus the mean advantage, which is 0 in each group.
Its gradient is not 0: it raises completions with a positive advantage and lowers the others. The
gradient is clipped to a norm of at most {CONFIG.clip_grad_norm:g}.

## 7. Second update, token by token

The same completions again, but the policy has moved. The ratio is p now / p old, and it is clipped
to {1 - epsilon:g} .. {1 + epsilon:g}. The loss takes the smaller of ratio A and clipped A: a token
that has already moved far enough in the direction of its advantage is not pushed further.
{outside} of {int(batch.mask.sum())} ratios lie outside.

{token_table(task, batch, columns)}

## 8. The loss, by hand and by code

For each token, the smaller of ratio A and clipped A, minus {
        beta:g} times its KL term. Then the mean
over the tokens of a completion, and minus the mean over completions (DeepSeekMath, equation 3).

{table(["completion", "mean over its tokens", "="], hand_lines)}

| by hand | `grpo_loss` |
|---|---|
| {by_hand:+.6f} | {by_code.item():+.6f} |

The mean KL term is {penalty.item():.4f}; `clip_fraction` is
{stats["clip_fraction"].item():.4f}: the share of a completion's tokens whose clipped value is the
smaller one, averaged over completions. `grad_norm`, the mean gradient norm of both updates before
clipping, is {metrics["grad_norm"]:.3f}.

## 9. What it did

Probability of each whole completion before, after one update, and after two. All are samples of
the same policy, which must share one probability of 1 among everything it could say.

{
        table(
            ["completion", "text", "advantage A", "before", "after one update", "after two"],
            [
                [
                    i + 1,
                    code(batch.texts[i]),
                    f"{advantages[i].item():+.4f}",
                    *(f"{p:.4f}" for p in three),
                ]
                for i, three in zip(everyone, zip(*moments, strict=True), strict=True)
            ],
        )
    }
"""


def completion_table(number: int, tokens: list[str], logprobs: Tensor) -> str:
    numbers = [f"{x:.4f}" for x in logprobs[: len(tokens)].tolist()]
    return table([f"completion {number + 1}", *tokens], [["log p", *numbers]])
