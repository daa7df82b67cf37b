"""Text to token shards: files -> pieces -> ids, in parallel and in bounded memory, equal to tiktoken on the whole text.

A text may be cut between a non-space and a space, or between a letter and a following mark or digit, because GPT-2's
pre-tokenizer always cuts there too. The last `val_fraction` of the bytes is held out for validation.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2cli import __version__, atomic
from gpt2cli.errors import UserError
from gpt2cli.shards import SHARD_TOKENS, ShardWriter, check
from gpt2cli.tokenizer import END_OF_TEXT, Encoding

EMBEDDED = Path("shakespeare.txt.gz")  # in the package's assets; shown to people by this name
BLOCK = 1 << 20  # bytes read at once
PARALLEL_FROM = 16 << 20  # below this many bytes starting workers costs more than it saves
TEXT_SUFFIXES = (".txt", ".txt.gz", ".md")

Progress = Callable[[int, int], None]  # bytes done, bytes in all

# Left of the cut a character that no version of Unicode calls a space, right of it one that every version does.
_BEFORE_SPACE = re.compile(r"[^\s](?=[ \n\t\r])")
# Left a letter, right a mark that every version of Unicode calls neither letter, number nor space.
_AFTER_LETTER = re.compile(r"[^\W\d_](?=[!-/:-@\[-`{-~、。，！？：；「」『』（）…—])")


@dataclass(frozen=True)
class Source:
    path: str  # as given
    bytes: int
    sha256: str  # of the text, unpacked


@dataclass(frozen=True)
class Policy:
    """What decides the tokens of a text, beside the text and the vocabulary."""

    val_fraction: float = 0.05
    plain: bool = False  # <|endoftext|> in the text is ordinary text
    errors: str = "strict"  # of bytes that are not UTF-8: strict, or replace with U+FFFD

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise UserError(f"--val-fraction must be at least 0 and below 1, but is {self.val_fraction}")
        if self.errors not in ("strict", "replace"):
            raise UserError(f"--errors is {self.errors!r}, but must be strict or replace")


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` beside the shards."""

    format: str
    gpt2cli: str
    sources: list[Source]
    policy: Policy
    tokenizer_sha256: str
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    documents: int
    shards: dict[str, str]  # name -> sha256


