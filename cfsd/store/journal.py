"""Journal: metrics and progress of a stage while it works, as files that others read.

`metrics.jsonl`  one line per value: {"time", "step", "name", "value"}
`progress.json`  {"done", "total", "unit"}
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
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
        """Append `values` at `step`, durable when this returns."""
        now = time.time()
        lines = (json.dumps({"time": now, "step": step, "name": k, "value": float(v)}) for k, v in values.items())
        with (self.folder / METRICS).open("a") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

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
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
