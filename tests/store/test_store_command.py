"""`cfsd store`: what is listed is there, what is deleted nobody needs, and what is damaged is named."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cfsd.__main__ import main
from cfsd.store.artifact import Artifact, Draft, Store
from tests.conftest import ROOT

Cfsd = Callable[..., tuple[int, str, str]]
OLD = time.time() - 3 * 86400


@pytest.fixture
def cfsd(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cfsd:
    """Run `cfsd store ARGS` on this test's data folder; exit code, output and errors, each with single spaces."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cfsd", "store", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = (" ".join(text.split()) for text in capsys.readouterr())
        return int(ended.value.code or 0), out, err

    return call


def make(store: Store, kind: str, key: str, *inputs: Artifact, text: str = "x", age: float = 3) -> Artifact:
    def work(draft: Draft) -> None:
        (draft.folder / "a.txt").write_text(text)
        draft.metadata["about"] = f"[bold]{text}"

    made, _ = store.make(kind, key * 16 if len(key) == 1 else key, work, inputs=inputs)
    file = store.place(made) / "manifest.json"
    manifest = json.loads(file.read_text()) | {"seconds": 100.0, "created": time.time() - age * 86400}
    file.write_text(json.dumps(manifest))
    return made


def report(store: Store, name: str, *artifacts: Artifact, below: str = "") -> None:
    folder = store.home / "reports" / name / below
    folder.mkdir(parents=True)
    steps = [{"stage": "any", "artifact": artifact.model_dump(mode="json")} for artifact in artifacts]
    (folder / "run_records.json").write_text(json.dumps({"schema": 1, "run_records": [{"steps": steps}]}))


@pytest.fixture
def world(store: Store) -> dict[str, Artifact]:
    """base -> tuned -> scores, of which a report names the last; and one that nothing refers to."""
    base = make(store, "model", "a", text="base")
    tuned = make(store, "model", "b", base, text="tuned")
    scores = make(store, "scores", "c", tuned, text="scores")
    alone = make(store, "corpus", "d", text="nobody's")
    report(store, "demo-12345678", scores)
    return {"base": base, "tuned": tuned, "scores": scores, "alone": alone}


def present(store: Store) -> set[str]:
    return {folder.name[0] for folder in store.root.glob("*/*") if not folder.parent.name.startswith(".")}


def test_ls_shows_what_is_there_and_why(cfsd: Cfsd, world: dict[str, Artifact]) -> None:
    code, out, _ = cfsd("ls")
    assert code == 0 and f"scores {'c' * 16} whole" in out and "100 demo-12345678" in out
    assert "4 artifacts" in out and "400 s to make again" in out
    code, out, _ = cfsd("ls", "--kind", "model")
    assert code == 0 and "2 artifacts" in out and "c" * 16 not in out
    code, _, err = cfsd("ls", "--kind", "modle")
    assert code == 2 and "'modle'; there are: corpus, model, scores" in err


