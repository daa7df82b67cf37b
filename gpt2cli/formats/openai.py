"""OpenAI's own files: the folder with hparams.json and model.ckpt.*, read without TensorFlow. gpt-2-simple writes the same.

model.ckpt.index                  a LevelDB table, name -> BundleEntryProto (dtype, shape, shard, offset, size)
model.ckpt.data-00000-of-00001    the tensors' bytes, one after the other
hparams.json                      n_vocab, n_ctx, n_embd, n_head, n_layer
encoder.json, vocab.bpe           the tokenizer

The formats: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/lib/io/format.h and table_format.txt of LevelDB.
Of `model.ckpt.meta`, the graph, nothing is needed.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpt2cli import atomic
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import weights
from gpt2cli.formats.weights import Contents, Weights
from gpt2cli.tokenizer import Encoding

_FOOTER, _MAGIC = 48, 0xDB4775248B80FB57  # LevelDB's, at the end of a table
_DTYPES = {1: torch.float32, 14: torch.bfloat16, 19: torch.float16}  # of TensorFlow's types.proto
_LARGEST_INDEX, _LONGEST_NAME = 1 << 20, 256  # bytes; the index of 1558M has 30 kB
_ENDS = {"g": "weight", "w": "weight", "b": "bias"}


def is_mine(path: Path) -> bool:
    return path.is_dir() and (path / "hparams.json").is_file()


def read(folder: Path) -> Contents:
    """Raises UserError for a folder that is not whole, an index that is damaged or compressed, and tensors left over."""
    hparams = atomic.read_json(folder / "hparams.json")
    try:
        config = GPTConfig(
            block_size=hparams["n_ctx"],
            vocab_size=hparams["n_vocab"],
            n_layer=hparams["n_layer"],
            n_head=hparams["n_head"],
            n_embd=hparams["n_embd"],
        )
    except KeyError as error:
        raise UserError(f"{folder / 'hparams.json'} has no {error.args[0]}") from None
    except UserError as error:
        raise UserError(f"{folder / 'hparams.json'}: {error}") from None
    index = _index(folder)
    entries = _entries(index)
    shapes, readers = weights.shapes(config), {}
    for theirs, entry in entries.items():
        name = _ours(theirs)
        if name not in shapes:
            raise UserError(f"{index}: tensor {theirs} has no place in this GPT-2, see {folder / 'hparams.json'}")
        if name in readers:
            raise UserError(f"{index} has {name} twice, the second time as {theirs}")
        readers[name] = _reader(index, theirs, entry, shapes[name])
    places = sorted(entries.values(), key=lambda entry: (entry.shard, entry.offset))
    for before, after in itertools.pairwise(places):
        if before.shard == after.shard and before.offset + before.size > after.offset:
            raise UserError(f"{index} is damaged: two tensors lie over each other")
    state = Weights(readers)
    weights.check(config, state, str(folder))
    facts = {"format": "OpenAI's TensorFlow checkpoint", "checkpoint": index.stem}
    return Contents(config, state, Encoding.from_folder(folder), facts=facts)


def _index(folder: Path) -> Path:
    """The newest of the folder's checkpoints, which the text file `checkpoint` names."""
    found = sorted(folder.glob("*.index"))
    named = folder / "checkpoint"
    if len(found) > 1 and named.is_file():
        match = re.search(r'^model_checkpoint_path: "(.*)"$', named.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        found = [path for path in found if match and path.stem == Path(match[1]).name]
    if len(found) != 1:
        raise UserError(f"{folder} has {len(found) or 'no'} model.ckpt.index: expected one, or that 'checkpoint' names it")
    return found[0]


def _ours(theirs: str) -> str:
    """model/h3/attn/c_attn/w -> h.3.attn.c_attn.weight; a name of another kind as it is"""
    parts = theirs.removeprefix("model/").split("/")
    if parts in (["wte"], ["wpe"]):
        return f"{parts[0]}.weight"
    layer = re.fullmatch(r"h(\d+)", parts[0])
    middle = ["h", layer[1], *parts[1:-1]] if layer else parts[:-1]
    return ".".join([*middle, _ENDS.get(parts[-1], "?")])


# ==== the tensors ====


class Entry(NamedTuple):
    """One tensor's place, as BundleEntryProto has it."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def _reader(index: Path, name: str, entry: Entry, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Conv1D's weights are (1, in, out) there, all others have our shape. Raises UserError where that is not so."""
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise UserError(f"{index}: {name} is of TensorFlow's type {entry.dtype}; expected float32, float16 or bfloat16")
    conv = len(entry.shape) == 3
    if (entry.shape[:0:-1] if conv else entry.shape) != shape or (conv and entry.shape[0] != 1):
        raise UserError(f"{index}: {name} has shape {entry.shape}, but hparams.json asks for {shape}")
    (data, *others) = sorted(index.parent.glob(f"{index.stem}.data-{entry.shard:05d}-of-*")) or [index]
    if data == index or others:
        raise UserError(f"{index.with_suffix('')}.data-{entry.shard:05d}-of-* is missing, or there are several")
    if entry.size != math.prod(shape) * dtype.itemsize or not 0 <= entry.offset <= data.stat().st_size - entry.size:
        raise UserError(f"{data} is not whole, or {index} is damaged: {name} lies beyond its end")
    return partial(_tensor, data, entry.offset, shape, dtype, conv)


def _tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, conv: bool) -> Tensor:
    stored = np.fromfile(path, dtype=f"<i{dtype.itemsize}", count=math.prod(shape), offset=offset)
    tensor = torch.from_numpy(stored).view(dtype)
    return tensor.view(shape[::-1]).t() if conv else tensor.view(shape)


