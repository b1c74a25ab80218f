"""The inner updates: what they compute, what they move, and what stays where it was."""

import copy
import re
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from processes import finish
from short_runs import make_learner, make_task, short_config
from small_models import (
    Recorder,
    nearby,
    ragged_batch,
    random_ids,
    small_model,
    unpadded_logprobs,
    update,
)

import train_grpo
from engine.metrics import batch_metrics
from engine.policy import Policy, Rollout
from engine.problems import RewardFile
from engine.tree import TreePolicy
from train_grpo import (
    Config,
    Learner,
    Task,
    group_advantages,
    reward_function,
    rollout,
    set_learning_rate,
    train_iteration,
)

PROMPTS = [random_ids(length, seed=length) for length in (4, 9)]
LENGTHS = (5, 1, 3, 6, 2, 6, 4, 1)
COMPLETIONS = [random_ids(length, seed=50 + i) for i, length in enumerate(LENGTHS)]
ADVANTAGES = torch.tensor([1.2, -0.9, 0.0, 0.8, 0.5, -1.3, 0.0, 0.7])
TRUNCATED = torch.tensor([False, True, False, False, False, True, True, False])
RATE = 0.05  # of plain gradient descent
BOTH = pytest.mark.parametrize("kind", [Policy, TreePolicy])


@pytest.fixture(autouse=True)
def always_a_tree(monkeypatch):
    """Random completions share little; without this their passes would take the plain path."""
    monkeypatch.setattr("engine.tree.MAX_SHARE", 1.0)


def make_batch() -> Rollout:
    """Two groups of four, whose recorded log-probabilities are not those of any policy."""
    batch = ragged_batch(PROMPTS, COMPLETIONS)
    recorded = -torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    return replace(batch, sampled_logprobs=recorded * batch.mask, truncated=TRUNCATED)


def plain_logprobs(model) -> list[torch.Tensor]:
    """Log-probabilities of each completion, from a forward of its own."""
    rows = unpadded_logprobs(model, make_batch())
    return [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


def plain_updates(policy: Policy, reference: Policy, read: list[int], config: Config):
    """GRPO with plain gradient descent, one whole sequence at a time. Returns (model, metrics).

    `read`: the completions that the policy must read.
    """
    model = copy.deepcopy(policy.model)
    old, ref = ([x.detach() for x in plain_logprobs(m)] for m in (model, reference.model))
    recorded = [x[:n] for x, n in zip(make_batch().sampled_logprobs, LENGTHS, strict=True)]
    kept = [i for i in range(8) if not (config.mask_truncated and TRUNCATED[i])]
    divisors = {
        "grpo": [8 * length for length in LENGTHS],
        "dr_grpo": [8 * config.max_new_tokens] * 8,
        "dapo": [sum(LENGTHS[i] for i in kept)] * 8,
    }
    updates = []
    for _ in range(config.num_inner_updates):
        loss, clip_fraction, scores = 0.0, 0.0, plain_logprobs(model)
        for i in kept:
            ratio, advantage = (scores[i] - old[i]).exp(), ADVANTAGES[i]
            sign = advantage.sign()
            beyond = (ratio - 1) * sign > config.epsilon
            surrogate = torch.where(beyond, 1 + config.epsilon * sign, ratio) * advantage
            strayed = (scores[i] - ref[i]).exp()  # pi_theta / pi_ref
            penalty = strayed - 1 - strayed.log()
            part = (config.beta * penalty - surrogate).sum()
            loss = loss + part / divisors[config.loss_type][i]
            clip_fraction += beyond.float().mean().item() / 8
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= RATE * gradient * min(1, config.clip_grad_norm / norm)
        updates.append((loss.item(), clip_fraction, norm))
    names = "loss", "clip_fraction", "grad_norm"
    metrics = {name: fmean(u[i] for u in updates) for i, name in enumerate(names)}
    metrics["skipped_updates"] = 0
    metrics["logprob_mismatch"] = max((old[i] - recorded[i]).abs().max().item() for i in read)
    # Without a KL term, kl is that of the first group as it was sampled.
    ours, rows = (old, range(8)) if config.beta else (recorded, range(4))
    d = [ref[i] - ours[i] for i in rows]
    metrics["kl"] = fmean((x.exp() - x - 1).mean().item() for x in d)
    metrics["kl_penalty"] = fmean(((-x).exp() + x - 1).mean().item() for x in d)
    metrics["kl_tokens"] = sum(map(len, d))
    return model, metrics


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_grad_norm": 0.5},
        {"num_inner_updates": 1, "epsilon": 0.0},  # no ratio has moved: nothing is clipped
        {"num_inner_updates": 1, "beta": 0.0},  # REINFORCE
        {"loss_type": "dr_grpo", "max_new_tokens": 11},
        {"loss_type": "dapo"},
        {"loss_type": "dapo", "mask_truncated": True},
        {"mask_truncated": True},
        {"beta": 0.0, "mask_truncated": True},
        {"beta": 0.0, "loss_type": "dr_grpo", "max_new_tokens": 11},
        {"beta": 0.0, "loss_type": "dapo"},
    ],
    ids=str,
)
@BOTH
def test_updates_and_metrics_equal_a_plain_loop(kind, settings, size):
    policy = kind(small_model("llama"))
    start, reference, sizes = copy.deepcopy(policy.model), nearby(policy), ([], [])
    settings = {"beta": 0.3, "clip_grad_norm": 1e9, "num_inner_updates": 3, **settings}
    config = Config(num_generations=4, micro_batch_size=size, **settings)
    # Without a KL term, the loss needs no completion of advantage 0, nor one that is left out.
    needed = (ADVANTAGES != 0) & ~(TRUNCATED & config.mask_truncated)
    read = [i for i in range(8) if config.beta or needed[i]]
    model, expected = plain_updates(policy, reference, read, config)
    for module, seen in zip((policy, reference), sizes, strict=True):
        module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
    optimizer = torch.optim.SGD(policy.parameters(), RATE)
    metrics = update(policy, reference, optimizer, make_batch(), ADVANTAGES, config)
    assert metrics == pytest.approx(expected, rel=1e-3)
    assert metrics["grad_norm"] > 0.5
    assert metrics["clip_fraction"] > 0 or config.num_inner_updates == 1
    models = (start, policy.model, model)
    for before, mine, its in zip(*(m.parameters() for m in models), strict=True):
        assert (mine - its).norm() <= 1e-3 * (its - before).norm()
    own = torch.arange(len(read)).split(size or len(read))
    measured = own if config.beta else torch.arange(4).split(size or 4)
    assert sizes[0] == [len(part) for part in own] * config.num_inner_updates
    assert sizes[1] == [len(part) for part in measured]


