"""`gpt2 bench distributed`: how fast several processes are together."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.commands import launch
from gpt2cli.commands.measure import Device, Dtype, Json, Preset, decide, model_config, show_conditions
from gpt2cli.config import CHOICES
from gpt2cli.errors import UserError, size

if TYPE_CHECKING:
    from gpt2cli.bench_distributed import Scaling


def distributed(
    context: typer.Context,
    nproc: Annotated[
        int | None, typer.Option(help="Processes to start on this machine; without it those of torchrun.", min=2)
    ] = None,
    preset: Preset = "seed",
    parallel: Annotated[str, typer.Option(help="As for gpt2 train.", metavar="|".join(CHOICES["parallel"]))] = "ddp",
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step, of all ranks together.", min=1)] = 8192,
    batch_size: Annotated[int, typer.Option(help="Most rows of a micro-step.", min=1)] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 256,
    repeats: Annotated[int, typer.Option(help="Turns; the median is shown.", min=1)] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Time several processes: the sums between them, the training step against one process's, and each rank's part."""
    config = replace(model_config(preset), block_size=max(seq_len, model_config(preset).block_size))
    if parallel not in CHOICES["parallel"]:
        raise UserError(f"--parallel {parallel} is unknown; expected {', '.join(CHOICES['parallel'])}")
    if nproc is not None:
        raise typer.Exit(launch.start(nproc, context.obj))
    launch.follow()

    from gpt2cli import bench_distributed
    from gpt2cli.commands import console
    from gpt2cli.device import pick_device
    from gpt2cli.distributed import joined

    with joined() as ranks:
        console.speak_for(ranks.rank)
        if ranks.world_size == 1:
            raise UserError("one process has nobody to talk to: add --nproc N, or start it with torchrun")
        ranks.connect(pick_device(device))  # before anything is computed there
        where, kind, facts = decide(device, dtype)
        with console.at_work() as tell:
            found = bench_distributed.bench_distributed(
                config,
                where,
                kind,
                ranks=ranks,
                parallel=parallel,
                tokens=tokens_per_step,
                B=batch_size,
                T=seq_len,
                repeats=repeats,
                compile=compile,
                on_turn=tell,
            )
    if ranks.is_first and as_json:
        console.print_json({"bench": "distributed", **facts, **asdict(found)})
    elif ranks.is_first:
        show_scaling(found, facts)


def show_scaling(found: Scaling, facts: dict[str, Any]) -> None:
    from gpt2cli.commands import console

    console.table(
        f"Summing over {found.world_size} ranks",
        ("bytes", "ms", "GB/s over each link"),
        [(size(row.bytes), f"{row.seconds * 1e3:,.1f}", f"{row.bandwidth / 1e9:.2f}") for row in found.reduces],
    )
    console.table(
        f"A step of {found.tokens:,} tokens, {found.parallel}",
        ("who", "ms a step", "tokens/s", "of one process"),
        [
            ("one process", f"{found.alone * 1e3:,.0f}", f"{found.tokens / found.alone:,.0f}", "1.00x"),
            ("all ranks", f"{found.together * 1e3:,.0f}", f"{found.tokens / found.together:,.0f}", f"{found.speedup:.2f}x"),
            *(
                (row.where + ", its part", f"{row.seconds * 1e3:,.0f}", "", f"{row.behind:.2f}x the median")
                for row in found.ranks
            ),
        ],
    )
    slow = max(found.ranks, key=lambda row: row.seconds)
    if slow.behind > 1.1:
        console.note(f"{slow.where} is behind: its part takes {slow.behind:.2f} times the median rank's, and all wait for it")
    waits = max(0.0, found.together - found.own)
    console.note(
        f"gradients are {size(found.gradient_bytes)} a step; beside the slowest rank's own part a step takes "
        f"{waits * 1e3:,.0f} ms ({waits / found.together:.0%})"
    )
    show_conditions(facts)
