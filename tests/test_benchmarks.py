"""The benchmarks count what is computed, and compare like with like."""

import json
import math
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablation, roofline
from benchmarks.common import WORKS, Work, recorded_rollouts, start, worst_case, write_random_model
from benchmarks.operations import needed_passes
from engine.cli import UserError
from engine.models import encode_prompts, eos_token_ids
from engine.policy import Rollout
from train_grpo import parse_config, reward_function, train_iteration

# Fewer key heads than heads, and sizes that no two dimensions share.
SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 80,
}
WORK = WORKS["bundled"]


@pytest.mark.parametrize(
    "changes", [{}, {"max_new_tokens": 1}, {"num_inner_updates": 1}, {"batch_size": 1}], ids=str
)
def test_needed_matrix_products_are_those_pytorch_counts(changes, tmp_path):
    model = write_random_model(WORK.config.model_name, tmp_path / "model", **SHAPE)
    config = replace(WORK.config, model_name=model, num_generations=4, **changes)
    state = start(Work(config))
    with recorded_rollouts() as rollouts, FlopCounterMode(display=False) as counter:
        train_iteration(state, config)
    passes = needed_passes(state.policy.model.config, rollouts[0], config.num_inner_updates)
    every = sum(passes.values(), [])
    counts = counter.get_flop_counts()["Global"]
    attention = sum(each.attention for each in every)
    assert counts.pop(torch.ops.aten.mm) == sum(each.flops for each in every) - attention
    # Attention as computed covers all pairs of tokens; needed are ancestors only.
    assert counts.keys() == {torch.ops.aten.bmm} and 0 < attention < counts[torch.ops.aten.bmm]


def test_each_distinct_prefix_is_counted_once_per_pass():
    prompts = [(1, 2, 3)] * 3 + [(1, 4)] * 3
    completions = [(5, 6, 7), (5, 6, 8), (5,), (5, 6, 7), (9, 6), (5, 9, 7)]
    prompt_ids = torch.tensor([(0,) * (3 - len(p)) + p for p in prompts])
    ids = torch.tensor([c + (0,) * (3 - len(c)) for c in completions])
    mask = (ids > 0).float()
    batch = Rollout(prompt_ids, (prompt_ids > 0).long(), ids, mask, mask, mask[:, 0] > 1, [])
    whole = [(p + c)[:-1] for p, c in zip(prompts, completions, strict=True)]
    prefixes = {row[: i + 1] for row in whole for i in range(len(row))}
    predicting = {
        p + c[:i] for p, c in zip(prompts, completions, strict=True) for i in range(len(c))
    }

    sizes = {"hidden_size": 1, "num_hidden_layers": 1, "intermediate_size": 1, "head_dim": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 10}
    passes = needed_passes(SimpleNamespace(**sizes), batch, updates=2)
    assert [len(each) for each in passes.values()] == [3, 1, 2, 2]
    [reference], steps = passes["reference"], passes["rollout"]
    assert reference.products == {(len(prefixes), 1, 1): 7, (len(predicting), 1, 10): 1}
    assert reference.attention == 4 * sum(map(len, prefixes))
    read = [(4, 2), (3, 3), (3, 3)]  # nodes, and of how many the logits are needed
    assert [step.products for step in steps] == [{(n, 1, 1): 7, (k, 1, 10): 1} for n, k in read]
    assert sum(step.attention for step in steps) == reference.attention


def test_worst_case_has_full_length_and_shares_next_to_nothing(tmp_path):
    work = worst_case(WORK, tmp_path)
    with recorded_rollouts() as rollouts:
        train_iteration(start(work), work.config)
    [batch] = rollouts
    rows, length = len(batch), work.config.max_new_tokens
    assert batch.mask.eq(1).all() and batch.mask.shape == (rows, length)
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], dim=1).tolist()
    distinct = {tuple(row[: -length + i]) for row in ids for i in range(1, length)}
    assert len(distinct) > 0.95 * rows * (length - 1)


def test_roofline_repeats_one_iteration_and_misses_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "time_product", lambda *arguments: 1e-3)
    output = tmp_path / "roofline.json"
    with recorded_rollouts() as rollouts:
        assert roofline.main(["--iterations", "1", "--output", str(output)]) == 0
    first, second = rollouts
    assert first.completion_ids.equal(second.completion_ids) and first.texts == second.texts
    seconds = json.loads(output.read_text())["seconds"]
    total = seconds.pop("all")
    assert all(part > 0 for part in seconds.values())
    assert sum(seconds.values()) == pytest.approx(total, rel=1e-4)


