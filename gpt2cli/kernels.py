"""Launching kernels written in Triton, and compiling several at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import torch
import triton

_compiled: ContextVar[list[tuple[Any, int]] | None] = ContextVar("_compiled", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **how: Any) -> None:
    """`kernel[grid](*arguments, **how)`, but for what `compile_all` is given."""
    compiled = _compiled.get()
    made = kernel.run(*arguments, grid=grid, warmup=compiled is not None, **how)
    if compiled is not None and made is not None:
        compiled.append((made, torch.cuda.current_device()))


def compile_all(work: Callable[[], object]) -> None:
    """Compile the kernels that `work` launches, at once, and launch none of them. Raises what the compiler does. One by one,
    each at its first launch, most of the time would be spent on waiting for other programs: ptxas, and before Triton 3.7 a
    C compiler, for what launches it."""

    def inside() -> None:
        compiled: list[tuple[Any, int]] = []
        _compiled.set(compiled)
        with ThreadPoolExecutor() as threads:
            with triton.AsyncCompileMode(threads):
                work()
            kernels = {(made.result() if isinstance(made, triton.FutureKernel) else made, where) for made, where in compiled}
            for loaded in [threads.submit(load, *each) for each in kernels]:
                loaded.result()

    def load(kernel: Any, where: int) -> None:
        with torch.cuda.device(where):
            kernel.run  # noqa: B018  # a property, which is made when it is first asked for

    copy_context().run(inside)  # where what is set is not set any more afterwards


class GPU:
    """Launches kernels early, where it can: they are told by EARLY, and then have to wait themselves for those before."""

    def __init__(self, device: torch.device) -> None:
        self.processors, self._early = 4, False  # as if, for the interpreter
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self.processors, self._early = properties.multi_processor_count, properties.major >= 9

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **how: Any) -> None:
        early = {"launch_pdl": True} if self._early else {}
        launch(kernel, grid, *arguments, **how, EARLY=self._early, **early)
