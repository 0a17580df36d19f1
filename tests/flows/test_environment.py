"""What the machine and its environment do to a run: it works, or one message says what is wrong and what to do."""

import errno
import fcntl
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect import __version__
from prefect.settings import PREFECT_API_URL, temporary_settings
from sqlalchemy import create_engine

from cfsd.errors import BadEnvironment, BadInput, CfsdError
from cfsd.store.disk import full_disk
from cfsd.store.locks import check_locks, held, used
from flows import _prefect_api, _servers
from flows._addresses import check_addresses, sqlite_url
from flows._cli import start
from flows._environment import check_prefect_settings, is_alive, mlflow_database, recorded_servers, started_at
from flows._explained import explained
from flows._folders import CACHES, check_data_folder, home_from_command_line, settle_user_folders
from flows._proxies import check_proxies, keep_loopback_from_proxies, leave_out_socks
from flows._servers import end, start_server
from flows.serve import free_port
from tests.conftest import ROOT

PROXIES = [name for lower in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (lower, lower.upper())]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Leave only what a test sets; what the code under test sets goes back with the test."""
    for name in (*PROXIES, *CACHES, "PREFECT_PROFILE", "HOME", "TMPDIR", "HF_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    home.mkdir()


class Answering(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `code` and `body`, and notes its first line."""

    server: "Listener"

    def _answer(self) -> None:
        self.server.asked.append(self.requestline)
        self.send_response(self.server.code)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST = do_CONNECT = _answer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Listener(http.server.ThreadingHTTPServer):
    """A tiny server on loopback, which may stand for a proxy."""

    def __init__(self, code: int = 200, body: bytes = b"{}") -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.code, self.body, self.asked = code, body, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def listening(code: int = 200, body: bytes = b"{}") -> Iterator[Listener]:
    with Listener(code, body) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


# proxies


@pytest.mark.parametrize("variables", [("HTTP_PROXY",), ("http_proxy",), ("ALL_PROXY",), ("all_proxy", "HTTP_PROXY")])
@pytest.mark.parametrize("spared", [None, ("NO_PROXY", "example.org"), ("no_proxy", ".corp, [::1] ,10.0.0.1")])
def test_a_proxy_never_sees_loopback_and_all_else(
    variables: tuple[str, ...], spared: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as proxy, listening() as target:
        for name in variables:
            monkeypatch.setenv(name, proxy.url)
        if spared:
            monkeypatch.setenv(*spared)
        keep_loopback_from_proxies()
        urllib.request.urlopen(target.url, timeout=5).close()
        httpx.get(target.url)
        requests.get(target.url, timeout=5)
        assert len(target.asked) == 3 and proxy.asked == []
        httpx.get("http://host.invalid/x")
        assert len(proxy.asked) == 1
        for name in ("NO_PROXY", "no_proxy"):
            assert {"127.0.0.1", "localhost", "::1"} <= set(os.environ[name].split(","))
        if spared and spared[1] == "example.org":
            assert "example.org" in os.environ["no_proxy"]


def test_settling_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "a.b,c.d")
    keep_loopback_from_proxies()
    once = os.environ["NO_PROXY"]
    keep_loopback_from_proxies()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == once == "a.b,c.d,127.0.0.1,localhost,::1"


def test_a_socks_proxy_without_its_package_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flows._proxies.find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@127.0.0.1:9")
    leave_out_socks()
    said = capsys.readouterr().err
    assert "ALL_PROXY" not in os.environ and "httpx[socks]" in said and "secret" not in said
    httpx.Client().close()


@pytest.mark.parametrize("value", ["ftp://me:secret@host", "http://host:port", "http://", "://x", "http://[::1"])
def test_a_proxy_that_is_no_address_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(BadEnvironment, match=r"HTTPS_PROXY is .* no proxy; it must be like") as refused:
        check_proxies()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("value", ["host:3128", "http://me:p%40ss@host:3128/", "socks5h://host:1080", "https://host"])