def student_below(t: float, freedom: int) -> float:
    """The share of Student's t distribution below t >= 0, its density summed in small steps."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    step = t / 20_000
    middles = (step * (i + 0.5) for i in range(20_000))
    return 0.5 + step * sum(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2) for x in middles)


def test_the_interval_of_a_mean_is_students():
    for freedom, t in enumerate(ablation.T, start=1):
        assert student_below(t, freedom) == pytest.approx(0.975, abs=3e-5), freedom
    assert ablation.half_interval([0.0, 2.0]) == pytest.approx(12.706)
    # The variance of 1 to 5 is 10 / 4.
    expected = 2.776 * math.sqrt(2.5) / math.sqrt(5)
    assert ablation.half_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(expected)


def metrics_of(*greedy: float) -> dict:
    """A run of 30 iterations of half a second, with these accuracies at 0, 10, ..."""
    evaluations = [{"split": "test", "iteration": 0, "accuracies": {"greedy": {"accuracy": 1.0}}}]
    for i, accuracy in enumerate(greedy):
        accuracies = {"greedy": {"accuracy": accuracy}, "sampled": {"accuracy": 1.0}}
        evaluations.append({"split": "validation", "iteration": 10 * i, "accuracies": accuracies})
    return {"iterations": [{"seconds": 0.5}] * 30, "evaluations": evaluations, "seconds": 99.0}


def test_time_to_goal_ends_at_the_first_validation_that_reaches_it():
    goal = ablation.time_to_goal
    assert goal(metrics_of(0.5, 0.8999, 0.9, 0.95)) == {"iterations": 20, "seconds": 10.0}
    assert goal(metrics_of(0.5, 0.91, 0.7, 0.95)) == {"iterations": 10, "seconds": 5.0}
    assert goal(metrics_of(0.5, 0.6, 0.7, 0.8)) == {"iterations": None, "seconds": None}


def test_the_tables_pair_the_runs_by_seed():
    def runs(*values) -> dict:
        rest = {name: 0.25 for name in ablation.MEASURES}
        return {str(seed): {**rest, "iterations": value} for seed, value in enumerate(values)}

    results = {"A": runs(100, 120, None), "B": runs(90, 100, 80), "C": runs(None, None, 70)}
    means, paired = ablation.tables(results)
    cells = [[row.split("|")[i].strip() for i in (1, 2, 4)] for row in (*means[2:], *paired[2:])]
    same, none = "25.0 ± 0.0", "+0.0 ± 0.0"
    assert cells == [
        ["A", "110 ± 127 (2 of 3 runs)", same],
        ["B", "90 ± 25", same],
        ["C", "70 (1 of 3 runs)", same],
        ["B", "-15 ± 64 (2 of 3 runs)", none],
        ["C", "0 of 3 runs", none],
    ]
    assert paired[0].startswith("| minus A |")


def test_each_variant_changes_only_what_its_name_says():
    preset = asdict(parse_config(["--preset=tiny"]))
    changes = {
        label: asdict(parse_config(["--preset=tiny", *flags])).items() - preset.items()
        for label, flags in ablation.VARIANTS.items()
    }
    assert changes == {
        "GRPO": set(),
        "Dr. GRPO": {("loss_type", "dr_grpo"), ("scale_rewards", "none")},
        "DAPO's loss, clip-higher": {("loss_type", "dapo"), ("epsilon_high", 0.28)},
        "GRPO, beta 0": {("beta", 0.0)},
    }


def test_any_setting_can_be_varied():
    name, variants = ablation.read_vary("learning_rate=1e-5,2e-5")
    assert name == "learning_rate"
    assert variants == {f"learning_rate={x}": [f"--learning_rate={x}"] for x in ("1e-5", "2e-5")}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("learning_rat=1", "'learning_rat' is no setting"),
        ("seed=1,2", "'seed' is no setting of train_grpo.py that can be varied"),
        ("beta", "give the values too, as in --vary beta=A,B"),
        ("beta=", "give the values too"),
        ("beta=0,-1", "--beta -1.0: must be at least 0"),
        ("beta=0,much", "much"),
    ],
)
def test_what_cannot_be_varied_is_named(text, complaint):
    with pytest.raises(UserError) as error:
        ablation.read_vary(text)
    assert complaint in str(error.value)


def test_ablation_trains_each_variant_and_repeats_no_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "result.json"
    flags = ["--vary", "beta=0,0.04", "--seeds", "1", "--iterations", "2", "--eval_every", "1"]
    flags += ["--eval_problems", "4", "--output", str(output)]
    assert ablation.main([*flags, "--jobs", "2"]) == 0
    runs = json.loads(output.read_text())["runs"]
    assert list(runs) == ["beta=0", "beta=0.04"]
    for done in runs.values():
        assert list(done) == ["0"] and 0 <= done["0"]["greedy"] <= 1 and done["0"]["kl"] > 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out

    monkeypatch.setattr(ablation, "run", None)  # a run would fail
    assert ablation.main(flags) == 0
    again = capsys.readouterr().out
    assert "| minus beta=0 |" in again and first.endswith(again)
    with pytest.raises(UserError, match="holds runs with"):
        ablation.main([*flags, "--eval_problems", "5"])


@pytest.fixture(scope="module")
def asked() -> Work:
    """Natural completions, with worked examples in the prompt."""
    return replace(WORK, config=replace(WORK.config, num_examples=3))


@pytest.fixture(scope="module")
def trainer(asked):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    from benchmarks.turns import make_trainer

    return make_trainer(asked)


def test_trl_gets_the_same_prompts_in_the_same_order(asked, trainer):
    state, config = start(asked), asked.config
    rng, count = random.Random(config.seed), config.batch_size * config.num_generations
    batches = iter(trainer.get_train_dataloader())
    for _ in range(3):
        ours = state.problems.draw(config.batch_size, rng)
        questions = [p.question for p in ours for _ in range(config.num_generations)]
        ids, mask = encode_prompts(state.tokenizer, questions, state.prompt, "cpu")
        expected = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
        for _ in range(config.num_inner_updates):
            rows = next(batches)
            theirs, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
            assert len(rows) == count and theirs == expected
            answers = [p.answer for p in ours for _ in range(config.num_generations)]
            assert [row["answer"] for row in rows] == answers


def test_trl_gets_the_same_rewards_weights_and_settings(asked, trainer):
    state, config = start(asked), asked.config
    texts, answers = ["<answer>4</answer>", "<answer>3</answer>", "4", "<answer>"], [4, 4, 4, 4]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    rewards = trainer.reward_funcs[0](completions=completions, answer=answers)
    assert rewards == reward_function(texts, answers, state.rewards)[0].tolist()

    optimizer = trainer.create_optimizer()
    assert type(optimizer) is type(state.optimizer)
    for name in ("lr", "betas", "eps", "fused"):
        assert optimizer.param_groups[0][name] == state.optimizer.param_groups[0][name], name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0}
    models = (trainer.model, trainer.ref_model, state.policy.model, state.reference.model)
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    for one, other in zip(trainer.model.parameters(), state.policy.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert trainer.eos_token_ids == eos_token_ids(state.policy.model, state.tokenizer)
    assert trainer.max_completion_length == config.max_new_tokens
    assert trainer.num_iterations == config.num_inner_updates
    assert trainer.args.steps_per_generation == trainer.args.gradient_accumulation_steps == 1
    assert (trainer.beta, trainer.epsilon_low, trainer.epsilon_high) == (0.04, 0.2, 0.2)
    assert (trainer.loss_type, trainer.scale_rewards) == ("grpo", "group")


def test_no_end_token_can_be_sampled_in_endless_work(asked, trainer):
    from benchmarks.turns import make_trainer

    work = replace(asked, endless=True)
    vocabulary, state = trainer.model.config.vocab_size, start(work)
    assert min(make_trainer(work).eos_token_ids) >= vocabulary
    assert min(eos_token_ids(state.policy.model, state.tokenizer)) >= vocabulary


@pytest.mark.slow
def test_both_loops_start_from_the_same_accuracy(tmp_path):
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    output = tmp_path / "result.json"
    flags = ("--accuracy", "True", "--seconds", 1, "--rounds", 1, "--output", output)
    done = run_script("benchmarks/vs_trl.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    before = result["ours"][0]["accuracies"]
    assert before == result["trl"][0]["accuracies"] and before["sampled"]["accuracy"] > 0.3
    assert result["ours"][1]["iterations"] > 0 and result["trl"][1]["iterations"] > 0
    assert output.with_suffix(".png").exists()
