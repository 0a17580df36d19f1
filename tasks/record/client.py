"""Access to MLflow's server, which may be away, and to the terminal."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console

from cfsd.machine import home, without_password
from cfsd.store.locks import held
from tasks.record.reach import unreachable

if TYPE_CHECKING:
    from tasks.record.server import Server


class Terminal(Console):
    """Standard output; where nobody reads it any more, that is an error, and not the silent end that rich makes."""

    def on_broken_pipe(self) -> None:
        """Let the command line say it."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")


log = logging.getLogger(__name__)
console = Terminal(highlight=False, soft_wrap=True)
T = TypeVar("T")
VARIABLE = "MLFLOW_TRACKING_URI"
REASON_LENGTH = 500
AWAY_SECONDS = 30.0  # MLflow that failed is not asked for this long: each request may take several seconds to fail
MIGRATION = 0x63667364  # "cfsd": the number by which PostgreSQL knows our lock
STATEMENT = re.compile(r"\[SQL:.*|\(raised as a result of Query[^)]*\)", re.DOTALL)  # what SQLAlchemy adds to a reason
_asked: list[str] = []  # the experiment, once MLflow has answered
_away: list[float] = []  # when MLflow failed this process, in seconds of its clock


def say(line: str, style: str = "") -> None:
    """Print a line as it is and put it into the Prefect log of the run at hand."""
    console.print(line, style=style, markup=False)  # rich would swallow R[t, j]
    with suppress(MissingContextError):
        get_run_logger().info(line)


@contextmanager
def mlflow_lock(database: str) -> Iterator[None]:
    """Hold what only one process may do: make or migrate the tables of MLflow's database.

    A lock of PostgreSQL's own keeps other machines out; MLflow's servers and other databases have none.
    """
    waiting = f"waiting for another process that opens MLflow's database of {home()}"
    with ExitStack() as all_:
        all_.enter_context(held(home() / ".mlflow.lock", waiting, say))
        if database.startswith("postgresql"):
            from sqlalchemy import NullPool, create_engine, text
            from sqlalchemy.exc import SQLAlchemyError

            with suppress(SQLAlchemyError):  # what comes next fails for the same reason, and says it
                connection = all_.enter_context(create_engine(database, poolclass=NullPool).connect())
                connection.execute(text(f"SELECT pg_advisory_lock({MIGRATION})"))
        yield


def tracked(action: "Callable[[Server], T]") -> T | None:
    """Return what `action` returns for the MLflow client; None, and said, where MLflow is away or refuses it.

    While it is away it is not asked, and tried again every AWAY_SECONDS.
    """
    if _away and time.monotonic() < _away[-1] + AWAY_SECONDS:
        return None
    if (_away or not _asked) and (problem := unreachable(os.environ.get(VARIABLE, ""))):
        _gone(problem)
        return None
    from tasks.record.server import (
        FAILURES,
        is_refusal,
        server,
    )  # MLflow takes seconds to import; `--help` may take two

    try:
        if not _asked:
            with mlflow_lock(os.environ.get(VARIABLE, "")):
                _asked.append(server().experiment)
            if server().restored:
                say("MLflow's experiment had been deleted; it is restored with its runs, as new ones go there")
        result = action(server())
        if _away:
            _away.clear()
            say("MLflow answers again")
        return result
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(STATEMENT.sub('', str(error)).split())[:REASON_LENGTH]}"
        if not isinstance(error, FAILURES):  # of a package that MLflow uses, as boto3's where a bucket is closed
            say(f"MLflow fails at a part of what is recorded; the run goes on. {without_password(reason)}")
            log.debug("in full", exc_info=error)
        elif is_refusal(error):
            say(f"MLflow refuses a part of what is recorded; the run goes on. {without_password(reason)}")
        else:
            _gone(reason)
        return None


def _gone(reason: str) -> None:
    where = f" at {without_password(uri)} ({VARIABLE})" if (uri := os.environ.get(VARIABLE)) else ""
    if not _away:
        say(
            f"MLflow cannot be reached{where}; the run goes on, and the next one fills it in. "
            f"{without_password(reason)}"
        )
    _away[:] = [time.monotonic()]
