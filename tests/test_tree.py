"""TreePolicy computes what Policy computes, and reads each distinct prefix once."""

import copy
import functools
import itertools
import random
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import ROOT
from small_models import (
    ATTENTION,
    Numbers,
    Recorder,
    assert_same_gradients,
    gradients,
    left_padded,
    nearby,
    ragged_batch,
    random_ids,
    sequences,
    small_model,
    unpadded_logprobs,
    update,
)

from engine.files import UserError
from engine.policy import Policy, Rollout
from engine.startup import choose_policy
from engine.tree import (
    MAX_NODES,
    MAX_NODES_ELSEWHERE,
    PrefixTree,
    RolloutTree,
    TreePolicy,
)
from train_grpo import Config, rollout

BEGINNING = random_ids(4, seed=4)
LONG = random_ids(9, seed=9)
PROMPTS = [
    BEGINNING + LONG,
    BEGINNING + LONG[:3],  # a prefix of the first
    BEGINNING + random_ids(6, seed=6),
    [(BEGINNING[0] + 1) % 64, *BEGINNING[1:]] + LONG,  # the first, but for its first token
]
SHARED = random_ids(5, seed=5)
COMPLETIONS = [SHARED[:n] + random_ids(m, seed=20 + n) for n, m in ((5, 1), (3, 2), (3, 0), (0, 1))]
COMPLETIONS *= len(PROMPTS)


@pytest.fixture(autouse=True)
def always_a_tree(monkeypatch):
    """Random completions share little; without this their passes would take the plain path."""
    monkeypatch.setattr("engine.tree.MAX_SHARE", 1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both_policies(name: str, **settings) -> tuple[Policy, TreePolicy]:
    return Policy(small_model(name, **settings)), TreePolicy(small_model(name, **settings))


def random_batch(seed: int = 0) -> Rollout:
    """Two ragged prompts with 12 completions each, over few tokens, so that many prefixes meet."""
    rng = random.Random(seed)
    prompts = [[rng.randint(3, 5) for _ in range(length)] for length in (2, 4)]
    rows = [[rng.randint(3, 5) for _ in range(rng.randint(1, 6))] for _ in range(24)]
    return ragged_batch(prompts, rows)


def prefixes(rows) -> set[tuple]:
    """All beginnings of these lists of tokens."""
    return {tuple(row[: i + 1]) for row in rows for i in range(len(row))}


def read_tokens(model) -> list[torch.Tensor]:
    """A list that grows by the tokens, (M,), of each call of the model from now on."""
    reads = []

    def keep(module, arguments, inputs) -> None:
        assert len(inputs["input_ids"]) == 1
        reads.append(inputs["input_ids"][0])

    model.register_forward_pre_hook(keep, with_kwargs=True)
    return reads


@pytest.mark.parametrize("name", ATTENTION)
def test_values_and_gradients_equal_unpadded_forwards(name):
    policy, batch = TreePolicy(small_model(name)), ragged_batch(PROMPTS, COMPLETIONS)
    scored, expected = policy(batch), unpadded_logprobs(policy.model, batch)
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(policy.model, scored), gradients(policy.model, expected))


def assert_same_rollouts(plain: Policy, tree: TreePolicy, prompts, *arguments) -> Rollout:
    """Sample from both with one seed: same tokens, records, scores and gradients."""
    group, steps, temperature = arguments
    expected, found = (
        rollout(p, Numbers(), left_padded(prompts), group, steps, seeded(1), temperature)
        for p in (plain, tree)
    )
    assert torch.equal(found.mask, expected.mask)
    assert [c for _, c in sequences(found)] == [c for _, c in sequences(expected)]
    assert torch.equal(found.truncated, expected.truncated) and found.texts == expected.texts
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(found.sampled_logprobs, expected.sampled_logprobs, **close)
    assert_same_scores(plain, tree, found)
    return found


