"""A stage's own process says why it ended, ends with its parent, and is ended by an interrupt."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cfsd.errors import BadInput, CfsdError, Crashed, NotFinite, OutOfMemory, StoreError
from cfsd.process import run_in_process

ROOT = Path(__file__).parent.parent
CHILD = """
import os, sys, time
from pathlib import Path
from cfsd.errors import *
from cfsd.process import serve_request

def work(folder, request):
    {body}

serve_request(work)
"""
PARENT = """
import sys
from pathlib import Path
from cfsd.process import run_in_process
run_in_process("child", Path(sys.argv[1]), "")
"""
HANG = "(folder / 'pid').write_text(str(os.getpid())); time.sleep(600)"


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Write a module `child` whose work is the given line; return its draft folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    def write(body: str) -> Path:
        (tmp_path / "child.py").write_text(CHILD.format(body=body))
        (tmp_path / "draft").mkdir()
        return tmp_path / "draft"

    return write


def test_facts_come_back(child: Callable[[str], Path]) -> None:
    folder = child("return {'request': request, 'here': folder.name}")
    assert run_in_process("child", folder, "do it") == {"request": "do it", "here": "draft"}


@pytest.mark.parametrize(
    ("body", "cls", "message"),
    [
        ("raise BadInput('wrong')", BadInput, "^wrong$"),
        ("raise NotFinite('nan')", NotFinite, "^nan$"),
        ("raise MemoryError('full')", OutOfMemory, r"full.*machine\.micro_batch_tokens"),
        ("raise ValueError('odd')", Crashed, "ValueError: odd"),
        ("print('last words', flush=True); os._exit(3)", Crashed, "(?s)code 3.*last words"),
        ("raise StoreError('damaged')", StoreError, "^damaged$"),
    ],
)  # fmt: skip
def test_errors_arrive_as_what_they_are(
    child: Callable[[str], Path], body: str, cls: type[CfsdError], message: str
) -> None:
    with pytest.raises(cls, match=message) as raised:
        run_in_process("child", child(body), "")
    assert type(raised.value) is cls


def test_words_of_an_earlier_attempt_do_not_count(child: Callable[[str], Path]) -> None:
    folder = child("return {'new': True}")
    (folder / "error.json").write_text('{"kind": "bad_input", "message": "old"}')
    (folder / "facts.json").write_text('{"old": true}')
    assert run_in_process("child", folder, "") == {"new": True}


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pid_in(folder: Path) -> int:
    wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text() != "")
    return int((folder / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_child_ends_with_its_parent(child: Callable[[str], Path], tmp_path: Path, number: signal.Signals) -> None:
    folder = child(HANG)
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(folder)], stderr=subprocess.DEVNULL)
    pid = pid_in(folder)
    parent.send_signal(number)
    parent.wait(30)
    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 10)


def test_two_children_never_write_one_draft_at_a_time(child: Callable[[str], Path]) -> None:
    """The second waits for the first, as after a restart while an orphan is still dying."""
    folder = child(
        "(folder / str(os.getpid())).touch(); time.sleep(1); return {'alone': len(list(folder.glob('[0-9]*')))}"
    )
    seen: list[object] = []
    first = threading.Thread(target=lambda: seen.append(run_in_process("child", folder, "")))
    first.start()
    wait_for(lambda: any(folder.glob("[0-9]*")))
    second = subprocess.run([sys.executable, "-m", "child", str(folder)], check=True, capture_output=True)
    first.join()
    assert second.returncode == 0
    assert seen == [{"alone": 1}]
