"""Work in a process of its own: in one process the thread pools of two libraries slow each other down even while they wait,
and neither's memory can be told from the other's."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpt2cli import device
from gpt2cli.encode import no_ctrl_c
from gpt2cli.errors import UserError

Make = Callable[..., tuple[str, Callable[..., Any]]]  # -> a title, and what to call from then on


class Apart:
    """What `make(*arguments)` returns, living in a fresh process with as many threads as this one; called like what it runs.
    Raises UserError where that does, and with `missing` where a package is not installed there."""

    def __init__(self, make: Make, *arguments: Any, missing: str = "") -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        facts = (make, arguments, missing, torch.get_num_threads(), theirs)
        self._process = context.Process(target=_serve, args=facts, daemon=True)
        with no_ctrl_c():  # which ends this one, and it that
            self._process.start()
        theirs.close()
        self.title: str = self._answer()

    def __call__(self, *arguments: Any) -> Any:
        with contextlib.suppress(BrokenPipeError):  # then the answer tells why
            self._connection.send(arguments)
        return self._answer()

    def _answer(self) -> Any:
        try:
            fine, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise UserError("a process under comparison has ended: see what it said above") from None
        if not fine:
            raise UserError(value)
        return value

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(make: Make, arguments: tuple[Any, ...], missing: str, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    try:
        title, run = make(*arguments)
        connection.send((True, title))
        while True:
            connection.send((True, run(*connection.recv())))
    except ImportError as error:
        connection.send((False, missing or str(error)))
    except UserError as error:
        connection.send((False, str(error)))
    except (EOFError, OSError, KeyboardInterrupt):  # the other end has what it wanted
        return
    except (MemoryError, RuntimeError) as error:
        if not device.is_out_of_memory(error):
            raise
        connection.send((False, "out of memory: use a smaller --batch-size, --seq-len or --preset"))
