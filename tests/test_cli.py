"""The program itself: exit codes, streams, files, and one red line for each mistake."""

import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from rich.console import Console

import gpt2cli
from gpt2cli import checkpoint
from gpt2cli.commands import console
from gpt2cli.commands.stop import StopRequest
from gpt2cli.config import GPTConfig, SamplingConfig, TrainConfig
from gpt2cli.distributed import joined
from gpt2cli.metrics import StepMetrics

from .conftest import QUICK, TINY

PROGRAM = [sys.executable, "-m", "gpt2cli"]


def test_help_is_instant_and_imports_no_torch():
    check = "import sys; from gpt2cli.commands import app; app.run(['--help']); app.run(['train', '--help']); "
    check += "bad = {'torch', 'transformers', 'numpy', 'tiktoken'} & set(sys.modules); assert not bad, bad"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("tokenize", "train", "sample", "convert", "bench"):
        assert command in done.stdout
    for panel in ("Model", "Optimizer", "Machine", "Cadence"):
        assert panel in done.stdout


def test_tokenize_does_not_import_torch(text_file):
    check = f"import sys; from gpt2cli.commands import app; assert app.run(['tokenize', {str(text_file)!r}]) == 0; "
    check += "bad = {'torch', 'transformers'} & set(sys.modules); assert not bad, bad"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "input-tokens\n"


def test_training_and_sampling_do_not_import_transformers(text_file):
    arguments = ["train", str(text_file), *QUICK, "--steps", "1", "--out", "run"]
    check = f"import sys; from gpt2cli.commands import app; assert app.run({arguments!r}) == 0; "
    check += "assert app.run(['sample', 'run', '--prompt', 'x', '--max-new-tokens', '3']) == 0; "
    check += "assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_and_wrong_usage(gpt2):
    assert gpt2("--version").out == f"gpt2 {gpt2cli.__version__}\n"
    assert gpt2("train", "--no-such-option").code == 2
    assert gpt2("sample", "--max-new-tokens", "many").code == 2


def test_defaults_of_options_are_the_dataclasses():
    import inspect

    from gpt2cli.commands import sample, train

    for command, configs in ((train.command, (GPTConfig(), TrainConfig())), (sample.command, (SamplingConfig(),))):
        parameters = inspect.signature(command).parameters
        for config in configs:
            for name, value in vars(config).items():
                if name in parameters and name != "block_size":  # decided by the training length
                    assert parameters[name].default == value, name


