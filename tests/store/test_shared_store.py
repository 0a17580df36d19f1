"""Two data folders and one shared store: nothing is made twice, nothing damaged is believed, nothing is lost."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from cfsd.errors import BadInput, StoreError
from cfsd.machine import without_password
from cfsd.store import remote
from cfsd.store.artifact import Artifact, Draft, Store, key_of
from cfsd.store.remote import Away, SharedStore
from cfsd.store.sharing import check_shared_store
from tests.store.conftest import SECRET, S3Server, reach

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
SPAWN = multiprocessing.get_context("spawn")


def write(text: str = "row", log: str = "log") -> Callable[[Draft], None]:
    def work(draft: Draft) -> None:
        (draft.folder / "part").mkdir(exist_ok=True)
        (draft.folder / "part" / "ä b.txt").write_text(text)
        (draft.folder / "model.safetensors").write_text("weights")
        (draft.folder / "log.txt").write_text(log)
        draft.metadata["length"] = len(text)

    return work


def never(_: Draft) -> None:
    raise AssertionError("is made a second time")


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty shared store, with a name that hurts, on a disk and on object storage."""
    if request.param == "file":
        (tmp_path / "the team ü").mkdir()
        url = f"file://{tmp_path}/the team ü/store/"
    else:
        request.getfixturevalue("s3").files().mkdir(bucket := f"team-{time.monotonic_ns()}")
        url = f"s3://{bucket}/a prefix/ü#1/"
    monkeypatch.setenv("CFSD_STORE", url)
    return url


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shared store in a folder."""
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/shared")
    return tmp_path / "shared"


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, Store]:
    """The stores of two people. Ask for the shared one before."""
    return Store(tmp_path / "one"), Store(tmp_path / "two")


def there(store: Store, artifact: Artifact) -> set[str]:
    """Return the files of an artifact that are in its data folder."""
    folder = store.place(artifact)
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"manifest.json", ".partial"}


WHOLE = {"part/ä b.txt", "model.safetensors", "log.txt"}


def test_what_one_made_the_other_finds_and_files_come_when_they_are_read(url: str, two: tuple[Store, Store]) -> None:
    one, other = two
    check_shared_store()
    made, _ = one.make("thing", KEY, write())
    assert other.find("thing", OTHER) is None
    found = other.find("thing", KEY)
    assert found == made and other.make("thing", KEY, never) == (made, False)
    assert there(other, made) == set()
    assert other.manifest(made) == one.manifest(made)
    assert there(other, made) == set()
    assert (other.path(made, weights=False) / "part" / "ä b.txt").read_text() == "row"
    assert there(other, made) == {"part/ä b.txt", "log.txt"} and "cfsd store pull" in other.whereabouts(made)
    assert (other.path(made) / "model.safetensors").read_text() == "weights"
    assert there(other, made) == WHOLE and other.whereabouts(made) == str(other.place(made))
    other.verify(made)
    assert other.find("thing", KEY) == made


def test_a_second_data_folder_verifies_what_it_does_not_hold_yet(on_disk: Path, two: tuple[Store, Store]) -> None:
    made, _ = two[0].make("thing", KEY, write())
    two[1].verify(made)
    assert there(two[1], made) == WHOLE


def test_an_artifact_from_before_there_was_a_shared_store_is_pushed_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = Store(tmp_path / "one").make("thing", KEY, write())
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/shared")
    assert Store(tmp_path / "two").find("thing", KEY) is None
    Store(tmp_path / "one").make("thing", KEY, never)
    assert Store(tmp_path / "two").find("thing", KEY) == made


def test_without_the_shared_store_a_part_is_made_again_and_that_is_said(
    on_disk: Path, two: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    two[0].make("thing", KEY, write())
    assert two[1].find("thing", KEY)
    monkeypatch.setenv("CFSD_STORE", "")
    alone, said = Store(two[1].home), list[str]()
    assert alone.find("thing", KEY) is None
    assert alone.make("thing", KEY, write(), say=said.append)[1]
    assert said == [f"of thing {KEY} a part is in a shared store only, and CFSD_STORE is not set: it is made again"]


def test_a_part_from_another_shared_store_comes_from_this_one_or_is_made_again(
    on_disk: Path, two: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counted as whole, so that each run ended at the first of them, after it was deleted."""
    for key in (KEY, OTHER):
        two[0].make("thing", key, write(key))
        assert two[1].find("thing", key)
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/moved")
    Store(tmp_path / "three").make("thing", KEY, write(KEY))
    moved = Store(two[1].home)
    with pytest.raises(StoreError, match=r"a part is here, and the rest in another shared store than file://.*/moved"):
        moved.path(two[0].make("thing", OTHER, never)[0])
    assert moved.find("thing", OTHER) is None
    remade, executed = moved.make("thing", OTHER, write(OTHER))
    assert executed and there(moved, remade) == WHOLE
    made, executed = moved.make("thing", KEY, write(KEY))
    assert (moved.path(made) / "part" / "ä b.txt").read_text() == KEY and there(moved, made) == WHOLE
    moved.verify(made)


