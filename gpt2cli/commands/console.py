"""All that rich draws: on stderr, plain where stderr is not a terminal. stdout carries only the product."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn, cast

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from gpt2cli.errors import size

if TYPE_CHECKING:
    from gpt2cli.metrics import StepMetrics
    from gpt2cli.plan import Plan

LINE_SECONDS = 30.0  # between lines of progress where there is no terminal


class _Stderr:
    """The process's own, whichever it is by then. A terminal that went away, or a pipe that nobody reads, costs what would
    have been told there, and nothing else."""

    @property
    def _file(self) -> Any:  # below what a live line puts in its place; the process may have none
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr) or io.StringIO()

    @property
    def rich_proxied_file(self) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


stderr = Console(file=cast("IO[str]", _Stderr()), highlight=False, soft_wrap=True)


def speak_for(rank: int) -> None:
    """Of several processes only the first speaks; the others have nothing to say but their own errors."""
    stderr.quiet = rank > 0


def error(message: str) -> None:
    quiet, stderr.quiet = stderr.quiet, False
    stderr.print(Text(f"error: {message}", style="bold red"))
    stderr.quiet = quiet


def note(message: str) -> None:
    stderr.print(Text(message, style="dim"))


def leave(code: int) -> NoReturn:
    """End the process now, whatever its threads are doing, but leave the terminal's cursor visible."""
    stderr.show_cursor(True)
    os._exit(code)


def print_if_read(line: object) -> None:
    """On stdout, and no error where whoever was to read it has gone."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the interpreter tries it again at its end


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


def seconds(value: float) -> str:
    """3725 -> 1:02:05"""
    minutes, s = divmod(int(value + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Bars:
    """Progress of bytes, with rate and time left: a bar for each thing on a terminal, elsewhere a line when it begins and
    every half minute."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._told = self._began = 0.0
        self._before = 0  # bytes, done when the newest thing began

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def tokenized(self, what: str, done: int, total: int) -> None:
        self._report(what, done, total)

    def downloaded(self, file: str, done: int, total: int) -> None:
        self._report(f"downloading {file}", done, total)

    def _report(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total or None)
            self._told = self._began = time.monotonic()
            self._before = done
            if not stderr.is_terminal:
                note(f"{what} ({size(total)}{f', {size(done)} of it done before' if done else ''})" if total else what)
        elif not stderr.is_terminal and time.monotonic() > self._told + LINE_SECONDS:
            self._told = time.monotonic()
            rate = max(1.0, (done - self._before) / (self._told - self._began))
            left = seconds((total - done) / rate)
            note(f"{what}: {size(done)} of {size(total)}, {size(rate)} a second, {left} left")
        self._progress.update(self._tasks[what], completed=done, total=total or None)


@contextlib.contextmanager
def at_work() -> Iterator[Callable[[str], None]]:
    """What it gives is to be told what is done next: one line that changes on a terminal, elsewhere a line every half minute.
    Nothing is drawn in between, since that would be timed along."""
    live = Live(console=stderr, auto_refresh=False, transient=True) if stderr.is_terminal else None
    told = time.monotonic()

    def tell(what: str) -> None:
        nonlocal told
        if live:
            live.update(Text(what, style="dim"), refresh=True)
        elif time.monotonic() > told + LINE_SECONDS:
            told = time.monotonic()
            note(what)

    with live or contextlib.nullcontext():
        yield tell


# ==== train ====


def show_plan(plan: Plan, machine: str, rate: float) -> None:
    """What a run will do. `rate` is the device's measured FLOP/s."""
    model, train = plan.model, plan.train
    expected = (plan.steps - plan.first_step) * plan.flops / (0.5 * rate)
    rows = [
        ("model", f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, context {model.block_size:,}: "
                  f"{model.num_parameters():,} parameters" + (f", from {plan.init_from}" if plan.init_from else "")),
        *data_rows(plan),
        ("steps", f"{plan.steps:,} of {train.tokens_per_step:,} tokens ({plan.accumulation} x {plan.batch_size} rows of "
                  f"{plan.seq_len}), {plan.steps * train.tokens_per_step / plan.train_tokens:.2f} epochs"
                  + (f"; goes on after step {plan.first_step:,}, from {plan.resume_from}" if plan.resume_from else "")),
        *([("ranks", f"{plan.world_size}, {train.parallel}")] if plan.world_size > 1 else []),
        ("device", f"{machine}, {train.dtype}, attention {train.attention}, compile {train.compile}"),
        ("memory", f"about {size(plan.memory)}{' in each rank' if plan.world_size > 1 else ''}; disk about {size(plan.disk)}"),
        ("time", f"about {seconds(expected)}, guessed from {rate / 1e9:,.0f} GFLOP/s of matrix products; better after 5 steps"),
        ("out", str(plan.out)),
    ]  # fmt: skip
    for name, value in rows:
        stderr.print(Text.assemble((f"{name:<8}", "cyan"), value))
    for message in plan.notes:
        stderr.print(Text(f"note: {message}", style="yellow"))


def data_rows(plan: Plan) -> list[tuple[str, str]]:
    """What is trained on; of a mixture every source, with its share of the rows and how often it will be seen."""
    counts = f"{plan.train_tokens:,} training and {plan.val_tokens:,} validation tokens"
    if len(plan.sources) == 1:
        return [("data", f"{plan.sources[0].given}: {counts}")]
    seen = plan.steps * plan.train.tokens_per_step
    return [("data", f"{len(plan.sources)} sources: {counts}")] + [
        ("", f"{source.share:.1%} {source.given}: {source.train_tokens:,} tokens, "
             f"{seen * source.share / source.train_tokens:.2f} epochs")
        for source in plan.sources
    ]  # fmt: skip


