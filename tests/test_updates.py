"""The inner updates: what they compute, what they move, and what stays where it was."""

import copy
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from conftest import TINY
from short_runs import make_learner, make_task, saved_weights, short_config, short_training
from small_models import (
    Numbers,
    Recorder,
    assert_same_gradients,
    left_padded,
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
    Arithmetic,
    Config,
    Learner,
    Task,
    group_advantages,
    reward_function,
    rollout,
    train_iteration,
)

PROMPTS = [random_ids(length, seed=length) for length in (4, 9)]
LENGTHS = (5, 1, 3, 6, 2, 6, 4, 1)
COMPLETIONS = [random_ids(length, seed=50 + i) for i, length in enumerate(LENGTHS)]
ADVANTAGES = torch.tensor([1.2, -0.9, -0.3, 0.8, 0.5, -1.3, 0.0, 0.7])
BOTH = pytest.mark.parametrize("kind", [Policy, TreePolicy])


@pytest.fixture(autouse=True)
def always_a_tree(monkeypatch):
    """Random completions share little; without this their passes would take the plain path."""
    monkeypatch.setattr("engine.tree.MAX_SHARE", 1.0)


def make_batch() -> Rollout:
    return ragged_batch(PROMPTS, COMPLETIONS)


def plain_logprobs(model) -> list[torch.Tensor]:
    """Log-probabilities of each completion, from a forward of its own."""
    rows = unpadded_logprobs(model, make_batch())
    return [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]


