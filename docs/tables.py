"""The tables and numbers of the pages, from the committed results. Each returns Markdown."""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean, median

import figures
from figures import RESULTS, accuracy_of, committed, lesson_run, part_of, short
from one_iteration import table
from safetensors.numpy import load_file

from benchmarks import ablation, vs_trl
from engine.files import COMPLETIONS_FILE, ROOT
from engine.metrics import best_iteration, validations
from engine.presets import PRESETS
from train_grpo import Config


def percent(share: float) -> str:
    return f"{share:.1%}"


# Results of runs


def tested(run: str, kind: str) -> list[dict]:
    """The accuracies on the test problems, before and after."""
    found = [e["accuracies"] for e in committed(run)["evaluations"] if e["split"] == "test"]
    return [accuracies[kind] for accuracies in found]


def result_table(runs: dict[str, str]) -> str:
    """A row per run; its label is filled in from its settings."""
    header = ["run", "sampled, before", "sampled, after (95% interval)", "greedy, before"]
    header += ["greedy, after (95% interval)", "kl, median", "kl, largest mean of 50 iterations"]
    header += ["batches with kl over 2", "time", "memory"]
    rows = []
    for run, label in runs.items():
        metrics = committed(run)
        cells = [label.format(**metrics["config"])]
        for kind in ("sampled", "greedy"):
            before, after = tested(run, kind)
            interval = f"({after['low']:.1%} to {after['high']:.1%})"
            cells += [percent(before["accuracy"]), f"{after['accuracy']:.1%} {interval}"]
        kl = [m["kl"] for m in metrics["iterations"]]
        means = [fmean(kl[i : i + 50]) for i in range(len(kl) - 49)]
        cells += [f"{median(kl):.2f}", f"{max(means):.2f}", sum(k > 2 for k in kl)]
        rows.append(
            [*cells, f"{metrics['seconds']:.0f} s", f"{metrics['peak_memory_mib']:.0f} MiB"]
        )
    return table(header, rows)


def smollm2_headline() -> str:
    runs, shares = [run for run in SMOLLM2_RUNS if "seed" in run], []
    for kind in ("sampled", "greedy"):
        accuracies = [[a["accuracy"] for a in tested(run, kind)] for run in runs]
        ends = " and ".join(f"{after:.0%}" for _, after in accuracies)
        shares.append(f"from {accuracies[0][0]:.0%} to {ends}")
    minutes = " and ".join(f"{committed(run)['seconds'] / 60:.0f}" for run in runs)
    sampled, greedy = shares
    return (
        f"{sampled} of the test problems sampled (two seeds), {greedy} greedy, in {minutes} minutes"
    )


def pass_at(file: str) -> dict[str, str]:
    """What `evaluate.py --num_samples 64` printed, by k."""
    return dict(re.findall(r"pass@(\d+) +(.*%)", (RESULTS / "smollm2" / file).read_text()))


def smollm2_pass_at_k() -> str:
    base, trained = pass_at("base_pass_at_k.txt"), pass_at("trained_pass_at_k.txt")
    rows = [[k, base[k], trained[k]] for k in ("1", "4", "16", "64")]
    return table(["k", "pass@k, before", "pass@k, after"], rows)


def validations_by_time(run: str) -> list[tuple[float, dict]]:
    """The validations of a run, with the seconds from the start of the process until their end."""
    metrics, found, evaluating = committed(run), [], 0.0
    for e in metrics["evaluations"]:
        evaluating += e["seconds"]
        training = sum(m["seconds"] for m in metrics["iterations"][: e["iteration"]])
        if e["split"] == "validation":
            found.append((metrics["set_up_seconds"] + training + evaluating, e))
    return found


def smollm2_minutes() -> str:
    rows = []
    for run, label in SMOLLM2_RUNS.items():
        for seconds, e in validations_by_time(run):
            shares = [percent(accuracy_of(kind, e)) for kind in KINDS[1:]]
            name = label.format(**committed(run)["config"])
            rows.append([name, e["iteration"], f"{seconds / 60:.1f}", *shares])
    return table(["run", "iteration", "minutes", "validation, sampled", "greedy"], rows)