def test_a_proxy_that_can_be_used_is_taken(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", value)
    check_proxies()


# addresses of servers and databases

ADDRESSES = [
    ("PREFECT_API_URL", "garbage", "is not the address of a server"),
    ("PREFECT_API_URL", "127.0.0.1:4200/api", "is not the address of a server"),
    ("PREFECT_API_URL", "http://me:secret@host:port/api", "is not the address of a server"),
    ("PREFECT_API_URL", "ws://host/api", "is not the address of a server"),
    ("MLFLOW_TRACKING_URI", "file:///tmp/runs", "a folder of files, which MLflow no longer takes"),
    ("MLFLOW_TRACKING_URI", "./mlruns", "a folder of files"),
    ("MLFLOW_TRACKING_URI", "/var/mlruns", "a folder of files"),
    ("MLFLOW_TRACKING_URI", "foo://me:secret@bar", "is not an address of MLflow"),
    ("MLFLOW_TRACKING_URI", "http:/host:5000", "is not a whole address"),
    ("MLFLOW_TRACKING_URI", "http://host:port", "is not a whole address"),
    ("MLFLOW_TRACKING_URI", "sqlite:mlflow.db", "is not a whole address"),
    ("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db", "/proc/none/mlflow.db cannot be written"),
    ("MLFLOW_TRACKING_URI", "mysql+aiomysql://me:secret@host/db", "whose driver is not installed: No module named"),
    ("MLFLOW_BACKEND_STORE_URI", "postgresql+odd://me:secret@host/db", "whose driver is not installed"),
    ("MLFLOW_BACKEND_STORE_URI", "file:///tmp/runs", "a folder of files, which MLflow no longer takes"),
    ("PREFECT_API_DATABASE_CONNECTION_URL", "mysql://me:secret@host/db", "a database of Prefect begins with"),
    ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite:///prefect.db", "a database of Prefect begins with"),
    ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:////proc/none/p.db", "/proc/none/p.db cannot be"),
]


@pytest.mark.parametrize(("name", "value", "message"), ADDRESSES)
def test_an_address_that_leads_nowhere_is_named_with_its_variable(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadEnvironment) as refused:
        check_addresses()
    words = str(refused.value)
    assert words.startswith(f"{name} is ") and message in words and f"unset {name}" in words
    assert "secret" not in words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_URL", "https://api.prefect.cloud/api/accounts/a/workspaces/b"),
        ("MLFLOW_TRACKING_URI", "databricks"),
        ("MLFLOW_TRACKING_URI", "databricks://profile"),
        ("MLFLOW_TRACKING_URI", "postgresql+psycopg2://me:secret@host:5432/db"),
        ("MLFLOW_TRACKING_URI", "sqlite://"),
        ("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@host/db"),
        ("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///:memory:"),
        ("PREFECT_API_DATABASE_CONNECTION_URL", "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true"),
    ],
)
def test_an_address_that_may_lead_somewhere_is_taken(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    check_addresses()


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters="/"), min_size=1, max_size=60))
def test_a_database_lies_in_its_folder_whatever_that_is_called(name: str) -> None:
    import tempfile

    if name in (".", "..") or len(name.encode()) > 200:
        return
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / name
        folder.mkdir()
        with create_engine(sqlite_url("sqlite", folder / "a.db")).connect() as connection:
            connection.exec_driver_sql("create table t (x)")
        assert [path.name for path in Path(above).iterdir()] == [name]
        assert [path.name for path in folder.iterdir()] == ["a.db"]


def test_mlflow_makes_no_folder_beside_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry

    odd = tmp_path / "50% #1?x ü"
    odd.mkdir()
    monkeypatch.setenv("CFSD_HOME", str(odd))
    create_sqlalchemy_engine_with_retry(mlflow_database()).connect().close()
    assert {path.name for path in tmp_path.iterdir()} <= {odd.name, "data"} and (odd / "mlflow.db").exists()


