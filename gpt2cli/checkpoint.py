"""A run folder and its checkpoints: written whole or not at all, read back and checked.

runs/NAME/run.json           what was asked, what was decided, versions, data and its sha256
          metrics.jsonl      one object a line
          step-000500/       a HuggingFace model folder, and beside it for resuming
              training.safetensors    optimizer state, the guard's memory
              training.json           step, data position, seconds, best loss
              evaluation.json         validation loss of this step; written after the rest, with its own sha256
              checkpoint.json         sha256 of every other file
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2cli import __version__, atomic
from gpt2cli.config import GPTConfig
from gpt2cli.distributed import ALONE, Ranks, local_part
from gpt2cli.errors import UserError
from gpt2cli.formats import hub, huggingface
from gpt2cli.formats.weights import shapes, write_safetensors
from gpt2cli.guard import Guard
from gpt2cli.model import GPT
from gpt2cli.optim import Optimizer
from gpt2cli.tokenizer import Encoding

Optimizers = Sequence[Optimizer]
KEEP = 2  # newest checkpoints; the best is kept beside them
_STEP = re.compile(r"step-(\d{6,})")


# ==== writing ====


@dataclass
class Progress:
    """The part of a run's state that is neither tensor nor constant; kept in `training.json`."""

    step: int = 0  # updates done, refused ones included
    position: int = 0  # of the loader, in rows
    elapsed: float = 0.0  # seconds
    best_loss: float | None = None  # lowest validation loss
    rollbacks: int = 0
    suspects: list[int] = field(default_factory=list)  # steps of checkpoints that were rolled back to
    stopped: bool = False  # saved because the run was stopped, where it would not have been otherwise
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16's gradients
    log: dict[str, Any] = field(default_factory=dict)  # state of `metrics.jsonl`


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything a run goes on from, in the host's memory, so that training need not wait for the disk."""

    progress: Progress
    config: GPTConfig
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    encoding: Encoding | None


def snapshot(
    progress: Progress, model: GPT, optimizers: Optimizers, guard: Guard, encoding: Encoding | None, ranks: Ranks = ALONE
) -> Snapshot:
    """Every rank calls it, since what is spread over them is gathered, a tensor at a time, on rank 0; the others' are void."""
    training = {f"guard.{key}": ranks.copy(value) for key, value in guard.state_dict().items()}
    owner = _owners(optimizers)
    for name, parameter in model.named_parameters():
        for key, value in owner[parameter].state[parameter].items():
            training[f"optimizer.{key}.{name}"] = ranks.copy(value)
    weights = {name: ranks.copy(tensor) for name, tensor in model.state_dict().items()}
    return Snapshot(replace(progress), model.config, weights, training, encoding)


