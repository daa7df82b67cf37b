"""`DataLoaderLite`: token shards -> batches `(x, y)`, in an order that is a pure function of (seed, position).

The tokens are read as an endless row, the end followed by the beginning (every document starts with `<|endoftext|>`, so
the seam is one between documents). Row k of the training is a window of T tokens of it: nothing is dropped, and each
token is a target exactly once an epoch. With a seed the windows of an epoch are shuffled by a permutation that needs no
memory, so any position is reached at once, and the position is the whole state.

A mixture deals its rows out in blocks of BLOCK: in each of them every source serves its share exactly, at places shuffled
by the same permutation, and the rows a source serves are those it would serve alone, in that order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2cli.errors import UserError
from gpt2cli.shards import SUFFIXES, Tokens, open_shard
from gpt2cli.tokenizer import Encoding

BLOCK = 1024  # rows of a mixture in which every source has its exact share


Data = str | Path | Tokens | Sequence[int] | np.ndarray


class DataLoaderLite:
    """Batches of B rows of T tokens, `y` being `x` one token later.

    `data` is a text file (by default `input.txt`), a token shard, a folder of them, `Tokens`, a row of token ids, or a
    mixture: a mapping from such sources to their weights, which need not sum to 1. Without a `seed` rows come in the
    order of the text. With several ranks, the rows of one `next_batch` of all ranks together are those of one rank with
    `B * world_size`: the order does not depend on how the work is dealt out.

    Raises UserError where the data is missing or shorter than one batch, a source of a mixture shorter than one row, and
    for weights that are not above 0 or too small for a row in BLOCK.

    >>> x, y = DataLoaderLite(B=2, T=3, data=range(100)).next_batch()
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """

    def __init__(
        self,
        B: int,
        T: int,
        data: Data | Mapping[str | Path | Tokens, float] = "input.txt",
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        position: int = 0,
    ) -> None:
        if min(B, T) < 1:
            raise UserError(f"a batch of {B} rows of {T} tokens is no batch")
        given, weights = (list(data), list(data.values())) if isinstance(data, Mapping) else ([data], [1.0])
        names = [name_of(source) for source in given]
        self.shares = share_out(names, weights)
        self.sources = [open_tokens(source) for source in given]
        for name, tokens in zip(names, self.sources, strict=True):
            check_length(name, len(tokens), B, T, mixed=isinstance(data, Mapping))
        self.B, self.T, self.seed = B, T, seed
        self.rank, self.world_size = rank, world_size
        self.position = position  # rows served so far, by all ranks together

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """`x, y`, each (B, T) of int64."""
        first = self.position + self.rank * self.B
        self.position += self.B * self.world_size
        return self.batch(first, self.B)

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """`x, y` of `count` rows of the training from row `first`, each (count, T); moves nothing."""
        rows = torch.from_numpy(np.stack([self.row(first + b) for b in range(count)]))  # (count, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def row(self, k: int) -> np.ndarray:
        """Row k of the training, (T + 1,)."""
        i, k = self.source_of(k)
        tokens, T = self.sources[i], self.T
        if self.seed is not None:
            N = len(tokens)
            epoch = k * T // N
            first, after = -(-epoch * N // T), -(-(epoch + 1) * N // T)  # windows that begin in this epoch
            k = first + permute(k - first, after - first, key=(self.seed, epoch))
        return tokens.read(k * T, T + 1)

    def source_of(self, k: int) -> tuple[int, int]:
        """The source that serves row k of the training, and how many rows it has served before."""
        if len(self.sources) == 1:
            return 0, k
        block, n = divmod(k, BLOCK)
        dealt = deal(self.shares, self.seed or 0, block)
        i = int(dealt[n])
        return i, block * self.shares[i] + int(np.count_nonzero(dealt[:n] == i))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def micro_steps(rows: int, most: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """How a rank does its part of an update of `rows` rows, at most `most` at a time: (first row, how many), as often on
    every rank. A rank that has none left for one has 0."""
    first, after = rank * rows // world_size, (rank + 1) * rows // world_size
    times = -(-rows // (world_size * most))
    cuts = [first + (after - first) * n // times for n in range(times + 1)]
    return [(cut, end - cut) for cut, end in pairwise(cuts)]


def name_of(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else "the data"


def check_length(name: str, tokens: int, B: int, T: int, mixed: bool) -> None:
    """Raises UserError for data shorter than one batch, or for a source of a mixture shorter than one row."""
    least, what = (T + 1, f"a row of {T}") if mixed else (B * T + 1, f"one batch of {B} rows of {T}")
    if tokens < least:
        fewer = "--seq-len" if mixed else "--batch-size or --seq-len"
        raise UserError(f"{name} has {tokens:,} tokens, but {what} needs {least:,}: use more text, or a smaller {fewer}")


def open_tokens(data: Data) -> Tokens:
    if isinstance(data, Tokens):
        return data
    if not isinstance(data, str | Path):
        ids = np.asarray(data)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise UserError(f"the data is {ids.dtype} {ids.shape}; expected one row of token ids")
        return Tokens([ids])
    path = Path(data)
    if path.is_dir():
        return Tokens.open(path, "train")
    if not path.is_file():
        raise UserError(f"{path} does not exist: put your text there, or pass data=")
    if path.suffix in SUFFIXES:
        return Tokens([open_shard(path)])
    try:
        return Tokens([Encoding.gpt2().encode_documents(path.read_bytes().decode("utf-8"))])
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from None


def share_out(names: Sequence[str], weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of a block for each weight, BLOCK in all (largest remainder; the earlier one where two are equal)."""
    for name, weight in zip(names, weights, strict=True):
        if not (weight > 0 and math.isfinite(weight)):
            raise UserError(f"the weight of {name} is {weight}; expected a number above 0")
    if not weights:
        raise UserError("the mixture is empty; expected a weight for each source")
    total = sum(map(Fraction, weights))
    exact = [BLOCK * Fraction(weight) / total for weight in weights]
    rows = [int(share) for share in exact]
    for i in sorted(range(len(rows)), key=lambda i: rows[i] - exact[i])[: BLOCK - sum(rows)]:
        rows[i] += 1
    for name, weight, share in zip(names, weights, rows, strict=True):
        if not share:
            least = float(total / BLOCK)
            raise UserError(
                f"the weight of {name}, {weight}, is too small for one row in {BLOCK:,}: give it at least {least:.2g}"
            )
    return tuple(rows)


@lru_cache(maxsize=4)  # the rows of a batch are neighbours
def deal(shares: tuple[int, ...], seed: int, block: int) -> np.ndarray:
    """The sources that serve the rows of a block, (BLOCK,)."""
    places = [permute(n, BLOCK, key=(seed, ~block)) for n in range(BLOCK)]  # negative, as no epoch is
    return np.repeat(np.arange(len(shares)), shares)[places]


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
