"""Our sampler against vLLM and transformers' generate on the same cores, and against the machine's bound.

make bench PART=sampling                             SmolLM2-135M, about 15 minutes, alone on the machine
CFSD_VLLM_PYTHON=/where/vllm/is/bin/python make bench PART=sampling          with vLLM
python -m benchmarks.sampling --model FOLDER         the same for a transformers folder
python -m benchmarks.sampling --profile              where our steps' time goes, 2 minutes
python -m benchmarks.sampling --quick                tries the benchmark itself; its numbers mean nothing

All write rows from the start token at temperature 1, untruncated, in float32 on all cores, and no row ends: equal
rows, equal tokens. Ours and vLLM record log-probabilities, as a corpus must, alone and with the 64 likeliest; generate
is spared them, which is its best case. At 64 tokens all runs are whole. At 512 only vLLM's are, the others windows of a
few steps: see `_windows`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._result import RESULTS, WIDTH, Worker, machine_in_words, row, tell
from benchmarks._vllm import UNMEASURED, vllm_engine, vllm_python
from cfsd.machine import usable_cores

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "benchmarks._sampling_run"]
THREADS = usable_cores()
TOP = 64
PEERS = ("vllm", "generate", "generate-static")
AIMS = {("vllm", 64, 0): ">= 1", ("generate", 64, 0): ">= 1.3", ("generate", 512, 0): ">= 2"}


class Plan(NamedTuple):
    """What is measured; ours and generate at `long` tokens only through windows of `steps` steps."""

    rounds: int = 3
    rows: int = 128
    length: int = 64
    long_rows: int = 32
    long: int = 512
    steps: int = 7

    def batch(self, length: int) -> int:
        """Return the rows of the runs of `length` tokens."""
        return self.rows if length == self.length else self.long_rows


QUICK = Plan(1, 8, 8, 4, 48, 4)


class Measured(NamedTuple):
    """One measurement, and two bounds of the same round in tokens per second: see benchmarks/_bound.py."""

    contender: str
    length: int
    top: int
    tokens_per_second: float
    peak_mb: float
    bound: float
    own_bound: float


def _worker(contender: str, model: Path) -> Worker:
    return Worker(contender, [*RUN, contender, str(model)], cwd=ROOT, env=_environment(model))


def _environment(place: Path) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(THREADS), "OMP_PROC_BIND": "true", "TOKENIZERS_PARALLELISM": "false",
        "CFSD_HOME": str(place / "home"),
    }  # fmt: skip


def main() -> None:
    """Read the command line and measure."""
    given = _arguments()
    plan, started = QUICK if given.quick else Plan(rounds=given.rounds), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfsd-sampling-") as folder:
        data = Path(folder)
        source = [str(given.model.absolute())] if given.model else []
        fetch = [*RUN, "fetch", folder, *source]
        done = subprocess.run(fetch, cwd=ROOT, env=_environment(data), check=True, stdout=subprocess.PIPE, text=True)
        model = Path(done.stdout.splitlines()[-1])
        _say(started, "the model is here")
        if given.profile:
            _profile(plan, model)
            return
        results = data if given.quick else RESULTS
        found = _earlier(results) if given.more else []
        for length in (plan.length, plan.long) if given.length is None else (given.length,):
            found += _measure(plan, length, model, started)
        _tell(plan, found, model, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformers folder; default: the packaged SmolLM2-135M")
    parser.add_argument("--length", type=int, choices=[Plan().length, Plan().long], help="only rows of this length")
    parser.add_argument("--rounds", type=int, default=Plan().rounds, help="measurements of each; default: 3")
    parser.add_argument("--more", action="store_true", help="add to what the results' file holds")
    parser.add_argument("--profile", action="store_true", help="print where the time of our steps goes")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark itself")
    return parser.parse_args()


def _earlier(results: Path) -> list[Measured]:
    return [Measured(**entry) for entry in json.loads((results / "sampling.json").read_text())["measured"]]


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)


def _measure(plan: Plan, length: int, model: Path, started: float) -> list[Measured]:
    """Measure all contenders in turn, after a short run of each that does not count."""
    found, rows = [], plan.batch(length)
    with ExitStack() as stack:
        bound = stack.enter_context(_worker("bound", model))
        names = ["ours", "generate"] + ["generate-static"] * (length == plan.long)
        workers = [stack.enter_context(_worker(name, model)) for name in names]
        if vllm_python():
            workers.append(stack.enter_context(vllm_engine(model, rows=rows)))
        for worker in workers:
            worker.ask("whole", rows=rows, length=4)
        _say(started, f"{rows} rows: {', '.join(worker.name for worker in workers)} are ready")
        for turn in range(plan.rounds):
            answer = bound.ask("rate", rows=rows)
            limits = answer["tokens_per_second"], answer["own_tokens_per_second"]
            for worker in workers:
                for top in (0, TOP) if worker.name in ("ours", "vllm") else (0,):
                    rate, peak = _rate(plan, worker, length, {"top": top, "seed": turn})
                    found.append(Measured(worker.name, length, top, rate, peak, *limits))
                    _say(started, f"{worker.name}, {length} tokens, top {top}: {rate:.0f} tokens/s of {limits[0]:.0f}")
    return found


def _rate(plan: Plan, worker: Worker, length: int, job: dict[str, int]) -> tuple[float, float]:
    """Return tokens per second, and the process's peak memory in MB (0: it has several)."""
    rows = plan.batch(length)
    if length == plan.long and worker.name != "vllm":
        return _windows(plan, worker, rows, job["top"])
    answer = worker.ask("whole", rows=rows, length=length, **job)
    return answer["tokens"] / answer["seconds"], answer.get("peak_mb", 0.0)