def test_show_tells_where_it_comes_from_and_who_needs_it(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    code, out, _ = cfsd("show", "bb")
    assert code == 0 and f"from model {'a' * 16}" in out and f"used by scores {'c' * 16}" in out
    assert "took 100 s" in out and "none refers to it" in out and '"about": "[bold]tuned"' in out
    assert f"file {store.manifest(world['tuned'])['files']['a.txt'][:12]} 5 B a.txt" in out
    assert "report demo-12345678" in cfsd("show", f"scores/{'c' * 16}")[1]


def test_a_key_may_be_cut_where_it_is_the_only_one(cfsd: Cfsd, store: Store) -> None:
    for kind, key in (("model", "ab" * 8), ("model", "ac" * 8), ("corpus", "ab" * 8)):
        make(store, kind, key)
    assert cfsd("show", "ac")[0] == cfsd("show", "corpus/a")[0] == 0
    code, _, err = cfsd("show", "ab")
    assert code == 2 and f"names 2 artifacts (corpus/{'ab' * 8}, model/{'ab' * 8}); write more of it" in err
    assert "nothing in the store is named 'ff'" in cfsd("verify", "ff")[2]
    assert cfsd("show", "")[0] == 2


@pytest.mark.parametrize("folder", [".", "./"])
def test_the_data_folder_may_be_the_working_directory(
    cfsd: Cfsd, world: dict[str, Artifact], store: Store, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(store.home)
    assert cfsd("ls", "--home", folder)[0] == 0
    assert "--home is empty" in cfsd("ls", "--home", "")[2]


def test_verify_reads_every_byte(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    assert cfsd("verify") == (0, "everything is as it was made", "")
    file = store.path(world["tuned"]) / "a.txt"
    status = file.stat()
    file.write_text("Tuned")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.find("model", "b" * 16)  # size and mtime are as they were
    code, out, _ = cfsd("verify")
    assert code == 1 and f"damaged: model {'b' * 16} (a.txt)" in out and "the next run that needs it makes it" in out
    assert store.find("model", "b" * 16) is None
    assert cfsd("verify", "a")[0] == 0
    (store.path(world["base"]) / "manifest.json").write_text("{")
    code, out, _ = cfsd("verify", "a", "c")
    assert code == 1 and out.count("damaged: ") == 1 and f"model {'a' * 16} (manifest.json)" in out
    assert "2 damaged" not in out and f"model {'a' * 16} damaged" in cfsd("ls")[1]


def test_gc_deletes_nothing_unless_it_is_told_to(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    code, out, _ = cfsd("gc")
    assert code == 0 and "1 could be deleted" in out and "100 s to make again" in out and "add --delete" in out
    assert "d" * 16 in out and present(store) == set("abcd")
    code, out, _ = cfsd("gc", "--delete")
    assert code == 0 and "1 deleted" in out and present(store) == set("abc")
    assert store.find("scores", "c" * 16) and cfsd("verify")[0] == 0


def test_gc_keeps_what_is_young_or_small_and_what_that_was_made_from(
    cfsd: Cfsd, world: dict[str, Artifact], store: Store
) -> None:
    make(store, "corpus", "e", world["alone"], age=0.5)
    assert "0 could be deleted" in cfsd("gc")[1]  # the young one was made from the old one
    assert "2 could be deleted" in cfsd("gc", "--older-than", "0")[1]
    assert "0 could be deleted" in cfsd("gc", "--older-than", "0", "--larger-than", "1")[1]
    assert cfsd("gc", "--older-than", "0", "--delete")[0] == 0 and present(store) == set("abc")


def test_gc_keeps_what_the_pages_of_one_seed_refer_to(cfsd: Cfsd, store: Store) -> None:
    """They lie one folder deeper than the page over all seeds, which names no artifact."""
    crossed = make(store, "scores", "c", text="of another target")
    report(store, "in-turn-12345678", crossed, below="in-turn-seed-1")
    assert "0 could be deleted" in cfsd("gc")[1]
    assert "in-turn-12345678" in cfsd("show", "c")[1]


def test_a_broken_reference_is_said(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    make(store, "scores", "e", world["base"], age=0)
    code, out, _ = cfsd("gc", "--even-referenced")
    assert code == 0 and "4 could be deleted" in out and "2 reports or artifacts that stay refer to some of it" in out
    assert "demo-12345678" in out and f"scores {'e' * 16}" in out
    assert cfsd("gc", "--even-referenced", "--delete")[0] == 0 and present(store) == {"e"}


def test_gc_waits_for_no_run_and_leaves_it_alone(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    with store.in_use():
        code, _, err = cfsd("gc", "--delete")
    assert code == 1 and "a run uses the data folder" in err and present(store) == set("abcd")
    with (store.root / ".locks" / f"corpus-{'d' * 16}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cfsd("gc", "--delete")[0] == 0 and present(store) == set("abcd")
    assert cfsd("gc", "--delete")[0] == 0 and present(store) == set("abc")


def test_drafts_of_the_dead_go_and_those_of_the_living_stay(cfsd: Cfsd, store: Store) -> None:
    def fail(draft: Draft) -> None:
        (draft.folder / "half.txt").write_text("half")
        raise OSError("ended")

    for key in ("a" * 16, "b" * 16):
        with pytest.raises(OSError, match="ended"):
            store.make("model", key, fail)
    assert "0 could be deleted" in cfsd("gc")[1]  # it was written to today: the next run continues it
    with store.lock("model", "b" * 16):
        code, out, _ = cfsd("gc", "--older-than", "0")
        assert code == 0 and "1 could be deleted" in out and "a" * 16 in out
    for key in "ab":
        for file in (store.root / "model" / f"{key * 16}.draft", store.root / "model" / f"{key * 16}.draft/draft.json"):
            os.utime(file, (OLD, OLD))
    assert cfsd("gc", "--delete")[0] == 0 and present(store) == set()


def test_push_and_pull(cfsd: Cfsd, world: dict[str, Artifact], store: Store, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    assert "no shared store is named" in cfsd("push")[2]
    code, out, _ = cfsd("push", "b", "--store", url)
    assert (code, out) == (0, f"1 of 1 are in {url}")
    assert cfsd("push")[1] == f"4 of 4 are in {url}"
    other = tmp_path / "other"
    assert "there is no data folder" in cfsd("ls", "--home", other)[2]
    other.mkdir()
    code, out, _ = cfsd("ls", "--home", other, "--shared")
    assert code == 0 and "4 artifacts" in out and "b" * 16 in out
    assert f"model {'b' * 16}: in part" in cfsd("show", "b", "--home", other)[1]
    assert cfsd("pull", "b", "--home", other)[1] == f"1 of 1 are in {other}"
    assert cfsd("pull", "--home", other)[1] == f"4 of 4 are in {other}"
    assert cfsd("verify", "--home", other)[0] == 0
    (file,) = (tmp_path / "shared" / "model" / ("b" * 16)).glob("*/a.txt")
    file.write_text("Tuned")
    code, out, _ = cfsd("verify", "--shared", "--home", other)
    assert code == 1 and f"damaged: model {'b' * 16} (a.txt)" in out and "--again" in out
    third = tmp_path / "third"
    third.mkdir()
    code, out, _ = cfsd("pull", "--home", third)
    assert code == 1 and "a.txt of model" in out and "3 of 4 are in" in out
    assert cfsd("push", "b", "--again", "--home", other)[0] == 0
    assert cfsd("verify", "--shared")[0] == 0
    assert cfsd("pull", "--home", third)[0] == 0


def test_pull_mends_what_is_damaged_here(cfsd: Cfsd, world: dict[str, Artifact], store: Store, tmp_path: Path) -> None:
    assert cfsd("push", "--store", f"file://{tmp_path}/shared")[0] == 0
    (store.path(world["tuned"]) / "a.txt").write_text("Tuned")
    code, out, _ = cfsd("pull", "b")
    assert code == 0 and f"model {'b' * 16} is damaged (a.txt): it is taken from the shared store" in out
    assert "1 of 1 are in" in out and (store.place(world["tuned"]) / "a.txt").read_text() == "tuned"


def test_what_is_damaged_is_not_pushed(cfsd: Cfsd, world: dict[str, Artifact], store: Store, tmp_path: Path) -> None:
    (store.path(world["base"]) / "a.txt").write_text("Base")
    code, out, _ = cfsd("push", "--store", f"file://{tmp_path}/shared")
    assert code == 1 and "is damaged and is not pushed" in out and "3 of 4 are in" in out
    (store.place(world["base"]) / "a.txt").unlink()
    for keys in ((), ("a",)):
        code, out, _ = cfsd("push", *keys)
        assert code == 1 and f"model {'a' * 16} is not pushed, as it is damaged here: run its recipe again" in out


def test_what_is_here_in_part_is_no_damage(
    cfsd: Cfsd, world: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cfsd("push", "--store", f"file://{tmp_path}/shared")[0] == 0
    (other := tmp_path / "other").mkdir()
    assert cfsd("show", "b", "--home", other)[0] == 0  # which brings its manifest
    assert cfsd("push", "b", "--home", other)[0] == 0
    code, out, _ = cfsd("push", "b", "--again", "--home", other)
    assert code == 1 and "here in part only: push it from a data folder where it is whole" in out
    monkeypatch.setenv("CFSD_STORE", "")
    assert cfsd("verify", "--home", other)[0] == 0


def test_a_deletion_that_was_killed_does_not_stop_the_next(
    cfsd: Cfsd, world: dict[str, Artifact], store: Store
) -> None:
    (killed := store.root / "corpus" / f".{'d' * 16}.deleted").mkdir()
    (killed / "a.txt").write_text("of an earlier one")
    assert cfsd("gc", "--delete")[0] == 0 and present(store) == set("abc")
    assert not any("dddd" in name for name in json.loads(store.memory.file.read_text()))


def test_a_data_folder_that_cannot_be_written_is_read(world: dict[str, Artifact], store: Store) -> None:
    """In a namespace of its own, where even root cannot write to it."""
    script = f'mount --bind {store.home} {store.home} && mount -o remount,ro,bind {store.home} && exec "$@"'
    for words in (["ls"], ["verify"]):
        command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-m", "cfsd", "store", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if "unshare" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no namespaces here: {done.stderr}")
        assert done.returncode == 0, done.stderr


def test_gc_keeps_what_a_young_draft_is_made_from(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    def fail(_: Draft) -> None:
        raise OSError("ended")

    with pytest.raises(OSError, match="ended"):
        store.make("model", "e" * 16, fail, inputs=[world["alone"]])
    assert "0 could be deleted" in cfsd("gc")[1]
    assert f"used by model {'e' * 16}" in cfsd("show", "d")[1]


def test_gc_keeps_what_links_lead_into(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    """As of a base that is a folder of the store: whoever reads it reads the other one's weights."""

    def link(draft: Draft) -> None:
        (draft.folder / "a.txt").symlink_to(store.path(world["alone"]).resolve() / "a.txt")

    linked, _ = store.make("model", "e" * 16, link)
    report(store, "demo-87654321", linked)
    assert "0 could be deleted" in cfsd("gc")[1] and f"from corpus {'d' * 16}" in cfsd("show", "e")[1]
    assert f"model {'e' * 16}" in cfsd("gc", "--even-referenced")[1], "which that would break"


def test_gc_keeps_what_links_lead_into_on_another_disk_or_in_a_folder_that_moved(
    cfsd: Cfsd, world: dict[str, Artifact], store: Store, tmp_path: Path
) -> None:
    def link(draft: Draft) -> None:
        (draft.folder / "a.txt").symlink_to(store.path(world["alone"]).resolve() / "a.txt")

    linked, _ = store.make("model", "e" * 16, link)
    report(store, "demo-87654321", linked)
    kind = store.root / "corpus"
    kind.rename(tmp_path / "another disk")
    kind.symlink_to(tmp_path / "another disk")
    for leads in (tmp_path / "another disk", Path("/moved/data/store/corpus")):
        (file := store.place(linked) / "a.txt").unlink()
        file.symlink_to(leads / ("d" * 16) / "a.txt")
        assert "0 could be deleted" in cfsd("gc")[1], leads


def test_what_the_shared_store_lost_or_another_one_holds_is_not_taken_as_there(
    cfsd: Cfsd, world: dict[str, Artifact], store: Store, tmp_path: Path
) -> None:
    shared, second = tmp_path / "shared", f"file://{tmp_path}/second"
    assert cfsd("push", "--store", f"file://{shared}")[0] == 0
    shutil.rmtree(shared / "model")
    code, out, _ = cfsd("push")
    assert code == 0 and "4 of 4" in out and len([*(shared / "model").iterdir()]) == 2
    (other := tmp_path / "other").mkdir()
    assert cfsd("show", "b", "--home", other)[0] == 0  # which brings its manifest
    code, out, _ = cfsd("push", "b", "--home", other, "--store", second)
    assert code == 1 and "here in part only" in out and "0 of 0" in out


def test_gc_that_may_not_delete_says_so(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    script = f'mount --bind {store.home} {store.home} && mount -o remount,ro,bind {store.home} && exec "$@"'
    command = [sys.executable, "-m", "cfsd", "store", "gc", "--delete"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command], capture_output=True, text=True, cwd=ROOT
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr}")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "cannot be deleted or written" in done.stderr, (
        done.stderr
    )


def test_gc_deletes_nothing_while_a_report_cannot_be_read(cfsd: Cfsd, world: dict[str, Artifact], store: Store) -> None:
    file = store.home / "reports" / "demo-12345678" / "run_records.json"
    whole = file.read_text()
    file.write_text(whole[:40])
    code, _, err = cfsd("gc", "--delete")
    assert code == 1 and f"{file} cannot be read" in err and present(store) == set("abcd")
    assert cfsd("ls")[0] == 0 and cfsd("gc", "--even-referenced")[0] == 0
    file.write_text(whole)
    assert cfsd("gc", "--delete")[0] == 0 and present(store) == set("abc")
