"""What a model file or folder is: which format, of what shape, with which tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt2cli import atomic, checkpoint
from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, hub, huggingface, llmc, nanogpt, openai
from gpt2cli.formats.weights import Contents, Weights
from gpt2cli.shards import MAGIC
from gpt2cli.tokenizer import AnotherKind, Encoding

PADDING = 128  # rows: nobody pads a vocabulary by more for speed


@dataclass(frozen=True)
class Found:
    """What a SOURCE turned out to be."""

    name: str  # for people: as given, or a run's checkpoint
    format: str
    path: Path
    contents: Contents


def find(source: str, tokenizer: Path | None = None, progress: hub.Progress | None = None) -> Found:
    """The model in `source`: a run, a checkpoint, a file or folder of any format we read, or a hub name. `tokenizer` is a
    folder or tokenizer.json with the one it should have. Raises UserError for anything else, saying what it is."""
    path = Path(source)
    formats: tuple[tuple[Callable[[Path], bool], Callable[[Path], Contents]], ...] = (
        (openai.is_mine, openai.read),
        (llmc.is_mine, llmc.read),
        (nanogpt.is_mine, nanogpt.read),
    )
    if path.exists() and not (path / "config.json").is_file() and not (path / "run.json").is_file():
        read = None if _is_part(path) else next((read for is_mine, read in formats if is_mine(path)), None)
        if read:
            contents = read(path)
            return _with_tokenizer(Found(source, contents.facts["format"], path, contents), tokenizer)
        raise UserError(f"{source} is {_what_is(path)}")
    folder = checkpoint.find_model(source, progress)
    title = "checkpoint of gpt2" if (folder / "training.json").is_file() else "HuggingFace folder"
    name = str(folder) if path.exists() else source
    return _with_tokenizer(Found(name, title, folder, read_folder(folder)), tokenizer)


def read_folder(folder: Path) -> Contents:
    """A HuggingFace folder with its tokenizer; one of another kind is left to HuggingFace's own code."""
    config, state = huggingface.read(folder)
    atomic.check_seal(folder, names=set(huggingface.TOKENIZER))
    try:
        encoding, another = Encoding.from_folder(folder), None
    except AnotherKind as error:
        encoding, another = None, str(error)
    return Contents(config, state, encoding, facts=_provenance(folder), folder=folder, another_tokenizer=another)


def _provenance(folder: Path) -> dict[str, Any]:
    """Where a HuggingFace folder says it comes from; only ours say anything."""
    facts: dict[str, Any] = {}
    if (folder / atomic.SEAL).is_file():
        seal = atomic.read_json(folder / atomic.SEAL)
        facts["written by"] = f"gpt2 {seal.get('gpt2cli')}"
        facts |= {name: seal[key] for key, name in (("step", "step"), ("source", "converted from")) if key in seal}
        loss = checkpoint.evaluation(folder).get("val_loss")
        facts |= {"validation loss": loss} if isinstance(loss, float) else {}
    return facts


def _what_is(path: Path) -> str:
    expected = "expected a run, a HuggingFace folder, a nanoGPT or build-nanogpt .pt, an llm.c .bin, or OpenAI's folder"
    if path.is_dir() and (path / "ckpt.pt").is_file():
        return f"a folder of nanoGPT: give its {path / 'ckpt.pt'}"
    if not path.is_file():
        return f"{'a folder' if path.is_dir() else 'something'} without a model: {expected}"
    if _is_part(path):
        return f"a part of a HuggingFace folder: give the folder, {path.parent}"
    if gguf.is_mine(path):
        return "a GGUF file, which is only written: give the model it was made from"
    with path.open("rb") as file:
        magic = file.read(4)
    return "a shard of tokens, not a model" if magic == MAGIC.to_bytes(4, "little") else f"no model: {expected}"


def _is_part(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".index.json") or path.name.startswith("pytorch_model")


def _with_tokenizer(found: Found, tokenizer: Path | None) -> Found:
    """With the tokenizer that was given, else its own, else GPT-2's where that fits."""
    contents = found.contents
    encoding = Encoding.from_folder(tokenizer) if tokenizer else contents.encoding
    if tokenizer and not encoding:
        raise UserError(f"{tokenizer} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    if (
        encoding is None
        and not contents.another_tokenizer
        and 0 <= contents.config.vocab_size - Encoding.gpt2().n_vocab < PADDING
    ):
        encoding = Encoding.gpt2()
    if encoding and encoding.n_vocab > contents.config.vocab_size:
        raise UserError(
            f"{tokenizer or found.path}: its tokenizer has {encoding.n_vocab:,} ids, "
            f"but the model knows {contents.config.vocab_size:,}"
        )
    another, notes = None if encoding else contents.another_tokenizer, contents.notes
    if another:
        notes = [*notes, f"the tokenizer goes along in HuggingFace folders alone: {another}"]
    elif not encoding:
        notes = [*notes, f"no tokenizer is known for its {contents.config.vocab_size:,} ids: --tokenizer gives it one"]
    folder = None if tokenizer else contents.folder  # whose special ids are those of its own tokenizer
    contents = replace(contents, encoding=encoding, another_tokenizer=another, notes=notes, folder=folder)
    return replace(found, contents=contents)


def cropped(found: Found) -> Contents:
    """The contents without the rows by which a trainer padded the vocabulary for speed, beyond the tokenizer's ids."""
    contents = found.contents
    n = contents.encoding.n_vocab if contents.encoding else contents.config.vocab_size
    extra = contents.config.vocab_size - n
    if found.format not in nanogpt.PROGRAMS or not 0 < extra < PADDING:
        return contents

    def crop(name: str) -> Tensor:
        return contents.weights[name][:n] if name == "wte.weight" else contents.weights[name]

    state = Weights({name: partial(crop, name) for name in contents.weights})
    note = f"{extra} rows that pad the vocabulary beyond the tokenizer's {n:,} ids are left out"
    return replace(contents, config=replace(contents.config, vocab_size=n), weights=state, notes=[*contents.notes, note])


def describe(source: str, tokenizer: Path | None = None, progress: hub.Progress | None = None) -> dict[str, Any]:
    """What `source` is, for `--info`: format, shape, parameters, dtype, tokenizer, and where it comes from."""
    found = find(source, tokenizer, progress)
    config, contents = found.contents.config, found.contents
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in contents.weights.values()})
    own = contents.encoding is not None and contents.encoding.sha256 != Encoding.gpt2().sha256
    tokenizer_of = f"{'its own' if own else 'GPT-2'}, {contents.encoding.n_vocab:,} ids" if contents.encoding else None
    files = [path for path in found.path.iterdir() if path.is_file()] if found.path.is_dir() else [found.path]
    return {
        "source": found.name,
        "format": found.format,
        "parameters": config.num_parameters(),
        "config": asdict(config),
        "dtype": ", ".join(kinds),
        "tokenizer": "another kind, which only HuggingFace's own code reads" if contents.another_tokenizer else tokenizer_of,
        "bytes": sum(path.stat().st_size for path in files),
        "notes": contents.notes,
        "facts": {key: value for key, value in contents.facts.items() if key != "format"},
    }
