"""The store: complete or absent, found by content, made once whoever asks, continued only by its equals."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsd.errors import StoreError
from cfsd.mix.spec import MixSpec
from cfsd.store.artifact import Artifact, Draft, Store, key_of

KEY = "0123456789abcdef"
SPAWN = multiprocessing.get_context("spawn")


def write(text: str = "payload") -> Callable[[Draft], None]:
    def work(draft: Draft) -> None:
        (draft.folder / "part").mkdir(exist_ok=True)
        (draft.folder / "part" / "a.txt").write_text(text)
        (draft.folder / "b.txt").write_text("second")
        draft.metadata["length"] = len(text)

    return work


def made(store: Store, text: str = "payload", key: str = KEY) -> tuple[Artifact, bool]:
    return store.make("thing", key, write(text))


def fail(draft: Draft) -> None:
    (draft.folder / "half.txt").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_work_runs_once_and_the_artifact_is_found_with_its_facts(store: Store) -> None:
    first, executed = made(store)
    again, executed_again = made(store, "would be another")
    assert (executed, executed_again) == (True, False)
    assert first == again == store.find("thing", KEY)
    assert first.metadata == {"length": 7}
    store.verify(first)


def test_what_is_not_made_is_not_found(store: Store) -> None:
    assert store.find("thing", KEY) is None
    made(store)
    assert store.find("other", KEY) is None
    assert store.find("thing", "f" * 16) is None


def test_an_error_leaves_the_draft_which_the_next_run_continues(store: Store) -> None:
    with pytest.raises(OSError, match="No space"):
        store.make("thing", KEY, fail)
    assert store.find("thing", KEY) is None
    seen: list[Any] = []

    def finish(draft: Draft) -> None:
        seen.extend([draft.continued, (draft.folder / "half.txt").read_text()])

    artifact, _ = store.make("thing", KEY, finish)
    assert seen == [True, "half"]
    assert "half.txt" in store.manifest(artifact)["files"]


def test_a_draft_of_another_environment_starts_anew_and_says_so(store: Store) -> None:
    with pytest.raises(OSError, match="No space"):
        store.make("thing", KEY, fail, environment={"torch": "1"})
    said: list[str] = []

    def look(draft: Draft) -> None:
        assert not draft.continued
        assert not (draft.folder / "half.txt").exists()

    artifact, _ = store.make("thing", KEY, look, environment={"torch": "2"}, say=said.append)
    assert [KEY in line and "anew" in line for line in said] == [True]
    assert store.manifest(artifact)["environment"] == {"torch": "2"}


def test_a_full_disk_at_the_very_end_loses_no_work(store: Store) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as disk:

        def fill_disk(draft: Draft) -> None:
            write()(draft)
            disk.setattr(os, "fsync", full)

        with pytest.raises(OSError, match="No space"):
            store.make("thing", KEY, fill_disk)
    continued: list[bool] = []
    store.make("thing", KEY, lambda draft: continued.append(draft.continued))
    assert continued == [True]


@pytest.mark.parametrize("change", ["cut", "flipped", "deleted"])
def test_a_damaged_artifact_is_absent_and_made_again(store: Store, change: str) -> None:
    artifact, _ = made(store)
    file = store.path(artifact) / "part" / "a.txt"
    time.sleep(0.01)
    {
        "cut": lambda: file.write_text("pay"),
        "flipped": lambda: file.write_text("qayload"),
        "deleted": file.unlink,
    }[change]()  # type: ignore[operator]
    assert store.find("thing", KEY) is None
    again, executed = made(store)
    assert executed
    assert again.content == artifact.content
    store.verify(again)


def test_a_damaged_manifest_is_an_absent_artifact(store: Store) -> None:
    artifact, _ = made(store)
    (store.path(artifact) / "manifest.json").write_text('{"schema": 1, "fi')
    assert store.find("thing", KEY) is None
    assert made(store)[1]


def test_verify_reads_every_byte_and_names_file_and_remedy(store: Store) -> None:
    artifact, _ = made(store)
    file = store.path(artifact) / "b.txt"
    status = file.stat()
    file.write_text("SECOND")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.find("thing", KEY) == artifact  # the light check trusts size and mtime
    with pytest.raises(StoreError, match=r"b\.txt.*restore it, or delete"):
        store.verify(artifact)


def test_touched_but_equal_files_are_found(store: Store) -> None:
    artifact, _ = made(store)
    os.utime(store.path(artifact) / "b.txt", (1, 1))
    assert made(store) == (artifact, False)


def test_a_moved_home_and_a_copied_artifact_are_found(store: Store, tmp_path: Path) -> None:
    artifact, _ = made(store)
    shutil.copytree(store.path(artifact), tmp_path / "colleague" / "store" / "thing" / KEY)
    store.home.rename(tmp_path / "moved")
    for home in ("moved", "colleague"):
        elsewhere = Store(tmp_path / home)
        assert elsewhere.find("thing", KEY) == artifact
        assert made(elsewhere) == (artifact, False)


def test_content_follows_payload_not_key_nor_logs(store: Store) -> None:
    def chatty(draft: Draft) -> None:
        write()(draft)
        (draft.folder / "log.txt").write_text(str(time.time()))
        draft.journal.metrics(1, {"seconds": time.time()})

    contents = [made(store, key=key)[0].content for key in ("a" * 16, "b" * 16)]
    contents.append(store.make("thing", "c" * 16, chatty)[0].content)
    assert len(set(contents)) == 1
    assert made(store, "other", key="d" * 16)[0].content != contents[0]


def test_a_key_follows_stage_specs_and_content_but_not_the_inputs_key(store: Store) -> None:
    one, two = made(store, key="a" * 16)[0], made(store, key="b" * 16)[0]
    assert key_of("mix", one, MixSpec()) == key_of("mix", two, MixSpec())
    other = made(store, "other", key="c" * 16)[0]
    different = [
        key_of("mix", one, MixSpec()), key_of("train", one, MixSpec()), key_of("mix", other, MixSpec()),
        key_of("mix", one, MixSpec(target_rows=9)), key_of("mix", MixSpec(), one), key_of("mix", one, None),
    ]  # fmt: skip
    assert len(set(different)) == len(different)


def _slow_work(draft: Draft) -> None:
    with (draft.store.home / "executions").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(1)
    write()(draft)


def _make_once(home: Path) -> None:
    Store(home).make("thing", KEY, _slow_work)


def test_two_processes_that_want_one_key_execute_once(store: Store) -> None:
    store.home.mkdir(parents=True)
    processes = [SPAWN.Process(target=_make_once, args=(store.home,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len((store.home / "executions").read_text().splitlines()) == 1
    assert store.find("thing", KEY)


def _hang(draft: Draft) -> None:
    (draft.folder / "half.txt").write_text("half")
    time.sleep(600)


def _make_and_hang(home: Path) -> None:
    Store(home).make("thing", KEY, _hang)


def test_kill_9_frees_the_lock_and_the_draft_is_continued(store: Store) -> None:
    process = SPAWN.Process(target=_make_and_hang, args=(store.home,))
    process.start()
    half = store.root / "thing" / f"{KEY}.draft" / "half.txt"
    while not half.exists():
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    said: list[str] = []
    continued: list[bool] = []
    store.make("thing", KEY, lambda draft: continued.append(draft.continued), say=said.append)
    assert continued == [True]
    assert not said  # nobody was waited for
