"""Addresses that the environment gives: of Prefect, MLflow and databases; what can be known without asking them."""

import os
from importlib.metadata import entry_points, version
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit

from cfsd.errors import BadEnvironment
from cfsd.machine import without_password

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
SERVICES = ("http", "https", "databricks", "databricks-uc", "uc")
DATABASE_VARIABLES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
BACKEND_VARIABLE = "MLFLOW_BACKEND_STORE_URI"  # MLflow's own, of its server
PREFECT_DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg")
QUOTES_SINCE = (2, 1)  # the SQLAlchemy that takes %23 in a URL for # in a file's name


def split(url: str) -> SplitResult | None:
    """Return the parts of `url`, None where it is no URL: a port that is no number, half an IPv6 address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # is read only to be checked
    except ValueError:
        return None
    return parts


def sqlite_url(driver: str, file: Path) -> str:
    """Return the URL of a SQLite file for SQLAlchemy, whatever characters its path has.

    Raises:
        BadEnvironment: An older SQLAlchemy cannot have this path in a URL.
    """
    path = str(file)
    if _quotes():
        path = quote(path)
    elif "?" in path:
        raise BadEnvironment(f"the path {path} has a ? in it, which needs SQLAlchemy 2.1: pip install -U sqlalchemy")
    return f"{driver}:///{path}"


def check_addresses() -> None:
    """Raise BadEnvironment for an address that can never lead anywhere, with its variable and what to do."""
    _check_prefect("PREFECT_API_URL")
    _check_mlflow("MLFLOW_TRACKING_URI")
    if os.environ.get(BACKEND_VARIABLE):
        _check_mlflow(BACKEND_VARIABLE)
    for name in DATABASE_VARIABLES:
        _check_database(name)


def _check_prefect(name: str) -> None:
    value = os.environ.get(name)
    url = split(value or "http://unset")
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        raise BadEnvironment(
            f"{name} is {without_password(value or '')!r}, which is not the address of a server; it must be like "
            f"http://host:4200/api: correct it, or unset {name} to run with a server of its own"
        )


def _check_mlflow(name: str) -> None:
    value = os.environ.get(name, "")
    scheme, sign, _ = value.partition(":")
    kind = scheme.lower().partition("+")[0]
    advice = f"give a server (http://host:5000) or a database (sqlite:///folder/mlflow.db), or unset {name}"
    if value in SERVICES[2:]:
        return
    if not sign or kind == "file" or "/" in kind:
        raise BadEnvironment(f"{name} is {value!r}, a folder of files, which MLflow no longer takes; {advice}")
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if kind not in (*DATABASES, *SERVICES, *plugins):
        raise BadEnvironment(f"{name} is {without_password(value)!r}, which is not an address of MLflow; {advice}")
    if kind not in plugins and kind in ("http", "https", *DATABASES) and not _is_whole(value, kind):
        raise BadEnvironment(f"{name} is {without_password(value)!r}, which is not a whole address; {advice}")
    if kind == "sqlite":
        _check_sqlite(name, value)
    elif kind in DATABASES:
        _check_driver(name, value)


def _check_driver(name: str, value: str) -> None:
    """Raise BadEnvironment where the package that speaks to a database is not installed."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    try:
        make_url(value).get_dialect().import_dbapi()
    except (ImportError, SQLAlchemyError) as error:
        raise BadEnvironment(
            f"{name} is {without_password(value)!r}, whose driver is not installed: {error}; for PostgreSQL write "
            f"postgresql+psycopg2://user@host/database, which needs pip install 'cfsd[postgres]', or unset {name}"
        ) from error


def _is_whole(value: str, kind: str) -> bool:
    url = split(value)
    if url is None or "://" not in value:
        return False
    rest = value.partition("://")[2]
    return rest[:1] in ("", "/") if kind == "sqlite" else bool(url.hostname)


def _check_database(name: str) -> None:
    if not (value := os.environ.get(name)):
        return
    driver = value.partition(":")[0]
    if driver not in PREFECT_DRIVERS or split(value) is None:
        raise BadEnvironment(
            f"{name} is {without_password(value)!r}; a database of Prefect begins with "
            f"{' or '.join(f'{d}://' for d in PREFECT_DRIVERS)}: correct it, or unset {name}"
        )
    if driver.startswith("sqlite"):
        _check_sqlite(name, value)


def _check_sqlite(name: str, value: str) -> None:
    """Try the folder of a SQLite file, which is made if it is missing, as MLflow does."""
    file = _file_of(value)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK) and (not file.exists() or _opens(file))
        reason = "it is not writable"
    except OSError as error:
        writable, reason = False, error.strerror or str(error)
    if not writable:
        raise BadEnvironment(
            f"{name} is {value!r}, but {file} cannot be written ({reason}); give a file in a folder of yours, "
            f"or unset {name}"
        )


def _file_of(value: str) -> Path | None:
    """Return the file of a SQLite URL, None for one in memory or given as a URI of SQLite's own."""
    path = value.partition("://")[2].partition("?")[0].removeprefix("/")
    if not path or path == ":memory:" or path.startswith("file:"):
        return None
    return Path(unquote(path) if _quotes() else path)


def _quotes() -> bool:
    return tuple(int(part) for part in version("sqlalchemy").split(".")[:2]) >= QUOTES_SINCE


def _opens(file: Path) -> bool:
    with file.open("ab"):
        return True
