"""`gpt2 train --log tensorboard`: the metrics of a run for TensorBoard, beside its `metrics.jsonl`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.metrics import StepMetrics

SCALARS = ("loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_second", "memory")


class Board:
    """Writes event files into `run`/tensorboard. Raises UserError where TensorBoard is not installed."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._run, self._first_step = run, first_step
        self._writer: Any = None  # not before the run has its folder
        if not find_spec("tensorboard"):
            raise UserError("--log tensorboard needs tensorboard: pip install tensorboard")

    def show(self, metrics: StepMetrics) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted session wrote after the checkpoint that this one goes on from will come again.
            self._writer = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._first_step + 1)
        for name in SCALARS:
            value = getattr(metrics, name)
            if value is not None:
                self._writer.add_scalar(name, value, metrics.step)
        for n, sample in enumerate(metrics.samples):
            self._writer.add_text(f"sample {n}", sample, metrics.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
