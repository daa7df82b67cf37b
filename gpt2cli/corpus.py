"""Text to token shards: in parallel, in bounded memory, equal to tiktoken on the whole text, and going on where it stopped.

The text is read twice. First to hash it, to check it and to see where the validation split falls; then to encode it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from gpt2cli import __version__, atomic, documents, encode, vocabulary
from gpt2cli.documents import Text
from gpt2cli.encode import Encoder
from gpt2cli.errors import UserError, size
from gpt2cli.pieces import Piece, Place, Settle, cut_up, split_tail
from gpt2cli.shards import SHARD_TOKENS, ShardWriter, check, count_tokens
from gpt2cli.survey import Policy, Progress, Source, Survey, choose_split, survey
from gpt2cli.tokenizer import Encoding

PARALLEL_FROM = {False: 16 << 20, True: 256 << 20}  # bytes: workers save more than they cost; a fast encoder: later
FAST_FROM = 1 << 20  # below this many bytes a faster encoder is not worth its proof
DEFAULT_WORKERS = {False: 6, True: 2}  # at most, for memory: a fast one may hold 300 MB
MOST_WORKERS = 61  # what Windows can wait for
VOCABULARY_BYTES = 200_000_000  # of a text, to train a vocabulary on
SAVE_SECONDS = 5.0


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` beside the shards."""

    format: str
    gpt2cli: str
    key: str  # sha256 of everything that decides the rest
    sources: list[Source]
    policy: Policy
    split: str  # hashed or tail
    tokenizer_sha256: str
    vocab_size: int
    encoder: str  # that made the ids, and why this one
    train_tokens: int
    val_tokens: int
    train_bytes: int
    val_bytes: int
    documents: int
    files: dict[str, str]  # name -> sha256


@dataclass
class State:
    """How far the work is: with the shards cut to these lengths it can go on. Pairs are of the two splits."""

    key: str  # see `Job.key`
    place: Place = field(default_factory=Place)
    bytes: int = 0  # of the text
    documents: int = 0
    split_bytes: list[int] = field(default_factory=lambda: [0, 0])
    tokens: list[int] = field(default_factory=lambda: [0, 0])