def assert_same_scores(plain: Policy, tree: TreePolicy, batch: Rollout) -> None:
    expected, found = plain(batch), tree(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not found[batch.mask == 0].any()
    assert_same_gradients(gradients(tree.model, found), gradients(plain.model, expected))


@pytest.mark.parametrize("name", ATTENTION)
def test_one_seed_samples_the_same_tokens_from_both_policies(name):
    policies = both_policies(name, eos_ids=list(range(2, 12)))
    batch = assert_same_rollouts(*policies, PROMPTS, 6, 7, 1.0)
    assert len(set(batch.mask.sum(dim=1).tolist())) > 3  # ragged


SAMPLED = {
    "greedy": {"temperature": 0.0},
    "temperature 0.5": {"temperature": 0.5},
    "one prompt": {"prompts": PROMPTS[:1]},
    "equal prompts": {"prompts": [PROMPTS[0], PROMPTS[2], PROMPTS[0]]},
    "one new token": {"steps": 1},
    "two completions a prompt": {"group": 2},
    "a prompt of one token": {"prompts": [[7], PROMPTS[0]]},
    "vocabulary of 200,000": {"vocabulary": 200_000, "prompts": PROMPTS[:2], "group": 3},
    "up to the model's length limit": {"name": "gpt2", "steps": 64 - len(PROMPTS[0]), "group": 2},
}


@pytest.mark.parametrize("case", SAMPLED)
def test_odd_samplings_give_what_the_plain_path_gives(case):
    odd = {"name": "llama", "prompts": PROMPTS, "group": 4, "steps": 5, **SAMPLED[case]}
    settings = {"vocabulary": odd.get("vocabulary", 64)}
    sampling = odd["group"], odd["steps"], odd.get("temperature", 1.0)
    assert_same_rollouts(*both_policies(odd["name"], **settings), odd["prompts"], *sampling)


def test_greedy_ties_go_to_the_first_token_in_both_policies():
    policies = both_policies("llama")
    for policy in policies:
        weight = policy.model.get_output_embeddings().weight.data
        weight[32:] = weight[:32]
    batch = assert_same_rollouts(*policies, PROMPTS, 2, 6, 0.0)
    assert batch.completion_ids.max() < 32


END = 2
SCORED = {
    "identical completions": [COMPLETIONS[0]] * 4,
    "one completion is a prefix of another": [SHARED, SHARED[:2], SHARED[:4], SHARED],
    "one end token": [[END], [END], [7, END], [END]],
    "end tokens within": [[END, 5, END, 7], [END], [END, 5], [5, END]],
    "all of one token": [[5], [6], [5], [7]],
}


@pytest.mark.parametrize("case", SCORED)
def test_odd_groups_give_what_the_plain_path_gives(case):
    batch = ragged_batch(PROMPTS[:1], SCORED[case])
    assert_same_scores(*both_policies("mistral", eos_ids=END), batch)


def test_completions_equal_in_tokens_but_not_in_mask_stay_apart():
    batch = ragged_batch(PROMPTS[:1], [SHARED, SHARED[:3], SHARED[:1], SHARED])
    batch.completion_ids[:] = torch.tensor(SHARED)
    assert_same_scores(*both_policies("llama"), batch)


def test_a_shared_node_owes_the_gradient_of_each_completion():
    policy, found = TreePolicy(small_model("llama")), []
    for copies in (1, 7):
        batch = ragged_batch(PROMPTS[:1], [SHARED] * copies)
        found.append(torch.autograd.grad(policy(batch).sum(), list(policy.parameters())))
        assert len(RolloutTree(batch)) == len(PROMPTS[0] + SHARED) - 1
    for once, seven_times in zip(*found, strict=True):
        torch.testing.assert_close(seven_times, 7 * once, rtol=1e-4, atol=1e-4)


def test_a_forward_reads_each_distinct_prefix_once_and_no_leaf():
    policy, batch = TreePolicy(small_model("llama")), random_batch()
    reads = read_tokens(policy.model)
    policy(batch)
    expected = prefixes((prompt + completion)[:-1] for prompt, completion in sequences(batch))
    assert [sorted(some.tolist()) for some in reads] == [sorted(p[-1] for p in expected)]
    assert len(expected) < batch.mask.sum()


def test_logits_are_computed_only_where_they_predict_a_token():
    policy, batch, rows = TreePolicy(small_model("llama")), random_batch(), []
    head = policy.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1]))
    policy(batch)
    predict = {(*p, *c[:t]) for p, c in sequences(batch) for t in range(len(c))}
    assert rows == [(1, len(predict))]


def test_sampling_reads_each_distinct_unfinished_prefix_once():
    policy = TreePolicy(small_model("llama", eos_ids=[2], vocabulary=6))
    reads = read_tokens(policy.model)
    prompts = [[3, 4, 5], [3, 4], [3, 4], [3, 5, 5, 4]]
    batch = rollout(policy, Numbers(), left_padded(prompts), 16, 4, seeded(3))
    expected = [prefixes(prompts)]
    for step in range(1, batch.mask.shape[1]):
        longer = [(p, c) for p, c in sequences(batch) if len(c) > step]
        expected.append({tuple(p + c[:step]) for p, c in longer})
        assert len(expected[-1]) < len(longer) < 64  # some meet, some have ended
    expected = [sorted(prefix[-1] for prefix in some) for some in expected]
    assert [sorted(some.tolist()) for some in reads] == expected


