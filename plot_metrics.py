"""Plot one run, or compare several: metrics files in, two PNGs and a page out.

    python plot_metrics.py                            # redraw the plots of the last run
    python plot_metrics.py runs/*/grpo_metrics.json   # overlay runs to compare them

Writes grpo_training_curve.png (reward and accuracy), grpo_kl_divergence.png and grpo_report.html,
which replays a run in the browser, next to the metrics file, or to --output_dir (with several
files: the current folder by default).
"""

import io
import sys
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure  # not pyplot, which may look for a display

from engine.files import METRICS_FILE, ScriptParser, UserError, exit_code, read_json, write_bytes
from engine.report import REPORT_FILE, WINDOW, moving_average, write_report

PLOT_FILES = ("grpo_training_curve.png", "grpo_kl_divergence.png")
# Okabe and Ito's colours: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
OFF_TASK = COLOURS[3]


def read_metrics(path: Path) -> dict:
    """Read the metrics of a run. Raises UserError if the file lacks them, or has none yet."""
    metrics = read_json(path)
    if not all(isinstance(metrics.get(name), list) for name in ("iterations", "evaluations")):
        raise UserError(f"{path} is not a metrics file of train_grpo.py")
    if not metrics["iterations"]:
        raise UserError(f"{path} holds no iteration yet; train longer")
    return metrics