@BOTH
def test_first_inner_update_has_the_gradient_of_reinforce(kind):
    policy = kind(small_model("gemma2"))
    config = Config(num_inner_updates=1, beta=0, clip_grad_norm=1e9)
    recorder = Recorder(policy)
    update(policy, nearby(policy), recorder, make_batch(), ADVANTAGES, config)
    # REINFORCE: the gradient of log pi, weighted by the advantage, averaged over tokens and rows.
    scores = plain_logprobs(policy.model)
    gain = torch.stack([a * s.mean() for a, s in zip(ADVANTAGES, scores, strict=True)]).mean()
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    for name, gradient in zip(names, torch.autograd.grad(-gain, parameters), strict=True):
        assert (recorder.gradients[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
def test_first_inner_update_clips_nothing_even_at_epsilon_zero(micro_batch_size):
    policy = Policy(small_model("llama"))
    config = Config(num_inner_updates=1, epsilon=0, micro_batch_size=micro_batch_size)
    inputs = policy, nearby(policy), Recorder(policy), make_batch(), ADVANTAGES
    metrics = update(*inputs, config)
    assert metrics["clip_fraction"] == 0
    assert metrics["kl"] > 0  # against a reference from which it has strayed


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


def plain_updates(policy: Policy, reference: Policy, config: Config, rate: float):
    """GRPO with plain gradient descent, one whole sequence at a time. Returns (model, metrics)."""
    model = copy.deepcopy(policy.model)
    old = [score.detach() for score in plain_logprobs(model)]
    ref = [score.detach() for score in plain_logprobs(reference.model)]
    updates = []
    for _ in range(config.num_inner_updates):
        losses, kls, penalties, held = [], [], [], []
        for i, score in enumerate(plain_logprobs(model)):
            ratio, advantage = torch.exp(score - old[i]), ADVANTAGES[i]
            inside = (ratio > 1 - config.epsilon) & (ratio < 1 + config.epsilon)
            edge = 1 + config.epsilon if advantage > 0 else 1 - config.epsilon
            beyond = ~inside & ((ratio > 1) == (advantage > 0)) & (advantage != 0)
            surrogate = torch.where(beyond, torch.tensor(edge), ratio) * advantage
            strayed = torch.exp(score - ref[i])  # pi_theta / pi_ref
            penalty = strayed - 1 - torch.log(strayed)
            losses.append((config.beta * penalty - surrogate).mean())
            penalties.append(penalty.mean().item())
            kls.append((1 / strayed - 1 + torch.log(strayed)).mean().item())
            held.append(beyond.float().mean().item())
        loss = torch.stack(losses).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = sum(g.square().sum() for g in gradients).sqrt().item()
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient * min(1, config.clip_grad_norm / norm)
        updates.append((loss.item(), fmean(held), norm, fmean(kls), fmean(penalties)))
    loss, clip_fraction, norm = (fmean(u[i] for u in updates) for i in range(3))
    metrics = {"loss": loss, "clip_fraction": clip_fraction, "grad_norm": norm}
    metrics |= {"kl": updates[0][3], "kl_penalty": updates[0][4], "kl_tokens": sum(LENGTHS)}
    return model, metrics


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("clip_grad_norm", [0.5, 1e9])
@BOTH
def test_all_inner_updates_equal_a_plain_loop(kind, clip_grad_norm, micro_batch_size):
    policy = kind(small_model("llama"))
    start, reference, rate = copy.deepcopy(policy.model), nearby(policy), 0.05
    config = Config(
        num_inner_updates=4,
        beta=0.3,
        clip_grad_norm=clip_grad_norm,
        micro_batch_size=micro_batch_size,
    )
    model, expected = plain_updates(policy, reference, config, rate)
    optimizer = torch.optim.SGD(policy.parameters(), rate)
    metrics = update(policy, reference, optimizer, make_batch(), ADVANTAGES, config)
    del metrics["logprob_mismatch"]  # this batch was never sampled
    assert metrics.pop("skipped_updates") == 0
    assert metrics == pytest.approx(expected, rel=1e-3)
    assert metrics["clip_fraction"] > 0 and metrics["grad_norm"] > 0.5
    for before, mine, its in zip(
        start.parameters(), policy.parameters(), model.parameters(), strict=True
    ):
        assert (mine - its).norm() <= 1e-3 * (its - before).norm()


@pytest.mark.parametrize(("masked", "expected"), [(False, 0.5), (True, 0.0)])
@BOTH
def test_logprob_mismatch_shows_a_wrong_record_before_the_end(kind, masked, expected):
    policy, generator = kind(small_model("llama", eos_ids=list(range(2, 12)))), torch.Generator()
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 4, 6, generator.manual_seed(1))
    row, token = ((batch.mask == 0) == masked).nonzero()[-1].tolist()
    if masked:
        batch.completion_ids[row, token] += 1
    else:
        batch.sampled_logprobs[row, token] += 0.5
    config = Config(num_inner_updates=2, micro_batch_size=3)
    metrics = update(policy, policy, Recorder(policy), batch, ADVANTAGES, config)
    assert metrics["logprob_mismatch"] == pytest.approx(expected, abs=1e-4)


def test_each_completion_is_scored_against_its_own_answer(tiny, monkeypatch):
    config = short_config("", batch_size=3)
    asked, scored = [], []

    def spy_rollout(*arguments):
        batch = rollout(*arguments)
        asked.extend(tiny[1].batch_decode(batch.prompt_ids))
        return batch

    def spy_reward(texts, answers, rewards):
        scored.extend(answers)
        return reward_function(texts, answers, rewards)

    monkeypatch.setattr(train_grpo, "rollout", spy_rollout)
    monkeypatch.setattr(train_grpo, "reward_function", spy_reward)
    train_iteration(*fresh(tiny, config), config)
    problems = Arithmetic(0, 10).draw(3, random.Random(0))
    assert len({problem.answer for problem in problems}) == 3
    assert scored == [problem.answer for problem in problems for _ in range(4)]
    for chat, problem in zip(asked, (p for p in problems for _ in range(4)), strict=True):
        assert problem.question in chat


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


def test_training_moves_the_policy_and_never_the_reference(monkeypatch, tmp_path):
    seen, real_iteration = [], train_grpo.train_iteration

    def spy(task, learner, config):
        seen.append(learner.reference)
        return real_iteration(task, learner, config)

    monkeypatch.setattr(train_grpo, "train_iteration", spy)
    _, trained = short_training(tmp_path)
    base = saved_weights(TINY)
    assert len(seen) == 3 and all(reference is seen[0] for reference in seen)
    frozen = seen[0].model.state_dict()
    assert base.keys() <= trained.keys() == frozen.keys()
    for name, weight in base.items():
        assert torch.equal(frozen[name], weight), name
        assert not torch.equal(trained[name], weight), name


@pytest.mark.parametrize(
    "schedule, expected", [("constant", [1.0] * 4), ("linear", [1.0, 0.75, 0.5, 0.25])]
)
def test_the_rate_is_constant_or_falls_linearly(monkeypatch, tmp_path, schedule, expected):
    rates, real_iteration = [], train_grpo.train_iteration

    def spy(task, learner, config):
        rates.append(
            [group["lr"] / config.learning_rate for group in learner.optimizer.param_groups]
        )
        return real_iteration(task, learner, config)

    monkeypatch.setattr(train_grpo, "train_iteration", spy)
    short_training(tmp_path, lr_schedule=schedule, num_iterations=4)
    assert rates == [[share] for share in expected]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_rate_1e_7_the_policy_still_moves(tmp_path, dtype):
    _, trained = short_training(tmp_path, learning_rate=1e-7, dtype=dtype, batch_size=4)
    for name, weight in saved_weights(TINY).items():
        assert trained[name].dtype == torch.float32
        assert (trained[name] != weight).float().mean() > 0.5, name
        assert (trained[name] - weight).abs().max() < 1e-5


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo"])
@BOTH
def test_tokens_weigh_the_same_in_any_micro_batch(kind, loss_type, micro_batch_size):
    policy, longest = kind(small_model("llama")), 11
    reference, recorder = nearby(policy), Recorder(policy)
    config = Config(
        num_inner_updates=1,
        beta=0.3,
        clip_grad_norm=1e9,
        loss_type=loss_type,
        max_new_tokens=longest,
        micro_batch_size=micro_batch_size,
    )
    metrics = update(policy, reference, recorder, make_batch(), ADVANTAGES, config)
    losses, scores, refs = [], plain_logprobs(policy.model), plain_logprobs(reference.model)
    for advantage, score, ref in zip(ADVANTAGES, scores, refs, strict=True):
        d = score - ref.detach()
        losses.append(config.beta * (d.exp() - d - 1) - (score - score.detach()).exp() * advantage)
    tokens = {"dr_grpo": longest * len(LENGTHS), "dapo": sum(LENGTHS)}[loss_type]
    loss = torch.cat(losses).sum() / tokens
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert_same_gradients(recorder.gradients, expected)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)