@pytest.mark.parametrize("kind", [Policy, TreePolicy])
def test_each_completion_takes_its_own_uniform_number_at_each_step(kind):
    policy, generator = kind(small_model("llama", eos_ids=list(range(2, 12)))), seeded(4)
    batch = rollout(policy, Numbers(), left_padded(PROMPTS[:1] * 2), 16, 9, generator)
    assert len(set(batch.completion_ids[:, 0].tolist())) > 4  # though all share one prompt
    others, steps = seeded(4), batch.mask.shape[1]
    for _ in range(steps):
        torch.rand(32, dtype=torch.float64, generator=others)
    assert torch.equal(generator.get_state(), others.get_state())


def test_a_node_sees_its_ancestors_and_itself_alone():
    rng = random.Random(0)
    rows = [[rng.randint(0, 2) for _ in range(rng.randint(1, 6))] for _ in range(30)]
    ids = torch.tensor([row + [1] * (6 - len(row)) for row in rows])
    tree = PrefixTree(ids, torch.tensor([len(row) for row in rows]))
    nodes = {}  # the prefix that each stands for
    for row, numbers in zip(rows, tree.nodes.tolist(), strict=True):
        for i in range(len(row)):
            assert nodes.setdefault(numbers[i], tuple(row[: i + 1])) == tuple(row[: i + 1])
    assert sorted(nodes) == list(range(len(tree))) and set(nodes.values()) == prefixes(rows)
    for a, b in itertools.product(nodes, repeat=2):
        assert tree.visible[a, b] == (nodes[a][: len(nodes[b])] == nodes[b])
        assert tree.depth[a] == len(nodes[a]) - 1 and tree.ids[a] == nodes[a][-1]


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("max_nodes", [10, 17, 1000])
def test_micro_batches_keep_all_completions_within_both_bounds(size, max_nodes):
    batch, policy = random_batch(), TreePolicy(small_model("llama"))
    policy.max_nodes = max_nodes
    micro_batches, all_rows = policy.micro_batches(batch, size), []
    for rows, some in micro_batches:
        assert sequences(some) == [sequences(batch)[row] for row in rows]
        assert len(some.tree) <= max_nodes
        assert len(some) <= (size or 24)
        assert some.mask.shape[1] == some.mask.sum(dim=1).max()
        all_rows += rows.tolist()
    assert sorted(all_rows) == list(range(24))
    if max_nodes == 10:
        assert len(micro_batches) > 2  # so both groups were split


@pytest.mark.parametrize("max_nodes", [10, 17, 30])
def test_a_micro_batch_ends_only_where_its_next_neighbour_would_not_fit(max_nodes):
    batch, policy = random_batch(), TreePolicy(small_model("llama"))
    policy.max_nodes = max_nodes
    # Neighbours in the order of their tokens, cut by a count of their own.
    paths = [tuple((p + c)[:-1]) for p, c in sequences(batch)]
    order, expected = sorted(range(24), key=lambda row: paths[row]), [[]]
    for row in order:
        if len(prefixes(paths[r] for r in [*expected[-1], row])) > max_nodes:
            expected.append([])
        expected[-1].append(row)
    assert [rows.tolist() for rows, _ in policy.micro_batches(batch)] == list(map(sorted, expected))
    assert len(expected) > 1


def test_a_completion_over_the_bound_stands_alone():
    batch = ragged_batch(PROMPTS[:1], COMPLETIONS[:4])
    policy = TreePolicy(small_model("llama"))
    policy.max_nodes = 1
    assert [len(some) for _, some in policy.micro_batches(batch)] == [1] * 4


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_batch_sampled_in_parts_is_what_the_parts_are(temperature):
    policy = TreePolicy(small_model("llama", eos_ids=list(range(2, 12))))
    policy.max_sampled = 10 * 9
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 6, 9, seeded(5), temperature)
    ids, mask = (x.repeat_interleave(6, dim=0) for x in left_padded(PROMPTS))
    ends, generator, widths = torch.arange(2, 12), seeded(5), []
    for part in torch.arange(24).split(10):
        sampling = 9, ends, generator, temperature
        tokens, kept, logprobs, _ = Policy.sample(policy, ids[part], mask[part], *sampling)
        widths.append(width := tokens.shape[1])
        assert torch.equal(batch.completion_ids[part, :width] * kept, tokens * kept)
        assert torch.equal(batch.mask[part, :width], kept.float())
        assert torch.equal(batch.sampled_logprobs[part, :width], logprobs)
        assert not batch.mask[part, width:].any()
    assert batch.mask.shape[1] == max(widths)


