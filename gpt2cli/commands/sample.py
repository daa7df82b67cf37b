"""`gpt2 sample`: a model and prompts -> text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.commands.settings import source_of
from gpt2cli.commands.stop import listen
from gpt2cli.config import CHOICES, SamplingConfig
from gpt2cli.errors import UserError, many

if TYPE_CHECKING:
    from gpt2cli.checkpoint import Loaded
    from gpt2cli.complete import Completion, Sample

CHOOSING, ENDING, MANY, MACHINE = "Choosing the next token", "Where it ends", "Many prompts", "Machine"
SAMPLING = SamplingConfig()
DRAWING = ("temperature", "top_k", "top_p", "min_p")  # which change nothing about which token is the likeliest


def command(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A run (its best checkpoint), a model folder or a hub name such as gpt2; without it the newest run.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue; without it standard input, if it is a pipe.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from this file.")] = None,
    num_samples: Annotated[int, typer.Option(help="Continuations to make of a prompt.", min=1, max=100_000)] = 1,
    temperature: Annotated[
        float, typer.Option(help="Below 1 safer, above 1 wilder.", rich_help_panel=CHOOSING)
    ] = SAMPLING.temperature,
    top_k: Annotated[int | None, typer.Option(help="Only among the k likeliest.", rich_help_panel=CHOOSING)] = SAMPLING.top_k,
    top_p: Annotated[
        float | None, typer.Option(help="Only among the fewest of this probability together.", rich_help_panel=CHOOSING)
    ] = SAMPLING.top_p,
    min_p: Annotated[
        float | None,
        typer.Option(help="Only among those with this part of the likeliest one's probability.", rich_help_panel=CHOOSING),
    ] = SAMPLING.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: what was there already becomes less likely.", rich_help_panel=CHOOSING)
    ] = SAMPLING.repetition_penalty,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest.", rich_help_panel=CHOOSING)] = False,
    seed: Annotated[int, typer.Option(help="Sample n draws with seed + n.", rich_help_panel=CHOOSING)] = SAMPLING.seed,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.", rich_help_panel=ENDING)] = SAMPLING.max_new_tokens,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given several times.", rich_help_panel=ENDING)
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after <|endoftext|>.", rich_help_panel=ENDING)
    ] = False,
    overflow: Annotated[
        str,
        typer.Option(
            metavar="stop|slide|error",
            help="At the end of the context: stop there, let it slide, or refuse what would get there.",
            rich_help_panel=ENDING,
        ),
    ] = SAMPLING.overflow,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL with a "prompt" a line, or - for standard input; gives JSONL.', rich_help_panel=MANY),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New file for what --prompts gives; by default stdout.", rich_help_panel=MANY)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind what is in --out from before.", rich_help_panel=MANY)
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1, rich_help_panel=MANY)] = 16,
    device: Annotated[
        str, typer.Option(help="Where to run.", metavar="|".join(CHOICES["device"]), rich_help_panel=MACHINE)
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help="Of the weights; auto: bf16 on CUDA.", metavar="auto|fp32|bf16|fp16", rich_help_panel=MACHINE),
    ] = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(help="Weights as int8: faster on a CPU, nearly the same text.", metavar="int8", rich_help_panel=MACHINE),
    ] = None,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="In the JSON, each token's log probability.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, at the end.")] = False,
) -> None:
    """Continue a prompt, or many.

    Text goes to stdout as it comes; what was done, and how fast, to stderr. A literal <|endoftext|> in the prompt is that
    one token.
    """
    config = SamplingConfig(
        max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, greedy=greedy, seed=seed, overflow=overflow
    )
    check_options(context)

    from gpt2cli.commands import console
    from gpt2cli.complete import complete, done_already
    from gpt2cli.linear import place

    listen()
    lines = read_lines(prompts, prompt, prompt_file, num_samples)
    done = done_already(out, lines, seed) if resume and out and out.exists() else 0
    if done == len(lines):
        return console.note(f"{out} has all {done:,} results already")
    config, lines = replace(config, seed=seed + done), lines[done:]
    rows = min(batch_size, len(lines)) if prompts else num_samples
    with ExitStack() as stack:
        show = Quiet() if as_json else Stream(lines[0]["prompt"], num_samples)
        if prompts:
            file = stack.enter_context(opened(out, resume)) if out else sys.stdout
            show = Lines(lines, num_samples, config.seed, done, file)
        loaded = load(model)
        stack.enter_context(show)
        result = complete(
            place(loaded.model, device, dtype, quantize, rows),
            loaded.encoding,
            [line["prompt"] for line in lines],
            config,
            stop=stop or (),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            rows=rows,
            on_text=show.text,
            on_end=show.end,
        )
    if as_json:
        console.print_json({"model": str(loaded.folder), "seed": seed, "prompt": lines[0]["prompt"], **as_object(result)})
    tell(result, seed, loaded.folder, loaded.model.config.block_size)


def check_options(context: typer.Context) -> None:
    """Raises UserError for options that do not go together."""
    given = context.params
    if given["prompts"] and (given["prompt"] is not None or given["prompt_file"] or given["as_json"]):
        raise UserError("--prompts brings the prompts and gives JSONL: leave out --prompt, --prompt-file and --json")
    if given["out"] is not None and given["prompts"] is None:
        raise UserError("--out is for what --prompts gives; a single prompt's text goes to stdout: gpt2 sample ... > FILE")
    if given["resume"] and not given["out"]:
        raise UserError("--resume goes on with the file that --prompts gave: add --prompts and --out")
    if source_of(context, "batch_size") == "COMMANDLINE" and given["prompts"] is None:
        raise UserError("--batch-size is for what --prompts brings; all samples of a single prompt are made at once")
    if given["logprobs"] and not (given["prompts"] or given["as_json"]):
        raise UserError("--logprobs go into the JSON: add --json, or use --prompts")
    for name in DRAWING:
        if given["greedy"] and source_of(context, name) == "COMMANDLINE":
            raise UserError(
                f"--greedy takes the likeliest token, whatever the --{name.replace('_', '-')}: leave one of them out"
            )


def read_lines(prompts: Path | None, prompt: str | None, prompt_file: Path | None, num_samples: int) -> list[dict[str, Any]]:
    """One object with a `prompt` for each sample."""
    from gpt2cli.complete import read_prompts

    if prompts == Path("-"):
        lines = read_prompts(sys.stdin.buffer.read(), "standard input")
    elif prompts:
        lines = read_prompts(prompts.read_bytes(), prompts)
    else:
        lines = [{"prompt": read_prompt(prompt, prompt_file)}]
    return [line for line in lines for _ in range(num_samples)]


def read_prompt(prompt: str | None, file: Path | None) -> str:
    if prompt is not None and file is not None:
        raise UserError("--prompt and --prompt-file both give the prompt: use one of them")
    try:
        if file is not None:
            prompt = file.read_bytes().decode("utf-8")
        elif prompt is None and not sys.stdin.isatty():
            prompt = sys.stdin.buffer.read().decode("utf-8")
        elif prompt is not None:
            prompt = prompt.encode("utf-8", "surrogateescape").decode("utf-8")  # the bytes that were given
    except UnicodeError as error:
        source = "--prompt" if prompt is not None else file or "standard input"
        raise UserError(f"{source} is not UTF-8: bad byte at offset {getattr(error, 'start', 0)}") from None
    if prompt is not None and not prompt:
        raise UserError("the prompt is empty: give some text, or <|endoftext|> to start a document")
    if prompt is None:
        raise UserError("there is no prompt: give --prompt TEXT, --prompt-file FILE or text on standard input")
    return prompt


def load(model: str | None) -> Loaded:
    from gpt2cli import checkpoint
    from gpt2cli.commands import console

    with console.Bars() as bars:
        loaded = checkpoint.load(model, bars.downloaded)
    if loaded.embedded_vocabulary:
        console.note(f"{loaded.folder} brings no tokenizer: GPT-2's is used")
    return loaded


@contextmanager
def opened(path: Path, resume: bool) -> Iterator[Any]:
    """To write to, a new file unless `resume`. What ends with an error before anything is written leaves none, which would
    be in the way of another try."""
    try:
        file = path.open("a" if resume else "x", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{path} already exists: go on with it by --resume, give another --out, or delete it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
    except BaseException:
        if not path.stat().st_size:
            path.unlink()
        raise


def as_object(result: Completion) -> dict[str, Any]:
    samples = [{key: value for key, value in asdict(sample).items() if value is not None} for sample in result.samples]
    speed = {"tokens_per_second": result.tokens_per_second, "time_to_first_token": result.time_to_first_token}
    return {"samples": samples, **speed}


def tell(result: Completion, seed: int, folder: Path, block_size: int) -> None:
    from gpt2cli.commands import console

    if any(sample.finish_reason == "context" for sample in result.samples):
        console.note(f"stopped at the end of the context ({block_size:,} tokens); see --overflow slide")
    console.note(
        f"{many(sum(len(sample.tokens) for sample in result.samples), 'token')}, {result.tokens_per_second:,.1f} tokens/s, "
        f"first after {result.time_to_first_token:.2f} s, seed {seed}, {folder}"
    )


# ==== what is shown while it comes ====


class Quiet:
    """Shows nothing. It is entered before the first token, and left after the last one or by an interrupt."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif issubclass(kind, KeyboardInterrupt | SystemExit):
            self.interrupted()

    def text(self, number: int, piece: str) -> None: ...

    def end(self, number: int, sample: Sample) -> None: ...

    def finish(self) -> None: ...

    def interrupted(self) -> None: ...


