"""Compare settings: train the bundled model with its preset and some settings changed.

    python benchmarks/ablation.py                       # losses and KL terms
    python benchmarks/ablation.py --study off_policy    # the same with four updates on each batch
    python benchmarks/ablation.py --study groups        # G = 2, 8 and 32, 512 completions per batch
    python benchmarks/ablation.py --study group_rates --first_seed 100 --seeds 2    # their rates
    python benchmarks/ablation.py --vary learning_rate=1e-5,2e-5 --seeds 5    # any setting

A run takes half the preset's problems per batch and 60 iterations, so that it ends before the task
is learned and variants can differ. All variants train with the same seeds, so they draw the same
problems. Prints two tables: the mean over the seeds, and the difference from the first variant,
paired by seed. Both give 95% t intervals of the mean. A difference whose interval includes 0 may be
noise.

Each run is a separate process with one thread; `--jobs 2` keeps two cores busy. Writes
ablation.json and ablation.png here (ablation_off_policy, ablation_learning_rate, ...), or to
--output. Runs that are already in the result file are not repeated.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import HERE, read_settings, write_result
from engine.cli import setting
from engine.files import METRICS_FILE, UserError, exit_code, read_json
from engine.metrics import validations
from engine.presets import PRESETS, parse_config
from plot_metrics import COLOURS, save_figure
from train_grpo import Config

LOSSES = {
    "GRPO": ["--loss_type=grpo"],
    "Dr. GRPO": ["--loss_type=dr_grpo", "--scale_rewards=none"],
    "DAPO's loss, clip-higher": ["--loss_type=dapo", "--epsilon_high=0.28"],
    # With the bounds of their authors: GRPO's would hardly ever bound a mean over tokens.
    "GSPO": ["--importance_level=sequence", "--epsilon=3e-4", "--epsilon_high=4e-4"],
    "GSPO's ratio, GRPO's bounds": ["--importance_level=sequence"],
    "CISPO": ["--loss_type=cispo", "--epsilon_high=4"],
    "standard deviation of the batch": ["--scale_rewards=batch"],
    "beta 0": ["--beta=0"],
    "k3_inverse": ["--kl_estimator=k3_inverse"],
    "corrected KL": ["--kl_correction=True"],
}
GROUPS = {size: [f"--num_generations={size}", f"--batch_size={512 // size}"] for size in (2, 8, 32)}
# The best of `group_rates` on other seeds, and the iterations that take as long as 60 of G = 32.
TUNED = "--learning_rate=2e-4"  # for each of them
EQUAL_SECONDS = {2: 6, 8: 20}
STUDIES = {
    "losses": LOSSES,
    "off_policy": {name: [*flags, "--num_inner_updates=4"] for name, flags in LOSSES.items()},
    "groups": {
        **{f"G = {size}": [*flags, TUNED] for size, flags in GROUPS.items()},
        **{
            f"G = {size}, {count} iterations": [*GROUPS[size], TUNED, f"--num_iterations={count}"]
            for size, count in EQUAL_SECONDS.items()
        },
    },
    "group_rates": {
        f"G = {size}, {rate}": [*flags, f"--learning_rate={rate}"]
        for size, flags in GROUPS.items()
        for rate in ("5e-5", "1e-4", "2e-4")
    },
}
BASE = ["--preset=tiny", "--batch_size=16"]
NOT_VARIED = {"preset", "output_dir", "resume", "seed"}  # the script sets these itself
GOAL = 0.9  # greedy validation accuracy
LAST = 50  # iterations whose median kl is recorded
# The 97.5% quantile of Student's t distribution with 1, 2, ... degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Runs = dict[str, dict]  # what `train` returns, by seed


class Measure(NamedTuple):
    """A column of the tables."""

    heading: str
    factor: float
    decimals: int


MEASURES = {
    "iterations": Measure(f"iterations to {GOAL:.0%}", 1, 0),
    "sampled": Measure("sampled, test (%)", 100, 1),
    "greedy": Measure("greedy, test (%)", 100, 1),
    "kl": Measure(f"kl, last {LAST}", 1, 3),
    "seconds": Measure("seconds of training", 1, 1),
}


@dataclass
class Settings:
    study: Literal["losses", "off_policy", "groups", "group_rates"] = setting(
        "losses", "what is compared"
    )
    vary: str = setting("", "setting=value,value,... to compare instead")
    seeds: int = setting(5, "runs of each variant", 1, len(T) + 1)
    first_seed: int = setting(0, "of the runs; tune on other seeds than those you report", 0)
    iterations: int = setting(60, "of each run", 1)
    eval_every: int = setting(20, "iterations between validations", 1)
    eval_problems: int = setting(512, "problems of a validation and of the test", 1)
    jobs: int = setting(1, "runs at a time", 1)
    output: str = setting("", "result file; by default it goes beside this script")


def read_vary(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the setting to vary, and the flags of each variant. Raises UserError."""
    name, _, values = text.partition("=")
    if name not in asdict(Config()) or name in NOT_VARIED:
        raise UserError(f"--vary {text}: {name!r} is no setting of train_grpo.py that can vary")
    if not values:
        raise UserError(f"--vary {text}: give the values too, as in --vary {name}=A,B")
    variants = {f"{name}={value}": [f"--{name}={value}"] for value in values.split(",")}
    for flags in variants.values():
        with redirect_stdout(None):
            # A bad value is an error before the first run.
            parse_config(Config, [*BASE, *flags])
    return name, variants


