"""Our sampler against transformers' generate and against the machine: tokens per second, memory, the price of top-k.

make bench PART=sampling                             SmolLM2-135M, about 15 minutes, alone on the machine
python -m benchmarks.sampling --model FOLDER         the same for a transformers folder
python -m benchmarks.sampling --profile              where our steps' time goes, 2 minutes
python -m benchmarks.sampling --quick                tries the benchmark itself; its numbers mean nothing

Both sample rows from the start token at temperature 1, untruncated, in float32 with two threads; rows end where the
model ends them. Ours records log-probabilities, as a corpus must; generate is spared them, which is its best case.
At 64 tokens whole runs are timed. At 512, windows of a few steps: see `_windows`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import RESULTS, WIDTH, Worker, row, tell

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "benchmarks._sampling_run"]
THREADS = 2
TOP = 64
AIMS = {("peer", False): (">= 1.3", "ours >= 0.6", "<= 1"), ("peer", True): (">= 2", "", "<= 1")}


class Plan(NamedTuple):
    """What is measured; at `long` tokens only through windows of `steps` steps."""

    rounds: int = 3
    batches: tuple[int, ...] = (64, 128)
    length: int = 64
    long_batches: tuple[int, ...] = (32, 128)
    long: int = 512
    steps: int = 7
    whole_batch: int = 32  # of `long_batches`: one run of ours to the end at `long` tokens
    top_rounds: int = 5  # of a small difference: more and shorter
    top_length: int = 12


QUICK = Plan(1, (4, 8), 8, (4, 8), 48, 4, 4, 1, 8)


class Measured(NamedTuple):
    """One measurement, and two bounds of the same round in tokens per second: see benchmarks/_bound.py."""

    contender: str
    length: int
    rows: int
    tokens_per_second: float
    peak_mb: float
    bound: float
    own_bound: float


def _worker(contender: str, model: Path) -> Worker:
    return Worker(contender, [*RUN, contender, str(model)], cwd=ROOT, env=_environment(model))


def _environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(THREADS), "TOKENIZERS_PARALLELISM": "false", "CFSD_HOME": str(place / "home"),
    }  # fmt: skip


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformers folder; default: the packaged SmolLM2-135M")
    parser.add_argument("--profile", action="store_true", help="print where the time of our steps goes")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark itself")
    given = parser.parse_args()
    plan, started = QUICK if given.quick else Plan(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfsd-sampling-") as folder:
        data = Path(folder)
        source = [str(given.model.absolute())] if given.model else []
        fetch = [*RUN, "fetch", folder, *source]
        done = subprocess.run(fetch, cwd=ROOT, env=_environment(data), check=True, stdout=subprocess.PIPE, text=True)
        model = Path(done.stdout.splitlines()[-1])
        _say(started, "the model is here")
        if given.profile:
            _profile(plan, model)
        else:
            _bench(plan, model, data if given.quick else RESULTS, started)


def _bench(plan: Plan, model: Path, results: Path, started: float) -> None:
    found: list[Measured] = []
    with _worker("bound", model) as bound:
        for rows in sorted({*plan.batches, *plan.long_batches}):
            found += _batch(plan, rows, model, bound)
            _say(started, f"{rows} rows a batch")
        price = bound.ask("price", positions=[plan.length // 2, plan.long // 2])
    best = _best(found, "ours", plan.length, plan.batches)
    top = _top(plan, best, model)
    _say(started, f"top {TOP} at {best} rows")
    ending = _whole_long(plan, model, found)
    _say(started, f"{plan.long} tokens to the end")
    table = [*_pairs(plan, found, "peer"), *_pairs(plan, found, "peer", long=True)]
    table += [*_pairs(plan, found, "peer-static", long=True), ending, *top]
    notes = _notes(plan, found, price, time.monotonic() - started)
    tell("sampling", table, notes, folder=results, measured=[entry._asdict() for entry in found], price=price)


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)


def _batch(plan: Plan, rows: int, model: Path, bound: Worker) -> list[Measured]:
    """Measure all contenders at one batch, in turn, after a short run of each that does not count."""
    found = []
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(name, model)) for name in ("ours", "peer")]
        for worker in workers:
            worker.ask("whole", rows=rows, length=4)
        for turn in range(plan.rounds if rows in plan.batches else 0):
            limits = _limits(bound, rows)
            found += [_whole(plan, rows, worker, turn, limits) for worker in workers]
        if rows in plan.long_batches:
            if rows == plan.long_batches[-1]:
                workers.append(stack.enter_context(_worker("peer-static", model)))
            for worker in workers:
                worker.ask("window", rows=rows, after=1, steps=plan.steps, room=plan.long)
            for _ in range(plan.rounds):
                limits = _limits(bound, rows)
                found += [_windows(plan, rows, worker, limits) for worker in workers]
    return found


def _limits(bound: Worker, rows: int) -> tuple[float, float]:
    answer = bound.ask("rate", rows=rows)
    return answer["tokens_per_second"], answer["own_tokens_per_second"]


def _whole(plan: Plan, rows: int, worker: Worker, seed: int, limits: tuple[float, float]) -> Measured:
    answer = worker.ask("whole", rows=rows, length=plan.length, seed=seed)
    return Measured(worker.name, plan.length, rows, answer["tokens"] / answer["seconds"], answer["peak_mb"], *limits)


def _windows(plan: Plan, rows: int, worker: Worker, limits: tuple[float, float]) -> Measured:
    """Return the rate of a whole run of `plan.long` tokens, from its first, middle and last steps.

    Each window starts behind as many real tokens as a run would have by then, with room for the rest of the run, and
    no row ends. Seconds per step are taken to be linear between the windows. What rows that end save is not in it.
    """
    places = [0, (plan.long - plan.steps) // 2, plan.long - plan.steps]
    answers = [
        worker.ask("window", rows=rows, after=place + 1, steps=plan.steps, room=plan.long - place) for place in places
    ]
    seconds = _linear_total([answer["step_seconds"] for answer in answers], plan.long)
    peak = max(answer["peak_mb"] for answer in answers)
    return Measured(worker.name, plan.long, rows, rows * plan.long / seconds, peak, *limits)


def _linear_total(step_seconds: list[float], steps: int) -> float:
    """Return the sum over `steps` steps of seconds that run straight through values at start, middle and end."""
    first, middle, last = step_seconds
    return steps * (first + 2 * middle + last) / 4


def _top(plan: Plan, rows: int, model: Path) -> list[dict[str, Any]]:
    """Time sampling and writing the shard, with and without the likeliest tokens."""
    answers: dict[int, list[dict[str, Any]]] = {TOP: [], 0: []}
    with _worker("ours", model) as worker:
        for turn in range(plan.top_rounds + 1):
            for top, kept in answers.items():
                length = plan.top_length if turn else 4
                answer = worker.ask("whole", rows=rows, length=length, seed=turn, top=top, store=True)
                kept += [answer] if turn else []
    seconds = [[a["seconds"] for a in answers[top]] for top in answers]
    size = [[a["bytes"] / a["tokens"] for a in answers[top]] for top in answers]
    return [
        _row(f"top {TOP} stored (ours) and not (peer), {rows} rows: s", seconds, "<= 1.10"),
        _row("the same: bytes per token on disk, text included", size, ""),
    ]


def _whole_long(plan: Plan, model: Path, found: list[Measured]) -> dict[str, Any]:
    """Run ours once to the end of long rows. The peer's time is that of its windows: ended rows cost it the same."""
    rows = plan.whole_batch
    with _worker("ours", model) as worker:
        worker.ask("whole", rows=rows, length=4)
        answer = worker.ask("whole", rows=rows, length=plan.long)
    share = answer["tokens"] / (rows * plan.long)
    peer = statistics.median(_rates(found, "peer", plan.long, rows)) * share
    metric = f"{plan.long} tokens, {rows} rows, {1 - share:.0%} cut off by ends: tokens/s"
    return row(metric, [answer["tokens"] / answer["seconds"]], [peer], "")


