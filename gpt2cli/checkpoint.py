"""A run folder and its checkpoints: written whole or not at all, read back and checked.

runs/NAME/run.json           what was asked, what was decided, versions, data and its sha256
          metrics.jsonl      one object a line
          step-000500/       a HuggingFace model folder, and beside it for resuming
              training.safetensors    optimizer state, random generators, the guard's memory
              training.json           step, data position, seconds, best loss
              evaluation.json         validation loss of this step; written after the rest, with its own sha256
              checkpoint.json         sha256 of every other file
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2cli import __version__, atomic
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import hub, huggingface
from gpt2cli.guard import Guard
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

Optimizers = Sequence[torch.optim.Optimizer]
KEEP = 2  # newest checkpoints; the best is kept beside them
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # what torch's keeps of a parameter
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


def snapshot(progress: Progress, model: GPT, optimizers: Optimizers, guard: Guard, encoding: Encoding | None) -> Snapshot:
    training = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        training["rng.cuda"] = torch.cuda.get_rng_state()
    training |= {f"guard.{key}": _copy(value) for key, value in guard.state_dict().items()}
    owner = _owners(optimizers)
    for name, parameter in model.named_parameters():
        for key, value in owner[parameter].state[parameter].items():
            training[f"optimizer.{key}.{name}"] = _copy(value)
    weights = {name: _copy(tensor) for name, tensor in model.state_dict().items()}
    return Snapshot(replace(progress), model.config, weights, training, encoding)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _owners(optimizers: Optimizers) -> dict[Tensor, torch.optim.Optimizer]:
    return {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def write(run: Path, state: Snapshot) -> Path:
    """Write `run/step-NNNNNN`. Raises OSError on a full disk, and then leaves no trace of the attempt."""
    target = folder_of(run, state.progress.step)
    with atomic.new_folder(target, replace=True) as folder:
        huggingface.write(folder, state.config, state.weights, state.encoding)
        try:
            save_file(state.training, folder / "training.safetensors")
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / 'training.safetensors'}: {error}") from None
        atomic.write_json(folder / "training.json", asdict(state.progress))
        atomic.seal(folder, {"gpt2cli": __version__, "step": state.progress.step})
    return target


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


def restore(folder: Path, model: GPT, optimizers: Optimizers, guard: Guard) -> Progress:
    """Put the training state of a checked checkpoint back into `model`, `optimizers`, `guard` and torch's random
    generators; returns how far it was."""
    _, state = huggingface.read(folder)
    values = atomic.read_json(folder / "training.json")
    try:
        progress = Progress(**values)
        whole_numbers = progress.step, progress.position, progress.rollbacks, *progress.suspects
        if not all(isinstance(n, int) for n in whole_numbers) or not isinstance(progress.log, dict):
            raise TypeError("training.json is not one of ours")
        tensors = load_file(folder / "training.safetensors")
        model.load_state_dict(state)
        owner = _owners(optimizers)
        for name, parameter in model.named_parameters():
            for short in getattr(owner[parameter], "state_names", ADAMW_STATE) if progress.step else ():
                key = f"optimizer.{short}.{name}"
                value = tensors[key]
                if value.shape not in (parameter.shape, torch.Size([])):
                    raise RuntimeError(f"{key} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
                owner[parameter].state[parameter][short] = value.to(parameter.device)
        guard.load_state_dict({key.removeprefix("guard."): value for key, value in tensors.items() if key.startswith("guard.")})
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    except (SafetensorError, KeyError, RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{folder} cannot be resumed from: {(str(error) or repr(error)).splitlines()[0]}") from None
    return progress


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
        model = GPT.from_pretrained(folder).eval()
        encoding, embedded = find_encoding(folder, model.config.vocab_size)
    except UserError as error:
        raise UserError(f"{error}{_instead(folder.parent) if not is_whole(folder) else ''}") from None
    return Loaded(model, encoding, folder, embedded)


def _instead(run: Path) -> str:
    """The end of an error about a damaged checkpoint: one that is whole."""
    other = latest(run)
    return f"; {other} is whole: name that one" if other else ""
