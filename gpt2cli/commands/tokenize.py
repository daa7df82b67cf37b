"""`gpt2 tokenize`: text -> token shards and a manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

DATA, MACHINE = "Data", "Machine"


def command(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="INPUT...", help="Text files (also .gz), or folders of them.", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option(help="New folder for the shards; by default the first INPUT's name with -tokens.")
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(help="Part of the text, at its end, held out for validation.", rich_help_panel=DATA)
    ] = 0.05,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="Encode a literal <|endoftext|> as text, not as a border.", rich_help_panel=DATA),
    ] = False,
    errors: Annotated[
        str,
        typer.Option(metavar="strict|replace", help="Bytes that are not UTF-8: stop, or put U+FFFD.", rich_help_panel=DATA),
    ] = "strict",
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a full shard.", rich_help_panel=DATA)] = 100_000_000,
    workers: Annotated[
        int | None, typer.Option(help="Processes; by default one a core for large texts.", rich_help_panel=MACHINE)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout.")] = False,
) -> None:
    """Turn text into token shards (llm.c's .bin) and a manifest.

    A literal <|endoftext|> separates documents. The ids are tiktoken's for GPT-2, whatever the number of workers. Prints
    the folder's path.
    """
    from gpt2cli import corpus
    from gpt2cli.commands import console
    from gpt2cli.tokenizer import Encoding

    if out is None:
        first = inputs[0].resolve()
        out = Path(f"{first.name.split('.')[0] or 'text'}-tokens")
    with console.Bars() as bars:
        manifest = corpus.tokenize(
            inputs,
            out,
            encoding=Encoding.gpt2(),
            policy=corpus.Policy(val_fraction, plain, errors),
            workers=workers,
            shard_tokens=shard_tokens,
            progress=bars.tokenized,
        )
    console.note(
        f"{manifest.documents:,} documents, {manifest.train_tokens:,} training and {manifest.val_tokens:,} validation tokens"
    )
    if as_json:
        console.print_json(asdict(manifest) | {"out": str(out)})
    else:
        print(out)
