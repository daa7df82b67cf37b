"""The keys and values of tokens already seen, so that each new token needs one row of work."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2cli.ahead import put
from gpt2cli.config import GPTConfig

ALIGNED = 8  # CUDA's kernels want masks of such lengths


class KVCache:
    """Allocated once for B rows of at least `size` tokens: two tensors (n_layer, B, nh, size, hs). Rows may hold different
    numbers of tokens, `lengths`, which its owner counts. `Prompts` enter some; then all of the first `rows` take one token
    more at a time."""

    def __init__(self, config: GPTConfig, B: int, size: int, like: Tensor) -> None:
        self.size = -(-size // ALIGNED) * ALIGNED
        shape = config.n_layer, B, config.n_head, self.size, config.head_size
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)  # what is masked must not be NaN
        self.lengths = [0] * B
        self.at = torch.zeros(B, dtype=torch.int64, device=like.device)  # the lengths, as the device knows them
        self.known: list[int] | None = None  # what is in it; None where that is uncertain

    def rows(self, B: int) -> Even | Masked:
        lengths = self.lengths[:B]
        if min(lengths) == max(lengths):
            return Even(self, B, lengths[0])
        self.tell()
        return Masked(self, B, max(lengths) + 1)

    def tell(self) -> None:
        """Let the device know the lengths, if it does not."""
        if self.known != self.lengths:
            put(self.at, self.lengths)
            self.known = list(self.lengths)

    def copy(self, source: int, target: int) -> None:
        """Make one row what another one is."""
        length = self.lengths[source]
        self.k[:, target, :, :length] = self.k[:, source, :, :length]
        self.v[:, target, :, :length] = self.v[:, source, :, :length]
        self.lengths[target] = length


# ==== ways in, see `model.Cache` ====


class Prompts:
    """The rows from `start` on, for prompts to enter, in one forward pass of all of their tokens."""

    def __init__(self, cache: KVCache, start: int) -> None:
        self._cache, self._start = cache, start

    def positions(self, T: int) -> Tensor:
        return torch.arange(T, device=self._cache.k.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, T = slice(self._start, self._start + len(k)), k.shape[2]
        self._cache.k[layer, rows, :, :T] = k
        self._cache.v[layer, rows, :, :T] = v
        return k, v, None


class Even:
    """One more token for each of B rows that hold as many."""

    def __init__(self, cache: KVCache, B: int, length: int) -> None:
        self._cache, self._B, self._length = cache, B, length

    def positions(self, T: int) -> Tensor:
        return torch.tensor([self._length], device=self._cache.k.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        held_k, held_v = self._cache.k[layer, : self._B], self._cache.v[layer, : self._B]
        end = self._length + 1
        held_k[:, :, end - 1 : end] = k
        held_v[:, :, end - 1 : end] = v
        return held_k[:, :, :end], held_v[:, :, :end], None


class Masked:
    """One more token for each of B rows, where the device has been told how many they hold. S tokens of each are read, and
    those beyond its own are masked: the same shapes for every token, which is what a CUDA graph wants."""

    def __init__(self, cache: KVCache, B: int, S: int) -> None:
        self._cache, self._B, self._S = cache, B, S

    def positions(self, T: int) -> Tensor:
        at, held = self._cache.at[: self._B, None], torch.arange(self._S, device=self._cache.k.device)
        mask = self._cache.k.new_zeros(self._B, self._S).masked_fill(held > at, -torch.inf)
        self._mask = mask[:, None, None]  # (B, 1, 1, S), added to the scores
        heads, size = self._cache.k.shape[2], self._cache.k.shape[4]
        self._at = at[:, None, None].expand(-1, heads, 1, size)  # (B, nh, 1, hs)
        return at

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        held_k, held_v = self._cache.k[layer, : self._B], self._cache.v[layer, : self._B]
        held_k.scatter_(2, self._at, k)
        held_v.scatter_(2, self._at, v)
        return held_k[:, :, : self._S], held_v[:, :, : self._S], self._mask
