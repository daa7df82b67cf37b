"""The first reading of the texts: their hash, what is wrong with them, and where the validation split falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gpt2cli import documents
from gpt2cli.config import CHOICES
from gpt2cli.documents import Text
from gpt2cli.errors import UserError
from gpt2cli.pieces import cut_up

SAMPLE_PIECES, SAMPLE_BYTES = 32, 1 << 16  # of the text, to prove an encoder on and to guess the tokens from

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


@dataclass(frozen=True)
class Source:
    path: str  # as given
    bytes: int  # of the text
    sha256: str  # of the file, unpacked


@dataclass(frozen=True)
class Policy:
    """What decides the tokens of a text, beside the text and the vocabulary."""

    val_fraction: float = 0.05
    plain: bool = False  # <|endoftext|> in the text is ordinary text
    errors: str = "strict"  # of bytes that are not UTF-8: strict, or replace with U+FFFD
    split: str = "auto"  # what is held out: hashed documents, the tail of the text, or what suits it
    format: str = "auto"  # text, jsonl or parquet; by default the file's name tells
    field: str = "text"  # of a JSON or parquet record

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise UserError(f"--val-fraction must be at least 0 and below 1, but is {self.val_fraction}")
        for name in ("errors", "split", "format"):
            if getattr(self, name) not in CHOICES[name]:
                raise UserError(f"--{name} is {getattr(self, name)!r}, but must be one of {', '.join(CHOICES[name])}")


@dataclass
class Survey:
    """What the first reading found. Sizes are bytes of the text."""

    sources: list[Source]
    size: int = 0
    held_out: int = 0  # of the documents that their hash holds out
    sample: list[bytes] = field(default_factory=list)  # spread evenly


def survey(texts: Sequence[Text], policy: Policy, progress: Progress) -> Survey:
    """Read everything once. Raises UserError, naming file and place, for what is no text."""
    seen = Survey([])
    size = sum(text.file.stat().st_size for text in texts)
    before, told, stride, number = 0, 0, 1, 0
    progress("reading", 0, size)
    for text in texts:
        chunks = documents.Surveyed(text, policy.errors)
        begin = seen.size
        for piece in cut_up(chunks, plain=policy.plain, inside=text.kind == "text"):
            seen.size += piece.bytes
            seen.held_out += piece.bytes if piece.key < policy.val_fraction else 0
            if number % stride == 0:
                seen.sample.append(piece.data[:SAMPLE_BYTES].decode("utf-8", "ignore").encode())
                if len(seen.sample) == 2 * SAMPLE_PIECES:
                    seen.sample, stride = seen.sample[::2], 2 * stride
            number += 1
            if before + chunks.file_bytes >= told + documents.BLOCK:
                told = before + chunks.file_bytes
                progress("reading", min(told, size), size)
        if seen.size == begin:
            raise UserError(f"{text.name} holds no text")
        before += text.file.stat().st_size
        seen.sources.append(Source(text.name, seen.size - begin, chunks.sha256))
    return seen


def choose_split(policy: Policy, seen: Survey) -> str:
    """Documents by their hash, so that more files move none of those before; the tail where that would miss the fraction
    by more than two times, as with one document."""
    part = seen.held_out / seen.size
    if part == 1 and policy.split == "hashed":
        raise UserError("--split hashed holds out everything: with so few documents use --split tail")
    if policy.split != "auto" or policy.val_fraction == 0:
        return policy.split if policy.split != "auto" else "hashed"
    return "hashed" if policy.val_fraction / 2 <= part <= policy.val_fraction * 2 else "tail"
