"""The output layer and its cross entropy in one, in chunks of rows: the logits of a whole batch never exist.

With V = 50,257 the logits are most of a small model's memory. Here each chunk's logits become probabilities, these the
gradient of the logits, and that is multiplied out at once; backward has only to scale (the idea of Liger Kernel's fused
linear cross entropy, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # rows; fewer add passes over the weight's gradient, more add memory


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(F.linear(x, weight).float(), targets)`: the mean in nats, of x (N, C), weight (V, C), targets (N).
    Under autocast the products run in its dtype, the softmax in fp32."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
    with torch.autocast(device_type, enabled=False):
        return _FusedCrossEntropy.apply(x, weight, targets, dtype, torch.is_grad_enabled())


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, need_grad: bool) -> Tensor:
        w = weight.to(dtype)  # (V, C)
        total = torch.zeros((), device=x.device)
        grad_x = torch.empty_like(x)  # (N, C)
        grad_w: Tensor | None = None  # (V, C)
        for start in range(0, len(x), CHUNK):
            a = x[start : start + CHUNK].to(dtype)  # (n, C)
            target = targets[start : start + CHUNK, None]  # (n, 1)
            logits = a @ w.T  # (n, V)
            top = logits.amax(dim=1, keepdim=True).float()  # (n, 1)
            p = logits.softmax(dim=1, dtype=torch.float32)  # (n, V)
            # The log of the sum of exponentials, from the likeliest id's, since the target's probability may vanish.
            lse = top - p.amax(dim=1, keepdim=True).log()  # (n, 1)
            total += (lse - logits.gather(1, target).float()).sum()
            if need_grad:
                del logits
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                grad = p.to(dtype)  # of the logits, but for the mean's 1 / N
                grad_x[start : start + CHUNK] = grad @ w
                part = grad.T @ a
                grad_w = part.to(weight.dtype) if grad_w is None else grad_w.add_(part)
        ctx.gradients = grad_x, grad_w
        return total / len(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x, grad_w = ctx.gradients  # a second backward fails here, since the first one changes them in place
        ctx.gradients = None
        scale = grad_outputs[0] / len(grad_x)
        return grad_x.mul_(scale), grad_w.mul_(scale), None, None, None
