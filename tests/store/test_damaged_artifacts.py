"""An artifact that somebody broke is found unusable and made again, which is said; nothing else happens."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsd.errors import StoreError
from cfsd.store.artifact import MANIFEST, Artifact, Draft, Store

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
FEW = settings(max_examples=60, deadline=None)
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # every artifact waits for the disk several times
NAMES = ["schema", "kind", "key", "content", "metadata", "files", "environment", "seconds", "created"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def write(draft: Draft) -> None:
    (draft.folder / "a.txt").write_text("first")
    (draft.folder / "b.txt").write_text("other")
    draft.metadata["length"] = 5


@contextmanager
def one_artifact() -> Iterator[tuple[Store, Artifact, Path]]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        store = Store(Path(folder))
        made, _ = store.make("thing", KEY, write)
        yield store, made, store.path(made)


def is_remade(store: Store, first: Artifact) -> list[str]:
    """Ask for the artifact as a stage does; return what was said."""
    said: list[str] = []
    try:
        store.manifest(first)
        store.verify(first)
    except StoreError as error:
        assert str(store.path(first)) in str(error)
    made, executed = store.make("thing", KEY, write, say=said.append)
    assert made == store.find("thing", KEY)
    store.verify(made)
    assert executed == any("is damaged" in line for line in said)
    if executed:
        assert made == first
    return said


def test_an_artifact_that_is_whole_is_found_in_silence() -> None:
    with one_artifact() as (store, made, _):
        assert is_remade(store, made) == []


@FEW
@given(st.dictionaries(st.sampled_from(NAMES), values, min_size=1, max_size=3), st.sets(st.sampled_from(NAMES)))
def test_fields_of_a_manifest_changed_or_dropped(changes: dict[str, Any], dropped: set[str]) -> None:
    with one_artifact() as (store, made, folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        changed = {name: value for name, value in (manifest | changes).items() if name not in dropped}
        (folder / MANIFEST).write_text(json.dumps(changed))
        is_remade(store, made)


@FEW
@given(values | st.binary(max_size=20))
def test_a_manifest_of_any_shape(value: Any) -> None:
    with one_artifact() as (store, made, folder):
        (folder / MANIFEST).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        assert "thing 0123456789abcdef is damaged (manifest.json): it is made again" in is_remade(store, made)


@FEW
@given(st.integers(min_value=0, max_value=400))
def test_a_manifest_cut_short(length: int) -> None:
    with one_artifact() as (store, made, folder):
        text = (folder / MANIFEST).read_text()
        (folder / MANIFEST).write_text(text[: min(length, len(text) - 2)])
        assert is_remade(store, made)


def _swap(folder: Path) -> None:
    (folder / "a.txt").rename(folder / "c")
    (folder / "b.txt").rename(folder / "a.txt")
    (folder / "c").rename(folder / "b.txt")


def _as_folder(folder: Path) -> None:
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()


def _as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def _of_another_key(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace(KEY, OTHER))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file missing": (lambda folder: (folder / "a.txt").unlink(), "a.txt"),
    "a file cut": (lambda folder: (folder / "a.txt").write_text("fi") and None, "a.txt"),
    "two files swapped": (_swap, "a.txt, b.txt"),
    "a folder in place of a file": (_as_folder, "a.txt"),
    "a link that leads nowhere": (lambda f: ((f / "a.txt").unlink(), (f / "a.txt").symlink_to("no"))[1], "a.txt"),
    "a manifest of another key": (_of_another_key, MANIFEST),
    "a file in place of the folder": (_as_file, MANIFEST),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_mended(name: str) -> None:
    damage, named = DAMAGE[name]
    with one_artifact() as (store, made, folder):
        damage(folder)
        assert f"is damaged ({named}): it is made again" in is_remade(store, made)[0]


@pytest.mark.parametrize("text", ['{"a": ', "[]", "null", "\udcff"])
def test_a_draft_with_a_broken_mark_starts_anew(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        draft = store.root / "thing" / f"{KEY}.draft"
        draft.mkdir(parents=True)
        (draft / "draft.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert store.make("thing", KEY, write, environment={"torch": "2"})[1]


@pytest.mark.parametrize("text", ['{"store', "[]", '{"store/thing/0123456789abcdef/a.txt": 3}', "\udcff"])
def test_a_broken_memory_of_digests_is_not_believed(text: str) -> None:
    with one_artifact() as (store, made, _):
        store.memory.file.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert is_remade(store, made) == []
