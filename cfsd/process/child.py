"""Run a stage in a process of its own, which ends with its parent and reports why it failed.

The parent writes request.json into the draft; the child answers with facts.json, or with error.json. Several processes
that work together are one child to their parent: a launcher (`cfsd.process.ranks`), whose ranks serve the request.
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

from cfsd.errors import BadEnvironment, BadInput, CfsdError, Crashed, NotFinite, OutOfMemory, Stopped, StoreError
from cfsd.process.remedies import memory_remedies
from cfsd.store.artifact import ERROR, LOG, METADATA, REQUEST
from cfsd.store.digests import write_json
from cfsd.store.disk import disk_is_full, full_disk, is_full

KINDS: dict[str, type[CfsdError]] = {
    "bad_environment": BadEnvironment,  # a kind of bad input, so it comes first
    "bad_input": BadInput,
    "out_of_memory": OutOfMemory,
    "not_finite": NotFinite,
    "stopped": Stopped,
    "damaged": StoreError,
    "crash": Crashed,
}
STOPPED_EARLY = "stopped before a step was done; run again"
STOP_SECONDS = 120  # a stopping child writes a checkpoint first
PR_SET_PDEATHSIG = 1
WRITER_LOCK = ".writer.lock"
RANKS = ".ranks"  # a file per rank that failed
RANK = "RANK"  # set by the launcher alone
PARENT = "CFSD_PARENT"  # a child that starts slowly may find that its parent is gone already
DISTRIBUTED = (RANK, "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class Child:
    """`python -m module folder` in a process group of its own; its answer is written into `folder`."""

    def __init__(
        self, module: str, folder: Path, request: str, environment: dict[str, str] | None = None, processes: int = 1
    ) -> None:
        """Start it, or a launcher of `processes` of it, with `environment` on top of this process' own."""
        self.folder = folder
        for name in (ERROR, METADATA):
            (folder / name).unlink(missing_ok=True)
        (folder / REQUEST).write_text(request)
        words = [module, str(folder)] if processes == 1 else ["cfsd.process.ranks", str(folder), module, str(processes)]
        inherited = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
        with (folder / LOG).open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words], stdout=log, stderr=log, start_new_session=True,
                env={**inherited, PARENT: str(os.getpid()), **(environment or {})},
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
        """Return the metadata that it wrote before it ended. Raises the error of its error.json."""
        if (self.folder / METADATA).exists():
            metadata: dict[str, JsonValue] = json.loads((self.folder / METADATA).read_text())
            (self.folder / METADATA).unlink()
            return metadata
        raise _error_of(self.folder, self.process.returncode)


def run_in_process(module: str, folder: Path, request: str, processes: int = 1) -> dict[str, JsonValue]:
    """Run `python -m module folder`, in `processes` that work together; return the metadata that it (rank 0) wrote.

    An interrupt here ends the child first. Raises the error of the child's error.json.
    """
    child = Child(module, folder, request, processes=processes)
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
    if is_full(folder):  # not even its error could be written
        return disk_is_full(folder)
    if code == -signal.SIGTERM:
        return Stopped(STOPPED_EARLY)
    return Crashed(f"the process {silent_end(folder, code)}")


def silent_end(folder: Path, code: int) -> str:
    """Return how a process ended that wrote no error: its code, the likely cause and the end of the draft's log."""
    tail = "\n".join((folder / LOG).read_text(errors="replace").splitlines()[-15:])
    cause = ""
    if code == -signal.SIGKILL:
        cause = f"; if no user killed it, the memory was full: {memory_remedies((folder / REQUEST).read_text())}"
    return f"ended with code {code} and no error message{cause}; the end of {folder / LOG}:\n{tail}"


def serve_request(work: Callable[[Path, str], dict[str, JsonValue]]) -> None:
    """Do `work(folder, request)` for the folder in sys.argv, as the child of `run_in_process` or one rank of it."""
    folder, rank = Path(sys.argv[1]), os.environ.get(RANK)
    end_with_parent()
    # an orphan of an earlier attempt may need a moment to die; the launcher holds the draft's own lock
    with FileLock(folder / (WRITER_LOCK if rank is None else f".writer.{rank}.lock")):
        request = (folder / REQUEST).read_text()
        try:
            metadata = work(folder, request)
        except Exception as error:
            now = time.time()
            traceback.print_exc()
            described = _described(error, request, folder)
            if rank is None:
                write_json(folder / ERROR, described)
            else:
                write_json(folder / RANKS / f"{rank}.json", described | {"rank": int(rank), "time": now})
            sys.exit(1)
        if rank in (None, "0"):
            write_json(folder / METADATA, metadata)
        if rank is not None and (torch := sys.modules.get("torch")) and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _described(error: Exception, request: str, folder: Path) -> dict[str, Any]:
    if not isinstance(error, CfsdError) and (full := full_disk(error, folder)):
        return {"kind": "bad_environment", "message": str(full)}
    for kind, cls in KINDS.items():
        if isinstance(error, cls):
            return {"kind": kind, "message": str(error)}
    if is_out_of_memory(error):
        return {"kind": "out_of_memory", "message": f"out of memory ({error}); {memory_remedies(request)}"}
    return {"kind": "crash", "message": f"{type(error).__name__}: {error}"}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means that a device or the allocator has no memory left."""
    if isinstance(error, MemoryError):
        return True
    if (torch := sys.modules.get("torch")) and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the message of the CPU allocator


def end_with_parent() -> None:
    """Make this process die when its parent does, even when that is killed."""
    parent = int(os.environ.get(PARENT) or os.getppid())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