def test_a_part_holds_one_completion_at_least():
    policy = TreePolicy(small_model("llama"))
    policy.max_sampled = 1
    reads = read_tokens(policy.model)
    rollout(policy, Numbers(), left_padded(PROMPTS[:1]), 3, 1, seeded(0))
    assert [len(some) for some in reads] == [len(PROMPTS[0])] * 3


@pytest.mark.parametrize(("size", "max_nodes"), [(0, 12), (5, 1000), (1, 1000)])
def test_gradients_are_the_same_in_every_cut(size, max_nodes):
    policy, found = TreePolicy(small_model("llama")), []
    recorder, reference = Recorder(policy), nearby(policy)
    for cut_size, bound in ((0, 1000), (size, max_nodes)):
        batch, config = random_batch(), Config(num_inner_updates=1, micro_batch_size=cut_size)
        advantages = torch.randn(24, generator=seeded(0))
        policy.max_nodes = bound
        metrics = update(policy, reference, recorder, batch, advantages, config)
        found.append((recorder.gradients, metrics))
    (whole, its_metrics), (cut, metrics) = found
    assert_same_gradients(cut, whole)
    assert metrics == pytest.approx(its_metrics, rel=1e-4)


def test_long_prompts_are_read_in_chunks_with_the_same_result():
    plain, tree = both_policies("mistral")
    tree.max_nodes = 7
    reads = read_tokens(tree.model)
    rollout(tree, Numbers(), left_padded(PROMPTS), 1, 1, seeded(0))
    assert len(reads) > 2 and max(map(len, reads)) == 7
    tree.model._forward_pre_hooks.clear()
    assert_same_rollouts(plain, tree, PROMPTS, 3, 4, 1.0)


@torch.no_grad()
def test_prompts_are_read_in_chunks_of_any_size():
    policy, prompts = TreePolicy(small_model("llama")), left_padded(PROMPTS)
    expected, _, cache = policy.prefill(*prompts)
    for policy.max_nodes in range(1, len(cache.depth)):
        torch.testing.assert_close(policy.prefill(*prompts)[0], expected, rtol=0, atol=1e-5)


def test_a_tree_is_built_once_for_all_passes(monkeypatch):
    policy, batch, built = TreePolicy(small_model("llama")), random_batch(), []
    real = RolloutTree.__init__
    monkeypatch.setattr(RolloutTree, "__init__", lambda s, r: built.append(1) or real(s, r))
    update(policy, copy.deepcopy(policy), Recorder(policy), batch, torch.ones(24), Config())
    assert len(built) == 1


def test_repeating_an_update_with_40000_lookups_gives_equal_bits():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        policy, weights = TreePolicy(small_model("llama")), []
        batch = ragged_batch(PROMPTS[:1], [random_ids(16, seed=n) for n in range(4)] * 640)
        advantages, config = torch.randn(2560, generator=seeded(0)), Config(num_inner_updates=2)
        assert batch.mask.numel() > 40_000
        for _ in range(4):
            learner = copy.deepcopy(policy)
            optimizer = torch.optim.SGD(learner.parameters(), 1.0)
            update(learner, policy, optimizer, batch, advantages, config)
            weights.append(torch.cat([p.flatten() for p in learner.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in policy.parameters()]))
    assert all(torch.equal(other, weights[0]) for other in weights[1:])


MEASURE = """
import resource
import torch
from small_models import Recorder, ragged_batch, random_ids, small_model, update
from engine.tree import TreePolicy
from train_grpo import Config

policy, peaks, read = TreePolicy(small_model("llama")), [], 0

def check(module, arguments, inputs):
    global read
    read += inputs["input_ids"].numel()
    assert inputs["input_ids"].numel() <= policy.max_nodes  # before it takes the memory

policy.model.register_forward_pre_hook(check, with_kwargs=True)
for group, length in ((2, 8), (64, 256)):
    batch = ragged_batch([random_ids(40, 0)], [random_ids(length, n + 1) for n in range(group)])
    config = Config(num_inner_updates=1)
    update(policy, policy, Recorder(policy), batch, torch.ones(group), config)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
assert read > 2 * 64 * 255  # once by the reference, once by the update: all are distinct
print(peaks[1] - peaks[0])
"""