def _of(found: list[Measured], contender: str, length: int, rows: int) -> list[Measured]:
    return [entry for entry in found if entry[:3] == (contender, length, rows)]


def _rates(found: list[Measured], contender: str, length: int, rows: int) -> list[float]:
    return [entry.tokens_per_second for entry in _of(found, contender, length, rows)]


def _best(found: list[Measured], contender: str, length: int, batches: Iterable[int]) -> int:
    """Return the batch with the highest median rate."""
    return max(batches, key=lambda rows: statistics.median(_rates(found, contender, length, rows)))


def _pairs(plan: Plan, found: list[Measured], peer: str, *, long: bool = False) -> list[dict[str, Any]]:
    """Return rates at equal batch and at each one's best, then the share of the bound and memory."""
    length, planned = (plan.long, plan.long_batches) if long else (plan.length, plan.batches)
    batches = [rows for rows in planned if _of(found, peer, length, rows)]
    name = f"{length} tokens, " + ("static cache, " if peer == "peer-static" else "")
    pairs = {rows: [_of(found, who, length, rows) for who in ("ours", peer)] for rows in batches}
    ours_at, peer_at = (_best(found, who, length, batches) for who in ("ours", peer))
    best, best_name = [pairs[ours_at][0], pairs[peer_at][1]], f"{name}best: {ours_at} and {peer_at} rows"
    aims = AIMS.get((peer, long), ("", "", ""))
    return [
        *(_row(f"{name}{rows} rows: tokens/s", map(_speeds, pair), "") for rows, pair in pairs.items()),
        _row(f"{best_name}: tokens/s", map(_speeds, best), aims[0]),
        _row(f"{best_name}: share of bound", map(_shares, best), aims[1]),
        _row(f"{name}{ours_at} rows: peak resident MB", map(_peaks, pairs[ours_at]), aims[2]),
    ]


