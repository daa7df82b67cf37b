"""The next token from logits: the order of steps, and what each does, is transformers'."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2cli.config import SamplingConfig

ONE = 0x3F80  # the first 16 bits of 1.0


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V) with those of ids that are `seen` (B, V; bool) divided by `penalty` where positive, multiplied where
    negative (Keskar et al. 2019)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(logits: Tensor, config: SamplingConfig, uniform: Tensor) -> Tensor:
    """Ids (B) drawn from logits (B, V), each row by its number of `uniform` (B) in [0, 1): the first id at which the
    cumulative probability of all that are kept passes it. `drawing.draw` does the same on a GPU."""
    if config.greedy:
        return logits.argmax(dim=-1)
    logits = logits.float() / config.temperature
    V, ids = logits.shape[-1], None  # of the columns, where they are not the vocabulary any more
    if config.top_k is not None:
        logits, ids = logits.topk(min(config.top_k, V), dim=-1)  # (B, k), the likeliest first
    probabilities = logits.softmax(dim=-1)
    if config.top_p is not None and config.top_p < 1:
        if ids is not None:
            probabilities = _first(probabilities, config.top_p)
        else:  # a GPU would have to wait for what `nucleus` looks at
            keep = nucleus if probabilities.device.type == "cpu" else nucleus_by_sorting
            probabilities = keep(probabilities, config.top_p)
    if config.min_p is not None:
        least = config.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if ids is not None:  # in their order, those that are kept; the columns of others are as if of an id behind the last
        ids, order = ids.masked_fill(probabilities == 0, V).sort(dim=-1)
        probabilities = probabilities.gather(1, order)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]  # (B, 1)
    below = total.nextafter(torch.zeros_like(total))  # where rounding takes a product up to the total, nothing would pass it
    drawn = torch.searchsorted(cumulative, torch.minimum(uniform[:, None] * total, below), right=True)  # (B, 1)
    drawn = drawn.clamp(max=cumulative.shape[-1] - 1)  # of NaN nothing passes anything
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0].clamp(max=V - 1)


def _first(probabilities: Tensor, top_p: float) -> Tensor:
    """Of each row, the likeliest first, the fewest that are `top_p` together; 0 for the others."""
    return probabilities.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= top_p, 0.0)


def nucleus_by_sorting(probabilities: Tensor, top_p: float) -> Tensor:
    """The fewest of each row (B, V) that are `top_p` together (Holtzman et al. 2019), and 0 for the others."""
    ordered, ids = probabilities.sort(dim=-1, descending=True)
    return torch.zeros_like(probabilities).scatter_(1, ids, _first(ordered, top_p))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The same in a tenth of the time. A row at a time, which a CPU's cache holds: numbers with the same first 16 bits, which
    are in the order of the numbers, are summed, and only those with which the sum reaches `top_p` are sorted."""
    kept = torch.zeros_like(probabilities)
    for row, into in zip(probabilities, kept, strict=True):
        bits = (row.view(torch.int32) >> 16).clamp_(0, ONE)  # NaN has others
        sums = row.new_zeros(ONE + 2).scatter_add_(0, bits.long(), row)
        above = sums.flip(0).cumsum(dim=0).flip(0)  # of all from these bits on
        last = max(0, int((above >= top_p).sum()) - 1)
        into.copy_(row.where(bits > last, 0.0))
        (ids,) = (bits == last).nonzero(as_tuple=True)
        ordered, order = row[ids].sort(descending=True)
        into[ids[order]] = ordered.where(above[last + 1] + ordered.cumsum(dim=0) - ordered < top_p, 0.0)
    return kept
