"""What a run reads: one source, or a mixture of them by weight, found, tokenized where it is text, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2cli import atomic, corpus, documents
from gpt2cli.config import TrainConfig
from gpt2cli.data import BLOCK, check_length, share_out
from gpt2cli.errors import UserError
from gpt2cli.shards import HEAD_BYTES, SUFFIXES, Tokens, check, count_tokens, find_shards, fingerprint, is_text, open_shard
from gpt2cli.survey import Policy, Progress
from gpt2cli.tokenizer import Encoding

Given = str | Path | Mapping[str, float]  # a text, a folder of texts or of token shards; or a weight for each of several


@dataclass(frozen=True)
class Source:
    """A folder of token shards and its part in the run."""

    given: str  # by the user
    tokens: Path
    rows: int  # of the BLOCK rows of a block: its share
    weight: float  # as given
    sha256: str
    train_tokens: int
    val_tokens: int

    @property
    def share(self) -> float:
        return self.rows / BLOCK


def find_sources(
    data: Given | None, train: TrainConfig, encoding: Encoding, cache: Path | None, on_tokenize: Progress
) -> tuple[Source, ...]:
    """The sources of `data` (None is the embedded Shakespeare), tokenized into the cache where they are text. Their order,
    on which that of the training depends, is not that in which they were given: the largest weight comes first.

    Raises UserError for data that cannot be read, and for weights that cannot be dealt out.
    """
    given = {str(path): weight for path, weight in weights_of(data).items()}
    if train.train_vocab and len(given) > 1:
        raise UserError(
            "--train-vocab trains on one source: for a mixture make it first (gpt2 tokenize A B --train-vocab N --out both), "
            "and tokenize each with it (gpt2 tokenize A --tokenizer both)"
        )
    share_out(list(given), list(given.values()))  # before anything long
    for path in given:
        documents.check_there(Path(path))
    return make_sources(given, {path: _find_tokens(Path(path), train, encoding, cache, on_tokenize) for path in given})


def make_sources(given: Mapping[str, float], folders: Mapping[str, Path]) -> tuple[Source, ...]:
    """The sources whose tokens are in these folders."""
    hashes = {path: fingerprint(folders[path]) for path in given}
    names = sorted(given, key=lambda path: (-given[path], hashes[path]))
    shares = share_out(names, [given[path] for path in names])
    return tuple(
        Source(path, folders[path], rows, given[path], hashes[path], *count_tokens(folders[path]))
        for path, rows in zip(names, shares, strict=True)
    )


def find_vocabulary(folders: Sequence[Path]) -> Encoding | None:
    """The vocabulary that a folder of token shards brings, the first of several."""
    return next(filter(None, (Encoding.from_folder(folder) for folder in folders if folder.is_dir())), None)


def weights_of(data: Given | None) -> Mapping[str, float]:
    return data if isinstance(data, Mapping) else {str(documents.EMBEDDED if data is None else data): 1.0}


def data_sha256(sources: Sequence[Source]) -> str:
    """Of all that decides the order of tokens that a seed trains on, but for the seed."""
    if len(sources) == 1:
        return sources[0].sha256
    return hashlib.sha256("".join(f"{source.rows} {source.sha256}\n" for source in sources).encode()).hexdigest()


def open_train(sources: Sequence[Source], vocab_size: int) -> Tokens | dict[str | Path | Tokens, float]:
    """What a DataLoaderLite trains on."""
    opened = [Tokens.open(source.tokens, "train", vocab_size) for source in sources]
    return dict(zip(opened, (source.rows for source in sources), strict=True)) if len(opened) > 1 else opened[0]


def open_val(sources: Sequence[Source], vocab_size: int) -> Tokens | None:
    """The validation splits of all sources, one after the other; None where there is none."""
    opened = [Tokens.open(source.tokens, "val") for source in sources if source.val_tokens]
    return Tokens.join(opened, vocab_size) if opened else None


def check_sources(sources: Sequence[Source], T: int, vocab_size: int, encoding: Encoding) -> None:
    """Raises UserError for shards of another tokenizer, or, where they do not tell, with ids the model does not know; and
    for a source of a mixture that is shorter than a row."""
    for source in sources:
        if len(sources) > 1:
            check_length(source.given, source.train_tokens, B=1, T=T, mixed=True)
        if not _is_made_with(encoding, source.tokens):
            for split in ("train", "val"):
                if find_shards(source.tokens, split):
                    Tokens.open(source.tokens, split, vocab_size).check()


def _is_made_with(encoding: Encoding, folder: Path) -> bool:
    if not (folder / "manifest.json").is_file():
        return False
    made_with = atomic.read_sealed(folder / "manifest.json").get("tokenizer_sha256")
    if made_with and made_with != encoding.sha256:
        raise UserError(
            f"{folder} was tokenized with another vocabulary than the model's: use 'gpt2 tokenize --tokenizer MODEL'"
        )
    return bool(made_with)


def _find_tokens(path: Path, train: TrainConfig, encoding: Encoding, cache: Path | None, on_tokenize: Progress) -> Path:
    """The folder of shards of one source."""
    if (path / "run.json").is_file():
        raise UserError(f"{path} is a run, not a text: go on with it by gpt2 train --resume --out {path}")
    if path.is_dir():
        if find_shards(path, "train") or find_shards(path, "val") or (path / "manifest.json").is_file():
            if train.train_vocab:
                raise UserError(f"--train-vocab: {path} is tokenized already; give the text")
            check(path)
            return path.resolve()
        files = [file for file in path.iterdir() if not file.name.startswith(".")]
        if not files:
            raise UserError(f"{path} holds no text and no shards, it is empty: expected text files, or train*.bin and val*.bin")
        if all(file.suffix in SUFFIXES for file in files):
            raise UserError(f"{path} holds {files[0].name}, but no train*.bin or train*.npy: put train or val into the names")
    elif path.suffix in SUFFIXES and path.is_file() and not _starts_as_text(path):
        open_shard(path)
        if find_shards(path.parent, "train"):
            raise UserError(f"{path} is one token shard; give its folder: {path.parent}")
        raise UserError(
            f"{path} is one token shard; expected a folder of them: put it into one as train{path.suffix}, with "
            f"val{path.suffix} beside it if you have one, and give the folder"
        )
    policy = Policy(train.val_fraction, train.plain, train.errors, train.split, train.format, train.field)
    return corpus.cached(
        [path],
        cache or corpus.default_cache(),
        encoding=encoding,
        policy=policy,
        train_vocab=train.train_vocab,
        progress=on_tokenize,
    )


def _starts_as_text(path: Path) -> bool:
    with path.open("rb") as file:
        return is_text(file.read(HEAD_BYTES))


# ==== in run.json ====


def to_json(sources: Sequence[Source]) -> dict[str, Any]:
    """Paths begin at `~`, and a mixture is what a settings file has as `data`: {path: weight}."""
    tokens = {atomic.to_home(source.given): atomic.to_home(source.tokens) for source in sources}
    if len(sources) == 1:
        ((path, folder),) = tokens.items()
        return {"given": path, "sha256": data_sha256(sources), "tokens": folder}
    weights = {atomic.to_home(source.given): source.weight for source in sources}
    return {"given": weights, "sha256": data_sha256(sources), "tokens": tokens}


@dataclass(frozen=True)
class Record:
    """What `to_json` wrote."""

    given: Mapping[str, float]
    sha256: str
    tokens: Mapping[str, Path]  # folders, by what was given

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Record:
        """Raises KeyError, TypeError, ValueError or AttributeError where it is not one of ours."""
        given, tokens = data["given"], data["tokens"]
        if not isinstance(given, dict):
            given, tokens = {given: 1.0}, {given: tokens}
        names = {path: str(atomic.from_home(path)) for path in given}
        weights = {name: float(given[path]) for path, name in names.items()}
        return cls(weights, data["sha256"], {name: atomic.from_home(tokens[path]) for path, name in names.items()})
