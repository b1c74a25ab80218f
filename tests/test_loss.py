"""The loss and its variants: equal to TRL's, and to the formulas written in loops over floats."""

import math
from collections import defaultdict
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from train_grpo import Config, grpo_loss, loss_length

LENGTHS = (1, 7, 4, 7, 2, 5, 7, 3)
# New over old: below, inside and above 0.8 .. 1.2 and 0.8 .. 1.28, and where nothing has moved.
RATIOS = (0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0)
TRL_SETTINGS = [
    {"loss_type": loss_type, "epsilon": epsilon, "epsilon_high": high}
    for loss_type in ("grpo", "dr_grpo", "dapo")
    for epsilon, high in ((0.2, 0), (0.2, 0.28), (0.05, 0))
]
TRL_SETTINGS += [
    {"importance_level": "sequence"},
    {"importance_level": "sequence", "epsilon_high": 0.28},
    {"loss_type": "cispo"},
    {"loss_type": "cispo", "epsilon_high": 0.5},
    {"loss_type": "cispo", "kl_correction": True},
    {"kl_correction": True},
]


def make_case(left_out=()) -> dict[str, torch.Tensor]:
    """Float64 inputs in which every ratio meets advantages of both signs, and 0.

    The completions that are `left_out` do not count in the loss.
    """
    generator = torch.Generator().manual_seed(0)
    rows, steps = len(LENGTHS), max(LENGTHS)
    logprobs = -3 * torch.rand(rows, steps, generator=generator, dtype=torch.float64) - 0.1
    ratio = torch.tensor([[RATIOS[(r + t) % 7] for t in range(steps)] for r in range(rows)])
    noise = torch.randn(rows, steps, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([0 if r in left_out else LENGTHS[r] for r in range(rows)])
    return {
        "logprobs": logprobs.clone().requires_grad_(),
        "old_logprobs": logprobs - ratio.double().log(),
        "ref_logprobs": logprobs + noise,
        "advantages": torch.tensor([1.3, -0.7, 0.9, -1.1, -0.4, 0.0, 2.0, 0.5]).double(),
        "mask": (torch.arange(steps) < lengths[:, None]).double(),
    }


def our_loss(case: dict, config: Config) -> tuple[torch.Tensor, dict]:
    return grpo_loss(**case, config=config, length=loss_length(case["mask"], config))


def trl_loss(case: dict, config: Config) -> torch.Tensor:
    """GRPOTrainer._compute_loss of these very log-probabilities: no model, no set-up."""
    module = pytest.importorskip(
        "trl.trainer.grpo_trainer",
        reason="TRL is absent; requirements-dev.txt names it",
        exc_type=ImportError,
    )
    logprobs = case["logprobs"]
    ids, entropies = torch.zeros(logprobs.shape, dtype=torch.long), torch.zeros_like(logprobs)
    single = {"gather": lambda x: x, "reduce": lambda x, reduction: x, "num_processes": 1}
    trainer = SimpleNamespace(
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(**single),
        args=SimpleNamespace(use_bias_correction_kl=config.kl_correction, delta=None),
        aux_loss_enabled=False,
        beta=config.beta,
        # TRL's bound for CISPO is on the ratio itself, ours on its distance from 1.
        epsilon_high=(config.loss_type == "cispo") + (config.epsilon_high or config.epsilon),
        epsilon_low=config.epsilon,
        importance_sampling_level=config.importance_level,
        loss_type=config.loss_type,
        max_completion_length=config.max_new_tokens,
        model=SimpleNamespace(training=False),  # so without the factors of accumulation
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": case["mask"],
        "advantages": case["advantages"],
        "old_per_token_logps": case["old_logprobs"],
        "ref_per_token_logps": case["ref_logprobs"],
        "num_items_in_batch": case["mask"].sum(),
    }
    return module.GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("left_out", [[], [1, 4], list(range(8))], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("settings", TRL_SETTINGS, ids=str)
def test_loss_and_gradient_equal_those_of_trl(settings, beta, left_out):
    case, config = make_case(left_out), Config(kl_estimator="k3", beta=beta, **settings)
    loss, its_loss = our_loss(case, config)[0], trl_loss(case, config)
    torch.testing.assert_close(loss, its_loss, rtol=1e-6, atol=0)
    gradient, its = (torch.autograd.grad(x, case["logprobs"])[0] for x in (loss, its_loss))
    torch.testing.assert_close(gradient, its, rtol=1e-6, atol=1e-12)
    assert gradient.abs().max() > 0.005 or len(left_out) == 8


def equation_3(case: dict, config: Config) -> tuple[list[list[float]], dict[str, float]]:
    """Gradient in each log-probability, and metrics, one float at a time.

    With the variants: Dr. GRPO's constant, DAPO's mean over all tokens and its upper bound, GSPO's
    ratio of a completion, CISPO's bounded weights, the corrected KL term.
    """
    new, old, ref = (case[n].tolist() for n in ("logprobs", "old_logprobs", "ref_logprobs"))
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    rows, steps = case["mask"].shape
    loss, gradient, clip_fractions = 0.0, [[0.0] * steps for _ in range(rows)], []
    for i, advantage in enumerate(case["advantages"].tolist()):
        length, held = LENGTHS[i], []
        divisors = {"grpo": length * rows, "dr_grpo": config.max_new_tokens * rows}
        weight = 1 / divisors.get(config.loss_type, sum(LENGTHS))  # of a token in the loss
        logs = [new[i][t] - old[i][t] for t in range(length)]
        for t in range(length):
            own = math.exp(logs[t])
            ratio = math.exp(fmean(logs)) if config.importance_level == "sequence" else own
            # The slope of a sequence's ratio is 1 / length of it in each of its tokens' terms.
            surrogate = policy_slope = advantage * ratio
            if config.loss_type == "cispo":
                held.append(ratio > high and advantage != 0)
                policy_slope = advantage * min(ratio, high)
                surrogate = policy_slope * new[i][t]
            else:
                held.append(ratio > high if advantage > 0 else advantage < 0 and ratio < low)
                if held[-1]:
                    surrogate, policy_slope = advantage * min(max(ratio, low), high), 0.0
            d = ref[i][t] - new[i][t]
            penalty, slope = math.exp(d) - d - 1, 1 - math.exp(d)
            if config.kl_estimator == "k3_inverse":
                penalty, slope = math.exp(-d) + d - 1, math.exp(-d) - 1
            if config.kl_correction:
                penalty, slope = own * penalty, own * (penalty + slope)
            loss += weight * (config.beta * penalty - surrogate)
            gradient[i][t] = weight * (config.beta * slope - policy_slope)
        clip_fractions.append(fmean(held))
    return gradient, {"loss": loss, "clip_fraction": fmean(clip_fractions)}


@pytest.mark.parametrize("kl_correction", [False, True])
@pytest.mark.parametrize(("level", "epsilon"), [("token", 0.2), ("sequence", 0.02)])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("epsilon_high", [0, 0.28])
@pytest.mark.parametrize("estimator", ["k3", "k3_inverse"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_gradient_and_metrics_equal_equation_3_in_loops(
    beta, estimator, epsilon_high, loss_type, level, epsilon, kl_correction
):
    settings = {"kl_estimator": estimator, "kl_correction": kl_correction, "loss_type": loss_type}
    settings |= {"importance_level": level, "epsilon": epsilon, "epsilon_high": epsilon_high}
    case, config = make_case(), Config(beta=beta, **settings)
    expected_gradient, expected = equation_3(case, config)
    if not beta:
        case["ref_logprobs"] = None  # nothing is to be read from it
    loss, stats = our_loss(case, config)
    [gradient] = torch.autograd.grad(loss, case["logprobs"])
    expected_gradient = torch.tensor(expected_gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert stats == pytest.approx(expected, rel=1e-6)
    # The mean over a completion's tokens stays below 1.28.
    assert stats["clip_fraction"] > 0 or (epsilon_high and level == "sequence")
