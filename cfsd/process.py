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


class Child:
    """`python -m module folder` in a process group of its own; what it says lies in `folder`."""

    def __init__(self, module: str, folder: Path, request: str, environment: dict[str, str] | None = None) -> None:
        """Start it, with `environment` on top of this process' own."""
        self.folder = folder
        for name in (ERROR, FACTS):
            (folder / name).unlink(missing_ok=True)
        (folder / REQUEST).write_text(request)
        with (folder / LOG).open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(folder)],
                stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(environment or {})},
            )  # fmt: skip

    def stop(self) -> None:
        """Ask it to end, and make it end when it takes too long."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def answer(self) -> dict[str, JsonValue]:
        """Return the facts that it wrote before it ended. Raises what its error.json says."""
        if (self.folder / FACTS).exists():
            facts: dict[str, JsonValue] = json.loads((self.folder / FACTS).read_text())
            (self.folder / FACTS).unlink()
            return facts
        raise _error_of(self.folder, self.process.returncode)


def run_in_process(module: str, folder: Path, request: str) -> dict[str, JsonValue]:
    """Run `python -m module folder` to its end and return the facts it wrote.

    An interrupt here ends the child first. Raises what the child's error.json says.
    """
    child = Child(module, folder, request)
    try:
        child.process.wait()
    except BaseException:
        child.stop()
        raise
    return child.answer()


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
    if is_out_of_memory(error):
        remedy = "lower machine.micro_batch_tokens, target.max_length or generate.length"
        return {"kind": "out_of_memory", "message": f"out of memory ({error}); {remedy}"}
    return {"kind": "crash", "message": f"{type(error).__name__}: {error}"}


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` is a device's or the allocator's complaint about memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU allocator's words


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
