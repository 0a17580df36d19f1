"""How a benchmark times commands and says what it found."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
WIDTH = 150  # of a table in a file


def seconds_in_turn(commands: dict[str, list[str]], rounds: int, **place: Any) -> dict[str, list[float]]:
    """Time the commands A B A B …, after one round that does not count, so that a slow minute hits all of them."""
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **place)
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}")
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


class Worker:
    """A process that takes jobs and gives answers, one JSON object a line each; at work only while it is asked."""

    def __init__(self, name: str, command: list[str], **place: Any) -> None:
        """Start it."""
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, **place
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        """Return its answer to one job."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **job}) + "\n")
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} ended during {do} {job}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


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


def machine_in_words() -> str:
    """Return the machine's cores and widest vector instructions, such as "2 cores x86_64, AVX512"."""
    import torch  # some benchmarks need none

    return f"{os.cpu_count()} cores {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def tell(
    part: str, rows: list[dict[str, Any]], notes: Sequence[str] = (), *, folder: Path = RESULTS, **detail: Any
) -> None:
    """Print the table and what must be known to read it, and write both to <part>.json in `folder`.

    `detail`, such as single measurements, goes to the file only.
    """
    table = Table(title=f"{part} (medians)")
    for name in rows[0]:
        table.add_column(name, no_wrap=name == "metric", overflow="fold")
    for entry in rows:
        table.add_row(*map(str, entry.values()))
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table, *notes, sep="\n")
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    folder.mkdir(exist_ok=True)
    file = folder / f"{part}.json"
    found = {"part": part, "machine": machine, "rows": rows, "notes": list(notes), **detail}
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(file)


def markdown(rows: list[list[str]]) -> str:
    """Return rows, the first of them the head, as a table."""
    lines = [rows[0], ["---", *["--:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
