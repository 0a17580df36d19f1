"""kill -9 and Ctrl-C in the middle of each stage; then the same command again finishes with the same weights."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from tests.conftest import ROOT

pytestmark = pytest.mark.processes

SLOW_ENOUGH = [  # seconds per stage, so that its middle can be hit
    "probe.rows=80", "probe.length=100", "generate.rows=120", "generate.length=100", "mix.target_rows=1",
    "train.epochs=6",
]  # fmt: skip
ON = ["--machine", "sampling_rows=8", "--machine", "checkpoint_steps=40", "--machine", "threads=1"]
STAGES = {
    "probe": ("corpus", "corpus-00002.parquet"),
    "generate": ("corpus", "corpus-00002.parquet"),
    "train": ("model", "checkpoints/checkpoint-80/trainer_state.json"),
    "evaluate-probe": ("scores", "progress.json"),
}
SOURCES = {"probe": "probe", "generate": "context-free"}
# 40 s each or more; probe and generate are sampled by the same code, and either ends all stages alike
SLOW = pytest.mark.slow
KILLED = [pytest.param(s, marks=() if s in ("generate", "train") else SLOW) for s in STAGES]
STOPPED = [
    *(pytest.param(s, signal.SIGINT, marks=() if s == "train" else SLOW) for s in STAGES),
    ("train", signal.SIGTERM),
]


def start(recipe: Path, home: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "flows.mitigate", str(recipe), "--home", str(home), *ON]
    for change in SLOW_ENOUGH:
        words += ["--set", change]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def middle_of(stage: str, home: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until the draft of `stage` has work in it."""
    kind, sign = STAGES[stage]
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.stdout and process.stdout.read()
        for draft in (home / "store" / kind).glob("*.draft"):
            if (draft / sign).exists() and (kind != "corpus" or _source(draft / sign) == SOURCES[stage]):
                return
        time.sleep(0.01)
    raise AssertionError(f"{stage} never came to its middle")


def _source(shard: Path) -> str:
    return str(pq.read_table(shard, columns=["source"])["source"][0])


def final_content(recipe: Path, home: Path) -> str:
    from flows._plan import walk
    from flows.mitigate import pipeline

    os.environ["CFSD_HOME"], before = str(home), os.environ["CFSD_HOME"]
    try:
        steps = walk(Recipe.load(recipe, SLOW_ENOUGH), Machine(device="cpu", threads=1), pipeline).steps
        key = next(step.key for step in steps if step.stage == "train")
    finally:
        os.environ["CFSD_HOME"] = before
    assert key
    found = Store(home).find("model", key)
    assert found
    return found.content


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, server: str) -> Callable[[], tuple[Path, str]]:
    """One recipe, and the weights that it gives when nobody interrupts."""
    from tests.conftest import save_model, write_rows

    folder = tmp_path_factory.mktemp("interrupt")
    save_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"name: mine\nbase: {folder / 'model'}\ntarget: {{path: {rows}, held_out: 8}}\n")
    made: list[str] = []

    def give() -> tuple[Path, str]:
        if not made:
            process = start(recipe, folder / "data")
            out, _ = process.communicate(timeout=300)
            assert process.returncode == 0, out
            made.append(final_content(recipe, folder / "data"))
        return recipe, made[0]

    return give


@pytest.mark.parametrize("stage", KILLED)
def test_kill_9_costs_no_finished_work(stage: str, case: Callable[[], tuple[Path, str]], tmp_path: Path) -> None:
    recipe, content = case()
    home = tmp_path / "data"
    process = start(recipe, home)
    middle_of(stage, home, process)
    process.kill()
    process.wait()
    kept = _state(home)
    again = start(recipe, home)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert final_content(recipe, home) == content
    for path, mtime in kept.items():  # finished artifacts and shards were not written again
        made = Path(str(path).replace(".draft", ""))
        assert made.stat().st_mtime_ns == mtime, f"{path} was made again"
    if stage == "train":
        manifests = [path.read_text() for path in (home / "store" / "model").glob("*/manifest.json")]
        assert any('"continued_from_step": 80' in text for text in manifests)


def _state(home: Path) -> dict[Path, int]:
    shards = list((home / "store" / "corpus").glob("*/corpus-*.parquet"))
    return {path: path.stat().st_mtime_ns for path in shards}


@pytest.mark.parametrize(("stage", "number"), STOPPED)
def test_ctrl_c_and_pre_emption_end_children_and_say_how_to_continue(
    stage: str, number: int, case: Callable[[], tuple[Path, str]], tmp_path: Path
) -> None:
    recipe, content = case()
    home = tmp_path / "data"
    process = start(recipe, home)
    middle_of(stage, home, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("python -m flows.mitigate") and str(recipe) in last
    assert "Traceback" not in out
    assert not _training_processes(home)
    done = subprocess.run([sys.executable, *last.split()[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert final_content(recipe, home) == content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_temporary_server_ends_with_its_command(
    number: int, case: Callable[[], tuple[Path, str]], tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches the whole process group; a kill reaches the command alone."""
    home = tmp_path / "data"
    own = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}
    words = [sys.executable, "-m", "flows.mitigate", str(case()[0]), "--home", str(home), *ON]
    changes = [word for change in SLOW_ENOUGH for word in ("--set", change)]
    process = subprocess.Popen(
        [*words, *changes], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=own,
        start_new_session=True,
    )  # fmt: skip
    middle_of("generate", home, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.kill()
    out, _ = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, out
        assert out.strip().splitlines()[-1].startswith("python -m flows.mitigate")
        assert "Traceback" not in out
    time.sleep(2)
    assert not _processes("flows._temporary_server", f"CFSD_HOME={home}")


def _processes(words: str, variable: str) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = (
                (folder / name).read_bytes().replace(b"\0", b" ").decode() for name in ("cmdline", "environ")
            )
        except (OSError, UnicodeDecodeError):
            continue
        if words in line and variable in environment:
            found.append(line)
    return found


def _training_processes(home: Path) -> list[str]:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "cfsd.train.trainer" in line and str(home) in line]
