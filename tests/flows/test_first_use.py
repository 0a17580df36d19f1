"""A new data folder, of an odd name, on a machine behind a proxy and without a home, used by two commands at once."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, save_model, write_rows

pytestmark = pytest.mark.processes
NAME = "50% #1?x & ü's " + "long" * 48  # 200 characters and more
OWN = ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "USER", "LOGNAME", "HOME")


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that connects nobody, and what it was asked for."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as place:

        def answer() -> None:
            while True:
                try:
                    connection, _ = place.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(200))
                    connection.sendall(b"HTTP/1.1 503 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{place.getsockname()[1]}", asked


def test_two_first_runs_at_once_complete_and_leave_everything_in_their_folder(
    tmp_path: Path, proxy: tuple[str, list[bytes]]
) -> None:
    files = tmp_path / "files % ü"
    files.mkdir()
    rows, model = write_rows(files / "rows #1.jsonl"), save_model(files / "model ?")
    recipe = files / "recipe &.yaml"
    recipe.write_text(
        f'name: "a % \\"ü\\" #1/x?"\nbase: {{kind: folder, path: "{model}"}}\ntarget: {{path: "{rows}", held_out: 8}}\n'
        "probe: {rows: 16, length: 16}\ngenerate: {rows: 16, length: 16}\n"
    )
    place = tmp_path / "here"
    place.mkdir()
    own = {name: value for name, value in os.environ.items() if name not in OWN}
    proxies = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), proxy[0]) | {"NO_PROXY": "example.org"}
    words = [sys.executable, "-m", "flows.mitigate", str(recipe), "--home", NAME, "--machine", "threads=1"]
    both = [
        subprocess.Popen(
            [*words, "--set", f"seed={seed}"], cwd=place, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=own | proxies | {"PYTHONPATH": str(ROOT), "LC_ALL": "C", "TMPDIR": str(tmp_path / "none"),
                                 "COLUMNS": "9", "PYTHONIOENCODING": "ascii"},
        )
        for seed in (0, 1)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    assert "waiting for another process that starts a Prefect server" in "".join(said)
    assert [path.name for path in place.iterdir()] == [NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files % ü", "here"]
    inside = {path.name for path in (place / NAME).iterdir()}
    assert {"mlflow.db", "mlartifacts", "prefect", "store", "reports", "user", "tmp"} <= inside
    assert (place / NAME / "prefect" / "prefect.db").stat().st_size > 0
    assert len(list((place / NAME / "mlartifacts").glob("*/artifacts/report.html"))) == 2
    assert [line for line in proxy[1] if b"127.0.0.1" in line or b"localhost" in line] == []
