"""Where our servers listen, how one is started, and what to say where it does not come up."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from cfsd.errors import BadEnvironment
from cfsd.machine import home
from cfsd.store.disk import disk_is_full, is_full

HOST = "127.0.0.1"
START_SECONDS = 180
PATIENCE_SECONDS = 15  # after which it is said that a server takes long
STOP_SECONDS = 15
SHARED_ATTEMPTS = 3  # to start a server over a database that others use too
TAIL_LINES = 10
_direct = build_opener(ProxyHandler({}))  # loopback is asked without a proxy


def start_server(
    name: str, words: Sequence[str], health: str = "", *, advice: str = "", **place: Any
) -> "subprocess.Popen[bytes]":
    """Start `python -m WORDS` and return its process once the URL `health` answers, if there is one.

    It writes into logs/NAME.log of the data folder; `place` is what else Popen takes. With `advice`, which names a
    database that others use too, one that ends is started again: another may have made the tables at the same time.
    Raises BadEnvironment that shows why it did not start, followed by `advice`.
    """
    log = log_of(name)
    for left in reversed(range(SHARED_ATTEMPTS if advice else 1)):
        with log.open("ab") as out:
            written = out.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, **place,
            )  # fmt: skip
        try:
            if health:
                _wait_until(lambda: answers(health), process, name)
            return process
        except BaseException as error:
            code = process.poll()
            end(process)
            if not isinstance(error, TimeoutError):
                raise
            if code is None or not left:
                raise BadEnvironment(_why(name, code, log, written) + advice) from None
    raise AssertionError("the last attempt returns or raises")


def log_of(name: str) -> Path:
    """Return the log of a server; its folder is made."""
    log = home() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    return log


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a server, by force if it takes too long."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", name: str) -> None:
    """Return when `ready`. Raises TimeoutError if the process ends or takes too long."""
    start, said = time.monotonic(), False
    while not ready():
        waited = time.monotonic() - start
        if process.poll() is not None or waited > START_SECONDS:
            raise TimeoutError
        if waited > PATIENCE_SECONDS and not said:
            said = True
            print(f"{name} takes long to start; its log is {log_of(name)}", flush=True)
        time.sleep(0.3)


def _why(name: str, code: int | None, log: Path, written: int) -> str:
    """Return how a server failed and the last lines that it wrote, which begin at the byte `written` of its log."""
    if is_full(log.parent):
        return str(disk_is_full(log.parent))
    how = f"it did not answer within {START_SECONDS} s" if code is None else f"it ended {_end_of(code)}"
    with log.open("rb") as file:
        file.seek(written)
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    shown = "\n".join(lines[-TAIL_LINES:])
    words = f"the last lines of {log}:\n{shown}" if shown else f"it wrote nothing into {log}"
    return f"the server {name} did not start: {how}; {words}"


def _end_of(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    with suppress(ValueError):
        return f"by the signal {signal.Signals(-code).name}" + (" (was the memory full?)" if code == -9 else "")
    return f"by the signal {-code}"


def answers(url: str) -> bool:
    """Say whether `url`, on this machine, answers with 200."""
    try:
        with _direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError, ValueError):
        return False