def _row(metric: str, ours_and_peer: Iterable[list[float]], aim: str) -> dict[str, Any]:
    ours, peer = ours_and_peer
    return row(metric, ours, peer, aim)


def _speeds(entries: list[Measured]) -> list[float]:
    return [entry.tokens_per_second for entry in entries]


def _shares(entries: list[Measured]) -> list[float]:
    return [entry.tokens_per_second / entry.bound for entry in entries]


def _peaks(entries: list[Measured]) -> list[float]:
    return [entry.peak_mb for entry in entries]


def _notes(plan: Plan, found: list[Measured], price: dict[str, Any], seconds: float) -> list[str]:
    bounds = [entry.bound for entry in found]
    own = {entry.rows: 0.0 for entry in found}
    for entry in found:
        own[entry.rows] = max(own[entry.rows], entry.own_bound)
    attention = ", ".join(f"{flops / 1e6:.1f} at position {place}" for place, flops in price["attention_flops"].items())
    return [
        f"bound: best measured float32 matrix product over {price['flops_per_token'] / 1e6:.0f} MFLOP a token "
        f"(2 x weights that multiply, head included): {min(bounds):.0f}-{max(bounds):.0f} tokens/s. "
        f"Not in it, attention's MFLOP: {attention}. Each product at its own rate instead: "
        + ", ".join(f"{speed:.0f} at {rows} rows" for rows, speed in own.items()),
        f"{plan.length} tokens: whole runs, rows ending as they do; tokens after an end do not count. "
        f"{plan.long} tokens: windows of {plan.steps} steps with all rows alive, but for the row with ends, where "
        "ours is one whole run.",
        f"{THREADS} threads, {plan.rounds} rounds in turn (top {TOP}: {plan.top_rounds}), {seconds / 60:.1f} minutes. "
        "Ours records log-probabilities, generate does not.",
    ]


def _profile(plan: Plan, model: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    rows, steps = plan.long_batches[-1], 2 * plan.steps
    places = [plan.length // 2, plan.long - steps]
    with _worker("bound", model) as bound:
        limit = bound.ask("rate", rows=rows)
    answers = [_profiled(model, rows=rows, after=place, steps=steps, room=plan.long - place) for place in places]
    table = Table(
        Column("section", no_wrap=True), *(f"ms at {place}" for place in places), *(f"% at {place}" for place in places)
    )
    for section in sorted(answers[0]["sections"], key=lambda name: -answers[0]["sections"][name]):
        seconds = [answer["sections"].get(section, 0.0) for answer in answers]
        shares = [f"{s / a['total']:.1%}" for s, a in zip(seconds, answers, strict=True)]
        table.add_row(section, *(f"{1e3 * s:.1f}" for s in seconds), *shares)
    Console(width=WIDTH).print(table)
    least = rows / limit["tokens_per_second"]
    totals = zip(places, (answer["total"] for answer in answers), strict=True)
    taken = ", ".join(f"{1e3 * total:.0f} ms at {place}" for place, total in totals)
    print(f"a step of {rows} rows takes {taken}; at the bound, {limit['gflops']:.0f} GFLOP/s, {1e3 * least:.0f} ms")


def _profiled(model: Path, **job: int) -> dict[str, Any]:
    with _worker("ours", model) as worker:
        worker.ask("window", **job)
        return worker.ask("profile", **job)


if __name__ == "__main__":
    main()
