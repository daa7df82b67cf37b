"""The loss over the steps of a run, drawn from its log: in characters, and as a picture where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl
Points = list[tuple[int, float]]  # step, loss


def points(lines: Lines, key: str) -> Points:
    """Of `loss` or `val_loss`; where a step was logged twice, as after a rollback, the later one. What cannot be drawn is left
    out: the log is a file that anybody may change."""
    found = {line["step"]: line[key] for line in lines if isinstance(line.get(key), float) and abs(line[key]) < 1e9}
    return sorted((step, loss) for step, loss in found.items() if 0 < step < 1 << 53)


def draw(lines: Lines, width: int = 64, height: int = 12) -> list[str]:
    """The training loss as dots, each the mean of its column's steps, and the validation loss as circles, in `height` lines
    and one for the steps; nothing where there are not two steps to draw."""
    train, val = points(lines, "loss"), points(lines, "val_loss")
    steps = [step for step, _ in train + val]
    if len(set(steps)) < 2:
        return []
    first, last = min(steps), max(steps)
    columns: dict[int, list[float]] = {}
    for step, loss in train:
        columns.setdefault(round((step - first) / (last - first) * (width - 1)), []).append(loss)
    dots = {column: fmean(losses) for column, losses in columns.items()}
    circles = {round((step - first) / (last - first) * (width - 1)): loss for step, loss in val}
    heights = [*dots.values(), *circles.values()]
    low, high = min(heights), max(heights)
    grid = [[" "] * width for _ in range(height)]
    for sign, marks in (("·", dots), ("○", circles)):
        for column, loss in marks.items():
            grid[round((high - loss) / ((high - low) or 1) * (height - 1))][column] = sign
    labels = {0: f"{high:.2f}", height - 1: f"{low:.2f}"}
    edge = max(map(len, labels.values()))
    drawn = [f"{labels.get(n, ''):>{edge}} │{''.join(row).rstrip()}" for n, row in enumerate(grid)]
    return [*drawn, f"{'':>{edge}} └ step {first:,}{f'{last:,}':>{width - len(f'step {first:,}') - 1}}"]


def save(lines: Lines, path: Path) -> bool:
    """The same as a picture; False where there is nothing to draw, or matplotlib, the extra `plot`, is not installed."""
    curves = {"training": points(lines, "loss"), "validation": points(lines, "val_loss")}
    if max(map(len, curves.values())) < 2:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, curve in curves.items():
        axes.plot([step for step, _ in curve], [loss for _, loss in curve], "o-" if label == "validation" else "-", label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.set_title(path.parent.name, parse_math=False)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return True