@pytest.mark.slow
def test_long_distinct_completions_stay_within_400_mib():
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400


def choose(model, name: str = "auto", steps: int = 6, **options) -> Policy:
    prompts = left_padded(options.get("prompts", PROMPTS))
    return choose_policy(name, model, torch.float32, prompts, options.get("group", 3), steps)


def test_auto_takes_the_tree_where_the_model_fits_it(capsys):
    assert type(choose(small_model("llama"))) is TreePolicy
    assert capsys.readouterr().out == "policy tree: matches unpadded forward passes\n"


@pytest.mark.parametrize("name", ["lfm2", "gpt_neo", "bloom", "llama4", "mamba2"])
def test_auto_falls_back_to_plain_and_says_why(name, capsys):
    assert type(choose(small_model(name))) is Policy
    printed = capsys.readouterr().out
    assert printed.startswith("policy plain: tree ") and printed.count("\n") == 1


@pytest.mark.parametrize(("model", "policy"), [("mamba", "auto"), ("lfm2", "tree")])
def test_a_model_that_the_policy_gets_wrong_is_refused(model, policy):
    with pytest.raises(UserError, match=f"a model of type {model} cannot be trained: .*tree ") as e:
        choose(small_model(model), policy)
    assert "\n" not in str(e.value)


def test_a_named_policy_is_taken():
    assert type(choose(small_model("llama"), "plain")) is Policy
    assert type(choose(small_model("llama"), "tree")) is TreePolicy


def test_a_chunk_is_felt_at_the_length_of_the_run():
    model = small_model("llama4", attention_chunk_size=16)
    assert type(choose(model, steps=2, prompts=PROMPTS[:1])) is TreePolicy
    assert type(choose(model, steps=8, prompts=PROMPTS[:1])) is Policy


def test_a_model_that_masks_by_row_index_gets_no_tree():
    # Only batches larger than those compared at start-up would feel the window.
    model = small_model("gpt_neo", window_size=500, max_position_embeddings=1000)
    assert type(choose(model)) is Policy


@pytest.mark.parametrize("lost", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_an_input_gets_no_tree(lost):
    model = small_model("gpt2")
    whole = model.forward

    @functools.wraps(whole)
    def forward(**inputs):
        is_tree = "attention_mask" in inputs and inputs["attention_mask"].ndim == 4
        return whole(**{n: None if n == lost and is_tree else x for n, x in inputs.items()})

    model.forward = forward
    assert type(choose(model)) is Policy


def test_a_pass_that_shares_little_takes_the_plain_path(monkeypatch):
    monkeypatch.setattr("engine.tree.MAX_SHARE", 0.7)
    plain, tree = both_policies("llama")
    apart = ragged_batch([[5], [6]], [random_ids(8, seed=seed) for seed in range(4)])
    together = ragged_batch([[5], [6]], [random_ids(8, seed=0)] * 4)
    reads = []
    tree.model.register_forward_pre_hook(
        lambda module, arguments, inputs: reads.append(tuple(inputs["input_ids"].shape)),
        with_kwargs=True,
    )
    torch.testing.assert_close(tree(apart), plain(apart), rtol=0, atol=1e-5)
    tree(together)
    assert reads == [(4, 9), (1, 16)]


@pytest.mark.parametrize("kind", [Policy, TreePolicy])
def test_scoring_builds_no_cache(kind):
    policy, caches = kind(small_model("llama")), []
    policy.model.register_forward_hook(lambda *call: caches.append(call[-1].past_key_values))
    policy(random_batch())
    assert caches == [None]


@pytest.mark.parametrize("kind", [Policy, TreePolicy])
@torch.no_grad()
def test_tensors_are_made_on_the_device_of_the_model(kind):
    """`meta` stands for a GPU: tensors made on the default device cannot meet the others."""
    policy, prompts = kind(small_model("llama")), left_padded(PROMPTS[:2])
    [(_, batch)] = policy.micro_batches(ragged_batch(PROMPTS[:2], COMPLETIONS[:2]))
    expected, (_, _, cache) = policy(batch), policy.prefill(*prompts)
    with torch.device("meta"):
        assert torch.equal(policy(batch), expected)
        policy.decode(cache, torch.tensor([3, 4], device="cpu"), torch.ones(2, device="cpu") > 0)
    assert cache.model_cache


def test_on_a_cpu_trees_are_small_and_attention_is_eager():
    policy = TreePolicy(small_model("llama"))
    assert policy.max_nodes == MAX_NODES["cpu"]
    assert policy.model.config._attn_implementation == "eager"
    policy = TreePolicy(small_model("llama").to("meta"))
    assert policy.max_nodes == MAX_NODES_ELSEWHERE == 2048 > MAX_NODES["cpu"]
    assert policy.model.config._attn_implementation == "sdpa"


def test_rows_of_the_attention_mask_start_at_multiples_of_8():
    visible, depth = torch.ones(17, 17, dtype=torch.bool).tril(), torch.arange(17)
    mask = TreePolicy(small_model("llama")).attention_mask(visible, depth, depth)
    assert mask.stride() == (17 * 24, 17 * 24, 24, 1) and (mask == 0).equal(visible[None, None])


def test_the_mask_of_a_bfloat16_tree_is_bfloat16():
    policy = TreePolicy(small_model("llama"), torch.bfloat16)
    visible, depth = torch.tensor([[True, False], [True, True]]), torch.tensor([0, 1])
    mask = policy.attention_mask(visible, depth, depth)
    lowest = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16 and mask.tolist() == [[[[0, lowest], [0, 0]]]]


@pytest.mark.parametrize("name", ["auto", "tree", "plain"])
def test_the_policy_computes_in_the_type_asked_for(name):
    for dtype in (torch.float32, torch.bfloat16):
        policy = choose_policy(name, small_model("llama"), dtype, left_padded(PROMPTS), 2, 3)
        assert policy.compute_dtype == dtype


def test_the_plain_policy_keeps_the_attention_of_the_model():
    for attention in ("eager", "sdpa"):
        policy = choose(small_model("lfm2", attn_implementation=attention))
        assert type(policy) is Policy
        assert policy.model.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("error", "reason"), [(ValueError(" no\nnever"), "no"), (KeyError(), "KeyError")]
)
def test_a_refusal_names_what_failed_in_one_line(error, reason):
    model = small_model("llama")

    def forward(input_ids, attention_mask=None):
        raise error

    model.forward = forward
    with pytest.raises(UserError) as raised:
        choose(model)
    refused = "a model of type llama cannot be trained"
    assert str(raised.value) == f"{refused}: tree fails ({reason}); plain fails ({reason})"


