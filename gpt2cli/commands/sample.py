"""`gpt2 sample`: a model and a prompt -> text."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.config import CHOICES, SamplingConfig
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.checkpoint import Loaded

CHOOSING, MACHINE = "Choosing the next token", "Machine"
SAMPLING = SamplingConfig()


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A run (its best checkpoint), a model folder or a hub name such as gpt2; without it the newest run.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without it standard input, if it is a pipe.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = SAMPLING.max_new_tokens,
    num_samples: Annotated[int, typer.Option(help="Continuations to make, in one batch.")] = 1,
    temperature: Annotated[
        float, typer.Option(help="Below 1 safer, above 1 wilder.", rich_help_panel=CHOOSING)
    ] = SAMPLING.temperature,
    top_k: Annotated[int | None, typer.Option(help="Only among the k likeliest.", rich_help_panel=CHOOSING)] = SAMPLING.top_k,
    top_p: Annotated[
        float | None, typer.Option(help="Only among the fewest of this probability together.", rich_help_panel=CHOOSING)
    ] = SAMPLING.top_p,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest.", rich_help_panel=CHOOSING)] = False,
    seed: Annotated[int, typer.Option(help="Sample n draws with seed + n.", rich_help_panel=CHOOSING)] = SAMPLING.seed,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after <|endoftext|>.", rich_help_panel=CHOOSING)
    ] = False,
    overflow: Annotated[
        str, typer.Option(metavar="stop|slide", help="At the end of the context.", rich_help_panel=CHOOSING)
    ] = SAMPLING.overflow,
    device: Annotated[
        str, typer.Option(help="Where to run.", metavar="|".join(CHOICES["device"]), rich_help_panel=MACHINE)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights; auto: bf16 on CUDA.", metavar="auto|fp32|bf16|fp16", rich_help_panel=MACHINE),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, at the end.")] = False,
) -> None:
    """Continue a prompt.

    Text goes to stdout as it comes; what was done, and how fast, to stderr. A literal <|endoftext|> in the prompt is that
    one token.
    """
    config = SamplingConfig(max_new_tokens, temperature, top_k, top_p, greedy, seed, overflow)
    text = read_prompt(prompt, prompt_file)

    from gpt2cli import checkpoint
    from gpt2cli.commands import console

    with console.Bars() as bars:
        loaded = checkpoint.load(model, bars.downloaded)
    if loaded.embedded_vocabulary:
        console.note(f"{loaded.folder} brings no tokenizer: GPT-2's is used")
    show = None if as_json else Writer(text, num_samples)
    result = continue_text(loaded, text, config, num_samples, ignore_eos, device, dtype, show)
    if as_json:
        console.print_json(result)
    count = sum(len(sample["tokens"]) for sample in result["samples"])
    console.note(
        f"{count:,} tokens, {result['tokens_per_second']:,.1f} tokens/s, first after "
        f"{result['time_to_first_token']:.2f} s, seed {seed}, {loaded.folder}"
    )
    if any(sample["finish_reason"] == "context" for sample in result["samples"]):
        console.note(f"stopped at the end of the context ({loaded.model.config.block_size:,} tokens); see --overflow slide")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompt-file both give the prompt: use one of them")
    try:
        if file is not None:
            return file.read_bytes().decode("utf-8")
        if prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file or 'standard input'} is not UTF-8: bad byte at offset {error.start}") from None
    if not prompt:
        raise UserError("there is no prompt: give --prompt TEXT, --prompt-file FILE or text on standard input")
    return prompt


def continue_text(
    loaded: Loaded,
    prompt: str,
    config: SamplingConfig,
    num_samples: int,
    ignore_eos: bool,
    device_name: str,
    dtype: str,
    show: Writer | None,
) -> dict[str, Any]:
    """The JSON object of `--json`; each whole character is shown as soon as it is there."""
    from gpt2cli import device
    from gpt2cli.generate import generate
    from gpt2cli.tokenizer import StreamDecoder

    where = device.pick_device(device_name)
    if dtype == "auto":
        dtype = device.pick_dtype("auto", where) if where.type == "cuda" else "fp32"
    device.set_up(config.seed)
    model = loaded.model.to(where, device.DTYPES[device.pick_dtype(dtype, where)])
    encoding = loaded.encoding
    ids = encoding.encode(prompt, special=True)
    decoders = [StreamDecoder(encoding) for _ in range(num_samples)]
    samples: list[dict[str, Any]] = [{"text": "", "tokens": [], "finish_reason": "length"} for _ in range(num_samples)]
    started, first = time.perf_counter(), 0.0
    eot = None if ignore_eos else encoding.eot
    for row in generate(model, ids, config, num_samples=num_samples, eot=eot, n_vocab=encoding.n_vocab):
        first = first or time.perf_counter() - started
        for n, token in enumerate(row):
            if token is None:
                samples[n]["finish_reason"] = "stop"
                continue
            piece = decoders[n].feed(token)
            samples[n]["tokens"].append(token)
            samples[n]["text"] += piece
            if show:
                show.add(n, piece)
    elapsed = time.perf_counter() - started
    longest = max(len(sample["tokens"]) for sample in samples)
    for n, sample in enumerate(samples):
        rest = decoders[n].finish()
        sample["text"] += rest
        if len(sample["tokens"]) == longest < config.max_new_tokens:
            full = len(ids) + longest > model.config.block_size and config.overflow == "stop"
            sample["finish_reason"] = "context" if full else "stop"
        if show:
            show.add(n, rest)
    if show:
        show.end()
    return {
        "model": str(loaded.folder),
        "seed": config.seed,
        "samples": samples,
        "tokens_per_second": sum(len(sample["tokens"]) for sample in samples) / elapsed,
        "time_to_first_token": first,
    }


class Writer:
    """Streams one sample as it comes, after the prompt; of several, the first streams and the others follow whole."""

    def __init__(self, prompt: str, num_samples: int) -> None:
        self.texts = [f"--- sample {n + 1} ---\n{prompt}" for n in range(num_samples)] if num_samples > 1 else [prompt]

    def add(self, n: int, piece: str) -> None:
        self.texts[n] += piece
        if n == 0:
            sys.stdout.write(self.texts[0])
            sys.stdout.flush()
            self.texts[0] = ""

    def end(self) -> None:
        sys.stdout.write("\n".join(self.texts) + "\n")
        sys.stdout.flush()
