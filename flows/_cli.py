"""What the command lines share: options, exit codes, and one message for errors that the user can correct."""

import atexit
import functools
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cfsd.errors import BadInput, CfsdError, Stopped
from cfsd.machine import Machine
from cfsd.overrides import override, parse_overrides, validated

INTERRUPTED = 130
console = Console(highlight=False, soft_wrap=True)

Set = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe, as train.epochs=2"),
]
On = Annotated[
    list[str],
    typer.Option("--machine", metavar="FIELD=VALUE", help="Change a field of the machine, as threads=1"),
]
Home = Annotated[Path | None, typer.Option(help="Data folder; default: $CFSD_HOME, else ./data")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would run and what is cached, and stop")]


def machine_of(changes: list[str]) -> Machine:
    """Return the machine that `--machine` describes. Raises BadInput."""
    return validated(Machine, override({}, parse_overrides(changes)), "--machine")


def start(command: Callable[..., None]) -> None:
    """Run a command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted by Ctrl-C or SIGTERM."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (KeyboardInterrupt, Stopped):
            _last_words.extend(["stopped; what is finished is kept. To continue:", _same_command()])
            sys.exit(INTERRUPTED)
        except CfsdError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2 if isinstance(error, BadInput) else 1)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a pre-emption acts as Ctrl-C
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    app()


_last_words: list[str] = []


@atexit.register
def _say_last_words() -> None:
    """Print the last lines. Exit handlers run in reverse order, so this one, registered first, runs last."""
    for line in _last_words:
        print(line, flush=True)


def _same_command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = ["-m", spec.name] if spec else [sys.argv[0]]
    return shlex.join(["python", *module, *sys.argv[1:]])
