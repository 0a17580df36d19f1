"""A Prefect server for the time of one command, where none is there.

    python -m flows._temporary_server SOCKET        what the command starts; an open file's number

Prefect's own temporary server shares the terminal, so that Ctrl-C ends it before the flow could say that it was
stopped, and it outlives a command that was killed. This one has a session of its own and dies with its parent.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings

from cfsd.machine import home
from cfsd.process.child import end_with_parent
from flows._servers import HOST, answers, wait_until


@contextmanager
def prefect_server() -> Iterator[None]:
    """Give the flows of this block a server: the one that the settings name, else a temporary one."""
    if PREFECT_API_URL.value():
        yield
        return
    log = home() / "logs" / "prefect.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out, socket.create_server((HOST, 0)) as place:  # held from here on: no other can take it
        port, number = place.getsockname()[1], place.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(number)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, pass_fds=(number,),
        )  # fmt: skip
    try:
        wait_until(lambda: answers(f"http://{HOST}:{port}/api/health"), process, log)
        with temporary_settings({PREFECT_API_URL: f"http://{HOST}:{port}/api"}):
            yield
    finally:
        APILogHandler().flush()  # or its thread complains that the server is gone
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    end_with_parent()
    settings = uvicorn.Config("prefect.server.api.server:create_app", factory=True)
    uvicorn.Server(settings).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
