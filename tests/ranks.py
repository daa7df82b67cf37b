"""What a rank does in a test, started by torchrun: `ranks.py MODE [ARGUMENTS OF gpt2]`."""

import math
import os
import signal
import sys
from pathlib import Path

import torch

from gpt2cli import run as run_room
from gpt2cli.commands import app
from gpt2cli.config import GPTConfig
from gpt2cli.data import eval_batches, micro_steps
from gpt2cli.distributed import Ranks, joined, local_part
from gpt2cli.guard import Guard
from gpt2cli.model import GPT
from gpt2cli.optim import make_optimizers
from gpt2cli.shards import Tokens
from gpt2cli.step import build, train_step, validate

CONFIG = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=16, vocab_size=97)


def crash() -> None:
    """Rank 1 dies in the sixth step of the first attempt."""
    step = run_room.Run.step

    def dying(run) -> None:
        if run.progress.step == 5 and run.ranks.rank == 1 and not Path("crashed").exists():
            Path("crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(run)

    run_room.Run.step = dying


def poison() -> None:
    """From the sixth step on, rank 1's loss is no number, three times."""
    train, times = run_room.train_step, []

    def poisoned(engine, optimizers, batches, **more):
        if more["ranks"].rank == 1 and 5 <= len(times) < 8:
            more["shares"] = [math.nan for _ in more["shares"]]
        times.append(0)
        return train(engine, optimizers, batches, **more)

    run_room.train_step = poisoned


def check(ranks: Ranks) -> None:
    """One step of all ranks is the step of one, whatever is dealt to whom; and so is an evaluation."""
    where = torch.device("cpu")
    ranks.connect(where)
    torch.manual_seed(0)
    first = GPT(CONFIG).state_dict()
    ids = torch.randint(97, (5, 17))
    x, y = ids[:, :-1], ids[:, 1:]
    for optimizer in ("adamw", "muon"):
        for parallel in ("ddp", "fsdp"):
            for rows, most in ((5, 2), (4, 4), (1, 1)):  # also fewer rows than ranks
                model, engine = build(
                    CONFIG, where, dtype="fp32", parallel=parallel, activation_checkpointing=True, ranks=ranks
                )
                alone = GPT(CONFIG)
                alone.load_state_dict(first)
                for name, parameter in model.named_parameters():
                    ranks.fill(parameter, first[name] if ranks.is_first else None)
                ours, theirs = (make_optimizers(m, optimizer, 0.1, ranks=r) for m, r in ((model, ranks), (alone, Ranks())))
                mine = micro_steps(rows, most, ranks.rank, ranks.world_size)
                batches = [(x[a : a + max(1, n)], y[a : a + max(1, n)]) for a, n in mine]
                for _ in range(2):
                    shares = [n / rows for _, n in mine]
                    found = train_step(engine, ours, batches, lr=1e-2, grad_clip=0.5, shares=shares, ranks=ranks)
                    expected = train_step(alone, theirs, [(x[:rows], y[:rows])], lr=1e-2, grad_clip=0.5)
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
                for name, parameter in model.named_parameters():
                    whole = ranks.copy(parameter)
                    if ranks.is_first:
                        torch.testing.assert_close(whole, alone.state_dict()[name], atol=2e-5, rtol=1e-4)
                guard = Guard(where)
                before = [local_part(p).clone() for p in model.parameters()]
                bad = [math.nan if ranks.rank == 1 else n / rows for _, n in mine]
                train_step(engine, ours, batches, lr=1e-2, grad_clip=0.5, shares=bad, ranks=ranks, guard=guard)
                assert int(guard.skipped) == 1
                assert all(torch.equal(a, local_part(b)) for a, b in zip(before, model.parameters(), strict=True))
                if parallel == "fsdp":
                    held = sum(local_part(p).numel() for p in model.parameters())
                    assert held <= CONFIG.num_parameters() / ranks.world_size * 1.1, "a rank holds its slice alone"
                    continue
                tokens = Tokens([ids.flatten().numpy()])
                lengths = torch.arange(97)
                for limit in (0, 32):
                    one = validate(model, eval_batches(tokens, 2, 16, limit), lambda: torch.no_grad(), lengths)
                    all_ = validate(model, eval_batches(tokens, 2, 16, limit), lambda: torch.no_grad(), lengths, ranks)
                    assert one == all_, "to the last bit"


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "check":
        with joined() as ranks:
            check(ranks)
    else:
        {"crash": crash, "poison": poison}[mode]()
        sys.exit(app.run(arguments))
