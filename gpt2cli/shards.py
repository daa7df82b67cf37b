"""Token shards on disk: llm.c's `.bin`, which we write, and the formats of others that we read.

    llm.c, modded-nanogpt, FineWeb .bin   256 int32 (magic 20240520, version 1, token count), then uint16 tokens
    nanoGPT .bin                          uint16 tokens, no header
    build-nanogpt .npy                    a one-dimensional array of uint16 or another integer type, of any byte order

The first two are little-endian. A folder holds `train*` and `val*` files; their order by name is the order of the text.
"""

from __future__ import annotations

import bisect
import codecs
import hashlib
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gpt2cli import atomic
from gpt2cli.errors import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
SUFFIXES = (".bin", ".npy")
CHECKED_BYTES = 4 << 30  # of shards are hashed, or their ids looked at, before they are trained on: a few seconds
SAMPLES, SAMPLE_TOKENS = 1024, 1 << 15  # pieces that are looked at of more shards than that, and their length
SHARD_TOKENS = 100_000_000  # as in the public FineWeb shards

# ==== what a file may be instead ====

EXPECTED = "llm.c's or nanoGPT's .bin of 16-bit ids, or a .npy"
HEAD_BYTES = 4096  # looked at to tell
NPY_MAGIC = b"\x93NUMPY"
NPY = "a NumPy array (.npy)"
KNOWN = {
    NPY_MAGIC: NPY,
    b"PK\x03\x04": "a zip file (as torch.save and np.savez write)",
    b"\x1f\x8b\x08\x00": "a gzip file",
    b"\x1f\x8b\x08\x08": "a gzip file",
    b"\x80\x02\x8a\x0al\xfc\x9cF\xf9": "a pickle (an old torch.save)",
    b"BZh9": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF model",
    b"%PDF": "a PDF",
    b"\x7fELF": "a program",
}
LLM_C = {  # the first number of llm.c's other files
    20240801: "llm.c's shard of 32-bit ids (of Llama 3)",
    20240522: "llm.c's evaluation data",
    20240326: "llm.c's model",
    20240327: "llm.c's training state",
    20240328: "llm.c's tokenizer",
    int.from_bytes(MAGIC.to_bytes(4, "big"), "little", signed=True): "a shard whose bytes are in big-endian order",
}


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


@dataclass(frozen=True)
class Shard:
    """One file of tokens. It is open only while it is read: thousands of them take no file descriptors, and one that
    shrinks under a run is an error instead of the end of the process, as with a memory map."""

    path: Path
    dtype: np.dtype[Any]
    offset: int  # bytes before the first token
    length: int  # tokens

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> np.ndarray:
        """Ids as they are stored, (stop - start,). Raises UserError where the file has become shorter."""
        start, stop, _ = part.indices(self.length)
        at = self.offset + start * self.dtype.itemsize
        ids = np.fromfile(self.path, self.dtype, count=stop - start, offset=at)
        if len(ids) < stop - start:
            raise UserError(f"{self.path} became shorter while it was in use: make or copy it again")
        return ids


