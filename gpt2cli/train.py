"""The training loop: a generator of `StepMetrics`. It prints nothing, and writes only the run folder.

The state of a run is the model, the optimizer, torch's random generators, the step and the position in the data; all of it
is in every checkpoint, so that a run that goes on is the run that would have been.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2cli import atomic, checkpoint, device
from gpt2cli.data import DataLoaderLite, eval_batches
from gpt2cli.errors import UserError
from gpt2cli.formats import huggingface
from gpt2cli.model import GPT
from gpt2cli.optim import lr_at, make_optimizers
from gpt2cli.plan import Plan
from gpt2cli.shards import Tokens

LOGGED = ("step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "elapsed")  # of a step in metrics.jsonl
Batch = tuple[Tensor, Tensor]  # x, y, each (B, T)
Precision = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepMetrics:
    """What happened at a step; the first eight fields of a logged step, and the evaluation's, go to `metrics.jsonl`."""

    step: int  # updates done, from 1
    loss: float  # nats a token, mean over the step's micro-batches
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # trained on so far
    tokens_per_second: float  # of the training steps since the last such line
    elapsed: float  # seconds of the run, earlier sessions included
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    saved: Path | None = None
    samples: Sequence[str] = ()


@dataclass
class Progress:
    """The part of a run's state that is neither tensor nor constant; kept in `training.json`."""

    step: int = 0  # updates done
    position: int = 0  # of the loader, in rows
    elapsed: float = 0.0  # seconds
    scaler: dict[str, Any] = field(default_factory=dict)  # of fp16's gradients


