"""kill -9 and Ctrl-C in the middle of each stage; then the same command again finishes with the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
LATER = {"later in train": ("model", "checkpoints/checkpoint-160/trainer_state.json")}
SOURCES = {"probe": "probe", "generate": "context-free"}
CUTS = [*((stage, signal.SIGINT) for stage in STAGES), ("train", signal.SIGTERM)]


def command(recipe: Path, home: Path) -> list[str]:
    changes = [word for change in SLOW_ENOUGH for word in ("--set", change)]
    return [sys.executable, "-m", "flows.mitigate", str(recipe), "--home", str(home), *ON, *changes]


def start(recipe: Path, home: Path, **options: Any) -> "subprocess.Popen[str]":
    words = command(recipe, home)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **options)


def middle_of(stage: str, home: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until the draft of `stage` has work in it."""
    kind, sign = (STAGES | LATER)[stage]
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
            out, _ = (process := start(recipe, folder / "data")).communicate(timeout=300)
            assert process.returncode == 0, out
            made.append(final_content(recipe, folder / "data"))
        return recipe, made[0]

    return give


def test_one_run_killed_then_pre_empted_then_stopped_ends_with_the_same_weights(
    case: Callable[[], tuple[Path, str]], tmp_path: Path
) -> None:
    """A kill -9 while it samples, SIGTERM and then Ctrl-C while it trains: one run on machines that come and go."""
    recipe, content = case()
    home = tmp_path / "data"
    kept = killed_in("generate", recipe, home)
    stopped_in("train", signal.SIGTERM, recipe, home)
    words = stopped_in("later in train", signal.SIGINT, recipe, home)
    assert_finishes(words, recipe, home, content)
    assert_not_made_again(kept)
    assert continued_from(home) >= 160


@pytest.mark.slow  # 40 s or more for each stage; the run above has a cut of every kind
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_costs_no_finished_work(stage: str, case: Callable[[], tuple[Path, str]], tmp_path: Path) -> None:
    recipe, content = case()
    home = tmp_path / "data"
    kept = killed_in(stage, recipe, home)
    assert_finishes(command(recipe, home), recipe, home, content)
    assert_not_made_again(kept)
    if stage == "train":
        assert continued_from(home) >= 80


@pytest.mark.slow  # as above
@pytest.mark.parametrize(("stage", "number"), CUTS)
def test_ctrl_c_and_pre_emption_end_children_and_say_how_to_continue(
    stage: str, number: int, case: Callable[[], tuple[Path, str]], tmp_path: Path
) -> None:
    recipe, content = case()
    home = tmp_path / "data"
    assert_finishes(stopped_in(stage, number, recipe, home), recipe, home, content)


def killed_in(stage: str, recipe: Path, home: Path) -> dict[Path, int]:
    """Kill a run with -9 in the middle of `stage`; the shards that it had, and when each was written."""
    process = start(recipe, home)
    middle_of(stage, home, process)
    process.kill()
    process.wait()
    shards = (home / "store" / "corpus").glob("*/corpus-*.parquet")
    return {path: path.stat().st_mtime_ns for path in shards}


def stopped_in(stage: str, number: int, recipe: Path, home: Path) -> list[str]:
    """Stop a run with a signal in the middle of `stage`; the command that it gives to continue."""
    process = start(recipe, home)
    middle_of(stage, home, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    last = out.strip().splitlines()[-1]
    assert last.startswith("python -m flows.mitigate") and str(recipe) in last
    assert "Traceback" not in out
    assert not _training_processes(home)
    return [sys.executable, *last.split()[1:]]


def assert_finishes(words: list[str], recipe: Path, home: Path, content: str) -> None:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert final_content(recipe, home) == content


def assert_not_made_again(kept: dict[Path, int]) -> None:
    assert kept
    for path, written in kept.items():
        made = Path(str(path).replace(".draft", ""))
        assert made.stat().st_mtime_ns == written, f"{path} was made again"


def continued_from(home: Path) -> int:
    """The step at which the training of the tuned model last went on."""
    manifests = (json.loads(path.read_text()) for path in (home / "store" / "model").glob("*/manifest.json"))
    return max(int(manifest["metadata"].get("continued_from_step", 0)) for manifest in manifests)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_temporary_server_ends_with_its_command(
    number: int, case: Callable[[], tuple[Path, str]], tmp_path: Path
) -> None:
    """Ctrl-C in a terminal reaches the whole process group; a kill reaches the command alone."""
    home = tmp_path / "data"
    own = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}
    process = start(case()[0], home, env=own, start_new_session=True)
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
