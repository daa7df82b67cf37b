"""One plan for all ranks: the first decides, the others look whether their machines have what it takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpt2cli import atomic, device, sources
from gpt2cli.distributed import Ranks
from gpt2cli.errors import UserError
from gpt2cli.plan import Plan
from gpt2cli.resume import Record
from gpt2cli.shards import find_shards
from gpt2cli.survey import Progress
from gpt2cli.tokenizer import Encoding


def plan_together(
    ranks: Ranks,
    decide: Callable[[], Plan],
    *,
    cache: Path | None = None,
    on_tokenize: Progress = lambda what, done, total: None,
) -> Plan:
    """The plan that rank 0 decides, on every rank. Another machine needs the tokens in the same place, or the text, which it
    then tokenizes for itself; the run's folder and the model to start from only the first.

    Raises UserError on rank 0, naming the rank and its machine, where one lacks the data, a shard of it, or the device.
    """
    decided: list[Plan] = []

    def first() -> str:
        decided.append(decide())
        return json.dumps(_to_json(decided[0]))

    words = ranks.tell(first)
    return ranks.agree(lambda: decided[0] if decided else _follow(json.loads(words), cache, on_tokenize))


def _to_json(plan: Plan) -> dict[str, Any]:
    folders = [source.tokens for source in plan.sources]
    shards = [path for folder in folders for split in ("train", "val") for path in find_shards(folder, split)]
    return plan.to_json() | {
        "out": str(plan.out),
        "resume_from": str(plan.resume_from) if plan.resume_from else None,
        "world_size": plan.world_size,
        "shards": {atomic.to_home(path): path.stat().st_size for path in shards},
    }


def _follow(facts: Mapping[str, Any], cache: Path | None, on_tokenize: Progress) -> Plan:
    run = Record.read(facts, "the plan of rank 0")
    device.pick_device(run.train.device)
    encoding = sources.find_vocabulary(list(run.data.tokens.values())) or Encoding.gpt2()
    found = _find_sources(run, facts["shards"], encoding, cache, on_tokenize)
    encoding = sources.find_vocabulary([source.tokens for source in found]) or encoding
    return Plan(
        out=Path(facts["out"]),
        sources=found,
        model=run.model,
        train=run.train,
        encoding=encoding,
        init_from=run.init_from,
        init_sha256=run.init_sha256,
        asked=run.asked,
        resume_from=Path(facts["resume_from"]) if facts["resume_from"] else None,
        sessions=run.sessions,
        world_size=facts["world_size"],
    )


def _find_sources(
    run: Record, shards: Mapping[str, int], encoding: Encoding, cache: Path | None, on_tokenize: Progress
) -> tuple[sources.Source, ...]:
    """The same tokens as rank 0's: where they are there, or else made of the text."""
    expected = {atomic.from_home(path): size for path, size in shards.items()}
    lacks = next((path for path, size in expected.items() if not path.is_file() or path.stat().st_size != size), None)
    what = ""
    if lacks is None:
        found = sources.make_sources(run.data.given, run.data.tokens)
    else:
        what = "is missing here" if not lacks.is_file() else f"is not of the {expected[lacks]:,} bytes that rank 0 has"
        try:
            found = sources.find_sources(run.data.given, run.train, encoding, cache, on_tokenize)
        except UserError as error:
            raise UserError(f"{lacks} {what}, and it cannot be made anew: {error}") from None
    if sources.data_sha256(found) != run.data.sha256:
        what = f"{lacks} {what}" if lacks else f"{' and '.join(run.data.given)} is not the data that rank 0 has"
        raise UserError(f"{what}: copy it there, or share the folder")
    return found
