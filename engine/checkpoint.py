"""A learner to and from disk: checkpoints/<iteration>/, the last two of a run.

No pickle: tensors go to safetensors, the rest to JSON, which keeps every bit of a float.
"""

import json
import shutil
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import distributed
from engine.files import UserError, out_of_memory, read_json, sha256, sync

CHECKPOINTS = "checkpoints"
STATE, MANIFEST = "state.json", "manifest.json"


def checkpoints_in(output: Path) -> list[Path]:
    """The folders checkpoints/<iteration>/ of a run, oldest first."""
    found = (path for path in (output / CHECKPOINTS).glob("[0-9]*") if path.name.isdecimal())
    return sorted(found, key=lambda path: int(path.name))


def save_checkpoint(learner, metrics: dict, generators: Tensor, output: Path) -> None:
    """Write checkpoints/<iteration>/ from a Learner and the metrics of its run; keep the last two.

    `generators` (uint8) are the token generators' states of all processes, concatenated.
    """
    root, iteration = output / CHECKPOINTS, len(metrics["iterations"])
    root.mkdir(exist_ok=True)  # not `output`: if the user deleted it, the run must stop
    for left_over in root.glob("*.tmp"):
        shutil.rmtree(left_over)
    weights = {f"policy.{n}": p.detach() for n, p in learner.policy.named_parameters()}
    # One file each, because writing a file takes a copy in memory.
    files = {"policy": weights | {"generators": generators}}
    for index, slots in learner.optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            files.setdefault(slot, {})[f"optimizer.{index}.{slot}"] = value
    state = {"problem_rng": learner.problem_rng.getstate(), "metrics": metrics}
    tmp_dir = root / f"{iteration}.tmp"
    tmp_dir.mkdir()
    try:
        for name, tensors in files.items():
            save_file(tensors, tmp_dir / f"{name}.safetensors")
        (tmp_dir / STATE).write_text(json.dumps(state), encoding="utf-8")
        sums = {path.name: sha256(path) for path in tmp_dir.iterdir()}
        (tmp_dir / MANIFEST).write_text(json.dumps({"sha256": sums}), encoding="utf-8")
        for path in (*tmp_dir.iterdir(), tmp_dir):
            sync(path)
    except (OSError, SafetensorError):
        shutil.rmtree(tmp_dir, ignore_errors=True)
        raise
    # Same or higher numbers are damaged, or belong to a finished run that this one replaces.
    discard([path for path in checkpoints_in(output) if int(path.name) >= iteration])
    tmp_dir.rename(root / str(iteration))
    sync(root)
    discard(checkpoints_in(output)[:-2])


def discard(folders: list[Path]) -> None:
    """Delete checkpoints, renamed first so that none is ever half there."""
    for folder in folders:
        shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.tmp")))


def load_checkpoint(output: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors by name, and state, of the newest intact checkpoint; two empty dicts if none exists.

    Damaged checkpoints are skipped with a warning. Raises UserError if all are damaged.
    """
    folders = checkpoints_in(output)[::-1]
    for folder in folders:
        try:
            sums = read_json(folder / MANIFEST).get("sha256")
            if sums != {p.name: sha256(p) for p in folder.iterdir() if p.name != MANIFEST}:
                raise UserError("its checksums do not match")
            tensors = [load_file(path).items() for path in folder.glob("*.safetensors")]
            return dict(chain(*tensors)), read_json(folder / STATE)
        except (UserError, OSError, SafetensorError) as error:
            print(f"warning: checkpoint {folder} is damaged, trying the one before: {error}")
    if folders:
        raise UserError(f"--resume: no checkpoint in {output / CHECKPOINTS} is intact")
    return {}, {}


def restore(learner, tensors: dict[str, Tensor], state: dict) -> None:
    """Load what `load_checkpoint` returned into a Learner. Raises UserError if it does not fit."""
    try:
        slots: dict[int, dict] = {}
        for index, (name, p) in enumerate(learner.policy.named_parameters()):
            if tensors[f"policy.{name}"].shape != p.shape:
                raise ValueError(f"{name} has another shape")
            p.data.copy_(tensors[f"policy.{name}"])
            for slot, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                if f"optimizer.{index}.{slot}" in tensors:  # none before the first update
                    value = tensors[f"optimizer.{index}.{slot}"].reshape(shape)
                    slots.setdefault(index, {})[slot] = value.clone()
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        kind, numbers, gauss = state["problem_rng"]
        learner.problem_rng.setstate((kind, tuple(numbers), gauss))
        seed, iteration = state["metrics"]["config"]["seed"], len(state["metrics"]["iterations"])
        distributed.restore_generator(learner.token_rng, tensors["generators"], seed, iteration)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise UserError(f"--resume: the checkpoint does not fit this run: {error}") from error