def tokenize(
    inputs: Sequence[Path],
    out: Path,
    *,
    encoding: Encoding,
    policy: Policy = Policy(),
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write the shards and manifest of `inputs` (files, or folders of text files) to the new folder `out`.

    The result is the same for any number of workers. If `out` already holds just this, it is left as it is.
    Raises UserError for unreadable, empty or binary input, text that is not UTF-8, and an `out` that holds other things.
    """
    if encoding.n_vocab > 1 << 16:
        raise UserError(f"shards hold 16-bit ids, but the vocabulary has {encoding.n_vocab:,}")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens must be at least 1, but is {shard_tokens}")
    sources = [scan(path) for path in find_texts(inputs)]
    if out.exists():
        done = _finished(out, sources, policy, encoding)
        if done is None:
            raise UserError(f"{out} already exists and holds something else: give another folder with --out")
        return done
    total = sum(source.bytes for source in sources)
    val_starts = total - int(total * policy.val_fraction) if policy.val_fraction else sys.maxsize
    counts = {"documents": 0, "train": 0, "val": 0}
    with atomic.new_folder(out) as folder:
        writers = {split: ShardWriter(folder, split, shard_tokens) for split in ("train", "val")}
        done_bytes = 0
        pieces = _split_at(_pieces(sources, policy), val_starts)
        for piece, ids in _encode_all(pieces, encoding, _workers(workers, total)):
            split = "val" if piece.in_tail else "train"
            if piece.starts_document:
                writers[split].write(np.array([encoding.eot]))
                counts["documents"] += not piece.continues
            writers[split].write(ids)
            counts[split] += piece.bytes
            done_bytes += piece.bytes
            progress(done_bytes, total)
        for writer in writers.values():
            writer.close()
        manifest = Manifest(
            format="llm.c uint16",
            gpt2cli=__version__,
            sources=sources,
            policy=policy,
            tokenizer_sha256=encoding.sha256,
            train_tokens=writers["train"].tokens,
            val_tokens=writers["val"].tokens,
            train_bytes=counts["train"],
            val_bytes=counts["val"],
            documents=counts["documents"],
            shards={path.name: atomic.sha256(path) for writer in writers.values() for path in writer.shards},
        )
        atomic.write_sealed(folder / "manifest.json", asdict(manifest))
    return manifest


def cached(inputs: Sequence[Path], cache: Path, *, encoding: Encoding, policy: Policy, progress: Progress) -> Path:
    """The folder under `cache` with the tokens of `inputs`, made when it is not there; named by what decides them."""
    texts = [scan(path).sha256 for path in find_texts(inputs)]
    key = json.dumps([texts, asdict(policy), encoding.sha256, __version__])
    folder = cache / "tokens" / hashlib.sha256(key.encode()).hexdigest()
    try:
        check(folder)
        intact = (folder / "manifest.json").is_file()
    except UserError:
        intact = False
    if not intact:
        shutil.rmtree(folder, ignore_errors=True)  # it is only a cache: made anew
        try:
            tokenize(inputs, folder, encoding=encoding, policy=policy, progress=progress)
        except OSError:
            if not (folder / "manifest.json").is_file():  # else another process was quicker
                raise
    return folder


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2cli"


def _finished(out: Path, sources: list[Source], policy: Policy, encoding: Encoding) -> Manifest | None:
    if not (out / "manifest.json").is_file():
        return None
    try:
        check(out)
        data = atomic.read_sealed(out / "manifest.json")
        done = Manifest(**data | {"sources": [Source(**s) for s in data["sources"]], "policy": Policy(**data["policy"])})
    except (UserError, TypeError, KeyError):
        return None
    same_text = [s.sha256 for s in done.sources] == [s.sha256 for s in sources]
    return done if same_text and (done.policy, done.tokenizer_sha256) == (policy, encoding.sha256) else None


# ==== finding and reading text ====


def find_texts(inputs: Sequence[Path]) -> list[Path]:
    """Files named, and the text files below folders named, in natural order (part2 before part10)."""
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            below = [p for p in path.rglob("*") if p.name.lower().endswith(TEXT_SUFFIXES) and p.is_file()]
            if not below:
                raise UserError(f"{path} holds no text: expected files ending in {', '.join(TEXT_SUFFIXES)}")
            found += sorted(below, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", str(p))])
        elif path.is_file() or path == EMBEDDED:
            found.append(path)
        else:
            raise UserError(f"{path} does not exist; expected a text file or a folder of them")
    return found


def _open(path: Path) -> BinaryIO:
    if path == EMBEDDED and not path.exists():
        path = Path(__file__).parent / "assets" / EMBEDDED
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            while block := file.read(BLOCK):
                yield block
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from None


def scan(path: Path) -> Source:
    """Hash a text file. Raises UserError for an empty one and for one that is plainly binary."""
    digest, size = hashlib.sha256(), 0
    for block in _blocks(path):
        if size == 0 and b"\0" in block[:65536]:
            raise UserError(f"{path} is not text: it has a zero byte at offset {block.index(0)}; expected UTF-8 text")
        digest.update(block)
        size += len(block)
    if size == 0:
        raise UserError(f"{path} is empty; expected UTF-8 text")
    return Source(str(path), size, digest.hexdigest())


def _texts(path: Path, errors: str) -> Iterator[str]:
    """The text of a file in blocks. Raises UserError with the offset of a byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
    offset = 0  # of the next block
    blocks = _blocks(path)
    block: bytes | None = b""
    while block is not None:
        block = next(blocks, None)
        kept = len(decoder.getstate()[0])  # bytes of a character begun in the block before
        try:
            yield decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset - kept + error.start}; "
                "convert it (iconv -t UTF-8), or pass --errors replace"
            ) from None
        offset += len(block or b"")


