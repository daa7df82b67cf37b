"""`gpt2 bench`: how fast this machine does the product's own work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gpt2cli.commands.bench_distributed import distributed
from gpt2cli.commands.measure import Device, Dtype, Json, Preset, decide, model_config, numbers, show_conditions
from gpt2cli.commands.stop import listen
from gpt2cli.config import CHOICES
from gpt2cli.errors import UserError, size

app = typer.Typer(
    help="Time attention kernels (without a name), training, sampling and tokenizing on this machine.", no_args_is_help=False
)
app.command()(distributed)


@app.callback(invoke_without_command=True)
def default(context: typer.Context, as_json: Json = False) -> None:
    if context.invoked_subcommand is None:
        attention(as_json=as_json)
    elif as_json:
        raise UserError(f"--json comes after the name: gpt2 bench {context.invoked_subcommand} --json")


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
    shape = {"B": batch_size, "n_head": n_head, "head_size": head_size}
    with console.at_work() as tell:
        rows, missing = bench.bench_attention(where, kind, Ts, **shape, repeats=repeats, on_turn=tell)
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
    compare: Annotated[str | None, typer.Option(help="Another library to run in turn.", metavar="hf")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Time the real training step: forward, backward, clipping and optimizer."""
    config = model_config(preset)

    from gpt2cli import bench, bench_train
    from gpt2cli.commands import console

    where, kind, facts = decide(device, dtype)
    with console.at_work() as tell:
        rows = bench_train.bench_train(
            config,
            where,
            kind,
            compare=compare.split(",") if compare else (),
            B=batch_size,
            T=seq_len,
            repeats=repeats,
            compile=compile,
            optimizer=optimizer,
            on_turn=tell,
        )
    facts |= {"parameters": config.num_parameters(), "B": batch_size, "T": seq_len, "optimizer": optimizer}
    if as_json:
        return console.print_json(bench.as_json("train", facts, rows))
    console.table(
        f"Training step, {preset}: {facts['parameters']:,} parameters, {batch_size} rows of {seq_len} tokens, {optimizer}",
        ("who", "ms a step", "tokens/s", "of ours", "GFLOP/s", "of the matmul rate", "peak memory", "of ours"),
        [
            (
                row.who,
                f"{row.seconds * 1e3:,.0f} ({row.spread[0] * 1e3:,.0f} to {row.spread[1] * 1e3:,.0f})",
                f"{row.tokens_per_second:,.0f}",
                f"{row.of_ours:.2f}x",
                f"{row.flops / 1e9:,.0f}",
                f"{row.mfu:.0%}",
                size(row.memory),
                f"{row.memory / rows[0].memory:.2f}x" if rows[0].memory else "",
            )
            for row in rows
        ],
    )
    show_conditions(facts)


@app.command()
def sample(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for gpt2 sample; without it random weights of --preset.")
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
    with where:
        network = loaded.model if loaded else GPT(config).eval()
    with console.at_work() as tell:
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
            on_turn=tell,
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
        change = f"{before:.3f}, with {quantize} {after:.3f} ({after / before - 1:+.2%})"
        console.note(f"perplexity {change}, on the embedded text, by torch's product")
    show_conditions(facts)


@app.command()
def tokenize(
    text: Annotated[
        Path | None,
        typer.Argument(metavar="TEXT", help="UTF-8; by default the embedded Shakespeare eight times."),
    ] = None,
    workers: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "1,2",
    repeats: Annotated[int, typer.Option(help="Turns; the median is shown.", min=1)] = 5,
    as_json: Json = False,
) -> None:
    """Time text file -> finished shards against one thread of tiktoken, and compare every id."""
    counts = numbers("--workers", workers)

    from gpt2cli import bench, device
    from gpt2cli.commands import console

    listen()
    facts = bench.machine(device.pick_device("cpu"))
    with bench.text_to_tokenize(text) as file, console.at_work() as tell:
        rows = bench.bench_tokenize(file, counts, repeats, tell)
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
