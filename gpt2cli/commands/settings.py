"""Where the settings of `gpt2 train` come from: the command line, and a file under it."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path

import typer

from gpt2cli.atomic import from_home, read_json
from gpt2cli.config import BEFORE
from gpt2cli.errors import UserError

ONLY_ON_THE_LINE = {"config", "resume", "dry_run", "out", "verify_resume", "nproc"}


def source_of(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return source.name if source is not None else "DEFAULT"


def overridden(context: typer.Context) -> set[str]:
    """Settings of a file that the command line replaces by another name: --epochs the file's steps, and so on."""
    shape = ("n_layer", "n_head", "n_embd", "block_size")
    by = {"epochs": ("steps",), "steps": ("epochs",), "lr": ("min_lr",), "preset": shape}
    by |= {"data": ("mixture",), "mixture": ("data",)}
    said = [name for name in by if source_of(context, name) == "COMMANDLINE"]
    return {other for name in said for other in by[name] if source_of(context, other) == "DEFAULT_MAP"}


def read_mixture(options: Sequence[str]) -> dict[str, float]:
    """["a=0.7", "b=0.3"] -> {"a": 0.7, "b": 0.3}; a path may hold a = itself."""
    mixture: dict[str, float] = {}
    for option in options:
        path, _, weight = option.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not path or not math.isfinite(value):
            raise UserError(f"--data {option}: expected a path and its weight, such as --data {path or option}=0.5")
        if path in mixture:
            raise UserError(f"--data {path} is given twice")
        mixture[path] = value
    return mixture


def typed(value: object) -> str:
    """What one would type for it, which every typer checks alike: before 0.29 others make 1 of 1.5, or fail at plain = 3."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the settings of a file the defaults of this command line."""
    if path is None:
        return None
    options = {parameter.name for parameter in context.command.params}
    options -= ONLY_ON_THE_LINE
    path = path / "run.json" if path.is_dir() else path
    if path.suffix not in (".toml", ".json"):
        raise UserError(f"--config {path}: expected a .toml file, or the run.json of a run")
    options -= {"data", "mixture"}  # a file calls them input and data
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"--config {path}: {error}") from None
        values = {name.replace("-", "_"): value for name, value in values.items()}
        unknown = sorted(set(values) - options - {"input", "data"})
        if unknown:
            if unknown[0] in ONLY_ON_THE_LINE:
                raise UserError(f"--config {path}: {unknown[0]!r} is for the command line only")
            raise UserError(f"--config {path}: unknown setting {unknown[0]!r}; expected an option of gpt2 train, or input")
        if "data" in values and "input" in values:
            raise UserError(f"--config {path}: input and data both say what to train on: give one of them")
        data = values.pop("data", values.pop("input", None))
    else:
        run = read_json(path)  # not its seal: here it is a settings file, which people edit
        try:
            start = run["init_from"] and str(from_home(run["init_from"]))
            context.meta["data_sha256"] = run["data"].get("sha256")
            values, data = BEFORE | run["model"] | run["train"] | {"init_from": start}, run["data"]["given"]
            data = {str(from_home(p)): w for p, w in data.items()} if isinstance(data, dict) else str(from_home(data))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"--config {path}: neither a .toml file nor the run.json of a run") from None
    flags = {parameter.name for parameter in context.command.params if getattr(parameter, "is_flag", False)}
    for name, value in values.items():
        switch = isinstance(value, bool) and name not in flags  # which would be taken for a 1 or a 0
        if name in options and (switch or isinstance(value, list | dict)):
            raise UserError(f"--config {path}: {name} is {str(value).lower()}; expected what --{name.replace('_', '-')} takes")
    context.default_map = {name: typed(value) for name, value in values.items() if name in options and value is not None}
    if data is not None:
        mixture = [f"{p}={w}" for p, w in data.items()] if isinstance(data, dict) else data
        if not isinstance(mixture, str | list):
            raise UserError(f"--config {path}: data is {data!r}; expected a table of paths and weights")
        context.default_map["data" if isinstance(mixture, str) else "mixture"] = mixture
    return path
