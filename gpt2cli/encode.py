"""Batches of text -> ids, in order, in several processes, always tiktoken's: gigatoken is used once it proved equal."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np

from gpt2cli.errors import UserError
from gpt2cli.pieces import Piece, Settled
from gpt2cli.tokenizer import Encoding

BATCH_BYTES = 1 << 20
BATCH_PIECES = 4096
_ASCII = bytes(range(128))
_CONTRACTION = re.compile(rb"'[a-zA-Z]")
WINDOW = 1 << 14  # bytes of a run without a place to cut that are encoded at once
CACHE_BYTES = 128 << 20  # what gigatoken may grow by, if it has had
CACHE_TEXT = 16 << 20  # bytes of text at least

Encode = Callable[[bytes], np.ndarray]  # text -> ids (uint32)
Batch = list[tuple[Piece, bool]]  # with whether it is held out
Encoded = tuple[np.ndarray, np.ndarray]  # ids (uint16) of the training and of the validation split


@dataclass(frozen=True)
class Encoder:
    """What a worker needs to know to encode."""

    encoding: Encoding
    errors: str
    fast: bool

    def make(self) -> Encode:
        if self.fast:
            return _Gigatoken(self.encoding, self.errors)
        return lambda data: self.encoding.encode_array(data.decode("utf-8", self.errors))


class _Gigatoken:
    """gigatoken as an `Encode`. It remembers every word it has met, so it is made anew when it has grown too large."""

    def __init__(self, encoding: Encoding, errors: str) -> None:
        settings = json.loads(encoding.files["tokenizer.json"])
        settings["added_tokens"] = []  # <|endoftext|> in a piece is text
        self._encoding = encoding
        self._settings, self._errors = json.dumps(settings, ensure_ascii=False), errors
        self._make()
        self._limit = _resident() + CACHE_BYTES

    def _make(self) -> None:
        import gigatoken

        self._exact = Encoder(self._encoding, self._errors, fast=False).make()
        self._tokenizer: Any = None  # not two of them in memory
        self._tokenizer = gigatoken.Tokenizer.from_json(self._settings)
        self._seen = 0  # bytes

    def __call__(self, data: bytes) -> np.ndarray:
        if has_new_characters(data):
            return self._exact(data)
        if self._seen > CACHE_TEXT and _resident() > self._limit:
            self._make()
        self._seen += len(data)
        return self._tokenizer.encode(data if self._errors == "strict" else data.decode("utf-8", self._errors))


def has_new_characters(data: bytes) -> bool:
    """Whether there are any that Python's version of Unicode does not know: libraries that do, and those that do not, find
    other words in them. Of all others gigatoken and tiktoken agree (tested)."""
    others = data.translate(None, _ASCII).decode("utf-8", "replace")
    return bool(others) and bool(_unknown()[np.frombuffer(others.encode("utf-32-le"), np.uint32)].any())


@cache
def _unknown() -> np.ndarray:
    """Whether a code point has no meaning yet. Planes 4 to 13, and most of the 14th, have none at all."""
    unknown = np.ones(0x110000, bool)
    for first, end in ((0, 0x40000), (0xE0000, 0xE1000)):
        unknown[first:end] = [unicodedata.category(chr(code)) == "Cn" for code in range(first, end)]
    unknown[0xF0000:] = False  # for private use
    return unknown


def _resident() -> float:
    """Bytes of memory this process holds now; infinite where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):
        return math.inf


@dataclass(frozen=True)
class Choice:
    encoder: Encoder
    name: str  # and what is to be said of it
    tokens: int  # of the sample


def choose(encoding: Encoding, errors: str, sample: Sequence[bytes], *, fast: bool) -> Choice:
    """With `fast` the fastest encoder that is installed and equals tiktoken on `sample`; else, and without one, tiktoken."""
    slow = Encoder(encoding, errors, fast=False)
    name = f"tiktoken {version('tiktoken')}"
    if not sample:
        return Choice(slow, name, 0)
    expected = [slow.make()(text) for text in sample]
    tokens = sum(map(len, expected))
    if not fast:
        return Choice(slow, name, tokens)
    try:
        quick = Encoder(encoding, errors, fast=True)
        encode = quick.make()
        faster = f"gigatoken {version('gigatoken')}"
        if all(np.array_equal(encode(text), ids) for text, ids in zip(sample, expected, strict=True)):
            return Choice(quick, f"{faster}, equal to tiktoken on {sum(map(len, sample)):,} bytes of the text", tokens)
        name += f"; {faster} gives other ids for this text"
    except ImportError:
        pass
    except Exception as error:  # it is optional: whatever it raises costs speed, not the tokens
        name += f"; gigatoken cannot be used: {str(error).splitlines()[0] if str(error) else repr(error)}"
    return Choice(slow, name, tokens)


