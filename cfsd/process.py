"""Run a stage in a process of its own, which ends with its parent and says why it ended.

The parent writes request.json into the draft; the child answers with facts.json, or with error.json.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import JsonValue

from cfsd.artifact import ERROR, FACTS, LOG, REQUEST
from cfsd.content import write_json
from cfsd.errors import BadInput, CfsdError, Crashed, NotFinite, OutOfMemory, Stopped, StoreError

KINDS: dict[str, type[CfsdError]] = {
    "bad_input": BadInput,
    "out_of_memory": OutOfMemory,
    "not_finite": NotFinite,
    "stopped": Stopped,
    "damaged": StoreError,
    "crash": Crashed,
}
STOP_SECONDS = 120  # a stopping child writes a checkpoint first
PR_SET_PDEATHSIG = 1


def run_in_process(module: str, folder: Path, request: str) -> dict[str, JsonValue]:
    """Run `python -m module folder` to its end and return the facts it wrote.

    An interrupt here ends the child first. Raises what the child's error.json says.
    """
    (folder / ERROR).unlink(missing_ok=True)
    (folder / FACTS).unlink(missing_ok=True)
    (folder / REQUEST).write_text(request)
    with (folder / LOG).open("a") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)], stdout=log, stderr=log, start_new_session=True
        )
        try:
            child.wait()
        except BaseException:
            _stop(child)
            raise
    if (folder / FACTS).exists():
        facts: dict[str, JsonValue] = json.loads((folder / FACTS).read_text())
        (folder / FACTS).unlink()
        return facts
    raise _error_of(folder, child.returncode)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _error_of(folder: Path, code: int) -> CfsdError:
    if (folder / ERROR).exists():
        error = json.loads((folder / ERROR).read_text())
        return KINDS[error["kind"]](error["message"])
    tail = "\n".join((folder / LOG).read_text().splitlines()[-15:])
    return Crashed(f"the process ended with code {code} and no word; the end of {folder / LOG}:\n{tail}")


def serve_request(work: Callable[[Path, str], dict[str, JsonValue]]) -> None:
    """Do `work(folder, request)` for the folder in sys.argv, as the child of `run_in_process`."""
    folder = Path(sys.argv[1])
    end_with_parent()
    with FileLock(folder / ".writer.lock"):  # an orphan of an earlier attempt may need a moment to die
        try:
            write_json(folder / FACTS, work(folder, (folder / REQUEST).read_text()))
        except Exception as error:
            traceback.print_exc()
            write_json(folder / ERROR, _described(error))
            sys.exit(1)


def _described(error: Exception) -> dict[str, Any]:
    for kind, cls in KINDS.items():
        if isinstance(error, cls):
            return {"kind": kind, "message": str(error)}
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        remedy = "lower machine.micro_batch_tokens, target.max_length or generate.length"
        return {"kind": "out_of_memory", "message": f"out of memory ({error}); {remedy}"}
    return {"kind": "crash", "message": f"{type(error).__name__}: {error}"}


def end_with_parent() -> None:
    """Make this process die when its parent does, even when that is killed."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