VERSION = json.dumps(__version__).encode()
SERVERS: dict[str, tuple[int, bytes, str]] = {
    "a page": (200, b"<html></html>", "no Prefect server; the address usually ends in /api"),
    "another program": (200, b'{"version": "3"}', "no Prefect server"),
    "nothing at this path": (404, b"", "no Prefect server (it answers 404); the address usually ends in /api"),
    "a login": (401, b"", "PREFECT_API_AUTH_STRING"),
    "no rights": (403, b"", "PREFECT_API_KEY"),
    "a broken server": (500, b"", "it answers 500; look at the server's log"),
    "another major version": (200, b'"2.20.1"', "whose Prefect is 2.20.1"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_what_is_no_server_of_ours_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, body, message = SERVERS[name]
    with listening(code, body) as server:
        refused_with(f"{server.url}/api", message, monkeypatch)


def refused_with(url: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(BadEnvironment) as refused:
        _prefect_api.check_api()
    words = str(refused.value)
    assert words.startswith(f"PREFECT_API_URL is {url}") and message in words and "or unset it to run" in words


def test_a_server_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    refused_with(
        "http://127.0.0.1:9/api", "no server can be reached there: [Errno 111] Connection refused", monkeypatch
    )


def test_a_recorded_server_that_hangs_is_ended_by_its_own_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://127.0.0.1:9"
    (home / "servers.json").write_text(json.dumps({"prefect": {"url": url, "pid": 1, "started": 0.0}}))
    with (
        temporary_settings({PREFECT_API_URL: f"{url}/api"}),
        pytest.raises(BadEnvironment, match=r"servers\.json is http.*Connection refused.*python -m flows\.serve down"),
    ):
        _prefect_api.check_api()


def test_https_where_http_is_spoken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(200, VERSION) as server:
        refused_with(f"https://127.0.0.1:{server.server_port}/api", "is it https:// or http://?", monkeypatch)


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_prefect_api, "ANSWER_SECONDS", 2.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        refused_with(f"http://127.0.0.1:{silent.getsockname()[1]}/api", "no server can be reached there", monkeypatch)


def test_a_server_of_this_version_is_used_and_an_older_one_named(capsys: pytest.CaptureFixture[str]) -> None:
    for body, said in ((VERSION, ""), (b'"3.0.1"', "whose Prefect 3.0.1 is older")):
        with listening(200, body) as server, temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
            _prefect_api.check_api()
        assert said in (out := capsys.readouterr().out) and bool(out) == bool(said)


def test_a_database_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@127.0.0.1:9/db")
    with pytest.raises(BadEnvironment, match="no database can be reached there") as refused:
        _prefect_api.database_advice()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", '{"prefect": 3}', '{"prefect": {"url": "x"}}', '{"prefect": null}', "\x00"])
def test_a_broken_list_of_servers_is_no_list(text: str, home: Path) -> None:
    (home / "servers.json").write_text(text)
    assert recorded_servers() == {}


def test_a_profile_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_PROFILE", "nope")
    with pytest.raises(BadEnvironment, match=r"PREFECT_PROFILE is 'nope', but .*its profiles: .*local"):
        check_prefect_settings()


@pytest.mark.processes
def test_settings_of_prefect_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "profiles.toml").write_text("[profiles")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "flows.report", "x"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: Prefect cannot read its settings"), done.stderr
    assert len(done.stderr.splitlines()) == 1


# folders


def test_a_data_folder_that_cannot_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    cases = {
        str(tmp_path / "file"): "is not a folder",
        str(tmp_path / "link"): "is not a folder",
        str(tmp_path / "file" / "below"): "cannot be used: Not a directory",
        "/proc/none": "cannot be used",
        str(tmp_path / ("x" * 256)): "cannot be used: File name too long",
        str(tmp_path / "a\nb"): "has characters that no list of files can hold",
        str(tmp_path / os.fsdecode(b"\xff")): "has characters that no list of files can hold",
    }
    for folder, message in cases.items():
        monkeypatch.setenv("CFSD_HOME", folder)
        with pytest.raises(BadEnvironment, match="choose another data folder with --home") as refused:
            check_data_folder()
        assert message in str(refused.value)


def _raise(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        ("fcntl.flock", errno.ENOLCK, "has no locks (No locks available)"),
        ("fcntl.flock", errno.EOPNOTSUPP, "has no locks"),
        ("pathlib.Path.symlink_to", errno.EPERM, "has no symbolic links"),
        ("pathlib.Path.mkdir", errno.EROFS, "cannot be used: Read-only file system"),
        ("pathlib.Path.mkdir", errno.EACCES, "cannot be used: Permission denied"),
        ("pathlib.Path.mkdir", errno.ENOSPC, "is full"),
    ],
)
def test_a_disk_that_lacks_what_is_needed_is_named(
    place: str, number: int, message: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fcntl.flock
    monkeypatch.setattr(place, _raise(number))
    with pytest.raises(BadEnvironment) as refused:
        check_data_folder()
    assert message in str(refused.value) and str(home) in str(refused.value) and "--home" in str(refused.value)


def test_home_on_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["flow", "--home=~/runs"])
    home_from_command_line()
    assert os.environ["CFSD_HOME"] == str(tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["flow", "--home", ""])
    with pytest.raises(BadInput, match="--home is empty"):
        home_from_command_line()


@pytest.mark.parametrize("user", [None, "", "/proc/none", "/etc/passwd"])
def test_a_home_that_is_none_is_replaced_below_the_data_folder(
    user: str | None, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if user is not None:
        monkeypatch.setenv("HOME", user)
    settle_user_folders()
    assert Path.home() == home / "user" and Path.home().is_dir()


def test_caches_of_a_home_that_cannot_be_written_go_below_the_data_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("flows._folders._is_writable", lambda folder: folder != tmp_path)
    settle_user_folders()
    assert os.environ["HOME"] == str(tmp_path)
    assert all(os.environ[name].startswith(str(home)) for name in CACHES) and "HF_HOME" not in os.environ
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.delenv("XDG_CACHE_HOME")
    settle_user_folders()
    assert os.environ["HF_HOME"] == str(tmp_path / ".cache" / "huggingface")


def test_a_temporary_folder_without_room_is_replaced(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    for folder in (tmp_path / "none", Path("/proc")):
        monkeypatch.setenv("TMPDIR", str(folder))
        settle_user_folders()
        assert tempfile.gettempdir() == str(home / "tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    settle_user_folders()
    assert os.environ["TMPDIR"] == str(tmp_path)


# servers that do not start, ports, locks


def test_locks_work_as_on_nfs_which_makes_them_locks_of_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", fcntl.lockf)  # which needs files that are open for reading, or for writing
    check_locks(tmp_path)
    with used(tmp_path / "lock") as shared:
        assert shared
    with used(tmp_path / "lock", alone=True) as alone:
        assert alone


def test_a_clock_that_is_set_loses_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"url": "", "pid": os.getpid(), "started": started_at(os.getpid())}
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: booted + 3600)  # as NTP does it to both
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert is_alive(entry) and not is_alive(entry | {"started": "1.00 s into another boot"})
    of_an_older_version = entry | {"started": psutil.Process().create_time()}
    assert is_alive(of_an_older_version) and not is_alive(of_an_older_version | {"started": 5.0})


def test_servers_that_start_together_take_ports_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    first = free_port(23000)
    second = free_port(first, "--mlflow-port", [first])
    assert second > first and f"port {first} is taken (by another server of these)" in capsys.readouterr().out


def test_an_empty_address_of_mlflow_is_none(tmp_path: Path) -> None:
    code = "import flows, os; print(os.environ['MLFLOW_TRACKING_URI'])"
    environment = os.environ | {"MLFLOW_TRACKING_URI": "", "CFSD_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == f"sqlite:///{tmp_path}/mlflow.db", done.stderr


STARTS: dict[str, tuple[str, str]] = {
    "words": (
        "import sys; print('no such option'); sys.exit(3)",
        r"ended with code 3; the last lines of .*\nno such",
    ),
    "no words": ("import os; os._exit(5)", "it ended with code 5; it wrote nothing into .*odd.log"),
    "a signal": ("import os; os.kill(os.getpid(), 9)", r"by the signal SIGKILL \(was the memory full\?\)"),
    "no answer": ("import time; print('starting', flush=True); time.sleep(60)", r"answer within 1 s; .*\nstarting"),
    "bytes": ("import sys; sys.stdout.buffer.write(b'\\xff end'); sys.exit(1)", "code 1; (?s:.*) end"),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", STARTS)
def test_a_server_that_does_not_start_shows_why(
    name: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = STARTS[name]
    monkeypatch.setattr(_servers, "START_SECONDS", 1 if name == "no answer" else 30)
    (home / "logs").mkdir()
    (home / "logs" / "odd.log").write_text("words of an earlier attempt\n")
    (tmp_path / "odd_server.py").write_text(code)
    with pytest.raises(BadEnvironment, match=f"the server odd did not start: (?s:.*){message}") as refused:
        start_server("odd", ["odd_server"], "http://127.0.0.1:9/", advice="\nadvice", cwd=tmp_path)
    assert "earlier" not in str(refused.value) and str(refused.value).endswith("\nadvice")


@pytest.mark.processes
def test_a_server_over_a_database_of_others_is_started_again(tmp_path: Path, home: Path) -> None:
    port = free_port(20000)
    (tmp_path / "odd_server.py").write_text(
        "import sys; from http.server import HTTPServer, SimpleHTTPRequestHandler as H; from pathlib import Path\n"
        "tried = Path('tried'); tried.open('a').write('x')\n"
        "if len(tried.read_text()) == 1: sys.exit('another makes the tables')\n"
        f"HTTPServer(('127.0.0.1', {port}), H).serve_forever()\n"
    )
    process = start_server("odd", ["odd_server"], f"http://127.0.0.1:{port}/", advice="\nadvice", cwd=tmp_path)
    end(process)
    assert (tmp_path / "tried").read_text() == "xx"


def test_a_port_in_use_is_named_with_who_uses_it(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port, "--mlflow-port") > port
    said = capsys.readouterr().out
    assert f"port {port} is taken (by process {os.getpid()}" in said and "--mlflow-port" in said


@pytest.mark.processes
def test_a_process_that_dies_frees_its_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom cfsd.store.locks import held\n"
        "with held(Path(sys.argv[1]), ''):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    said: list[str] = []
    words = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"

        def kill(line: str) -> None:
            said.append(line)
            process.kill()

        with held(tmp_path / "lock", "waiting", kill):
            assert said == ["waiting"]


# errors


def test_errors_of_the_machine_are_told_in_words(home: Path) -> None:
    named = str(home / "x")
    cases: list[tuple[BaseException, str]] = [
        (OSError(errno.ENOSPC, "No space left on device", named), f"the disk of {home} is full"),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), f"the disk of {home} is full"),
        (PermissionError(errno.EACCES, "Permission denied", named), f"{named} cannot be used: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", named), f"{named} cannot be used: Read-only"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", named), "shorten"),
        (httpx.ConnectError("refused"), "Prefect's server http"),
        (ConnectionResetError(errno.ECONNRESET, "reset by peer"), "a connection failed"),
    ]
    for error, message in cases:
        told = explained(error)
        assert isinstance(told, BadEnvironment) and message in str(told)
    assert explained(ValueError("odd")) is None
    assert explained(bad := BadInput("bad")) is bad


def test_a_full_disk_is_found_behind_other_errors(home: Path) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(home / "store" / "a"))
        except OSError as error:
            raise ValueError("could not save") from error
    except ValueError as error:
        assert full_disk(error, Path("/")) and str(home) in str(full_disk(error, Path("/")))
    assert full_disk(ValueError("odd"), home) is None


def test_of_a_copy_the_disk_that_is_written_to_is_named(tmp_path: Path) -> None:
    """shutil names the file that is read, too, and its disk had room."""
    error = OSError(errno.ENOSPC, "No space left on device", "/proc/self/status", None, str(tmp_path / "part" / "file"))
    assert str(tmp_path) in str(full_disk(error, Path("/proc")))


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("odd"), 1, "this is a mistake in cfsd"),
        (CfsdError("known"), 1, "error: known"),
        (BadInput("bad"), 2, "error: bad"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "is full"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_has_one_message_and_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["flow"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("flows._cli._last_words", [])
    with pytest.raises(SystemExit) as ended:
        start(command)
    words = capsys.readouterr().err
    assert ended.value.code == code and message in words
    assert ("Traceback" in words) == (message == "this is a mistake in cfsd")


BEGINNINGS: dict[str, tuple[dict[str, str], list[str], int, str]] = {
    "a profile": ({"PREFECT_PROFILE": "nope"}, [], 2, "error: PREFECT_PROFILE is 'nope'"),
    "a setting": (
        {"PREFECT_CLIENT_MAX_RETRIES": "many"},
        [],
        2,
        "a setting of Prefect is not valid: PREFECT_CLIENT_MAX",
    ),
    "no home": ({}, ["--home", ""], 2, "error: --home is empty"),
    "no UTF-8": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ["für.yaml"], 2, "'für.yaml'"),
    "only ASCII": ({"PYTHONIOENCODING": "ascii"}, ["für.yaml"], 2, "recipe 'f\\xfcr.yaml' does not exist"),
}


@pytest.mark.processes
@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_command_says_one_message_before_it_begins(name: str, tmp_path: Path) -> None:
    variables, words, code, message = BEGINNINGS[name]
    done = subprocess.run(
        [sys.executable, "-m", "flows.mitigate", *(words or ["--plan"])],
        env={**os.environ, "HOME": str(tmp_path), **variables}, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, b"") and message.encode() in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.processes
def test_an_output_that_nobody_reads_ends_with_one_message() -> None:
    code = "from flows._cli import console, start; start(lambda: [console.print('x' * 9999) for _ in range(99)])"
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "stopped: nobody reads the output any more" in (said := process.stderr.read())
        assert len(said.splitlines()) == 1
    assert process.returncode == 141
