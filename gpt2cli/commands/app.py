"""The `gpt2` program: its commands, and how errors and interrupts end it."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TextIO

import typer

from gpt2cli import __version__
from gpt2cli.atomic import is_full
from gpt2cli.commands import bench, convert, sample, stop, tokenize, train
from gpt2cli.errors import Told, UserError

app = typer.Typer(
    name="gpt2",
    help="One command from a text file to a trained GPT-2 that every other tool can load.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tokenize")(tokenize.command)
app.command("train")(train.command)
app.command("sample")(sample.command)
app.command("convert")(convert.command)
app.add_typer(bench.app, name="bench")


def show_version(asked: bool) -> None:
    if asked:
        print(f"gpt2 {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status: 0 done, 1 a mistake the user can mend, 2 wrong usage, 130 Ctrl-C."""
    try:
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        if any(not word and not before.startswith("-") for before, word in pairwise(arguments)):
            raise UserError("an argument is empty: a shell variable that is not set?")
        app(args=arguments, prog_name="gpt2", obj=arguments)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the reader of our output has gone, as in `gpt2 sample | head`
            return 0
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:  # that came outside of a command
        return 130
    except Told:
        return 1
    except UserError as error:
        return complain(str(error))
    except RuntimeError as error:
        from gpt2cli import device

        if not device.is_out_of_memory(error):
            raise
        return complain("out of memory: try fewer or shorter rows at a time, or a smaller model")
    except OSError as error:
        if is_full(error):
            return complain(f"the disk is full ({error}): free some space and run it again; what was there before is whole")
        return complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    return 0


def complain(message: str) -> int:
    from gpt2cli.commands import console

    console.error(message)
    return 1


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours is for people, one of a library for its makers."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        from gpt2cli.commands import console

        console.note(f"note: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def main() -> None:
    for stream in (sys.stdout, sys.stderr):  # a terminal or file of another encoding shows ? instead of a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.showwarning = show_warning
    status = run()
    stop.listen_no_more()
    sys.exit(status)