# ==== cutting it into pieces ====


@dataclass(frozen=True)
class Piece:
    text: str
    bytes: int  # of the text, and of a separator before it
    starts_document: bool
    in_tail: bool = False  # held out for validation
    continues: bool = False  # its document began before the tail


def _pieces(sources: Sequence[Source], policy: Policy) -> Iterator[Piece]:
    for source in sources:
        starts, owed = True, 0  # a new document begins here; bytes of separators not yet counted
        rest = ""
        for text in _texts(Path(source.path), policy.errors):
            documents = [rest + text] if policy.plain else (rest + text).split(END_OF_TEXT)
            for document in documents[:-1]:
                if document:
                    yield Piece(document, len(document.encode()) + owed, starts)
                    owed = 0
                starts, owed = True, owed + len(END_OF_TEXT)
            cut = find_cut(documents[-1])
            if cut:
                yield Piece(documents[-1][:cut], len(documents[-1][:cut].encode()) + owed, starts)
                starts, owed = False, 0
            rest = documents[-1][cut:]
        if rest:
            yield Piece(rest, len(rest.encode()) + owed, starts)


def find_cut(text: str) -> int:
    """The last place where `text` may be cut whatever follows it, 0 where there is none. It stays clear of the end,
    where a separator may have begun."""
    end = len(text) - len(END_OF_TEXT)
    for pattern in (_BEFORE_SPACE, _AFTER_LETTER):
        # Look at the last few thousand characters first: in most texts the last space is near.
        for start in (max(0, end - 4096), 0):
            last = deque(pattern.finditer(text, start, max(end, 0)), maxlen=1)
            if last:
                return last[0].end()
    return 0


def _split_at(pieces: Iterator[Piece], target: int) -> Iterator[Piece]:
    """Cut the stream at the first place allowed at or after byte `target`; what follows is the tail."""
    at, in_tail = 0, False
    for piece in pieces:
        first = in_tail is False and at >= target
        if first:
            in_tail = True
        elif not in_tail and at + piece.bytes > target:
            head = len(piece.text.encode()[: target - at].decode(errors="ignore"))
            cut = _BEFORE_SPACE.search(piece.text, max(head - 1, 0))
            if cut:
                front, back = piece.text[: cut.end()], piece.text[cut.end() :]
                tail_bytes = len(back.encode())
                yield Piece(front, piece.bytes - tail_bytes, piece.starts_document)
                yield Piece(back, tail_bytes, True, in_tail=True, continues=True)
                at, in_tail = at + piece.bytes, True
                continue
        at += piece.bytes
        continues = first and not piece.starts_document
        yield Piece(piece.text, piece.bytes, piece.starts_document or first, in_tail, continues)


# ==== encoding the pieces ====

_worker_encoding: Encoding


def _start_worker(encoding: Encoding) -> None:
    global _worker_encoding
    _worker_encoding = encoding


def _encode_in_worker(text: str) -> np.ndarray:
    return np.asarray(_worker_encoding.encode(text), dtype=np.uint16)


def _workers(asked: int | None, total: int) -> int:
    if asked is not None and asked < 1:
        raise UserError(f"--workers must be at least 1, but is {asked}")
    return asked or (os.cpu_count() or 1 if total >= PARALLEL_FROM else 1)


def _encode_all(pieces: Iterator[Piece], encoding: Encoding, workers: int) -> Iterator[tuple[Piece, Any]]:
    """Each piece with its ids, in order; at most a few pieces a worker are under way."""
    if workers == 1:
        for piece in pieces:
            yield piece, np.asarray(encoding.encode(piece.text), dtype=np.uint16)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (encoding,)) as pool:
        waiting: deque[tuple[Piece, Future[np.ndarray]]] = deque()
        for piece in pieces:
            waiting.append((piece, pool.submit(_encode_in_worker, piece.text)))
            if len(waiting) > 4 * workers:
                piece, future = waiting.popleft()
                yield piece, future.result()
        for piece, future in waiting:
            yield piece, future.result()
