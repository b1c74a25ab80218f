"""The bridge to TRL takes along task and recipe, and says what TRL does not have."""

import copy
import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import TINY, run_script
from processes import torchrun
from safetensors.torch import load_file

from engine.files import UserError, exit_code, finite
from engine.models import eos_token_ids, load_model
from engine.policy import Policy, Rollout
from engine.problems import RewardFile
from engine.prompt import decode, read_prompt
from examples import bridge, to_trl
from train_grpo import (
    Config,
    Task,
    evaluate,
    group_advantages,
    grpo_loss,
    load_task,
    loss_length,
    reward_function,
    set_up,
)

pytest.importorskip("trl", reason="TRL is absent; requirements-dev.txt names it")
needs_peft = pytest.mark.skipif(
    not find_spec("peft"), reason="peft is absent; requirements-dev.txt names it"
)
CPU = torch.device("cpu")
SMALL = {"batch_size": 2, "num_generations": 4, "max_new_tokens": 8, "num_inner_updates": 2}
CONFIG = Config(model_name=str(TINY), device="cpu", kl_estimator="k3", learning_rate=1e-4, **SMALL)
# Two iterations of two gradient steps each, with a log of each step.
FEW = ("--num_iterations", 2, "--eval_problems", 8, "--device", "cpu", "--output_dir", "run")
SHORT = ["--preset=tiny", *(f"--{name}={value}" for name, value in SMALL.items()), *map(str, FEW)]
LOG = '{"logging_steps": 1, "disable_tqdm": true}'


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--preset reference", "--kl_estimator k3_inverse: TRL has only k3"),
        ("--preset tiny --policy plain", "--policy: TRL has no such setting"),
        ("--preset tiny --resume", "--resume: TRL has no such setting; its checkpoints are its"),
        ("--preset tiny --device cuda:1", "--device cuda:1: choose it with CUDA_VISIBLE_DEVICES"),
        ("--preset tiny --lora_rank -1", "--lora_rank -1: must be at least 0"),
        ("--preset tiny --trl [] --eval_problems 1", "--trl []: not an object"),
        ("--preset tiny --trl {} --micro_batch_size 7", "name a divisor of 1024"),
        ('--preset tiny --trl {"gamma":2}', "--trl: GRPOConfig.__init__() got an unexpected"),
        ('--preset tiny --trl {"num_generations":1}', "--trl: GRPO requires at least 2"),
    ],
)
def test_what_trl_does_not_have_is_one_line_and_code_2(flags, complaint, tmp_path, capsys):
    argv = [*flags.split(), "--output_dir", str(tmp_path)]
    assert exit_code(lambda: to_trl.main(argv)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and complaint in line


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(bridge, "find_spec", lambda name: None if name == "peft" else True)
    assert to_trl.parse_settings(["--preset", "tiny"]).lora_rank == 0
    with pytest.raises(UserError, match="peft is not installed: pip install peft"):
        to_trl.parse_settings(["--preset", "tiny", "--lora_rank", "4"])


def test_presets_and_micro_batches_are_taken_along():
    settings = to_trl.parse_settings(["--preset", "smollm2", "--device", "cpu"])
    found = bridge.trl_config(replace(settings, micro_batch_size=64), {"seed": 7})
    assert found.max_steps == settings.num_iterations * settings.num_inner_updates
    assert settings.lr_schedule == "warmup" and found.lr_scheduler_type == "linear"
    assert found.get_warmup_steps(found.max_steps) == 10
    assert found.beta == 0 and found.bf16 and found.epsilon_high == 0.2 and found.seed == 7
    assert found.generation_batch_size == settings.batch_size * settings.num_generations
    assert found.per_device_train_batch_size == 64
    assert found.max_completion_length == settings.max_new_tokens and found.epsilon == 0.2


def test_equal_texts_earn_equal_rewards(tiny):
    policy, tokenizer = tiny
    rewards = RewardFile()
    eos_ids = eos_token_ids(policy.model, tokenizer)
    texts = ["<answer>4</answer>", "<answer>3</answer>", "4", "<answer>4</answer><|user|>"]
    answers = [4] * len(texts)
    _, parts = reward_function(texts, answers, rewards)
    assert parts["exact"].tolist() == [1, 0, 0, 0]
    rows = [[*ids, eos_ids[0]] for ids in tokenizer(texts, add_special_tokens=False).input_ids]

    functions = bridge.reward_functions(rewards, tokenizer, eos_ids)
    given = {"completion_ids": rows, "answer": list(map(json.dumps, answers))}
    earned = {function.__name__: function(**given, completions=None) for function in functions}
    assert earned == {name: part.tolist() for name, part in parts.items()}
    assert functions[-1](completion_ids=rows[1:2], answer=["3"]) == [1.0]


@pytest.mark.parametrize(
    "loss_type, beta, scale",
    [("grpo", 0.04, "group"), ("dr_grpo", 0.0, "none"), ("dapo", 0.04, "batch")],
)
def test_the_loss_of_a_batch_is_ours(loss_type, beta, scale, tmp_path):
    config = replace(CONFIG, loss_type=loss_type, beta=beta, scale_rewards=scale)
    model, tokenizer = load_model(config.model_name, CPU)
    task, before = Task(tokenizer, *load_task(config)), Policy(copy.deepcopy(model))
    trainer = bridge.make_trainer(config, task, model, {"output_dir": str(tmp_path)})
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    batch = trainer._generate_and_score_completions(rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # else all ratios are 1 and the KL term is 0
        for weight in trainer.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    theirs = trainer._compute_loss(trainer.model, batch).item()

    ids, mask, eos_ids = batch["completion_ids"], batch["completion_mask"], trainer.eos_token_ids
    visible = (mask > 0) & ~torch.isin(ids, torch.tensor(eos_ids))
    texts = decode(tokenizer, [row[keep].tolist() for row, keep in zip(ids, visible, strict=True)])
    answers = [json.loads(row["answer"]) for row in rows]
    rewards, _ = reward_function(texts, answers, task.reward_file)
    advantages = group_advantages(rewards, config.num_generations, scale)
    assert advantages.abs().max() > 0.1
    nothing = torch.zeros(len(ids))
    prompts = batch["prompt_ids"], batch["prompt_mask"]
    rollout = Rollout(*prompts, ids, mask.float(), nothing, nothing > 0, texts)
    with torch.no_grad():
        old, new = before(rollout), Policy(trainer.model)(rollout)
    length = loss_length(rollout.mask, config)
    ours, _ = grpo_loss(new, old, old, advantages, rollout.mask, config, length)
    assert abs(ours.item()) > 1e-3
    assert theirs == pytest.approx(ours.item(), abs=1e-6)


def assert_answers(folder) -> None:
    """inference.py can ask the saved model."""
    flags = ["--model", "run/saved_model", "What is (4 - 9) * 6?"]
    done = run_script("inference.py", *flags, cwd=folder)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def changed(folder) -> set[str]:
    """The names of the saved weights that are not those of the bundled model."""
    base, saved = (load_file(f / "model.safetensors") for f in (TINY, folder / "run/saved_model"))
    assert base.keys() == saved.keys()
    return {name for name, weight in base.items() if not weight.equal(saved[name])}


def train(folder, *flags, launcher=(sys.executable,)) -> dict:
    """Train as a user does; returns the metrics."""
    argv = ("examples/to_trl.py", *SHORT, "--trl", LOG, *flags)
    done = run_script(*argv, cwd=folder, launcher=launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "run/trl_metrics.json").read_text())


@pytest.mark.slow
def test_one_process_trains_measures_and_saves_what_inference_asks(tmp_path):
    metrics = train(tmp_path, "--learning_rate", 1e-3)
    assert [e["iteration"] for e in metrics["evaluations"]] == [0, 2]
    config = to_trl.parse_settings(SHORT)
    task, learner = set_up(config)
    before = evaluate(learner.policy, task, "test", 8, 1_000_003)  # as train_grpo.py measures it
    assert metrics["evaluations"][0]["accuracies"] == finite(before["accuracies"])
    steps = [line for line in metrics["log"] if "reward" in line]
    assert [line["step"] for line in steps] == [1, 3]  # the others repeat a batch
    for line in steps:
        weighted = [w * line[f"rewards/{n}/mean"] for n, w in task.reward_file.weights.items()]
        assert line["reward"] == pytest.approx(sum(weighted), abs=1e-5)
    assert len(changed(tmp_path)) > 10
    assert read_prompt(str(tmp_path / "run/saved_model")) == task.prompt
    assert "before: sampled" in (tmp_path / "run/saved_model/README.md").read_text()
    assert_answers(tmp_path)


JUDGE = """import os
from rewards import WEIGHTS, score as judge
def score(completion, answer):
    open(f"rank{os.environ['RANK']}", "a").write("x")
    return judge(completion, answer)
"""


@pytest.mark.slow
def test_two_processes_share_each_batch(tmp_path):
    (tmp_path / "judge.py").write_text(JUDGE)
    metrics = train(tmp_path, "--rewards", "judge.py", launcher=torchrun(2))
    assert metrics["environment"]["processes"] == 2
    # Each scores 8 completions to try the rule, half of both batches once, and both evaluations.
    scored = [(tmp_path / f"rank{rank}").stat().st_size for rank in (0, 1)]
    assert scored == [8 + 2 * 4 + 2 * 16] * 2
    assert len(changed(tmp_path)) > 10


@needs_peft
@pytest.mark.slow
def test_adapters_are_trained_and_saved_merged(tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1")
    metrics = train(tmp_path, "--lora_rank", 4, "--learning_rate", 1e-2, launcher=launcher)
    assert metrics["config"]["lora_rank"] == 4
    found = changed(tmp_path)
    assert found and all(name.endswith("proj.weight") for name in found)
    assert (tmp_path / "run/trl_run/adapter/adapter_model.safetensors").exists()
    assert_answers(tmp_path)
