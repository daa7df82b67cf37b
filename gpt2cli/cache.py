"""The keys and values of tokens already seen, so that each new token needs one row of work."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2cli.config import GPTConfig


class KVCache:
    """Allocated once for B rows of up to `size` tokens: two tensors (n_layer, B, nh, size, hs). Rows may hold different
    numbers of tokens; a prompt enters one row (see `row`), then all of the first `active` rows take one token at a time."""

    def __init__(self, config: GPTConfig, B: int, size: int, like: Tensor) -> None:
        shape = config.n_layer, B, config.n_head, size, config.head_size
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # what is masked must not be NaN
        self.lengths = [0] * B  # tokens held
        self.size, self.active = size, B
        self._at: Tensor | None = None  # (B) where the new tokens go, where that differs from row to row
        self._mask: Tensor | None = None  # (B, 1, 1, S)

    def row(self, n: int) -> OneRow:
        return OneRow(self, n)

    def copy(self, source: int, target: int) -> None:
        """Make one row what another one is."""
        length = self.lengths[source]
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]
        self.lengths[target] = length

    # ==== one more token for each active row, see `model.Cache` ====

    def positions(self, T: int) -> Tensor:
        lengths = self.lengths[: self.active]
        if T != 1 or max(lengths) >= self.size:
            raise ValueError(f"{T} tokens at once after {lengths} of {self.size} in the cache")
        self._at = self._mask = None
        if min(lengths) == max(lengths):
            return torch.tensor([lengths[0]], device=self.k.device)
        self._at = torch.tensor(lengths, device=self.k.device)
        held = torch.arange(max(lengths) + 1, device=self.k.device)
        self._mask = (held <= self._at[:, None])[:, None, None]
        return self._at[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        B, end = self.active, max(self.lengths[: self.active]) + 1
        if self._at is None:
            self.k[layer, :B, :, end - 1 : end] = k
            self.v[layer, :B, :, end - 1 : end] = v
        else:
            rows = torch.arange(B, device=k.device)
            self.k[layer, rows, :, self._at] = k[:, :, 0]
            self.v[layer, rows, :, self._at] = v[:, :, 0]
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end], self._mask

    def advance(self, T: int) -> None:
        self.lengths[: self.active] = [length + T for length in self.lengths[: self.active]]


class OneRow:
    """A row of a cache for a prompt to enter, in one forward pass of all of its tokens."""

    def __init__(self, cache: KVCache, n: int) -> None:
        self._cache, self._n = cache, n

    def positions(self, T: int) -> Tensor:
        return torch.arange(T, device=self._cache.k.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        self._cache.k[layer, self._n, :, : k.shape[2]] = k[0]
        self._cache.v[layer, self._n, :, : v.shape[2]] = v[0]
        return k, v, None

    def advance(self, T: int) -> None:
        self._cache.lengths[self._n] = T
