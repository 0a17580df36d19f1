"""What the command lines share: options, exit codes, and one message for errors that the user can correct."""

import atexit
import functools
import inspect
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from cfsd.errors import BadInput, CfsdError, Stopped
from cfsd.machine import Machine, home
from cfsd.overrides import override, parse_overrides, validated
from cfsd.store.remote import SharedStore
from flows._environment import check_environment
from flows._explained import explained
from tasks.record import console

__all__ = ["NO_VERDICT", "Home", "On", "Plan", "Set", "console", "machine_of", "start"]

NO_VERDICT = 4
INTERRUPTED, CLOSED = 130, 141  # as a shell numbers Ctrl-C, and a pipe that nobody reads

Set = Annotated[
    list[str],
    typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe, as train.epochs=2"),
]
On = Annotated[
    list[str],
    typer.Option("--machine", metavar="FIELD=VALUE", help="Change a field of the machine, as threads=1"),
]
Home = Annotated[Path | None, typer.Option(help="Data folder; default: $CFSD_HOME, else ./data")]
SHARED = typer.Option(
    "--store", metavar="URL", help="Shared store, as s3://bucket/team; default: $CFSD_STORE, else none ('': none)"
)
Plan = Annotated[bool, typer.Option("--plan", help="Say what would run and what is cached, and stop")]


def machine_of(changes: list[str]) -> Machine:
    """Return the machine that `--machine` describes. Raises BadInput."""
    return validated(Machine, override({}, parse_overrides(changes, "--machine")), "--machine")


def start(command: Callable[..., None], word: str = "", failed: int = 1) -> None:
    """Run a command line; `word` is what its arguments begin with where a module has several commands.

    Exit codes: 0 done, `failed`, 2 bad input, 130 interrupted by Ctrl-C or SIGTERM, 141 nobody reads the output. A gate
    has NO_VERDICT for `failed`, as 1 is its verdict that something got worse.
    """

    @functools.wraps(command)
    def guarded(*args: Any, store: str | None = None, **kwargs: Any) -> None:  # is in the environment already
        try:
            check_environment()
            SharedStore.of_environment()  # is its URL one?
            command(*args, **kwargs)
        except (KeyboardInterrupt, Stopped):
            _last_words.extend(["stopped; what is finished is kept. To continue:", _same_command()])
            sys.exit(INTERRUPTED)
        except BrokenPipeError as error:
            if not _output_is_closed():
                _end_with(explained(error), error, failed)
            print(f"stopped: nobody reads the output any more. To continue: {_same_command()}", file=sys.stderr)
            sys.exit(CLOSED)
        except Exception as error:
            _end_with(explained(error), error, failed)

    own, shared = inspect.signature(command), inspect.Parameter("store", inspect.Parameter.KEYWORD_ONLY)
    option = shared.replace(default=None, annotation=Annotated[str | None, SHARED])
    guarded.__signature__ = own.replace(parameters=[*own.parameters.values(), option])  # type: ignore[attr-defined]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a pre-emption acts as Ctrl-C
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(guarded)
    app(sys.argv[2:], prog_name=shlex.join([*_program(), word])) if word else app()


def _end_with(known: CfsdError | None, error: Exception, failed: int) -> NoReturn:
    """End with one message; what nobody expected ends with its traceback, and where to look and to report it."""
    if known is None:
        traceback.print_exception(error)
        print(
            f"error: this is a mistake in cfsd, or a case that it does not know: please report it with the lines "
            f"above. What is finished is kept. The logs are in {home() / 'logs'}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        sys.exit(failed)
    print(f"error: {known}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(known, BadInput) else failed)


def _output_is_closed() -> bool:
    """Say whether standard output is a pipe without a reader; it is /dev/null from then on."""
    try:
        sys.stdout.flush()
        closed = _is_broken(sys.stdout.fileno())
    except (BrokenPipeError, ValueError):
        closed = True
    except OSError:
        closed = False
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed


def _is_broken(number: int) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


_last_words: list[str] = []


@atexit.register
def _say_last_words() -> None:
    """Print the last lines. Exit handlers run in reverse order, so this one, registered first, runs last."""
    for line in _last_words:
        print(line, flush=True)


def _same_command() -> str:
    return shlex.join([*_program(), *sys.argv[1:]])


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