# ==== the index ====


def _entries(index: Path) -> dict[str, Entry]:
    """Name -> place of all tensors. Raises UserError for a file that is no such table, or one cut or changed."""
    if index.stat().st_size > _LARGEST_INDEX:
        raise UserError(f"{index} is too large for the index of a GPT-2")
    table = index.read_bytes()
    try:
        if int.from_bytes(table[-8:], "little") != _MAGIC:
            raise ValueError("it does not end as one does")
        footer = _Bytes(table[-_FOOTER:])
        for _ in range(2):
            footer.varint()  # where the unused metaindex lies
        blocks = [_Bytes(value) for _, value in _block(table, footer.varint(), footer.varint())]
        places = [(place.varint(), place.varint()) for place in blocks]
        if any(start + size > following for (start, size), (following, _) in itertools.pairwise(places)):
            raise ValueError("its blocks are not one after the other")
        pairs = [pair for place in places for pair in _block(table, *place)]
        return {name.decode(): _entry(value) for name, value in pairs if name}  # the nameless first one is the header
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{index} is not a whole index of a TensorFlow checkpoint: {error}") from None


class _Bytes:
    """Bytes that are read from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.data[self.place]
            self.place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number in it has no end")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise ValueError("it ends too early")
        self.place += count
        return self.data[self.place - count : self.place]


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block: each key is what it shares with the one before, and the rest."""
    block, trailer = table[offset : offset + size], table[offset + size : offset + size + 5]
    if len(block) != size or len(trailer) != 5 or size < 4:
        raise ValueError("a block lies beyond its end")
    if trailer[0]:
        raise ValueError("it is compressed, which TensorFlow's never are")
    if int.from_bytes(trailer[1:], "little") != _masked(_crc32c(block + trailer[:1])):
        raise ValueError("a checksum in it does not fit")
    restarts = int.from_bytes(block[-4:], "little")
    entries, key = _Bytes(block[: max(0, size - 4 - 4 * restarts)]), b""
    while entries.place < len(entries.data):
        shared, rest, length = entries.varint(), entries.varint(), entries.varint()
        if shared > len(key) or shared + rest > _LONGEST_NAME:
            raise ValueError("a name in it has no beginning, or no end")
        key = key[:shared] + entries.take(rest)
        yield key, entries.take(length)


def _entry(data: bytes) -> Entry:
    fields = dict.fromkeys(range(1, 8), 0)
    shape: tuple[int, ...] = ()
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            dims = [dict(_fields(dim)) for field, dim in _fields(value) if field == 2 and isinstance(dim, bytes)]
            shape = tuple(int(dim.get(1, 0)) for dim in dims)
        elif isinstance(value, int):
            fields[number] = value
    if fields[7]:
        raise ValueError("a tensor in it is cut in slices")
    return Entry(fields[1], shape, shard=fields[3], offset=fields[4], size=fields[5])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protobuf message."""
    rest = _Bytes(data)
    while rest.place < len(data):
        number, kind = divmod(rest.varint(), 8)
        if kind == 0:
            yield number, rest.varint()
        elif kind == 2:
            yield number, rest.take(rest.varint())
        elif kind == 5:
            yield number, int.from_bytes(rest.take(4), "little")
        else:
            raise ValueError("a message in it is of an unknown kind")


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _crc_of(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)  # Castagnoli's polynomial
    return byte


_CRC = [_crc_of(byte) for byte in range(256)]


def _masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
