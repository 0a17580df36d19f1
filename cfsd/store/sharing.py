"""Two tiers: artifacts come from the shared store when a data folder lacks them, and go there when they are complete.

Of what was found there, a folder holds the manifest, and of the files those that somebody needed: a run that is wholly
cached reads no weights. The file PARTIAL says that the others are still in the shared store.

store/.shared/<shared store>/<kind>-<key>           the realisation of here that needs no push any more
store/.shared/<shared store>/<kind>-<key>.refused   the damaged realisation of there that is not believed
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from cfsd.errors import StoreError
from cfsd.store.digests import DigestMemory, sha256_of_file
from cfsd.store.manifest import MANIFEST, read_manifest
from cfsd.store.remote import Away, Damaged, Realisation, SharedStore

PARTIAL = ".partial"
WEIGHTS = ".safetensors"
LARGE = 64 << 20  # bytes whose copying is worth a line

Say = Callable[[str], None]


class Sharing:
    """What one data folder and the shared store exchange."""

    def __init__(self, root: Path, memory: DigestMemory, remote: SharedStore) -> None:
        """Exchange between `root`, the store folder of a data folder, and `remote`; digests go to `memory`."""
        self.root, self.memory, self.remote = root, memory, remote
        self.marks = root / ".shared" / remote.name

    def has_rest(self, folder: Path) -> bool:
        """Say whether what is in `folder` is there in part, and the rest in this shared store."""
        return _text(folder / PARTIAL) == str(self.remote)

    def is_elsewhere(self, folder: Path) -> bool:
        """Say whether the rest of what is in `folder` in part is in another shared store than this one."""
        return (folder / PARTIAL).exists() and not self.has_rest(folder)

    def discover(self, kind: str, key: str) -> bool:
        """Put the manifest of what the shared store holds in place; needs no lock, as the folder appears whole.

        What is here in part from another shared store is taken as this one's, where this one has the same.
        """
        try:
            known = self.remote.realisation(kind, key)
            if known is None or known.digest == _text(self._mark(kind, key, refused=True)):
                return False
            if bad := self.remote.damage(known):
                self._refuse(known, bad)
                return False
        except Away as away:
            tell_once(away)
            return False
        folder = self.root / kind / key
        if self.is_elsewhere(folder):
            if (own := own_realisation(folder)) is None or own.digest != known.digest:
                return False
            (folder / PARTIAL).write_text(f"{self.remote}\n")
            return True
        return self._place(known, folder)

    def _place(self, known: Realisation, folder: Path) -> bool:
        draft = folder.with_name(f".{known.key}.{uuid4().hex}")
        draft.mkdir(parents=True)
        (draft / PARTIAL).write_text(f"{self.remote}\n")
        (draft / MANIFEST).write_bytes(known.text)
        self._settle(known)
        try:
            draft.rename(folder)
        except OSError:  # another process did the same
            shutil.rmtree(draft, ignore_errors=True)
        return read_manifest(folder, known.key) is not None

    def bring(self, folder: Path, *, weights: bool = True) -> None:
        """Copy into `folder` what it lacks. Call it under the key's lock.

        Raises:
            Away: the shared store does not answer.
            Damaged: it holds something else than the manifest says; it is not believed from then on.
        """
        if (known := own_realisation(folder)) is None:
            return
        lacking = [n for n in known.manifest["files"] if not (folder / n).exists()]
        wanted = [name for name in lacking if weights or not name.endswith(WEIGHTS)]
        self._announce("bringing", known, wanted)
        try:
            for name in wanted:
                self._bring_file(known, name, folder)
        except Damaged as error:
            self._refuse(known, [])
            shutil.rmtree(folder)
            raise Damaged(
                f"{error}; run the same command again: it is made here, and mends the shared store"
            ) from error
        if len(wanted) == len(lacking):
            (folder / PARTIAL).unlink(missing_ok=True)

    def _bring_file(self, known: Realisation, name: str, folder: Path) -> None:
        place = folder / name
        part = place.with_name(f".{place.name}.part")
        place.parent.mkdir(parents=True, exist_ok=True)
        self.remote.bring(known, name, part)
        if (digest := sha256_of_file(part)) != known.manifest["files"][name]:
            part.unlink()
            raise Damaged(f"{name} of {known.kind} {known.key} in the shared store {self.remote} is damaged")
        part.replace(place)
        status = place.stat()
        self.memory.remember({str(place.relative_to(self.memory.home)): [status.st_size, status.st_mtime_ns, digest]})

    def is_settled(self, folder: Path) -> bool:
        """Say whether the artifact in `folder` needs no push, without asking the shared store."""
        if (folder / PARTIAL).exists():
            return True
        known = own_realisation(folder)
        return known is None or _text(self._mark(known.kind, known.key)) == known.digest

    def push(self, folder: Path, say: Say, *, fresh: bool = False, again: bool = False) -> bool:
        """Copy a complete artifact to the shared store, and return whether it is there. Call it under the key's lock.

        The first realisation of a key in the shared store wins: another one of equal content is as good as it. One of
        another content stays here as it is, unless it is `fresh`, from which nothing was made yet: then that of the
        shared store takes its place. `again`: the copies there are damaged, and are overwritten.
        """
        if (own := own_realisation(folder)) is None:
            return False
        self._announce("pushing", own, own.manifest["files"])
        try:
            first = self._pushed(own, folder, again=again)
            if fresh and not _alike(first, own):
                if self._adopt(first, folder, say):
                    return True
                first = self._pushed(own, folder)  # it was damaged
        except Away as away:
            tell_once(away, say)
            return False
        self._settle(own)
        if _alike(first, own):
            return True
        say(
            f"{own.kind} {own.key} here is another realisation than that of the shared store {self.remote}, which came "
            "first: this data folder keeps its own, which is not pushed; what is made from it has keys of its own"
        )
        return False

    def _pushed(self, own: Realisation, folder: Path, *, again: bool = False) -> Realisation:
        refused = _text(self._mark(own.kind, own.key, refused=True))
        first = self.remote.realisation(own.kind, own.key)
        distrusted = first if first and (again or first.digest == refused or self.remote.damage(first)) else None
        first = self.remote.push(own, {n: folder / n for n in own.manifest["files"]}, replace=distrusted)
        self.believe(own.kind, own.key)
        return first

    def _adopt(self, first: Realisation, folder: Path, say: Say) -> bool:
        """Put another home's realisation in the place of a fresh one, once all of it is here."""
        taken = folder.with_name(f".{first.key}.taken")
        shutil.rmtree(taken, ignore_errors=True)
        self._place(first, taken)
        try:
            self.bring(taken)
        except Damaged:
            return False
        shutil.rmtree(folder)
        taken.rename(folder)
        say(
            f"{first.kind} {first.key} was made elsewhere at the same time, with another result: that of the shared "
            f"store {self.remote}, which came first, is used"
        )
        return True

    def forget(self, places: Iterable[tuple[str, str]]) -> None:
        """Push these again: the shared store does not hold them any more."""
        for kind, key in places:
            self._mark(kind, key).unlink(missing_ok=True)

    def believe(self, kind: str, key: str) -> None:
        """Try what was refused again: somebody may have mended it."""
        self._mark(kind, key, refused=True).unlink(missing_ok=True)

    def _refuse(self, known: Realisation, bad: list[str]) -> None:
        self._write(self._mark(known.kind, known.key, refused=True), known.digest)
        self._mark(known.kind, known.key).unlink(missing_ok=True)
        if bad:
            print(
                f"{known.kind} {known.key} in the shared store {self.remote} is damaged ({', '.join(bad)}): it is made "
                "here, and mends the shared store",
                flush=True,
            )

    def _settle(self, known: Realisation) -> None:
        self._write(self._mark(known.kind, known.key), known.digest)

    def _mark(self, kind: str, key: str, *, refused: bool = False) -> Path:
        return self.marks / f"{kind}-{key}{'.refused' if refused else ''}"

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _announce(self, what: str, known: Realisation, names: Iterable[str]) -> None:
        sizes = known.manifest.get("sizes", {})
        if (size := sum(sizes.get(name, 0) for name in names)) >= LARGE:
            print(f"{what} {known.kind} {known.key}, {size / (1 << 30):.1f} GiB: {self.remote}", flush=True)


def own_realisation(folder: Path) -> Realisation | None:
    """Return what `folder` holds; None where its manifest cannot be used."""
    if (manifest := read_manifest(folder)) is None:
        return None
    return Realisation(manifest["kind"], manifest["key"], (folder / MANIFEST).read_bytes(), manifest)


def _alike(first: Realisation, own: Realisation) -> bool:
    """Say whether two realisations of a key hold the same payload; their logs may differ."""
    return bool(first.manifest["content"] == own.manifest["content"])


def check_shared_store() -> None:
    """Find out whether runs can use the shared store of CFSD_STORE. Raises BadInput where they never could.

    One that does not answer now is said once, and done without.
    """
    if (remote := SharedStore.of_environment()) is None:
        return
    try:
        remote.check()
    except Away as away:
        tell_once(away)


def tell_once(away: StoreError, say: Say = print) -> None:
    """Say once in a process that the shared store is away, and what becomes of what is made meanwhile."""
    if (about := str(away).partition(" (")[0].partition(" did ")[0].partition(" does ")[0]) not in _told:
        _told.add(about)
        say(f"{away}: the data folder alone is used; what was not pushed is pushed by the next run, or cfsd store push")


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


_told: set[str] = set()
