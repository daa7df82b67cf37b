"""The machine: which device and dtype, how fast it multiplies, and the settings torch wants for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2cli import memory
from gpt2cli.errors import UserError
from gpt2cli.product import onednn, suits_onednn

# What cuBLAS wants to give the same bits each time. It looks when the first matrix product runs, be that one of a benchmark.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

# Dense bf16 TFLOP/s of the datasheets, for the part of the name torch reports.
DATASHEET_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "3090": 71}


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UserError for a device this machine does not have."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    if name not in has:
        raise UserError(f"--device {name} is unknown; expected auto, {', '.join(has)}")
    if not has[name]:
        there = ", ".join(kind for kind, yes in has.items() if yes)
        raise UserError(f"--device {name}: this machine (torch {torch.__version__}) has only {there}")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware. A CPU without emulates it, hundreds of times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pick_dtype(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the device has it in hardware, else fp32. Raises UserError for one the device lacks."""
    if name not in ("auto", *DTYPES):
        raise UserError(f"--dtype {name} is unknown; expected auto, {', '.join(DTYPES)}")
    if name == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    if name == "bf16" and not has_bf16(device) and device.type == "cuda":
        raise UserError("--dtype bf16: this GPU has no bf16 arithmetic; use --dtype fp16 or fp32")
    if name != "fp32" and device.type == "mps":
        raise UserError(f"--dtype {name}: on mps only fp32 is supported")
    return name


def precision(device: torch.device, dtype: str, attention: str = "auto") -> AbstractContextManager[object]:
    """Mixed precision (weights stay fp32, matrix products run in `dtype`), and SDPA restricted to one kernel; `auto`
    leaves that choice to torch."""
    stack = contextlib.ExitStack()
    if dtype != "fp32":
        stack.enter_context(torch.autocast(device.type, DTYPES[dtype]))
    if attention != "auto":
        stack.enter_context(sdpa_kernel([KERNELS[attention]]))
    return stack


def check_attention(device: torch.device, dtype: str, attention: str, head_size: int, dropout: float) -> None:
    """Raises UserError where SDPA has no such kernel for this device, dtype, head size and dropout."""
    if attention == "auto":
        return
    q = torch.zeros(1, 1, 16, head_size, device=device, dtype=DTYPES[dtype], requires_grad=True)
    try:
        with sdpa_kernel([KERNELS[attention]]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=dropout).sum().backward()
    except RuntimeError:
        on = f"{device.type} with {dtype}, heads of {head_size}" + (f" and attention dropout {dropout}" if dropout else "")
        raise UserError(f"--attention {attention} does not run on {on}; see 'gpt2 bench attention', or leave it out") from None


def set_up(seed: int, deterministic: bool = False) -> None:
    """Seed every generator of torch, let fp32 matrix products use TF32 where the hardware has it, and keep freed memory.
    With `deterministic` CUDA's kernels give the same bits each time, too, and are slower for it."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    if deterministic:
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is slow, and nothing reads such memory
    set_deterministic(deterministic)
    keep_freed_memory()


@contextlib.contextmanager
def in_any_order() -> Iterator[None]:
    """For what training does not depend on: sampling needs sums of which CUDA has no deterministic kernel, and where those
    are asked for, torch refuses."""
    before = torch.are_deterministic_algorithms_enabled()
    set_deterministic(False)
    try:
        yield
    finally:
        set_deterministic(before)


def set_deterministic(on: bool) -> None:
    if on != torch.are_deterministic_algorithms_enabled():  # torch loads its compiler for this
        torch.use_deterministic_algorithms(on)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step on one rank, so that its dropout is a function of these three and there is no state to keep."""
    (number,) = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(number))


def keep_freed_memory() -> None:
    """Let glibc keep what tensors on the CPU free instead of returning it to the system. Otherwise each large temporary
    of each step is mapped and zeroed page by page anew, which takes a third of a training step. Elsewhere: nothing."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own mapping
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: as good as never shrink the heap


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "Apple GPU"
    return f"{device.type} ({capability}, {torch.get_num_threads()} threads)"


def memory_total(device: torch.device) -> int:
    """Bytes of memory the device has; 0 where the system does not tell."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory.total()


def memory_peak(device: torch.device) -> int:
    """The most bytes this process held on the device so far (resident memory on a CPU); 0 where unknown."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak()


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class of its own for it, the CPU's allocator does not."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def matmul_rate(device: torch.device, dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, best of a few and of the libraries at hand: the roof for MFU."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    ways: list[Callable[..., torch.Tensor]] = [torch.mm, onednn] if suits_onednn(a, a) else [torch.mm]
    best, end = float("inf"), time.perf_counter() + seconds
    for multiply in ways:
        multiply(a, a)
    synchronize(device)
    while time.perf_counter() < end or best == float("inf"):  # once at least, where one product takes longer than all of it
        for multiply in ways:
            start = time.perf_counter()
            multiply(a, a)
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def datasheet_rate(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the datasheet, where we know the card."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((rate * 1e12 for part, rate in DATASHEET_TFLOPS.items() if part in name), None)
