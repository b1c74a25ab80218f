"""TreePolicy computes what Policy computes, and reads each distinct prefix once."""

import copy
import functools
import random
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from small_models import (
    ATTENTION,
    Numbers,
    Recorder,
    assert_same_gradients,
    gradients,
    left_padded,
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
from engine.tree import RolloutTree, TreePolicy
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
BOTH = pytest.mark.parametrize("kind", [Policy, TreePolicy])


@pytest.fixture(autouse=True)
def always_a_tree(monkeypatch):
    """Random completions share little; without this their passes would take the plain path."""
    monkeypatch.setattr("engine.tree.MAX_SHARE", 1.0)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def both_policies(name: str = "llama", **settings) -> tuple[Policy, TreePolicy]:
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


def assert_equals_unpadded_forwards(policy: TreePolicy, batch: Rollout) -> torch.Tensor:
    """Same log-probabilities and gradients. Returns the log-probabilities."""
    found, expected = policy(batch), unpadded_logprobs(policy.model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not found[batch.mask == 0].any()
    assert_same_gradients(gradients(policy.model, found), gradients(policy.model, expected))
    return expected


def assert_same_rollouts(
    plain: Policy, tree: TreePolicy, prompts=PROMPTS, group=4, steps=5, temperature=1.0
) -> Rollout:
    """Sample from both with one seed: same tokens, and records that unpadded forwards confirm."""
    expected, found = (
        rollout(p, Numbers(), left_padded(prompts), group, steps, seeded(1), temperature)
        for p in (plain, tree)
    )
    assert torch.equal(found.mask, expected.mask) and sequences(found) == sequences(expected)
    assert torch.equal(found.truncated, expected.truncated) and found.texts == expected.texts
    scores = assert_equals_unpadded_forwards(tree, found)
    for recorded in (expected.sampled_logprobs, found.sampled_logprobs):
        torch.testing.assert_close(recorded, scores, rtol=0, atol=1e-5)
    return found


@pytest.mark.parametrize("name", ATTENTION)
def test_one_seed_samples_the_same_tokens_from_both_policies(name):
    policies = both_policies(name, eos_ids=list(range(2, 12)))
    batch = assert_same_rollouts(*policies, group=6, steps=7)
    assert len(set(batch.mask.sum(dim=1).tolist())) > 3  # ragged


SAMPLED = {  # by name: settings of the model and of sampling
    "greedy": ({}, {"temperature": 0.0}),
    "temperature 0.5": ({}, {"temperature": 0.5}),
    "one prompt": ({}, {"prompts": PROMPTS[:1]}),
    "equal prompts": ({}, {"prompts": [PROMPTS[0], PROMPTS[2], PROMPTS[0]]}),
    "one new token": ({}, {"steps": 1}),
    "two completions a prompt": ({}, {"group": 2}),
    "a prompt of one token": ({}, {"prompts": [[7], PROMPTS[0]]}),
    "vocabulary of 200,000": ({"vocabulary": 200_000}, {"prompts": PROMPTS[:2], "group": 3}),
    "up to the length limit": ({"name": "gpt2"}, {"steps": 64 - len(PROMPTS[0]), "group": 2}),
    "a config without a cache": ({"use_cache": False}, {}),
}


@pytest.mark.parametrize(("model", "sampling"), SAMPLED.values(), ids=SAMPLED)
def test_odd_samplings_give_what_the_plain_path_gives(model, sampling):
    assert_same_rollouts(*both_policies(**model), **sampling)


def test_prompts_read_in_chunks_give_what_the_plain_path_gives():
    plain, tree = both_policies("mistral")
    tree.max_nodes = 7
    assert_same_rollouts(plain, tree)


END = 2
SCORED = {
    "identical completions": [SHARED] * 4,
    "one completion is a prefix of another": [SHARED, SHARED[:2], SHARED[:4], SHARED],
    "one end token": [[END], [END], [7, END], [END]],
    "end tokens within": [[END, 5, END, 7], [END], [END, 5], [5, END]],
    "all of one token": [[5], [6], [5], [7]],
}


@pytest.mark.parametrize("case", SCORED)
@pytest.mark.parametrize("hidden", ["other", "same"])
def test_odd_groups_give_what_unpadded_forwards_give(case, hidden):
    batch = ragged_batch(PROMPTS[:1], SCORED[case])
    if hidden == "same":  # what the mask hides goes on as the first completion does
        ids = batch.completion_ids
        ids.copy_(ids.where(batch.mask > 0, ids[0]))
    assert_equals_unpadded_forwards(TreePolicy(small_model("mistral", eos_ids=END)), batch)


def test_a_forward_reads_each_distinct_prefix_once_and_no_leaf():
    policy, batch = TreePolicy(small_model("llama")), random_batch()
    reads = read_tokens(policy.model)
    policy(batch)
    expected = prefixes((prompt + completion)[:-1] for prompt, completion in sequences(batch))
    assert [sorted(some.tolist()) for some in reads] == [sorted(p[-1] for p in expected)]
    assert len(expected) < batch.mask.sum()


@BOTH
def test_scoring_computes_no_needless_logits_and_no_cache(kind):
    policy, batch, outputs = kind(small_model("llama")), random_batch(), []
    policy.model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    policy(batch)
    predict = {(*p, *c[:t]) for p, c in sequences(batch) for t in range(len(c))}
    needed = {Policy: batch.mask.shape, TreePolicy: (1, len(predict))}
    [output] = outputs
    assert output.logits.shape[:2] == needed[kind] and output.past_key_values is None


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


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("max_nodes", [1, 10, 17, 30, 1000])
def test_micro_batches_are_as_large_as_both_bounds_allow(size, max_nodes):
    batch, policy = random_batch(), TreePolicy(small_model("llama"))
    policy.max_nodes = max_nodes
    # Neighbours in the order of their tokens, cut by a count of their own.
    paths, parts = [tuple((p + c)[:-1]) for p, c in sequences(batch)], [[]]
    for row in sorted(range(24), key=lambda row: paths[row]):
        nodes = prefixes(paths[r] for r in [*parts[-1], row])
        if parts[-1] and (len(parts[-1]) == size or len(nodes) > max_nodes):
            parts.append([])
        parts[-1].append(row)
    micro_batches = policy.micro_batches(batch, size)
    assert [rows.tolist() for rows, _ in micro_batches] == [sorted(part) for part in parts]
    for rows, chunk in micro_batches:
        assert sequences(chunk) == [sequences(batch)[row] for row in rows]
        assert len(chunk.tree) == len(prefixes(paths[row] for row in rows))
        assert chunk.mask.shape[1] == chunk.mask.sum(dim=1).max()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize(("max_sampled", "size"), [(10 * 9, 10), (1, 1)])
def test_a_batch_sampled_in_parts_is_what_the_parts_are(max_sampled, size, temperature):
    policy = TreePolicy(small_model("llama", eos_ids=list(range(2, 12))))
    policy.max_sampled = max_sampled
    batch = rollout(policy, Numbers(), left_padded(PROMPTS), 6, 9, seeded(5), temperature)
    prompts = [x.repeat_interleave(6, dim=0).split(size) for x in left_padded(PROMPTS)]
    sampling = 9, torch.arange(2, 12), seeded(5), temperature, None
    parts = [policy.sample_part(*part, *sampling) for part in zip(*prompts, strict=True)]
    lengths = torch.cat([mask.sum(dim=1) for _, mask, _, _ in parts])
    assert torch.equal(batch.mask > 0, torch.arange(lengths.max()) < lengths[:, None])
    for found, column in ((batch.completion_ids, 0), (batch.sampled_logprobs, 2)):
        expected = [part[column][part[1]] for part in parts]
        assert torch.equal(found[batch.mask > 0], torch.cat(expected))
    assert torch.equal(batch.truncated, torch.cat([part[3] for part in parts]))


@torch.no_grad()
def test_prompts_are_read_in_chunks_of_any_size():
    policy, prompts = TreePolicy(small_model("llama")), left_padded(PROMPTS)
    expected, _, cache = policy.prefill(*prompts)
    reads = read_tokens(policy.model)
    for policy.max_nodes in range(1, len(cache.depth)):
        torch.testing.assert_close(policy.prefill(*prompts)[0], expected, rtol=0, atol=1e-5)
        assert max(map(len, reads)) == policy.max_nodes


def test_a_tree_is_built_once_for_all_passes(monkeypatch):
    policy, batch, built = TreePolicy(small_model("llama")), random_batch(), []
    real = RolloutTree.__init__
    monkeypatch.setattr(RolloutTree, "__init__", lambda s, r: built.append(1) or real(s, r))
    update(policy, copy.deepcopy(policy), Recorder(policy), batch, torch.ones(24), Config())
    assert len(built) == 1


def test_repeating_an_update_with_40000_lookups_gives_equal_bits():
    policy, threads, found = TreePolicy(small_model("llama")), torch.get_num_threads(), []
    batch = ragged_batch(PROMPTS[:1], [random_ids(16, seed=n) for n in range(4)] * 640)
    inputs = batch, torch.randn(2560, generator=seeded(0)), Config(num_inner_updates=1)
    assert batch.mask.numel() > 40_000
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            recorder = Recorder(policy)
            update(policy, policy, recorder, *inputs)
            found.append(torch.cat([g.flatten() for g in recorder.gradients.values()]))
    finally:
        torch.set_num_threads(threads)
    assert found[0].any() and all(torch.equal(other, found[0]) for other in found[1:])


def memory_mib(name: str) -> float:
    """VmRSS, the memory of this process, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def memory_of_an_update() -> float:
    """MiB beyond what is in use before, for an update on 64 long, distinct completions."""
    policy, config = TreePolicy(small_model("llama")), Config(num_inner_updates=1)
    policy.max_share = 1.0
    completions = [random_ids(256, seed=n + 1) for n in range(64)]
    batch, reads = ragged_batch([random_ids(40, seed=0)], completions), read_tokens(policy.model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = memory_mib("VmRSS")
    update(policy, policy, Recorder(policy), batch, torch.ones(64), config)
    assert max(map(len, reads)) <= policy.max_nodes
    assert sum(map(len, reads)) > 2 * 64 * 255  # by the reference and by the update
    return memory_mib("VmHWM") - before


@pytest.mark.slow
def test_long_distinct_completions_stay_within_400_mib():
    # In a new process: here, memory that earlier tests have freed would count as in use.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert pool.submit(memory_of_an_update).result() < 400


def choose(
    model, flag: str = "auto", dtype=torch.float32, prompts=PROMPTS, group: int = 3, steps: int = 6
) -> Policy:
    return choose_policy(flag, model, dtype, left_padded(prompts), group, steps)


SHORT = {"steps": 2, "prompts": PROMPTS[:1]}
CHOSEN = [
    (TreePolicy, "llama", {}, {"flag": "auto"}),
    (TreePolicy, "llama", {}, {"flag": "tree", "dtype": torch.bfloat16}),
    (Policy, "llama", {}, {"flag": "plain", "dtype": torch.bfloat16}),
    *((Policy, name, {}, {}) for name in ("lfm2", "gpt_neo", "bloom", "llama4", "mamba2")),
    (Policy, "lfm2", {"attn_implementation": "eager"}, {}),
    # A chunk of attention is felt at the length of the run.
    (TreePolicy, "llama4", {"attention_chunk_size": 16}, SHORT),
    (Policy, "llama4", {"attention_chunk_size": 16}, SHORT | {"steps": 8}),
    # It masks by row index: only larger batches than those at start-up would feel this window.
    (Policy, "gpt_neo", {"window_size": 500, "max_position_embeddings": 1000}, {}),
]


@pytest.mark.parametrize(("kind", "name", "settings", "options"), CHOSEN)
def test_the_policy_is_the_fastest_that_fits_or_the_named(kind, name, settings, options, capsys):
    model = small_model(name, **settings)
    attention = model.config._attn_implementation
    policy = choose(model, **options)
    assert type(policy) is kind
    assert policy.compute_dtype == options.get("dtype", torch.float32)
    failed = kind is Policy and "flag" not in options
    reason = "tree " if failed else "matches unpadded forward passes\n"
    printed = capsys.readouterr().out
    assert printed.startswith(f"policy {kind.name}: {reason}") and printed.count("\n") == 1
    assert not failed or model.config._attn_implementation == attention


def xglm():
    """A model that computes in float32 alone."""
    sizes = {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}
    return transformers.XGLMForCausalLM(transformers.XGLMConfig(vocab_size=64, **sizes))


def failing(error: Exception):
    """A model whose forward raises this."""
    model = small_model("llama")
    model.forward = Mock(side_effect=error)
    return model


REFUSED = [
    (lambda: small_model("mamba"), {}, "a model of type mamba cannot be trained: tree "),
    (lambda: small_model("lfm2"), {"flag": "tree"}, "a model of type lfm2 .* trained: tree "),
    (lambda: failing(ValueError(" no\nnever")), {}, r"tree fails \(no\); plain fails \(no\)$"),
    (lambda: failing(KeyError()), {}, r"tree fails \(KeyError\); plain fails \(KeyError\)$"),
    (lambda: small_model("llama").requires_grad_(False), {}, r"plain fails in float32 \(.*grad"),
    (xglm, {"dtype": torch.bfloat16}, r"plain fails in bfloat16 \(.*\); try --dtype float32$"),
]


@pytest.mark.parametrize(("make_model", "options", "complaint"), REFUSED)
def test_a_model_that_no_policy_can_train_is_refused(make_model, options, complaint):
    with pytest.raises(UserError, match=complaint) as raised:
        choose(make_model(), **options)
    assert "\n" not in str(raised.value)


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


def test_a_pass_that_shares_little_takes_the_plain_path():
    policy, shapes = TreePolicy(small_model("llama")), []
    policy.max_share = 0.7
    apart = [random_ids(8, seed=seed) for seed in range(4)]
    policy.model.register_forward_hook(lambda *call: shapes.append(call[-1].logits.shape[:2]))
    for completions in (apart, apart[:1] * 4):
        policy(ragged_batch([[5], [6]], completions))
    assert shapes == [(4, 8), (1, 16)]


@BOTH
@torch.no_grad()
def test_tensors_are_made_on_the_device_of_the_model(kind):
    """`meta` stands for a GPU: tensors made on the default device cannot meet the others."""
    policy, prompts = kind(small_model("llama")), left_padded(PROMPTS[:2])
    [(_, batch)] = policy.micro_batches(ragged_batch(PROMPTS[:2], [SHARED, SHARED[:3]]))
    expected, (_, _, cache) = policy(batch), policy.prefill(*prompts)
    with torch.device("meta"):
        assert torch.equal(policy(batch), expected)
        policy.decode(cache, torch.tensor([3, 4], device="cpu"), torch.ones(2, device="cpu") > 0)
    assert cache.model_cache


@pytest.mark.parametrize(
    ("kind", "device", "dtype", "attention"),
    [
        (Policy, "cpu", torch.float32, "sdpa"),
        (Policy, "cpu", torch.bfloat16, "eager"),
        (Policy, "meta", torch.bfloat16, "sdpa"),
        (TreePolicy, "cpu", torch.float32, "eager"),
        (TreePolicy, "meta", torch.float32, "sdpa"),
    ],
    ids=str,
)
def test_attention_is_eager_where_that_is_faster(kind, device, dtype, attention):
    policy = kind(small_model("llama").to(device), dtype)
    assert policy.model.config._attn_implementation == attention


@pytest.mark.parametrize(("device", "nodes"), [("cpu", 640), ("meta", 2048)])
def test_trees_are_small_on_a_cpu(device, nodes):
    policy = TreePolicy(small_model("llama").to(device))
    assert (policy.max_nodes, policy.max_sampled) == (nodes, 32768)


def test_masks_have_the_compute_type_and_rows_of_multiples_of_8():
    policy = TreePolicy(small_model("llama"), torch.bfloat16)
    visible, depth = torch.ones(17, 17, dtype=torch.bool).tril(), torch.arange(17)
    mask = policy.attention_mask(visible, depth, depth)
    zeros, lowest = torch.zeros(1, 1, 17, 17), torch.finfo(torch.bfloat16).min
    assert torch.equal(mask, zeros.bfloat16().masked_fill(~visible, lowest))
    assert mask.stride() == (17 * 24, 17 * 24, 24, 1)


def test_full_memory_at_start_up_rules_no_policy_out():
    with pytest.raises(torch.OutOfMemoryError):
        choose(failing(torch.OutOfMemoryError("CUDA out of memory")))


def test_samples_at_start_up_have_full_length_and_one_seed():
    model, before = small_model("llama", vocabulary=4), torch.get_rng_state()
    # Nearly every sample holds token 0: as an end token it would be noticed.
    assert type(choose(model, prompts=[[3], [3, 3]])) is TreePolicy
    assert torch.equal(torch.get_rng_state(), before)


@BOTH
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
