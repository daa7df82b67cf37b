"""Divergence insurance: judges each update before it is applied, on the device, so that nobody waits for the verdict."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 128  # updates that a spike is measured against, as in llm.c's outlier detector


class Guard:
    """An update is bad when its loss or gradient norm is not finite, or lies more than `spike` standard deviations above
    the mean of the last WINDOW good ones (llm.c, `llmc/outlier_detector.h`). Bad ones are not to be applied, and do not
    enter the window. With `spike` 0, and until the window is full, only numbers that are not finite are bad.
    """

    def __init__(self, device: torch.device, spike: float = 0.0) -> None:
        self.spike = spike
        self.history = torch.zeros(2, WINDOW, device=device)  # losses and gradient norms of good updates, the newest last
        self.good = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)  # bad ones since the last good one

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """() 1.0 where the update is to be skipped, else 0.0: what torch's fused optimizers call `found_inf`."""
        now = torch.stack([loss.detach(), grad_norm.detach()]).float()  # (2,)
        std, mean = torch.std_mean(self.history, dim=1)  # (2,), (2,)
        # A text learned by heart has next to no deviation: a hundredth of the mean is none yet.
        above = (now - mean) / torch.maximum(std, 0.01 * mean.abs() + 1e-6)
        spiked = (above > self.spike).any() & (self.good >= WINDOW) & (self.spike > 0)
        bad = ~now.isfinite().all() | spiked
        # All stays where it is, since an update may be recorded.
        self.history.copy_(torch.where(bad, self.history, torch.cat([self.history[:, 1:], now[:, None]], dim=1)))
        self.good += (~bad).float()
        self.skipped += bad.float()
        self.in_a_row.add_(1).mul_(bad.float())
        return bad.float()

    def state_dict(self) -> dict[str, Tensor]:
        """Its memory itself, to be read or filled."""
        return {"history": self.history, "good": self.good, "skipped": self.skipped, "in_a_row": self.in_a_row}
