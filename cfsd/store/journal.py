"""Journal: metrics and progress of a stage while it works, as files that others read.

`metrics.jsonl`  one line per value: {"time", "step", "name", "value"}
`progress.json`  {"done", "total", "unit"}
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsd.store.digests import write_json

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"
EVERY = 0.1  # seconds between two writings of progress: who reads it looks once a second at most


@dataclass
class Journal:
    """Metrics and progress of one draft, written into its folder."""

    folder: Path
    _told: float = field(default=float("-inf"), init=False)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append `values` at `step`, durable when this returns; after a line that a crash cut short they begin anew."""
        now = time.time()
        lines = (json.dumps({"time": now, "step": step, "name": k, "value": float(v)}) for k, v in values.items())
        with (self.folder / METRICS).open("a") as file:
            file.write(self._after_a_cut() + "".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _after_a_cut(self) -> str:
        with (self.folder / METRICS).open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return ""
            file.seek(-1, os.SEEK_END)
            return "" if file.read(1) == b"\n" else "\n"

    def progress(self, done: int, total: int, unit: str) -> None:
        """Record that `done` of `total` `unit` are finished; of calls in quick succession the first and the last."""
        now = time.monotonic()
        if done == total or now - self._told >= EVERY:
            self._told = now
            write_json(self.folder / PROGRESS, {"done": done, "total": total, "unit": unit}, durable=False)

    def cut_back(self, step: int) -> None:
        """Drop the metrics after `step`, which a resumed training writes again."""
        records = [record for record in read_metrics(self.folder) if record["step"] <= step]
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        temporary = self.folder / f".{METRICS}"
        temporary.write_text(text)
        temporary.replace(self.folder / METRICS)


def read_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of `metrics.jsonl`; a line that a crash cut short is left out."""
    path = folder / METRICS
    if not path.exists():
        return
    with path.open() as file:
        yield from whole_lines(file)


def whole_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of those lines of metrics that are whole."""
    for line in lines:
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record
