"""What a data folder's store holds, what refers to it, and what nothing would miss."""

import errno
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from cfsd.errors import BadEnvironment, BadInput, StoreError
from cfsd.store.artifact import CHECKPOINTS, DRAFT, INPUTS, Artifact, Store
from cfsd.store.digests import write_json
from cfsd.store.locks import used
from cfsd.store.manifest import read_json, read_manifest
from cfsd.store.sharing import PARTIAL

NAME = re.compile(r"([0-9a-f]{16})(\.draft)?")
DAY = 86400.0
IN_PART = "in part"  # the rest is in the shared store
Place = tuple[str, str]  # kind and key
REGISTERED = "registered"  # below the data folder: a file for each model that a registry elsewhere names


class Entry(NamedTuple):
    """One folder of the store: an artifact, the draft of one, or what is left of one."""

    kind: str
    key: str
    folder: Path
    manifest: dict[str, Any] | None  # None: a draft, or damaged
    size: int  # bytes on this disk; weights outside the store are links
    inputs: list[Place]  # what it was made from, unless an older version made it, and what its links lead into

    @property
    def place(self) -> Place:
        """Return kind and key."""
        return self.kind, self.key

    @property
    def is_draft(self) -> bool:
        """Say whether it is not finished."""
        return self.folder.suffix == ".draft"

    @property
    def state(self) -> str:
        """Return what it is, in a word."""
        if self.is_draft:
            return "draft"
        if self.manifest is None:
            return "damaged"
        if all((self.folder / name).is_file() for name in self.manifest["files"]):
            return "whole"
        return IN_PART if (self.folder / PARTIAL).exists() else "damaged"

    @property
    def created(self) -> float:
        """Return when it was finished, or last written to, in seconds since 1970."""
        return float(self.manifest["created"]) if self.manifest else _written(self.folder)

    @property
    def seconds(self) -> float:
        """Return how long it took to make; 0 where that is not known."""
        return float(self.manifest["seconds"]) if self.manifest else 0.0

    def artifact(self) -> Artifact:
        """Return its name. Raises StoreError for what is not one."""
        if self.manifest is None or self.is_draft:
            raise StoreError(f"{self.kind} {self.key} is {'not finished' if self.is_draft else 'damaged'}")
        kept = {name: self.manifest[name] for name in ("kind", "key", "content", "metadata")}
        return Artifact(**kept)


def entries(store: Store) -> list[Entry]:
    """Return everything in the store, by kind and time."""
    kinds = {kind.resolve(): kind.name for kind in store.root.glob("*") if kind.is_dir()}  # one may lie on another disk
    found = [entry for folder in store.root.glob("*/*") if (entry := _entry(folder, kinds))]
    return sorted(found, key=lambda entry: (entry.kind, entry.created, entry.key))


def _entry(folder: Path, kinds: Mapping[Path, str]) -> Entry | None:
    if folder.parent.name.startswith(".") or not (named := NAME.fullmatch(folder.name)):
        return None
    manifest = None if named[2] else read_manifest(folder, named[1])
    files = list(folder.rglob("*")) if folder.is_dir() else [folder]
    said = manifest.get("inputs", []) if manifest else read_json(folder / INPUTS) or []
    inputs = {(i["kind"], i["key"]) for i in said} | {
        place for file in files for place in _led_into(file, folder, kinds)
    }
    return Entry(folder.parent.name, named[1], folder, manifest, sum(map(_size, files)), sorted(inputs))


def _led_into(file: Path, folder: Path, kinds: Mapping[Path, str]) -> Iterator[Place]:
    """Yield the other artifact of this store that a link in `folder` leads into, if it is one and does.

    `kinds` are the folders of the store, where they really lie. A link to nowhere counts by its names: its store moved.
    """
    if not file.is_symlink():
        return
    target = Path(os.path.realpath(file))
    for above in target.parents:
        kind = kinds.get(above.parent, "" if target.exists() else above.parent.name)
        if kind in kinds.values() and NAME.fullmatch(above.name):
            yield from [(kind, above.name)] if (kind, above.name) != (folder.parent.name, folder.name) else []
            return


def _size(file: Path) -> int:
    try:
        return 0 if file.is_dir() and not file.is_symlink() else file.lstat().st_size
    except OSError:  # a living draft's files come and go
        return 0


def _written(folder: Path) -> float:
    times = [file.lstat().st_mtime for file in (folder, folder / DRAFT, folder / CHECKPOINTS) if file.exists()]
    return max(times, default=0.0)


def references(home: Path, *, whole: bool = False) -> dict[Place, list[str]]:
    """Return the reports and registered models of `home` that refer to each artifact, by kind and key.

    `whole`: one that cannot be read raises StoreError, and is not left out.
    """
    found: dict[Place, list[str]] = defaultdict(list)
    reports = home / "reports"
    for file in [*sorted(reports.glob("*/**/*.json")), *sorted((home / REGISTERED).glob("*.json"))]:
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            if whole:
                raise StoreError(
                    f"{file} cannot be read ({error}), so nothing says what it refers to: nothing was "
                    "deleted; restore the file, or delete its report"
                ) from error
            continue
        name = file.relative_to(reports).parts[0] if file.is_relative_to(reports) else content[REGISTERED]
        for place in sorted(set(_named_in(content))):
            if name not in found[place]:
                found[place].append(name)
    return dict(found)


