"""How a benchmark times commands and says what it found."""

import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def seconds_in_turn(commands: dict[str, list[str]], rounds: int, **place: Any) -> dict[str, list[float]]:
    """Time the commands A B A B …, after one round that does not count, so that a slow minute hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, **place)
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def row(metric: str, ours: list[float], peer: list[float], aim: str) -> dict[str, Any]:
    """Return medians, and the median of the ratios pair by pair."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "metric": metric,
        "ours": round(statistics.median(ours), 3),
        "peer": round(statistics.median(peer), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "aim": aim,
    }


def tell(part: str, rows: list[dict[str, Any]]) -> None:
    """Print the table and write benchmarks/results/<part>.json."""
    table = Table(*rows[0], title=f"{part} (medians)")
    for entry in rows:
        table.add_row(*map(str, entry.values()))
    Console().print(table)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{part}.json"
    file.write_text(json.dumps({"part": part, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(file)