# ==== runs without a place to cut ====


def settle(run: bytes, encoding: Encoding) -> Settled:
    """Encode the beginning of a run, to a token border that what follows does not move.

    BPE is local: a sequence of tokens is its encoding of a word exactly if each two neighbours are (van Antwerpen and
    Neubeck, "So many tokens, so little time", 2024). So two overlapping encodings may be sewn together at a token that both
    have: the token after the border, which the encoding of the rest is checked to begin with. The windows are small because
    the time of a word grows faster than its length.
    """
    end, ids, then = 0, np.empty(0, dtype=np.uint32), None
    while end == 0 or len(run) - end >= WINDOW:
        window = _settle_window(run[end : end + WINDOW], encoding)
        check_begin(run[end : end + 20], window.ids, then)
        end, ids, then = end + window.end, np.concatenate([ids, window.ids]), window.then
    return Settled(end, ids, then)


def _settle_window(window: bytes, encoding: Encoding) -> Settled:
    for end in range(len(window), len(window) - 4, -1):  # the window may end within a character
        with contextlib.suppress(UnicodeDecodeError):
            ids = encoding.encode_array(window[:end].decode("utf-8"))
            break
    else:
        raise UserError(f"a run of {len(window):,} bytes without any space holds bytes that are not UTF-8; mend them first")
    ends = np.cumsum(encoding.byte_lengths()[ids])
    for n in range(int(np.searchsorted(ends, len(window) * 7 // 8)), 0, -1):
        end = int(ends[n - 1])
        # The pre-tokenizer must see the rest as it did: not the middle of a character, nor of a contraction as 're.
        if window[end] & 0xC0 != 0x80 and not _CONTRACTION.search(window[max(0, end - 2) : end + 2]):
            return Settled(end, ids[:n], int(ids[n]))
    raise UserError(f"a run of {len(window):,} bytes holds no place to cut")


def check_begin(data: bytes, ids: np.ndarray, expected: int | None) -> None:
    if expected is not None and ids[0] != expected:
        raise UserError(
            f"a long run of text without a space cannot be cut exactly before {data[:20]!r}; please report it, with the text"
        )


# ==== batches ====


def batches(pieces: Iterable[tuple[Piece, bool]]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for item in pieces:
        batch.append(item)
        size += len(item[0].data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch: Batch, encode: Encode, eot: int) -> Encoded:
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    border = np.array([eot], dtype=np.uint32)
    for piece, held_out in batch:
        ids = encode(piece.data) if piece.ids is None else piece.ids
        check_begin(piece.data, ids, piece.expects)
        parts[held_out].extend((border, ids) if piece.starts else (ids,))
    train, val = (np.concatenate([np.empty(0, np.uint32), *split]).astype(np.uint16) for split in parts)
    return train, val


_worker: tuple[Encode, int]


def _start_worker(encoder: Encoder) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _worker = encoder.make(), encoder.encoding.eot


def _leave_with_parent() -> None:
    """However it went: a worker that is not told waits for ever."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: Batch) -> Encoded:
    return encode_batch(batch, *_worker)


@contextlib.contextmanager
def no_ctrl_c() -> Iterator[None]:
    """Processes that are started here do not see Ctrl-C, which is their parent's to handle; it sees it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks it when it starts, as it does with the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(work: Iterator[Batch], encoder: Encoder, workers: int) -> Iterator[tuple[Batch, Encoded]]:
    """Each batch with its ids, in order; at most a few batches a worker are under way."""
    if workers == 1:
        encode = encoder.make()
        for batch in work:
            yield batch, encode_batch(batch, encode, encoder.encoding.eot)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoder,))
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()

    def submit(some: Iterable[Batch]) -> None:
        for batch in some:
            with no_ctrl_c():
                waiting.append((batch, pool.submit(_encode_in_worker, batch)))

    try:
        submit(itertools.islice(work, 4 * workers))
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
            submit(itertools.islice(work, 1))
    except BrokenProcessPool:
        raise UserError(
            "a worker was killed, perhaps for want of memory: the same command goes on, best with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
