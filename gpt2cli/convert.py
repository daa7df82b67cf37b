"""Any GPT-2 -> any format that can express it, proven before it is called done."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from gpt2cli import __version__, atomic, prove
from gpt2cli.config import GPTConfig
from gpt2cli.errors import UserError
from gpt2cli.formats import gguf, hub, huggingface, llmc, nanogpt
from gpt2cli.formats.weights import DTYPES, TANH_GELU, Contents
from gpt2cli.identify import Found, cropped, find, read_folder

# ==== the formats that are written ====


@dataclass(frozen=True)
class Format:
    """`express` says what becomes of a config in this format, with a sentence for each change, or raises UserError for what
    has no place in it; `write` (path, contents, dtype) returns more such sentences; `program` (path, ids, dtype) is how another
    program computes it, or None, for the reason `no_program`."""

    title: str
    name: str  # of what is written where no --out is given
    dtypes: tuple[str, ...]
    express: Callable[[GPTConfig], tuple[GPTConfig, list[str]]]
    write: Callable[[Path, Contents, str], list[str]]
    read: Callable[[Path], Contents]
    program: Callable[[Path, Tensor, str], prove.Logits | None] = lambda path, ids, dtype: None
    no_program: str = "it is no library that could be asked"


def _write_huggingface(folder: Path, contents: Contents, dtype: str) -> list[str]:
    huggingface.write(folder, contents.config, contents.weights, contents.encoding, DTYPES[dtype])
    if contents.folder:
        huggingface.carry_over(contents.folder, folder)
    return []


FORMATS = {
    "hf": Format(
        title="HuggingFace folder",
        name="{}-hf",
        dtypes=("fp32", "fp16", "bf16"),
        express=lambda config: (config, []),
        write=_write_huggingface,
        read=read_folder,
        program=prove.transformers_logits,
    ),
    "nanogpt": Format(
        title="nanoGPT checkpoint",
        name="{}-nanogpt/ckpt.pt",
        dtypes=("fp32",),
        express=nanogpt.express,
        write=nanogpt.write,
        read=nanogpt.read,
    ),
    "llmc": Format(
        title="llm.c model",
        name="{}.bin",
        dtypes=("fp32", "bf16"),
        express=llmc.express,
        write=llmc.write,
        read=llmc.read,
    ),
    "gguf": Format(
        title="GGUF",
        name="{}.gguf",
        dtypes=("fp32", "fp16", "bf16", "q8_0"),
        express=gguf.express,
        write=gguf.write,
        read=gguf.read_back,
        program=prove.llama_logits,
        no_program="llama-cpp-python is not installed",
    ),
}


# ==== writing ====


@dataclass(frozen=True)
class Conversion:
    """What was written, and how it was proven."""

    source: str
    source_format: str
    out: str
    format: str
    parameters: int
    dtype: str
    tensors: int
    weights_error: float  # largest difference of a weight after reading back; 0: all are equal bit for bit
    changes: list[str]  # what is not as it was, in words
    sample: str  # what the losses are measured on
    loss_before: float | None  # nats a token; None where neither weights nor config changed
    loss_after: float
    program: str | None  # which other program's logits were compared
    logits_error: float | None  # largest difference from them
    not_compared: str | None  # why no logits were
    bytes: int
    files: dict[str, str]  # name -> sha256


def convert(
    source: str,
    out: str | Path | None = None,
    *,
    to: str = "hf",
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    force: bool = False,
    progress: hub.Progress | None = None,
    tell: Callable[[str], None] = lambda stage: None,
) -> Conversion:
    """Write `source` (anything `find` reads) as format `to`, in `dtype` or else its own where the format has that. Every
    tensor is read back and compared, and the logits with another program's, before `out` appears; `tell` hears the stages.
    Raises UserError where the source cannot be read or expressed, `out` is there already (unless `force`), or a proof fails.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to} is unknown; expected {', '.join(FORMATS)}")
    target = FORMATS[to]
    if dtype and dtype not in target.dtypes:
        raise UserError(f"--dtype {dtype} has no place in a {target.title}; expected {', '.join(target.dtypes)}")
    out = Path(out) if out else _default_out(source, target)
    tokenizer = Path(tokenizer) if tokenizer else None
    _check_out(out, to, force)
    tell(f"reading {source}")
    with atomic.new_folder(out.resolve(), replace=True) if to == "hf" else atomic.new_file(out.resolve()) as place:
        result = _write(partial(find, source, tokenizer, progress), target, place, out, dtype, tell)
        _check_out(out, to, force)  # others may have written since
    return result