def series(metrics: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a metric's raw values and their moving average over the last WINDOW iterations."""
    values = [m[name] for m in metrics["iterations"]]
    means = [moving_average(values, end + 1) for end in range(len(values))]
    return np.array(values, dtype=float), np.array(means, dtype=float)


def draw_series(axes, metrics: dict, name: str, colour: str, label: str, faint: bool) -> None:
    """Draw a metric's moving average and, if `faint`, its raw values in a faint line."""
    raw, smooth = series(metrics, name)
    x = np.arange(1, len(raw) + 1)
    if faint:
        axes.plot(x, raw, color=colour, alpha=0.2, linewidth=0.7)
    # Dashed: with k3, kl_penalty equals kl and would hide it.
    line = "--" if name == "kl_penalty" else "-"
    axes.plot(x, smooth, line, color=colour, linewidth=1.8, label=label)


def draw_evaluations(axes, metrics: dict, kind: str, colour: str, marker: str, label: str) -> None:
    """Draw validation accuracies with their 95% intervals."""
    found = [e for e in metrics["evaluations"] if e["split"] == "validation"]
    if not found:
        return
    names = "accuracy", "low", "high"
    y, low, high = np.array([[e["accuracies"][kind][n] for n in names] for e in found]).T
    style = {"fmt": marker, "color": colour, "markersize": 4.5, "capsize": 2, "linewidth": 1}
    x = [e["iteration"] for e in found]
    axes.errorbar(x, y, yerr=[y - low, high - y], label=label, **style)


def draw_watched(axes, metrics: dict) -> None:
    """Draw what reveals reward hacking and forgetting, where the metrics have it."""
    history = metrics["iterations"]
    names = {"entropy": "entropy (nats per token)", "truncated": "share truncated"}
    parts = [name for name in history[0] if name.startswith("reward_")]
    names |= {name: name.removeprefix("reward_") + " (part of the reward)" for name in parts}
    colours = cycle(c for c in COLOURS if c != OFF_TASK)
    for colour, (name, label) in zip(colours, names.items(), strict=False):
        if all(type(m.get(name)) is float for m in history):
            draw_series(axes, metrics, name, colour, label, faint=name not in parts)
    draw_off_task(axes, metrics, "accuracy")
    axes.set(xlabel="iteration", ylabel="share, or nats per token")
    axes.set_ylim(bottom=0)


def draw_off_task(axes, metrics: dict, name: str) -> None:
    """Draw one number of `evaluate_off_task`, where the evaluations have it."""
    points = [(e["iteration"], e.get("off_task", {}).get(name)) for e in metrics["evaluations"]]
    points = [point for point in points if type(point[1]) is float]
    if points:
        style = {"color": OFF_TASK, "markersize": 4, "label": f"off-task {name}"}
        axes.plot(*zip(*points, strict=True), "D", **style)


def save_figure(figure, path: Path) -> None:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_bytes(path, png.getvalue())


def draw_curves(runs: list[dict], labels: list[str]) -> Figure:
    """Reward and accuracy: of one run in full, or of several overlaid."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    reward, accuracy = figure.subplots(1, 2)
    if len(runs) == 1:
        [run], mean = runs, f"mean of {WINDOW} iterations"
        draw_series(reward, run, "reward", COLOURS[0], mean, faint=True)
        draw_series(accuracy, run, "accuracy", COLOURS[0], "training, sampled", faint=True)
        draw_evaluations(accuracy, run, "sampled", COLOURS[2], "o", "validation, sampled")
        draw_evaluations(accuracy, run, "greedy", COLOURS[1], "s", "validation, greedy")
        for e in run["evaluations"][:1]:
            base = e["accuracies"]["sampled"]["accuracy"]
            accuracy.axhline(base, color="0.35", linestyle="--", linewidth=1, label="base, sampled")
        if type(run.get("best_iteration")) is int:
            style = {"color": COLOURS[6], "linestyle": ":", "linewidth": 1}
            accuracy.axvline(run["best_iteration"], label="saved policy", **style)
        if run.get("stop_reason"):
            ending = f"{run.get('status')}: {run['stop_reason']}"
            figure.suptitle(ending[:120], fontsize=10, parse_math=False)
    else:
        for colour, run, label in zip(cycle(COLOURS), runs, labels, strict=False):
            draw_series(reward, run, "reward", colour, label, faint=False)
            draw_series(accuracy, run, "accuracy", colour, label, faint=False)
            draw_evaluations(accuracy, run, "greedy", colour, "s", f"{label}, greedy")
    # The weights are the user's: rewards may go below 0 or beyond 1.
    reward.set(xlabel="iteration", ylabel="reward per completion")
    low, high = reward.get_ylim()
    reward.set_ylim(min(0, low), max(1.02, high))
    accuracy.set(xlabel="iteration", ylabel="share of exact answers", ylim=(0, 1.02))
    reward.legend(loc="lower right")
    accuracy.legend(loc="best")
    return figure


def draw_kl(runs: list[dict], labels: list[str]) -> Figure:
    """KL of one run, and what else to watch; or `kl` of several runs."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    if len(runs) == 1:
        [run], (axes, watched) = runs, figure.subplots(1, 2)
        draw_off_task(axes, run, "kl")
        draw_series(axes, run, "kl", COLOURS[0], "kl (published estimator)", faint=True)
        draw_series(axes, run, "kl_penalty", COLOURS[1], "kl_penalty (in the loss)", faint=True)
        draw_watched(watched, run)
        watched.legend(loc="center right")
    else:
        axes = figure.subplots()
        for colour, run, label in zip(cycle(COLOURS), runs, labels, strict=False):
            draw_series(axes, run, "kl", colour, f"{label}, kl (published estimator)", faint=False)
    axes.set(xlabel="iteration", ylabel="KL from the reference (nats per token)")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
    return figure


def draw(paths: list[Path], output: Path) -> None:
    """Write two plots and the report of the metrics files `paths` into `output`."""
    runs = [read_metrics(path) for path in paths]
    names = [str(path.parent) if str(path.parent) != "." else path.stem for path in paths]
    labels = [name.replace("$", r"\$") for name in names]  # a pair of $ would start a formula
    output.mkdir(parents=True, exist_ok=True)
    write_report(list(zip(names, paths, runs, strict=True)), output)
    style = {"axes.grid": True, "grid.alpha": 0.3, "font.size": 10, "legend.fontsize": 8.5}
    with matplotlib.rc_context(style):
        for name, draw_figure in zip(PLOT_FILES, (draw_curves, draw_kl), strict=True):
            save_figure(draw_figure(runs, labels), output / name)


def main(argv: list[str] | None = None) -> int:
    parser = ScriptParser(__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=[Path(METRICS_FILE)])
    parser.add_argument("--output_dir", type=Path, help="folder for the plots")
    args = parser.parse_args(argv)
    output = args.output_dir or (args.files[0].parent if len(args.files) == 1 else Path("."))
    try:
        draw(args.files, output)
    except OSError as error:
        raise UserError(f"cannot write to {output}: {error.strerror}") from error
    print("wrote " + ", ".join(str(output / name) for name in (*PLOT_FILES, REPORT_FILE)))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
