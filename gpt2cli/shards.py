"""Token shards on disk: llm.c's `.bin`, which we write, and the formats of others that we read.

    llm.c, modded-nanogpt, FineWeb .bin   256 int32 (magic 20240520, version 1, token count), then uint16 tokens
    nanoGPT .bin                          uint16 tokens, no header
    build-nanogpt .npy                    a one-dimensional array of uint16 or another integer type

All little-endian. A folder holds `train*` and `val*` files; their order by name is the order of the text.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from gpt2cli import atomic
from gpt2cli.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
CHECKED_BYTES = 4 << 30  # of shards are hashed before they are trained on: a few seconds
SHARD_TOKENS = 100_000_000  # as in the public FineWeb shards


class ShardWriter:
    """Writes one split as `SPLIT_000000.bin`, `SPLIT_000001.bin`, ... of at most `shard_tokens` tokens each; without
    `headers` as one `SPLIT.bin` of tokens alone, as nanoGPT's.

    The header is completed when a shard is closed: until then its magic is 0, so that a torn file is refused. With `tokens`
    it goes on after so many that were written before; what is beyond them is cut off. Raises UserError where they are gone.
    """

    def __init__(
        self, folder: Path, split: str, shard_tokens: int = SHARD_TOKENS, *, headers: bool = True, tokens: int = 0
    ) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.tokens = tokens
        self._begin = HEADER_BYTES if headers else 0
        self._room = 0  # tokens that still fit the open shard
        whole, part = divmod(tokens, shard_tokens)
        self.shards = [self._path(n) for n in range(whole + (part > 0))]
        for n, path in enumerate(self.shards):
            size = self._begin + 2 * (shard_tokens if n < whole else part)
            if not path.is_file() or path.stat().st_size < size:
                raise UserError(f"{path} was cut short: delete {folder.parent} and tokenize again")
            os.truncate(path, size)
        for path in folder.glob(f"{split}*.bin"):
            if path not in self.shards:
                path.unlink()
        if part:
            self._file = self.shards[-1].open("r+b")
            self._file.seek(0, os.SEEK_END)
            self._room = shard_tokens - part

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._room == 0:
                self._open()
            part, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(part.astype("<u2").tobytes())
            self._room -= len(part)
            self.tokens += len(part)
            if self._room == 0:
                self._finish()

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        if self._room:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._room:
            self._finish()

    def _path(self, n: int) -> Path:
        return self.folder / (f"{self.split}_{n:06d}.bin" if self._begin else f"{self.split}.bin")

    def _open(self) -> None:
        self.shards.append(self._path(len(self.shards)))
        self._file = self.shards[-1].open("w+b")
        self._file.write(bytes(self._begin))
        self._room = self.shard_tokens

    def _finish(self) -> None:
        if self._begin:
            header = np.zeros(256, dtype="<i4")
            header[:3] = MAGIC, VERSION, self.shard_tokens - self._room
            self._file.seek(0)
            self._file.write(header.tobytes())
        self.flush()
        self._file.close()
        self._room = 0


def open_shard(path: Path) -> np.ndarray:
    """The tokens of one shard as a memory-mapped array (n,). Raises UserError for a file that is not a whole shard."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{path} is not a whole .npy file: {error}") from None
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or not len(array):
            raise UserError(f"{path} holds {array.dtype} {array.shape}; expected one row of token ids")
        return array
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) == 256 and header[0] == MAGIC:
        if header[1] != VERSION:
            raise UserError(f"{path}: version {header[1]} of the shard format; expected {VERSION}")
        if size != HEADER_BYTES + 2 * int(header[2]) or header[2] < 1:
            raise UserError(
                f"{path}: its header promises {int(header[2]):,} tokens, but {(size - HEADER_BYTES) // 2:,} are there; "
                "it was cut short, so make or copy it again"
            )
        return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)
    if size < 2 or size % 2:
        raise UserError(f"{path} has {size:,} bytes: not a token shard (llm.c or nanoGPT .bin, or .npy)")
    if size >= HEADER_BYTES and not header.any():
        raise UserError(f"{path} is an unfinished shard: tokenize again")
    return np.memmap(path, dtype="<u2", mode="r")


def find_shards(folder: Path, split: str) -> list[Path]:
    """Files of one split, in order: those with the word in their name, as in FineWeb's shards."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".npy") and path.is_file()]
    word = re.compile(rf"(?<![a-z]){split}(?:ing|id|idation)?(?![a-z])")
    return [path for path in files if word.search(path.stem.lower())]


class Tokens:
    """Several shards, or arrays, as one long row of token ids."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    @classmethod
    def open(cls, folder: Path, split: str) -> Tokens:
        """Raises UserError where the folder has no shard of this split."""
        paths = find_shards(folder, split)
        if not paths:
            raise UserError(f"{folder} holds no {split} shards (a .bin or .npy file with {split!r} in its name)")
        return cls([open_shard(path) for path in paths])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` as int64; past the end it goes on at the beginning, across any number of shards."""
        pieces: list[np.ndarray] = []
        start %= len(self)
        while count:
            n = bisect.bisect_right(self._ends, start)
            offset = start - (self._ends[n - 1] if n else 0)
            pieces.append(np.asarray(self._parts[n][offset : offset + count], dtype=np.int64))
            count -= len(pieces[-1])
            start = (start + len(pieces[-1])) % len(self)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def largest(self) -> int:
        """The largest id, read in blocks."""
        block = 1 << 24
        return max(int(part[n : n + block].max()) for part in self._parts for n in range(0, len(part), block))


def count_tokens(folder: Path) -> tuple[int, int]:
    """Tokens of the training and the validation split; there may be none of the latter."""
    val = len(Tokens.open(folder, "val")) if find_shards(folder, "val") else 0
    return len(Tokens.open(folder, "train")), val if val > 1 else 0  # one token predicts nothing


def fingerprint(folder: Path) -> str:
    """sha256 over names, sizes and the first and last 64 kB of the shards: cheap for a terabyte."""
    digest = hashlib.sha256()
    for path in find_shards(folder, "train") + find_shards(folder, "val"):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(65536))
            file.seek(max(0, size - 65536))
            digest.update(file.read())
    return digest.hexdigest()


def check(folder: Path) -> None:
    """Raises UserError where a folder that `tokenize` wrote is no longer as it was. Shards of more than CHECKED_BYTES
    together are not read for it. Shards of other programs tell nothing, and pass."""
    if not (folder / "manifest.json").is_file():
        return
    shards = atomic.read_sealed(folder / "manifest.json").get("shards")
    if not isinstance(shards, dict):
        return
    for name in shards:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but the manifest lists it: tokenize the text again")
    if sum((folder / name).stat().st_size for name in shards) <= CHECKED_BYTES:
        for name, expected in shards.items():
            if atomic.sha256(folder / name) != expected:
                raise UserError(f"{folder / name} changed since it was tokenized: tokenize the text again")
