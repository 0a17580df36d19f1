"""Access to MLflow's server, which may be away, and to the terminal."""

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console

if TYPE_CHECKING:
    from tasks.record.server import Server

console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")
_away: list[str] = []  # why this process does not ask MLflow any more


def say(line: str, style: str = "") -> None:
    """Print a line as it is and put it into the Prefect log of the run at hand."""
    console.print(line, style=style, markup=False)  # rich would swallow R[t, j]
    with suppress(MissingContextError):
        get_run_logger().info(line)


def tracked(action: "Callable[[Server], T]") -> T | None:
    """Return what `action` returns for the MLflow client; None, said once, from the first time that it is away."""
    if _away:
        return None
    from tasks.record.server import FAILURES, server  # MLflow takes seconds to import; `--help` may take two

    try:
        return action(server())
    except FAILURES as error:
        _away.append(str(error))
        say(f"MLflow cannot be reached ({type(error).__name__}); the run goes on, and the next one fills it in")
        return None
