"""Fixed shapes compute the same, and what is recorded can be replayed.

There is no CUDA here: a stand-in for its graphs keeps their contract (fixed places for what goes in
and comes out, nothing of Python in between), and whatever would wait for the device is refused.
"""

import copy
import random

import pytest
import torch
from short_runs import short_training
from small_models import ARCHITECTURES, Numbers, left_padded, random_ids, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from policy import Policy, encode_prompts
from replay import Graphs, wanted
from train_grpo import (
    Config,
    TrainState,
    group_advantages,
    make_prompt,
    rollout,
    train_iteration,
    update_policy,
)

PROMPTS = [random_ids(length, seed=length) for length in (3, 9, 12)]
CONFIG = Config(
    num_generations=4, num_inner_updates=3, learning_rate=1e-3, micro_batch_size=8, beta=0.1
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class StandIn:
    """A CUDA graph on the CPU: a recorded function is run again on the places that it read."""

    def register_generator_state(self, generator) -> None:
        pass

    def replay(self) -> None:
        for place, value in zip(flat(self.outputs), flat(self.function(*self.inputs)), strict=True):
            place.copy_(value)


def flat(values):
    if isinstance(values, torch.Tensor):
        return [values]
    values = values.values() if isinstance(values, dict) else values
    return [tensor for value in values if value is not None for tensor in flat(value)]


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    """`Graphs` that record and replay, by the stand-in."""

    def record(self, function, tensors):
        graph = StandIn()
        graph.function, before = function, self.generator.get_state()
        graph.inputs = [t if t is None else t.clone() for t in tensors]
        graph.outputs = function(*graph.inputs)
        self.generator.set_state(before)
        return graph, graph.inputs, graph.outputs

    monkeypatch.setattr(Graphs, "record", record)
    graphs = Graphs(seeded(0))
    graphs.enabled = True
    return graphs


def sampled(policy: Policy, graphs: Graphs | None, generator: torch.Generator, prompts=PROMPTS):
    prompts = left_padded(prompts)
    return rollout(policy, Numbers(), prompts, 4, 8, generator, graphs=graphs)


def test_fixed_shapes_are_for_cuda_unless_they_are_asked_for():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [wanted(setting, cpu) for setting in ("auto", "on", "off")] == [False, True, False]
    assert [wanted(setting, cuda) for setting in ("auto", "on", "off")] == [True, True, False]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_completions_of_fixed_length_are_the_same_up_to_their_end(name):
    policy = Policy(small_model(name, end_ids=list(range(3, 40))))
    usual, fixed = sampled(policy, None, seeded(3)), sampled(policy, Graphs(seeded(0)), seeded(3))
    width = usual.mask.shape[1]
    assert width < 8 == fixed.mask.shape[1]  # else this shows nothing
    assert torch.equal(fixed.mask[:, :width], usual.mask) and not fixed.mask[:, width:].any()
    said = usual.mask.bool()
    assert torch.equal(fixed.completion_ids[:, :width][said], usual.completion_ids[said])
    assert fixed.texts == usual.texts
    torch.testing.assert_close(fixed.logprobs[:, :width][said], usual.logprobs[said])


def test_updates_on_fixed_lengths_are_the_same():
    policy = Policy(small_model("llama", end_ids=list(range(3, 40))))
    reference = copy.deepcopy(policy)
    found = []
    for graphs in (None, Graphs(seeded(0))):
        learner = copy.deepcopy(policy)
        adamw = torch.optim.AdamW(learner.parameters(), 1e-3)
        batch = sampled(learner, graphs, seeded(3))
        advantages = group_advantages(torch.arange(12.0).sin(), 4)
        stats = update_policy(learner, reference, adamw, batch, advantages, CONFIG, graphs)
        found.append((stats, list(learner.parameters())))
    for name, value in found[0][0].items():
        assert found[1][0][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for some, others in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(some, others, rtol=0, atol=1e-5)


def test_a_whole_run_on_fixed_shapes_agrees_with_the_usual_one(tmp_path):
    (usual, _), (fixed, _) = (
        short_training(tmp_path / setting, fixed_shapes=setting) for setting in ("off", "on")
    )
    first, second = usual["iterations"][0], fixed["iterations"][0]
    assert second.keys() == first.keys()
    for name in first.keys() - {"seconds"}:  # later ones draw from another place of the stream
        assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-5), name


def test_prompts_of_one_length_make_one_recording_whatever_they_hold(tiny, graphs):
    policy, tokenizer = tiny
    state = state_of(policy, graphs)
    config = Config(**{**vars(CONFIG), "batch_size": 3, "max_new_tokens": 6})
    widths = set()
    for _ in range(6):
        problems = state.problems.getstate()
        metrics = train_iteration(state, policy, tokenizer, make_prompt(config), config)
        assert metrics["sampling_gap"] < 1e-4 and state.problems.getstate() != problems
    for _, ids, *_ in graphs.recordings:
        widths.add(ids[0][1])
    # Sampling, the reference, the first update and the later ones.
    assert widths == {32} and len(graphs.recordings) == 4, graphs.recordings.keys()


def state_of(policy: Policy, graphs: Graphs | None) -> TrainState:
    learner = copy.deepcopy(policy)
    adamw = torch.optim.AdamW(learner.parameters(), 1e-4)
    return TrainState(learner, adamw, random.Random(0), seeded(0), {}, graphs)


def test_replays_train_as_calls_do(tiny, graphs):
    policy, tokenizer = tiny
    config = Config(**{**vars(CONFIG), "batch_size": 2, "max_new_tokens": 6})
    plain = Graphs(seeded(0))  # fixed shapes, each function called
    some, others = state_of(policy, plain), state_of(policy, graphs)
    graphs.generator = others.sampler
    places = []
    for _ in range(3):
        found = [
            train_iteration(state, policy, tokenizer, make_prompt(config), config)
            for state in (some, others)
        ]
        for name in found[0].keys() - {"seconds"}:
            assert found[1][name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7), name
        # A recording writes gradients where they were when it was made, and nowhere else.
        now = [parameter.grad for parameter in others.policy.parameters()]
        assert all(a is b for a, b in zip(places or now, now, strict=True))
        places = now
    assert not plain.recordings and len(graphs.recordings) == 4
    for mine, its in zip(some.policy.parameters(), others.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or copy to it, as a recording does."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{function} waits for the device"
        return function(*arguments, **(options or {}))


class Watched(Graphs):
    """Calls each function under `NoWaiting`."""

    def __call__(self, function, *tensors):
        with NoWaiting():
            return function(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_is_recorded_waits_for_the_device(tiny, monkeypatch, dtype):
    # As on a GPU.
    monkeypatch.setattr("policy.common_beginning", lambda *_: 0)
    model, tokenizer = copy.deepcopy(tiny[0].model), tiny[1]
    policy = Policy(model, dtype)
    state = state_of(policy, Watched(seeded(0)))
    train_iteration(state, policy, tokenizer, make_prompt(CONFIG), CONFIG)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        torch.ones(1).item()


def test_a_recording_that_fails_is_told_in_one_line_and_the_function_is_called(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Graphs, "record", fail)
    graphs = Graphs(seeded(0))
    graphs.enabled = True
    for _ in range(2):
        assert torch.equal(graphs(torch.neg, torch.ones(2)), -torch.ones(2))
    told = capsys.readouterr()
    assert (told.out + told.err).strip() == (
        "no CUDA graphs, so slower: operation not permitted when stream is capturing"
    )


def test_prompts_are_padded_to_a_multiple_that_changes_nothing(tiny):
    policy, tokenizer = tiny
    prompt, questions = make_prompt(Config()), ["What is (4 - 9) * 6?", "What is (10 + 2) - 10?"]
    usual = encode_prompts(tokenizer, questions, prompt, torch.device("cpu"))
    padded = encode_prompts(tokenizer, questions, prompt, torch.device("cpu"), 16)
    assert padded[0].shape[1] == 32 > usual[0].shape[1]
    completions = torch.randint(3, 100, (4, 5), generator=seeded(1))
    torch.testing.assert_close(
        policy(*padded, completions), policy(*usual, completions), rtol=1e-6, atol=1e-5
    )
