"""Text in pieces of about a megabyte, cut only where GPT-2's pre-tokenizer always cuts too.

That is between a non-space and a space, and between a letter or digit and a mark. A run of text without such a place, as
a megabyte of one letter, is cut by `encode.settle`.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from gpt2cli.documents import BLOCK, Chunk
from gpt2cli.tokenizer import END_OF_TEXT

SEPARATOR = END_OF_TEXT.encode()
HASHED = 1 << 16  # bytes of a document decide whether it is held out: a copy of it falls on the same side

# What is left of a cut and what is right of it, such that no version of Unicode sees it otherwise.
_BEFORE_SPACE = re.compile(r"[^\s](?=[ \n\t\r])")
_MARK = r"[!-/:-@\[-`{-~、。，！？：；「」『』（）…—\udc80-\udcff]"  # the last are bytes that are not UTF-8: U+FFFD
_AFTER_WORD = re.compile(rf"[^\W\d_](?={_MARK})|[0-9](?=[A-Za-z]|{_MARK})|[A-Za-z](?=[0-9])")


@dataclass(frozen=True)
class Place:
    """Where the reading goes on: in which text, where (see `Chunk.after`), in the middle of a document of which key."""

    source: int = 0
    offset: int = 0
    key: float | None = None


@dataclass(frozen=True)
class Settled:
    """The beginning of a run: its tokens, and the id the rest must begin with if cutting there was right."""

    end: int
    ids: np.ndarray  # uint32
    then: int | None


Settle = Callable[[bytes], Settled]


@dataclass(frozen=True)
class Piece:
    data: bytes
    bytes: int  # of the text, and of separators before it
    starts: bool  # `<|endoftext|>` comes before it
    key: float  # of its document, uniform in [0, 1)
    after: Place | None  # where the reading may go on after it
    continues: bool = False  # its document began before the tail
    ids: np.ndarray | None = None  # of a part of a run
    expects: int | None = None  # its first id, where a run was cut before it


def cut_up(
    chunks: Iterable[Chunk],
    *,
    plain: bool,
    inside: bool,
    start: Place = Place(),
    settle: Settle | None = None,
) -> Iterator[Piece]:
    """The pieces of one text. `inside`: the offset of a chunk is a byte, so that reading may go on in the middle of one.
    Without `settle` long runs are cut anywhere, which is enough to count bytes."""
    rest, owed, key, expects = b"", 0, start.key, None
    for chunk in chunks:
        data = chunk.data
        while not inside and not plain and data.endswith(SEPARATOR):  # a record ends anyway
            data = data[: -len(SEPARATOR)]
        joined = rest + data
        documents = [joined] if plain else joined.split(SEPARATOR)
        left = len(joined)  # bytes not yet handed out
        for n, document in enumerate(documents):
            if n:
                key, expects = None, None
                owed += len(SEPARATOR)
                left -= len(SEPARATOR)
            closed = chunk.ends or n < len(documents) - 1
            begin = 0
            while begin < len(document):
                starts = key is None
                if key is None:
                    if not closed and len(document) - begin < HASHED + len(SEPARATOR):  # one may have begun
                        break
                    key = _key(document[begin : begin + HASHED])
                end, ids, then = _next(document, begin, closed, settle)
                if end == begin:
                    if starts:
                        key = None
                    break
                left -= end - begin
                ends = closed and end == len(document)
                after = Place(start.source, chunk.after - left, None if ends else key) if inside or not left else None
                yield Piece(document[begin:end], end - begin + owed, starts, key, after, ids=ids, expects=expects)
                begin, owed, expects = end, 0, then
            rest = document[begin:]
        if chunk.ends:
            rest, key, expects = b"", None, None


def _next(document: bytes, begin: int, closed: bool, settle: Settle | None) -> tuple[int, np.ndarray | None, int | None]:
    """Where the next piece of a document ends; `begin` where more of it must be read first."""
    size = len(document) - begin
    if closed and size <= BLOCK:
        return len(document), None, None
    stop = len(document) if not closed else min(len(document), begin + 2 * BLOCK)
    if end := find_cut(document, begin, stop):
        return end, None, None
    if size < BLOCK:
        return begin, None, None
    if settle is None:
        end = begin + BLOCK // 2
        while document[end] & 0xC0 == 0x80 and end > begin + 1:
            end -= 1
        return end, None, None
    run = settle(document[begin : begin + BLOCK])
    return begin + run.end, run.ids, run.then


def find_cut(data: bytes, begin: int, end: int) -> int:
    """The last place at the end of data[begin:end] where the text may be cut whatever follows, 0 where the last 64 kB hold
    none. It stays clear of the very end, where a separator may have begun."""
    end -= len(SEPARATOR)
    while end > begin and data[end] & 0xC0 == 0x80:
        end -= 1
    for pattern in (_BEFORE_SPACE, _AFTER_WORD):
        for start in (max(begin, end - 4096), max(begin, end - 65536)):  # in most texts the last space is near
            while start < end and data[start] & 0xC0 == 0x80:
                start += 1
            text = data[start : max(start, end)].decode("utf-8", "surrogateescape")
            last = deque(pattern.finditer(text), maxlen=1)
            if last:
                return start + len(text[: last[0].end()].encode("utf-8", "surrogateescape"))
    return 0


def split_tail(pieces: Iterable[Piece], target: int, at: int, in_tail: bool) -> Iterator[tuple[Piece, bool]]:
    """Each piece, and whether it is in the tail: what follows the first place for a cut at or after byte `target` of the
    text. `at` bytes were read before."""
    for piece in pieces:
        first = not in_tail and (at >= target or (piece.starts and at + piece.bytes - len(piece.data) >= target))
        if first:
            in_tail = True
        elif not in_tail and at + piece.bytes > target and piece.ids is None:
            cut = _cut_from(piece.data, target - at - (piece.bytes - len(piece.data)))
            if cut:
                back = len(piece.data) - cut
                yield replace(piece, data=piece.data[:cut], bytes=piece.bytes - back, after=None), False
                yield replace(piece, data=piece.data[cut:], bytes=back, starts=True, continues=True), True
                at, in_tail = at + piece.bytes, True
                continue
        at += piece.bytes
        continues = first and not piece.starts
        yield replace(piece, starts=piece.starts or first, continues=continues), in_tail


def _cut_from(data: bytes, head: int) -> int:
    """The first cut at or after byte `head`, before a space where there is one; in a run without any the next character,
    since what follows is a document of its own. 0 where there is none."""
    start = max(head - 1, 0)
    while start and data[start] & 0xC0 == 0x80:
        start -= 1
    text = data[start:].decode("utf-8", "surrogateescape")
    found = _BEFORE_SPACE.search(text) or _AFTER_WORD.search(text)
    end = found.end() if found else 1
    return start + len(text[:end].encode("utf-8", "surrogateescape")) if len(text) > end else 0


def _key(head: bytes) -> float:
    return int.from_bytes(hashlib.blake2b(head, digest_size=6).digest(), "big") / (1 << 48)
