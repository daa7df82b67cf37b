"""`gpt2 bench`: how fast this machine does the product's own work."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.commands import launch
from gpt2cli.config import CHOICES, PRESETS, GPTConfig
from gpt2cli.errors import UserError, size

if TYPE_CHECKING:
    from gpt2cli.bench_distributed import Scaling

app = typer.Typer(help="Time attention kernels, training, sampling and tokenizing on this machine.", no_args_is_help=False)

Device = Annotated[str, typer.Option(help="Where to run.", metavar="|".join(CHOICES["device"]))]
Dtype = Annotated[str, typer.Option(help="Of matrix products; auto: as train decides.", metavar="|".join(CHOICES["dtype"]))]
Preset = Annotated[str, typer.Option(help="Size: " + ", ".join(PRESETS), metavar="NAME")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


@app.callback(invoke_without_command=True)
def default(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        attention(as_json=as_json)


@app.command()
def attention(
    lengths: Annotated[str, typer.Option(help="Values of T, separated by commas.")] = "64,256,1024",
    batch_size: Annotated[int, typer.Option(help="Rows.", min=1)] = 4,
    n_head: Annotated[int, typer.Option(help="Heads.", min=1)] = 6,
    head_size: Annotated[int, typer.Option(help="Width of a head.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median is shown.", min=1)] = 7,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Compare the attention kernels this device has, forward and backward, and their error against float64."""
    Ts = numbers("--lengths", lengths)

    from gpt2cli import bench
    from gpt2cli.commands import console

    where, kind, facts = decide(device, dtype)
    rows, missing = bench.bench_attention(where, kind, Ts, B=batch_size, n_head=n_head, head_size=head_size, repeats=repeats)
    if as_json:
        return console.print_json(bench.as_json("attention", facts, rows, missing))
    best = {T: min(row.forward + row.backward for row in rows if row.T == T) for T in Ts}
    console.table(
        f"Causal attention, {batch_size} rows, {n_head} heads of {head_size}",
        ("T", "kernel", "forward ms", "backward ms", "of the fastest", "error", "gradient error"),
        [
            (
                f"{row.T:,}",
                row.kernel,
                f"{row.forward * 1e3:.2f}",
                f"{row.backward * 1e3:.2f}",
                f"{(row.forward + row.backward) / best[row.T]:.2f}x",
                f"{row.output_error:.1e}",
                f"{row.gradient_error:.1e}",
            )
            for row in rows
        ],
    )
    for name, why in missing.items():
        console.note(f"{name} is not available here: {why}")
    show_conditions(facts)