def train(
    plan: Plan,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    sample: Callable[[GPT], Sequence[str]] | None = None,
) -> Iterator[StepMetrics]:
    """Carry out a plan; at the end, or once `should_stop()`, everything is saved. Yields each step that was logged,
    evaluated, saved or sampled from (`sample` turns the model into texts).

    Raises UserError where the loss is not finite, OSError where the run folder cannot be written.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    atomic.write_json(plan.out / "run.json", plan.to_json())
    run, cadence = Run(plan), plan.train
    yield from run.catch_up()
    saved_step, metrics = run.progress.step, None
    while run.progress.step < plan.steps and not should_stop():
        run.step()
        step, metrics = run.progress.step, None
        last = step == plan.steps
        cadences = cadence.log_every, cadence.eval_every, cadence.save_every, cadence.sample_every
        if not (last or any(is_due(step, every) for every in cadences)):
            continue
        metrics = run.measure(log=last or is_due(step, cadence.log_every))
        saved = run.save() if last or is_due(step, cadence.save_every) else None
        if run.val_tokens and (last or is_due(step, cadence.eval_every)):
            val_loss, bits, improved = run.evaluate()
            metrics = replace(metrics, val_loss=val_loss, val_bits_per_byte=bits)
            saved = saved or (run.save() if improved else None)
        if saved:
            saved_step = step
            checkpoint.prune(plan.out)
        samples = sample(run.model) if sample and is_due(step, cadence.sample_every) else ()
        yield replace(metrics, saved=saved, samples=samples)
    if saved_step != run.progress.step:  # stopped between two checkpoints
        metrics = metrics or run.measure(log=False)
        saved = run.save()
        checkpoint.prune(plan.out)
        yield replace(metrics, saved=saved, val_loss=None, val_bits_per_byte=None)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class Run:
    """The live objects behind a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        atomic.sweep(plan.out)
        device.set_up(plan.train.seed)
        self.model = GPT(plan.model)
        if plan.init_from and not plan.resume_from:
            self.model.load_state_dict(huggingface.read(Path(plan.init_from))[1])
        self.model.to(plan.device)
        self.optimizers = make_optimizers(self.model, plan.train.optimizer, plan.train.weight_decay)
        self.scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.train.dtype == "fp16")
        self.progress = self._restore() if plan.resume_from else Progress()
        self.loader = DataLoaderLite(
            plan.batch_size,
            plan.seq_len,
            Tokens.open(plan.tokens, "train"),
            seed=plan.train.seed,
            position=self.progress.position,
        )
        self.val_tokens = Tokens.open(plan.tokens, "val") if plan.val_tokens else None
        # A model may know more ids than its tokenizer; they stand for no text.
        self.byte_lengths = torch.zeros(max(plan.model.vocab_size, plan.encoding.n_vocab), dtype=torch.long)
        self.byte_lengths[: plan.encoding.n_vocab] = torch.from_numpy(plan.encoding.byte_lengths())
        self._window_tokens, self._window_seconds = 0, 0.0  # of the steps since the last measure
        self._trim_metrics()
        if plan.train.compile == "on":
            self.model.compile()

    def _restore(self) -> Progress:
        assert self.plan.resume_from
        facts = checkpoint.restore(self.plan.resume_from, self.model, self.optimizers)
        try:
            progress = Progress(**facts)
        except TypeError as error:
            raise UserError(f"{self.plan.resume_from / 'training.json'} is not one of ours: {error}") from None
        self.scaler.load_state_dict(progress.scaler)
        return progress

    def precision(self) -> AbstractContextManager[object]:
        return device.precision(self.plan.device, self.plan.train.dtype, self.plan.train.attention)

    def step(self) -> None:
        """One update."""
        started = time.perf_counter()
        config, where = self.plan.train, self.plan.device
        batches = [self.loader.next_batch() for _ in range(self.plan.accumulation)]
        self._lr = lr_at(
            self.progress.step,
            steps=self.plan.steps,
            lr=config.lr or 0.0,
            min_lr=config.min_lr or 0.0,
            warmup_steps=config.warmup_steps or 0,
            schedule=config.schedule,
        )
        self._loss, self._grad_norm = train_step(
            self.model,
            self.optimizers,
            [(x.to(where), y.to(where)) for x, y in batches],
            lr=self._lr,
            grad_clip=config.grad_clip,
            precision=self.precision,
            scaler=self.scaler,
        )
        self.progress.step += 1
        self.progress.position = self.loader.position
        self._window_tokens += config.tokens_per_step
        self._add_time(started)

    def measure(self, log: bool) -> StepMetrics:
        """The step just done, with `log` also written to `metrics.jsonl`. Waits for the device."""
        started = time.perf_counter()
        loss, grad_norm = float(self._loss), float(self._grad_norm)
        self._add_time(started)
        # fp16's scaler skips a step whose gradients overflowed by itself.
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            raise UserError(
                f"the loss is {loss} and the gradient norm {grad_norm} at step {self.progress.step}: lower --lr (it was "
                f"{self._lr:.1e}); this step was not saved"
            )
        metrics = StepMetrics(
            step=self.progress.step,
            loss=loss,
            lr=self._lr,
            grad_norm=grad_norm,
            tokens=self.progress.step * self.plan.train.tokens_per_step,
            tokens_per_second=self._window_tokens / self._window_seconds,
            elapsed=self.progress.elapsed,
        )
        self._window_tokens, self._window_seconds = 0, 0.0
        if log:
            self._log({key: value for key, value in asdict(metrics).items() if key in LOGGED})
        return metrics

    def evaluate(self) -> tuple[float, float | None, bool]:
        """Validation loss, bits per byte, and whether that loss is the lowest of the run so far."""
        assert self.val_tokens
        started = time.perf_counter()
        before = checkpoint.val_losses(self.plan.out).values()
        batches = eval_batches(self.val_tokens, self.plan.batch_size, self.plan.seq_len, self.plan.train.eval_tokens)
        val_loss, bits = validate(self.model, batches, self.precision, self.byte_lengths)
        self._log({"step": self.progress.step, "val_loss": val_loss, "val_bits_per_byte": bits})
        self.progress.elapsed += time.perf_counter() - started
        return val_loss, bits, val_loss <= min(before, default=val_loss)

    def save(self) -> Path:
        started = time.perf_counter()
        self.progress.scaler = self.scaler.state_dict()
        facts = {key: value for key, value in asdict(self.progress).items() if key != "step"}
        folder = checkpoint.save(self.plan.out, self.progress.step, self.model, self.optimizers, self.plan.encoding, facts)
        self.progress.elapsed += time.perf_counter() - started
        return folder

    def catch_up(self) -> Iterator[StepMetrics]:
        """After a resume: the evaluation that was due at the checkpoint's step, where it was not written any more."""
        lines = [line for line in checkpoint.read_metrics(self.plan.out) if line["step"] == self.progress.step]
        due = self.progress.step == self.plan.steps or is_due(self.progress.step, self.plan.train.eval_every)
        if self.val_tokens and self.progress.step and due and not any("val_loss" in line for line in lines):
            val_loss, bits, _ = self.evaluate()
            for line in lines:
                if set(LOGGED) <= set(line):
                    yield StepMetrics(**{key: line[key] for key in LOGGED}, val_loss=val_loss, val_bits_per_byte=bits)

    def _add_time(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self._window_seconds += seconds
        self.progress.elapsed += seconds

    def _trim_metrics(self) -> None:
        """Forget the lines of steps that will be done again, and one that a crash cut short."""
        path = self.plan.out / "metrics.jsonl"
        kept = [line for line in checkpoint.read_metrics(self.plan.out) if line["step"] <= self.progress.step]
        atomic.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def _log(self, line: dict[str, Any]) -> None:
        with (self.plan.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# ==== one update, one evaluation ====


def train_step(
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float,
    precision: Precision = contextlib.nullcontext,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """One update from the mean gradient of the micro-batches. Returns their mean loss and the gradient's norm before
    clipping, as tensors on the device, so that nobody waits for them."""
    total = torch.zeros((), device=batches[0][0].device)
    scaler = scaler or torch.amp.GradScaler(total.device.type, enabled=False)
    model.train()
    for x, y in batches:
        with precision():
            _, loss = model(x, y, loss_only=True)
        scaler.scale(loss / len(batches)).backward()
        total += loss.detach() / len(batches)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return total, grad_norm


@torch.no_grad()
def validate(model: GPT, batches: Iterator[Batch], precision: Precision, byte_lengths: Tensor) -> tuple[float, float | None]:
    """Mean loss in nats a token, and bits per byte of the text the tokens stand for (V,) `byte_lengths` long;
    None where they stand for none."""
    model.eval()
    where = model.wte.weight.device
    nats, tokens, text_bytes = 0.0, 0, 0
    for x, y in batches:
        with precision():
            _, loss = model(x.to(where), y.to(where), loss_only=True)
        nats += float(loss) * y.numel()
        tokens += y.numel()
        text_bytes += int(byte_lengths[y].sum())
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None
