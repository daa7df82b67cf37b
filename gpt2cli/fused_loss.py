"""What `loss.into_gradient` does, on a GPU in one kernel, written in Triton.

Few rows are worked on at a time, which an H200's L2 cache holds in 16 bits, so that logits are read from memory once and
written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, AT_ONCE = 8192, 8, 3  # logits looked at at once, and rows that a processor works on


def into_gradient(logits: Tensor, ids: Tensor, counted: Tensor, need_grad: bool) -> Tensor:
    """The cross entropy of each row of logits (n, V) and its id (n), in nats; where the logits were is then their gradient, if
    there is need of it."""
    (n, V), device = logits.shape, logits.device
    losses = torch.empty(n, device=device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if logits.is_cuda else 2
    block = min(BLOCK, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        _into_gradient[(min(n, AT_ONCE * processors),)](logits, ids, counted, losses, n, V, need_grad, block, num_warps=WARPS)
    return losses


@triton.jit
def _into_gradient(logits, ids, counted, losses, rows, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    log2_e: tl.constexpr = 1.4426950408889634  # exp(x) is 2 ** (x log2 e), which is what the GPU has
    here, ahead = logits + tl.program_id(0).to(tl.int64) * V, tl.num_programs(0).to(tl.int64) * V
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        target, counts = tl.load(ids + row), tl.load(counted + row).to(tl.float32)
        expected = tl.load(here + target).to(tl.float32)
        top, total = -float("inf"), tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(here + n, mask=n < V, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
            higher = tl.maximum(top, tl.max(x))
            total = total * tl.exp2((top - higher) * log2_e) + tl.exp2(x * log2_e - higher * log2_e)
            top = higher
        lse = tl.log(tl.sum(total)) + top
        tl.store(losses + row, (lse - expected) * counts)
        if GRAD:
            for start in range(0, V, BLOCK):
                n = start + tl.arange(0, BLOCK)
                x = tl.load(here + n, mask=n < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
                gradient = counts * tl.exp2(x * log2_e - lse * log2_e)
                tl.store(here + n, gradient.to(logits.dtype.element_ty), mask=n < V, eviction_policy="evict_first")
            tl.debug_barrier()
            gradient = counts * (tl.exp2((expected - lse) * log2_e) - 1)
            tl.store(here + target, gradient.to(logits.dtype.element_ty))
        here += ahead