def test_a_part_from_a_shared_store_that_moved_is_not_made_again(
    on_disk: Path, two: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two[0].make("thing", KEY, write())
    assert two[1].find("thing", KEY)
    on_disk.rename(tmp_path / "moved")
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/moved")
    moved = Store(two[1].home)
    made, executed = moved.make("thing", KEY, never)
    assert not executed and (moved.path(made) / "model.safetensors").read_text() == "weights"


def test_what_is_damaged_here_comes_from_the_shared_store(on_disk: Path, two: tuple[Store, Store]) -> None:
    one, said = two[0], list[str]()
    made, _ = one.make("thing", KEY, write())
    (one.path(made) / "log.txt").unlink()
    assert one.make("thing", KEY, never, say=said.append) == (made, False)
    assert said == [f"thing {KEY} is damaged (log.txt): it is taken from the shared store {on_disk.as_uri()}"]
    one.verify(made)


def payload(shared: Path, name: str) -> Path:
    (file,) = shared.glob(f"thing/{KEY}/*/{name}")
    return file


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damage_that_shows_is_refused_and_the_next_one_mends_it(
    on_disk: Path, two: tuple[Store, Store], capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    one, other = two
    made, _ = one.make("thing", KEY, write())
    file = payload(on_disk, "model.safetensors")
    file.write_text("wei") if damage == "cut" else file.unlink()
    again, executed = other.make("thing", KEY, write())
    assert executed and again == made
    assert (
        f"thing {KEY} in the shared store {on_disk.as_uri()} is damaged (model.safetensors)" in capsys.readouterr().out
    )
    third = Store(on_disk.parent / "three")
    third.verify(third.make("thing", KEY, never)[0])
    assert len(list(on_disk.glob(f"thing/{KEY}/*/log.txt"))) == 1  # what was damaged is gone


def test_a_changed_byte_is_refused_when_it_is_read_and_mended_by_the_next_run(
    on_disk: Path, two: tuple[Store, Store]
) -> None:
    one, other = two
    made, _ = one.make("thing", KEY, write())
    payload(on_disk, "model.safetensors").write_text("Weights")
    found = other.find("thing", KEY)
    assert found == made
    with pytest.raises(StoreError, match=r"model\.safetensors of thing .* is damaged; run the same command again"):
        other.path(found)
    assert other.find("thing", KEY) is None and not other.place(made).exists()
    assert other.make("thing", KEY, write()) == (made, True)
    third = Store(on_disk.parent / "three")
    third.verify(third.make("thing", KEY, never)[0])


def test_the_home_that_has_it_whole_mends_it_on_demand(on_disk: Path, two: tuple[Store, Store]) -> None:
    one, other = two
    made, _ = one.make("thing", KEY, write())
    payload(on_disk, "model.safetensors").write_text("Weights")
    assert one.share(made, again=True)
    other.verify(made)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "thing"}', "\udcff"])
def test_half_a_manifest_is_none_and_is_replaced(on_disk: Path, two: tuple[Store, Store], text: str) -> None:
    one, other = two
    marker = on_disk / "thing" / KEY / "manifest.json"
    marker.parent.mkdir(parents=True)
    marker.write_bytes(text.encode("utf-8", "surrogateescape"))
    made, executed = one.make("thing", KEY, write())
    assert executed and other.make("thing", KEY, never) == (made, False)


@pytest.mark.parametrize("name", ["../../../escaped", "/tmp/escaped", "a/../../escaped", ".partial", "manifest.json"])
def test_a_manifest_cannot_write_elsewhere(
    on_disk: Path, two: tuple[Store, Store], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    two[0].make("thing", KEY, write())
    marker = on_disk / "thing" / KEY / "manifest.json"
    manifest = json.loads(marker.read_text())
    manifest["files"][name] = manifest["files"]["log.txt"]
    marker.write_text(json.dumps(manifest))
    assert two[1].find("thing", KEY) is None
    assert f"is damaged ({name})" in capsys.readouterr().out


def test_names_in_a_listing_lead_nowhere_else(on_disk: Path, two: tuple[Store, Store]) -> None:
    made, _ = two[0].make("thing", KEY, write())
    marker = on_disk / "thing" / KEY / "manifest.json"
    for odd in ("thing/short", f"thing/{KEY}.draft", f"a.b/{KEY}", f"-/{KEY}"):
        (on_disk / odd).mkdir(parents=True)
        (on_disk / odd / "manifest.json").write_bytes(marker.read_bytes())
    remote_ = SharedStore.of_environment()
    assert remote_ and list(remote_.listed()) == [(made.kind, made.key)]


def test_of_two_that_make_one_key_at_once_the_first_wins(url: str, two: tuple[Store, Store]) -> None:
    one, other = two
    said: list[str] = []

    def meanwhile(draft: Draft) -> None:
        one.make("thing", KEY, write("first"))
        write("second")(draft)

    mine, executed = other.make("thing", KEY, meanwhile, say=said.append)
    first = one.find("thing", KEY)
    assert executed and mine == first and (other.path(mine) / "part" / "ä b.txt").read_text() == "first"
    assert len(said) == 1 and "made elsewhere at the same time" in said[0]
    other.verify(mine)


def test_a_damaged_first_one_gives_way(on_disk: Path, two: tuple[Store, Store]) -> None:
    one, other = two
    said: list[str] = []

    def meanwhile(draft: Draft) -> None:
        one.make("thing", KEY, write("first"))
        payload(on_disk, "part/*.txt").write_text("FIRST")
        write("second")(draft)

    mine, _ = other.make("thing", KEY, meanwhile, say=said.append)
    assert (other.path(mine) / "part" / "ä b.txt").read_text() == "second" and not said
    Store(on_disk.parent / "three").verify(mine)


def test_equal_content_with_another_log_is_as_good(on_disk: Path, two: tuple[Store, Store]) -> None:
    one, other = two
    said: list[str] = []

    def meanwhile(draft: Draft) -> None:
        one.make("thing", KEY, write(log="first"))
        write(log="second")(draft)

    mine, _ = other.make("thing", KEY, meanwhile, say=said.append)
    assert (other.path(mine) / "log.txt").read_text() == "second" and not said
    assert payload(on_disk, "log.txt").read_text() == "first"


def test_one_that_was_made_apart_stays_and_its_descendants_have_other_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Store(tmp_path / name).make("thing", KEY, write(name))[0] for name in ("one", "two"))
    monkeypatch.setenv("CFSD_STORE", f"file://{tmp_path}/shared")
    here, there_ = Store(tmp_path / "one"), Store(tmp_path / "two")
    said: list[str] = []
    here.make("thing", KEY, never)
    assert there_.make("thing", KEY, never, say=said.append) == (other, False)
    assert len(said) == 1 and "another realisation" in said[0]
    there_.make("thing", KEY, never, say=said.append)
    assert len(said) == 1  # and is not said, nor asked, again
    assert key_of("next", one) != key_of("next", other)
    third = Store(tmp_path / "three")
    assert third.find("thing", KEY) == one
    with pytest.raises(StoreError, match="another realisation"):
        third.path(other)  # as of a report of the second


def test_a_shared_store_that_is_away_is_said_once_and_served_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = S3Server()
    reach(server, monkeypatch)
    monkeypatch.setenv("CFSD_STORE", "s3://team/x")
    check_shared_store()
    one = Store(tmp_path / "one")
    started = time.monotonic()
    made, executed = one.make("thing", KEY, write())
    one.make("thing", OTHER, write("more"))
    assert executed and time.monotonic() - started < 5
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "the shared store s3://team/x does not answer" in out and SECRET not in out
    server.start()
    try:
        server.files().mkdir("team")
        remote._away_until.clear()  # a minute later
        assert one.make("thing", KEY, never) == (made, False)  # as a stage of the next run
        other = Store(tmp_path / "two")
        assert other.find("thing", KEY) == made and other.find("thing", OTHER) is None
        server.kill()
        remote._away_until.clear()
        with pytest.raises(Away, match="does not answer"):
            other.path(made)
        assert other.find("thing", KEY) == made  # its manifest is here: a cached run needs no server
        assert "place" not in without_password(str(other.whereabouts(made))).split("/")[-1]
    finally:
        server.kill()


FILES = 60


def large(draft: Draft) -> None:
    for i in range(FILES):
        (draft.folder / f"{i:02}.bin").write_bytes(os.urandom(1 << 10))


def half_way(act: Callable[[], None]) -> Callable[..., Any]:
    """Return a method for S3FileSystem that acts before the middle one of the files is copied.

    Watching the server from outside was a race: on a busy machine all of them were there before the watcher acted.
    """
    copy, copied = S3FileSystem._put_file, count()

    async def counted(self: S3FileSystem, *arguments: Any, **options: Any) -> Any:
        if next(copied) == FILES // 2:
            act()
        return await copy(self, *arguments, **options)

    return counted


def _make_large_and_die(home: Path) -> None:
    S3FileSystem._put_file = half_way(lambda: os.kill(os.getpid(), signal.SIGKILL))
    Store(home).make("thing", KEY, large)


def test_a_push_that_is_killed_shows_nothing_and_the_next_run_ends_it(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.files().mkdir("killed")
    monkeypatch.setenv("CFSD_STORE", "s3://killed/x")
    process = SPAWN.Process(target=_make_large_and_die, args=(tmp_path / "one",))
    process.start()
    process.join()
    pushed = s3.files().find("killed")
    assert process.exitcode == -signal.SIGKILL and sum(name.endswith(".bin") for name in pushed) == FILES // 2
    assert not any(name.endswith("manifest.json") for name in pushed)
    one, other = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert other.find("thing", KEY) is None
    made, executed = one.make("thing", KEY, never)
    assert not executed
    other.verify(made)


def test_a_server_killed_in_the_middle_of_a_push_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = S3Server().start()
    try:
        reach(server, monkeypatch)
        server.files().mkdir("team")
        monkeypatch.setenv("CFSD_STORE", "s3://team/x")
        monkeypatch.setattr(S3FileSystem, "_put_file", half_way(server.kill))
        S3FileSystem.clear_instance_cache()
        one = Store(tmp_path / "one")
        made, executed = one.make("thing", KEY, large)
        assert executed and "what was not pushed is pushed by the next run" in capsys.readouterr().out
        one.verify(made)
        server.start().files().mkdir("team")
        remote._away_until.clear()
        assert one.share(made)
        Store(tmp_path / "two").verify(made)
    finally:
        server.kill()


def refused(url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CFSD_STORE", url)
    with pytest.raises(BadInput) as error:
        check_shared_store()
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


REFUSED = {
    "foo://bucket/x": "unknown protocol",
    "gs://bucket/x": "needs a package that is not here",
    "/mnt/team": "is no URL",
    "team": "is no URL",
    "s3:/team": "is no URL",
    "s3://": "cannot be written to",
    "https://example.org/x": "cannot be written to",
    f"s3://me:{SECRET}@team/x": "no user, password or query",
    f"s3://team/x?key={SECRET}": "no user, password or query",
    "simplecache::s3://team/x": "one protocol",
    "file://mnt/team": "give three slashes",
    "s3://team/a\nb": "a character that no name may have",
    "s3://[team/x": "is no URL",
}


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_cannot_be_one_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REFUSED[url] in refused(url, monkeypatch)


def test_a_place_that_is_not_there_is_refused(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in refused("s3://no-such-bucket/x", monkeypatch)
    assert "does not exist" in refused(f"file://{tmp_path}/unmounted/store", monkeypatch)
    (tmp_path / "file").write_text("")
    assert "cannot be" in refused(f"file://{tmp_path}/file", monkeypatch)
    monkeypatch.setenv("CFSD_HOME", str(tmp_path / "data"))
    for inside in ("data", "data/", "data/store", "data/../data"):
        assert "lies in the data folder" in refused(f"file://{tmp_path}/{inside}", monkeypatch)
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "cfsd-store.json").write_text('{"store": "cfsd", "layout": 2}')
    assert "another layout than 1" in refused(f"file://{tmp_path}/team", monkeypatch)


def test_another_layout_is_refused_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    mark = tmp_path / "shared" / "cfsd-store.json"
    mark.write_text(text := '{"store": "cfsd", "layout": 2}')
    for _ in range(2):
        with pytest.raises(BadInput, match="has another layout than 1"):
            SharedStore(f"file://{tmp_path}/shared").check()
        assert mark.read_text() == text


def test_a_folder_of_a_group_serves_all_of_it(on_disk: Path, two: tuple[Store, Store]) -> None:
    """What one user made there the others may write beside, whatever the umask; the first one's mark stays."""
    on_disk.mkdir()
    on_disk.chmod(0o2775)
    before = os.umask(0o022)
    try:
        check_shared_store()
        made, _ = two[0].make("thing", KEY, write())
        mark = (on_disk / "cfsd-store.json").stat().st_mtime_ns
        check_shared_store()
    finally:
        os.umask(before)
    assert (on_disk / "cfsd-store.json").stat().st_mtime_ns == mark
    for path in on_disk.rglob("*"):
        assert path.stat().st_mode & 0o060 == 0o060, path
    assert two[1].find("thing", KEY) == made


def test_without_credentials_it_is_refused(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "cannot be used without credentials" in refused("s3://somewhere/x", monkeypatch)


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_variable_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFSD_STORE", value)
    assert SharedStore.of_environment() is None


def test_slashes_at_the_end_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SharedStore("s3://team/x//").name == SharedStore("s3://team/x").name


def test_credentials_are_nowhere_in_what_is_kept(url: str, two: tuple[Store, Store]) -> None:
    made, _ = two[0].make("thing", KEY, write())
    two[1].verify(made)
    kept: list[Any] = [p for store in two for p in store.home.rglob("*") if p.is_file()]
    assert kept and not [path for path in kept if SECRET.encode() in path.read_bytes()]
