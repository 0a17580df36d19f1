"""Our client against the server's own rate: vLLM on this machine's CPU, requests in flight swept.

make bench PART=server                               SmolLM2-135M, about 4 minutes, alone on the machine; needs vLLM
python -m benchmarks.server --model FOLDER           the same for a transformers folder
python -m benchmarks.server --quick                  tries the benchmark itself; its numbers mean nothing

CFSD_VLLM_PYTHON names the python of an environment with vLLM, or CFSD_VLLM_URL a server of the model that runs already.
The server's own rate is what the plainest loop gets: the same requests, written beforehand, over as many connections,
whose answers are not read. Client and server share the cores, so that what the client does is lost to the server.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._model import ROOT, environment, fetched
from benchmarks._result import RESULTS, Worker, row, tell
from benchmarks._vllm import vllm_server

RUN = [sys.executable, "-m", "benchmarks._server_run"]
THREADS = 1  # of our client
TOP = 64


class Load(NamedTuple):
    """Rows of `length` tokens, `in_flight` at a time, with `top` log-probabilities of each token."""

    in_flight: int
    rows: int
    length: int = 24
    top: int = 0

    def __str__(self) -> str:
        """Name it in a table."""
        return f"{self.in_flight} in flight, {self.rows} rows" + (f", top {self.top}" if self.top else "")


LOADS = (Load(4, 8), Load(16, 32), Load(64, 64), Load(64, 64, top=TOP))
QUICK = (Load(4, 4, 8), Load(4, 4, 8, top=TOP))


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a transformers folder; default: the packaged SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="few rows, to try the benchmark itself")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfsd-server-") as folder:
        data = Path(folder)
        model = fetched(data, given.model, THREADS)
        with vllm_server(model, data / "vllm.log") as url:
            _say(started, "vLLM answers")
            _bench(model, url, data if given.quick else RESULTS, started, quick=given.quick)


def _say(started: float, what: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)


def _bench(model: Path, url: str, results: Path, started: float, *, quick: bool) -> None:
    rounds, rows, measured = 1 if quick else 3, list[dict[str, Any]](), dict[str, Any]()
    with ExitStack() as stack:
        place = {"cwd": ROOT, "env": environment(model.parent, THREADS)}
        workers = {
            role: stack.enter_context(Worker(role, [*RUN, role, url, str(model)], **place)) for role in ("ours", "loop")
        }
        for worker in workers.values():
            worker.ask("sample", **Load(4, 8, 4)._asdict(), seed=99)
        for load in QUICK if quick else LOADS:
            answers = measured[str(load)] = _in_turn(workers, load, rounds)
            rates = {role: [a["tokens"] / a["seconds"] for a in found] for role, found in answers.items()}
            rows.append(row(f"{load}: tokens/s", rates["ours"], rates["loop"], ">= 0.95"))
            _say(started, str(load))
    own = {name: statistics.median(a["own_seconds"] for a in found["ours"]) for name, found in measured.items()}
    notes = [
        f"peer: the plainest loop over the same requests; {rounds} rounds in turn; "
        f"{(time.monotonic() - started) / 60:.1f} minutes, vLLM's start included",
        "our client's own seconds: " + "; ".join(f"{seconds:.2f} ({name})" for name, seconds in own.items()),
    ]
    tell("server", rows, notes, folder=results, measured=measured)


def _in_turn(workers: dict[str, Worker], load: Load, rounds: int) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {role: [] for role in workers}
    for turn in range(rounds):
        for role, worker in workers.items():
            answers[role].append(worker.ask("sample", **load._asdict(), seed=turn))
    return answers


if __name__ == "__main__":
    main()
