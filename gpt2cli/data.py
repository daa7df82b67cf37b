"""`DataLoaderLite`: token shards -> batches `(x, y)`, in an order that is a pure function of (seed, position).

The tokens are read as an endless row, the end followed by the beginning (every document starts with `<|endoftext|>`, so
the seam is one between documents). Row k of the training is a window of T tokens of it: nothing is dropped, and each
token is a target exactly once an epoch. With a seed the windows of an epoch are shuffled by a permutation that needs no
memory, so any position is reached at once, and the position is the whole state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2cli.errors import UserError
from gpt2cli.shards import Tokens
from gpt2cli.tokenizer import Encoding


class DataLoaderLite:
    """Batches of B rows of T tokens, `y` being `x` one token later.

    `data` is a text file (by default `input.txt`), a folder of token shards, `Tokens`, or a row of token ids. Without a
    `seed` rows come in the order of the text. With several ranks, the rows of one `next_batch` of all ranks together are
    those of one rank with `B * world_size`: the order does not depend on how the work is dealt out.

    Raises UserError where the data is missing or shorter than one batch.

    >>> x, y = DataLoaderLite(B=2, T=3, data=range(100)).next_batch()
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """

    def __init__(
        self,
        B: int,
        T: int,
        data: str | Path | Tokens | Sequence[int] | np.ndarray = "input.txt",
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        if min(B, T) < 1:
            raise UserError(f"a batch of {B} rows of {T} tokens is no batch")
        self.tokens = open_tokens(data)
        if len(self.tokens) < B * T + 1:
            raise UserError(
                f"{data if isinstance(data, str | Path) else 'the data'} has {len(self.tokens):,} tokens, but one batch "
                f"of {B} rows of {T} needs {B * T + 1:,}: use more text, or a smaller --batch-size or --seq-len"
            )
        self.B, self.T, self.seed = B, T, seed
        self.rank, self.world_size = rank, world_size
        self.position = position  # rows served so far, by all ranks together

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """`x, y`, each (B, T) of int64."""
        first = self.position + self.rank * self.B
        rows = np.stack([self.row(first + b) for b in range(self.B)])  # (B, T + 1)
        self.position += self.B * self.world_size
        batch = torch.from_numpy(rows)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def row(self, k: int) -> np.ndarray:
        """Row k of the training, (T + 1,)."""
        N, T = len(self.tokens), self.T
        if self.seed is not None:
            epoch = k * T // N
            first, after = -(-epoch * N // T), -(-(epoch + 1) * N // T)  # windows that begin in this epoch
            k = first + permute(k - first, after - first, key=(self.seed, epoch))
        return self.tokens.read(k * T, T + 1)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def open_tokens(data: str | Path | Tokens | Sequence[int] | np.ndarray) -> Tokens:
    if isinstance(data, Tokens):
        return data
    if not isinstance(data, str | Path):
        return Tokens([np.asarray(data)])
    path = Path(data)
    if path.is_dir():
        return Tokens.open(path, "train")
    if not path.is_file():
        raise UserError(f"{path} does not exist: put your text there, or pass data=")
    try:
        return Tokens([Encoding.gpt2().encode_documents(path.read_bytes().decode("utf-8"))])
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None


def permute(i: int, n: int, key: tuple[int, int]) -> int:
    """Where a fixed shuffle of range(n), chosen by `key`, puts i. A Feistel network over the next power of four, walked
    until it lands below n (Black and Rogaway 2002): no table, any i in constant time."""
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = (1 << half) - 1
    while True:
        left, right = i >> half, i & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, turn, *key) & mask)
        i = left << half | right
        if i < n:
            return i


def _mix(*values: int) -> int:
    """A 64-bit hash of some integers (splitmix64's finalizer)."""
    h = 0
    for value in values:
        h = (h + value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def eval_batches(tokens: Tokens, B: int, T: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most B rows that look at about `limit` tokens, spread evenly; at every token but the first where
    `limit` is 0. The same ones each time. A text shorter than T makes one short row."""
    T = min(T, len(tokens) - 1)
    last = len(tokens) - 1  # targets there are
    starts = list(range(0, last, T))  # of windows; the last one may be shorter
    if 0 < limit < last:
        whole, count = last // T, max(1, limit // T)
        starts = [n * whole // count * T for n in range(count)]
    full = [start for start in starts if start + T <= last]
    groups = [full[n : n + B] for n in range(0, len(full), B)] + [[start] for start in starts if start + T > last]
    for group in groups:
        rows = np.stack([tokens.read(start, min(T, last - start) + 1) for start in group])  # (<= B, <= T + 1)
        batch = torch.from_numpy(rows)
        yield batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
