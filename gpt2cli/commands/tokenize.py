"""`gpt2 tokenize`: text -> token shards and a manifest; and looking at tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.commands import show as looking
from gpt2cli.commands.settings import source_of
from gpt2cli.commands.stop import listen
from gpt2cli.config import CHOICES, TrainConfig
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.corpus import Manifest
    from gpt2cli.tokenizer import Encoding

DATA, VOCABULARY, MACHINE, LOOKING = "Data", "Vocabulary", "Machine", "Looking, without writing shards"
DEFAULT = TrainConfig()
# Options that do nothing there.
NOT_SHOWN = ("out", "to", "val_fraction", "split", "shard_tokens", "train_vocab", "workers", "as_json")
NOT_DECODED = (*NOT_SHOWN, "format", "field", "plain", "errors", "show")


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Files of text, .jsonl or .parquet, each also .gz; folders of them; - for stdin.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the shards; by default the first INPUT's name with -tokens.")
    ] = None,
    to: Annotated[str, option(DATA, "llm.c's shards, or nanoGPT's train.bin and val.bin.", metavar="llmc|nanogpt")] = "llmc",
    val_fraction: Annotated[float, option(DATA, "Part of the text held out for validation.")] = DEFAULT.val_fraction,
    split: Annotated[
        str,
        option(DATA, "Held out: hashed documents, or the tail; auto: what suits.", metavar="|".join(CHOICES["split"])),
    ] = DEFAULT.split,
    format: Annotated[
        str, option(DATA, "Of the INPUTs; auto: by their names.", metavar="|".join(CHOICES["format"]))
    ] = DEFAULT.format,
    field: Annotated[str, option(DATA, "Of a JSON or parquet record, where the text is.")] = DEFAULT.field,
    plain: Annotated[bool, option(DATA, "Encode a literal <|endoftext|> as text, not as a border.", "--plain")] = DEFAULT.plain,
    errors: Annotated[
        str, option(DATA, "Bytes that are not UTF-8: stop, or put U+FFFD.", metavar="|".join(CHOICES["errors"]))
    ] = DEFAULT.errors,
    shard_tokens: Annotated[int, option(DATA, "Tokens of a full shard.")] = 100_000_000,
    train_vocab: Annotated[
        int | None,
        option(VOCABULARY, "Train a vocabulary of so many ids on the text, in place of GPT-2's.", show_default="none"),
    ] = None,
    tokenizer: Annotated[
        Path | None, option(VOCABULARY, "Use that of a run, a model or a tokens folder.", show_default="GPT-2's")
    ] = None,
    show: Annotated[bool, option(LOOKING, "Print the text token by token, with the ids.", "--show")] = False,
    decode: Annotated[
        bool, option(LOOKING, "INPUT is ids, - for ids on stdin, or a token shard: print their text.", "--decode")
    ] = False,
    tokens_range: Annotated[
        str | None, option(LOOKING, "Of the shard to decode.", "--range", metavar="START:END", show_default="all")
    ] = None,
    workers: Annotated[int | None, option(MACHINE, "Processes; by default what pays.", show_default="auto")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout.")] = False,
) -> None:
    """Turn text into token shards (llm.c's .bin) and a manifest.

    A literal <|endoftext|> separates documents. The ids are tiktoken's, whatever the number of workers. Interrupted work
    goes on with the same command. Prints the folder's path.
    """
    from gpt2cli import corpus
    from gpt2cli.survey import Policy

    listen()
    check_options(context)
    encoding = find_encoding(tokenizer)
    policy = Policy(val_fraction, plain, errors, split, format, field)
    paths = [Path(path) for path in inputs]
    if decode:
        return looking.decode(inputs, tokens_range, encoding if tokenizer else None)
    if show:
        return looking.show(corpus.pieces(paths, encoding, policy), encoding, errors)
    out = out or folder_for(inputs[0])
    how = {"encoding": encoding, "policy": policy, "train_vocab": train_vocab, "layout": to}
    manifest = write_shards(paths, out, **how, workers=workers, shard_tokens=shard_tokens)
    tell(manifest, out, as_json)


def check_options(context: typer.Context) -> None:
    """Raises UserError for options that do not go together."""
    given = context.params
    if given["tokens_range"] is not None and not given["decode"]:
        raise UserError("--range is for --decode")
    mode, idle = ("--decode", NOT_DECODED) if given["decode"] else ("--show", NOT_SHOWN if given["show"] else ())
    written = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    found = [written[name] for name in idle if source_of(context, name) == "COMMANDLINE"]
    if found:
        does, them = ("does", "it") if len(found) == 1 else ("do", "them")
        raise UserError(f"{', '.join(found)} {does} nothing with {mode}, which writes no shards: leave {them} or {mode} out")
    if given["to"] == "nanogpt" and source_of(context, "shard_tokens") == "COMMANDLINE":
        raise UserError("--shard-tokens is for shards: nanoGPT's train.bin is one file")
    if given["train_vocab"] and given["tokenizer"]:
        raise UserError("--train-vocab and --tokenizer both say what the vocabulary is: give one of them")


def tell(manifest: Manifest, out: Path, as_json: bool) -> None:
    from gpt2cli.commands import console

    console.note(
        f"{manifest.documents:,} documents, {manifest.train_tokens:,} training and {manifest.val_tokens:,} validation tokens "
        f"({manifest.split}), made with {manifest.encoder}"
    )
    if as_json:
        console.print_json(asdict(manifest) | {"out": str(out)})
    else:
        print(out)


def folder_for(first: str) -> Path:
    """Where the shards go by default: the name of the first input, with -tokens."""
    name = "stdin" if first == "-" else Path(first).resolve().name.split(".")[0] or "text"
    return Path(f"{name}-tokens")


def write_shards(paths: Sequence[Path], out: Path, **how: Any) -> Manifest:
    """`corpus.tokenize`, with its progress shown; where it is interrupted it is said what becomes of the work."""
    from gpt2cli import corpus
    from gpt2cli.commands import console

    try:
        with console.Bars() as bars:
            return corpus.tokenize(paths, out, **how, progress=bars.tokenized)
    except (KeyboardInterrupt, SystemExit):
        kept = out.with_name(f".{out.name}.partial")
        done = f": the same command goes on where this one stopped; what is done is in {kept}" if kept.exists() else ""
        console.note(f"interrupted{done}")
        raise


def find_encoding(path: Path | None) -> Encoding:
    from gpt2cli.tokenizer import Encoding

    if path is None:
        return Encoding.gpt2()
    found = Encoding.from_folder(path)
    if found is None:
        raise UserError(f"{path} holds no tokenizer.json; expected a run, a model, or a tokens folder that has its own")
    return found
