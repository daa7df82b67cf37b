"""Several processes that train one model: who they are, what they tell each other, how a model is spread over them.

Torchrun, or `gpt2 train --nproc`, starts the processes and tells each in its environment which rank it is. DDP keeps the
whole model on every rank and sums the gradients; FSDP2 (Zhao et al. 2023) keeps a slice of every tensor on each, and gathers
a block's when it is needed. What is done by one rank for all, such as reading a checkpoint, rank 0 does.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2cli import device
from gpt2cli.errors import Told, UserError

T = TypeVar("T")

PATIENCE = timedelta(minutes=10)  # with a rank that does not answer within a step
GONE = "gone"  # the word of the store that a rank leaves where it fails
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "Socket", "NCCL", "recvValue failed")


class Ranks:
    """The processes of a run, seen from one of them. `ALONE` is a run of one process, where nothing is communicated."""

    def __init__(self, rank: int = 0, world_size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0)) if store else 0  # among those of this machine
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) if store else 1
        self._store = store
        self._count = 0  # of messages, which names them

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_group(self) -> bool:
        """Whether torchrun, or `--nproc`, started this process, if only this one."""
        return self._store is not None

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    # ==== words, before there is anything to compute with; nobody is hurried ====

    def first(self, make: Callable[[], T]) -> T | None:
        """What rank 0 makes, for itself; the others wait until it is done, or raise Told where it fails."""
        made: list[T] = []

        def attempt() -> str:
            made.append(make())
            return ""

        self.tell(attempt)
        return made[0] if made else None

    def tell(self, make: Callable[[], str]) -> str:
        """A text that rank 0 makes, for all. Raises as `first` does."""
        if self.world_size == 1:
            return make()
        self._count += 1
        key = f"words/{self._count}"
        store = self._the_store()
        if not self.is_first:
            _wait_for(store, [key])
            return store.get(key).decode()
        text = make()
        store.set(key, text)
        return text

    def agree(self, make: Callable[[], T]) -> T:
        """What each rank makes for itself. Where some fail, rank 0 raises a UserError that names them all, and the others
        Told."""
        made: list[T] = []
        error = ""
        try:
            made.append(make())
        except (UserError, OSError) as mistake:
            if self.world_size == 1:
                raise
            error = f"{self.where}: {mistake}"
        if errors := list(filter(None, self.collect(error))):
            raise (UserError if self.is_first else Told)("; ".join(errors))
        return made[0]

    def collect(self, text: str) -> list[str]:
        """The texts of all ranks, on every rank."""
        if self.world_size == 1:
            return [text]
        self._count += 1
        store, keys = self._the_store(), [f"words/{self._count}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], text)
        _wait_for(store, keys)
        return [store.get(key).decode() for key in keys]

    def _the_store(self) -> dist.Store:
        assert self._store is not None
        return self._store

    # ==== numbers ====

    def connect(self, where: torch.device, spread: bool = False) -> None:
        """Let the ranks compute together on these devices: NCCL between GPUs, gloo between CPUs. One rank alone needs that only
        where its model is to be `spread`; gloo's thread wakes a hundred times a second, which the others' work feels."""
        if self._store is None or dist.is_initialized():
            return
        if where.type == "mps" and self.world_size > 1:
            raise UserError("--device mps: several processes train together on CUDA or on CPUs")
        if where.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"{self.where}: this machine has {torch.cuda.device_count()} GPUs: start one process for each")
            torch.cuda.set_device(self.local_rank)
        if self.world_size == 1 and not spread:
            return
        backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
        store = dist.PrefixStore("group", self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world_size, timeout=PATIENCE)

    def leave(self) -> None:
        """At the end, when all have got there."""
        if dist.is_initialized():
            self.collect("")
            self.any(False)
            dist.destroy_process_group()

    def any(self, flag: bool) -> bool:
        """Whether it is true for one of the ranks. On the CPU, so that no GPU is waited for."""
        if self.world_size == 1:
            return flag
        flags = torch.tensor([flag], dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def sum(self, values: Tensor) -> Tensor:
        """The ranks' tensors, added up in place; the same bits on all of them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """The ranks' tensors (...), as (world_size, ...)."""
        if self.world_size == 1:
            return values[None]
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.stack(parts)

    @torch.no_grad()
    def fill(self, target: Tensor, value: Tensor | None) -> None:
        """Give a tensor of the model or the optimizer, spread over the ranks or not, the value that rank 0 has."""
        if value is not None and value.shape != target.shape:
            raise UserError(f"a tensor has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
        if self.world_size == 1 and not is_spread(target):
            assert value is not None
            target.copy_(value)
            return
        local = local_part(target)
        whole = local.new_empty(target.shape) if value is None else value.to(local.device, local.dtype).contiguous()
        if not is_spread(target):
            dist.broadcast(whole, 0)
            target.copy_(whole)
            return
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy in the host's memory, whole on rank 0; what a tensor is spread over is gathered for it, this tensor alone."""
        whole = gathered(tensor.detach())
        if not self.is_first:
            return whole.new_empty(0)
        return whole.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _wait_for(store: dist.Store, keys: list[str]) -> None:
    """Until they are there, however long a large text takes to tokenize, or a checkpoint to be written; raises Told where a
    rank has gone. Not with `Store.wait`, which no signal ends."""
    while not store.check(keys):
        if store.check([GONE]):
            raise Told(store.get(GONE).decode())
        time.sleep(0.02)


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that this process is one of, as its environment says. Raises UserError where that is half of it, and where
    the first of them cannot be reached; in it, Told where the connection to another one breaks."""
    there = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if not there:
        yield ALONE
        return
    if len(there) < 4 or not dist.is_available():
        raise UserError(f"the environment has {', '.join(there)}, as torchrun sets, but not all of it: start it with torchrun")
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world_size = next(iter(rendezvous("env://")))
    except (dist.DistError, ValueError) as error:
        raise UserError(f"rank {os.environ['RANK']} cannot reach the others: {str(error).splitlines()[0]}") from None
    ranks, fresh = Ranks(rank, world_size, store), None
    try:
        fresh = _fresh(store, rank, world_size)
        ranks = Ranks(rank, world_size, fresh)
        yield ranks
        ranks.leave()
    except BaseException as error:
        if fresh is not None:
            with contextlib.suppress(RuntimeError):
                fresh.set(GONE, f"rank {rank}")
        if world_size == 1 or not isinstance(error, RuntimeError) or not is_lost(error):
            raise
        what = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0]).split(". ")[0][:200]  # without places in C++
        message = f"{ranks.where} lost another rank, whose own error says why ({what})"
        raise (UserError if ranks.is_first else Told)(message) from None
    finally:
        if world_size > 1:
            # Gloo's threads let go of Python's objects a moment after the last sum; one that does so while the interpreter
            # shuts down aborts the process (seen in 1 of 8, torch 2.13).
            time.sleep(0.2)


def _fresh(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store that only the processes now living know: torchrun's outlives the ranks that it starts again, and
    holds what those before them said. Each asks with a word of its own, which nobody before has answered."""
    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"gpt2cli/ask/{rank}", word)
        _wait_for(store, [answer := f"gpt2cli/answer/{word}"])
        name = store.get(answer).decode()
        store.set(f"{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    name = f"gpt2cli/{uuid.uuid4().hex}"
    left = set(range(1, world_size))
    while left:
        for other in sorted(left):
            if store.check([f"gpt2cli/ask/{other}"]):
                store.set(f"gpt2cli/answer/{store.get(f'gpt2cli/ask/{other}').decode()}", name)
        left = {other for other in left if not store.check([f"{name}/{other}"])}
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def is_lost(error: RuntimeError) -> bool:
    """Whether it is what one rank sees of the death of another."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in LOST)


# ==== spreading a model ====


def shard(model: nn.Module, parts: Iterable[nn.Module], where: torch.device, dtype: str) -> None:
    """FSDP2: from here on each rank holds a slice of every tensor of `model`, and gathers those of one of its `parts` when
    that is run. A model that has no values yet is sharded, then made.

    The weights of the parts travel in `dtype`, in which autocast multiplies them anyway, all others in fp32, in which the
    gradients are summed: the numbers are those of one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(where.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == "fp32" else device.DTYPES[dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # It warns of operations that change a part's result in place, which there are none of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for part in parts:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the rest


def replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """DDP: what to call in the place of `model`, so that its gradients become the ranks' mean. Alone it is the model."""
    if ranks.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)


def accumulating(engine: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Around a micro-step: under DDP only the last one's backward sums the gradients. Under FSDP each one's does, since
    between them a rank keeps its slice alone."""
    return (
        engine.no_sync() if isinstance(engine, nn.parallel.DistributedDataParallel) and not last else contextlib.nullcontext()
    )


def put_away(model: nn.Module) -> None:
    """Let go of the tensors that a forward pass without a backward one left gathered (FSDP)."""
    reshard = getattr(model, "reshard", None)
    if reshard:
        reshard()


def is_spread(tensor: Tensor) -> bool:
    """Whether the ranks hold slices of it."""
    return hasattr(tensor, "to_local")  # a DTensor, whose import takes a while and which most runs do without


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """Gathered on every rank."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[attr-defined]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a `value` that all have whole, if its slices are to be those of `like`."""
    if not is_spread(like):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    spread = DTensor.from_local(value, like.device_mesh, [Replicate()], run_check=False)
    return spread.redistribute(placements=like.placements).to_local()
