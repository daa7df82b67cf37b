"""`gpt2 convert`: any GPT-2 -> any format, proven; or what a file is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2cli.commands.stop import listen
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.convert import Conversion


def command(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A run, a checkpoint, a HuggingFace or OpenAI folder, a nanoGPT or build-nanogpt .pt, or an llm.c .bin.",
        ),
    ] = None,
    from_hf: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead of SOURCE: gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name, or a folder."
        ),
    ] = None,
    to: Annotated[str, typer.Option(metavar="hf|nanogpt|llmc|gguf", help="Format to write.")] = "hf",
    out: Annotated[Path | None, typer.Option(help="New folder or file; by default named by the source.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="fp32, fp16, bf16, for gguf also q8_0; by default the source's where the format has it."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder or tokenizer.json, where the source has none or another.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace --out if it is there.")] = False,
    info: Annotated[bool, typer.Option("--info", help="Only say what SOURCE is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON on stdout.")] = False,
) -> None:
    """Convert a GPT-2 between programs, or fetch one, and prove the result.

    What was written is read back and compared tensor by tensor, and its logits with the other program's own. Prints where it
    is.
    """
    if (source is None) == (from_hf is None):
        raise UserError("give either SOURCE or --from-hf NAME, such as: gpt2 convert --from-hf gpt2-large")
    name = source or from_hf or ""

    from gpt2cli.commands import console
    from gpt2cli.convert import convert
    from gpt2cli.identify import describe

    listen()
    with console.Bars() as bars:
        if info:
            facts = describe(name, tokenizer, bars.downloaded)
        else:
            result = convert(
                name,
                out,
                to=to,
                dtype=dtype,
                tokenizer=tokenizer,
                force=force,
                progress=bars.downloaded,
                tell=console.note,
            )
    if as_json:
        console.print_json(facts if info else asdict(result))
    elif info:
        console.show_model(facts)
    else:
        print(result.out)
    if not info:
        _tell(result)


def _tell(result: Conversion) -> None:
    """The verdict, on stderr."""
    from gpt2cli.commands import console
    from gpt2cli.errors import size

    for change in result.changes:
        console.note(f"note: {change}")
    equal = f"differ by at most {result.weights_error:.1e}" if result.weights_error else "are equal bit for bit"
    console.note(
        f"{result.source_format} -> {result.format}: {result.parameters:,} parameters, {result.dtype}, {size(result.bytes)}; "
        f"{result.tensors} tensors {equal} after reading back"
    )
    before = ""
    if result.loss_before is not None:
        before = f", of the source {result.loss_before:.5f} ({result.loss_after - result.loss_before:+.5f})"
    console.note(f"loss {result.loss_after:.5f}{before}, on {result.sample}")
    if result.program:
        console.note(f"logits within {result.logits_error:.1e} of those that {result.program} computes")
    else:
        console.note(f"logits were not compared with another program's: {result.not_compared}")
    model = "model.safetensors" if "model.safetensors" in result.files else next(iter(result.files))
    console.note(f"sha256 {result.files[model]}  {model}")