def tiny_records() -> str:
    """Seconds until the end of the first validation that shows a greedy accuracy, by seed."""
    rows = []
    for level in (0.9, 0.97):
        reached = []
        for run in TINY_RECORDS:
            seen = validations_by_time(run)
            reached += [next((t for t, e in seen if accuracy_of("greedy", e) >= level), None)]
        seconds = ", ".join("not reached" if t is None else f"{t:.0f}" for t in reached)
        rows.append([f"{level:.0%}", seconds])
    return table(["level", "seconds, seeds 0, 1, 2"], rows)


def smollm2_trials() -> str:
    """A row per trial: its settings, and sampled validation accuracy by completions sampled."""
    rows = []
    for trial in json.loads((RESULTS / "smollm2" / "trials.json").read_text())["trials"]:
        settings = trial["settings"]
        size = settings["batch_size"] * settings["num_generations"]
        shape = f"{settings['batch_size']} x {settings['num_generations']}"
        other = "" if settings["loss_type"] == "grpo" else settings["loss_type"]
        other += ", no scaling" if settings["scale_rewards"] == "none" else ""
        curve = [e for e in trial["evaluations"] if e["split"] == "validation"][1:]
        shares = (f"{e['sampled']:.1%} ({e['iteration'] * size / 1000:.0f}k)" for e in curve)
        tests = [e for e in trial["evaluations"] if e["split"] == "test"]
        test = f"{tests[-1]['sampled']:.1%}, {tests[-1]['greedy']:.1%}" if tests[1:] else ""
        rate = f"{short(settings['learning_rate'])}, {settings['num_iterations']}"
        rows.append([shape, rate, other, ", ".join(shares), test])
    header = ["problems x completions", "rate, iterations", "loss"]
    header += ["validation, sampled (after completions)", "test, sampled and greedy"]
    return table(header, rows)


def warm_up() -> str:
    """Sampled validation accuracy of seed 1 after 25 to 100 iterations, by what was changed."""
    runs = {"nothing": "smollm2/linear1", "the rate rises at first": "smollm2/seed1"}
    curves = {
        label: {e["iteration"]: accuracy_of("sampled", e) for e in validations(committed(run))}
        for label, run in runs.items()
    }
    for trial in json.loads((RESULTS / "smollm2" / "trials_cpu.json").read_text())["trials"]:
        found = {e["iteration"]: e["sampled"] for e in validations(trial)}
        curves[f"{trial['changed']}, stopped"] = found
    iterations = (25, 50, 75, 100)
    rows = [
        [label, *(percent(curve[i]) if i in curve else "" for i in iterations)]
        for label, curve in curves.items()
    ]
    return table(["changed", *map(str, iterations)], rows)


def constant_rate() -> str:
    first, *later = validations(committed("smollm2/constant_rate"))
    shares = [f"{e['accuracies']['sampled']['accuracy']:.1%} after {e['iteration']}" for e in later]
    return " and ".join(shares) + " iterations"


def presets() -> str:
    """A row for each setting in which the presets differ."""
    values = {name: {**asdict(Config()), **preset} for name, preset in PRESETS.items()}
    rows = []
    for setting in sorted(set().union(*PRESETS.values()), key=list(WHY).index):
        texts = (str(preset[setting]) for preset in values.values())
        shown = [f"`{text}`" if "<" in text else text for text in texts]
        rows.append([f"`{setting}`", *shown, WHY[setting]])
    return table(["setting", *(f"`{name}`" for name in PRESETS), "why"], rows)


WHY = {
    "model_name": "the recipe's model; a smaller real one; the bundled one",
    "rewards": "SmolLM2 writes its steps before the answer",
    "system_prompt": "",
    "num_examples": "without worked examples SmolLM2 never writes the tags",
    "show_steps": "asked for its steps, SmolLM2 is right four times as often",
    "learning_rate": "small models barely move at 1e-7",
    "lr_schedule": "a rate that falls to 0 ends better; a warm-up keeps entropy for longer",
    "beta": "without a KL term no pass reads completions without signal",
    "batch_size": "a higher rate needs a steadier gradient",
    "num_generations": "shared prefixes make large groups cheap",
    "max_new_tokens": "room for the steps",
    "num_iterations": "small models at a high rate need fewer",
    "num_inner_updates": "fewer updates on more samples",
    "kl_estimator": "the recipe's; the paper's",
    "eval_every": "its iterations take longer",
    "dtype": "bfloat16 halves SmolLM2's time on a CPU",
}


# Benchmarks