def test_full_memory_at_start_up_rules_no_policy_out():
    model, error = small_model("llama"), torch.OutOfMemoryError("CUDA out of memory")
    model.forward = Mock(side_effect=error)
    with pytest.raises(torch.OutOfMemoryError):
        choose(model)


def test_samples_at_start_up_have_full_length_and_one_seed():
    model, before = small_model("llama", vocabulary=4), torch.get_rng_state()
    # Nearly every sample holds token 0: as an end token it would be noticed.
    assert type(choose(model, prompts=[[3], [3, 3]])) is TreePolicy
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [Policy, TreePolicy])
def test_capped_attention_is_computed_plainly(kind, monkeypatch):
    monkeypatch.setattr(TreePolicy, "eager_attention", Policy.eager_attention)  # as on CUDA
    fused = small_model("gemma2", attn_implementation="sdpa")
    batch = rollout(kind(fused), Numbers(), left_padded(PROMPTS), 3, 5, seeded(0))
    expected = unpadded_logprobs(small_model("gemma2"), batch)  # with plain attention
    torch.testing.assert_close(kind(fused)(batch), expected, rtol=0, atol=1e-5)


def test_the_startup_comparison_does_not_share_the_policys_kernel(monkeypatch):
    monkeypatch.setattr(Policy, "eager_attention", lambda policy: False)
    with pytest.raises(UserError, match="plain changes log-probabilities by"):
        choose(small_model("gemma2", attn_implementation="sdpa"), "plain")


def test_what_fails_in_the_runs_own_type_is_found_at_start():
    sizes = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
    model = transformers.XGLMForCausalLM(transformers.XGLMConfig(vocab_size=64, **sizes))
    inputs = left_padded(PROMPTS), 2, 3
    choose_policy("auto", model, torch.float32, *inputs)
    with pytest.raises(UserError, match=r"plain fails in bfloat16 \(.*\); try --dtype float32$"):
        choose_policy("auto", model, torch.bfloat16, *inputs)


def test_a_model_without_gradient_is_refused_at_start():
    with pytest.raises(UserError, match=r"plain fails in float32 \(.*grad[^)]*\)$"):
        choose(small_model("llama").requires_grad_(False))
