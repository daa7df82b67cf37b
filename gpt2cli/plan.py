"""Before a run: everything that was left open is decided here, checked against the machine and the data, and written down.

`make_plan` for a new run, `resume_plan` to go on with one.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2cli import __version__, atomic, checkpoint, corpus, device
from gpt2cli.config import PRESETS, GPTConfig, TrainConfig, from_dict
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.loss import CHUNK as loss_rows
from gpt2cli.shards import Tokens, count_tokens, find_shards, fingerprint
from gpt2cli.tokenizer import Encoding

DEFAULT_SEQ_LEN = 256
DEFAULT_STEPS = 150
# Options that do not change what is learned: they may differ when a run is continued.
FREE_ON_RESUME = ("steps", "device", "log_every", "eval_every", "save_every", "sample_every")


@dataclass(frozen=True)
class Plan:
    """A run, decided. `train` holds no `None` and no `auto`."""

    out: Path
    data: str  # as given
    tokens: Path  # folder of shards
    data_sha256: str
    model: GPTConfig
    train: TrainConfig
    encoding: Encoding
    init_from: str | None
    train_tokens: int
    val_tokens: int
    asked: Mapping[str, Any]  # the options that were given, before anything was decided
    resume_from: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return torch.device(self.train.device)

    @property
    def batch_size(self) -> int:
        return self.train.batch_size or 1

    @property
    def seq_len(self) -> int:
        return self.train.seq_len or self.model.block_size

    @property
    def steps(self) -> int:
        return self.train.steps or 0

    @property
    def first_step(self) -> int:  # updates already done
        return checkpoint.step_of(self.resume_from) if self.resume_from else 0

    @property
    def accumulation(self) -> int:  # micro-steps of an update
        return self.train.tokens_per_step // (self.batch_size * self.seq_len)

    @property
    def flops(self) -> int:  # of the model, for an update
        return self.train.tokens_per_step * self.model.flops_per_token(self.seq_len)

    @property
    def memory(self) -> int:
        """Bytes expected at the peak: weights, gradients and two moments in fp32, and the activations of a micro-step."""
        C, V = self.model.n_embd, self.model.vocab_size
        width = 4 if self.train.dtype == "fp32" else 2
        layer = (12 * C + 2 * self.model.inner_size) * width
        rows = self.batch_size * self.seq_len
        loss = min(rows, loss_rows) * V * 8 + 2 * V * C * 4  # a chunk's logits and probabilities, parts of a gradient
        program = 350_000_000 if self.train.device == "cpu" else 0  # the interpreter with torch
        return program + 16 * self.model.num_parameters() + rows * self.model.n_layer * layer + loss

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that exist at the same time: two newest, the best, and the one being written."""
        return (checkpoint.KEEP + 2) * 12 * self.model.num_parameters()

    def to_json(self) -> dict[str, Any]:
        return {
            "gpt2cli": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": device.describe(self.device),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "data": {"given": self.data, "sha256": self.data_sha256, "tokens": str(self.tokens)},
            "init_from": self.init_from,
            "asked": dict(self.asked),
            "model": asdict(self.model),
            "train": asdict(self.train),
        }


def make_plan(
    data: str | Path | None = None,
    shape: Mapping[str, Any] | None = None,
    train: TrainConfig = TrainConfig(),
    *,
    preset: str = "seed",
    init_from: str | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    on_tokenize: corpus.Progress = lambda done, total: None,
    on_download: huggingface.Progress | None = None,
) -> Plan:
    """Decide a new run on `data`: a text file, a folder of them, or a folder of token shards; the embedded Shakespeare
    where None. `shape` has the fields of GPTConfig that were chosen.

    Raises UserError for anything that would stop the run later.
    """
    out = out or checkpoint.free_name(Path(data or corpus.EMBEDDED))
    if (out / "run.json").exists():
        raise UserError(f"{out} already holds a run: continue it with 'gpt2 train --resume --out {out}', or give another --out")
    if any(out.iterdir()) if out.is_dir() else out.exists():
        raise UserError(f"{out} already holds files: give another --out")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; expected {', '.join(PRESETS)}")
    start = checkpoint.find_model(init_from, on_download) if init_from else None
    where = device.pick_device(train.device)
    asked = dict(shape or {}) | {"preset": preset, "init_from": init_from}
    asked |= {name: value for name, value in vars(train).items() if value != getattr(TrainConfig(), name)}
    notes: list[str] = []

    encoding = Encoding.gpt2()
    if start:
        known = huggingface.read_config(start)
        encoding, embedded = checkpoint.find_encoding(start, known.vocab_size)
        if embedded:
            notes.append(f"{start} brings no tokenizer: GPT-2's is used")
    model, train = _decide_shape(dict(shape or {}), train, preset, start, encoding, notes)

    tokens, data_sha256 = _find_tokens(data, train, encoding, cache, on_tokenize)
    train_tokens, val_tokens = count_tokens(tokens)
    if not val_tokens:
        notes.append("no validation split: the newest checkpoint counts as the best")
    _check_ids(tokens, model.vocab_size, encoding)
    train = _decide_machine(train, where, notes)
    device.check_attention(where, train.dtype, train.attention, model.head_size, model.attn_dropout)
    train = _decide_length(train, model, train_tokens, bool(start), notes)
    plan = Plan(
        out=out,
        data=str(data or corpus.EMBEDDED),
        tokens=tokens,
        data_sha256=data_sha256,
        model=model,
        train=train,
        encoding=encoding,
        init_from=str(start) if start else None,
        train_tokens=train_tokens,
        val_tokens=val_tokens,
        asked=asked,
    )
    return replace(plan, notes=tuple(notes + _check_room(plan)))


