"""Where Prefect and MLflow keep their data: below the data folder, unless the environment says otherwise.

Prefect reads its settings when it is imported, so this comes first and `--home` is read from the command line here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil

from cfsd.machine import HOME_VARIABLE, home

SERVERS = "servers.json"


def settle_environment() -> None:
    """Set what is not set: the data folder, the two servers that run over it and, without them, local ones."""
    _home_from_command_line()
    servers = {name: entry["url"] for name, entry in recorded_servers().items() if is_alive(entry)}
    defaults = {
        "PREFECT_HOME": str(home() / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the flows print what matters
        "DO_NOT_TRACK": "1",
        "MLFLOW_TRACKING_URI": servers.get("mlflow") or f"sqlite:///{home() / 'mlflow.db'}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "TQDM_DISABLE": "1",  # one progress bar at a time, ours
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if "prefect" in servers:
        defaults["PREFECT_API_URL"] = f"{servers['prefect']}/api"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    home().mkdir(parents=True, exist_ok=True)


def _home_from_command_line() -> None:
    for i, word in enumerate(sys.argv):
        if word == "--home" and i + 1 < len(sys.argv):
            os.environ[HOME_VARIABLE] = str(Path(sys.argv[i + 1]).absolute())
        elif word.startswith("--home="):
            os.environ[HOME_VARIABLE] = str(Path(word.removeprefix("--home=")).absolute())


def recorded_servers() -> dict[str, dict[str, Any]]:
    """Return the servers that this home started, running or not, by name."""
    try:
        servers: dict[str, dict[str, Any]] = json.loads((home() / SERVERS).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return servers


def is_alive(entry: dict[str, Any]) -> bool:
    """Say whether the process of a servers.json entry runs; its number alone may be another's by now."""
    try:
        process = psutil.Process(entry["pid"])
        same = abs(process.create_time() - entry["started"]) < 2
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
