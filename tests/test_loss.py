"""The loss and its variants: equal to TRL's, and to the formulas written in loops over floats."""

import math
from collections import defaultdict
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from train_grpo import Config, grpo_loss, loss_length, loss_mask

LENGTHS = (1, 7, 4, 7, 2, 5, 7, 3)
# New over old: below, inside and above 0.8 .. 1.2 and 0.8 .. 1.28, and where nothing has moved.
RATIOS = (0.5, 0.79, 0.9, 1.0, 1.1, 1.21, 2.0)
LOSS_TYPES = ("grpo", "dr_grpo", "dapo")
VARIANTS = {
    "GSPO": {"importance_level": "sequence"},
    "GSPO, clip-higher": {"importance_level": "sequence", "epsilon_high": 0.28},
    "CISPO": {"loss_type": "cispo"},
    "CISPO, its bound higher": {"loss_type": "cispo", "epsilon_high": 0.5},
    "corrected KL": {"kl_correction": True},
    "CISPO, corrected KL": {"loss_type": "cispo", "kl_correction": True},
}


def make_case() -> dict[str, torch.Tensor]:
    """Float64 inputs in which every ratio meets advantages of both signs, and 0."""
    generator = torch.Generator().manual_seed(0)
    rows, steps = len(LENGTHS), max(LENGTHS)
    logprobs = -3 * torch.rand(rows, steps, generator=generator, dtype=torch.float64) - 0.1
    ratio = torch.tensor([[RATIOS[(r + t) % 7] for t in range(steps)] for r in range(rows)])
    noise = torch.randn(rows, steps, generator=generator, dtype=torch.float64)
    case = {
        "logprobs": logprobs,
        "old_logprobs": logprobs - ratio.double().log(),
        "ref_logprobs": logprobs + noise,
        "advantages": torch.tensor([1.3, -0.7, 0.9, -1.1, -0.4, 0.0, 2.0, 0.5]).double(),
        "mask": torch.tensor([[float(t < n) for t in range(steps)] for n in LENGTHS]).double(),
    }
    met = {
        (round(ratio[r, t].item(), 2), math.copysign(1, case["advantages"][r]))
        for r in range(rows)
        for t in range(LENGTHS[r])
    }
    assert met == {(x, sign) for x in RATIOS for sign in (1, -1)}
    return case


