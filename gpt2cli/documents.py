"""Where text comes from: files and folders of plain text, JSON lines and parquet, each also gzipped, and stdin."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from gpt2cli.errors import UserError

EMBEDDED = Path("shakespeare.txt.gz")  # in the package's assets; shown to people by this name
STDIN = Path("-")
# Bytes read at once. Tiktoken's regex goes back a million steps at the most in a row of spaces: two blocks are fewer.
BLOCK = 7 << 16
RECORD_BYTES = 64 << 20  # a line of JSON is held in memory, so it has a limit; a line of text has none
KINDS = {".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
NAMED = KINDS | {".json": "jsonl"}  # of a file that is named: in folders such a file may be anything
TEXT_SUFFIXES = tuple(suffix + packed for suffix in KINDS for packed in ("", ".gz"))


@dataclass(frozen=True)
class Text:
    """One input, ready to be read as often as needed."""

    name: str  # shown to people
    file: Path
    kind: str  # text, jsonl or parquet
    packed: bool  # by gzip
    field: str  # of a record


@dataclass(frozen=True)
class Chunk:
    data: bytes  # UTF-8
    ends: bool  # its document
    after: int  # where the reading goes on after it: a byte of the unpacked file, a row of a parquet file


# ==== finding ====


def find_texts(inputs: Sequence[Path], kind: str = "auto") -> list[Path]:
    """Files named, and the text files below folders named, in natural order (part2 before part10). Where the `kind` of text
    is said, all files but hidden and empty ones are such.

    Raises UserError for what does not exist, and for a folder without text.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            suffixes = TEXT_SUFFIXES if kind == "auto" else ""
            shown = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            below = [p for p in shown if p.name.lower().endswith(suffixes) and p.is_file() and p.stat().st_size]
            if not below:
                raise UserError(
                    f"{path} holds no text: expected files ending in {', '.join(KINDS)}, or those with .gz; "
                    "--format text takes files of any name"
                )
            found += sorted(below, key=lambda p: [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", str(p))])
        else:
            check_there(path)
            found.append(path)
    return found


def check_there(path: Path) -> None:
    if path not in (EMBEDDED, STDIN) and not path.exists():
        raise UserError(f"{path} does not exist; expected a text file, a folder of them, or - for stdin")


@contextlib.contextmanager
def opened(inputs: Sequence[Path], kind: str = "auto", field: str = "text", scratch: Path = Path()) -> Iterator[list[Text]]:
    """The texts of `inputs`. What cannot be read twice, as stdin, is copied to the folder `scratch` meanwhile."""
    with contextlib.ExitStack() as stack:
        texts = []
        for path in find_texts(inputs, kind):
            name, packed = path.name.lower(), path.name.lower().endswith(".gz")
            found = kind if kind != "auto" else NAMED.get(Path(name.removesuffix(".gz")).suffix, "text")
            file = path
            if path == EMBEDDED and not path.exists():
                file = Path(__file__).parent / "assets" / EMBEDDED
            elif path == STDIN or not path.is_file():  # a pipe
                source = sys.stdin.buffer if path == STDIN else stack.enter_context(path.open("rb"))
                file, packed = stack.enter_context(_copied(source, scratch)), False
            elif packed and found == "parquet":  # is read from its end
                with _gzip_errors(path), gzip.open(path) as unpacked:
                    file, packed = stack.enter_context(_copied(unpacked, scratch)), False
            texts.append(Text("stdin" if path == STDIN else str(path), file, found, packed, field))
        yield texts


@contextlib.contextmanager
def _copied(source: Any, scratch: Path) -> Iterator[Path]:
    scratch.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".input-", suffix=".tmp", dir=scratch)
    try:
        with open(descriptor, "wb") as copy:
            shutil.copyfileobj(source, copy, BLOCK)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


# ==== reading ====


def read(text: Text, errors: str, start: int = 0) -> Iterator[Chunk]:
    """The text from `start` (see `Chunk.after`) on, as it is in the file. Raises UserError for what cannot be read."""
    if text.kind == "parquet":
        yield from _rows(text, start)
    else:
        with _gzip_errors(text.name), _open(text) as file:
            file.seek(start)
            yield from (_lines(file, text, errors, start) if text.kind == "jsonl" else _blocks(file, start))


class Surveyed:
    """`read` from the beginning with every check that names a place in the file. Raises UserError for an empty text and one
    that is plainly binary."""

    def __init__(self, text: Text, errors: str) -> None:
        self._text, self._errors = text, errors
        self._digest = hashlib.sha256()
        self.file_bytes = 0  # read so far

    def __iter__(self) -> Iterator[Chunk]:
        text = self._text
        if text.kind == "parquet":
            yield from _rows(text, 0)
            with text.file.open("rb") as parquet:
                self._digest = hashlib.file_digest(parquet, lambda: self._digest)
            return
        with _gzip_errors(text.name), text.file.open("rb") as packed:
            self._file = cast(BinaryIO, gzip.GzipFile(fileobj=packed)) if text.packed else packed
            _refuse_binary(self._file.read(65536), text.name)
            self._file.seek(0)
            chunks = (
                _lines(cast(BinaryIO, self), text, self._errors, 0)
                if text.kind == "jsonl"
                else _valid(_blocks(cast(BinaryIO, self), 0), text.name, self._errors)
            )
            for chunk in chunks:
                self.file_bytes = packed.tell()
                yield chunk

    @property
    def sha256(self) -> str:
        """Of the unpacked text or lines, of a parquet file as it is; once it was read."""
        return self._digest.hexdigest()

    # What is read from the file is hashed on the way.

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def readline(self, size: int) -> bytes:
        data = self._file.readline(size)
        self._digest.update(data)
        return data


def _open(text: Text) -> BinaryIO:
    return cast(BinaryIO, gzip.open(text.file)) if text.packed else text.file.open("rb")


@contextlib.contextmanager
def _gzip_errors(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is not a whole gzip file: {error}") from None


def _refuse_binary(head: bytes, name: str) -> None:
    if not head:
        again = " (the same as before, for a run that read it and whose tokens are not in the cache any more)"
        raise UserError(f"{name} is empty; expected UTF-8 text{again if name == 'stdin' else ''}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is UTF-16; expected UTF-8 text: convert it (iconv -f UTF-16 -t UTF-8)")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{name} is gzipped: give it a name that ends in .gz, or unpack it (gzip -dc)")
    if b"\0" in head:
        raise UserError(f"{name} is not text: it has a zero byte at offset {head.index(0)}; expected UTF-8 text")


def _blocks(file: BinaryIO, start: int) -> Iterator[Chunk]:
    at = start
    # Blocks end at the same places wherever the reading starts, so that work taken up again makes the same pieces.
    while block := file.read(BLOCK - at % BLOCK):
        at += len(block)
        yield Chunk(block, False, at)
    yield Chunk(b"", True, at)


def _valid(chunks: Iterable[Chunk], name: str, errors: str) -> Iterator[Chunk]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors=errors)
    for chunk in chunks:
        kept = len(decoder.getstate()[0])  # bytes of a character begun in the chunk before
        try:
            decoder.decode(chunk.data, final=chunk.ends)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error, chunk.after - len(chunk.data) - kept) from None
        yield chunk


