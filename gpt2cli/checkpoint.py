"""A run folder and its checkpoints: written whole or not at all, read back and checked.

runs/NAME/run.json           what was asked, what was decided, versions, data and its sha256
          metrics.jsonl      one object a line
          step-000500/       a HuggingFace model folder, and beside it for resuming
              training.safetensors    optimizer state and random generators
              training.json           step, data position, seconds, best loss
              checkpoint.json         sha256 of every file
"""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2cli import __version__, atomic
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.model import GPT
from gpt2cli.tokenizer import Encoding

Optimizers = Sequence[torch.optim.Optimizer]
KEEP = 2  # newest checkpoints; the best is kept beside them
_STEP = re.compile(r"step-(\d{6,})")


# ==== writing ====


def save(run: Path, step: int, model: GPT, optimizers: Optimizers, encoding: Encoding | None, facts: dict[str, Any]) -> Path:
    """Write `run/step-NNNNNN`. `facts` are the JSON values that training goes on from. Raises OSError on a full disk,
    and then leaves no trace of the attempt."""
    target = run / f"step-{step:06d}"
    with atomic.new_folder(target, replace=True) as folder:
        huggingface.write(folder, model.config, model.state_dict(), encoding)
        try:
            save_file(_training_tensors(model, optimizers), folder / "training.safetensors")
        except SafetensorError as error:
            raise OSError(f"cannot write {folder / 'training.safetensors'}: {error}") from None
        atomic.write_json(folder / "training.json", facts | {"step": step})
        atomic.seal(folder, {"gpt2cli": __version__, "step": step})
    return target


def _training_tensors(model: GPT, optimizers: Optimizers) -> dict[str, Tensor]:
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    owner = _owners(optimizers)
    for name, parameter in model.named_parameters():
        for key, value in owner[parameter].state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
    return tensors


def _owners(optimizers: Optimizers) -> dict[Tensor, torch.optim.Optimizer]:
    return {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def restore(folder: Path, model: GPT, optimizers: Optimizers) -> dict[str, Any]:
    """Put the training state of a checked checkpoint back into `model` and `optimizers` and torch's random generators;
    returns the facts it was saved with."""
    _, state = huggingface.read(folder)
    facts = atomic.read_json(folder / "training.json")
    try:
        tensors = load_file(folder / "training.safetensors")
        model.load_state_dict(state)
        owner = _owners(optimizers)
        for name, parameter in model.named_parameters():
            suffix = f".{name}"
            for key in [key for key in tensors if key.startswith("optimizer.") and key.endswith(suffix)]:
                short = key.removeprefix("optimizer.").removesuffix(suffix)
                value = tensors[key]
                owner[parameter].state[parameter][short] = value.to(parameter.device)
        torch.set_rng_state(tensors["rng.cpu"])
        if torch.cuda.is_available() and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} cannot be resumed from: {str(error).splitlines()[0]}") from None
    return facts


def prune(run: Path) -> None:
    """Delete all but the newest two checkpoints and the best."""
    import shutil

    steps = checkpoints(run)
    keep = {*steps[:KEEP], best(run)}
    for folder in steps:
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)


# ==== finding ====


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, the newest first."""
    if not run.is_dir():
        return []
    return sorted((p for p in run.iterdir() if _STEP.fullmatch(p.name)), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else 0


def latest(run: Path, on_skip: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; each one skipped is told to `on_skip`."""
    for folder in checkpoints(run):
        try:
            atomic.check_seal(folder)
            atomic.read_json(folder / "training.json")
            return folder
        except UserError as error:
            on_skip(f"skipping a torn checkpoint: {error}")
    return None


def best(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss in `metrics.jsonl`; the newest where none was evaluated."""
    losses = val_losses(run)
    folders = checkpoints(run)
    evaluated = [folder for folder in folders if step_of(folder) in losses]
    if not evaluated:
        return folders[0] if folders else None
    return min(evaluated, key=lambda folder: losses[step_of(folder)])


def val_losses(run: Path) -> dict[int, float]:
    """Step -> validation loss, of the evaluations in `metrics.jsonl`."""
    found = {line["step"]: line["val_loss"] for line in read_metrics(run) if "val_loss" in line}
    return {step: loss for step, loss in found.items() if isinstance(loss, float) and math.isfinite(loss)}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of `metrics.jsonl`; one that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    values = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            values.append(value)
    return values


def runs(parent: Path) -> list[Path]:
    """Run folders below `parent`, the one that was written last first."""
    found = [path.parent for path in parent.glob("*/run.json")]
    return sorted(found, key=lambda run: max(p.stat().st_mtime for p in [run / "run.json", *checkpoints(run)]), reverse=True)


def free_name(data: Path) -> Path:
    """A run folder that does not exist yet, named by its data and the time."""
    first = Path("runs") / f"{data.name.split('.')[0] or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (first if n == 0 else first.with_name(f"{first.name}-{n}") for n in itertools.count())
    return next(path for path in names if not path.exists())


# ==== loading to use ====


@dataclass(frozen=True)
class Loaded:
    model: GPT
    encoding: Encoding
    folder: Path
    embedded_vocabulary: bool  # the folder brings no tokenizer


def find_model(name: str | None, progress: huggingface.Progress | None = None) -> Path:
    """The model folder that MODEL means: a run's best checkpoint, a model folder, or a hub name; without a name the newest
    run under `runs/`. Raises UserError where there is none."""
    if name is None:
        newest = runs(Path("runs"))
        if not newest:
            raise UserError("there is no run under runs/: train one with 'gpt2 train', or name a model, such as gpt2")
        name = str(newest[0])
    if (Path(name) / "run.json").is_file():
        folder = best(Path(name))
        if folder is None:
            raise UserError(f"{name} has no checkpoint yet: continue it with 'gpt2 train --resume --out {name}'")
        return folder
    return huggingface.find(name, progress)


def find_encoding(folder: Path, vocab_size: int) -> tuple[Encoding, bool]:
    """The tokenizer of a model folder; where it brings none, the embedded one, and True. Raises UserError where the
    model's vocabulary is too small for it."""
    own = Encoding.from_folder(folder)
    encoding = own or Encoding.gpt2()
    if encoding.n_vocab > vocab_size:
        whose = "its tokenizer" if own else "it brings no tokenizer, and GPT-2's"
        raise UserError(f"{folder}: the model knows {vocab_size:,} ids, but {whose} has {encoding.n_vocab:,}")
    return encoding, own is None


def load(name: str | None, progress: huggingface.Progress | None = None) -> Loaded:
    """The model and tokenizer that MODEL means, see `find_model`, in evaluation mode on the CPU."""
    folder = find_model(name, progress)
    atomic.check_seal(folder, names={"tokenizer.json", "tokenizer_config.json"})
    model = GPT.from_pretrained(folder).eval()
    encoding, embedded = find_encoding(folder, model.config.vocab_size)
    return Loaded(model, encoding, folder, embedded)
