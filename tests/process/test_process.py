"""A stage's own process says why it ended, ends with its parent, and is ended by an interrupt."""

import json
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

from cfsd.errors import BadEnvironment, BadInput, CfsdError, Crashed, NotFinite, OutOfMemory, Stopped, StoreError
from cfsd.process.child import run_in_process

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys, time
from pathlib import Path
from cfsd.errors import *
from cfsd.process import serve_request

def gone(pid):
    import psutil
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE

def work(folder, request):
    {body}

serve_request(work)
"""
MACHINE = {
    "micro_batch_tokens": 512, "gradient_checkpointing": False, "sharding": "replicate", "training_processes": None,
}  # fmt: skip
SPEC = {
    "methods": {"lora": {"rank": 0}, "target_divergence": {"reference": "stored"}}, "rehearsal": {"reference": "base"},
}  # fmt: skip
TRAINING = json.dumps({"machine": MACHINE, "spec": SPEC})
PARENT = """
import sys
from pathlib import Path
from cfsd.process import run_in_process
run_in_process("child", Path(sys.argv[1]), "", processes=int(sys.argv[2]))
"""
RANK = "rank = os.environ.get('RANK', ''); (folder / f'pid{rank}').write_text(str(os.getpid()))"
HANG = f"{RANK}; time.sleep(600)"
SAVE = f"""{RANK}; asked = []; signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    while not asked: time.sleep(0.01)
    time.sleep(0.5); (folder / f'saved{{rank}}').touch(); raise Stopped('saved')"""
# what a rank sees when its peer is gone: an error of its own, a moment later
PEER = f"""{RANK}
    file = folder / 'pid1'
    while rank == '1' or not file.exists() or not gone(int(file.read_text() or 1)): time.sleep(0.01)
    raise RuntimeError('connection closed by peer')"""


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
        (r"os.write(1, b'cut \xe2\x82'); os._exit(3)", Crashed, "(?s)code 3.*cut"),
        ("raise StoreError('damaged')", StoreError, "^damaged$"),
        ("raise BadEnvironment('no server')", BadEnvironment, "^no server$"),
        ("raise OSError(28, 'No space left on device', str(folder))", BadEnvironment, "^the disk of .*draft is full"),
        ("raise RuntimeError('I/O error: No space left on device (os error 28)')", BadEnvironment, "is full .*--home"),
    ],
)  # fmt: skip
def test_errors_arrive_as_what_they_are(
    child: Callable[[str], Path], body: str, cls: type[CfsdError], message: str
) -> None:
    with pytest.raises(cls, match=message) as raised:
        run_in_process("child", child(body), TRAINING)
    assert type(raised.value) is cls


def test_a_child_that_could_not_write_its_error_met_a_full_disk(
    child: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cfsd.process.child.is_full", lambda folder: True)
    with pytest.raises(BadEnvironment, match="is full"):
        run_in_process("child", child("os._exit(1)"), TRAINING)


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


def pid_in(folder: Path, rank: str = "") -> int:
    file = folder / f"pid{rank}"
    wait_for(lambda: file.exists() and file.read_text() != "")
    return int(file.read_text())


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def parent_of(folder: Path, processes: int) -> "subprocess.Popen[bytes]":
    (folder.parent / "parent.py").write_text(PARENT)
    command = [sys.executable, str(folder.parent / "parent.py"), str(folder), str(processes)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_child_ends_with_its_parent(child: Callable[[str], Path], number: signal.Signals) -> None:
    folder = child(HANG)
    parent = parent_of(folder, 1)
    pid = pid_in(folder)
    parent.send_signal(number)
    parent.wait(30)
    wait_for(lambda: is_gone(pid), 10)


def test_the_ranks_end_with_their_launcher_and_it_with_its_parent(child: Callable[[str], Path]) -> None:
    folder = child(HANG)
    parent = parent_of(folder, 2)
    pids = [pid_in(folder, rank) for rank in "01"]
    launcher = psutil.Process(pids[0]).ppid()
    assert psutil.Process(pids[1]).ppid() == launcher and psutil.Process(launcher).ppid() == parent.pid
    parent.kill()
    parent.wait(30)
    wait_for(lambda: all(map(is_gone, [launcher, *pids])), 10)


def together(folder: Path) -> tuple[threading.Thread, list[object]]:
    """Run two ranks from a thread of this process; the list gets what comes of it."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(run_in_process("child", folder, TRAINING, processes=2))
        except CfsdError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, ended


def test_ranks_work_together_and_the_first_one_answers(child: Callable[[str], Path]) -> None:
    words = "names = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'; return {name: os.environ[name] for name in names}"
    assert run_in_process("child", child(words), "", processes=2) == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}


def test_a_failure_on_any_rank_is_the_error_of_all(child: Callable[[str], Path]) -> None:
    folder = child(f"{RANK}; rank == '0' and time.sleep(600); raise BadInput('wrong')")
    with pytest.raises(BadInput, match=r"^wrong$"):
        run_in_process("child", folder, "", processes=2)


def test_a_stop_reaches_the_ranks_which_may_save(child: Callable[[str], Path]) -> None:
    folder = child(SAVE)
    thread, ended = together(folder)
    pids = [pid_in(folder, rank) for rank in "01"]
    launcher = psutil.Process(pids[0]).parent()
    time.sleep(0.3)
    launcher.terminate()
    time.sleep(0.2)
    launcher.terminate()  # as when a cluster tells the whole group, again and again
    thread.join(60)
    assert isinstance(ended[0], Stopped) and str(ended[0]) == "saved"
    assert (folder / "saved0").exists() and (folder / "saved1").exists()


def test_a_killed_rank_is_named_and_not_its_peers_that_complain(child: Callable[[str], Path]) -> None:
    folder = child(PEER)
    thread, ended = together(folder)
    pid_in(folder, "0")
    os.kill(pid_in(folder, "1"), signal.SIGKILL)
    thread.join(60)
    assert isinstance(ended[0], Crashed)
    assert str(ended[0]).startswith("rank 1 of 2 ended with code -9 and no error message; if no user killed it")


def test_a_stop_before_the_work_began_is_a_stop(child: Callable[[str], Path]) -> None:
    folder = child("os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)")
    with pytest.raises(Stopped):
        run_in_process("child", folder, "")


@pytest.mark.parametrize(
    ("machine", "spec", "named", "absent"),
    [
        (MACHINE, SPEC,
         ["machine.micro_batch_tokens (now 512): lower", "gradient_checkpointing (now false)", "lora.rank (now 0)",
          'reference (now "base"): set to stored', 'machine.sharding (now "replicate")'], "generate.length"),
        (MACHINE | {"gradient_checkpointing": True, "sharding": "shard"},
         {
             "methods": {"lora": {"rank": 8}, "target_divergence": {"reference": "base"}},
             "rehearsal": {"reference": "stored"},
         },
         ["machine.micro_batch_tokens (now 512): lower", 'target_divergence.reference (now "base")'],
         "gradient_checkpointing"),
    ],
)  # fmt: skip
def test_out_of_memory_names_what_would_help_with_its_present_value(
    child: Callable[[str], Path], machine: dict[str, object], spec: dict[str, object], named: list[str], absent: str
) -> None:
    request = json.dumps({"machine": machine, "spec": spec})
    with pytest.raises(OutOfMemory) as raised:
        run_in_process("child", child("raise MemoryError('full')"), request)
    assert all(name in str(raised.value) for name in named)
    assert absent not in str(raised.value)


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
