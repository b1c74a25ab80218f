"""The benchmarks count what is computed, and compare like with like."""

import json
import random
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import run_script
from small_models import sequences
from test_tree import prefixes
from torch.distributions import StudentT
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ablation, gpu, roofline
from benchmarks.common import WORKS, Work, recorded_rollouts, start, worst_case, write_random_model
from benchmarks.operations import needed_passes
from benchmarks.turns import make_trainer
from engine.files import UserError
from engine.models import eos_token_ids
from engine.policy import Rollout
from engine.presets import PRESETS, parse_config
from engine.prompt import encode_prompts
from train_grpo import Config, train_iteration

# Fewer key heads than heads, and sizes that no two dimensions share.
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
SHAPE = {"hidden_size": 54, "num_hidden_layers": 3, "intermediate_size": 80, **HEADS}
WORK = WORKS["bundled"]
ASKED = Work(replace(WORK.config, num_examples=3))


def read_prefixes(batch: Rollout) -> set[tuple[int, ...]]:
    """The distinct prefixes of a rollout's sequences; the last tokens are not read."""
    return prefixes((prompt + completion)[:-1] for prompt, completion in sequences(batch))


@pytest.mark.parametrize(
    "changes", [{}, {"max_new_tokens": 1}, {"num_inner_updates": 1}, {"batch_size": 1}], ids=str
)
def test_needed_operations_are_those_pytorch_counts(changes, tmp_path):
    model = write_random_model(WORK.config.model_name, tmp_path / "model", **SHAPE)
    config = replace(WORK.config, model_name=model, num_generations=4, **changes)
    task, learner = start(Work(config))
    with recorded_rollouts() as rollouts, FlopCounterMode(display=False) as counter:
        train_iteration(task, learner, config)
    [batch], counts = rollouts, counter.get_flop_counts()["Global"]
    passes = needed_passes(learner.policy.model.config, batch, config.num_inner_updates)
    every = sum(passes.values(), [])
    attention = sum(each.attention for each in every)
    assert counts.pop(torch.ops.aten.mm) == sum(each.flops for each in every) - attention
    # PyTorch computes attention between all pairs of tokens; needed are ancestors only.
    assert counts.keys() == {torch.ops.aten.bmm} and attention < counts[torch.ops.aten.bmm]
    forward = 4 * (6 * 8) * 3 * sum(map(len, read_prefixes(batch)))
    assert attention == (2 + 3 * config.num_inner_updates) * forward


def test_endless_work_samples_no_end_token_and_shares_nothing(tmp_path):
    work = worst_case(WORK, tmp_path)
    task, learner = start(work)
    model, length = learner.policy.model, work.config.max_new_tokens
    assert min(eos_token_ids(model, task.tokenizer)) >= model.config.vocab_size
    with recorded_rollouts() as rollouts:
        train_iteration(task, learner, work.config)
    [batch] = rollouts
    prompts = replace(batch, mask=torch.zeros_like(batch.mask))
    distinct = len(read_prefixes(batch)) - len(read_prefixes(prompts))
    assert batch.mask.shape == (96, length) and distinct > 0.95 * 96 * (length - 1)


def test_roofline_repeats_one_iteration(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "time_product", lambda *arguments: 1e-3)
    output = tmp_path / "roofline.json"
    with recorded_rollouts() as rollouts:
        assert roofline.main(["--iterations", "1", "--output", str(output)]) == 0
    assert rollouts[0].completion_ids.equal(rollouts[1].completion_ids)
    assert json.loads(output.read_text())["times_the_floor"].keys() == {"peak", "shapes"}


def test_gpu_times_tree_and_plain_and_skips_absent_models(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS["smollm2"], "model_name", str(tmp_path / "absent"))
    monkeypatch.setitem(PRESETS["tiny"], "num_generations", 2)
    output = tmp_path / "gpu.json"
    assert gpu.main(["--iterations", "1", "--device", "cpu", "--output", str(output)]) == 0
    assert f"skipped smollm2: there is no {tmp_path}/absent" in capsys.readouterr().out
    runs = json.loads(output.read_text())["runs"]
    assert [run["policy"] for run in runs] == ["tree", "plain"]
    for run in runs:
        assert sum(run["seconds"].values()) == pytest.approx(2 * run["seconds"]["all"], rel=1e-4)
        assert all(part > 0 for part in run["seconds"].values()) and run["memory_mib"] > 100
        assert 0 < run["logprob_mismatch"] < 0.5


def test_goal_is_reached_at_the_first_validation_there():
    evaluations, found = [], []
    for i, greedy in enumerate((0.5, 0.8999, 0.9, 0.95)):
        accuracies = {"greedy": {"accuracy": greedy}, "sampled": {"accuracy": 1.0}}
        evaluations.append({"split": "validation", "iteration": 10 * i, "accuracies": accuracies})
        found.append(ablation.iterations_to_goal({"evaluations": evaluations}))
    assert found == [None, None, 20, 20]