def metrics_of(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# ==== the road ====


def test_tokenize_writes_shards_and_tells_their_folder(gpt2, text_file):
    done = gpt2("tokenize", text_file, "--out", "tokens", "--val-fraction", "0.1")
    assert (done.code, done.out) == (0, "tokens\n") and "1 documents" in done.err
    assert sorted(p.name for p in Path("tokens").iterdir()) == ["manifest.json", "train_000000.bin", "val_000000.bin"]
    as_json = json.loads(gpt2("tokenize", text_file, "--out", "tokens", "--val-fraction", "0.1", "--json").out)
    assert as_json["train_bytes"] + as_json["val_bytes"] == text_file.stat().st_size
    assert as_json["sources"][0]["path"] == str(text_file) and as_json["policy"]["val_fraction"] == 0.1


def test_the_whole_road(gpt2, text_file):
    done = gpt2("train", text_file, *QUICK, "--steps", 6, "--eval-every", 3, "--sample-every", 3, "--out", "run")
    assert (done.code, done.out) == (0, "run\n")
    for shown in (
        "1,634,720 parameters",
        "6 of 256 tokens (2 x 4 rows of 32)",
        "validation loss",
        "--- step 3 ---",
        "tokens/s",
    ):
        assert shown in done.err, shown
    assert "\x1b" not in done.err

    again = gpt2("train", "--resume", "--out", "run")
    assert (again.code, again.out) == (0, "run\n") and "finished" in again.err

    first = gpt2("sample", "run", "--prompt", "First ", "--top-k", 5, "--max-new-tokens", 9)
    assert first.code == 0 and first.out.startswith("First ") and "9 tokens" in first.err
    assert gpt2("sample", "run", "--prompt", "First ", "--top-k", 5, "--max-new-tokens", 9).out == first.out
    result = json.loads(
        gpt2("sample", "run", "--prompt", "First ", "--top-k", 5, "--max-new-tokens", 9, "--num-samples", 2, "--json").out
    )
    assert set(result) == {"model", "seed", "prompt", "samples", "tokens_per_second", "time_to_first_token"}
    assert len(result["samples"]) == 2 and len(result["samples"][0]["tokens"]) == 9
    assert first.out == "First " + result["samples"][0]["text"] + "\n"
    assert result["samples"][0]["finish_reason"] == "length"

    done = gpt2("convert", "run", "--to", "hf", "--out", "exported", "--json")
    verdict = json.loads(done.out)
    assert done.code == 0 and verdict["logits_error"] < 1e-4 and verdict["parameters"] == 1_634_720
    assert gpt2("sample", "exported", "--prompt", "First ", "--top-k", 5, "--max-new-tokens", 9).out == first.out


def test_two_samples_are_told_apart_and_the_context_ends_them(gpt2, run_folder):
    done = gpt2("sample", run_folder, "--prompt", "First Citizen", "--num-samples", 2)
    assert done.out.count("First Citizen") == 2 and "--- sample 2 ---" in done.out
    assert "end of the context" in done.err
    reasons = json.loads(gpt2("sample", run_folder, "--prompt", "a", "--ignore-eos", "--json").out)["samples"]
    assert [(sample["finish_reason"], len(sample["tokens"])) for sample in reasons] == [("context", 32)]
    slide = gpt2("sample", run_folder, "--prompt", "a", "--ignore-eos", "--overflow", "slide", "--max-new-tokens", 40, "--json")
    assert len(json.loads(slide.out)["samples"][0]["tokens"]) == 40


def test_a_prompt_comes_from_a_file_or_a_pipe(gpt2, run_folder):
    Path("prompt.txt").write_text("O Romeo", encoding="utf-8")
    assert gpt2("sample", run_folder, "--prompt-file", "prompt.txt", "--max-new-tokens", 2).out.startswith("O Romeo")
    command = [*PROGRAM, "sample", str(run_folder), "--max-new-tokens", "2"]
    done = subprocess.run(command, input="O Juliet", capture_output=True, text=True, check=True)
    assert done.stdout.startswith("O Juliet")


def test_the_embedded_text_is_the_default_and_a_dry_run_writes_nothing(gpt2):
    done = gpt2("train", "--dry-run")
    assert done.code == 0 and done.out == "" and "Shakespeare" in done.err and "30,044,544 parameters" in done.err
    assert not Path("runs").exists()
    assert "context 1,024" in gpt2("train", "--dry-run", "--preset", "gpt2").err
    assert "124,439,808" in gpt2("train", "--dry-run", "--preset", "gpt2").err


def test_settings_come_from_a_toml_file_or_a_run_and_the_command_line_wins(gpt2, text_file, run_folder):
    Path("config.toml").write_text(f'input = "{text_file.as_posix()}"\nn-layer = 3\nn_head = 2\nn_embd = 32\nsteps = 7\n')
    err = gpt2("train", "--config", "config.toml", "--steps", 9, "--dry-run").err
    assert "3 layers, 2 heads, 32 wide" in err and "9 of 2,048" in err and "100 kB" not in err
    done = gpt2("train", "--config", run_folder / "run.json", "--out", "again")
    assert done.code == 0
    losses = [
        [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run_folder, Path("again"))
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert " 1.0" in gpt2("train", "--config", run_folder / "run.json", "--epochs", 1, "--dry-run").err
    assert "124,439,808" in gpt2("train", "--config", run_folder / "run.json", "--preset", "gpt2", "--dry-run").err
    Path("config.toml").write_text("layers = 3\n")
    assert "unknown setting 'layers'" in gpt2("train", "--config", "config.toml").err
    Path("config.toml").write_text("n-layer = true\n")
    assert "n_layer is true; expected what --n-layer takes" in gpt2("train", "--config", "config.toml").err
    Path("config.toml").write_text("n-layer = [3]\n")
    assert "n_layer is [3]; expected what --n-layer takes" in gpt2("train", "--config", "config.toml").err
    Path("config.toml").write_text("plain = 3\n")
    assert gpt2("train", "--config", "config.toml").code == 2
    Path("config.toml").write_text("deterministic = true\nn-layer = 3.0\n")
    assert "3 layers" in gpt2("train", text_file, "--config", "config.toml", "--dry-run").err


def test_the_values_of_a_command_line_may_be_strings_as_typers_before_0_29_have_them(text_file):
    from gpt2cli.commands import app, train

    main = typer.main.get_command(app.app)
    line = [str(text_file), *QUICK, "--out", "run", "--cache-dir", "cache"]
    context = main.commands["train"].make_context("train", line, parent=typer.Context(main))
    context.params |= {name: str(context.params[name]) for name in ("data", "out", "cache_dir")}
    with joined() as ranks, console.Bars() as bars:
        plan = train.decide(context, ranks, bars)
    assert plan.out == Path("run") and Path("cache").is_dir()


def test_resume_with_the_same_command_line_starts_goes_on_and_finds_the_newest_run(gpt2, text_file):
    command = ("train", text_file, *QUICK, "--out", "runs/mine", "--resume")
    assert "no run yet" in gpt2(*command, "--steps", 2).err
    done = gpt2(*command, "--steps", 3)
    assert done.code == 0 and "from 2 to 3" in done.err and "step 3/3" in done.err
    assert gpt2("train", "--resume", "--steps", 4).out == "runs/mine\n"
    assert "different run" in gpt2(*command, "--seed", 5).err
    assert gpt2(*command, "--steps", 4, "--compile", "auto", "--tokens-per-step", 256).code == 0
    assert "already done" in gpt2(*command, "--steps", 1).err
    steps = [
        json.loads(line)["step"] for line in Path("runs/mine/metrics.jsonl").read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == [1, 2, 3, 4]


def test_the_samples_of_a_deterministic_run_need_no_deterministic_kernels(gpt2, text_file, monkeypatch):
    """CUDA has none for the sums of top-p, and torch would refuse."""
    room, asked = importlib.import_module("gpt2cli.generate"), []  # the package has a function of this name
    generate = room.generate
    look = lambda *a, **k: (asked.append(torch.are_deterministic_algorithms_enabled()), generate(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(room, "generate", look)
    done = gpt2("train", text_file, *QUICK, "--steps", 1, "--deterministic", "--sample-every", 1, "--out", "run")
    assert done.code == 0 and asked == [False] and torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_an_interrupt_saves_and_the_run_goes_on_as_if_nothing_had_been(gpt2, text_file, number, code):
    command = ["train", str(text_file), *QUICK, "--steps", "30", "--eval-every", "0", "--save-every", "0"]
    code_of = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whoever started the tests may ignore it
    code_of += "import time; from gpt2cli.run import Run; step = Run.step\n"  # slowly, so that the signal comes in between
    code_of += "Run.step = lambda self: (time.sleep(0.1), step(self))[1]\nfrom gpt2cli.__main__ import main; main()"
    program = [sys.executable, "-c", code_of]
    process = subprocess.Popen([*program, *command, "--out", "run"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out == "run\n" and "--resume" in err and "Traceback" not in err
    (saved,) = Path("run").glob("step-*")
    step = int(saved.name[5:])
    assert gpt2("train", "--resume", "--out", "run").code == 0
    assert gpt2(*command, "--out", "whole").code == 0
    losses = [
        [json.loads(line).get("loss") for line in Path(f"{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("run", "whole")
    ]
    assert losses[0] == losses[1] and 3 <= step < 30


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("train", ""), "an argument is empty"),
        (("convert", ""), "an argument is empty"),
        (("train", "run", "--dry-run"), "run is a run, not a text: go on with it by gpt2 train --resume --out run"),
        (("train", "--data", "input.txt=1", "--data", "gone.txt=2", "--dry-run"), "gone.txt does not exist"),
        (("train", "--config", "out.toml"), "'out' is for the command line only"),
        (("train", "--config", "a.yaml"), "a.yaml: expected a .toml file"),
        (("bench", "--json", "attention"), "gpt2 bench attention --json"),
        (("bench", "tokenize", "latin.txt"), "latin.txt is not a text in UTF-8: bad byte at offset 2"),
        (("train", "--config", "gone.toml"), "--config gone.toml: No such file or directory\n"),
        (("train", "--dry-run", "--out", "a.yaml/run"), "a.yaml is a file\n"),
        (("tokenize", "input.txt", "--out", "a.yaml/run"), "a.yaml is a file\n"),
        (("convert", "run", "--out", "a.yaml/run"), "a.yaml is a file\n"),
        (("convert", "empty.pt", "--info"), "it ends too early\n"),
        (("sample", "input.txt", "--prompt", "x"), "input.txt is a file, not a model folder\n"),
        (("sample", "empty.pt", "--prompt", "x"), "make one of it with 'gpt2 convert empty.pt --out FOLDER'"),
        (("sample", "runs/typo", "--prompt", "x"), "there is no runs/typo; name one of: runs/mine\n"),
    ],
)
def test_what_newcomers_tried_is_told(gpt2, text_file, arguments, says):
    for run in ("run", "runs/mine"):
        Path(run).mkdir(parents=True)
        Path(run, "run.json").write_text("{}")
    Path("empty.pt").touch()
    Path("out.toml").write_text('out = "there"')
    Path("a.yaml").write_text("steps: 3")
    Path("latin.txt").write_bytes(b"tr\xe8s")
    done = gpt2(*arguments)
    assert done.code == 1 and says in done.err and done.out == ""


def test_a_folder_that_may_not_be_written_to_is_told_at_once(gpt2, text_file, monkeypatch):
    Path("theirs").mkdir()
    access = os.access  # root, as whom tests are often run, may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "theirs" and access(path, mode))
    done = gpt2("train", text_file, *QUICK, "--out", "theirs/run")
    assert done.code == 1 and "theirs may not be written to" in done.err and "tokenizing" not in done.err


def test_a_cache_that_cannot_be_made_is_told_before_the_text_is_read(gpt2, text_file):
    Path("file").touch()
    done = gpt2("train", text_file, *QUICK, "--cache-dir", "file/cache")
    assert done.code == 1 and "file is a file" in done.err and "by --cache-dir" in done.err and "reading" not in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere numba is not asked for")
def test_a_warning_of_ours_is_a_note_and_one_of_a_library_is_its_own(run_folder, capsys):
    from gpt2cli.commands import app

    pytest.importorskip("numba")
    command = [sys.executable, "-m", "gpt2cli", "sample", str(run_folder), "--prompt", "x", "--max-new-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1"})
    assert done.stderr.startswith("note: numba does not work here") and "Warning" not in done.stderr
    app.show_warning("old", DeprecationWarning, torch.__file__, 3)
    assert "DeprecationWarning: old" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    "room, heard", [("gpt2cli.commands.app", False), ("numpy.linalg", False), ("gpt2cli.commands.board", True)]
)
def test_a_signal_while_a_program_is_loaded_shows_no_traceback(room, heard, number):
    """Sent when `room` is looked for: before the program has begun, while torch is loaded, and in a command."""
    program = f"""
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it
class Look:
    def find_spec(self, name, *_):
        if name == "{room}":
            os.kill(os.getpid(), signal.{number})
sys.meta_path.insert(0, Look())
from gpt2cli.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, "train", "--dry-run"], capture_output=True, text=True)
    number = getattr(signal, number)
    assert done.returncode == (128 + number if heard else -number) and done.stdout == ""
    assert "Traceback" not in done.stderr and (heard or not done.stderr)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_terminal_that_is_closed_counts_once(monkeypatch):
    """Its SIGHUP comes from the shell and from the system."""
    left = []
    monkeypatch.setattr(console, "leave", left.append)
    stop = StopRequest(None)
    for _ in range(2):
        stop._ask(signal.SIGHUP, None)
    assert stop.was_asked and not left
    stop._ask(signal.SIGINT, None)
    assert left[-1] == 130


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_run_whose_readers_have_gone_trains_to_the_end(text_file):
    command = [sys.executable, "-m", "gpt2cli", "train", "input.txt", *QUICK, "--steps", "2", "--out", "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and checkpoint.is_whole(Path("run/step-000002"))


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_closed_terminal_ends_a_sample_like_sigterm(run_folder):
    program = [
        sys.executable,
        "-c",
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\nfrom gpt2cli.__main__ import main; main()",
    ]
    command = [*program, "sample", str(run_folder), "--prompt", "x", "--overflow", "slide", "--ignore-eos"]
    process = subprocess.Popen([*command, "--max-new-tokens", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 129 and out.endswith(b"\n") and b"Traceback" not in err


def test_a_runs_folder_says_what_its_run_json_and_its_checkpoint_say(gpt2, run_folder):
    shown = gpt2("train", "--config", run_folder, "--dry-run").err
    assert shown.count("\n") > 5 and "2 layers" in shown
    done = gpt2("convert", run_folder, "--tokenizer", run_folder, "--out", "model")
    assert done.code == 0 and Path("model/tokenizer.json").exists()


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error(run_folder):
    command = [*PROGRAM, "sample", str(run_folder), "--prompt", "x", "--overflow", "slide", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0 and "Traceback" not in err and "error" not in err.lower()


def test_a_live_line_has_a_bar_in_the_room_that_is_left():
    from gpt2cli.commands.console import in_a_row

    parts = ["step 75/80", "loss 2.9035", "val 5.2281", "1,123 tokens/s", "61% MFU", "1.7 GB", "ETA 0:10"]
    assert in_a_row(parts, 0.5, 120).plain == "━" * 10 + "─" * 10 + "  " + "  ".join(parts)
    assert in_a_row(parts, 0.5, 80).plain == "  ".join(parts)
    assert in_a_row(parts, 0.5, 70).plain == " ".join(parts)


@pytest.mark.parametrize("compile", ["on", "off"])
def test_the_time_left_is_measured_behind_the_first_step(compile, monkeypatch):
    """It may compile for long; where it cannot, it tells all that is known."""
    now, said = [100.0], io.StringIO()
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(console, "stderr", Console(file=said, width=200))
    plan = SimpleNamespace(steps=1000, first_step=0, seq_len=8, model=GPTConfig(), train=TrainConfig(compile=compile))
    display = console.TrainDisplay(plan, rate=1e12)

    def shown(step, seconds_later):
        now[0] += seconds_later
        said.truncate(said.seek(0))
        display.show(StepMetrics(step, 4.0, 1e-3, 1.0, 8 * step, 80.0, now[0]))
        return said.getvalue().strip()

    assert shown(1, 10).endswith("80 tokens/s  1% of the matmul rate" + ("  ETA 2:46:30" if compile == "off" else ""))
    assert shown(4, 6).endswith("ETA 33:12")  # 3 steps took 6 s
    assert shown(11, 14) == "about 32:58 left, measured over 10 steps"  # and that once
    assert shown(1000, 1978).endswith("ETA 0:00")


# ==== mistakes ====


def test_a_full_disk_while_saving_is_told_and_training_goes_on(gpt2, text_file, monkeypatch):
    from gpt2cli import atomic, writer

    seal, tries = atomic.seal, []

    def full_once_at_step_4(folder, facts):
        tries.append(facts["step"])
        if tries.count(4) == 1 and facts["step"] == 4:
            raise OSError(28, "No space left on device")
        seal(folder, facts)

    monkeypatch.setattr(atomic, "seal", full_once_at_step_4)
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)
    done = gpt2("train", text_file, *QUICK, "--steps", 8, "--save-every", 4, "--eval-every", 0, "--out", "run")
    assert (done.code, done.out) == (0, "run\n") and "No space left" in done.err and "tried again" in done.err
    assert tries[0] == 4 < tries[1] and tries[-1] == 8
    assert [line["step"] for line in metrics_of("run") if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in metrics_of("run") if line.get("event") == "save failed"]


def test_a_disk_that_stays_full_ends_in_one_line_and_the_checkpoint_before_stands(gpt2, text_file, monkeypatch):
    from gpt2cli import atomic, writer

    seal = atomic.seal

    def full_from_step_4(folder, facts):
        if facts["step"] >= 4:
            raise OSError(28, "No space left on device")
        seal(folder, facts)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "seal", full_from_step_4)
        patch.setattr(writer, "RETRY_SECONDS", 0.0)
        done = gpt2("train", text_file, *QUICK, "--steps", 6, "--save-every", 2, "--eval-every", 0, "--out", "run")
    *_, waits, last = done.err.splitlines()
    assert "the run is over, but step 6 is not saved: it will be tried for 0 minutes more; free some space" in waits
    assert done.code == 1 and done.out == "" and "the disk is full" in last
    assert "step-000002 stands, what came after it is lost; free some space, and then: gpt2 train --resume --out run" in last
    assert [p.name for p in sorted(Path("run").glob("*step*"))] == ["step-000002"]
    assert gpt2("train", "--resume", "--out", "run").code == 0
    assert [line["step"] for line in metrics_of("run") if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_run_from_standard_input_whose_tokens_are_gone_says_what_it_needs(gpt2, text_file, monkeypatch):
    def stdin(data):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))

    stdin(text_file.read_bytes())
    assert gpt2("train", "-", *QUICK, "--steps", 1, "--cache-dir", "cache", "--out", "run").code == 0
    shutil.rmtree("cache")
    resume = ("train", "--resume", "--out", "run", "--steps", 2, "--cache-dir", "cache")
    stdin(b"")
    assert "stdin is empty; expected UTF-8 text (the same as before" in gpt2(*resume).err
    stdin(text_file.read_bytes())
    assert gpt2(*resume).code == 0


def bad_files() -> None:
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"\x7fELF\0\0\0")
    Path("latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    Path("short.txt").write_text("Too short.")
    Path("fine.txt").write_text("To be, or not to be: that is the question. " * 200)
    Path("folder").mkdir()
    Path("notes").mkdir()
    Path("notes/readme").write_text("no text here")
    Path("taken").mkdir()
    Path("taken/precious").write_text("mine")


TRAIN = ("train", "fine.txt", *TINY)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("tokenize", "missing.txt"), "missing.txt does not exist"),
        (("tokenize", "empty.txt"), "empty.txt is empty"),
        (("tokenize", "binary.txt"), "zero byte at offset 4"),
        (("tokenize", "latin1.txt"), "byte 0xe9 at offset 3"),
        (("tokenize", "notes"), "notes holds no text"),
        (("tokenize", "fine.txt", "--out", "taken"), "taken already exists"),
        (("tokenize", "fine.txt", "--workers", "0"), "--workers"),
        (("tokenize", "fine.txt", "--val-fraction", "2"), "--val-fraction"),
        (("tokenize", "fine.txt", "--errors", "ignore"), "errors"),
        (("tokenize", "fine.txt", "--shard-tokens", "0"), "shard-tokens"),
        (("train", "missing.txt"), "missing.txt does not exist"),
        (("train", "short.txt"), "needs"),
        (("train", "folder"), "folder holds no text"),
        ((*TRAIN, "--n-embd", "33"), "n_embd must be divisible by n_head"),
        ((*TRAIN, "--n-layer", "0"), "n_layer must be at least 1"),
        ((*TRAIN, "--batch-size", "-1"), "batch_size must be at least 1"),
        ((*TRAIN, "--steps", "0"), "steps must be at least 1"),
        ((*TRAIN, "--steps", "1", "--epochs", "1"), "steps and epochs"),
        ((*TRAIN, "--lr", "nan"), "lr must be above 0"),
        ((*TRAIN, "--min-lr", "1"), "--min-lr"),
        ((*TRAIN, "--preset", "gpt3"), "--preset gpt3"),
        ((*TRAIN, "--device", "mps"), "--device mps"),
        ((*TRAIN, "--device", "tpu"), "device is 'tpu'"),
        ((*TRAIN, "--dtype", "fp8"), "dtype is 'fp8'"),
        ((*TRAIN, "--device", "cpu", "--attention", "cudnn"), "--attention cudnn does not run"),
        ((*TRAIN, "--seed", "1" + "0" * 25), "seed"),
        ((*TRAIN, "--sample-every", "1", "--sample-prompt", ""), "--sample-prompt"),
        ((*TRAIN, "--preset", "gpt2", "--init-from", "RUN"), "--preset and --init-from"),
        ((*TRAIN, "--block-size", "16"), "--seq-len 32 is longer"),
        ((*TRAIN, "--init-from", "folder"), "folder is not a model folder"),
        ((*TRAIN, "--out", "taken"), "taken already holds files"),
        ((*TRAIN, "--out", "fine.txt"), "fine.txt already"),
        (("train", "--resume"), "no run under runs/"),
        (("train", "--config", "missing.toml"), "missing.toml"),
        (("sample", "--prompt", "x"), "no run under runs/"),
        (("sample", "folder", "--prompt", "x"), "folder is not a model folder"),
        (("sample", "no such/model/name", "--prompt", "x"), "neither a model folder nor"),
        (("sample", "RUN", "--prompt", ""), "the prompt is empty: give some text"),
        (("sample", "fine.txt", "--prompt", "x"), "fine.txt is a file, not a model folder"),
        (("convert", "RUN", "--to", "hf", "--out", "fine.txt", "--force"), "fine.txt is a file, but a HuggingFace folder"),
        (("sample", "RUN", "--prompt", "word " * 40), "the model sees 32"),
        (("sample", "RUN", "--prompt", "x", "--prompt-file", "fine.txt"), "--prompt and --prompt-file"),
        (("sample", "RUN", "--prompt-file", "missing"), "missing: No such file"),
        (("sample", "RUN", "--prompt-file", "latin1.txt"), "latin1.txt is not UTF-8: bad byte at offset 3"),
        (("sample", "RUN", "--prompt", "na\u00efve caf\udce9"), "--prompt is not UTF-8: bad byte at offset 10"),
        (("sample", "RUN", "--prompt", "x", "--batch-size", "2"), "--batch-size is for what --prompts brings"),
        (("sample", "RUN", "--prompt", "x", "--temperature", "-1"), "--temperature must be above 0"),
        (("sample", "RUN", "--prompt", "x", "--top-p", "0"), "--top-p"),
        (("sample", "RUN", "--prompt", "x", "--device", "cuda:x"), "device"),
        (("sample", "RUN", "--prompt", "x", "--dtype", "fp8"), "dtype"),
        (("convert",), "SOURCE or --from-hf"),
        (("convert", "RUN", "--to", "onnx"), "--to onnx"),
        (("convert", "RUN", "--out", "taken"), "taken already exists"),
        (("convert", "folder"), "folder is a folder without a model"),
        (("bench", "attention", "--lengths", "a"), "--lengths a"),
        (("bench", "train", "--preset", "huge"), "--preset huge"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it_and_costs_nothing(gpt2, run_folder, arguments, says):
    bad_files()
    before = sorted(str(p) for p in Path().rglob("*"))
    done = gpt2(*(run_folder if part == "RUN" else part for part in arguments))
    assert done.code == 1 and done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], done.err
    assert not re.search(r"Error\b|Traceback", errors[0])
    assert sorted(str(p) for p in Path().rglob("*")) == before
    assert Path("taken/precious").read_text() == "mine"


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda data: data[: len(data) // 2], "damaged"),
        (lambda data: (1 << 62).to_bytes(8, "little") + data[8:], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: data[:8] + b"x" + data[9:], "damaged"),
    ],
)
def test_damaged_weights_are_refused(gpt2, run_folder, damage, says):
    import shutil

    shutil.copytree(run_folder / "step-000008", "model")
    Path("model/checkpoint.json").unlink()
    path = Path("model/model.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    done = gpt2("sample", "model", "--prompt", "x")
    assert done.code == 1 and says in done.err and "model.safetensors" in done.err


# ==== tokenize, beside what test_corpus.py has ====


def test_a_vocabulary_of_ones_own_goes_with_the_shards(gpt2, text_file):
    done = gpt2("tokenize", text_file, "--train-vocab", 500, "--out", "own", "--json")
    assert "training the vocabulary" in done.err and "done before" not in done.err
    assert json.loads(done.out)["vocab_size"] == 500 and Path("own/tokenizer.json").is_file()
    start = text_file.read_text(encoding="utf-8")[:24]
    assert gpt2("tokenize", "--decode", "own/train_000000.bin", "--range", "1:40").out.startswith(start)
    assert gpt2("tokenize", text_file, "--tokenizer", "own", "--out", "again").code == 0
    assert Path("again/train_000000.bin").read_bytes() == Path("own/train_000000.bin").read_bytes()
    shown = gpt2("tokenize", text_file, "--tokenizer", "own", "--show").out.splitlines()
    assert "".join(json.loads(line.split("\t")[1]) for line in shown).startswith(start)
    assert gpt2("tokenize", "--decode", "15496", "995").out == "Hello world\n"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("input.txt", "--train-vocab", "500", "--tokenizer", "own"), "both say what the vocabulary is"),
        (("input.txt", "--train-vocab", "12"), "--train-vocab must be 257 to"),
        (("input.txt", "--train-vocab", "60000"), "too small for a vocabulary of 60,000"),
        (("input.txt", "--tokenizer", "nowhere"), "nowhere holds no tokenizer.json"),
        (("input.txt", "--range", "0:3"), "--range is for --decode"),
        (("input.txt", "--decode"), "input.txt is not a token shard"),
        (("input.txt", "--to", "gguf"), "--to is 'gguf'"),
        (("input.txt", "--train-vocab", "0"), "--train-vocab must be 257 to 65,536, but is 0"),
        (("input.txt", "--shard-tokens", str(1 << 31)), "below 2^31"),
        (("input.txt", "--workers", "500"), "--workers must be 1 to 61"),
        (("input.txt", "--format", "csv"), "--format is 'csv'"),
        (("nowhere.txt",), "nowhere.txt does not exist"),
    ],
)
def test_tokenize_says_what_is_wrong(gpt2, text_file, arguments, says):
    done = gpt2("tokenize", *arguments)
    assert done.code == 1 and says in done.err and not done.out


def test_plain_text_is_shown_with_the_ids_of_its_shards(gpt2, monkeypatch):
    for n in (1, 2):
        Path(f"{n}.txt").write_text("a <|endoftext|> b")
    shown = gpt2("tokenize", "1.txt", "2.txt", "--plain", "--show").out.splitlines()
    assert gpt2("tokenize", "1.txt", "2.txt", "--plain", "--val-fraction", 0, "--out", "t").code == 0
    ids = np.fromfile("t/train_000000.bin", dtype="<u2")[512:].tolist()
    assert [50256, *(int(line.split("\t")[0]) for line in shown)] == ids
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"from a pipe")))
    assert gpt2("tokenize", "-").out == "stdin-tokens\n"


def test_the_time_left_is_by_what_was_done_here_and_not_before(monkeypatch, capsys):
    from gpt2cli.commands import console

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    bars = console.Bars()
    bars.tokenized("reading", 900, 1000)
    clock[0] = 50.0
    bars.tokenized("reading", 950, 1000)
    err = capsys.readouterr().err
    assert "900 bytes of it done before" in err and "1 bytes a second, 0:50 left" in err


def test_more_than_the_memory_holds_is_refused_before_it_is_tried(gpt2, text_file, run_folder, monkeypatch):
    monkeypatch.setattr("gpt2cli.memory.total", lambda: 10**9)
    done = gpt2("sample", run_folder, "--prompt", "a", "--num-samples", 5000)
    assert done.code == 1 and "5,000 rows at a time need 2.1 GB" in done.err and "lower --num-samples" in done.err
    done = gpt2("train", text_file, *QUICK, "--nproc", 3)
    assert done.code == 1 and "takes 1.1 GB of memory before there is a model" in done.err
    for option in (("--epochs", "1e300"), ("--steps", 10**13)):
        assert "must be at most 10^12" in gpt2("train", text_file, *option, "--dry-run").err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_rank_that_the_signal_passed_on_ended_was_not_killed(capsys):
    from gpt2cli.commands import launch

    def ended():
        return subprocess.Popen([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])

    assert launch._wait([ended()], [signal.SIGTERM]) == 143 and capsys.readouterr().err == ""
    assert launch._wait([ended()], []) == 143 and "killed by SIGTERM" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_the_first_rank_does_not_wait_for_ever_for_one_that_an_interrupt_ended(monkeypatch):
    from gpt2cli.commands import launch

    monkeypatch.setattr(launch, "GRACE_OF_FIRST", 0.5)
    ranks = [
        subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(60)", "raise SystemExit(130)")
    ]
    assert launch._wait(ranks, [signal.SIGINT]) == 130 and ranks[0].wait() == -signal.SIGKILL
    monkeypatch.setattr(launch, "GRACE", 0.5)
    ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])]  # which a signal does not reach
    assert launch._wait(ranks, [signal.SIGINT, signal.SIGINT]) == 130


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_signal_while_ranks_are_started_reaches_them_all(monkeypatch, tmp_path):
    from gpt2cli.commands import launch

    (rank := tmp_path / "rank").write_text("#!/bin/sh\nexec sleep 60\n")
    rank.chmod(0o700)
    popen = subprocess.Popen

    def start(*arguments, **more):
        process = popen(*arguments, **more)
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher has not yet heard of this one
        return process

    monkeypatch.setattr(launch.sys, "executable", str(rank))
    monkeypatch.setattr(launch.subprocess, "Popen", start)
    assert launch.start(2, ["train"]) == 143