def fresh(tiny, config: Config, kind=Policy, dtype=torch.float32) -> tuple[Task, Learner]:
    """As `set_up` makes them, of a copy of the bundled model."""
    policy = kind(copy.deepcopy(tiny[0].model), dtype)
    return make_task(tiny[1], config), make_learner(policy, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("micro_batch_size", [0, 6])
@BOTH
def test_in_the_first_iteration_kl_is_exactly_zero(tiny, kind, dtype, micro_batch_size):
    config = short_config("", batch_size=4, micro_batch_size=micro_batch_size)
    task, learner = fresh(tiny, config, kind, dtype)
    first, second = (train_iteration(task, learner, config)[0] for _ in range(2))
    assert first["kl"] == first["kl_penalty"] == 0
    assert first["grad_norm"] > 0
    assert second["kl"] > 0 and second["kl_penalty"] > 0


def test_each_completion_is_scored_against_its_own_answer(tiny, monkeypatch):
    def answer_rightly(policy, tokenizer, *rest) -> Rollout:
        batch = rollout(policy, tokenizer, *rest)
        chats = tokenizer.batch_decode(batch.prompt_ids)
        problems = [re.search(r"What is (.*?)\?", chat)[1] for chat in chats]
        assert len(problems) == 12 and len(set(map(eval, problems))) == 3
        return replace(batch, texts=[f"<answer>{eval(problem)}</answer>" for problem in problems])

    monkeypatch.setattr(train_grpo, "rollout", answer_rightly)
    config = short_config("", batch_size=3)
    metrics, _ = train_iteration(*fresh(tiny, config), config)
    assert metrics["accuracy"] == 1


def test_batch_metrics_are_the_means_their_names_say():
    batch = ragged_batch(PROMPTS, COMPLETIONS[:4])  # of 5, 1, 3 and 6 tokens
    batch = replace(
        batch,
        sampled_logprobs=-batch.mask * torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        truncated=torch.tensor([False, False, False, True]),
    )
    advantages = torch.tensor([0.0, 0.0, 0.7, 0.0])
    rewards = torch.tensor([1.0, 1.0, 0.4, 0.0])
    parts = {
        "brief": torch.tensor([0.5, 1.0, 0.75, 0.0]),
        "exact": torch.tensor([1.0, 1.0, 0.9, 0.0]),
    }
    assert batch_metrics(batch, rewards, parts, advantages, 2) == pytest.approx(
        {
            "reward": (1.0 + 1.0 + 0.4) / 4,
            "reward_brief": (0.5 + 1.0 + 0.75) / 4,
            "reward_exact": (1.0 + 1.0 + 0.9) / 4,
            "accuracy": 2 / 4,  # nearly exact is not exact
            "entropy": (1 + 2 + 3 + 4) / 4,
            "truncated": 1 / 4,
            "completion_length": (5 + 1 + 3 + 6) / 4,
            "frac_zero_std_groups": 1 / 2,
        }
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_rate_1e_7_training_moves_the_policy_alone(tiny, dtype):
    name = str(dtype).removeprefix("torch.")
    config = short_config("", batch_size=4, learning_rate=1e-7, dtype=name)
    task, learner = train_grpo.set_up(config)
    for _ in range(3):
        train_iteration(task, learner, config)
    trained, frozen = (p.state_dict() for p in (learner.policy, learner.reference))
    for name, weight in tiny[0].named_parameters():
        assert torch.equal(frozen[name], weight.to(dtype)), name
        assert trained[name].dtype == torch.float32
        moved = trained[name] - weight
        assert (moved != 0).float().mean() > 0.5 and moved.abs().max() < 1e-5, name


@pytest.mark.parametrize(
    "schedule, expected", [("constant", [1.0] * 4), ("linear", [1.0, 0.75, 0.5, 0.25])]
)
def test_the_rate_is_constant_or_falls_linearly(monkeypatch, tmp_path, schedule, expected):
    rates = []

    def spy(task, learner, config):
        rates.extend(g["lr"] / config.learning_rate for g in learner.optimizer.param_groups)
        return train_iteration(task, learner, config)

    monkeypatch.setattr(train_grpo, "train_iteration", spy)
    finish(tmp_path, "--num_iterations", 4, "--lr_schedule", schedule)
    assert rates == expected


def test_a_warm_up_takes_a_twentieth_of_the_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    config, rates = Config(learning_rate=2.0, lr_schedule="warmup", num_iterations=200), []
    for iteration in range(200):
        set_learning_rate(optimizer, config, iteration)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:9] == pytest.approx([0.2 * n for n in range(1, 10)])
    assert rates[9:] == pytest.approx([0.01 * n for n in range(191, 0, -1)])


@BOTH
def test_without_any_advantage_the_gradient_is_zero_not_absent(kind):
    policy = kind(small_model("llama"))
    recorder, config = Recorder(policy), Config(beta=0, num_inner_updates=1)
    metrics = update(policy, policy, recorder, make_batch(), torch.zeros(8), config)
    assert metrics["grad_norm"] == 0 and metrics["skipped_updates"] == 0
    assert not any(gradient.any() for gradient in recorder.gradients.values())


def test_advantages_are_scaled_as_the_setting_says(tiny, monkeypatch):
    found = []

    def keep(learner, batch, advantages, config) -> dict:
        found.append(advantages)
        return {}

    monkeypatch.setattr(train_grpo, "update_policy", keep)
    for scale in ("none", "group"):
        config = short_config("", batch_size=4, scale_rewards=scale)
        train_iteration(*fresh(tiny, config), config)
    # Advantages without scaling are rewards up to a constant per group.
    torch.testing.assert_close(found[1], group_advantages(found[0], 4))
    assert found[0].any() and not torch.equal(*found)


class Breaker(Recorder):
    """An optimizer whose step ruins the weights: all later gradients are NaN."""

    def step(self) -> None:
        self.policy.model.get_output_embeddings().weight.data.fill_(torch.nan)


def test_metrics_are_means_over_the_updates_that_were_taken():
    found = []
    for updates in (1, 3):
        policy = Policy(small_model("llama"))
        config = Config(num_inner_updates=updates)
        inputs = policy, nearby(policy), Breaker(policy), make_batch(), ADVANTAGES
        found.append(update(*inputs, config))
    assert [metrics.pop("skipped_updates") for metrics in found] == [0, 2]
    assert found[0] == found[1]


def test_as_many_answers_as_completions_are_asked_for():
    with pytest.raises(ValueError):
        reward_function(["<answer>7</answer>"] * 2, [7], RewardFile())
