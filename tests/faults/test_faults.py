"""Every fault for real; then the same command again completes, loses nothing and makes nothing twice.

A case copies the data folder of a run that nobody disturbed, without what the stage at hand made, so that a fault costs
that stage and not a whole run. What is left to other files is named in the table of tests/faults/table.py.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow import MlflowClient

from tests.conftest import ROOT
from tests.faults.runs import ON, Case, Ended, wait_for

pytestmark = pytest.mark.processes

STAGES = ("fetch", "target", "generate", "filter", "probe", "mix", "check", "train", "merge", "evaluate-probe")


def assert_nothing_is_lost(case: Case, undisturbed: Case) -> Ended:
    """Run the command again and compare the store with that of the run that nobody disturbed."""
    before = case.state()
    ended = case.run()
    assert ended.code == 0, ended.out
    after = case.state()
    assert {name: after[name] for name in before} == before, "something that was finished was made again"
    assert contents(case) == contents(undisturbed)
    assert not list(case.home.glob("store/*/*.draft"))
    assert not running(case)
    for lock in (case.home / "store" / ".locks").iterdir():
        FileLock(lock).acquire(timeout=0).lock.release()
    return ended


def contents(case: Case) -> dict[str, str]:
    return {name: content for name, (_, content) in case.state().items()}


def running(case: Case) -> list[str]:
    client = MlflowClient(case.environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("cfsd")
    assert experiment
    found = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    return [str(run.info.run_name) for run in found]


# what ends a run


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "mix" else pytest.mark.slow) for stage in STAGES]
)
def test_a_process_group_killed_in_a_stage_costs_that_stage(stage: str, undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, stage)
    with case.paused_in(stage) as run:
        run.kill()
    assert list(case.home.glob("store/*/*.draft")) == [undisturbed.place(stage, case.home).with_suffix(".draft")]
    assert_nothing_is_lost(case, undisturbed)


def test_two_identical_runs_at_once_make_everything_once(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, "generate", "mix", "evaluate-probe")
    with case.paused_in("generate") as first:
        second = case.start()
        while "waiting for another process that makes corpus" not in second.log.read_text():
            assert second.process.is_alive(), second.log.read_text()
    ended = [run.wait() for run in (first, second)]
    assert [one.code for one in ended] == [0, 0], ended
    for stage in ("generate", "mix", "evaluate-probe"):
        key = undisturbed.place(stage).name
        made = [one.out.count(f"\n{stage} {key}\n") for one in ended]
        assert sum(made) == 1, (stage, made)
    assert_nothing_is_lost(case, undisturbed)


# what happens to finished work


def truncated(folder: Path) -> None:
    file = next(folder.glob("*.parquet"))
    os.truncate(file, file.stat().st_size // 2)


def one_byte(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "truncated": ("probe", truncated),
    "one byte changed": ("merge", one_byte),
    "deleted": ("filter", shutil.rmtree),
}


def test_damaged_artifacts_are_made_again_and_no_others(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path)
    places = {undisturbed.place(stage, case.home): damage for stage, damage in DAMAGE.values()}
    for place, damage in places.items():
        damage(place)
    before = case.state()
    ended = case.run()
    assert ended.code == 0, ended.out
    after = case.state()
    damaged = {str(place.relative_to(case.home)) for place in places}
    assert {name for name in after if before.get(name) != after[name]} == damaged
    assert contents(case) == contents(undisturbed)
    for place in places:
        said = f"{place.parent.name} {place.name} is damaged"
        assert (said in ended.out) == (places[place] is not shutil.rmtree), ended.out
    assert_nothing_is_lost(case, undisturbed)


# what happens to the machine


@contextmanager
def mounted(*words: str) -> Iterator[None]:
    """Mount something for the block; skip where this user may not."""
    done = subprocess.run(["mount", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount needs root: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", words[-1]], check=True)


def fill(folder: Path) -> Path:
    """Write until not a byte more fits, and return the file."""
    file = folder / "filler"
    with file.open("wb", buffering=0) as out:
        for size in (1 << 16, 1):
            try:
                while out.write(b"\0" * size):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return file


@contextmanager
def on_a_disk_of_its_own(case: Case) -> Iterator[None]:
    """Move the data folder of a case onto a small disk for the block."""
    size = sum(file.stat().st_size for file in case.home.rglob("*") if file.is_file())
    aside = case.home.rename(case.folder / "aside")
    case.home.mkdir()
    with mounted("-t", "tmpfs", "-o", f"size={size + (16 << 20)}", "tmpfs", str(case.home)):
        shutil.copytree(aside, case.home, symlinks=True, dirs_exist_ok=True)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["mix", "train"])
def test_a_disk_that_fills_up_in_a_stage_is_named_and_costs_that_stage(
    stage: str, undisturbed: Case, tmp_path: Path
) -> None:
    """`mix` cannot complete its artifact; a training, in a process of its own, cannot write what it has done."""
    case = undisturbed.copy(tmp_path, stage)
    with on_a_disk_of_its_own(case):
        if stage == "mix":
            with case.paused_in(stage) as run:
                filler = fill(case.home)
        else:
            run = case.start()
            wait_for(lambda: bool(list(case.home.glob("store/model/*.draft/request.json"))))
            filler = fill(case.home)
        ended = run.wait()
        assert ended.code == 2, ended.out
        assert f"error: the disk of {case.home}" in ended.out.splitlines()[-1] and "is full (0.0 MiB free)" in ended.out
        filler.unlink()
        assert_nothing_is_lost(case, undisturbed)


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_named_and_stays_as_it_is(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, "mix")
    store = str(case.home / "store")
    before = case.state()
    with mounted("--bind", store, store):
        subprocess.run(["mount", "-o", "remount,ro,bind", store], check=True)
        ended = case.run()
    assert ended.code == 2, ended.out
    assert "Read-only file system" in ended.out.splitlines()[-1] and store in ended.out.splitlines()[-1]
    assert "Traceback" not in ended.out
    assert case.state() == before
    assert_nothing_is_lost(case, undisturbed)


TEN_YEARS = 315_360_000
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real(id, t);
    if (id == CLOCK_REALTIME) t->tv_sec -= SECONDS;
    return done;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.slow
def test_another_clock_and_another_hash_seed_change_no_key_and_no_content(undisturbed: Case, tmp_path: Path) -> None:
    """The clock of the run and of its children is ten years back, by a library that answers before the kernel does."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("there is no C compiler to make a clock with")
    (tmp_path / "clock.c").write_text(CLOCK)
    library = str(tmp_path / "clock.so")
    words = [compiler, "-shared", "-fPIC", f"-DSECONDS={TEN_YEARS}", "-o", library, str(tmp_path / "clock.c"), "-ldl"]
    subprocess.run(words, check=True)
    case = Case(tmp_path, undisturbed.recipe, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    changed = {"LD_PRELOAD": library, "PYTHONHASHSEED": "12345", "CFSD_HOME": str(case.home)}
    done = subprocess.run(
        [sys.executable, "-m", "flows.mitigate", str(case.recipe), *ON], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | case.environment | changed, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    made = [json.loads(manifest.read_text())["created"] for manifest in case.home.glob("store/*/*/manifest.json")]
    assert max(made) < time.time() - TEN_YEARS + 3600
    assert_nothing_is_lost(case, undisturbed)