ABLATED = ["iterations", "sampled", "greedy", "kl"]  # other programs ran beside these studies


def benchmark(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())


def phases(name: str) -> str:
    """Seconds by phase of an iteration, by either policy, from a file of gpu.py."""
    rows = []
    for run in benchmark(name)["runs"]:
        cells = [f"{seconds:.3f}" for seconds in run["seconds"].values()]
        memory, mismatch = f"{run['memory_mib']:,.0f} MiB", f"{run['logprob_mismatch']:.1g}"
        rows.append([run["preset"], run["policy"], *cells, memory, mismatch])
    header = ["preset", "policy", *benchmark(name)["runs"][0]["seconds"], "memory"]
    return table([*header, "`logprob_mismatch`"], rows)


def study(name: str, part: int, measures: list[str] = ABLATED) -> str:
    """The means (0) or the differences (1) of an ablation."""
    return "\n".join(ablation.tables(benchmark(name)["runs"], measures)[part])


def variant_differences() -> str:
    """Test accuracy of each variant minus GRPO's, with two and with four updates per batch."""
    header, rows = ["variant"], [[name] for name in [*ablation.LOSSES][1:]]
    for name, updates in (("ablation", "two"), ("ablation_off_policy", "four")):
        header += [f"{kind}, {updates} updates" for kind in KINDS[1:]]
        lines = ablation.tables(benchmark(name)["runs"], [*KINDS[1:]])[1][2:]
        for row, line in zip(rows, lines, strict=True):
            row += line.strip("| ").split(" | ")[1:]
    return table(header, rows)


def trl() -> str:
    header = ["model", "batch", "completions", "this loop", "TRL", "ratio (by round)"]
    header += ["memory, this loop", "memory, TRL"]
    rows = []
    for ending in ("", "_smollm2", "_worst_case"):
        found = benchmark(f"vs_trl{ending}")
        work, by_round = found["work"], found["ratio_by_round"]
        shape = f"{work['batch_size']} x {work['num_generations']}"
        cells = ["SmolLM2-135M, bfloat16" if "smollm2" in ending else "bundled, float32"]
        cells += [f"{shape}, {work['num_inner_updates']} updates"]
        cells += ["worst case" if work["endless"] else "natural"]
        cells += [f"{found[loop]['seconds']:.3g} s" for loop in ("ours", "trl")]
        cells.append(f"{found['ratio']:.1f} ({min(by_round):.1f} to {max(by_round):.1f})")
        cells += [f"{found[loop]['peak_memory_mib']:,.0f} MiB" for loop in ("ours", "trl")]
        rows.append(cells)
    return table(header, rows)


def trl_accuracy() -> str:
    names = [f"{what}, {loop}" for what in KINDS for loop in ("this loop", "TRL")]
    found, rows = benchmark("vs_trl_accuracy"), []
    for points in zip(found["ours"], found["trl"], strict=True):
        cells = [f"{points[0]['seconds']:.0f}", *(point["iterations"] for point in points)]
        for kind in ("sampled", "greedy"):
            cells += [percent(point["accuracies"][kind]["accuracy"]) for point in points]
        rows.append(cells)
    return table(["seconds of training", *names], rows)


KINDS = ("iterations", "sampled", "greedy")


def growth() -> str:
    """A row per point: seconds and memory of the tree, the plain policy and TRL."""
    found, rows = benchmark("vs_trl_growth"), []
    for name in vs_trl.GROWTH:
        for point in found[name]:
            loops = [point[loop] for loop in vs_trl.POLICIES]
            cells = [f"{loop['seconds']:.3g} s" for loop in loops]
            cells += [f"{loop['peak_memory_mib']:,.0f} MiB" for loop in loops]
            rows.append([f"`{name}` {point[name]}", *cells])
    header = [f"{policy}{what}" for what in ("", ", memory") for policy in vs_trl.POLICIES.values()]
    return table(["", *header], rows)


def roofline() -> str:
    models = benchmark("roofline"), benchmark("roofline_smollm2")
    header = [f"{m}, {what}" for m in ("bundled", "SmolLM2") for what in ("floor", "actual")]
    header = ["phase", *header[:2], "ratio", *header[2:], "ratio"]
    rows = []
    for phase in models[0]["seconds"]:
        cells = [phase]
        for found in models:
            actual, floor = found["seconds"][phase], found["floor"].get(phase, {}).get("shapes")
            cells += [f"{floor:.3f} s" if floor else "", f"{actual:.3f} s"]
            cells.append(f"{actual / floor:.1f}" if floor else "")
        rows.append(cells)
    return table(header, rows)


