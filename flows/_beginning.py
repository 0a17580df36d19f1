"""What comes before a flow is imported: the environment, and what is wrong with it as one message."""

import locale
import os
import sys

from cfsd.errors import BadInput
from flows._environment import check_prefect_settings, settle_environment


def begin() -> None:
    """Settle the environment. A command ends here with exit code 2 where that cannot be; a library raises BadInput."""
    if _is_command():
        _use_utf8()
    try:
        settle_environment()
        check_prefect_settings()
    except BadInput as error:
        if not _is_command():
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _is_command() -> bool:
    """Say whether Python is looking for the module of `python -m flows.NAME`."""
    return sys.argv[0] == "-m"


def _use_utf8() -> None:
    """Start Python again in its UTF-8 mode where the locale has another encoding, in which no umlaut could be read."""
    if locale.getpreferredencoding(False).lower().replace("-", "") == "utf8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
