"""Run a module in several processes of this machine, as torchrun does, and give one answer for all of them.

python -m cfsd.process.ranks DRAFT MODULE PROCESSES        what `run_in_process` starts; DRAFT holds request.json

This process holds the draft's lock. Its ranks are `python -m MODULE DRAFT` and end when it does. A rank that fails
writes its error into DRAFT/.ranks; the first of these errors becomes error.json.
"""

import json
import math
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cfsd.machine import THREADS_VARIABLE, Machine
from cfsd.process.child import PARENT, RANKS, STOP_SECONDS, STOPPED_EARLY, WRITER_LOCK, end_with_parent, silent_end
from cfsd.store.artifact import ERROR, METADATA
from cfsd.store.digests import write_json

SECONDS_TO_ANSWER = 10  # of STOP_SECONDS, for what is left to do here when the ranks have ended
SECONDS_TO_NOTICE = 5  # torch notes whole seconds; peers of a killed rank complain within this time, not before
NAMED = ("crash", "out_of_memory")  # other errors are the same on every rank


def main() -> None:
    """Run the ranks to their end; exit with 1 and error.json when they wrote no metadata."""
    folder, module, processes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    end_with_parent()
    with FileLock(folder / WRITER_LOCK):
        shutil.rmtree(folder / RANKS, ignore_errors=True)
        (folder / RANKS).mkdir()
        error = _run(folder, module, processes)
        if error and not (folder / METADATA).exists():
            write_json(folder / ERROR, error)
            sys.exit(1)
        shutil.rmtree(folder / RANKS)


def _run(folder: Path, module: str, processes: int) -> dict[str, Any] | None:
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault(THREADS_VARIABLE, str(Machine().resolved_threads(processes)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex, max_restarts=0,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / RANKS)), shutdown_timeout=STOP_SECONDS - SECONDS_TO_ANSWER,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", module, str(folder))
    except ChildFailedError as failed:
        return _first_failure(folder, failed.failures, processes)
    except SignalException:
        _wait_for_ranks()
        return _first_error(folder) or {"kind": "stopped", "message": STOPPED_EARLY}
    return None


def _wait_for_ranks() -> None:
    """Let the ranks save. They have the signal already; a second one to this process changes nothing."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    psutil.wait_procs(psutil.Process().children(), STOP_SECONDS - SECONDS_TO_ANSWER)


def _first_failure(folder: Path, failures: Mapping[int, ProcessFailure], processes: int) -> dict[str, Any]:
    """Return the error of the rank that failed first; the others only lost their peer, or were asked to end.

    A rank that was killed writes no error, and the errors of its peers come after its death.
    """
    error = _first_error(folder)
    written = {int(path.stem) for path in (folder / RANKS).glob("*.json")}
    silent = {rank: failure for rank, failure in failures.items() if rank not in written}
    ended = [(f.timestamp, rank, f.exitcode) for rank, f in silent.items() if f.exitcode not in (0, -signal.SIGTERM)]
    end, rank, code = min(ended, default=(math.inf, 0, 0))
    if ended and (error is None or end <= error["time"] + SECONDS_TO_NOTICE):
        return {"kind": "crash", "message": f"rank {rank} of {processes} {silent_end(folder, code)}"}
    if error is None:
        return {"kind": "stopped", "message": STOPPED_EARLY}
    where = f"rank {error['rank']} of {processes}: " if error["kind"] in NAMED else ""
    return {"kind": error["kind"], "message": where + error["message"]}


def _first_error(folder: Path) -> dict[str, Any] | None:
    errors = [json.loads(path.read_text()) for path in sorted((folder / RANKS).glob("*.json"))]
    return min(errors, key=lambda error: float(error["time"]), default=None)


if __name__ == "__main__":
    main()
