"""A Prefect server for the time of one command, where none is there.

    python -m flows._temporary_server SOCKET        what the command starts; an open file's number

Prefect's own temporary server shares the terminal, so that Ctrl-C ends it before the flow could say that it was
stopped, and it outlives a command that was killed. This one has a session of its own and dies with its parent.
"""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_UI_ENABLED, temporary_settings

from cfsd.process.child import end_with_parent
from flows._prefect_api import check_api, database_advice, prefect_lock
from flows._servers import HOST, end, start_server


@contextmanager
def prefect_server() -> Iterator[None]:
    """Give the flows of this block a server: the one that the settings name, else a temporary one.

    Raises:
        BadEnvironment: The named server is none that can be used, or the temporary one does not start.
    """
    if PREFECT_API_URL.value():
        check_api()
        yield
        return
    with prefect_lock(), socket.create_server((HOST, 0)) as place:  # held from here on: no other can take it
        port, number = place.getsockname()[1], place.fileno()
        health = f"http://{HOST}:{port}/api/health"
        process = start_server("prefect", [__name__, str(number)], health, advice=database_advice(), pass_fds=(number,))
    try:
        settings = {PREFECT_API_URL: f"http://{HOST}:{port}/api", PREFECT_SERVER_UI_ENABLED: False}  # gone at the end
        with temporary_settings(settings):
            yield
    finally:
        APILogHandler().flush()  # or its thread complains that the server is gone
        end(process)


if __name__ == "__main__":
    end_with_parent()
    settings = uvicorn.Config("prefect.server.api.server:create_app", factory=True)
    uvicorn.Server(settings).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])
