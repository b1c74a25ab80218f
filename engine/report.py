"""grpo_report.html: a run to look at, in one file that needs no server, no network and no library.

report.html is the page, here the data go into it. No torch, so that plot_metrics.py starts at once.
"""

import json
import math
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from engine.files import COMPLETIONS_FILE, finite, write_bytes

REPORT_FILE = "grpo_report.html"
PAGE = Path(__file__).with_name("report.html")
CURVES = ("reward", "accuracy", "kl", "entropy", "frac_zero_std_groups")
WINDOW = 50  # iterations in the moving averages
MOST_POINTS, MOST_GROUPS = 1000, 100  # so that the page of a long run still loads at once
RECIPE = "{preset}: {loss_type}, {batch_size} questions x {num_generations} completions, "
RECIPE += "{num_inner_updates} updates each, learning rate {learning_rate}, beta {beta}"


def facts(metrics: dict) -> dict[str, str]:
    """What the top of the page says of a run."""
    config, count = metrics.get("config", {}), len(metrics["iterations"])
    recipe = RECIPE.format_map(defaultdict(lambda: "?", config))
    found = {"model": config.get("model_name", "unknown"), "recipe": recipe}
    tests = [e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test"]
    for kind in ("sampled", "greedy"):
        parts = [[100 * test[kind][name] for name in ("accuracy", "low", "high")] for test in tests]
        texts = [f"{p:.1f}% ({low:.1f} to {high:.1f})" for p, low, high in parts]  # 95% interval
        found[f"test accuracy, {kind}"] = " → ".join([*texts, "not measured yet"][:2])
    return found | {
        "time": f"{metrics.get('seconds', 0):.0f} s, {count} iterations",
        "status": ": ".join(filter(None, map(metrics.get, ("status", "stop_reason")))),
        "saved policy": f"after iteration {metrics.get('best_iteration', '?')}",
    }


def moving_average(values: list, end: int) -> float | None:
    """The mean of the WINDOW values before `end`, without those that are None."""
    recent = [value for value in values[max(0, end - WINDOW) : end] if value is not None]
    return fmean(recent) if recent else None


def curves(iterations: list[dict]) -> dict[str, list]:
    """By name the drawn metrics and `mean_<name>`, their moving averages; `x`, the iterations."""
    count = len(iterations)
    x = list(range(count, 0, -math.ceil(count / MOST_POINTS))[::-1])
    found = {"x": x}
    for name in CURVES:
        values = [m.get(name) for m in iterations]  # None was NaN, or older code did not record it
        found[name] = [values[i - 1] for i in x]
        found[f"mean_{name}"] = [moving_average(values, i) for i in x]
    return found


def logged_groups(path: Path, parts: list[str]) -> list[dict]:
    """The whole lines of grpo_completions.jsonl; [] without one. A kill may leave half a line."""
    groups = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            group = json.loads(line)
            groups.append(group | {"completions": fold(group["completions"], parts)})
    return groups[:: math.ceil(len(groups) / MOST_GROUPS) or 1]


def fold(completions: list[dict], parts: list[str]) -> list[dict]:
    """Equal completions once, with their `count`; the parts of their reward go into one list."""
    folded: dict[tuple, dict] = {}
    for completion in completions:
        key = (completion["text"], *completion.get("token_texts", []))
        rest = {name: value for name, value in completion.items() if name not in parts}
        rest |= {"parts": [completion[part] for part in parts], "count": 0}
        folded.setdefault(key, rest)["count"] += 1
    return list(folded.values())


def write_report(runs: list[tuple[str, Path, dict]], output: Path) -> None:
    """Write grpo_report.html into `output`: one run in full, or the curves of several.

    runs: of each a label, its metrics file, and what that holds.
    """
    data = []
    for label, path, metrics in runs:
        history = metrics["iterations"]
        parts = [n.removeprefix("reward_") for n in history[0] if n.startswith("reward_")]
        groups = logged_groups(path.with_name(COMPLETIONS_FILE), parts) if len(runs) == 1 else []
        drawn = {"facts": facts(metrics), "curves": curves(history), "parts": parts}
        data.append(metrics | drawn | {"label": label, "groups": groups, "iterations": None})
    # Escaped, so that no text of a model can end the script that holds the data.
    text = json.dumps(finite({"runs": data}), separators=(",", ":")).replace("<", r"\u003c")
    page = PAGE.read_text(encoding="utf-8").replace("{{data}}", text)
    write_bytes(output / REPORT_FILE, page.encode())