@app.command()
def train(
    preset: Preset = "seed",
    batch_size: Annotated[int, typer.Option(help="Rows of a step.", min=1)] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens of a row.", min=1)] = 256,
    repeats: Annotated[int, typer.Option(help="Timed steps; the median is shown.", min=1)] = 7,
    optimizer: Annotated[str, typer.Option(help="Optimizer.", metavar="|".join(CHOICES["optimizer"]))] = "adamw",
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Time the real training step: forward, backward, clipping and optimizer."""
    config = model_config(preset)

    from gpt2cli import bench
    from gpt2cli.commands import console

    where, kind, facts = decide(device, dtype)
    row = bench.bench_train(
        config,
        where,
        kind,
        B=batch_size,
        T=seq_len,
        repeats=repeats,
        compile=compile,
        optimizer=optimizer,
        roof=facts["matmul_flops"],
    )
    if as_json:
        return console.print_json(bench.as_json("train", facts, [row]))
    console.table(
        f"Training step, {preset}: {row.parameters:,} parameters",
        ("rows x T", "ms a step", "tokens/s", "GFLOP/s", "of the matmul rate", "peak memory"),
        [
            (
                f"{row.B} x {row.T}",
                f"{row.seconds * 1e3:,.0f} ({row.spread[0] * 1e3:,.0f} to {row.spread[1] * 1e3:,.0f})",
                f"{row.tokens_per_second:,.0f}",
                f"{row.flops / 1e9:,.0f}",
                f"{row.mfu:.0%}",
                size(row.memory_peak),
            )
        ],
    )
    show_conditions(facts)


@app.command()
def sample(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As for gpt2 sample; without it random weights of --preset.")
    ] = None,
    preset: Preset = "seed",
    batch_size: Annotated[int, typer.Option(help="Rows at once.", min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=2)] = 128,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median is shown.", min=1)] = 3,
    quantize: Annotated[str | None, typer.Option(help="Weights as int8.", metavar="int8")] = None,
    compare: Annotated[
        str | None, typer.Option(help="Other libraries to run in turn, separated by commas.", metavar="hf,ctranslate2,llamacpp")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights.", metavar="fp32|bf16|fp16")] = "fp32",
    as_json: Json = False,
) -> None:
    """Time greedy generation, the prompt and the decoding apart; int8 with what it costs in perplexity."""
    config = model_config(preset)

    from gpt2cli import bench, bench_generate, checkpoint
    from gpt2cli.commands import console
    from gpt2cli.model import GPT
    from gpt2cli.tokenizer import Encoding

    where, kind, facts = decide(device, dtype)
    loaded = checkpoint.load(model) if model else None
    network = loaded.model if loaded else GPT(config).eval()
    rows = bench_generate.bench_generate(
        network,
        where,
        kind,
        quantize=quantize,
        compare=compare.split(",") if compare else (),
        B=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
    )
    facts |= {"parameters": network.config.num_parameters(), "B": batch_size, "prompt_tokens": prompt_tokens}
    facts |= {"new_tokens": new_tokens, "quantize": quantize, "read_bandwidth": bench_generate.read_bandwidth(where)}
    if quantize:
        encoding = loaded.encoding if loaded else Encoding.gpt2()
        facts["perplexity"] = bench_generate.perplexities(network.float().cpu(), encoding, quantize)
    if as_json:
        return console.print_json(bench.as_json("sample", facts, rows))
    console.table(
        f"{model or preset}: {facts['parameters']:,} parameters, {batch_size} x ({prompt_tokens} + {new_tokens}) tokens",
        ("who", "first token ms", "decode tokens/s", "of ours", "same tokens"),
        [
            (
                row.who,
                f"{row.time_to_first_token * 1e3:,.0f}",
                f"{row.decode_tokens_per_second:,.1f} ({row.spread[0]:,.1f} to {row.spread[1]:,.1f})",
                f"{row.of_ours:.2f}x",
                f"{row.same_tokens}",
            )
            for row in rows
        ],
    )
    roof = facts["read_bandwidth"]
    console.note(f"our weights are read at {rows[0].read_rate / 1e9:.1f} GB/s; a sum reads {roof / 1e9:.1f} GB/s here")
    if quantize:
        before, after = facts["perplexity"]
        console.note(f"perplexity {before:.3f}, with {quantize} {after:.3f} ({after / before - 1:+.2%}), on the embedded text")
    show_conditions(facts)


@app.command()
def tokenize(
    text: Annotated[
        Path | None,
        typer.Argument(metavar="[TEXT]", help="UTF-8; by default the embedded Shakespeare eight times."),
    ] = None,
    workers: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "1,2",
    repeats: Annotated[int, typer.Option(help="Turns; the median is shown.", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Time text file -> finished shards against one thread of tiktoken, and compare every id."""
    counts = numbers("--workers", workers)

    from gpt2cli import bench, device
    from gpt2cli.commands import console

    facts = bench.machine(device.pick_device("cpu"))
    with bench.text_to_tokenize(text) as file:
        rows = bench.bench_tokenize(file, counts, repeats)
        count = file.stat().st_size
    if as_json:
        return console.print_json(bench.as_json("tokenize", facts | {"bytes": count}, rows))
    console.table(
        f"Text to shards, {count / 1e6:,.1f} MB",
        ("encoder", "workers", "seconds", "MB/s", "of tiktoken alone", "ids"),
        [
            (
                row.encoder,
                str(row.workers),
                f"{row.seconds:.2f}",
                f"{row.bytes_per_second / 1e6:,.1f}",
                f"{row.speedup:.2f}x",
                "equal" if row.equal else "DIFFERENT",
            )
            for row in rows
        ],
    )
    console.note(f"{facts['date']}, {facts['device']}, gpt2cli {facts['gpt2cli']}")


@app.command()
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
