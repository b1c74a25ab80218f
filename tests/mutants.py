"""Break the code in one line, run the test file concerned, and see that it notices; many times.

    python tests/mutants.py             # all of them, some minutes; prints a table
    python tests/mutants.py mask clip   # only those whose name holds one of these words

Each mutation happens in a copy of the project; exits with 1 unless the tests catch every one.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    file: str
    code: str  # stands exactly once in the file
    broken: str
    tests: str  # the file that must notice


def in_trainer(name: str, code: str, broken: str, tests: str) -> Mutant:
    return Mutant(name, "train_grpo.py", code, broken, tests)


def in_policy(name: str, code: str, broken: str, tests: str) -> Mutant:
    return Mutant(name, "policy.py", code, broken, tests)


def in_task(name: str, code: str, broken: str, tests: str) -> Mutant:
    return Mutant(name, "task.py", code, broken, tests)


def in_spread(name: str, code: str, broken: str, tests: str) -> Mutant:
    return Mutant(name, "spread.py", code, broken, tests)


MUTANTS = [
    in_policy(
        "no position ids",
        '"position_ids": torch.cat(positions).unsqueeze(0),',
        '"position_ids": None,',
        "test_logprobs.py",
    ),
    in_policy(
        "positions count the padding",
        "positions = (self.mask.long().cumsum(dim=1) - 1)",
        "positions = (torch.ones_like(self.mask).long().cumsum(dim=1) - 1)",
        "test_logprobs.py",
    ),
    in_policy(
        "positions of the first tokens for the last",
        "return positions[:, -part.ids.shape[1] :]",
        "return positions[:, : part.ids.shape[1]]",
        "test_logprobs.py",
    ),
    in_policy(
        "padding is attended to",
        "allowed = real[:, None] & (column <= row)",
        "allowed = torch.ones_like(real)[:, None] & (column <= row)",
        "test_logprobs.py",
    ),
    in_policy(
        "what comes later is attended to",
        "allowed = real[:, None] & (column <= row)",
        "allowed = real[:, None] & (column <= row + 99)",
        "test_logprobs.py",
    ),
    in_policy(
        "no sliding window",
        "            if window:",
        "            if False:",
        "test_logprobs.py",
    ),
    in_policy(
        "sliding window one token wider",
        "positions[:, -steps:, None] - window",
        "positions[:, -steps:, None] - window - 1",
        "test_logprobs.py",
    ),
    in_policy(
        "sliding window counts the padding",
        "allowed &= positions[:, None] > positions[:, -steps:, None] - window",
        "allowed &= column > row - window",
        "test_logprobs.py",
    ),
    in_policy(
        "sequences go on from the wrong ones",
        "own = [torch.cat(both, dim=2) for both",
        "own = [torch.cat([both[0].flip(0), both[1]], dim=2) for both",
        "test_logprobs.py",
    ),
    in_policy(
        "a part forgets what stands before it",
        "        if past:",
        "        if False:",
        "test_logprobs.py",
    ),
    in_policy(
        "prompt's logits in the wrong order",
        "return logits.squeeze(1).repeat_interleave(group, dim=0), context",
        "return logits.squeeze(1).repeat(group, 1), context",
        "test_sampling.py",
    ),
    in_policy(
        "logits off by one",
        "body = completion_ids[:, :-1]",
        "body = completion_ids[:, 1:]",
        "test_logprobs.py",
    ),
    in_policy(
        "gradient of a log-probability without the softmax",
        ".mul_(-pull.sum(dim=1, keepdim=True))",
        ".mul_(0 * pull.sum(dim=1, keepdim=True))",
        "test_logprobs.py",
    ),
    in_policy(
        "gradient of a log-probability: one completion for its group",
        "mul_(-pull.sum(dim=1, keepdim=True))",
        "mul_(-pull[:, :1])",
        "test_logprobs.py",
    ),
    in_policy(
        "pieces of logits overlap in their ids",
        "zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)",
        "((x, *(o[: len(x)] for o in others)) for x in logits.split(rows))",
        "test_logprobs.py",
    ),
    in_policy(
        "common beginning one token too long",
        "return int((ids == ids[0]).all(dim=0)[:longest].cumprod(dim=0).sum())",
        "return int((ids == ids[0]).all(dim=0)[:longest].cumprod(dim=0).sum()) + 1",
        "test_logprobs.py",
    ),
    in_policy(
        "common beginning sought among the padding",
        "columns = padding + torch.arange(width)",
        "columns = 0 * padding + torch.arange(width)",
        "test_logprobs.py",
    ),
    in_policy(
        "grouped attention without its mask",
        "weights = (scores + attention_mask)",
        "weights = (scores + 0 * attention_mask)",
        "test_logprobs.py",
    ),
    in_policy(
        "grouped attention scaled twice",
        "key.transpose(2, 3) * scaling",
        "key.transpose(2, 3) * scaling**2",
        "test_logprobs.py",
    ),
    in_policy(
        "pieces narrower than their longest completion",
        "width = int(mask[start:stop].sum(dim=1).max()) if trim",
        "width = int(mask[start:stop].sum(dim=1).min()) if trim",
        "test_logprobs.py",
    ),
    in_trainer(
        "a recording's gradients move",
        "zero_grad(set_to_none=graphs is None)",
        "zero_grad()",
        "test_replay.py",
    ),
    in_policy(
        "pieces of fixed shapes trimmed",
        ".max()) if trim else mask.shape[1]",
        ".max())",
        "test_replay.py",
    ),
    in_policy(
        "logits of the last tokens only",
        '"logits_to_keep": torch.cat(kept),',
        '"logits_to_keep": sum(map(len, kept)),',
        "test_logprobs.py",
    ),
    in_policy(
        "dropout left on",
        "self.model = model.eval()",
        "self.model = model",
        "test_logprobs.py",
    ),
    in_policy(
        "no gradient through the prompt",
        "before = (fan_out(x, len(mask)) for x in past)",
        "before = (fan_out(x.detach(), len(mask)) for x in past)",
        "test_logprobs.py",
    ),
    in_policy(
        "start-up comparison lets all pass",
        "if not gap < 1e-3",
        "if gap < -1e-3",
        "test_logprobs.py",
    ),
    in_trainer(
        "micro-batches weigh the same whatever their size",
        "share = len(logprobs) / len(mask)",
        "share = (config.micro_batch_size or len(mask)) / len(mask)",
        "test_logprobs.py",
    ),
    in_policy(
        "micro-batch of the wrong prompts",
        "prompts = slice(start // group, math.ceil(stop / group))",
        "prompts = slice(0, math.ceil((stop - start) / group))",
        "test_logprobs.py",
    ),
    in_trainer(
        "greedy takes the least likely token",
        "token = scores.argmax(dim=1, keepdim=True)",
        "token = scores.argmin(dim=1, keepdim=True)",
        "test_sampling.py",
    ),
    in_trainer(
        "temperature multiplies",
        "(scores / temperature).softmax(dim=1)",
        "(scores * temperature).softmax(dim=1)",
        "test_sampling.py",
    ),
    in_trainer(
        "sampled a little too cold",
        "(scores / temperature).softmax(dim=1)",
        "(scores / temperature * 1.15).softmax(dim=1)",
        "test_sampling.py",
    ),
    in_policy(
        "sampled from the global generator",
        ".uniform_(generator=generator)",
        ".uniform_()",
        "test_sampling.py",
    ),
    in_trainer(
        "mask off by one: end token out",
        "steps.append((token, alive, ",
        "steps.append((token, alive & ~torch.isin(token, end_ids), ",
        "test_sampling.py",
    ),
    in_trainer(
        "mask never ends",
        "alive = alive & ~torch.isin(token, end_ids)",
        "alive = alive | ~torch.isin(token, end_ids)",
        "test_sampling.py",
    ),
    in_trainer(
        "only the first end token ends",
        "alive = alive & ~torch.isin(token, end_ids)",
        "alive = alive & (token != end_ids[0])",
        "test_sampling.py",
    ),
    in_trainer(
        "sampling gap counts what follows the end",
        "((old_logprobs - batch.logprobs) * batch.mask).abs()",
        "(old_logprobs - batch.logprobs).abs()",
        "test_sampling.py",
    ),
    in_trainer(
        "max for min in the surrogate",
        "torch.min(unclipped, clipped)",
        "torch.max(unclipped, clipped)",
        "test_loss.py",
    ),
    in_trainer(
        "ratio upside down",
        "ratio = (logprobs - old_logprobs).exp()",
        "ratio = (old_logprobs - logprobs).exp()",
        "test_loss.py",
    ),
    in_trainer(
        "clipped on one side only",
        "ratio.clamp(1 - config.epsilon, 1 + config.epsilon)",
        "ratio.clamp(None, 1 + config.epsilon)",
        "test_loss.py",
    ),
    in_trainer(
        "sign of the KL term in the loss",
        "- config.beta * kl_penalty, mask)",
        "+ config.beta * kl_penalty, mask)",
        "test_loss.py",
    ),
    in_trainer(
        "mean over the wrong axis",
        "return ((values * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
        "return ((values * mask).sum(dim=0) / mask.sum(dim=0)).mean()",
        "test_loss.py",
    ),
    in_trainer(
        "mean over all tokens alike",
        "return ((values * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
        "return (values * mask).sum() / mask.sum()",
        "test_loss.py",
    ),
    in_trainer(
        "mask forgotten in the mean",
        "return ((values * mask).sum(dim=1) / mask.sum(dim=1)).mean()",
        "return (values.sum(dim=1) / mask.sum(dim=1)).mean()",
        "test_loss.py",
    ),
    in_trainer(
        "clip fraction counts the other side",
        '"clip_fraction": completion_mean((clipped < unclipped).float(), mask)',
        '"clip_fraction": completion_mean((clipped > unclipped).float(), mask)',
        "test_loss.py",
    ),
    in_trainer(
        "sign of d in the KL term",
        'if estimator == "k3_inverse" else',
        'if estimator == "k3" else',
        "test_kl.py",
    ),
    in_trainer(
        "d clamped, and no tangent beyond",
        " * math.expm1(20.0)\n",
        " * 0.0\n",
        "test_kl.py",
    ),
    in_trainer(
        "exponential not bounded",
        "bounded = d.clamp(max=20.0)",
        "bounded = d",
        "test_kl.py",
    ),
    in_trainer(
        "slope of the KL term lost in float32",
        "(d - 20.0).relu() * math",
        "(d - bounded) * math",
        "test_kl.py",
    ),
    in_trainer(
        "KL term without its - d",
        "return torch.expm1(bounded) - bounded +",
        "return torch.expm1(bounded) +",
        "test_kl.py",
    ),
    in_trainer(
        "deviation without guard",
        "(groups.std(dim=1, keepdim=True) + 1e-4)",
        "groups.std(dim=1, keepdim=True)",
        "test_advantages.py",
    ),
    in_trainer(
        "deviation of the population",
        "groups.std(dim=1, keepdim=True)",
        "groups.std(dim=1, keepdim=True, correction=0)",
        "test_advantages.py",
    ),
    in_trainer(
        "mean over the whole batch",
        "centred = groups - groups.mean(dim=1, keepdim=True)",
        "centred = groups - groups.mean()",
        "test_advantages.py",
    ),
    in_trainer(
        "groups cut across",
        "groups = rewards.view(-1, group)  # (B, G)",
        "groups = rewards.view(group, -1).T  # (B, G)",
        "test_advantages.py",
    ),
    in_trainer(
        "equal rewards left to rounding",
        ".masked_fill(equal, 0.0)",
        "",
        "test_advantages.py",
    ),
    in_trainer(
        "missing detach",
        "past, gains = (scored if old is None else old)[part], advantages[part[0]]",
        "past, gains = logprobs if old is None else old[part], advantages[part[0]]",
        "test_updates.py",
    ),
    in_trainer(
        "old log-probabilities renewed at every update",
        "old_logprobs = logprobs if old_logprobs is None else old_logprobs",
        "old_logprobs = None",
        "test_updates.py",
    ),
    in_trainer(
        "gradients pile up",
        "optimizer.zero_grad(set_to_none=graphs is None)",
        "pass",
        "test_updates.py",
    ),
    in_trainer(
        "gradients not clipped",
        "nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)",
        "nn.utils.clip_grad_norm_(parameters, 1e9)",
        "test_updates.py",
    ),
    in_trainer(
        "kl of the last update logged",
        'updates[0][name] for name in ("kl", "kl_penalty")',
        'updates[-1][name] for name in ("kl", "kl_penalty")',
        "test_updates.py",
    ),
    in_trainer(
        "reference is the policy itself",
        "reference = frozen_copy(policy)",
        "reference = policy",
        "test_updates.py",
    ),
    in_trainer(
        "answers in the wrong order",
        "[p.answer for p in problems for _ in range(group)]",
        "[p.answer for _ in range(group) for p in problems]",
        "test_updates.py",
    ),
    in_policy(
        "weights loaded in bfloat16",
        "            dtype=torch.float32,",
        "            dtype=torch.bfloat16,",
        "test_updates.py",
    ),
    in_trainer(
        "evaluation draws from the sampler of the training",
        "seed = 1_000_003 * (config.seed + 1) + iteration",
        "seed = 1_000_003 + iteration; torch.rand(1, generator=sampler)",
        "test_determinism.py",
    ),
    in_trainer(
        "evaluation draws unseeded",
        "rng = torch.Generator(device).manual_seed(spread.stream(seed))",
        "rng = None",
        "test_determinism.py",
    ),
    in_trainer(
        "problems drawn unseeded",
        "random.Random(config.seed), sampler",
        "random.Random(), sampler",
        "test_determinism.py",
    ),
    in_trainer(
        "tokens drawn unseeded",
        "sampler = torch.Generator(device).manual_seed(spread.stream(config.seed))",
        "sampler = torch.Generator(device); sampler.seed()",
        "test_determinism.py",
    ),
    in_trainer(
        "every process takes the whole batch",
        "problems = spread.share(training_problems(config.batch_size, state.problems, config))",
        "problems = training_problems(config.batch_size, state.problems, config)",
        "test_distributed.py",
    ),
    in_trainer(
        "metrics of the first process alone",
        "updates.append(spread.average(dict(zip(stats, values, strict=True))))",
        "updates.append(spread.gather(dict(zip(stats, values, strict=True)))[0])",
        "test_distributed.py",
    ),
    in_trainer(
        "the same sampling stream in each process",
        "sampler = torch.Generator(device).manual_seed(spread.stream(config.seed))",
        "sampler = torch.Generator(device).manual_seed(config.seed)",
        "test_distributed.py",
    ),
    in_spread(
        "gradients not exchanged",
        "    yield last",
        "    with learner.no_sync() if several else nullcontext(): yield last",
        "test_distributed.py",
    ),
    in_trainer(
        "loss divided among the processes twice",
        "share = len(logprobs) / len(mask)",
        "share = len(logprobs) / len(mask) / spread.size()",
        "test_distributed.py",
    ),
    in_spread(
        "streams that differ where no generator looks",
        "seed + 0x9E3779B9 * rank()",
        "seed + 0x100000000 * rank()",
        "test_distributed.py",
    ),
    in_spread(
        "samplers of the others not resumed",
        "    if rank() < len(found):",
        "    if rank() < 1:",
        "test_distributed.py",
    ),
    in_task(
        "operands not sorted",
        "else sorted((self.a, self.b))",
        "else (self.a, self.b)",
        "test_split.py",
    ),
    in_task(
        "split by Python's own hash",
        'zlib.crc32(f"({a} {self.op1} {b}) {self.op2} {self.c}".encode()) % 20',
        'hash(f"({a} {self.op1} {b}) {self.op2} {self.c}") % 20',
        "test_split.py",
    ),
    in_task(
        "validation problems trained on",
        'problems += [problem] if problem.split == "train" else []',
        'problems += [problem] if problem.split != "test" else []',
        "test_split.py",
    ),
    in_task(
        "held-out problems depend on the seed",
        "random.Random(0).sample(",
        "random.Random(config.seed).sample(",
        "test_split.py",
    ),
    Mutant(
        "all problems demonstrated",
        "tiny_model/make.py",
        'problems = [p for p in all_problems() if p.split == "train"]',
        "problems = all_problems()",
        "test_split.py",
    ),
]


def copy_project(folder: Path) -> None:
    """Copy what the tests read: the scripts, the tests, the bundled model."""
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    for part in ("tests", "tiny_model", "saved_model"):
        shutil.copytree(ROOT / part, folder / part, ignore=skipped)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)


def first_failure(folder: Path, tests: str) -> str:
    """Run one test file there. The name of the first test that fails; empty where all pass."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/{tests}"], cwd=folder, capture_output=True, text=True, timeout=600
    )
    if done.returncode == 0:
        return ""
    failed = re.search(r"^FAILED \S+?::(\w+)", done.stdout, flags=re.MULTILINE)
    if not failed:  # a mutant that cannot even be imported proves nothing about the tests
        raise SystemExit(f"{tests} did not run:\n{done.stdout}\n{done.stderr}")
    return failed[1]


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_project(folder)
        for tests in sorted({mutant.tests for mutant in chosen}):
            if failed := first_failure(folder, tests):
                raise SystemExit(f"{tests} fails on the code as it is: {failed}")
        print("| mutation | file | caught by |\n|---|---|---|")
        for mutant in chosen:
            path = folder / mutant.file
            whole = path.read_text(encoding="utf-8")
            assert whole.count(mutant.code) == 1, f"not exactly once: {mutant.code}"
            path.write_text(whole.replace(mutant.code, mutant.broken), encoding="utf-8")
            caught = first_failure(folder, mutant.tests)
            path.write_text(whole, encoding="utf-8")
            verdict = f"`{mutant.tests}::{caught}`" if caught else "**nothing**"
            print(f"| {mutant.name} | `{mutant.file}` | {verdict} |", flush=True)
            survivors += [] if caught else [mutant.name]
    print(f"\n{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