FEW = torch.tensor([0.0, -0.9, 0.0, 0.0, 0.5, 0.0, 0.0, 0.7])  # of both groups


@pytest.mark.parametrize("micro_batch_size", [0, 1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
@BOTH
def test_at_beta_zero_only_completions_with_an_advantage_are_read(
    kind, loss_type, micro_batch_size
):
    policy, seen = kind(small_model("llama").double()), []
    reference, recorder = nearby(policy), Recorder(policy)
    policy.register_forward_pre_hook(lambda policy, inputs: seen.append(len(inputs[0])))
    settings = {"loss_type": loss_type, "micro_batch_size": micro_batch_size, "beta": 0.0}
    config = Config(num_inner_updates=1, clip_grad_norm=1e9, **settings)
    metrics = update(policy, reference, recorder, make_batch(), FEW, config)
    assert sum(seen) == 3
    # All completions count where the loss is averaged, with advantage 0 too.
    lengths = torch.tensor(LENGTHS)
    divisor = {"grpo": 8 * lengths, "dr_grpo": 8 * config.max_new_tokens, "dapo": lengths.sum()}
    weights = FEW / divisor[loss_type]
    sums = torch.stack([score.sum() for score in plain_logprobs(policy.model)])
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    expected = torch.autograd.grad(-(weights * sums).sum(), parameters)
    for name, gradient in zip(names, expected, strict=True):
        assert (recorder.gradients[name] - gradient).norm() <= 1e-6 * gradient.norm(), name
    assert metrics["loss"] == pytest.approx(-(weights * lengths).sum().item(), rel=1e-6)


@BOTH
def test_at_beta_zero_no_pass_reads_what_the_loss_leaves_out(kind):
    policy, seen = kind(small_model("llama")), []
    reference = nearby(policy)
    policy.register_forward_pre_hook(lambda policy, inputs: seen.append(len(inputs[0])))
    batch = replace(make_batch(), truncated=torch.arange(8) == 4)
    config = Config(num_inner_updates=1, beta=0, mask_truncated=True)
    update(policy, reference, Recorder(policy), batch, FEW, config)
    assert sum(seen) == 2


@BOTH
def test_at_beta_zero_kl_is_read_on_the_first_group_as_sampled(kind):
    policy, batch = kind(small_model("llama")), make_batch()
    reference, sizes = nearby(policy), []
    reference.register_forward_pre_hook(lambda policy, inputs: sizes.append(len(inputs[0])))
    config = Config(beta=0, num_generations=4, micro_batch_size=1)
    recorded = batch.mask * -torch.rand(batch.mask.shape, generator=torch.manual_seed(0))
    batch = replace(batch, sampled_logprobs=recorded)
    metrics = update(policy, reference, Recorder(policy), batch, ADVANTAGES, config)
    means = {"kl": [], "kl_penalty": []}
    for ours, theirs in list(zip(recorded, plain_logprobs(reference.model), strict=True))[:4]:
        d = theirs - ours[: len(theirs)]
        means["kl"].append((d.exp() - d - 1).mean().item())
        means["kl_penalty"].append(((-d).exp() + d - 1).mean().item())
    for name, values in means.items():
        assert metrics[name] == pytest.approx(fmean(values), rel=1e-4)
    assert metrics["kl_tokens"] == sum(LENGTHS[:4]) and sizes == [1] * 4


@BOTH
def test_without_any_advantage_adam_takes_its_step_with_gradient_zero(kind):
    policy = kind(small_model("llama"))
    expected = copy.deepcopy(policy)
    optimizers = [torch.optim.AdamW(p.parameters(), 1e-3) for p in (policy, expected)]
    inputs = optimizers[0], make_batch()
    config = Config(beta=0, num_inner_updates=1)
    update(policy, policy, *inputs, ADVANTAGES, config)
    update(expected, expected, optimizers[1], make_batch(), ADVANTAGES, config)
    metrics = update(policy, policy, *inputs, torch.zeros(8), config)
    for parameter in expected.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[1].step()
    assert metrics["grad_norm"] == 0 and metrics["skipped_updates"] == 0
    for mine, its in zip(policy.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@BOTH
def test_truncated_completions_teach_nothing_if_masked(kind, loss_type, micro_batch_size):
    policy = kind(small_model("llama"))
    recorder = Recorder(policy)
    truncated = torch.tensor([False, True, False, True, False, False, False, True])
    settings = {"loss_type": loss_type, "micro_batch_size": micro_batch_size}
    config = Config(
        num_inner_updates=1, beta=0.3, clip_grad_norm=1e9, mask_truncated=True, **settings
    )
    batch, reference = replace(make_batch(), truncated=truncated), nearby(policy)
    update(policy, reference, recorder, batch, ADVANTAGES, config)
    kept = [i for i in range(8) if not truncated[i]]
    scores, refs = plain_logprobs(policy.model), plain_logprobs(reference.model)
    loss = 0.0
    for i in kept:
        d = scores[i] - refs[i].detach()
        gain = (scores[i] - scores[i].detach()).exp() * ADVANTAGES[i]
        divisor = {"grpo": 8 * LENGTHS[i], "dapo": sum(LENGTHS[k] for k in kept)}[loss_type]
        loss = loss + (config.beta * (d.exp() - d - 1) - gain).sum() / divisor
    names, parameters = zip(*policy.model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    assert_same_gradients(recorder.gradients, expected)


@BOTH
def test_at_beta_zero_the_reference_is_logged_and_not_felt(kind):
    policy, config = kind(small_model("llama")), Config(num_inner_updates=1, beta=0)
    with torch.no_grad():
        batch = replace(make_batch(), sampled_logprobs=policy(make_batch()))
    found = []
    for reference in (policy, nearby(policy)):
        recorder = Recorder(policy)
        metrics = update(policy, reference, recorder, batch, ADVANTAGES, config)
        found.append((metrics, recorder.gradients))
    (at_home, expected), (strayed, gradients) = found
    assert at_home["kl"] == pytest.approx(0, abs=1e-9)
    assert strayed["kl"] > 1e-6 and strayed["kl_penalty"] > 1e-6
    assert strayed["loss"] == at_home["loss"] and strayed["grad_norm"] == at_home["grad_norm"] > 0
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_advantages_are_scaled_as_the_setting_says(tiny, monkeypatch):
    found = {}

    def spy(learner, batch, advantages, config):
        found[config.scale_rewards] = advantages
        return {}

    monkeypatch.setattr(train_grpo, "update_policy", spy)
    for scale in ("group", "none"):
        config = short_config("", batch_size=4, scale_rewards=scale)
        train_iteration(*fresh(tiny, config), config)
    assert found["none"].abs().max() > 0
    # Advantages without scaling are rewards up to a constant per group.
    torch.testing.assert_close(found["group"], group_advantages(found["none"], 4))
    assert not torch.equal(found["group"], found["none"])


@pytest.mark.parametrize("beta", [0, 0.3])
@BOTH
def test_an_update_reads_micro_batches_of_the_size_asked_for(kind, beta):
    policy, sizes = kind(small_model("llama")), []
    reference = nearby(policy)
    policy.register_forward_pre_hook(lambda policy, inputs: sizes.append(len(inputs[0])))
    config = Config(num_inner_updates=2, micro_batch_size=3, beta=beta)
    update(policy, reference, Recorder(policy), make_batch(), torch.ones(8), config)
    assert sizes == [3, 3, 2] * 2


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
