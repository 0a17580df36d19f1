"""Prefect's server and database that the environment names: asked once, before anything runs."""

import os
import socket
import threading
from contextlib import AbstractContextManager

import httpx
from prefect import __version__
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from cfsd.errors import BadEnvironment
from cfsd.machine import home, without_password
from cfsd.store.locks import held
from flows._addresses import DATABASE_VARIABLES, split
from flows._cli import console
from flows._environment import SERVERS, recorded_servers

ANSWER_SECONDS = 8.0  # in all, for names that do not resolve and hosts that swallow what is sent
UNSET = "or unset it to run with a server of its own"
DOWN = "or end it: python -m flows.serve down"  # in place of UNSET for a server that servers.json names
OTHER = "what answers there is no Prefect server"
ADDRESS = f"the address usually ends in /api: correct it, {UNSET}"


def prefect_lock() -> AbstractContextManager[None]:
    """Hold what only one process may do: start a Prefect server over the data folder's database, which migrates it."""
    waiting = f"waiting for another process that starts a Prefect server over {home()}"
    return held(home() / ".prefect.lock", waiting, console.print)


def check_api() -> None:
    """Ask the server of PREFECT_API_URL for its version. Raises BadEnvironment."""
    url = str(PREFECT_API_URL.value())
    found: list[str | BaseException] = []
    thread = threading.Thread(target=_ask, args=(url, found), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    answer = found[0] if found else TimeoutError(f"no answer within {ANSWER_SECONDS:.0f} s")
    if isinstance(answer, BaseException):
        problem = _problem(answer)
        raise BadEnvironment(
            f"{_origin(url)}, but {problem.replace(UNSET, DOWN) if _is_recorded(url) else problem}"
        ) from None
    ours, theirs = __version__.split(".")[:2], answer.split(".")[:2]
    if answer and ours[0] != theirs[0]:
        raise BadEnvironment(
            f"{_origin(url)}, whose Prefect is {answer}, and here it is {__version__}; use a server of the same major "
            f"version, {UNSET}"
        )
    if answer and [int(part) for part in theirs if part.isdigit()] < [int(part) for part in ours if part.isdigit()]:
        console.print(f"{_origin(url)}, whose Prefect {answer} is older than {__version__} here")


def _ask(url: str, found: list[str | BaseException]) -> None:
    try:
        with (
            temporary_settings({PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": ANSWER_SECONDS - 2}) as client,
        ):
            found.append(_version(client))
    except Exception as error:
        found.append(error)


def _version(client: SyncPrefectClient) -> str:
    """Return the version of a server, empty for Prefect Cloud, which fits all."""
    if client.server_type == ServerType.CLOUD:
        if problem := client.api_healthcheck():
            raise problem
        return ""
    version = client.api_version()
    if not isinstance(version, str):
        raise ValueError("no version")
    return version


def _origin(url: str) -> str:
    shown = without_password(url)
    if _is_recorded(url):
        return f"the Prefect server of {home() / SERVERS} is {shown}"
    if os.environ.get("PREFECT_API_URL") == url:
        return f"PREFECT_API_URL is {shown}"
    return f"the PREFECT_API_URL of Prefect's own settings (profile, prefect.toml or .env) is {shown}"


def _is_recorded(url: str) -> bool:
    return url == f"{recorded_servers().get('prefect', {}).get('url')}/api"


def _problem(error: BaseException) -> str:
    """Return what is wrong and what to do."""
    if isinstance(error, PrefectHTTPStatusError):
        code = error.response.status_code
        if code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            return (
                f"it answers {code}: it wants a login; set PREFECT_API_AUTH_STRING (user:password) or PREFECT_API_KEY "
                f"to what its owner gave you, {UNSET}"
            )
        if code >= httpx.codes.INTERNAL_SERVER_ERROR:
            return f"it answers {code}; look at the server's log, {UNSET}"
        return f"{OTHER} (it answers {code}); {ADDRESS}"
    if isinstance(error, httpx.HTTPError | OSError):
        reason = str(error) or type(error).__name__
        secure = " (is it https:// or http://?)" if "SSL" in reason or "disconnected" in reason else ""
        return f"no server can be reached there: {reason}{secure}; start it (make up), correct the address, {UNSET}"
    return f"{OTHER}; {ADDRESS}"


def database_advice() -> str:
    """Return which database the environment gives a server of ours, as a clause for its error; nothing for our own.

    Raises:
        BadEnvironment: Nobody listens where it is said to be.
    """
    for name in DATABASE_VARIABLES:
        if not (value := os.environ.get(name)) or value.startswith("sqlite"):
            continue
        url = split(value)
        try:
            socket.create_connection((url.hostname or "" if url else "", (url and url.port) or 5432), 5).close()
        except OSError as error:
            raise BadEnvironment(
                f"{name} is {without_password(value)}, but no database can be reached there: {error}; start it, "
                f"correct the address, or unset {name} for a file in the data folder"
            ) from error
        return f"\nits database is {without_password(value)} ({name})"
    return ""
