"""The command line of the library: `cfsd store …`, or `python -m cfsd store …`. Pipelines: `python -m flows.NAME`."""

import sys

import typer

from cfsd.errors import BadInput, CfsdError
from cfsd.machine import home
from cfsd.store.command import app as store
from cfsd.store.disk import full_disk

INTERRUPTED = 130
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
app.add_typer(store, name="store")


@app.callback()
def _cfsd() -> None:
    """What a data folder holds. Recipes are run by python -m flows.mitigate and its like."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted by Ctrl-C."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (CfsdError, OSError) as error:
        known = error if isinstance(error, CfsdError) else full_disk(error, home())
        if known is None:
            raise
        print(f"error: {known}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(known, BadInput) else 1)


if __name__ == "__main__":
    main()
