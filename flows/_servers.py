"""Where our servers listen, and how to wait until one answers."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from cfsd.errors import CfsdError

HOST = "127.0.0.1"
START_SECONDS = 180


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when `ready`. Raises CfsdError with the end of `log` if the process ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            tail = "\n".join(log.read_text().splitlines()[-10:])
            raise CfsdError(f"a server did not start; the end of {log}:\n{tail}")
        time.sleep(0.5)


def answers(url: str) -> bool:
    """Say whether `url` answers with 200."""
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