def iterations_to_goal(metrics: dict) -> int | None:
    """Iterations until the first validation that reaches GOAL; None if none does."""
    reached = (
        e["iteration"]
        for e in validations(metrics)
        if e["accuracies"]["greedy"]["accuracy"] >= GOAL
    )
    return next(reached, None)


def train(flags: list[str]) -> dict:
    """Train once. The test accuracies are those of the saved policy, the best by validation."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "train_grpo.py"), *BASE, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command.append(f"--output_dir={folder}")
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(flags)}: {done.stderr}")
        metrics = read_json(Path(folder) / METRICS_FILE)
    [*_, tested] = (e["accuracies"] for e in metrics["evaluations"] if e["split"] == "test")
    return {
        "iterations": iterations_to_goal(metrics),
        **{kind: tested[kind]["accuracy"] for kind in ("sampled", "greedy")},
        "kl": median(m["kl"] for m in metrics["iterations"][-LAST:]),
        "seconds": sum(m["seconds"] for m in metrics["iterations"]),
        "git_commit": metrics["environment"]["git_commit"],
    }


def train_all(settings: Settings, variants: dict[str, list[str]], output: Path) -> dict[str, Runs]:
    """Do the runs that `output` lacks, and write it after each. Returns all runs by variant.

    Raises UserError if the runs in `output` were done with other settings.
    """
    same = {name: getattr(settings, name) for name in ("iterations", "eval_every", "eval_problems")}
    same |= {"compared": settings.vary or settings.study, "first_seed": settings.first_seed}
    same |= {"preset": PRESETS["tiny"], "flags": BASE}
    found = read_json(output) if output.exists() else {"settings": same, "runs": {}}
    if found.get("settings") != same:
        other = found.get("settings", "other settings")
        raise UserError(f"{output} holds runs with {other}; delete it or name another")
    runs = {label: found["runs"].get(label, {}) for label in [*found["runs"], *variants]}
    seeds = [str(settings.first_seed + i) for i in range(settings.seeds)]
    missing = [(label, seed) for seed in seeds for label in variants if seed not in runs[label]]
    flags = [f"--num_iterations={settings.iterations}", f"--eval_every={settings.eval_every}"]
    flags.append(f"--eval_problems={settings.eval_problems}")
    with ThreadPoolExecutor(settings.jobs) as pool:
        todo = [[*flags, f"--seed={seed}", *variants[label]] for label, seed in missing]
        for (label, seed), result in zip(missing, pool.map(train, todo), strict=True):
            runs[label][seed] = result
            print(f"{label}, seed {seed}: {result}", flush=True)
            write_result(output, {"settings": same, "runs": runs})
    return {label: {seed: runs[label][seed] for seed in seeds} for label in variants}


def half_interval(values: list[float]) -> float:
    """Half the width of the 95% t interval of the mean of at least two values."""
    return T[len(values) - 2] * stdev(values) / len(values) ** 0.5


def values_of(runs: Runs, name: str, first: Runs | None = None) -> list[float]:
    """A measure of the runs that have it; minus that of `first` with the same seed, if given."""
    pairs = [(run[name], first[seed][name] if first else 0) for seed, run in runs.items()]
    return [ours - theirs for ours, theirs in pairs if None not in (ours, theirs)]


def cell(values: list[float], runs: int, measure: Measure, sign: str = "") -> str:
    """`mean ± half the interval`; with how many of the runs, if some have no value."""
    some = f"{len(values)} of {runs} runs"
    if not values:
        return some
    text = f"{measure.factor * fmean(values):{sign}z.{measure.decimals}f}"  # z: no -0
    if len(values) > 1:
        text += f" ± {measure.factor * half_interval(values):.{measure.decimals}f}"
    return text if len(values) == runs else f"{text} ({some})"


def tables(results: dict[str, Runs], names: list[str]) -> list[list[str]]:
    """The table of the means of these measures and that of the differences, lines of Markdown."""
    label, first = next(iter(results.items()))
    found = []
    for corner, compared, sign in (("variant", None, ""), (f"minus {label}", first, "+")):
        measures = [MEASURES[name] for name in names]
        rows = [[corner, *(m.heading for m in measures)], ["---"] * (1 + len(names))]
        for variant, runs in results.items():
            if runs is not compared:
                values = [values_of(runs, name, compared) for name in names]
                cells = zip(values, measures, strict=True)
                rows.append([variant, *(cell(v, len(runs), m, sign) for v, m in cells)])
        found.append([f"| {' | '.join(row)} |" for row in rows])
    return found


def draw(results: dict[str, Runs], picture: Path) -> None:
    """Time to the goal, and test accuracy: a dot per seed, the mean and its interval."""
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(results)), layout="constrained")
    time, accuracy = figure.subplots(1, 2, sharey=True)
    for axes, name, colour, marker, shift in (
        (time, "iterations", COLOURS[0], "o", 0.0),
        (accuracy, "sampled", COLOURS[2], "o", -0.2),
        (accuracy, "greedy", COLOURS[1], "s", 0.2),
    ):
        for row, runs in enumerate(results.values()):
            y, label = row + shift, None if row else name
            values = [MEASURES[name].factor * value for value in values_of(runs, name)]
            n = len(values)
            heights = [y + 0.2 * ((i + 0.5) / n - 0.5) for i in range(n)]  # so that equal ones show
            axes.plot(values, heights, marker, color=colour, ms=4, alpha=0.6, label=label)
            if n > 1:
                style = {"fmt": "|", "color": colour, "ms": 14, "capsize": 4}
                axes.errorbar(fmean(values), y, xerr=half_interval(values), **style)
        axes.grid(alpha=0.3)
    time.set_yticks(range(len(results)), results)
    time.invert_yaxis()  # the first variant on top
    # With few seeds an interval may end beyond what is possible.
    time.set_xlim(left=max(0, time.get_xlim()[0]))
    accuracy.set_xlim(right=min(100.5, accuracy.get_xlim()[1]))
    time.set_xlabel(f"iterations to {GOAL:.0%} greedy validation accuracy, where reached")
    accuracy.set_xlabel("test accuracy (% exact)")
    accuracy.legend()
    figure.suptitle("a dot per run; their mean with its 95% interval", fontsize=10)
    save_figure(figure, picture)


def main(argv: list[str] | None = None) -> int:
    settings = read_settings(Settings, __doc__, argv)
    name, variants = settings.study, STUDIES[settings.study]
    if settings.vary:
        name, variants = read_vary(settings.vary)
    ending = "" if name == "losses" else f"_{name}"
    output = Path(settings.output or HERE / f"ablation{ending}.json")
    results, picture = train_all(settings, variants, output), output.with_suffix(".png")
    for lines in tables(results, [*MEASURES]):
        print("\n".join(["", *lines]))
    draw(results, picture)
    print(f"\nwrote {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
