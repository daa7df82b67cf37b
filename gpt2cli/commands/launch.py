"""`--nproc`: this command again in several processes of this machine, told in their environment what torchrun tells its own.

Unlike torchrun it ends with their exit status, gives a signal's save all the time it needs, and imports no torch.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from gpt2cli import memory
from gpt2cli.commands import console
from gpt2cli.errors import UserError, size

LAUNCHER = "GPT2CLI_LAUNCHER"  # in a rank's environment, the process that started it
SAME = 1.0  # seconds in which signals count as one: who signals all processes reaches a rank through its launcher, too
GRACE = 5.0  # seconds that a rank has to leave in when another one failed
GRACE_OF_FIRST = 60.0  # which may be writing a checkpoint


def start(nproc: int, arguments: Sequence[str]) -> int:
    """Run `gpt2 ARGUMENTS` in `nproc` processes; returns the exit status of the first that fails, else 0. Where one fails
    the others are ended; a signal is passed on to all."""
    if "RANK" in os.environ:
        raise UserError("--nproc starts the processes itself: leave it out under torchrun")
    if 0 < memory.total() < (needed := nproc * memory.INTERPRETER):
        raise UserError(
            f"--nproc {nproc} takes {size(needed)} of memory before there is a model, {size(memory.total())} are there"
        )
    threads = max(1, (os.cpu_count() or 1) // nproc)
    common = {"WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    common |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), LAUNCHER: os.getpid()}
    common["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")  # where a rank is lost it warns in pages
    command = [sys.executable, "-m", "gpt2cli", *_without_nproc(arguments)]
    processes: list[subprocess.Popen[bytes]] = []
    came: list[int] = []  # signals
    last = -math.inf

    def pass_on(number: int, frame: object) -> None:
        nonlocal last
        again = number != getattr(signal, "SIGHUP", None)  # a terminal's comes from the shell and from the system
        if not came or (again and time.monotonic() > last + SAME):
            came.append(number)
        last = time.monotonic()
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = [(number, signal.signal(number, pass_on)) for number in signals()]
    try:
        for rank in range(nproc):
            environment = os.environ | {key: str(value) for key, value in common.items()}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # In sessions of their own, so that a terminal's Ctrl-C reaches them once, through us.
            processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
        if came:  # while there were not all yet
            pass_on(came[-1], None)
        return _wait(processes, came)
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for number, handler in before:
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], came: Sequence[int]) -> int:
    """Until all have ended, or one has failed, or left before it could save, and the others had time to leave. After a signal
    they save and leave together, which takes what it takes; a second one gives them seconds, a third none."""
    ended: dict[int, int] = {}  # rank -> status, the first first
    failed_at, again_at, ours = math.inf, math.inf, set()  # those that were killed here
    while len(ended) < len(processes):
        time.sleep(0.05)
        ended |= {n: code for n, process in enumerate(processes) if n not in ended and (code := process.poll()) is not None}
        if any(ended.values()):
            failed_at = min(failed_at, time.monotonic())
        if len(came) > 1:
            again_at = min(again_at, time.monotonic())
        for rank in set(range(len(processes))) - set(ended):
            until = min(failed_at + (GRACE if rank else GRACE_OF_FIRST), again_at + GRACE)
            if time.monotonic() > until or len(came) > 2:
                processes[rank].kill()
                ours.add(rank)
    failed = {rank: code for rank, code in ended.items() if code and rank not in ours}
    for rank, code in failed.items():
        if code < 0:
            if -code not in came:  # one that came through us may find a rank that has only begun
                name = signal.Signals(-code).name
                console.error(f"rank {rank} was killed by {name}: go on from the last checkpoint with --resume")
            return 128 - code
    return next(iter(failed.values()), 128 + came[-1] if ours and came else 0)


def signals() -> list[int]:
    """Those that end a program and may be heard. SIGHUP, of a terminal that is closed, nohup has ignored, and SIGINT a shell
    for what it starts in the background; Windows has no SIGHUP."""
    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) != signal.SIG_IGN]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _without_nproc(arguments: Sequence[str]) -> list[str]:
    """["train", "--nproc", "2", "a.txt"] -> ["train", "a.txt"]"""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--nproc" and not argument.startswith("--nproc="):
            kept.append(argument)
        skip = argument == "--nproc"
    return kept


def follow() -> None:
    """In a rank: have SIGTERM come when the launcher is gone, as by SIGKILL, which nobody can pass on."""

    def wait(launcher: int) -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if LAUNCHER in os.environ:
        threading.Thread(target=wait, args=(int(os.environ[LAUNCHER]),), daemon=True).start()


def restarts() -> bool:
    """Whether torchrun starts the processes again when one fails."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0