def open_shard(path: Path) -> Shard:
    """One shard, none of it read but its header. Raises UserError for a file that is not a whole shard."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    kind = _kind(head, size)
    if kind and not (kind == NPY and path.suffix == ".npy"):
        raise UserError(f"{path} is {kind}, no token shard: expected {EXPECTED}")
    return _open_npy(path, head, size) if path.suffix == ".npy" else _open_bin(path, head, size)


def _open_bin(path: Path, head: bytes, size: int) -> Shard:
    magic, version, count = struct.unpack("<3i", head[:12].ljust(12, b"\0"))
    if magic == MAGIC:
        if version != VERSION:
            raise UserError(f"{path}: version {version} of the shard format; expected {VERSION}")
        if count < 1:
            raise UserError(f"{path}: its header promises {count:,} tokens; expected 1 or more: make or copy it again")
        if size != HEADER_BYTES + 2 * count:
            raise UserError(
                f"{path}: its header promises {count:,} tokens in {HEADER_BYTES + 2 * count:,} bytes, but the file has "
                f"{size:,}: make or copy it again"
            )
        return Shard(path, np.dtype("<u2"), HEADER_BYTES, count)
    if magic in LLM_C and len(head) >= HEADER_BYTES:
        raise UserError(f"{path} is {LLM_C[magic]}; expected {EXPECTED}")
    if size < 2 or size % 2:
        raise UserError(f"{path} has {size:,} bytes, which are no row of 16-bit ids; expected {EXPECTED}")
    if size >= HEADER_BYTES and not any(head[:HEADER_BYTES]):
        raise UserError(f"{path} is an unfinished shard: tokenize again")
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    if len(halves) >= 32 and halves[1::2].max() < 4 and halves.max() >= 256:  # no text has ! " # or $ for every second token
        raise UserError(f"{path} holds ids of 32 or 64 bits; expected {EXPECTED}")
    return Shard(path, np.dtype("<u2"), 0, size // 2)


def _open_npy(path: Path, head: bytes, size: int) -> Shard:
    """numpy's own reader would unpickle, map what is not there, or take a header's word for how much to read."""
    width = 2 if head[6:7] == b"\x01" else 4
    start = 8 + width
    end = start + int.from_bytes(head[8:start], "little")
    header = head[start:end].decode("latin1").strip()
    if head[:6] != NPY_MAGIC or not re.fullmatch(r"\{[ -~]*\}", header):
        raise UserError(f"{path} is not a whole .npy file: its header cannot be read; make or copy it again")
    dtype = re.search(r"""['"]descr['"]: *['"]([<>|=]?[iu][1248])['"]""", header)
    shape = re.search(r"""['"]shape['"]: *\(0*([1-9]\d{0,17}), *\)""", header)
    if not dtype or not shape:
        raise UserError(f"{path} holds {header[:200]}; expected one row of token ids, such as 'descr': '<u2', 'shape': (1000,)")
    shard = Shard(path, np.dtype(dtype[1]), end, int(shape[1]))
    expected = end + shard.length * shard.dtype.itemsize
    if size != expected:
        raise UserError(
            f"{path} is not a whole .npy file: its header promises {shard.length:,} tokens in {expected:,} bytes, but the file "
            f"has {size:,}: make or copy it again"
        )
    return shard


def _kind(head: bytes, size: int) -> str | None:
    """What a file is by its first bytes, where it is plainly no row of ids."""
    for magic, kind in KNOWN.items():
        if head.startswith(magic):
            return kind
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    if head[:3] in (b"\x80\x04\x95", b"\x80\x05\x95") and int.from_bytes(head[3:11], "little") <= size - 11:
        return "a pickle"
    return "text" if is_text(head) else None


def is_text(head: bytes) -> bool:
    """Whether these first bytes of a file are UTF-8 without control characters. So few that ids may look so are not."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # forgives a last character that is cut
    except UnicodeDecodeError:
        return False
    return len(head) >= 32 and not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]", text)


def find_shards(folder: Path, split: str) -> list[Path]:
    """Files of one split, in order: those with the word in their name, as in FineWeb's shards."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    word = re.compile(rf"(?<![a-z]){split}(?:ing|id|idation)?(?![a-z])")
    return [path for path in files if word.search(path.stem.lower())]


class Tokens:
    """Several shards, or arrays, as one long row of token ids. What is read is checked: an id below 0, or one that a model
    of `vocab_size` ids does not know, raises UserError."""

    def __init__(self, parts: Sequence[np.ndarray | Shard], vocab_size: int | None = None) -> None:
        self._parts, self._vocab_size = parts, vocab_size
        self._ends = list(accumulate(len(part) for part in parts))

    @classmethod
    def open(cls, folder: Path, split: str, vocab_size: int | None = None) -> Tokens:
        """Raises UserError where the folder has no shard of this split."""
        paths = find_shards(folder, split)
        if not paths:
            raise UserError(f"{folder} holds no {split} shards (a .bin or .npy file with {split!r} in its name)")
        return cls([open_shard(path) for path in paths], vocab_size)

    @classmethod
    def join(cls, rows: Sequence[Tokens], vocab_size: int | None = None) -> Tokens:
        """One row after the other."""
        return cls([part for row in rows for part in row._parts], vocab_size)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from `start` as int64; past the end it goes on at the beginning, across any number of shards."""
        pieces = [piece.astype(np.int64) for piece in self._pieces(start, count)]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def check(self) -> None:
        """Look for ids that are none before anything long begins: at all of them or, of more than CHECKED_BYTES, at
        SAMPLES pieces spread evenly, so that a terabyte opens at once."""
        size, total, count = sum(part.dtype.itemsize * len(part) for part in self._parts), len(self), 1 << 20
        starts: Sequence[int] = range(0, total, count)
        if size > CHECKED_BYTES:
            starts, count = [n * total // SAMPLES for n in range(SAMPLES)], SAMPLE_TOKENS
        for start in starts:
            for _ in self._pieces(start, min(count, total - start)):
                pass

    def _pieces(self, start: int, count: int) -> Iterator[np.ndarray]:
        """The ids that `read` joins, as they are stored, and checked."""
        start = start % len(self) if count else 0
        while count:
            n = bisect.bisect_right(self._ends, start)
            offset = start - (self._ends[n - 1] if n else 0)
            piece = np.asarray(self._parts[n][offset : offset + count])
            most = self._vocab_size or 1 << 31  # no vocabulary has so many
            if piece.max() >= most or (piece.dtype.kind != "u" and piece.min() < 0):
                self._refuse(self._parts[n], offset, piece, most)
            yield piece
            count -= len(piece)
            start = (start + len(piece)) % len(self)

    def _refuse(self, part: np.ndarray | Shard, offset: int, piece: np.ndarray, most: int) -> NoReturn:
        name = part.path if isinstance(part, Shard) else "the data"
        at = int(np.argmax((piece < 0) | (piece >= most)))
        knows = f"the model knows {most:,} ids" if self._vocab_size else f"ids are at least 0 and below {most:,}"
        raise UserError(
            f"{name} holds id {int(piece[at]):,} at token {offset + at:,}, but {knows}: tokenize the text again, with the "
            "model's vocabulary"
        )


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
    files = atomic.read_sealed(folder / "manifest.json").get("files")
    if not isinstance(files, dict):
        return
    for name in files:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing, but the manifest lists it: tokenize the text again")
    if sum((folder / name).stat().st_size for name in files) <= CHECKED_BYTES:
        for name, expected in files.items():
            if atomic.sha256(folder / name) != expected:
                raise UserError(f"{folder / name} changed since it was tokenized: tokenize the text again")
