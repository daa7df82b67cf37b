"""`gpt2 convert`: a model from the hub, a folder or a run -> a checked HuggingFace folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gpt2cli.errors import UserError, size


def command(
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="A run, a checkpoint, or a HuggingFace folder.")
    ] = None,
    from_hf: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead of SOURCE: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name, or a folder."
        ),
    ] = None,
    to: Annotated[str, typer.Option(metavar="hf", help="Format to write.")] = "hf",
    out: Annotated[Path | None, typer.Option(help="New folder; by default the model's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON on stdout.")] = False,
) -> None:
    """Fetch or convert a model, and prove the result.

    The written weights are read back and compared bit for bit, and the logits with transformers' own. Prints the folder.
    """
    if (source is None) == (from_hf is None):
        raise UserError("give either SOURCE or --from-hf NAME, such as: gpt2 convert --from-hf gpt2-large")
    if to != "hf":
        raise UserError(f"--to {to} is unknown; expected hf")
    name = source or from_hf or ""
    if out is None:
        out = Path(Path(name.rstrip("/")).name + ("-hf" if Path(name).exists() else ""))

    from gpt2cli.commands import console
    from gpt2cli.convert import convert

    with console.Bars() as bars:
        result = convert(name, out, force=force, progress=bars.downloaded)
    console.note(
        f"{result.parameters:,} parameters, {result.dtype}, {size(result.bytes)}; {result.tensors} tensors equal bit "
        f"for bit after reading back; logits within {result.logits_error:.1e} of transformers'"
    )
    console.note(f"model.safetensors sha256 {result.files['model.safetensors']}")
    if as_json:
        console.print_json(asdict(result))
    else:
        print(out)
