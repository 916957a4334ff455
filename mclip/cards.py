"""Model cards: what a model is, the command that made it, and what was measured, none of it typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import atomic_path


def write_card(
    folder: str | Path, title: str, command: str, seconds: float, records: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``README.md`` into a model folder from results records of that model.

    Args:
        folder: the model's folder.
        title: one sentence that says what the model is.
        command: what to type to train it again.
        seconds: how long that took.
        records: results records, all of this model.
    """
    model = records[0]["model"]
    lines = [
        f"# {title}",
        "",
        f"Parameters: {model['parameters']:,}. Weights' SHA-256: `{model['sha256']}`.",
        "",
        f"Trained in {seconds:.0f} s on {records[0]['device']} by",
        "",
        f"    {command}",
        "",
        "| set | metric | percent | 95 % interval | n |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        if record["task"] == "zero_shot":
            top1 = record["metrics"]["top1"]
            interval = f"{top1['low']:.1f} to {top1['high']:.1f}"
            lines.append(f"| {record['dataset']} | top-1 | {top1['value']:.1f} | {interval} | {record['n']} |")
    lines += [
        "",
        "Trained on drawn scenes alone: it knows their shapes, colours and words, and nothing of photographs.",
        "",
    ]
    with atomic_path(Path(folder) / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