class TrainDisplay:
    """Shows a run: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, plan: Plan, rate: float) -> None:
        self.plan, self.rate = plan, rate
        self.val: StepMetrics | None = None
        self.live = Live(console=stderr, auto_refresh=False, transient=True) if stderr.is_terminal else None
        self._began = time.perf_counter()
        self._first = plan.first_step
        self._warm = False
        self._estimated = False
        self._shown = float("-inf")

    def __enter__(self) -> TrainDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def show(self, metrics: StepMetrics) -> None:
        now = time.perf_counter()
        done = max(1, metrics.step - self._first)
        left: float | None = (now - self._began) / done * (self.plan.steps - metrics.step)
        warm = self._warm
        if not warm:
            if self.plan.train.compile == "on":  # the first steps compile, so that it is the others that tell
                left = None
            if metrics.step > self.plan.first_step:
                self._warm, self._began, self._first = True, now, metrics.step
        if metrics.val_loss is not None:
            self.val = metrics
        if self.live:
            self.live.update(self._line(metrics, left), refresh=True)
        if warm and done >= 5 and left and not self._estimated:
            self._estimated = True
            self._say(f"about {seconds(left)} left, measured over {done} steps")
        elif not self.live and (now - self._shown > 5 or metrics.step == self.plan.steps):
            self._shown = now
            self._say(self._line(metrics, left).plain)
        if metrics.val_loss is not None:
            bits = f", {metrics.val_bits_per_byte:.3f} bits a byte" if metrics.val_bits_per_byte else ""
            self._say(f"step {metrics.step:,}: validation loss {metrics.val_loss:.4f}{bits}")
        for event in metrics.events:
            stderr.print(Text(f"note: {event}", style="yellow"))
        for sample in metrics.samples:
            stderr.print(Text(f"--- step {metrics.step:,} ---\n{sample}", style="green"))

    def _say(self, message: str) -> None:
        stderr.print(Text(message, style="dim"))

    def _line(self, metrics: StepMetrics, left: float | None) -> Text:
        mfu = metrics.tokens_per_second * self.plan.model.flops_per_token(self.plan.seq_len) / self.rate
        parts = [
            f"step {metrics.step:,}/{self.plan.steps:,}",
            f"loss {metrics.loss:.4f}",
            *([f"val {self.val.val_loss:.4f}"] if self.val else []),
            *([f"lr {metrics.lr:.1e}"] if not self.live else []),
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            f"{mfu:.0%} of the matmul rate" if not self.live else f"{mfu:.0%} MFU",
            *([size(metrics.memory)] if metrics.memory else []),
            *([f"ETA {seconds(left)}"] if left is not None else []),
        ]
        return Text("  ".join(parts)) if not self.live else in_a_row(parts, metrics.step / self.plan.steps, stderr.width)


def in_a_row(parts: Sequence[str], done: float, width: int) -> Text:
    """Of a live line what fits `width` columns, with a bar in the room that is left."""
    line = "  ".join(parts)
    line = line if len(line) < width else " ".join(parts)
    bar = min(20, max(0, width - len(line) - 3))
    filled = round(bar * done)
    return Text(f"{'━' * filled}{'─' * (bar - filled)}{'  ' if bar else ''}{line}")


def show_curve(drawn: Sequence[str]) -> None:
    """The loss over the steps, as `curve.draw` has it."""
    if drawn:
        note("loss, nats a token: · training, ○ validation")
    for line in drawn:
        stderr.print(Text(line))


# ==== tables ====


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, since it is the product."""
    drawn = Table(title=escape(title), title_justify="left")
    for n, name in enumerate(header):
        drawn.add_column(name, justify="left" if n == 0 else "right")
    for row in rows:
        drawn.add_row(*row)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(drawn)


def show_model(facts: dict[str, Any]) -> None:
    """What `identify.describe` found, on stdout, since it is the product."""
    rows = {"format": facts["format"], "parameters": f"{facts['parameters']:,}", "dtype": facts["dtype"]}
    rows |= {name: f"{value:,}" if type(value) is int else str(value) for name, value in facts["config"].items()}
    rows |= {"tokenizer": facts["tokenizer"] or "none", "size": size(facts["bytes"])} | facts["facts"]
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    for note in facts["notes"]:
        print(f"note: {note}")


# ==== tokens ====


def show_tokens(tokens: Iterable[tuple[int, bytes]]) -> None:
    """Ids and bytes on stdout: in colour where it is a terminal that has any, else one a line, as `id<TAB>JSON string`."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    if console.is_terminal and console.color_system and not console.no_color:
        _draw_tokens(tokens, console)
        return
    lines: dict[int, str] = {}  # the same few thousand come again and again
    for n, token in tokens:
        if n not in lines:
            quoted = json.dumps(token.decode("utf-8", "backslashreplace"), ensure_ascii=False)
            lines[n] = f"{n}\t{_printable(quoted)}\n"
        sys.stdout.write(lines[n])
    sys.stdout.flush()  # now, while a closed pipe is still ours to notice


def _draw_tokens(tokens: Iterable[tuple[int, bytes]], console: Console) -> None:
    """The text with two backgrounds in turn, each token's id behind it; lines break where the text's do."""
    drawn = Text()
    for place, (n, token) in enumerate(tokens):
        drawn.append(_printable(token.decode("utf-8", "backslashreplace")), "black on yellow" if place % 2 else "black on cyan")
        drawn.append(f"{n} ", "dim")
        breaks = token.endswith(b"\n")
        if breaks or len(drawn) > 4096:
            console.print(drawn, end="\n" if breaks else "")
            drawn = Text()
    console.print(drawn, end="\n" if drawn else "")


def _printable(text: str) -> str:
    """Line breaks, control characters and the like as JSON writes them: none reaches the terminal."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)
