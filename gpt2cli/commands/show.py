"""What `gpt2 tokenize --show` and `--decode` do: a text's tokens, and the text of tokens, on stdout."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from gpt2cli.pieces import Piece
    from gpt2cli.tokenizer import Encoding


def show(pieces: Iterable[Piece], encoding: Encoding, errors: str) -> None:
    """Print the tokens of `pieces` as they come; see `look.tokens` and `console.show_tokens`."""
    from gpt2cli import look
    from gpt2cli.commands import console

    console.show_tokens(look.tokens(pieces, encoding, errors))


def decode(what: Sequence[str], tokens_range: str | None = None, encoding: Encoding | None = None) -> None:
    """Print the text of ids or shards as it comes, and a line break at the end where it has none; see `look.decode`."""
    from gpt2cli import look

    last = ""
    for text in look.decode(what, tokens_range, encoding, stdin=_standard_input()):
        sys.stdout.write(text)
        last = text[-1:] or last
    sys.stdout.write("" if last == "\n" else "\n")
    sys.stdout.flush()  # now, while a closed pipe is still ours to notice


def _standard_input() -> Iterator[str]:
    """What is there, without waiting for more."""
    stdin = cast(BufferedReader, sys.stdin.buffer)
    while block := stdin.read1(1 << 16):
        yield block.decode("ascii", errors="backslashreplace")