def tokenize(
    inputs: Sequence[Path],
    out: Path,
    *,
    encoding: Encoding,
    policy: Policy = Policy(),
    train_vocab: int | None = None,
    layout: str = "llmc",
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    fast: bool = True,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Write the shards and manifest of `inputs` (files, or folders of text files) to the new folder `out`.

    The result is the same for any number of workers, and for work that was interrupted and called again. If `out` already
    holds just this, it is left as it is. With `train_vocab` a vocabulary of that many ids is trained on the training split
    and written beside the shards, in place of `encoding`. `layout` is `llmc`, or `nanogpt` for its train.bin and val.bin
    without a header. Without `fast` tiktoken encodes even where a faster one is installed.

    Raises UserError for unreadable, empty or binary input, text that is not UTF-8, too small a disk, and an `out` that
    holds other things.
    """
    if not 1 <= shard_tokens < 1 << 31:
        raise UserError(f"--shard-tokens must be at least 1 and below 2^31, but is {shard_tokens}")
    if layout not in ("llmc", "nanogpt"):
        raise UserError(f"--to is {layout!r}, but must be llmc or nanogpt")
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UserError(f"--workers must be 1 to {MOST_WORKERS}, but is {workers}")
    atomic.check_place(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} already exists and is a file, but shards go into a folder: give another one with --out")
    with prepare(inputs, out, encoding, policy, train_vocab, progress) as job:
        job.layout, job.shard_tokens, job.fast = layout, shard_tokens, fast
        return job.run(out, workers)


def cached(
    inputs: Sequence[Path],
    cache: Path,
    *,
    encoding: Encoding,
    policy: Policy,
    train_vocab: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """The folder under `cache` with the tokens of `inputs`, made when it is not there; named by what decides them."""
    if not (cache / "tokens").is_dir():
        try:
            atomic.check_place(cache / "tokens")
        except UserError as error:
            raise UserError(f"{error}. The tokens are kept there: name another folder by --cache-dir") from None
    with prepare(inputs, cache / "tokens" / "any", encoding, policy, train_vocab, progress) as job:
        folder = cache / "tokens" / job.key
        if not finished(folder, job.key):
            job.run(folder, replace=True)
    return folder


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt2cli"


def pieces(inputs: Sequence[Path], encoding: Encoding, policy: Policy) -> Iterator[Piece]:
    """The pieces of `inputs`, to look at them."""
    settle = partial(encode.settle, encoding=encoding)
    with documents.opened(inputs, policy.format, policy.field) as texts:
        for text in texts:
            chunks = documents.Surveyed(text, policy.errors)
            yield from cut_up(chunks, plain=policy.plain, inside=text.kind == "text", settle=settle)


def finished(out: Path, key: str) -> Manifest | None:
    """The manifest of a folder that holds just what `key` stands for, whole."""
    try:
        check(out)
        data = atomic.read_sealed(out / "manifest.json")
        tokens = data["train_tokens"], data["val_tokens"] if data["val_tokens"] > 1 else 0
        if data["key"] != key or count_tokens(out) != tokens:
            return None
        return Manifest(**data | {"sources": [Source(**s) for s in data["sources"]], "policy": Policy(**data["policy"])})
    except (UserError, TypeError, KeyError):
        return None


@contextlib.contextmanager
def prepare(
    inputs: Sequence[Path], out: Path, encoding: Encoding, policy: Policy, train_vocab: int | None, progress: Progress
) -> Iterator[Job]:
    if train_vocab is not None and not vocabulary.SMALLEST <= train_vocab <= vocabulary.LARGEST:
        raise UserError(f"--train-vocab must be {vocabulary.SMALLEST} to {vocabulary.LARGEST:,}, but is {train_vocab:,}")
    if encoding.n_vocab > 1 << 16:
        raise UserError(f"shards hold 16-bit ids, but the vocabulary has {encoding.n_vocab:,}")
    with documents.opened(inputs, policy.format, policy.field, out.absolute().parent) as texts:
        yield Job(texts, survey(texts, policy, progress), policy, encoding, train_vocab, progress)


@dataclass
class Job:
    """Texts that are to be tokenized."""

    texts: Sequence[Text]
    seen: Survey
    policy: Policy
    encoding: Encoding
    train_vocab: int | None
    progress: Progress
    layout: str = "llmc"
    shard_tokens: int = SHARD_TOKENS
    fast: bool = True

    @property
    def key(self) -> str:
        """sha256 of everything that decides the result."""
        fields = [(text.kind, text.field if text.kind != "text" else "") for text in self.texts]
        texts = [(source.sha256, *field) for source, field in zip(self.seen.sources, fields, strict=True)]
        split = choose_split(self.policy, self.seen), self.policy.val_fraction
        vocabulary = self.train_vocab or self.encoding.sha256
        shards = self.shard_tokens if self.layout == "llmc" else None
        decides = [texts, self.policy.plain, self.policy.errors, split, vocabulary, shards, __version__]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def run(self, out: Path, workers: int | None = None, *, replace: bool = False) -> Manifest:
        """Make `out`, going on where an interrupted run stopped; or find that it is there, perhaps made by another process
        meanwhile. Raises UserError where something else is there, unless that is to be replaced."""
        waiting = partial(self.progress, "waiting for another gpt2 process that makes the same", 0, 0)
        with atomic.workplace(out, waiting) as work:
            if done := finished(out, self.key):
                return done
            if out.exists() and not replace:
                what = (
                    "was made of another text or with other options"
                    if (out / "manifest.json").exists()
                    else "holds other things"
                )
                raise UserError(f"{out} already exists and {what}: give another folder with --out, or delete it")
            shutil.rmtree(out, ignore_errors=True)
            folder = work / "tokens"
            state = self._state_before(work, folder)
            if self.train_vocab:
                self.encoding = self._own_vocabulary(work, folder, self.train_vocab)
            elif self.encoding.sha256 != Encoding.gpt2().sha256:
                self.encoding.save(folder)
            sample = self.seen.sample if self.seen.size >= FAST_FROM else []
            chosen = encode.choose(self.encoding, self.policy.errors, sample, fast=self.fast)
            self._check_room(out, chosen.tokens / sum(map(len, sample)) if sample else 1.0, state)
            self._encode(state, work, folder, chosen.encoder, workers)
            manifest = self._manifest(state, folder, chosen.name)
            atomic.write_sealed(folder / "manifest.json", asdict(manifest))
            atomic.install(folder, out)
        return manifest

    def _encode(self, state: State, work: Path, folder: Path, encoder: Encoder, workers: int | None) -> None:
        headers = self.layout == "llmc"
        room = self.shard_tokens if headers else sys.maxsize
        writers = [
            ShardWriter(folder, split, room, headers=headers, tokens=state.tokens[n])
            for n, split in enumerate(("train", "val"))
        ]
        saved = time.monotonic()
        large = self.seen.size - state.bytes >= PARALLEL_FROM[encoder.fast]
        count = workers or (min(_cores(), DEFAULT_WORKERS[encoder.fast]) if large else 1)
        self.progress("tokenizing", state.bytes, self.seen.size)
        pieces = self._pieces(state, partial(encode.settle, encoding=self.encoding))
        try:
            for batch, ids in encode.encode_all(encode.batches(pieces), encoder, count):
                for piece, held_out in batch:
                    state.bytes += piece.bytes
                    state.split_bytes[held_out] += piece.bytes
                    state.documents += piece.starts and not piece.continues
                for n, writer in enumerate(writers):
                    writer.write(ids[n])
                    state.tokens[n] = writer.tokens
                self.progress("tokenizing", state.bytes, self.seen.size)
                if (place := batch[-1][0].after) and time.monotonic() - saved > SAVE_SECONDS:
                    state.place, saved = place, time.monotonic()
                    for writer in writers:
                        writer.flush()
                    atomic.write_sealed(work / "state.json", asdict(state))
        except UnicodeDecodeError:
            state.bytes = -1
        if state.bytes != self.seen.size:
            raise UserError("the text changed while it was read: run it again")
        for writer in writers:
            writer.close()
        if not state.tokens[0]:
            fraction = self.policy.val_fraction
            raise UserError(f"--val-fraction {fraction:g} leaves nothing of the text to train on: lower it (0.05 is usual)")

    def _pieces(self, state: State, settle: Settle | None = None) -> Iterator[tuple[Piece, bool]]:
        """What is left, each with whether it is held out."""

        def all_texts() -> Iterator[Piece]:
            for n, text in enumerate(self.texts):
                if n >= state.place.source:
                    start = state.place if n == state.place.source else Place(n)
                    chunks = documents.read(text, self.policy.errors, start.offset)
                    yield from cut_up(chunks, plain=self.policy.plain, inside=text.kind == "text", start=start, settle=settle)

        fraction = self.policy.val_fraction
        if choose_split(self.policy, self.seen) == "hashed":
            return ((piece, piece.key < fraction) for piece in all_texts())
        target = self.seen.size - int(self.seen.size * fraction) if fraction else sys.maxsize
        return split_tail(all_texts(), target, state.bytes, in_tail=state.tokens[1] > 0)

    def _state_before(self, work: Path, folder: Path) -> State:
        """That of an interrupted run of the same job; otherwise an empty folder and a new one."""
        try:
            state = State(**atomic.read_sealed(work / "state.json", required=True))
            state.place = Place(**state.place)  # type: ignore[arg-type]
            if state.key == self.key and folder.is_dir():
                return state
        except (UserError, TypeError):
            pass
        (work / "state.json").unlink(missing_ok=True)  # first: it says what the shards are
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return State(self.key)

    def _own_vocabulary(self, work: Path, folder: Path, n_vocab: int) -> Encoding:
        """The vocabulary trained on the training split (the 200 MB of it that are spread evenly), kept for work that is
        interrupted."""
        if (work / "state.json").is_file() and (known := Encoding.from_folder(folder)):
            return known
        step = max(1, self.seen.size // VOCABULARY_BYTES)

        def texts() -> Iterator[str]:
            size = 0
            self.progress("training the vocabulary", size, self.seen.size)
            for n, (piece, held_out) in enumerate(self._pieces(State(self.key))):
                size += piece.bytes
                self.progress("training the vocabulary", size, self.seen.size)
                if n % step == 0 and not held_out:
                    yield piece.data.decode("utf-8", self.policy.errors)

        encoding = vocabulary.train(texts(), n_vocab)
        encoding.save(folder)
        atomic.write_sealed(work / "state.json", asdict(State(self.key)))
        return encoding

    def _check_room(self, out: Path, tokens_per_byte: float, state: State) -> None:
        """Raises UserError where the disk is too small for the shards, as guessed from a sample."""
        need = int(1.05 * 2 * tokens_per_byte * self.seen.size) - 2 * sum(state.tokens)
        free = shutil.disk_usage(out.absolute().parent).free
        if need > free:
            raise UserError(
                f"the shards need about {size(need)}, but the disk of {out} has {size(free)} free: "
                "give another folder with --out, or free some space"
            )

    def _manifest(self, state: State, folder: Path, encoder: str) -> Manifest:
        return Manifest(
            format="llm.c uint16" if self.layout == "llmc" else "nanoGPT uint16",
            gpt2cli=__version__,
            key=self.key,
            sources=self.seen.sources,
            policy=self.policy,
            split=choose_split(self.policy, self.seen),
            tokenizer_sha256=self.encoding.sha256,
            vocab_size=self.encoding.n_vocab,
            encoder=encoder,
            train_tokens=state.tokens[0],
            val_tokens=state.tokens[1],
            train_bytes=state.split_bytes[0],
            val_bytes=state.split_bytes[1],
            documents=state.documents,
            files={path.name: atomic.sha256(path) for path in sorted(folder.iterdir())},
        )
