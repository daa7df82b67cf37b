"""Before a run: everything that was left open is decided here, checked against the machine and the data, and written down."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gpt2cli import atomic, checkpoint, device, documents
from gpt2cli.batch import decide_batch, need
from gpt2cli.config import PRESETS, GPTConfig, TrainConfig, from_dict
from gpt2cli.data import micro_steps
from gpt2cli.errors import UserError, many, size
from gpt2cli.formats import hub, huggingface
from gpt2cli.optim import best_lr
from gpt2cli.provenance import provenance
from gpt2cli.sources import Given, Source, check_sources, data_sha256, find_sources, find_vocabulary, to_json, weights_of
from gpt2cli.survey import Progress
from gpt2cli.tokenizer import Encoding

DEFAULT_SEQ_LEN = 256
DEFAULT_STEPS = 150


@dataclass(frozen=True)
class Plan:
    """A run, decided. `train` holds no `None` and no `auto`."""

    out: Path
    sources: tuple[Source, ...]  # of the data
    model: GPTConfig
    train: TrainConfig
    encoding: Encoding
    init_from: str | None
    init_sha256: str | None  # of its weights
    asked: Mapping[str, Any]  # the options that were given, before anything was decided
    resume_from: Path | None = None
    sessions: tuple[Any, ...] | None = None  # of a run that goes on: what `run.json` says of those before
    changed: Mapping[str, Any] = field(default_factory=dict)  # option -> [before, now]
    notes: tuple[str, ...] = ()
    world_size: int = 1  # processes that share the work

    @property
    def device(self) -> torch.device:
        return torch.device(self.train.device)

    @property
    def data_sha256(self) -> str:
        return data_sha256(self.sources)

    @property
    def train_tokens(self) -> int:
        return sum(source.train_tokens for source in self.sources)

    @property
    def val_tokens(self) -> int:
        return sum(source.val_tokens for source in self.sources)

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
    def rows(self) -> int:  # of an update, on all ranks together
        return self.train.tokens_per_step // self.seq_len

    @property
    def accumulation(self) -> int:  # micro-steps of an update, on each rank
        return len(micro_steps(self.rows, self.batch_size, 0, self.world_size))

    @property
    def flops(self) -> int:  # of the model, for an update
        return self.train.tokens_per_step * self.model.flops_per_token(self.seq_len)

    @property
    def memory(self) -> int:
        """Bytes expected at the peak, in each process."""
        return need(self.model, self.train, -(-self.rows // (self.world_size * self.accumulation)), self.world_size)

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that exist at the same time: two newest, one of a stop, the best, and one being written."""
        return (checkpoint.KEEP + 3) * self.checkpoint_bytes

    @property
    def checkpoint_bytes(self) -> int:
        return 12 * self.model.num_parameters()

    @property
    def nproc(self) -> str:  # what a command that goes on with the run needs
        return f" --nproc {self.world_size}" if self.world_size > 1 else ""

    def out_of_memory(self, step: int) -> str:
        """What to say when a step did not fit, with settings that will."""
        B = next((b for b in range(self.batch_size // 2, 0, -1) if self.rows % b == 0), None)
        what = f"out of memory at step {step} with {self.batch_size} rows of {self.seq_len} tokens at a time"
        if B is None:
            return f"{what}: use a smaller --seq-len, --n-layer or --n-embd, in a new run"
        less = replace(self, train=replace(self.train, batch_size=B)).memory
        return (
            f"{what}, about {size(self.memory)}. --batch-size {B} needs about {size(less)} and learns the same: "
            f"gpt2 train --resume --out {self.out} --batch-size {B}{self.nproc}"
        )

    def never_finite(self, loss: float) -> str:
        """What to say of a loss that is not finite at the very first step, which no learning rate has to do with."""
        start = f"the weights of {self.init_from} are broken" if self.init_from else "the model or the machine is broken"
        other = f"{self.train.dtype} is too small for it: try --dtype fp32" if self.train.dtype != "fp32" else "start another"
        return f"the loss of the first step is {loss}: {start}, or {other}"

    def to_json(self) -> dict[str, Any]:
        """`run.json`: what is needed to repeat the run, and to go on with it."""
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "from_step": self.first_step,
            "changed": dict(self.changed),
            "world_size": self.world_size,
            "made_with": provenance(self.device),
        }
        return {
            "data": to_json(self.sources),
            "init_from": self.init_from and atomic.to_home(self.init_from),
            "init_sha256": self.init_sha256,
            "asked": dict(self.asked),
            "model": asdict(self.model),
            "train": asdict(self.train),
            "sessions": [*(self.sessions or ()), session],
        }


def make_plan(
    data: Given | None = None,
    shape: Mapping[str, Any] | None = None,
    train: TrainConfig = TrainConfig(),
    *,
    preset: str = "seed",
    init_from: str | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    world_size: int = 1,
    on_tokenize: Progress = lambda what, done, total: None,
    on_download: hub.Progress | None = None,
) -> Plan:
    """Decide a new run on `data`: a text file, a folder of them, or a folder of token shards; a mapping from such paths to
    their weights; the embedded Shakespeare where None. `shape` has the fields of GPTConfig that were chosen.

    Raises UserError for anything that would stop the run later.
    """
    check_parallel(train)
    out = out or checkpoint.free_name(Path("mixture" if isinstance(data, Mapping) else data or documents.EMBEDDED))
    if (out / "run.json").exists():
        raise UserError(f"{out} already holds a run: continue it with 'gpt2 train --resume --out {out}', or give another --out")
    atomic.check_place(out)
    # What begins with a dot is a lock or a torn file of a run that was killed before it began.
    if any(not path.name.startswith(".") for path in out.iterdir()) if out.is_dir() else out.exists():
        raise UserError(f"{out} already holds files: give another --out")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; expected {', '.join(PRESETS)}")
    start = checkpoint.find_model(init_from, on_download) if init_from else None
    where = device.pick_device(train.device)
    asked = dict(shape or {}) | {"preset": preset, "init_from": init_from and atomic.to_home(init_from)}
    asked |= {name: value for name, value in vars(train).items() if value != getattr(TrainConfig(), name)}
    notes: list[str] = []

    encoding = _decide_vocabulary(data, train, start, notes)
    n_vocab = train.train_vocab or encoding.n_vocab
    model, train = _decide_shape(dict(shape or {}), train, preset, start, n_vocab, notes)

    sources = find_sources(data, train, encoding, cache, on_tokenize)
    if train.train_vocab:
        encoding = find_vocabulary([sources[0].tokens]) or encoding
    val_tokens = sum(source.val_tokens for source in sources)
    if not val_tokens:
        notes.append("no validation split: the newest checkpoint counts as the best")
    elif val_tokens < (train.seq_len or model.block_size):
        notes.append(f"validation is on {many(val_tokens, 'token')} only, which says little: hold out more (--val-fraction)")
    check_sources(sources, train.seq_len or 1, model.vocab_size, encoding)
    train = _decide_machine(train, where, notes)
    device.check_attention(where, train.dtype, train.attention, model.head_size, model.attn_dropout)
    train_tokens = sum(source.train_tokens for source in sources)
    train = decide_batch(train, model, train_tokens, world_size, notes)
    train = _decide_length(train, model, train_tokens, bool(start), notes)
    plan = Plan(
        out=out,
        sources=sources,
        model=model,
        train=train,
        encoding=encoding,
        init_from=str(start) if start else None,
        init_sha256=huggingface.weights_sha256(start) if start else None,
        asked=asked,
        world_size=world_size,
    )
    return replace(plan, notes=tuple(notes + _check_room(plan)))


# ==== the parts of a decision ====


def check_parallel(train: TrainConfig) -> None:
    """Raises UserError for what FSDP, where no process has the whole model, cannot do."""
    if train.parallel != "fsdp":
        return
    if train.sample_every:
        raise UserError(
            "--parallel fsdp does not sample while it trains: leave out --sample-every (0), and sample from a checkpoint"
        )
    if train.dtype == "fp16":
        raise UserError("--parallel fsdp does not scale gradients, as fp16 needs: use --dtype bf16 or fp32")


def _decide_vocabulary(data: Given | None, train: TrainConfig, start: Path | None, notes: list[str]) -> Encoding:
    """That of the model to start from, or of data that is tokenized already, or GPT-2's."""
    if start is None:
        return find_vocabulary([Path(path) for path in weights_of(data)]) or Encoding.gpt2()
    if train.train_vocab:
        raise UserError(f"--train-vocab is for a model from scratch: {start} has its vocabulary")
    encoding, embedded = checkpoint.find_encoding(start, huggingface.read_config(start).vocab_size)
    if embedded:
        notes.append(f"{start} brings no tokenizer: GPT-2's is used")
    return encoding


def _decide_shape(
    shape: dict[str, Any], train: TrainConfig, preset: str, start: Path | None, n_vocab: int, notes: list[str]
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
        model = from_dict(GPTConfig, {"vocab_size": n_vocab} | chosen, "model")
    seq_len = train.seq_len or min(model.block_size, 1024)
    if seq_len > model.block_size:
        raise UserError(f"--seq-len {seq_len} is longer than the model's context of {model.block_size}")
    if not start and seq_len < model.block_size:
        notes.append(f"rows have {seq_len} tokens: positions {seq_len} to {model.block_size - 1} are never trained")
    return model, replace(train, seq_len=seq_len)


def _decide_machine(train: TrainConfig, where: torch.device, notes: list[str]) -> TrainConfig:
    dtype = device.pick_dtype(train.dtype, where)
    if where.type == "cpu" and train.dtype == "auto" and dtype == "fp32":
        notes.append("fp32: this CPU has no bf16 arithmetic")
    if where.type == "cpu" and dtype == "bf16" and not device.has_bf16(where):
        notes.append("bf16 is emulated on this CPU and hundreds of times slower than fp32")
    if where.type == "cpu" and dtype == "fp16":
        notes.append("fp16 is for GPUs: on a CPU it is much slower than fp32")
    compiled = "on" if train.compile == "on" or (train.compile == "auto" and where.type == "cuda") else "off"
    log_every = train.log_every if train.log_every is not None else 1 if where.type == "cpu" else 10
    return replace(train, device=where.type, dtype=dtype, compile=compiled, log_every=log_every)


def default_warmup(steps: int) -> int:
    return max(1, steps // 20)


def _decide_length(train: TrainConfig, model: GPTConfig, train_tokens: int, fine_tuning: bool, notes: list[str]) -> TrainConfig:
    """Number of steps and learning rate."""
    B, T, tokens_per_step = train.batch_size or 1, train.seq_len or model.block_size, train.tokens_per_step
    if train_tokens < B * T + 1:
        raise UserError(
            f"the training text has {train_tokens:,} tokens, but one batch of {B} rows of {T} needs {B * T + 1:,}: "
            f"use more text, or a smaller {'--batch-size or ' if B > 1 else ''}--seq-len"
        )
    if train.epochs is not None:
        steps = max(1, math.ceil(train.epochs * train_tokens / tokens_per_step))
    else:
        steps = train.steps or DEFAULT_STEPS
    best = best_lr(train.optimizer, model.n_embd) * (0.1 if fine_tuning else 1.0)
    lr = train.lr or best
    if lr > 10 * best or lr < best / 100:
        notes.append(f"--lr {lr:g} is {lr / best:,.3g} times what was measured to train best at this width, {best:.1e}")
    min_lr = lr / 10 if train.min_lr is None else train.min_lr
    if min_lr > lr:
        raise UserError(f"--min-lr {min_lr} is above --lr {lr}")
    warmup_steps = default_warmup(steps) if train.warmup_steps is None else train.warmup_steps
    if warmup_steps > steps:
        notes.append(
            f"--warmup-steps {warmup_steps:,} is more than all {steps:,} steps: the learning rate never gets to {lr:g}"
        )
    return replace(
        train,
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
    if free < plan.checkpoint_bytes:
        raise UserError(
            f"the disk of {plan.out} has {size(free)} free, but one checkpoint needs {size(plan.checkpoint_bytes)}: "
            "give --out on another disk"
        )
    if free < plan.disk:
        notes.append(f"the disk has {size(free)} free, but the checkpoints may need {size(plan.disk)}")
    processes = plan.world_size if plan.device.type != "cuda" else 1
    total, needed = device.memory_total(plan.device), plan.memory * processes
    if total and needed > total:
        lower = "--batch-size" if plan.batch_size > 1 else "--seq-len, or choose a smaller model"
        notes.append(f"about {size(needed)} of memory needed, {size(total)} there: lower {lower}")
    return notes
