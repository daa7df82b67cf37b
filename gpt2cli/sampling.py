"""The next token from logits: the order of steps, and what each does, is transformers'."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2cli.config import SamplingConfig

LIKELIEST = 1024


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
        if ids is None:
            probabilities, ids = _likeliest(probabilities, config.top_p)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
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


def _likeliest(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The largest of probabilities (B, V) in order, with their ids, as many as top-p may need. The few likeliest are nearly
    always enough, and finding them takes a CPU a tenth of the time of sorting all; a GPU would have to wait to know."""
    if probabilities.device.type == "cpu":
        some, ids = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]), dim=-1)
        if some.sum(dim=-1).min() >= top_p:
            return some, ids
    return probabilities.sort(dim=-1, descending=True)
