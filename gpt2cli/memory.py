"""How much memory a process holds, and how much a training step will take."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from gpt2cli.config import GPTConfig, TrainConfig

INTERPRETER = 380_000_000  # with torch and what it loads, but its compiler:
COMPILER = 150_000_000
SAMPLER = 110_000_000  # numba, which decodes a few rows on a CPU


def resident() -> int:
    """Bytes of memory this process has now; on other systems than Linux the most it had so far."""
    return _linux("VmRSS") or peak()


def peak() -> int:
    """The most bytes of memory this process had so far; 0 where unknown."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in it what the process was before it became this program.
    return _linux("VmHWM") or (most if sys.platform == "darwin" else most * 1024)


def total() -> int:
    """Bytes of memory the machine has, or the container on it; 0 where the system does not tell."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return machine


def _linux(field: str) -> int:
    """Of /proc/self/status, in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def of_training(model: GPTConfig, train: TrainConfig, *, rows: int, loss_rows: int, seq_len: int, world_size: int = 1) -> int:
    """Bytes a process holds at its peak, with micro-steps of `rows` rows of `seq_len` tokens, whose logits are made for
    `loss_rows` tokens at a time. On a CPU measured peaks were within 25% of it (README, "Train")."""
    C, V, L, M = model.n_embd, model.vocab_size, model.n_layer, model.inner_size
    N = model.num_parameters()
    hidden = L * (4 * C * C + 2 * C * M)  # the blocks' matrices, of which Muon keeps one number, AdamW two
    moments = 2 * N - (hidden if train.optimizer == "muon" else 0)
    held = 2 * N + moments
    if train.parallel == "fsdp" and world_size > 1:
        held = held // world_size + 2 * hidden // L
    low = train.dtype != "fp32"
    width = 2 if low else 4
    tokens = rows * seq_len
    # Of a block: its input, after attention, q, k and v, attention's output, both LayerNorms', before and after GELU.
    block = tokens * (2 * C * 4 + (3 * C + C + 2 * C + 2 * M) * width)
    if train.attention == "math" or (model.attn_dropout and train.device == "cpu"):  # there attention's weights are kept
        block += rows * model.n_head * seq_len * seq_len * 3 * width
    activations = L * tokens * C * 4 + 2 * block if train.activation_checkpointing else L * block
    n = min(tokens, loss_rows)
    # Logits; in low precision the weights in that dtype, and where there is no kernel of ours softmax in fp32 and part of the
    # gradient. (On CUDA there nearly always is one, and what a trial before the run finds to fit counts.)
    loss = n * V * width + (2 * N if low else 0)
    if low and train.device not in ("cpu", "cuda"):
        loss += n * V * 4 + V * C * 2
    sparse = train.device == "cpu" or (train.device == "cuda" and not train.deterministic)
    embedding = 0 if sparse and model.tie_word_embeddings else V * C * 4  # its gradient as an input, beside that as an output
    need = 4 * held + activations + loss + embedding
    if train.device == "cpu":  # a copy of the state while it is written, and gaps between tensors
        need += INTERPRETER + (N + moments) * 4 + (activations + loss) // 4
        loads_it = train.compile == "on" or train.activation_checkpointing or train.deterministic or world_size > 1
        need += COMPILER if loads_it else 0
        need += SAMPLER if train.sample_every else 0
    return need
