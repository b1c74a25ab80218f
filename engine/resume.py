"""Which run is resumed, and whether it may be: what its checkpoint and the new start must share."""

from pathlib import Path

from torch import Tensor

from engine import files
from engine.checkpoint import CHECKPOINTS, checkpoints_in, load_checkpoint
from engine.files import METRICS_FILE, UserError
from engine.metrics import reason_to_stop

# Of the environment, what must be as it was, besides the settings and the reward's weights ...
COMPARED = ("device", "base_model_crc32", "problems_sha256", "rewards_sha256")
COMPARED += ("policy", "compute_dtype", "torch", "threads")
# ... but these change the last digits only: a note is printed.
NOTED = ("torch", "threads", "--micro_batch_size")
# Settings that may change, because they change no weight (num_iterations: at a constant rate).
FREE = {"output_dir", "resume", "num_iterations", "eval_every", "checkpoint_every"}
FREE |= {"patience", "max_kl", "log_completions_every"}
FREE |= {"problems", "rewards", "policy"}  # what they stand for is in COMPARED


def finished_run(output: Path) -> dict | None:
    """The metrics of the run in `output`, if it has finished."""
    try:
        found = files.read_json(output / METRICS_FILE)
    except UserError:  # none, or damaged
        return None
    return found if found.get("status") == "finished" else None


def nothing_to_resume(settings: dict) -> bool:
    """Whether the run in output_dir has finished and these settings ask for nothing more."""
    output = Path(settings["output_dir"])
    found = finished_run(output)
    ending = found and reason_to_stop(found | {"config": settings})
    if ending:
        print(f"nothing to resume: the run in {output.resolve()} is finished, {ending[1]}")
    return bool(ending)


def accept_repair(metrics: dict, current: dict) -> None:
    """If a checkpoint's run failed in a file of the user's, record that it is another one now."""
    what = metrics.pop("failed_in", None)
    if what is None:
        return
    was, now = (m["environment"].get(f"{what}_sha256") for m in (metrics, current))
    if was != now:
        metrics["environment"][f"{what}_sha256"] = now
        repair = {"what": what, "iteration": len(metrics["iterations"]), "was": was, "is": now}
        metrics["repaired"] = [*metrics.get("repaired", []), repair]
        print(f"note: the --{what} file was repaired: its SHA-256 was {was}, is {now}")


def checkpoint_to_resume(current: dict, defaults: dict) -> tuple[dict[str, Tensor], dict]:
    """The newest checkpoint of the run to resume, or two empty dicts; `current` are new metrics.

    A setting that the checkpoint does not know counts as its default. Raises UserError where a
    fresh start would overwrite an unfinished run, and where something that counts has changed.
    """
    settings, output = current["config"], Path(current["config"]["output_dir"])
    if not settings["resume"]:
        if checkpoints_in(output) and not finished_run(output):
            raise UserError(
                f"{output.resolve()} holds an unfinished run: continue it with --resume, choose"
                f" another --output_dir, or delete {CHECKPOINTS}/ to give it up"
            )
        return {}, {}
    tensors, state = load_checkpoint(output)
    if not state:
        print(f"nothing to resume in {output.resolve()}: starting from the beginning")
        return {}, {}
    accept_repair(state["metrics"], current)
    # A falling rate depends on the length of the run.
    free = FREE - {"num_iterations"} if settings["lr_schedule"] != "constant" else FREE
    saved, environment = state["metrics"]["config"], state["metrics"]["environment"]
    names = sorted(settings.keys() - free)
    pairs = {f"--{n}": (saved.get(n, defaults[n]), settings[n]) for n in names}
    pairs |= {n: (environment.get(n), current["environment"][n]) for n in COMPARED}
    weights = current["reward_weights"]
    pairs["WEIGHTS"] = state["metrics"].get("reward_weights", weights), weights
    changed = {n: f"{n} was {a!r}, is {b!r}" for n, (a, b) in pairs.items() if a != b}
    for name in NOTED:
        if name in changed:
            print(f"note: {changed.pop(name)}; the last digits will differ")
    if changed:
        remedy = "; restore the file, or start anew in another --output_dir"
        by_file = changed.keys() & {"problems_sha256", "rewards_sha256", "WEIGHTS"}
        text = "; ".join(changed.values()) + remedy * bool(by_file)
        raise UserError(f"--resume: started with other settings: {text}")
    return tensors, state
