"""`gpt2 tokenize`: text -> token shards and a manifest; and looking at tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gpt2cli.config import CHOICES, TrainConfig

DATA, VOCABULARY, MACHINE, LOOKING = "Data", "Vocabulary", "Machine", "Looking, without writing shards"
DEFAULT = TrainConfig()


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def command(
    inputs: Annotated[
        list[Path],
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
    workers: Annotated[int | None, option(MACHINE, "Processes; by default what pays.", show_default="auto")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout.")] = False,
) -> None:
    """Turn text into token shards (llm.c's .bin) and a manifest.

    A literal <|endoftext|> separates documents. The ids are tiktoken's, whatever the number of workers. Interrupted work
    goes on with the same command. Prints the folder's path.
    """
    from gpt2cli import corpus
    from gpt2cli.commands import console
    from gpt2cli.survey import Policy
    from gpt2cli.tokenizer import Encoding

    if out is None:
        first = inputs[0].resolve()
        out = Path(f"{first.name.split('.')[0] or 'text'}-tokens")
    with console.Bars() as bars:
        manifest = corpus.tokenize(
            inputs,
            out,
            encoding=Encoding.gpt2(),
            policy=Policy(val_fraction, plain, errors, split, format, field),
            layout=to,
            workers=workers,
            shard_tokens=shard_tokens,
            progress=bars.tokenized,
        )
    console.note(
        f"{manifest.documents:,} documents, {manifest.train_tokens:,} training and {manifest.val_tokens:,} validation tokens "
        f"({manifest.split}), made with {manifest.encoder}"
    )
    if as_json:
        console.print_json(asdict(manifest) | {"out": str(out)})
    else:
        print(out)