def test_tables_pair_runs_by_seed_with_intervals_of_students_t():
    rest, results = dict.fromkeys(ablation.MEASURES, 0.25), {}
    for label, row in {"A": (100, 120, None), "B": (90, 100, 80), "C": (None, None, 70)}.items():
        results[label] = {seed: {**rest, "iterations": n} for seed, n in enumerate(row)}
    means, paired = ablation.tables(results, ["iterations", "sampled", "kl"])
    assert paired[0].startswith("| minus A |")
    assert [row.split(" | ")[1] for row in (*means[2:], *paired[2:])] == [
        *("110 ± 127 (2 of 3 runs)", "90 ± 25", "70 (1 of 3 runs)"),
        *("-15 ± 64 (2 of 3 runs)", "0 of 3 runs"),
    ]
    assert means[2].endswith(" | 25.0 ± 0.0 | 0.250 ± 0.000 |")
    for freedom, t in enumerate(ablation.T, start=1):
        x = torch.linspace(0, t, 20_001, dtype=torch.float64)
        density = StudentT(torch.tensor(freedom, dtype=x.dtype)).log_prob(x).exp()
        assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=3e-5), freedom


@pytest.mark.parametrize("study", ablation.STUDIES)
def test_variants_differ_and_groups_of_any_size_share_512_completions(study):
    preset, *configs = (
        parse_config(Config, ["--preset=tiny", *flags])
        for flags in ([], *ablation.STUDIES[study].values())
    )
    assert all(one != other for one, other in combinations(configs, 2))
    assert study != "losses" or configs[0] == preset
    if study.startswith("group"):
        assert {config.batch_size * config.num_generations for config in configs} == {512}


@pytest.mark.parametrize(
    "text, complaint", [("seed=1,2", "no setting"), ("beta=", "values"), ("beta=-1", "at least 0")]
)
def test_what_cannot_be_varied_is_named(text, complaint):
    with pytest.raises(UserError, match=complaint):
        ablation.read_vary(text)


@pytest.mark.slow
def test_ablation_trains_each_variant_and_repeats_no_run(tmp_path, monkeypatch):
    output = tmp_path / "result.json"
    flags = "--vary beta=0,0.04 --seeds 1 --iterations 2 --eval_every 1 --eval_problems 4 --jobs 2"
    flags = [*flags.split(), "--output", str(output)]
    assert ablation.main(flags) == 0
    runs = json.loads(output.read_text())["runs"]
    assert list(runs) == ["beta=0", "beta=0.04"]
    for done in runs.values():
        assert list(done) == ["0"] and 0 <= done["0"]["greedy"] <= 1 and done["0"]["kl"] > 0
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(ablation, "train", None)  # a run would fail
    assert ablation.main(flags) == 0
    with pytest.raises(UserError, match="holds runs with"):
        ablation.main([*flags, "--eval_problems", "5"])


@pytest.fixture(scope="module")
def trainer():
    pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
    return make_trainer(ASKED)


def test_trl_gets_the_same_prompts_in_the_same_order(trainer):
    (task, _), config = start(ASKED), ASKED.config
    rng, batches = random.Random(config.seed), iter(trainer.get_train_dataloader())
    for _ in range(3):
        drawn = task.problems.draw(config.batch_size, rng)
        ours = [(p.question, p.answer) for p in drawn for _ in range(config.num_generations)]
        questions, answers = zip(*ours, strict=True)
        ids, mask = encode_prompts(task.tokenizer, questions, task.prompt, "cpu")
        expected = [row[keep > 0].tolist() for row, keep in zip(ids, mask, strict=True)]
        for _ in range(config.num_inner_updates):
            rows = next(batches)
            assert trainer._tokenize_prompts([row["prompt"] for row in rows])[0] == expected
            assert tuple(json.loads(row["answer"]) for row in rows) == answers


def test_trl_gets_the_same_weights_optimizer_and_end_tokens(trainer):
    task, learner = start(ASKED)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is type(learner.optimizer)
    for name in ("lr", "betas", "eps", "fused", "weight_decay"):
        groups = *optimizer.param_groups, *learner.optimizer.param_groups
        assert len({group[name] for group in groups}) == 1, name
    models = learner.policy.model, trainer.model, trainer.ref_model, learner.reference.model
    for first, *others in zip(*(model.parameters() for model in models), strict=True):
        assert first.dtype == torch.float32 and all(torch.equal(first, p) for p in others)
    assert trainer.eos_token_ids == eos_token_ids(learner.policy.model, task.tokenizer)
    endless = make_trainer(replace(ASKED, endless=True))
    assert min(endless.eos_token_ids) >= endless.model.config.vocab_size


@pytest.mark.slow
def test_both_loops_start_from_the_same_accuracy(trainer, tmp_path):
    output = tmp_path / "result.json"
    flags = ("--accuracy", "True", "--seconds", 1, "--rounds", 1, "--output", output)
    done = run_script("benchmarks/vs_trl.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    (before, after), (trl_before, trl_after) = result["ours"], result["trl"]
    assert before == trl_before and before["accuracies"]["sampled"]["accuracy"] > 0.3
    assert after["iterations"] > 0 and trl_after["iterations"] > 0
    assert output.with_suffix(".png").exists()
