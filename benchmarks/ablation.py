"""Ablation: the bundled model trained with one setting of its preset changed at a time.

    python benchmarks/ablation.py              # three seeds of each setting, 300 iterations each
    python benchmarks/ablation.py --seeds 1    # a third of the time

Starts from the `tiny` preset and changes the learning rate, the KL term, its weight or the number
of inner updates. Prints a table, and writes ablation.json and ablation.png here, or to --output.
Runs that the result file holds are not repeated: delete it to start afresh.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import HERE, read_settings, write_result
from engine.checkpoint import read_json
from engine.cli import exit_code, setting
from plot_metrics import COLOURS, save_figure
from train_grpo import PRESETS, Config

AXES = {
    "learning_rate": [1e-7, 1e-6, 5e-6, 2e-5, 5e-5, 1e-4],
    "kl_estimator": ["k3", "k3_inverse"],
    "beta": [0.0, 0.04, 0.4],
    "num_inner_updates": [1, 2, 5],
}
LAST = 50  # iterations over which kl is averaged


@dataclass
class Settings:
    seeds: int = setting(3, "runs of each setting", 1)
    iterations: int = setting(300, "of each run", 1)
    output: str = setting("", "result file; by default it goes beside this script")


def run(flags: list[str]) -> dict:
    """Train once. Returns accuracy on the test problems before and after, and kl."""
    with TemporaryDirectory() as folder:
        script = HERE.parent / "train_grpo.py"
        command = [sys.executable, str(script), "--preset", "tiny", "--eval_every", "0", *flags]
        done = subprocess.run(
            [*command, "--output_dir", folder], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(flags)}: {done.stderr}")
        metrics = read_json(Path(folder) / "grpo_metrics.json")
    tested = [e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test"]
    kl = [m["kl"] for m in metrics["iterations"]]
    return {
        **{kind: tested[-1][kind]["accuracy"] for kind in ("sampled", "greedy")},
        "sampled_before": tested[0]["sampled"]["accuracy"],
        "kl": fmean(kl[-LAST:]),
        "kl_max": max(kl),
        "seconds": metrics["seconds"],
    }


def preset_value(axis: str):
    return PRESETS["tiny"].get(axis, getattr(Config, axis))


def run_all(settings: Settings, output: Path) -> dict[str, list[dict]]:
    """Run what `output` lacks, and write it after each run. Returns the runs by `axis=value`."""
    runs: dict[str, list[dict]] = {}
    if output.exists():
        known = read_json(output)
        runs = known["runs"] if known["iterations"] == settings.iterations else {}
    for seed in range(settings.seeds):
        for axis, values in AXES.items():
            for value in values:
                # The preset itself is a point on every axis; it runs only once.
                key = "preset" if value == preset_value(axis) else f"{axis}={value}"
                if len(runs.setdefault(key, [])) > seed:
                    continue
                flags = [f"--num_iterations={settings.iterations}", f"--seed={seed}"]
                runs[key].append(run(flags if key == "preset" else [*flags, f"--{key}"]))
                print(f"seed {seed}, {key}: {json.dumps(runs[key][-1])}", flush=True)
                write_result(output, {"iterations": settings.iterations, "runs": runs})
    return runs


def rows(runs: dict[str, list[dict]]):
    """Yield (axis, value, runs) in the order of AXES."""
    for axis, values in AXES.items():
        for value in values:
            yield axis, value, runs["preset" if value == preset_value(axis) else f"{axis}={value}"]


def print_table(runs: dict[str, list[dict]]) -> None:
    print(f"| setting | value | sampled, test | greedy, test | kl, last {LAST} | kl, largest |")
    print("|---|---|---|---|---|---|")
    for axis, value, some in rows(runs):
        print(table_line(axis, value, some))


def table_line(axis: str, value, some: list[dict]) -> str:
    """A line of the table: mean and range over the seeds."""
    cells = [f"`{axis}`", f"**{value}**" if value == preset_value(axis) else f"{value}"]
    for name, form in (("sampled", ".1%"), ("greedy", ".1%"), ("kl", ".3f"), ("kl_max", ".1f")):
        found = [once[name] for once in some]
        span = f" ({min(found):{form}} to {max(found):{form}})"
        cells.append(f"{fmean(found):{form}}{span}")
    return "| " + " | ".join(cells) + " |"


def draw(runs: dict[str, list[dict]], picture: Path) -> None:
    """A column per axis: accuracy above, kl below; a dot per run, a line through the means."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row")
    for column, (axis, values) in enumerate(AXES.items()):
        found = [some for at, _, some in rows(runs) if at == axis]
        for row, names in enumerate((("sampled", "greedy"), ("kl",))):
            axes = panels[row][column]
            for name, colour in zip(names, COLOURS, strict=False):
                means = [fmean(once[name] for once in some) for some in found]
                axes.plot(range(len(values)), means, color=colour, label=name)
                for x, some in enumerate(found):
                    dots = [once[name] for once in some]
                    axes.plot([x] * len(dots), dots, "o", color=colour, ms=3, alpha=0.6)
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.grid(alpha=0.3)
        panels[0][column].set_title(axis)
        panels[1][column].set_yscale("symlog", linthresh=1e-3)
    panels[0][0].set(ylabel="share right, test", ylim=(0, 1.02))
    panels[0][0].legend()
    panels[1][0].set_ylabel(f"kl, mean of the last {LAST}")
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    output = Path(settings.output or HERE / "ablation.json")
    runs = run_all(settings, output)
    print_table(runs)
    draw(runs, output.with_suffix(".png"))
    print(f"wrote {output} and {output.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
