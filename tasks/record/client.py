"""Access to MLflow's server, which may be away, and to the terminal."""

import errno
import os
import re
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


console = Terminal(highlight=False, soft_wrap=True)
T = TypeVar("T")
VARIABLE = "MLFLOW_TRACKING_URI"
REASON_LENGTH = 500
MIGRATION = 0x63667364  # "cfsd": the number by which PostgreSQL knows our lock
STATEMENT = re.compile(r"\[SQL:.*|\(raised as a result of Query[^)]*\)", re.DOTALL)  # what SQLAlchemy adds to a reason
_asked: list[str] = []  # the experiment, once MLflow has answered
_away: list[str] = []  # why this process does not ask MLflow any more


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
    """Return what `action` returns for the MLflow client; None, said once, from the first time that it is away."""
    if _away:
        return None
    if not _asked and (problem := unreachable(os.environ.get(VARIABLE, ""))):
        _gone(problem)
        return None
    from tasks.record.server import FAILURES, server  # MLflow takes seconds to import; `--help` may take two

    try:
        if not _asked:
            with mlflow_lock(os.environ.get(VARIABLE, "")):
                _asked.append(server().experiment)
        return action(server())
    except FAILURES as error:
        _gone(f"{type(error).__name__}: {' '.join(STATEMENT.sub('', str(error)).split())[:REASON_LENGTH]}")
        return None


def _gone(reason: str) -> None:
    if _away:  # known, and said, by an action within this one
        return
    _away.append(reason)
    where = f" at {without_password(uri)} ({VARIABLE})" if (uri := os.environ.get(VARIABLE)) else ""
    say(f"MLflow cannot be reached{where}; the run goes on, and the next one fills it in. {without_password(reason)}")