def loss_and_gradient(loss_of, case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a function of the log-probabilities, and its gradient in them."""
    logprobs = case["logprobs"].clone().requires_grad_(True)
    loss = loss_of(logprobs)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


def ours(case: dict, config: Config):
    def loss_of(logprobs):
        return grpo_loss(
            logprobs,
            case["old_logprobs"],
            case["ref_logprobs"],
            case["advantages"],
            case["mask"],
            config,
            loss_length(case["mask"], config),
        )[0]

    return loss_and_gradient(loss_of, case)


def trl_loss(case: dict, config: Config):
    """GRPOTrainer._compute_loss of these very log-probabilities: no model, no set-up."""
    trainer_module = pytest.importorskip(
        "trl.trainer.grpo_trainer",
        reason="TRL is absent; requirements-dev.txt names it",
        exc_type=ImportError,
    )

    def loss_of(logprobs):
        trainer = object.__new__(trainer_module.GRPOTrainer)
        vars(trainer).update(
            _get_per_token_logps_and_entropies=lambda *_, **__: (
                logprobs,
                torch.zeros_like(logprobs),
                None,
            ),
            _entropy_bonus_enabled=False,
            _metrics={"train": defaultdict(list)},
            accelerator=SimpleNamespace(
                gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1
            ),
            args=SimpleNamespace(
                use_bias_correction_kl=config.kl_correction, delta=None, steps_per_generation=1
            ),
            aux_loss_enabled=False,
            beta=config.beta,
            current_gradient_accumulation_steps=1,
            # TRL's bound for CISPO is on the ratio itself, ours on its distance from 1.
            epsilon_high=(config.loss_type == "cispo") + (config.epsilon_high or config.epsilon),
            epsilon_low=config.epsilon,
            importance_sampling_level=config.importance_level,
            loss_type=config.loss_type,
            max_completion_length=config.max_new_tokens,
            model=SimpleNamespace(training=True),
            off_policy_mask_threshold=None,
            top_entropy_quantile=1.0,
            use_vllm=False,
        )
        ids = torch.zeros(logprobs.shape, dtype=torch.long)
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
        return trainer._compute_loss(None, inputs)

    return loss_and_gradient(loss_of, case)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("epsilon", "epsilon_high"), [(0.2, 0), (0.2, 0.28), (0.05, 0)])
def test_loss_and_gradient_equal_those_of_trl(loss_type, beta, epsilon, epsilon_high):
    settings = {"loss_type": loss_type, "epsilon": epsilon, "epsilon_high": epsilon_high}
    case, config = make_case(), Config(kl_estimator="k3", beta=beta, **settings)
    (loss, gradient), (its_loss, its_gradient) = ours(case, config), trl_loss(case, config)
    torch.testing.assert_close(loss, its_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-6, atol=1e-12)
    assert gradient.abs().max() > 0.01


def without_completions(case: dict, rows: list[int]) -> dict:
    """The case with these rows left out of the loss."""
    mask = case["mask"].clone()
    mask[rows] = 0
    return case | {"mask": mask}


@pytest.mark.parametrize("left_out", [[], [1, 4], list(range(8))], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_of_variants_equal_those_of_trl(variant, beta, left_out):
    config = Config(kl_estimator="k3", beta=beta, **VARIANTS[variant])
    case = without_completions(make_case(), left_out)
    (loss, gradient), (its_loss, its_gradient) = ours(case, config), trl_loss(case, config)
    torch.testing.assert_close(loss, its_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-6, atol=1e-12)
    if len(left_out) == 8:
        assert loss == 0 and not gradient.any()
    else:
        assert gradient.abs().max() > 0.005
        plain, _ = ours(case, Config(kl_estimator="k3", beta=beta))
        assert abs(plain - loss) > 1e-6 or (beta == 0 and variant == "corrected KL")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_completions_left_out_of_the_loss_count_in_n_alone(loss_type):
    config = Config(kl_estimator="k3", beta=0.3, loss_type=loss_type)
    case = without_completions(make_case(), [1, 4])
    (loss, gradient), (its_loss, its_gradient) = ours(case, config), trl_loss(case, config)
    torch.testing.assert_close(loss, its_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, its_gradient, rtol=1e-6, atol=1e-12)
    assert not gradient[[1, 4]].any() and gradient[[0, 2, 3, 5, 6, 7]].any(dim=1).all()


def test_the_loss_mask_leaves_truncated_completions_out_if_asked():
    truncated = torch.tensor([False, True, False])
    batch = SimpleNamespace(mask=torch.ones(3, 2), truncated=truncated)
    assert torch.equal(loss_mask(batch, Config()), batch.mask)
    found = loss_mask(batch, Config(mask_truncated=True))
    assert found.tolist() == [[1, 1], [0, 0], [1, 1]]


def test_with_sequence_ratios_the_kl_term_is_corrected_by_each_tokens_own():
    case, settings = make_case(), {"importance_level": "sequence", "kl_estimator": "k3"}
    plain, corrected = (
        ours(case, Config(**settings, beta=1.0, kl_correction=c))[0] for c in (False, True)
    )
    surrogate = ours(case, Config(**settings, beta=0.0))[0]
    token, _ = ours(case, Config(kl_estimator="k3", beta=1.0, kl_correction=True))
    token_surrogate, _ = ours(case, Config(kl_estimator="k3", beta=0.0))
    torch.testing.assert_close(corrected - surrogate, token - token_surrogate)
    assert abs(corrected - plain) > 0.01


def test_clip_fraction_of_cispo_is_the_share_of_bounded_weights():
    case, config = make_case(), Config(loss_type="cispo", beta=0)
    _, stats = grpo_loss(**case, config=config, length=loss_length(case["mask"], config))
    shares = [fmean(RATIOS[(r + t) % 7] > 1.2 for t in range(n)) for r, n in enumerate(LENGTHS)]
    shares[5] = 0.0  # its advantage is 0
    assert stats["clip_fraction"].item() == pytest.approx(fmean(shares), rel=1e-6)


def equation_3(case: dict, config: Config) -> tuple[float, list[list[float]], dict]:
    """Loss, gradient in each log-probability and metrics, one float at a time.

    With the variants: Dr. GRPO's constant, DAPO's mean over all tokens and its upper bound, GSPO's
    ratio of a completion, CISPO's bounded weights, the corrected KL term.
    """
    new, old, ref = (case[n].tolist() for n in ("logprobs", "old_logprobs", "ref_logprobs"))
    rows, steps = case["mask"].shape
    low, high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)
    loss, gradient = 0.0, [[0.0] * steps for _ in range(rows)]
    means, cispo = defaultdict(list), config.loss_type == "cispo"
    for i, advantage in enumerate(case["advantages"].tolist()):
        length = LENGTHS[i]
        weight = {  # of a token in the loss
            "grpo": 1 / length / rows,
            "dr_grpo": 1 / config.max_new_tokens / rows,
            "dapo": 1 / sum(LENGTHS),
            "cispo": 1 / sum(LENGTHS),
        }[config.loss_type]
        parts = defaultdict(list)
        logs = [new[i][t] - old[i][t] for t in range(length)]
        for t in range(length):
            ratio = own = math.exp(logs[t])
            if config.importance_level == "sequence":  # each token's share in it is 1 / length
                ratio = math.exp(fmean(logs))
            held = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
            surrogate = advantage * (min(max(ratio, low), high) if held else ratio)
            d = ref[i][t] - new[i][t]
            k3, inverse = math.exp(d) - d - 1, math.exp(-d) + d - 1
            published = config.kl_estimator == "k3"
            penalty, slope = (k3, 1 - math.exp(d)) if published else (inverse, math.exp(-d) - 1)
            policy_slope = 0.0 if held else advantage * ratio
            if cispo:
                held = ratio > high and advantage != 0
                policy_slope = advantage * min(ratio, high)
                surrogate = policy_slope * new[i][t]
            if config.kl_correction:
                penalty, slope = own * penalty, own * (penalty + slope)
            loss += weight * (config.beta * penalty - surrogate)
            parts["clip_fraction"].append(float(held))
            gradient[i][t] = weight * (config.beta * slope - policy_slope)
        for name, values in parts.items():
            means[name].append(fmean(values))
    return loss, gradient, {name: fmean(values) for name, values in means.items()} | {"loss": loss}


@pytest.mark.parametrize(
    "variant",
    [{}, {"kl_correction": True}, {"importance_level": "sequence", "epsilon": 0.02}],
    ids=str,
)
@pytest.mark.parametrize("loss_type", [*LOSS_TYPES, "cispo"])
@pytest.mark.parametrize("epsilon_high", [0, 0.28])
@pytest.mark.parametrize("estimator", ["k3", "k3_inverse"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_gradient_and_metrics_equal_equation_3_in_loops(
    beta, estimator, epsilon_high, loss_type, variant
):
    settings = {"loss_type": loss_type, "epsilon_high": epsilon_high, **variant}
    case, config = make_case(), Config(kl_estimator=estimator, beta=beta, **settings)
    expected_loss, expected_gradient, expected_stats = equation_3(case, config)
    loss, gradient = ours(case, config)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
    expected_gradient = torch.tensor(expected_gradient, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    if not beta:
        case["ref_logprobs"] = None  # nothing is to be read from it
    _, stats = grpo_loss(**case, config=config, length=loss_length(case["mask"], config))
    assert stats == pytest.approx(expected_stats, rel=1e-6)
    # The mean over a completion's tokens stays below 1.28.
    assert stats["clip_fraction"] > 0 or (epsilon_high and "importance_level" in variant)
