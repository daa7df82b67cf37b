"""`gpt2 train`: text -> a run folder whose checkpoints every other tool can load."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gpt2cli.commands import launch
from gpt2cli.commands.settings import overridden, read_config, read_mixture, source_of
from gpt2cli.commands.stop import StopRequest, listen
from gpt2cli.config import CHOICES, PRESETS, GPTConfig, TrainConfig
from gpt2cli.errors import UserError

if TYPE_CHECKING:
    from gpt2cli.commands.console import Bars
    from gpt2cli.distributed import Ranks
    from gpt2cli.model import GPT
    from gpt2cli.plan import Plan

MODEL, BATCH, OPTIMIZER, MACHINE = "Model", "Batch and length", "Optimizer", "Machine"
CADENCE, DATA, SAFETY = "Cadence", "Data", "Safety"
SHAPE = GPTConfig()
TRAIN = TrainConfig()
SHAPE_FIELDS = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "attn_dropout")
RUN_FIELDS = {*SHAPE_FIELDS, *vars(TRAIN), "preset", "init_from"}


def option(panel: str, help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def choice(name: str) -> str:
    return "|".join(CHOICES[name])


def command(
    context: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="INPUT",
            help="Text, .jsonl, .parquet, a folder of them, - for stdin, or a folder of token shards; by default Shakespeare.",
        ),
    ] = None,
    preset: Annotated[str, option(MODEL, "Size: " + ", ".join(PRESETS), metavar="NAME")] = "seed",
    n_layer: Annotated[int, option(MODEL, "Layers.")] = SHAPE.n_layer,
    n_head: Annotated[int, option(MODEL, "Attention heads of a layer.")] = SHAPE.n_head,
    n_embd: Annotated[int, option(MODEL, "Width.")] = SHAPE.n_embd,
    block_size: Annotated[int | None, option(MODEL, "Context; by default the training length, or the preset's.")] = None,
    dropout: Annotated[float, option(MODEL, "Dropout of embeddings and residuals.")] = SHAPE.dropout,
    attn_dropout: Annotated[float, option(MODEL, "Dropout of attention weights (slow on CPU).")] = SHAPE.attn_dropout,
    init_from: Annotated[
        str | None,
        option(MODEL, "Fine-tune this model: a run, a model folder, or a hub name such as gpt2.", metavar="MODEL"),
    ] = None,
    batch_size: Annotated[int | None, option(BATCH, "Rows of a micro-step; by default what fits.")] = TRAIN.batch_size,
    seq_len: Annotated[int | None, option(BATCH, "Tokens of a row; by default 256, or the preset's.")] = TRAIN.seq_len,
    tokens_per_step: Annotated[int, option(BATCH, "Tokens of an update; accumulation follows.")] = TRAIN.tokens_per_step,
    steps: Annotated[int | None, option(BATCH, "Updates.", show_default="150")] = TRAIN.steps,
    epochs: Annotated[float | None, option(BATCH, "Instead of --steps: times through the text.")] = TRAIN.epochs,
    optimizer: Annotated[
        str, option(OPTIMIZER, "Muon: for the blocks' matrices.", metavar=choice("optimizer"))
    ] = TRAIN.optimizer,
    lr: Annotated[float | None, option(OPTIMIZER, "Learning rate; by default by the model's width.")] = TRAIN.lr,
    min_lr: Annotated[float | None, option(OPTIMIZER, "Learning rate at the end; by default a tenth.")] = TRAIN.min_lr,
    warmup_steps: Annotated[int | None, option(OPTIMIZER, "Warm-up; by default a twentieth.")] = TRAIN.warmup_steps,
    schedule: Annotated[str, option(OPTIMIZER, "After the warm-up.", metavar=choice("schedule"))] = TRAIN.schedule,
    weight_decay: Annotated[float, option(OPTIMIZER, "Of matrices.")] = TRAIN.weight_decay,
    grad_clip: Annotated[float, option(OPTIMIZER, "Largest gradient norm.")] = TRAIN.grad_clip,
    device: Annotated[str, option(MACHINE, "Where to train.", metavar=choice("device"))] = TRAIN.device,
    dtype: Annotated[str, option(MACHINE, "Of matrix products.", metavar=choice("dtype"))] = TRAIN.dtype,
    compile: Annotated[str, option(MACHINE, "torch.compile; auto: on CUDA.", metavar=choice("compile"))] = TRAIN.compile,
    attention: Annotated[str, option(MACHINE, "SDPA kernel.", metavar=choice("attention"))] = TRAIN.attention,
    parallel: Annotated[
        str, option(MACHINE, "Several processes: the whole model in each, or a slice.", metavar=choice("parallel"))
    ] = TRAIN.parallel,
    activation_checkpointing: Annotated[
        bool, option(MACHINE, "Less memory, a third more work.", "--activation-checkpointing")
    ] = TRAIN.activation_checkpointing,
    nproc: Annotated[
        int | None, option(MACHINE, "Processes to start on this machine; see also torchrun.", min=1, show_default="1")
    ] = None,
    log_every: Annotated[
        int | None, option(CADENCE, "Steps between lines of metrics.jsonl; by default 1, on a GPU 10.")
    ] = TRAIN.log_every,
    eval_every: Annotated[int, option(CADENCE, "Steps between evaluations; 0: only at the end.")] = TRAIN.eval_every,
    patience: Annotated[
        int, option(CADENCE, "Evaluations without a lower validation loss that end the run; 0: none do.")
    ] = TRAIN.patience,
    eval_tokens: Annotated[int, option(CADENCE, "Validation tokens of an evaluation; 0: all.")] = TRAIN.eval_tokens,
    save_every: Annotated[int, option(CADENCE, "Steps between checkpoints; 0: only at the end.")] = TRAIN.save_every,
    sample_every: Annotated[int, option(CADENCE, "Steps between samples on stderr; 0: never.")] = TRAIN.sample_every,
    sample_prompt: Annotated[str, option(CADENCE, "What they begin with.", show_default="a line break")] = TRAIN.sample_prompt,
    log: Annotated[
        str | None, option(CADENCE, "Metrics for TensorBoard, too.", metavar="tensorboard", show_default="none")
    ] = None,
    mixture: Annotated[
        list[str] | None,
        option(DATA, "Instead of INPUT, once for each: a source and its weight.", "--data", metavar="PATH=WEIGHT"),
    ] = None,
    val_fraction: Annotated[float, option(DATA, "Part of a text held out.")] = TRAIN.val_fraction,
    plain: Annotated[bool, option(DATA, "Encode a literal <|endoftext|> as text.", "--plain")] = TRAIN.plain,
    errors: Annotated[str, option(DATA, "Bytes that are not UTF-8.", metavar=choice("errors"))] = TRAIN.errors,
    split: Annotated[str, option(DATA, "What is held out of a text.", metavar=choice("split"))] = TRAIN.split,
    format: Annotated[str, option(DATA, "Of a text; auto: by its name.", metavar=choice("format"))] = TRAIN.format,
    field: Annotated[str, option(DATA, "Of a JSON or parquet record, where the text is.")] = TRAIN.field,
    train_vocab: Annotated[
        int | None,
        option(DATA, "Train a vocabulary of so many ids on the text, in place of GPT-2's.", show_default="none"),
    ] = TRAIN.train_vocab,
    seed: Annotated[int, option(DATA, "Of weights, dropout and the order of the data.")] = TRAIN.seed,
    cache_dir: Annotated[Path | None, option(DATA, "Where tokenized texts are kept; by default ~/.cache/gpt2cli.")] = None,
    spike: Annotated[
        float, option(SAFETY, "Deviations above the recent mean that make a loss or gradient norm bad; 0: none.")
    ] = TRAIN.spike,
    max_rollbacks: Annotated[int, option(SAFETY, "To an earlier checkpoint when updates stay bad.")] = TRAIN.max_rollbacks,
    deterministic: Annotated[
        bool, option(SAFETY, "The same bits each time on CUDA too; slower.", "--deterministic")
    ] = TRAIN.deterministic,
    max_minutes: Annotated[
        float | None, option(SAFETY, "Save and stop after so long, as SIGTERM would.", min=0, show_default="none")
    ] = None,
    verify_resume: Annotated[
        bool, option(SAFETY, "Prove on a few steps that these settings resume exactly, then stop.", "--verify-resume")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Settings from a .toml file, or a run.json to repeat.", callback=read_config, is_eager=True
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; by default runs/NAME-DATE-TIME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, or the newest under runs/.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Stop after the plan.")] = False,
) -> None:
    """Train a GPT-2 on your text.

    Prints the run folder's path. Its checkpoints are HuggingFace model folders; Ctrl-C saves one before it stops.
    """
    if nproc is not None:
        raise typer.Exit(launch.start(nproc, context.obj))
    launch.follow()
    if log not in (None, "tensorboard"):
        raise UserError(f"--log {log} is unknown; expected tensorboard")
    stop = StopRequest(max_minutes)
    from gpt2cli.commands import console
    from gpt2cli.distributed import joined
    from gpt2cli.together import plan_together

    listen()
    with joined() as ranks:
        console.speak_for(ranks.rank)
        with console.Bars() as bars:
            plan = plan_together(ranks, lambda: decide(context, ranks, bars), cache=cache_dir, on_tokenize=bars.tokenized)
        status = prove(plan) if verify_resume and not dry_run else carry_out(plan, stop, dry_run, ranks, log)
    raise typer.Exit(status)


def decide(context: typer.Context, ranks: Ranks, bars: Bars) -> Plan:
    """The plan that the command line and its settings file ask for."""
    from gpt2cli import checkpoint
    from gpt2cli.commands import console
    from gpt2cli.plan import make_plan
    from gpt2cli.resume import resume_plan

    values = {name: value for name, value in context.params.items() if name not in overridden(context)}
    # Before 0.29 typer makes Paths only of what it calls `command` with, and has strings here.
    values |= {name: Path(values[name]) for name in ("data", "out", "cache_dir") if values.get(name) is not None}
    given = {name: value for name, value in values.items() if source_of(context, name) != "DEFAULT"}
    data, out, cache = values.get("data"), values["out"], values["cache_dir"]
    if values.get("mixture"):
        if data is not None:
            raise UserError(f"INPUT ({data}) and --data both say what to train on: give one of them")
        data = read_mixture(values["mixture"])
    if values["init_from"] and source_of(context, "preset") == "COMMANDLINE":
        raise UserError("--preset and --init-from both say what the model is: give one of them")
    if ranks.world_size > 1 and values["verify_resume"]:
        raise UserError("--verify-resume is for one process")
    if given.get("parallel") == "fsdp" and source_of(context, "parallel") == "COMMANDLINE" and not ranks.is_group:
        raise UserError("--parallel fsdp is for several processes: add --nproc N, or start it with torchrun")
    if launch.restarts() and out is None:
        raise UserError("torchrun --max-restarts needs --out, to find the run again that it goes on with")
    resume = values["resume"] or (launch.restarts() and (out / "run.json").exists())
    world = {"world_size": ranks.world_size}
    if resume and not (out and not (out / "run.json").exists()):
        changes = {name: value for name, value in given.items() if name in RUN_FIELDS}
        return resume_plan(out, changes, data=data, cache=cache, on_skip=console.note, on_tokenize=bars.tokenized, **world)
    if resume and data is None:  # more likely a slip of the pen than a wish for Shakespeare
        others = "".join(f", or {advice}" for advice in checkpoint.runs_near(out))
        raise UserError(f"{out} holds no run: give INPUT to start one there{others}")
    if resume:
        console.note(f"{out} holds no run yet: starting from zero")
    if data is None:
        console.note("no INPUT: training on the embedded works of Shakespeare")
    plan = make_plan(
        data,
        {name: given[name] for name in SHAPE_FIELDS if name in given},
        TrainConfig(**{name: value for name, value in values.items() if name in vars(TRAIN)}),
        preset=values["preset"],
        init_from=values["init_from"],
        out=out,
        cache=cache,
        on_tokenize=bars.tokenized,
        on_download=bars.downloaded,
        **world,
    )
    of_file = "DEFAULT_MAP" in (source_of(context, "data"), source_of(context, "mixture"))
    if of_file and context.meta.get("data_sha256", plan.data_sha256) != plan.data_sha256:
        console.note(f"{values['config']}: its data has changed since that run")
    return plan


def carry_out(plan: Plan, stop: StopRequest, dry_run: bool, ranks: Ranks, log: str | None) -> int:
    """Returns the exit status."""
    from gpt2cli import device
    from gpt2cli.atomic import is_full
    from gpt2cli.commands import console
    from gpt2cli.commands.board import Board
    from gpt2cli.train import train

    ranks.connect(plan.device)
    sample = sampler(plan)
    board = Board(plan.out, plan.first_step) if log and ranks.is_first else None
    rate = device.matmul_rate(plan.device, plan.train.dtype) * ranks.world_size
    console.show_plan(plan, device.describe(plan.device), rate)
    if dry_run:
        return 0
    last = None
    with console.TrainDisplay(plan, rate) as display, stop, contextlib.ExitStack() as stack:
        if board:
            stack.callback(board.close)
        try:
            for last in train(plan, should_stop=stop.asked, sample=sample, ranks=ranks):
                display.show(last)
                if board:
                    board.show(last)
        except OSError as error:
            if is_full(error):
                raise not_saved(plan, error) from error
            raise
    if ranks.is_first:
        console.print_if_read(plan.out)
        report(plan, last.step if last else plan.first_step)
    return say_how_it_ended(plan, last.step if last else None, stop, ranks)


def not_saved(plan: Plan, error: OSError) -> UserError:
    from gpt2cli import checkpoint

    newest = next(iter(checkpoint.checkpoints(plan.out)), None)
    stands = f"{newest} stands, what came after it is lost" if newest else "nothing of the run is saved"
    return UserError(f"the disk is full ({error}): {stands}; free some space, and then: gpt2 train --resume --out {plan.out}")


def say_how_it_ended(plan: Plan, got_to: int | None, stop: StopRequest, ranks: Ranks) -> int:
    """The last lines, and the exit status; `got_to` is the step this session reached, None where there was nothing to do."""
    from gpt2cli.commands import console

    step = plan.first_step if got_to is None else got_to
    if ranks.any(step < plan.steps and stop.was_asked):
        done = f"after step {step:,}, which is saved" if step else "before the first step"
        console.note(f"stopped{stop.by} {done}; continue with: gpt2 train --resume --out {plan.out}{plan.nproc}")
        if stop.by and launch.restarts():
            return 0  # torchrun would start it again
        return 128 + (stop.number or signal.SIGTERM)
    if step < plan.steps:
        console.note(f"{plan.out} ended after step {step:,}, since validation had turned; --resume --patience 0 goes on")
    elif got_to is None:
        console.note(f"{plan.out} is finished: {plan.steps:,} steps; go on with --steps N")
    console.note(f"sample from it with: gpt2 sample {plan.out} --prompt ...")
    return 0


def report(plan: Plan, step: int) -> None:
    """What was reached: the curve, and the best checkpoint."""
    from gpt2cli import checkpoint, curve, metrics
    from gpt2cli.commands import console

    lines = [line for line in metrics.read(plan.out) if line["step"] <= step]
    console.show_curve(curve.draw(lines))
    with contextlib.suppress(OSError):
        if curve.save(lines, plan.out / "loss.png"):
            console.note(f"the curve as a picture: {plan.out / 'loss.png'}")
    if best := checkpoint.best(plan.out):
        loss = checkpoint.evaluation(best).get("val_loss")
        told = f", validation loss {loss:.4f}" if isinstance(loss, float) else ""
        console.note(f"best checkpoint: {best}{told}")


def prove(plan: Plan) -> int:
    """Tell whether a run on this plan can be resumed exactly; returns the exit status."""
    from gpt2cli.commands import console
    from gpt2cli.verify import verify_resume

    verdict = verify_resume(plan)
    half = f"{verdict.steps // 2} steps, a resume and {verdict.steps - verdict.steps // 2} steps"
    if verdict.different:
        raise UserError(
            f"{verdict.steps} steps are not {half}: {len(verdict.different)} of {verdict.tensors} tensors differ, by at most "
            f"{verdict.largest_difference:.2g}, the first is {verdict.different[0]}; on CUDA add --deterministic"
        )
    console.note(f"proved: {verdict.steps} steps equal {half}, bit for bit in all {verdict.tensors} tensors")
    return 0


def sampler(plan: Plan) -> Any:
    """What `train` calls to look at the model: one continuation of the prompt."""
    from gpt2cli.device import in_any_order
    from gpt2cli.generate import SamplingConfig, generate

    encoding, prompt = plan.encoding, plan.train.sample_prompt
    ids = encoding.encode(prompt, special=True)
    if plan.train.sample_every and not 0 < len(ids) <= plan.model.block_size:
        raise UserError(f"--sample-prompt has {len(ids):,} tokens; expected 1 to {plan.model.block_size:,}")

    def sample(model: GPT) -> Sequence[str]:
        config = SamplingConfig(max_new_tokens=min(100, max(1, model.config.block_size - len(ids))))
        with in_any_order():
            new = [row[0] for row in generate(model, ids, config, eot=encoding.eot, n_vocab=encoding.n_vocab)]
        return [prompt + encoding.decode(token for token in new if token is not None)]

    return sample
