"""Whether anything answers at MLflow's address, asked quickly: its own client tries for minutes."""

import socket
import threading
from urllib.parse import urlsplit

import httpx

SECONDS = 5.0
LIMIT = 8.0  # in all, for names that do not resolve
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def unreachable(uri: str) -> str | None:
    """Return why nothing can be reached at the tracking URI; None where something answers or nobody need."""
    found: list[str] = []

    def ask() -> None:
        try:
            _ask(uri)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            found.append(f"{type(error).__name__}: {error}")
        found.append("")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LIMIT)
    return (found[0] or None) if found else f"no answer within {LIMIT:.0f} s"


def _ask(uri: str) -> None:
    scheme = uri.partition(":")[0].partition("+")[0].lower()
    if scheme in ("http", "https"):
        httpx.get(uri, timeout=SECONDS, verify=False)  # any answer will do; MLflow itself looks at certificates
    elif port := PORTS.get(scheme):
        url = urlsplit(uri)
        socket.create_connection((url.hostname or "", url.port or port), SECONDS).close()
