"""Looking at tokens: those that a text becomes, and the text that ids, or a part of a shard, stand for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from gpt2cli import atomic
from gpt2cli.errors import UserError
from gpt2cli.pieces import Piece
from gpt2cli.shards import Tokens, open_shard
from gpt2cli.tokenizer import Encoding, StreamDecoder

BLOCK = 1 << 16  # ids at a time

_BETWEEN = re.compile(r"[\s,]+")
_ID = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{0,18}):([0-9]{0,18})")


def tokens(pieces: Iterable[Piece], encoding: Encoding, errors: str = "strict") -> Iterator[tuple[int, bytes]]:
    """Each token's id and bytes, as the pieces come, with `<|endoftext|>` between documents."""
    begun = False
    for piece in pieces:
        ids = encoding.encode(piece.data.decode("utf-8", errors)) if piece.ids is None else piece.ids.tolist()
        for n in [encoding.eot] * (begun and piece.starts) + ids:
            yield n, encoding.token_bytes(n)
        begun = True


def decode(
    what: Sequence[str], tokens_range: str | None = None, encoding: Encoding | None = None, *, stdin: Iterable[str] = ()
) -> Iterator[str]:
    """The text of `what`, in pieces that end with whole characters; bytes that are not UTF-8 become U+FFFD.

    `what` is ids (`15496`, or several with commas), or `-` for those that `stdin` brings, or one shard, or a folder of them,
    whose training split is read. `tokens_range` is START:END, positions in the shard, either of which may be left out. Without
    `encoding` it is that of the shard's folder where it brings one, else GPT-2's.

    Raises UserError for what is neither an id nor a shard, an id outside the vocabulary, a shard of another vocabulary, and a
    range that is malformed, empty or beyond the end.
    """
    path = _shard_named(what)
    if path is None:
        if tokens_range is not None:
            raise UserError(f"--range {tokens_range} is for a token shard, or a folder of them, but ids were given")
        blocks = parse_ids(stdin if list(what) == ["-"] else [" ".join(what)])
        encoding = encoding or Encoding.gpt2()
    else:
        shard = open_shards(path)
        blocks = read(shard, find_range(tokens_range, len(shard), path))
        encoding = vocabulary_of(path, encoding)
    decoder = StreamDecoder(encoding)
    for block in blocks:
        yield decoder.feed_all(block)
    yield decoder.finish()


def _shard_named(what: Sequence[str]) -> Path | None:
    """The file or folder that `what` names, or None where it holds ids or `-`."""
    if not what:
        raise UserError("there is nothing to decode: give token ids, - for ids on standard input, or a token shard")
    paths = [word for word in what if not all(_ID.fullmatch(part) for part in _BETWEEN.split(word) if part)]
    if not paths or list(what) == ["-"]:
        return None
    missing = [word for word in paths if not os.path.exists(word)]  # which takes any text
    if missing:
        raise UserError(
            f"{missing[0][:80]!r} is neither a token id nor a token shard (a .bin or .npy file, or a folder of them)"
        )
    if len(what) > 1:
        raise UserError(f"{paths[0]} is not a token id: give ids, or one shard, or one folder of shards")
    return Path(paths[0])


def parse_ids(texts: Iterable[str]) -> Iterator[list[int]]:
    """Ids written with spaces, line breaks or commas between them, as they come; a number may be cut between two texts."""
    rest = ""
    for text in chain(texts, [" "]):
        *words, rest = _BETWEEN.split(rest + text)
        if len(rest) > 9:
            words.append(rest)  # no id is that long: refused now, not gathered without end
        yield [_parse_id(word) for word in words if word]


def _parse_id(word: str) -> int:
    if not _ID.fullmatch(word):
        raise UserError(f"{word[:40]!r} is not a token id: expected whole numbers with spaces or commas between them")
    return int(word)


def open_shards(path: Path) -> Tokens:
    """One shard, or the training split of a folder."""
    if path.is_dir():
        return Tokens.open(path, "train")
    if path.suffix not in (".bin", ".npy"):
        raise UserError(f"{path} is not a token shard (a .bin or .npy file): make some with 'gpt2 tokenize {path}'")
    return Tokens([open_shard(path)])


def find_range(written: str | None, length: int, path: Path) -> range:
    """`START:END` as positions among the `length` tokens of `path`; all of them where None."""
    match = _RANGE.fullmatch(":" if written is None else written)
    if not match:
        raise UserError(f"--range {written}: expected START:END, positions of tokens, such as 0:100")
    start, end = int(match[1] or 0), int(match[2] or length)
    if max(start, end) > length:
        raise UserError(f"--range {written}: {path} has {length:,} tokens, at positions 0 to {length - 1:,}")
    if start >= end:
        raise UserError(f"--range {written} is empty: expected START below END; {path} has {length:,} tokens")
    return range(start, end)


def read(shard: Tokens, positions: range) -> Iterator[list[int]]:
    """The ids at these positions, in blocks."""
    for start in range(positions.start, positions.stop, BLOCK):
        yield shard.read(start, min(BLOCK, positions.stop - start)).tolist()


def vocabulary_of(path: Path, encoding: Encoding | None = None) -> Encoding:
    """`encoding`, or the vocabulary in the folder of a shard, or GPT-2's. Raises UserError where the folder's manifest says
    that it was made with another one."""
    folder = path if path.is_dir() else path.parent
    encoding = encoding or Encoding.from_folder(folder) or Encoding.gpt2()
    manifest = folder / "manifest.json"
    made_with = atomic.read_sealed(manifest).get("tokenizer_sha256") if manifest.is_file() else None
    if made_with not in (None, encoding.sha256):
        raise UserError(
            f"{path} was tokenized with another vocabulary than this one of {encoding.n_vocab:,} ids: put its "
            f"tokenizer.json into {folder}, or tokenize the text again"
        )
    return encoding
