"""Proxies of the environment: never for this machine's own servers, and none that no client can use."""

import os
import sys
from importlib.util import find_spec

from cfsd.errors import BadEnvironment
from cfsd.machine import without_password
from flows._addresses import split

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SCHEMES = ("http", "https")
SOCKS = ("socks", "socks4", "socks4a", "socks5", "socks5h")


def keep_loopback_from_proxies() -> None:
    """Extend NO_PROXY and no_proxy by this machine, for every client here and in the processes that are started.

    Programs read one or the other, the lower case first, so both get all entries.
    """
    entries = [entry.strip() for name in ("no_proxy", "NO_PROXY") for entry in os.environ.get(name, "").split(",")]
    plain = [entry[1:-1] if entry.startswith("[") and entry.endswith("]") else entry for entry in entries]
    wanted = ",".join(dict.fromkeys([*filter(None, plain), *LOOPBACK]))  # httpx takes ::1, but not [::1], for an entry
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = wanted


def leave_out_socks() -> None:
    """Take SOCKS proxies out of the environment where httpx cannot use them, and say so.

    It would not even make a client for this machine's own servers, which need no proxy.
    """
    if find_spec("socksio"):
        return
    for name in _given():
        if os.environ[name].partition("://")[0].lower() in SOCKS:
            print(
                f"{name} ({without_password(os.environ[name])}) is left out: a SOCKS proxy needs the package socksio: "
                "pip install 'httpx[socks]'",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            del os.environ[name]


def check_proxies() -> None:
    """Raise BadEnvironment for a proxy that is no address: clients end in a traceback at the first request."""
    for name in _given():
        value = os.environ[name]
        url = split(value if "://" in value else f"http://{value}")
        if url is None or url.scheme.lower() not in (*SCHEMES, *SOCKS) or not url.hostname:
            raise BadEnvironment(
                f"{name} is {without_password(value)!r}, which is no proxy; it must be like http://host:3128: "
                "correct it, or unset it"
            )


def _given() -> list[str]:
    return [name for lower in PROXIES for name in (lower, lower.upper()) if os.environ.get(name)]
