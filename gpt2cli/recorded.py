"""A short update of training as one CUDA graph.

A small model's update is a thousand small kernels or more. Started one by one from Python they take many times longer to start
than to run, so that the GPU waits most of the time. Recorded once, they are started together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gpt2cli.ahead import Graphs
from gpt2cli.config import GPTConfig
from gpt2cli.step import Batch

SHORT = 2e13  # FLOPs; to start the kernels of longer updates takes no longer than to run them
Update = Callable[[Batch, Tensor], tuple[Tensor, Tensor]]  # of one micro-batch, with a learning rate: see `step.train_step`


def is_short(config: GPTConfig, where: torch.device, B: int, T: int) -> bool:
    """Whether it is worth recording an update of B rows of T tokens."""
    return where.type == "cuda" and B * T * config.flops_per_token(T) < SHORT


class Recorded:
    """Updates of a model from batches of one shape: the first as it is, which makes the optimizers' state and loads the
    kernels; the second is recorded, and from then on the record runs. What such an update holds of memory the
    record keeps, beside what the first one left to torch."""

    def __init__(self, update: Update, model: nn.Module, batch: Batch) -> None:
        """`update` neither looks at a tensor nor makes one that is there for the next; its state stays where it is."""
        self._update, self._model = update, model
        self._batch = torch.empty_like(batch[0]), torch.empty_like(batch[1])
        device = batch[0].device
        self._lr, self._results = torch.zeros((), device=device), torch.zeros(2, device=device)
        self._graphs = Graphs(device, kind=object(), what="training")  # nobody else's

    def __call__(self, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
        """An update; returns what it does."""
        for here, given in zip(self._batch, batch, strict=True):
            here.copy_(given)
        self._lr.fill_(lr)
        self._graphs.run("update", self._work)
        loss, grad_norm = self._results.clone()
        return loss, grad_norm

    def _work(self) -> None:
        self._model.zero_grad(set_to_none=True)  # where recording had to end, they are half there
        self._results.copy_(torch.stack(self._update(self._batch, self._lr)))