def _not_utf8(name: str, error: UnicodeDecodeError, begin: int) -> UserError:
    return UserError(
        f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {begin + error.start}; "
        "convert it (iconv -t UTF-8), or pass --errors replace"
    )


def _lines(file: BinaryIO, text: Text, errors: str, start: int) -> Iterator[Chunk]:
    at, number = start, 0
    while line := file.readline(RECORD_BYTES + 1):
        number += 1
        where = f"{text.name}, line {number:,}"
        if len(line) > RECORD_BYTES:
            raise UserError(f"{where} is longer than {RECORD_BYTES >> 20} MB, the limit of a JSON record")
        at += len(line)
        if at == len(line):
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            raise _not_utf8(where, error, at - len(line)) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}; expected one object a line") from None
        if (data := _field(record, text.field, where, errors)) is not None:
            yield Chunk(data, True, at)


def _field(record: Any, field: str, where: str, errors: str) -> bytes | None:
    """Its text; None for null."""
    if not isinstance(record, dict) or field not in record:
        has = f"the fields {', '.join(map(str, record))}" if isinstance(record, dict) else f"a {type(record).__name__}"
        raise UserError(f"{where} has no field {field!r}, but {has[:200]}: name the field of the text with --field")
    value = record[field]
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} holds {type(value).__name__}, expected a string; name another with --field")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            half = ord(value[error.start])
            raise UserError(f"{where}: \\u{half:04x} is half a character; pass --errors replace to go on") from None
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def _rows(text: Text, start: int) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{text.name} is a parquet file; to read those: pip install pyarrow") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(text.file, memory_map=True) as file:
            columns = {column.name: column.type for column in file.schema_arrow}
            if text.field not in columns:
                raise UserError(
                    f"{text.name} has no column {text.field!r}, but {', '.join(columns)[:200]}: name the text's with --field"
                )
            kind = columns[text.field]
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{text.name}: column {text.field!r} holds {kind}, expected strings; name another with --field")
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row + rows <= start:
                    row += rows
                    continue
                for batch in file.iter_batches(64, row_groups=[group], columns=[text.field]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        if row > start and value is not None:
                            yield Chunk(value.encode(), True, row)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{text.name} is not a whole parquet file: {str(error).splitlines()[0]}") from None
