"""What the benchmarks' commands have in common: options, and the conditions of a figure."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gpt2cli.commands.stop import listen
from gpt2cli.config import CHOICES, PRESETS, GPTConfig
from gpt2cli.errors import UserError

Device = Annotated[str, typer.Option(help="Where to run.", metavar="|".join(CHOICES["device"]))]
Dtype = Annotated[str, typer.Option(help="Of matrix products; auto: as train decides.", metavar="|".join(CHOICES["dtype"]))]
Preset = Annotated[str, typer.Option(help="Size: " + ", ".join(PRESETS), metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def numbers(option: str, text: str) -> list[int]:
    try:
        values = [int(part) for part in text.split(",")]
        if min(values) >= 1:
            return values
    except ValueError:
        pass
    raise UserError(f"{option} {text}: expected whole numbers above 0, separated by commas")


def model_config(preset: str) -> GPTConfig:
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; expected {', '.join(PRESETS)}")
    return GPTConfig(**PRESETS[preset])  # type: ignore[arg-type]


def decide(device_name: str, dtype: str) -> tuple[Any, str, dict[str, Any]]:
    from gpt2cli import bench, device

    listen()
    where = device.pick_device(device_name)
    kind = device.pick_dtype(dtype, where)
    return where, kind, bench.conditions(where, kind)


def show_conditions(facts: dict[str, Any]) -> None:
    from gpt2cli.commands import console

    sheet = f", datasheet {facts['datasheet_flops'] / 1e12:,.0f} TFLOP/s" if facts["datasheet_flops"] else ""
    console.note(
        f"{facts['date']}, {facts['device']}, {facts['dtype']}, torch {facts['torch']}, gpt2cli {facts['gpt2cli']}; "
        f"matrix products {facts['matmul_flops'] / 1e9:,.0f} GFLOP/s measured{sheet}"
    )
