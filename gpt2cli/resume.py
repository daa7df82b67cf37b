"""Going on with a run: is it still the same one, and what has changed?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2cli import atomic, checkpoint, device, metrics, sources
from gpt2cli.config import BEFORE, GPTConfig, TrainConfig, from_dict
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.optim import planned_lr
from gpt2cli.plan import Plan, check_parallel, default_warmup
from gpt2cli.provenance import provenance
from gpt2cli.shards import check
from gpt2cli.survey import Progress
from gpt2cli.tokenizer import Encoding

# Options that may differ when a run is continued: they do not decide what is learned, but for rounding.
FREE = (
    "steps", "device", "batch_size", "log_every", "eval_every", "patience", "save_every", "sample_every", "sample_prompt",
    "spike", "max_rollbacks", "deterministic", "parallel", "activation_checkpointing",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """What `run.json` says of the sessions before."""

    data: sources.Record
    model: GPTConfig
    train: TrainConfig
    init_from: str | None
    init_sha256: str | None
    asked: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, run: Mapping[str, Any], name: str) -> Record:
        """Raises UserError for what is not the `run.json` of a run, or another of that `name`."""
        try:
            return cls(
                data=sources.Record.read(run["data"]),
                model=from_dict(GPTConfig, run["model"], name),
                train=from_dict(TrainConfig, BEFORE | run["train"], name),
                init_from=run["init_from"] and str(atomic.from_home(run["init_from"])),
                init_sha256=run["init_sha256"],
                asked=dict(run["asked"]),
                sessions=tuple(dict(session) for session in run["sessions"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{name} is not one of ours: {error!r}") from None


def resume_plan(
    out: Path | None,
    changes: Mapping[str, Any],
    *,
    data: sources.Given | None = None,
    cache: Path | None = None,
    world_size: int = 1,
    on_skip: Callable[[str], None] = lambda message: None,
    on_tokenize: Progress = lambda what, done, total: None,
) -> Plan:
    """Go on with the run in `out`, or the newest below `runs/`, from its newest whole checkpoint.

    `changes` are the options given anew. Raises UserError for one that would make it a different run, for data that is
    no longer the same, where there is no run, and where another process is at it.
    """
    if out is None:
        found = checkpoint.runs(Path("runs"))
        if not found:
            raise UserError("there is no run under runs/ to continue; start one with 'gpt2 train'")
        out = found[0]
    if not (out / "run.json").is_file():
        raise UserError(f"{out} is not a run folder: it has no run.json; start one with 'gpt2 train --out {out}'")
    run = Record.read(atomic.read_sealed(out / "run.json"), str(out / "run.json"))
    train = _changed(out, changes, run)
    if world_size > 1:
        check_parallel(train)
    with atomic.lock(out):
        atomic.sweep(out)
        start = checkpoint.latest(out, on_skip)
    if start and (train.steps or 0) < checkpoint.step_of(start):
        raise UserError(f"--steps {train.steps} is less than the {checkpoint.step_of(start)} steps {out} has already done")
    if run.init_from and not start and huggingface.weights_sha256(Path(run.init_from)) != run.init_sha256:
        raise UserError(f"{out} has no checkpoint, and {run.init_from} is not the model it was started from: start a new run")
    if model_folder := start or (Path(run.init_from) if run.init_from else None):
        encoding, _ = checkpoint.find_encoding(model_folder, run.model.vocab_size)
    else:
        encoding = sources.find_vocabulary(list(run.data.tokens.values())) or Encoding.gpt2()
    if data is not None or not all(_intact(tokens) for tokens in run.data.tokens.values()):
        found_sources = sources.find_sources(data or run.data.given, train, encoding, cache, on_tokenize)
    else:
        found_sources = sources.make_sources(run.data.given, run.data.tokens)
    if sources.data_sha256(found_sources) != run.data.sha256:
        raise UserError(f"{_other_data(out, data, run.data.given)} start a new run with another --out")
    if not model_folder and train.train_vocab:
        encoding = sources.find_vocabulary([found_sources[0].tokens]) or encoding
    before, now = asdict(run.train), asdict(train)
    changed = {name: [before[name], now[name]] for name in before if before[name] != now[name]}
    return Plan(
        out=out,
        sources=found_sources,
        model=run.model,
        train=train,
        encoding=encoding,
        init_from=run.init_from,
        init_sha256=run.init_sha256,
        asked=run.asked,
        resume_from=start,
        sessions=run.sessions,
        changed=changed,
        notes=tuple(_notes(out, start, changed, run, train, world_size)),
        world_size=world_size,
    )


def _changed(out: Path, changes: Mapping[str, Any], run: Record) -> TrainConfig:
    """The settings with those that were given anew. Raises UserError for one that would make it a different run."""
    before, asked = run.train, run.asked
    for name, value in changes.items():
        had = (asdict(run.model) | asdict(before)).get(name)
        same = atomic.to_home(value) if isinstance(value, str) else value
        if name not in FREE and same not in (had, asked.get(name, getattr(TrainConfig(), name, had))):
            raise UserError(
                f"--{name.replace('_', '-')} {value} would make {out} a different run (it has {asked.get(name, had)}); "
                "leave it out, or start a new run with another --out"
            )
    train = replace(before, **{name: value for name, value in changes.items() if name in FREE})
    if (train.steps or 0) < (before.steps or 0) and "warmup_steps" not in asked:
        train = replace(train, warmup_steps=min(before.warmup_steps or 0, default_warmup(train.steps or 0)))
    rows, left = divmod(train.tokens_per_step, (train.batch_size or 1) * (train.seq_len or 1))
    if left or not rows:
        raise UserError(
            f"--batch-size {train.batch_size}: an update has {train.tokens_per_step // (train.seq_len or 1)} rows, "
            "which are not whole micro-steps of that many"
        )
    return replace(train, device=device.pick_device(train.device).type)


def _other_data(out: Path, data: sources.Given | None, had: Mapping[str, float]) -> str:
    given = " and ".join(had)
    now = had if data is None else sources.weights_of(data)
    if {Path(path).resolve() for path in now} == {Path(path).resolve() for path in had}:
        weights = "" if len(had) == 1 else ", or its weights are others" if data else ", or a part of it"
        return f"{given} is no longer the data {out} was trained on{weights}:"
    what = "--data" if isinstance(data, Mapping) else "INPUT"
    return f"{' and '.join(now)} is not the data {out} was trained on ({given}): leave {what} out to go on with that, or"


def _intact(tokens: Path) -> bool:
    try:
        check(tokens)
    except UserError:
        return False
    return tokens.is_dir()


def _notes(
    out: Path, start: Path | None, changed: Mapping[str, Any], run: Record, train: TrainConfig, world_size: int
) -> list[str]:
    """What is different from the session before; most of it makes the run equal only up to rounding."""
    notes = [] if start else [f"{out} has no whole checkpoint: starting from zero"]
    done = checkpoint.step_of(start) if start else 0
    later = [folder for folder in checkpoint.checkpoints(out) if checkpoint.step_of(folder) > done]
    notes += [f"{folder} is damaged and will be set aside as {checkpoint.aside(folder).name}" for folder in later]
    for name, (old, new) in changed.items():
        notes.append(f"{name} changed from {old!r} to {new!r}{_other_lr(done, run.train, train) if name == 'steps' else ''}")
    ranks = run.sessions[-1].get("world_size", 1) if run.sessions else world_size
    if ranks != world_size:
        notes.append(f"it was trained by {ranks} processes and is by {world_size}: the same batches, equal up to rounding")
    had, has = run.sessions[-1].get("made_with") if run.sessions else None, provenance(torch.device(train.device))
    for name in ("torch", "device"):
        if isinstance(had, dict) and had.get(name) != has[name]:
            notes.append(f"{name} was {had.get(name)} and is {has[name]}: the run goes on, but perhaps not bit for bit")
    log = atomic.read_json(start / "training.json").get("log") if start else None
    if isinstance(log, dict) and log and not metrics.unchanged(out, log):
        notes.append(f"{out / metrics.NAME} was changed since the checkpoint was saved: its lines are kept as they are")
    return notes


def _other_lr(done: int, before: TrainConfig, now: TrainConfig) -> str:
    """The schedule is stretched over all steps, so that another number of them moves the learning rate at once."""
    old_steps, new_steps = before.steps or 0, now.steps or 0
    old = f"{planned_lr(min(done, old_steps - 1), before):.1e}"
    new = f"{planned_lr(done, now):.1e}"
    if done == new_steps or new == old:
        return ""
    would = "the old schedule ended at" if done >= old_steps else "the old schedule had"
    return f": the learning rate of step {done + 1:,} is {new}, where {would} {old}"