class Stream(Quiet):
    """Streams one sample as it comes, after the prompt; of several, the first streams and the others follow whole."""

    def __init__(self, prompt: str, num_samples: int) -> None:
        self.texts = [f"--- sample {n + 1} ---\n{prompt}" for n in range(num_samples)] if num_samples > 1 else [prompt]

    def text(self, number: int, piece: str) -> None:
        self.texts[number] += piece
        if number == 0:
            sys.stdout.write(self.texts[0])
            sys.stdout.flush()
            self.texts[0] = ""

    def finish(self) -> None:
        sys.stdout.write("\n".join(self.texts) + "\n")
        sys.stdout.flush()

    def interrupted(self) -> None:
        sys.stdout.write("\n")


class Lines(Quiet):
    """One JSON line a sample, in the order of the prompts: the prompt's own line, and what became of it."""

    def __init__(self, lines: list[dict[str, Any]], num_samples: int, seed: int, before: int, file: Any) -> None:
        from gpt2cli.complete import InOrder

        self.lines, self.num_samples, self.seed, self.before, self.file = lines, num_samples, seed, before, file
        self.ordered = InOrder(file.write)

    def end(self, number: int, sample: Sample) -> None:
        from gpt2cli.complete import as_line, own_fields

        result = {key: value for key, value in asdict(sample).items() if value is not None}
        which = {"sample": (self.before + number) % self.num_samples} if self.num_samples > 1 else {}
        line = own_fields(self.lines[number]) | which | {"seed": self.seed + number} | result
        self.ordered.put(number, as_line(line))
        self.file.flush()

    def interrupted(self) -> None:
        from gpt2cli.commands import console

        if self.file is not sys.stdout:
            done, whole = self.before + self.ordered.next, self.before + len(self.lines)
            console.note(f"{self.file.name} has {done:,} of {whole:,} results: the same command with --resume goes on")