def scaling() -> str:
    header = ["processes", "problems", "scaling", "seconds", "efficiency", "MB sent"]
    rows = []
    for run in benchmark("distributed")["runs"]:
        cells = [run[name] for name in ("processes", "batch_size", "scaling")]
        cells += [f"{run['seconds']:.3f}", f"{run['efficiency']:.2f}"]
        cells += [f"{run['mb_sent_per_process']:,.0f}", f"{run['allreduce_alone']:.3f} s"]
        rows.append(cells)
    return table([*header, "all-reduce alone"], rows)


# healthy.md


def mean(run: str, name: str, first: int, last: int) -> float:
    """The mean of a metric over the iterations first to last."""
    return fmean(m[name] for m in committed(run)["iterations"][first - 1 : last])


def changed(run: str, base: str) -> str:
    """The flags that made a run another one than its base."""
    ours, theirs = committed(run)["config"], committed(base)["config"]
    flags = {n: v for n, v in ours.items() if v != theirs[n] and n != "output_dir"}
    return " ".join(f"`--{n} {short(v)}`" for n, v in flags.items())


def group_table(groups: dict[str, tuple[str, int]]) -> str:
    """The most frequent completions of logged groups: a run and its iteration by label."""
    rows = []
    for label, (run, iteration) in groups.items():
        lines = (RESULTS / run / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
        [group] = [g for g in map(json.loads, lines) if g["iteration"] == iteration]
        said = Counter((c["text"], c["advantage"]) for c in group["completions"])
        texts = [f"{n} x `{text}` ({adv:+.2f})" for (text, adv), n in said.most_common(3)]
        rows.append([label, iteration, group["question"], group["answer"], ", ".join(texts)])
    return table(["run", "iteration", "question", "answer", "completions (advantage)"], rows)


def healthy_means() -> str:
    names = ("reward", "accuracy", "kl", "entropy", "frac_zero_std_groups", "truncated")
    names += ("completion_length",)
    windows = [("good", 1), ("good", 251), ("rate too high", 151), ("rate too high", 251)]
    windows += [("no signal", 251), ("truncation", 251)]
    rows = []
    for label, first in windows:
        run = "healthy/" + label.replace(" ", "_")
        means = [mean(run, name, first, first + 49) for name in names]
        cells = ["< 0.001" if 0 < value < 0.001 else f"{value:.2f}" for value in means]
        rows.append([label, changed(run, "healthy/good"), f"{first} to {first + 49}", *cells])
    return table(["run", "flags", "iterations", *(f"`{name}`" for name in names)], rows)


def healthy_losses() -> str:
    windows = [("good", 1, 1), ("good", 251, 300), ("rate_too_high", 1, 1), ("one_update", 1, 300)]
    rows = []
    for name, first, last in windows:
        run = f"healthy/{name}"
        loss, penalty, clipped = (
            mean(run, metric, first, last) for metric in ("loss", "kl_penalty", "clip_fraction")
        )
        shown = f"{loss:,.0f}" if loss > 100 else f"{loss:.4f}"
        when = f"{first} to {last}" if last > first else first
        cells = [shown, f"{committed(run)['config']['beta'] * penalty:.4f}", percent(clipped)]
        rows.append([name.replace("_", " "), changed(run, "healthy/good"), when, *cells])
    header = ["run", "flags", "iterations", "loss", "`beta` x `kl_penalty`", "`clip_fraction`"]
    return table(header, rows)


def broken_at() -> str:
    """The iteration from which on every completion of the run is truncated and earns nothing."""
    history = committed("healthy/rate_too_high")["iterations"]
    healthy = [i for i, m in enumerate(history, 1) if m["truncated"] < 1 or m["reward"] > 0]
    return str(healthy[-1] + 1)


BYTES = 20  # per parameter: weight 4, gradient 4, Adam's moments 8, reference and cast weights 4
FITS = {0.5: "24 GB card", 1.5: "48 GB card", 7: "no single 80 GB card"}  # with activations


def memory_measured() -> str:
    weights = load_file(ROOT / "tiny_model" / "model.safetensors")
    bundled = sum(tensor.size for tensor in weights.values())
    rows = []
    for model, parameters, run in (
        ("bundled, float32", bundled, "tiny/seed0"),
        ("SmolLM2-135M, bfloat16", 134_515_008, "smollm2/seed1"),
    ):
        formula, peak = parameters * BYTES / 2**20, committed(run)["peak_memory_mib"]
        rows.append([model, f"{parameters / 1e6:,.2f}M", f"{formula:,.0f} MiB", f"{peak:,.0f} MiB"])
    return table(["model", "parameters", "by formula", "peak, measured"], rows)


def memory_computed() -> str:
    rows = [[f"{n:g}B", *(f"{b * n:.0f} GB" for b in (16, 4, BYTES)), FITS[n]] for n in FITS]
    header = ["size", "weights, gradients, Adam", "reference, cast", "together"]
    return table([*header, "fits, with room for activations"], rows)


# lessons.md


def judges() -> str:
    rows = []
    for run in ("last_number", "substring", "within_10", "within_1", "exact"):
        first, *_, last = validations(lesson_run(run))
        [rule] = [part for part, weight in lesson_run(run)["reward_weights"].items() if weight]
        earned = [f"{part_of(p)(first):.1%} to {part_of(p)(last):.1%}" for p in (rule, "exact")]
        rows.append([f"`{rule}`", *earned])
    header = ["rule that trains", "answers that earn it, before to after"]
    return table([*header, "answers that earn `exact`"], rows)


def forgetting() -> str:
    """Medians and means over the end of each run: 50 iterations, five validations."""
    rows = []
    for metrics in map(lesson_run, sum(figures.FORGETTING, [])):
        config, last = metrics["config"], validations(metrics)[-5:]
        kl = median(m["kl"] for m in metrics["iterations"][-50:])
        off_task = fmean(e["off_task"]["accuracy"] for e in last)
        kinds = [fmean(accuracy_of(kind, e) for e in last) for kind in ("sampled", "greedy")]
        cells = [short(config["learning_rate"]), config["seed"], short(config["beta"]), f"{kl:.2f}"]
        rows.append([*cells, *map(percent, (off_task, *kinds))])
    header = ["learning rate", "seed", "`beta`", "`kl`, median", "off-task sums right"]
    return table([*header, "sampled", "greedy"], rows)


def stopping() -> str:
    """Where flags would have ended runs, by the trainer's own rule."""
    all_flags = {"none": {}} | {f"`{flag}`": settings for flag, settings in figures.STOPS.items()}
    cases = [(run, flag) for run in figures.PAST_BEST.values() for flag in all_flags]
    rows = []
    for run, flag in [("base_s0", "none"), *cases, ("lr5e-4_beta0_s0", "none")]:
        seen = figures.stopped(lesson_run(run), **all_flags[flag])
        best, first, last = best_iteration(seen), seen["evaluations"][0], seen["evaluations"][-1]
        [saved] = [e for e in seen["evaluations"] if e["iteration"] == best]
        accuracies = [percent(accuracy_of("sampled", e)) for e in (first, saved, last)]
        label = changed(f"lessons/{run}", "lessons/base_s0") or "the recipe"
        cells = [label, flag, len(seen["iterations"]), best, *accuracies]
        rows.append([*cells, percent(last["off_task"]["accuracy"])])
    header = ["run", "stop", "ends at", "policy saved at", "accuracy, base model", "saved policy"]
    return table([*header, "last policy", "off-task sums, last policy"], rows)


def bases() -> str:
    rows = []
    for label, (base, name) in figures.BASES.items():
        run, solved = f"lessons/{name}", figures.pass_at_of(base)
        shares = [solved[k] for k in ("1", "8", "64")]
        shares += [tested(run, kind)[-1]["accuracy"] for kind in ("sampled", "greedy")]
        shares += [mean(run, "frac_zero_std_groups", 1, 50)]
        rows.append([label, *map(percent, shares), f"{mean(run, 'entropy', 1, 10):.2f}"])
    header = ["pre-trained", "pass@1", "pass@8", "pass@64", "sampled, after", "greedy, after"]
    return table([*header, "equal groups, iterations 1 to 50", "entropy, 1 to 10"], rows)


def tasks() -> str:
    rows = []
    for label, run in figures.TASKS.items():
        solved = pass_at("spelling/base_pass_at_k.txt" if "spell" in run else "base_pass_at_k.txt")
        config, history = committed(run)["config"], committed(run)["iterations"]
        sampled = config["batch_size"] * config["num_generations"]
        right = round(sum(m["accuracy"] for m in history) * sampled)
        equal = fmean(m["frac_zero_std_groups"] for m in history)
        test = [percent(a["accuracy"]) for a in tested(run, "sampled")]
        trained = f"{right:,} of {sampled * len(history):,}"
        rows.append([label, solved["1"], solved["64"], *test, trained, percent(equal)])
    header = ["task", "pass@1, before", "pass@64, before", "sampled, before", "sampled, after"]
    return table([*header, "exact in training", "groups with equal rewards"], rows)


def letters() -> str:
    """The share of right letters in the first and the last ten iterations of spelling."""
    end = len(committed("smollm2/spelling")["iterations"])
    windows = (1, 10), (end - 9, end)
    return " to ".join(
        f"{mean('smollm2/spelling', 'reward_letters', *window):.0%}" for window in windows
    )


SMOLLM2_RUNS = {f"smollm2/seed{n}": "seed {seed}" for n in range(2)}
SMOLLM2_RUNS |= {f"smollm2/linear{n}": "seed {seed}, no warm-up" for n in range(2)}
TINY_RECORDS = [f"records/tiny{n}" for n in range(3)]
OWN_PROBLEMS = {f"reasoning/seed{n}": "reasoning, seed {seed}" for n in range(2)}
OWN_PROBLEMS |= {"spelling": "spelling, seed {seed}"}
HEALTHY_GROUPS = {
    "good": ("healthy/good", 275),
    "rate too high": ("healthy/rate_too_high", 200),
    "no signal": ("healthy/no_signal", 275),
    "truncation": ("healthy/truncation", 275),
}
JUDGED_GROUPS = {f"`{run}`": (f"lessons/{run}", 100) for run in ("last_number", "within_10")}
# What stands between the markers of a page, by the name in the marker.
GENERATED: dict[str, Callable[[], str]] = {
    "tiny_runs": lambda: result_table({f"tiny/seed{n}": "seed {seed}" for n in range(3)}),
    "gpu_tiny_runs": lambda: result_table({f"gpu/tiny{n}": "seed {seed}" for n in range(3)}),
    "smollm2_runs": lambda: result_table(SMOLLM2_RUNS),
    "smollm2_minutes": smollm2_minutes,
    "tiny_records": tiny_records,
    "smollm2_trials": smollm2_trials,
    "gpu_phases": lambda: phases("gpu"),
    "cpu_phases": lambda: phases("cpu"),
    "growth": growth,
    "reference_run": lambda: result_table({"tiny_reference": "learning rate {learning_rate}"}),
    "own_problem_runs": lambda: result_table(OWN_PROBLEMS),
    "presets": presets,
    "smollm2_headline": smollm2_headline,
    "smollm2_pass_at_k": smollm2_pass_at_k,
    "warm_up": warm_up,
    "constant_rate": constant_rate,
    "losses_means": lambda: study("ablation", 0),
    "losses_differences": lambda: study("ablation", 1),
    "off_policy_means": lambda: study("ablation_off_policy", 0),
    "off_policy_differences": lambda: study("ablation_off_policy", 1),
    "group_means": lambda: study("ablation_groups", 0, [*ablation.MEASURES]),
    "group_differences": lambda: study("ablation_groups", 1, [*ablation.MEASURES]),
    "variant_differences": variant_differences,
    "group_rates": lambda: study("ablation_group_rates", 0, ["sampled", "greedy", "seconds"]),
    "trl": trl,
    "trl_accuracy": trl_accuracy,
    "roofline": roofline,
    "scaling": scaling,
    "healthy_means": healthy_means,
    "healthy_groups": lambda: group_table(HEALTHY_GROUPS),
    "healthy_losses": healthy_losses,
    "broken_at": broken_at,
    "memory_measured": memory_measured,
    "memory_computed": memory_computed,
    "judges": judges,
    "judged_groups": lambda: group_table(JUDGED_GROUPS),
    "forgetting": forgetting,
    "stopping": stopping,
    "bases": bases,
    "tasks": tasks,
    "letters": letters,
}
