"""The optimizer's parameter groups and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)  # GPT-3 (Brown et al. 2020, appendix B)


def make_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) that decays matrices and leaves biases and LayerNorms alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=parameters[0].device.type in ("cuda", "cpu", "mps"))


def lr_at(step: int, *, steps: int, lr: float, min_lr: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of update `step`, counted from 0: a linear warm-up to `lr`, then `cosine` or `linear` down to
    `min_lr` at the last update, or `constant`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)  # 0 to 1
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return min_lr + max(0.0, left) * (lr - min_lr)