def resume_plan(
    out: Path | None,
    changes: Mapping[str, Any],
    *,
    data: str | Path | None = None,
    cache: Path | None = None,
    on_skip: Callable[[str], None] = lambda message: None,
    on_tokenize: corpus.Progress = lambda done, total: None,
) -> Plan:
    """Go on with the run in `out`, or the newest below `runs/`, from its newest whole checkpoint.

    `changes` are the options given anew. Raises UserError for one that would make it a different run, for data that is
    no longer the same, and where there is no run.
    """
    if out is None:
        found = checkpoint.runs(Path("runs"))
        if not found:
            raise UserError("there is no run under runs/ to continue; start one with 'gpt2 train'")
        out = found[0]
    if not (out / "run.json").is_file():
        raise UserError(f"{out} is not a run folder: it has no run.json; start one with 'gpt2 train --out {out}'")
    run = atomic.read_json(out / "run.json")
    try:
        given, wanted, tokens = run["data"]["given"], run["data"]["sha256"], Path(run["data"]["tokens"])
        model = from_dict(GPTConfig, run["model"], f"{out / 'run.json'}")
        before = from_dict(TrainConfig, run["train"], f"{out / 'run.json'}")
        init_from, asked = run["init_from"], dict(run["asked"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{out / 'run.json'} is not one of ours: {error!r}") from None
    for name, value in changes.items():
        had = (asdict(model) | asdict(before)).get(name)
        if name not in FREE_ON_RESUME and value not in (had, asked.get(name, getattr(TrainConfig(), name, had))):
            raise UserError(
                f"--{name.replace('_', '-')} {value} would make {out} a different run (it has {asked.get(name, had)}); "
                "leave it out, or start a new run with another --out"
            )
    train = replace(before, **{name: value for name, value in changes.items() if name in FREE_ON_RESUME})
    train = replace(train, device=device.pick_device(train.device).type)
    start = checkpoint.latest(out, on_skip)
    if start and (train.steps or 0) < checkpoint.step_of(start):
        raise UserError(f"--steps {train.steps} is less than the {checkpoint.step_of(start)} steps {out} has already done")
    encoding = Encoding.gpt2()
    if start or init_from:
        encoding, _ = checkpoint.find_encoding(start or Path(init_from), model.vocab_size)
    if not tokens.is_dir() or data is not None:
        source = data if data is not None else None if given == str(corpus.EMBEDDED) else given
        tokens, _ = _find_tokens(source, train, encoding, cache, on_tokenize)
    if fingerprint(tokens) != wanted:
        raise UserError(f"the data is not what {out} was trained on ({given} changed?); start a new run with another --out")
    train_tokens, val_tokens = count_tokens(tokens)
    notes = [] if start else [f"{out} has no whole checkpoint: starting from zero"]
    if train.steps != before.steps:
        notes.append(f"length changed from {before.steps:,} to {train.steps:,} steps")
    return Plan(
        out, given, tokens, wanted, model, train, encoding, init_from, train_tokens, val_tokens, asked, start, tuple(notes)
    )


# ==== the parts of a decision ====


def _decide_shape(
    shape: dict[str, Any], train: TrainConfig, preset: str, start: Path | None, encoding: Encoding, notes: list[str]
) -> tuple[GPTConfig, TrainConfig]:
    """The model, and T: from scratch the block size is the training length unless given."""
    if start:
        known = huggingface.read_config(start)
        for name, value in shape.items():
            if name not in ("dropout", "attn_dropout") and value != getattr(known, name):
                raise UserError(f"--{name.replace('_', '-')} {value}: the model of --init-from has {getattr(known, name)}")
        # Its own dropout of 0.1 was never used for training here: fine-tuning has what is asked, by default none.
        model = replace(known, **{"dropout": 0.0, "attn_dropout": 0.0} | shape)
    else:
        chosen = PRESETS[preset] | shape
        chosen.setdefault("block_size", train.seq_len or DEFAULT_SEQ_LEN)
        model = from_dict(GPTConfig, {"vocab_size": encoding.n_vocab} | chosen, "model")
    seq_len = train.seq_len or min(model.block_size, 1024)
    if seq_len > model.block_size:
        raise UserError(f"--seq-len {seq_len} is longer than the model's context of {model.block_size}")
    if not start and seq_len < model.block_size:
        notes.append(f"rows have {seq_len} tokens: positions {seq_len} to {model.block_size - 1} are never trained")
    return model, replace(train, seq_len=seq_len)


def _find_tokens(
    data: str | Path | None,
    train: TrainConfig,
    encoding: Encoding,
    cache: Path | None,
    on_tokenize: corpus.Progress,
) -> tuple[Path, str]:
    """The folder of shards of `data`, tokenized into the cache where it is text, and its fingerprint."""
    path = Path(data) if data is not None else corpus.EMBEDDED
    if path.is_dir() and (find_shards(path, "train") or find_shards(path, "val") or (path / "manifest.json").is_file()):
        folder = path.resolve()
    else:
        policy = corpus.Policy(train.val_fraction, train.plain, train.errors)
        folder = corpus.cached([path], cache or corpus.default_cache(), encoding=encoding, policy=policy, progress=on_tokenize)
    return folder, fingerprint(folder)


def _check_ids(folder: Path, vocab_size: int, encoding: Encoding) -> None:
    """Raises UserError for shards of another tokenizer, or, where they do not tell, with ids the model does not know."""
    if (folder / "manifest.json").is_file():
        made_with = atomic.read_json(folder / "manifest.json").get("tokenizer_sha256")
        if made_with == encoding.sha256:
            return
        if made_with:
            raise UserError(f"{folder} was tokenized with another vocabulary than the model's: tokenize the text again")
    for split in ("train", "val"):
        if find_shards(folder, split) and (largest := Tokens.open(folder, split).largest()) >= vocab_size:
            raise UserError(f"{folder}: its {split} shards hold id {largest:,}, but the model knows {vocab_size:,} ids")


def _decide_machine(train: TrainConfig, where: torch.device, notes: list[str]) -> TrainConfig:
    dtype = device.pick_dtype(train.dtype, where)
    if where.type == "cpu" and train.dtype == "auto" and dtype == "fp32":
        notes.append("fp32: this CPU has no bf16 arithmetic")
    if where.type == "cpu" and dtype == "bf16" and not device.has_bf16(where):
        notes.append("bf16 is emulated on this CPU and hundreds of times slower than fp32")
    compiled = "on" if train.compile == "on" or (train.compile == "auto" and where.type == "cuda") else "off"
    return replace(train, device=where.type, dtype=dtype, compile=compiled)


def _decide_length(train: TrainConfig, model: GPTConfig, train_tokens: int, fine_tuning: bool, notes: list[str]) -> TrainConfig:
    """Micro-batch, accumulation, number of steps and learning rate."""
    T = train.seq_len or model.block_size
    rows = max(1, train.tokens_per_step // T)
    most = max(1, (4096 if train.device == "cpu" else 16384) // T)  # rows of a micro-step that fit and pay
    B = train.batch_size or next(b for b in range(min(rows, most), 0, -1) if rows % b == 0)
    if train_tokens < B * T + 1:
        raise UserError(
            f"the training text has {train_tokens:,} tokens, but one batch of {B} rows of {T} needs {B * T + 1:,}: "
            "use more text, or a smaller --batch-size or --seq-len"
        )
    tokens_per_step = math.ceil(rows / B) * B * T
    if tokens_per_step != train.tokens_per_step:
        notes.append(f"{tokens_per_step:,} tokens a step: whole micro-steps of {B} rows of {T}")
    if train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * train_tokens / tokens_per_step))
    else:
        steps = train.steps or DEFAULT_STEPS
    # Measured at width 384 on Shakespeare; wider models want smaller ones. AdamW's are then about GPT-3's (table 2.1).
    best = 3e-3 if train.optimizer == "muon" else 1e-3
    lr = train.lr or best * min(1.0, 384 / model.n_embd) * (0.1 if fine_tuning else 1.0)
    min_lr = lr / 10 if train.min_lr is None else train.min_lr
    if min_lr > lr:
        raise UserError(f"--min-lr {min_lr} is above --lr {lr}")
    warmup_steps = max(1, steps // 20) if train.warmup_steps is None else train.warmup_steps
    return replace(
        train,
        batch_size=B,
        tokens_per_step=tokens_per_step,
        steps=steps,
        epochs=None,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=warmup_steps,
    )


def _check_room(plan: Plan) -> list[str]:
    """Warnings; raises UserError where the disk cannot hold one checkpoint."""
    notes = []
    there = plan.out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < plan.disk // (checkpoint.KEEP + 2):
        raise UserError(
            f"the disk of {plan.out} has {free / 1e9:.1f} GB free, but one checkpoint needs "
            f"{plan.disk / (checkpoint.KEEP + 2) / 1e9:.1f} GB: give --out on another disk"
        )
    if free < plan.disk:
        notes.append(f"the disk has {free / 1e9:.1f} GB free, but the checkpoints may need {plan.disk / 1e9:.1f} GB")
    total = device.memory_total(plan.device)
    if total and plan.memory > total:
        notes.append(f"about {plan.memory / 1e9:.1f} GB of memory needed, {total / 1e9:.1f} GB there: lower --batch-size")
    return notes
