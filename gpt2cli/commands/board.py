"""`gpt2 train --log tensorboard`: the metrics of a run for TensorBoard, beside its `metrics.jsonl`."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.metrics import StepMetrics

SCALARS = ("loss", "val_loss", "val_bits_per_byte", "lr", "grad_norm", "tokens_per_second", "memory")


class Board:
    """Writes event files into `run`/tensorboard. Raises UserError where TensorBoard is not installed."""

    def __init__(self, run: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # not there, or not with this protobuf or numpy
            raise UserError(f"--log tensorboard needs tensorboard: pip install tensorboard ({error})") from None
        # What an interrupted session wrote after the checkpoint that this one goes on from will come again.
        self._begin = partial(SummaryWriter, str(run / "tensorboard"), purge_step=first_step + 1)
        self._writer: Any = None  # not before the run has its folder

    def show(self, metrics: StepMetrics) -> None:
        with contextlib.suppress(OSError):  # a full disk must not cost the run
            self._writer = self._writer or self._begin()
            for name in SCALARS:
                value = getattr(metrics, name)
                if value is not None:
                    self._writer.add_scalar(name, value, metrics.step)
            for n, sample in enumerate(metrics.samples):
                self._writer.add_text(f"sample {n}", sample, metrics.step)

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
