"""Where Prefect and MLflow keep their data: below the data folder, unless the environment says otherwise.

Prefect reads its settings when it is imported, so this comes first and `--home` is read from the command line here.
"""

import io
import json
import os
import sys
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import psutil
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cfsd.errors import BadEnvironment
from cfsd.machine import home
from flows._addresses import DATABASE_VARIABLES, check_addresses, sqlite_url
from flows._folders import check_data_folder, home_from_command_line, settle_user_folders
from flows._proxies import check_proxies, keep_loopback_from_proxies, leave_out_socks

SERVERS = "servers.json"
BOOT = Path("/proc/sys/kernel/random/boot_id")  # another one after each start of the machine
BEAT = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_SECONDS = "30"  # the least that Prefect takes; three without one, and a run has crashed
OWN_DATABASE = ("HOST", "NAME", "DRIVER", "USER")  # PREFECT_SERVER_DATABASE_…: parts of a URL that Prefect makes


def settle_environment() -> None:
    """Set what is not set: the data folder, the two servers that run over it and, without them, local ones.

    Raises BadInput for an empty --home. `check_environment` says what else is wrong, before a command does anything.
    """
    _open_standard_streams()
    home_from_command_line()
    keep_loopback_from_proxies()
    leave_out_socks()
    with suppress(OSError):  # check_environment says it
        home().mkdir(parents=True, exist_ok=True)
        settle_user_folders()
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # Compose files hand an unset variable on as an empty one
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    for name, value in _defaults().items():
        os.environ.setdefault(name, value)


def check_environment() -> None:
    """Raise BadEnvironment for what no run could use: data folder, proxies, addresses of servers and databases."""
    check_data_folder()
    check_proxies()
    check_addresses()


def _defaults() -> dict[str, str]:
    servers = {name: entry["url"] for name, entry in recorded_servers().items() if is_alive(entry)}
    defaults = {
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Leases in a server's memory die with it: its gpu slots stay taken, and runs with a limit are cancelled.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the flows print what matters
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": servers.get("mlflow") or mlflow_database(),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_DISABLE_TELEMETRY": "true",  # of DO_NOT_TRACK it takes no 1
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the flows print what matters
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "TQDM_DISABLE": "1",  # one progress bar at a time, ours
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if "prefect" in servers:
        defaults["PREFECT_API_URL"] = f"{servers['prefect']}/api"
        defaults[BEAT] = HEARTBEAT_SECONDS
    if login := os.environ.get("PREFECT_SERVER_API_AUTH_STRING"):  # a server of our own asks its client for it
        defaults["PREFECT_API_AUTH_STRING"] = login
    return defaults | _prefect_database()


def mlflow_database() -> str:
    """Return the URL of the data folder's MLflow database.

    MLflow makes the folder that it reads in a sqlite:/// URL, the quoted one, beside ours; not in one with a driver.
    """
    plain, file = sqlite_url("sqlite", home() / "mlflow.db"), home() / "mlflow.db"
    return plain if plain == f"sqlite:///{file}" else sqlite_url("sqlite+pysqlite", file)


def _prefect_database() -> dict[str, str]:
    """Return the URL of Prefect's own database where Prefect would make a wrong one of the folder's name."""
    folder = os.environ.get("PREFECT_HOME", str(home() / "prefect"))
    given = [*DATABASE_VARIABLES, *(f"PREFECT_{s}_DATABASE_{part}" for s in ("SERVER", "API") for part in OWN_DATABASE)]
    file = Path(folder).expanduser().absolute() / "prefect.db"
    url = sqlite_url("sqlite+aiosqlite", file)
    if url == f"sqlite+aiosqlite:///{file}" or any(os.environ.get(name) for name in given):
        return {}
    return {DATABASE_VARIABLES[0]: url}


def _open_standard_streams() -> None:
    """Put /dev/null in place of closed streams, and write what a terminal cannot show as an escape."""
    for number, mode in enumerate(("r", "w", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)  # takes the lowest number, this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def recorded_servers() -> dict[str, dict[str, Any]]:
    """Return the servers that this home started, running or not, by name; none where the file is damaged."""
    try:
        servers = json.loads((home() / SERVERS).read_bytes())
    except (OSError, ValueError):
        return {}
    entries = servers.items() if isinstance(servers, dict) else ()
    return {
        name: entry for name, entry in entries if isinstance(entry, dict) and {"url", "pid", "started"} <= set(entry)
    }


def is_alive(entry: dict[str, Any]) -> bool:
    """Say whether the process of a servers.json entry runs; its number alone may be another's by now."""
    try:
        process, started = psutil.Process(entry["pid"]), entry["started"]
        same = started == started_at(entry["pid"])
        if isinstance(started, float):  # of a version that kept the time of day
            same = abs(process.create_time() - started) < 2
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, TypeError, ValueError):
        return False


def started_at(pid: int) -> str:
    """Return when a process began: in which boot of the machine, and after how long, which no clock that is set moves.

    Raises:
        psutil.Error: There is no such process.
    """
    boot = BOOT.read_text().strip() if BOOT.is_file() else "this boot"
    return f"{psutil.Process(pid).create_time() - psutil.boot_time():.2f} s into {boot}"


def check_prefect_settings() -> None:
    """Let Prefect read its settings. Raises BadEnvironment naming the variables with a wrong value."""
    try:
        with redirect_stderr(io.StringIO()):  # Prefect's own words for the same, in several lines
            from prefect.settings import get_current_settings, load_profiles

            get_current_settings()
            names = load_profiles().names
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_input=False)
        found = "; ".join(_in_words(m) for m in mistakes if m["type"] != "default_factory_not_called")
        raise BadEnvironment(f"a setting of Prefect is not valid: {found}; correct or unset it") from None
    except (ValueError, OSError) as error:
        raise BadEnvironment(
            f"Prefect cannot read its settings: {error}; they are in profiles.toml of PREFECT_HOME (here "
            f"{os.environ['PREFECT_HOME']}), and in prefect.toml, pyproject.toml and .env of the working directory: "
            "correct the file"
        ) from error
    if (wanted := os.environ.get("PREFECT_PROFILE")) and wanted not in names:
        raise BadEnvironment(
            f"PREFECT_PROFILE is {wanted!r}, but PREFECT_HOME, here {os.environ['PREFECT_HOME']}, has no such profile; "
            f"its profiles: {', '.join(sorted(names))}; set PREFECT_HOME to the folder with yours (often ~/.prefect), "
            "or unset PREFECT_PROFILE"
        )


def _in_words(mistake: ErrorDetails) -> str:
    field = "_".join(str(part) for part in mistake["loc"]).removeprefix("prefect_")
    given = [name for name in os.environ if name.startswith("PREFECT_") and name.lower().endswith(f"_{field}")]
    return f"{' or '.join(given) or field or 'PREFECT_…'}: {mistake['msg'].removeprefix('Value error, ')}"