def _owners(optimizers: Optimizers) -> dict[Tensor, Optimizer]:
    return {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def write(run: Path, state: Snapshot) -> Path:
    """Write `run/step-NNNNNN`. Raises OSError on a full disk, and then leaves no trace of the attempt."""
    check_there(run)
    target = folder_of(run, state.progress.step)
    try:
        with atomic.new_folder(target, replace=True) as folder:
            huggingface.write(folder, state.config, state.weights, state.encoding)
            write_safetensors(folder / "training.safetensors", state.training)
            atomic.write_json(folder / "training.json", asdict(state.progress))
            atomic.seal(folder, {"gpt2cli": __version__, "step": state.progress.step})
    except OSError:
        check_there(run)
        raise
    return target


def check_there(run: Path) -> None:
    """Raises FileNotFoundError where its folder was moved or deleted, in whose place nothing is to be made."""
    if not (run / "run.json").is_file():
        raise FileNotFoundError(f"{run} is gone: put it back")


def write_evaluation(folder: Path, val_loss: float, val_bits_per_byte: float | None) -> None:
    """Keep the validation loss beside the weights it belongs to."""
    values = {"step": step_of(folder), "val_loss": val_loss, "val_bits_per_byte": val_bits_per_byte}
    atomic.write_sealed(folder / "evaluation.json", values)


def prune(run: Path, step: int) -> None:
    """Delete all but the newest two checkpoints and the best, of those up to `step`: later ones are from before a rollback,
    and are written again when the run gets there."""
    done = [folder for folder in checkpoints(run) if step_of(folder) <= step]
    try:
        keep = {*done[:1], *[folder for folder in done if not was_stopped(folder)][:KEEP], best(run)}
    except UserError:  # an evaluation that was tampered with: better too many than one too few
        return
    for folder in done:
        if folder not in keep:
            atomic.remove_folder(folder)


# ==== reading ====


def restore(folder: Path, model: GPT, optimizers: Optimizers, guard: Guard, ranks: Ranks = ALONE) -> Progress:
    """Put the training state of a checked checkpoint, which only rank 0 need see, back into `model`, `optimizers` and
    `guard`; returns how far it was. Raises UserError where it is not all there."""
    owner = _owners(optimizers)
    slots = {}  # of training.safetensors
    for name, parameter in model.named_parameters():
        for short in owner[parameter].state_names:
            slots[f"optimizer.{short}.{name}"] = parameter, short
    read = ranks.first(lambda: _read_training(folder, slots, model, guard))
    progress = Progress(**json.loads(ranks.tell(lambda: json.dumps(asdict(read[0]) if read else {}))))
    weights, tensors = read[1:] if read else (None, None)
    for name, parameter in model.named_parameters():
        ranks.fill(parameter, weights[name] if weights else None)
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, (parameter, short) in slots.items() if progress.step else ():
        value = local_part(parameter).new_zeros(()) if short == "step" else torch.zeros_like(parameter, requires_grad=False)
        ranks.fill(value, tensors[key] if tensors else None)
        owner[parameter].state[parameter][short] = value
    state = guard.state_dict()
    for name, value in state.items():
        ranks.fill(value, tensors[f"guard.{name}"] if tensors else None)
    return progress


def _read_training(
    folder: Path, slots: Mapping[str, tuple[Tensor, str]], model: GPT, guard: Guard
) -> tuple[Progress, Mapping[str, Tensor], dict[str, Tensor]]:
    """What a checkpoint holds, checked to fit."""
    config, weights = huggingface.read(folder)
    values = atomic.read_json(folder / "training.json")
    try:
        if shapes(config) != shapes(model.config):
            raise TypeError(f"{folder / 'config.json'} describes another model than the run's")
        progress = Progress(**values)
        whole_numbers = progress.step, progress.position, progress.rollbacks, *progress.suspects
        if not all(isinstance(n, int) for n in whole_numbers) or not isinstance(progress.log, dict):
            raise TypeError("training.json is not one of ours")
        tensors = load_file(folder / "training.safetensors")
        known = [progress.best_loss, evaluation(folder).get("val_loss")]
        progress.best_loss = min((loss for loss in known if loss is not None), default=None)
        expected = {f"guard.{name}": value.shape for name, value in guard.state_dict().items()}
        for key, (parameter, short) in slots.items() if progress.step else ():
            expected[key] = torch.Size([]) if short == "step" else parameter.shape
        for key, shape in expected.items():
            if tensors[key].shape != shape:
                raise RuntimeError(f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(shape)}")
    except (SafetensorError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{folder} cannot be resumed from: {(str(error) or repr(error)).splitlines()[0]}") from None
    return progress, weights, tensors


# ==== finding ====


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first."""
    if not run.is_dir():
        return []
    return sorted((p for p in run.iterdir() if _STEP.fullmatch(p.name)), key=step_of, reverse=True)


def folder_of(run: Path, step: int) -> Path:
    return run / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else 0


def latest(run: Path, on_skip: Callable[[str], None] = lambda message: None) -> Path | None:
    """The newest checkpoint that is whole; each one skipped is told to `on_skip`."""
    return next((folder for folder in checkpoints(run) if is_whole(folder, on_skip)), None)


def is_whole(folder: Path, on_skip: Callable[[str], None] = lambda message: None) -> bool:
    try:
        atomic.check_seal(folder)
        atomic.read_json(folder / "training.json")
        evaluation(folder)
    except UserError as error:
        on_skip(f"skipping {folder}: {error}")
        return False
    return True


def aside(folder: Path) -> Path:
    """Where a damaged checkpoint is moved when a run goes on without it: under a name that counts for nothing, so that it
    neither takes the place of a good one nor is deleted."""
    names = (folder.with_name(f"{folder.name}.damaged{n or ''}") for n in itertools.count())
    return next(path for path in names if not path.exists())


def was_stopped(folder: Path) -> bool:
    """Whether it is there only because the run was stopped: the run that was not stopped could not roll back to it."""
    try:
        return bool(atomic.read_json(folder / "training.json").get("stopped"))
    except UserError:
        return False


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss; the newest where none was evaluated. Raises UserError for an
    `evaluation.json` that was changed."""
    folders = checkpoints(run)
    losses = {folder: evaluation(folder).get("val_loss") for folder in folders}
    evaluated = {folder: loss for folder, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)}
    if not evaluated:
        return folders[0] if folders else None
    return min(evaluated, key=lambda folder: evaluated[folder])


def evaluation(folder: Path) -> dict[str, Any]:
    """What `write_evaluation` wrote; empty where this step was not evaluated."""
    path = folder / "evaluation.json"
    return atomic.read_sealed(path) if path.is_file() else {}


def runs(parent: Path) -> list[Path]:
    """Run folders below `parent`, the one that was written last first."""
    found = [path.parent for path in parent.glob("*/run.json")]
    return sorted(found, key=lambda run: max(p.stat().st_mtime for p in [run / "run.json", *checkpoints(run)]), reverse=True)


def runs_near(out: Path) -> list[str]:
    """What to advise where a run is not there: those that are, the last written first. Nothing where there are none."""
    there = dict.fromkeys(str(run) for parent in (out.parent, Path("runs")) for run in runs(parent))
    return [f"name one of: {', '.join([*there][:5])}"] if there else []


def free_name(data: Path) -> Path:
    """A run folder that does not exist yet, named by its data and the time."""
    first = Path("runs") / f"{data.name.split('.')[0].strip('-') or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (first if n == 0 else first.with_name(f"{first.name}-{n}") for n in itertools.count())
    return next(path for path in names if not path.exists())


# ==== loading to use ====


@dataclass(frozen=True)
class Loaded:
    model: GPT
    encoding: Encoding
    folder: Path
    embedded_vocabulary: bool  # the folder brings no tokenizer


def find_model(name: str | None, progress: hub.Progress | None = None) -> Path:
    """The model folder that MODEL means: a run's best checkpoint, a model folder, or a hub name; without a name the newest
    run under `runs/`. Raises UserError where there is none."""
    if name is None:
        newest = runs(Path("runs"))
        if not newest:
            raise UserError("there is no run under runs/: train one with 'gpt2 train', or name a model, such as gpt2")
        name = str(newest[0])
    if (Path(name) / "run.json").is_file():
        try:
            folder = best(Path(name))
        except UserError as error:
            raise UserError(f"{error}{_instead(Path(name))}") from None
        if folder is None:
            raise UserError(f"{name} has no checkpoint yet: continue it with 'gpt2 train --resume --out {name}'")
        return folder
    if "/" in name and not Path(name).exists() and Path(name).parent.is_dir():
        raise UserError("; ".join([f"there is no {name}", *runs_near(Path(name))]))
    return hub.find(name, progress)


def find_encoding(folder: Path, vocab_size: int) -> tuple[Encoding, bool]:
    """The tokenizer of a model folder; where it brings none, the embedded one, and True. Raises UserError where the
    model's vocabulary is too small for it."""
    own = Encoding.from_folder(folder)
    encoding = own or Encoding.gpt2()
    if encoding.n_vocab > vocab_size:
        whose = "its tokenizer" if own else "it brings no tokenizer, and GPT-2's"
        raise UserError(f"{folder}: the model knows {vocab_size:,} ids, but {whose} has {encoding.n_vocab:,}")
    return encoding, own is None


def load(name: str | None, progress: hub.Progress | None = None) -> Loaded:
    """The model and tokenizer that MODEL means, see `find_model`, in evaluation mode on the CPU."""
    folder = find_model(name, progress)
    try:
        atomic.check_seal(folder, names={"tokenizer.json", "tokenizer_config.json"})
        model = GPT.from_pretrained(folder)
        encoding, embedded = find_encoding(folder, model.config.vocab_size)
    except UserError as error:
        raise UserError(f"{error}{_instead(folder.parent) if not is_whole(folder) else ''}") from None
    return Loaded(model, encoding, folder, embedded)


def _instead(run: Path) -> str:
    """The end of an error about a damaged checkpoint: one that is whole."""
    other = latest(run)
    return f"; {other} is whole: name that one" if other else ""