def keep_registered(home: Path, artifact: Artifact, name: str) -> None:
    """Note that a registry elsewhere names `artifact`, so that nobody deletes it here; `name` is what it is there."""
    (home / REGISTERED).mkdir(parents=True, exist_ok=True)
    write_json(
        home / REGISTERED / f"{artifact.key}.json", {REGISTERED: name, "model": artifact.model_dump(mode="json")}
    )


def _named_in(content: Any) -> Iterator[Place]:
    """Yield the artifacts in JSON: mappings with a kind, a key and a content, wherever they stand."""
    if isinstance(content, dict):
        kind, key = content.get("kind"), content.get("key")
        if "content" in content and isinstance(kind, str) and isinstance(key, str):
            yield kind, key
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for value in inner:
        yield from _named_in(value)


def named(known: Iterable[Place], asked: str) -> Place:
    """Return the one of `known` that `asked` names: a key or its beginning, behind `kind/` or not. Raises BadInput."""
    kind, _, start = asked.rpartition("/")
    fits = sorted({p for p in known if p[1].startswith(start.removesuffix(".draft")) and kind in ("", p[0])})
    exact = [place for place in fits if place[1] == start]
    if len(found := exact or fits) == 1 and start:
        return found[0]
    if not fits:
        raise BadInput(f"nothing in the store is named {asked!r}; cfsd store ls lists what there is")
    some = ", ".join("/".join(place) for place in found[:5])
    raise BadInput(
        f"{asked!r} names {len(found)} artifacts ({some}{', …' if len(found) > 5 else ''}); write more of it"
    )


class Doomed(NamedTuple):
    """What may be deleted, and what refers to it."""

    entry: Entry
    breaks: list[str]  # reports and artifacts that stay and refer to it


class Limits(NamedTuple):
    """What may be deleted at all."""

    older_than: float = 0.0  # days
    larger_than: float = 0.0  # bytes
    even_referenced: bool = False


def collectable(store: Store, limits: Limits) -> list[Doomed]:
    """Return what no report and no registered model needs, directly or for what was made from it, within `limits`.

    What stays for another reason, such as its age, keeps what it was made from. Drafts that a process works on stay.
    """
    known, reports = entries(store), references(store.home, whole=not limits.even_referenced)
    able = [e for e in known if _within(e, limits) and not (e.is_draft and _is_locked(store, e))]
    if not limits.even_referenced:
        able = [entry for entry in able if entry.is_draft or entry.place not in reports]
    chosen = {entry.folder for entry in able}
    stay = [entry for entry in known if entry.folder not in chosen]
    users: dict[Place, list[str]] = defaultdict(list)
    if limits.even_referenced:
        for entry in stay:
            for place in entry.inputs:
                users[place].append(f"{entry.kind} {entry.key}")
        return [Doomed(e, [] if e.is_draft else [*reports.get(e.place, []), *users[e.place]]) for e in able]
    needed = _made_from(stay, known)
    return [Doomed(entry, []) for entry in able if entry.is_draft or entry.place not in needed]


def _within(entry: Entry, limits: Limits) -> bool:
    return time.time() - entry.created >= limits.older_than * DAY and entry.size >= limits.larger_than


def _made_from(stay: Iterable[Entry], known: Iterable[Entry]) -> set[Place]:
    """Return what `stay` was made from, all the way back."""
    by_place = {entry.place: entry for entry in known if not entry.is_draft}
    needed: set[Place] = set()
    waiting = [place for entry in stay for place in entry.inputs]
    while waiting:
        if (place := waiting.pop()) not in needed:
            needed.add(place)
            waiting += by_place[place].inputs if place in by_place else []
    return needed


def _lock(store: Store, entry: Entry) -> FileLock:
    return FileLock(store.root / ".locks" / f"{entry.kind}-{entry.key}.lock")


def _is_locked(store: Store, entry: Entry) -> bool:
    try:
        with _lock(store, entry).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # a data folder that cannot be written to
        return False


def delete(store: Store, limits: Limits) -> list[Doomed]:
    """Delete what is collectable, and return it.

    Raises:
        StoreError: while a run uses the data folder.
        BadEnvironment: where the data folder cannot be written.
    """
    try:
        return _delete(store, limits)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise BadEnvironment(
            f"{error.filename} cannot be deleted or written ({error.strerror}); give the command as the user who owns "
            "it, where it can be written"
        ) from error


def _delete(store: Store, limits: Limits) -> list[Doomed]:
    with used(store.root / ".locks" / "in-use", alone=True) as alone:
        if not alone:
            raise StoreError(
                f"a run uses the data folder {store.home}, and nothing says yet what it needs: nothing was deleted; "
                "give the same command when it has ended"
            )
        gone = [doomed for doomed in collectable(store, limits) if _deleted(store, doomed.entry)]
        for folder in store.root.glob("*/.*"):  # what a killed process left of a deletion or of something brought
            if not folder.parent.name.startswith(".") and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)
        store.memory.forget_gone()
        return gone


def _deleted(store: Store, entry: Entry) -> bool:
    try:
        with _lock(store, entry).acquire(timeout=0):
            gone = entry.folder.with_name(f".{entry.folder.name}.deleted")
            shutil.rmtree(gone, ignore_errors=True)  # of one that was killed
            entry.folder.rename(gone)  # at once, so that nobody finds half of it
            if gone.is_dir():
                shutil.rmtree(gone)
            else:
                gone.unlink()
            return True
    except Timeout:
        return False