def _windows(plan: Plan, worker: Worker, rows: int, top: int) -> tuple[float, float]:
    """Return the rate of a whole run of `plan.long` tokens, from its first, middle and last steps.

    Each window starts behind as many real tokens as a run would have by then, with room for the rest of the run.
    Seconds per step are taken to be linear between the windows.
    """
    places = [0, (plan.long - plan.steps) // 2, plan.long - plan.steps]
    answers = [
        worker.ask("window", rows=rows, after=place + 1, steps=plan.steps, room=plan.long - place, top=top)
        for place in places
    ]
    seconds = _linear_total([answer["step_seconds"] for answer in answers], plan.long)
    return rows * plan.long / seconds, max(answer["peak_mb"] for answer in answers)


def _linear_total(step_seconds: list[float], steps: int) -> float:
    """Return the sum over `steps` steps of seconds that run straight through values at start, middle and end."""
    first, middle, last = step_seconds
    return steps * (first + 2 * middle + last) / 4


def _tell(plan: Plan, found: list[Measured], model: Path, results: Path) -> None:
    table = [entry for length in (plan.length, plan.long) for entry in _rows(plan, found, length)]
    with _worker("bound", model) as worker:
        price = worker.ask("price", positions=[plan.length // 2, plan.long // 2])
    with _worker("ours", model) as worker:
        size = {
            top: worker.ask("stored", rows=plan.rows // 8, length=plan.length, top=top)["bytes"] for top in (0, TOP)
        }
    notes = [*_notes(plan, found, price), f"bytes per token on disk: {size[0]:.0f}, with the top {TOP} {size[TOP]:.0f}"]
    tell("sampling", table, notes, folder=results, measured=[entry._asdict() for entry in found], price=price)


def _rows(plan: Plan, found: list[Measured], length: int) -> list[dict[str, Any]]:
    """Return ours beside each peer, then our share of the bound and memory, and the price of the likeliest."""
    ours, name = _of(found, "ours", length), f"{length} tokens, {plan.batch(length)} rows"
    if not ours:
        return []
    table = []
    for peer in PEERS:
        for top in (0, TOP):
            if theirs := _of(found, peer, length, top):
                what = f"{name}, {f'top {TOP}, ' if top else ''}ours and {peer}: tokens/s"
                mine = _of(found, "ours", length, top)
                table.append(row(what, _speeds(mine), _speeds(theirs), AIMS.get((peer, length, top), "")))
    generate, whom = _of(found, "generate", length), "ours and generate"
    aim = "ours >= 0.6" if length == plan.length else ""
    table.append(row(f"{name}: share of bound, {whom}", _shares(ours), _shares(generate), aim))
    table.append(row(f"{name}: peak resident MB, {whom}", _peaks(ours), _peaks(generate), ""))
    for who, aim in (("ours", "<= 1.10"), ("vllm", "")):
        if with_top := _of(found, who, length, TOP):
            what = f"{name}, {who} without the top {TOP} and with: tokens/s"
            table.append(row(what, _speeds(_of(found, who, length)), _speeds(with_top), aim))
    return table


def _shares(entries: list[Measured]) -> list[float]:
    return [entry.tokens_per_second / entry.bound for entry in entries]


def _peaks(entries: list[Measured]) -> list[float]:
    return [entry.peak_mb for entry in entries]


def _of(found: Iterable[Measured], contender: str, length: int, top: int = 0) -> list[Measured]:
    return [entry for entry in found if entry[:3] == (contender, length, top)]


def _speeds(entries: list[Measured]) -> list[float]:
    return [entry.tokens_per_second for entry in entries]


def _notes(plan: Plan, found: list[Measured], price: dict[str, Any]) -> list[str]:
    bounds = [entry.bound for entry in found]
    own = {entry.length: 0.0 for entry in found}
    for entry in found:
        own[entry.length] = max(own[entry.length], entry.own_bound)
    attention = ", ".join(f"{flops / 1e6:.1f} at position {place}" for place, flops in price["attention_flops"].items())
    return [
        f"bound: best measured float32 matrix product over {price['flops_per_token'] / 1e6:.0f} MFLOP a token "
        f"(2 x weights that multiply, head included): {min(bounds):.0f}-{max(bounds):.0f} tokens/s. "
        f"Not in it, attention's MFLOP: {attention}. Each product at its own rate instead: "
        + ", ".join(f"{speed:.0f} at {plan.batch(length)} rows" for length, speed in own.items()),
        f"No row ends. {plan.length} tokens: whole runs. {plan.long} tokens: vLLM whole runs, the others windows of "
        f"{plan.steps} steps. Ours and vLLM record log-probabilities, generate does not. {machine_in_words()}.",
        *([] if _any_vllm(found) else [UNMEASURED]),
    ]


def _any_vllm(found: list[Measured]) -> bool:
    return any(entry.contender == "vllm" for entry in found)


def _profile(plan: Plan, model: Path) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    rows, steps = plan.rows, 2 * plan.steps
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
