"""What lets a GPU work while the host is elsewhere: graphs instead of single kernels, and copies that nobody waits for.

Decoding a token is some hundred small kernels, an update of a small model a thousand. Started one by one from Python they take
longer to start than to run; recorded once as a CUDA graph they are started together. On a CPU all of this is the plain thing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor


def put(there: Tensor, values: Sequence[float]) -> None:
    """Write `values` into the first places of `there` (N), on whatever device, in the order of its other work."""
    here = torch.tensor(values, dtype=there.dtype, pin_memory=there.is_cuda)
    there[: len(values)].copy_(here, non_blocking=there.is_cuda)


class Readback:
    """Copies of tensors on the host: `start` them behind the work that is under way, and `lists` waits for them alone. Neither
    do they wait for what the device is given since, nor that for them: until then it must leave the tensors as they are."""

    def __init__(self, *there: Tensor) -> None:
        self._there = there
        self._here = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in there]
        self._stream = torch.cuda.Stream(there[0].device) if there[0].is_cuda else None

    def start(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for here, there in zip(self._here, self._there, strict=True):
                here.copy_(there, non_blocking=there.is_cuda)

    def lists(self) -> list[list[float]]:
        if self._stream is not None:
            self._stream.synchronize()
        return [here.tolist() for here in self._here]


class Graphs:
    """Work that recurs, as CUDA graphs where `used`, which it is on CUDA until recording fails."""

    failed = False  # once in a process is enough
    done: ClassVar[set[Hashable]] = set()  # what was done in this process, so that its kernels are loaded

    def __init__(self, device: torch.device, kind: Hashable = None, what: str = "decoding") -> None:
        """`kind` is what the work depends on beside the keys, `what` it is called."""
        self.used = device.type == "cuda" and not Graphs.failed
        self._device, self._kind, self._what = device, (device, kind), what
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # of memory; the graphs share it, since none runs beside another
        self._stream: torch.cuda.Stream | None = None  # to record on

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do `work`, which is the same for the same `key`: it reads and writes tensors that stay where they are, and the host
        neither looks at one nor takes part. The first time in a process it runs as it is, which loads its kernels; the second
        time it is recorded; from then on the record runs."""
        if not self.used or (self._kind, key) not in Graphs.done:
            work()
            if self.used:
                Graphs.done.add((self._kind, key))
            return
        try:
            graph = self._graphs.get(key) or self._record(work)
        except RuntimeError as error:  # of CUDA: recording has done nothing, so the work is still to do
            reason = str(error.__context__ or error)  # that recording had to end is not why
            self.used, Graphs.failed = False, True
        if not self.used:  # and only now, when the error holds nothing any more that the work made
            work()
            warnings.warn(f"CUDA graphs do not work here, so {self._what} is slower: {reason}", stacklevel=2)
            return
        self._graphs[key] = graph
        graph.replay()

    def _record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """What `torch.cuda.graph` does, but for giving all unused memory back, and it leaves its stream after an error."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            self._stream = self._stream or torch.cuda.Stream()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    try:
                        work()
                    finally:
                        graph.capture_end()
                except RuntimeError:
                    generator = torch.cuda.default_generators[torch.cuda.current_device()]
                    generator.graphsafe_set_state(generator.clone_state())  # it believes that it is still being recorded
                    raise
        return graph