def _default_out(source: str, target: Format) -> Path:
    path = Path(source)
    if not path.exists() and target is FORMATS["hf"]:
        return Path(path.name)  # a hub name
    stem = path.resolve().parent.name if path.name in ("ckpt.pt", "model.bin") else path.resolve().name
    return Path(target.name.format(stem.removesuffix(".pt").removesuffix(".bin")))


def _check_out(out: Path, to: str, force: bool) -> None:
    """Raises UserError where something is in the way that is not to be replaced."""
    atomic.check_place(out)
    if to != "hf" and out.is_dir():
        inside = out / Path(FORMATS[to].name).name.format(out.resolve().name)
        raise UserError(f"{out} is a folder, but a {FORMATS[to].title} is one file: give --out {inside}")
    if out.exists() and not out.is_file() and not out.is_dir():
        raise UserError(f"{out} is neither a file nor a folder: give another --out")
    if out.resolve() == Path.cwd() or os.path.ismount(out):
        raise UserError(f"{out} cannot be replaced as a whole: give --out the name of a new folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if to == "hf" and out.is_file():
        raise UserError(f"{out} is a file, but a {FORMATS[to].title} is a folder: give another --out")
    if not force:
        raise UserError(f"{out} already exists: give another --out, or --force to replace it")
    if to == "hf" and not huggingface.is_only_a_model(out):
        raise UserError(f"{out} is not a model folder, or holds more, so --force does not replace it: give another --out")


def _write(
    find: Callable[[], Found], target: Format, place: Path, out: Path, dtype: str | None, tell: Callable[[str], None]
) -> Conversion:
    """Write to `place`, which will be `out`, and prove it. Never holds more than one model in memory."""
    found = find()
    there, here = found.path.resolve(), out.resolve()
    if there.is_relative_to(here) or (here.is_relative_to(there) and here.exists()):
        raise UserError(f"{out} is the source itself, holds it or is in it: give another --out")
    contents = cropped(found)
    config, changes = target.express(contents.config)
    contents = replace(contents, config=config)
    name = found.name
    kinds = prove.check_finite(contents.weights, name)
    dtype = dtype or next((kind for kind in target.dtypes if kinds == {DTYPES.get(kind)}), "fp32")  # which holds all others
    tell(f"writing {out} ({target.title}, {dtype})")
    changes = [*contents.notes, *changes, *target.write(place, contents, dtype)]
    tell("reading it back")
    back = target.read(place)
    if _function(back.config) != _function(config):
        raise UserError("the proof failed: the config reads back differently; nothing was written")
    error = prove.largest_difference(contents.weights, back.weights, dtype)
    tensors, source_format = len(contents.weights), found.format
    origin = {"source": Path(name).name} | {key: value for key, value in contents.facts.items() if key == "step"}
    ids, before = prove.sample_ids(contents.encoding, config), None
    if error or _function(config) != _function(found.contents.config):
        tell("measuring the loss of the source")
        before = prove.forward(found.contents.config, found.contents.weights, ids)[0]
    sample = f"{ids[:, 1:].numel():,} {'tokens of Shakespeare' if contents.encoding else 'random ids'}"
    del found, contents, back  # whose files may be mapped
    tell("measuring the loss of what was written")
    after, logits = prove.forward(config, target.read(place).weights, ids)
    other = target.program(place, prove.beginning(ids), dtype)
    if place.is_dir():
        atomic.seal(place, {"gpt2cli": __version__} | origin)
    paths = {path.name: path for path in sorted(place.iterdir())} if place.is_dir() else {out.name: place}
    return Conversion(
        source=name,
        source_format=source_format,
        out=str(out),
        format=target.title,
        parameters=config.num_parameters(),
        dtype=dtype,
        tensors=tensors,
        weights_error=error,
        changes=changes,
        sample=sample,
        loss_before=before,
        loss_after=after,
        program=other[0] if other else None,
        logits_error=prove.check_logits(logits, *other) if other else None,
        not_compared=None if other else target.no_program,
        bytes=sum(path.stat().st_size for path in paths.values()),
        files={name: atomic.sha256(path) for name, path in paths.items()},
    )


def _function(config: GPTConfig) -> GPTConfig:
    """A config without what only training sees."""
    function = "gelu_new" if config.activation_function in TANH_GELU else config.activation_function
    return replace(config, dropout=0.0, attn_dropout=0.0, activation_function=function, n_inner=config.inner_size)
