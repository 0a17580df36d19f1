"""Artifact: a reference to a content-addressed folder. Store: where the folders are, and the cache.

store/<kind>/<key>/manifest.json + payload        complete: verified, never changed
store/<kind>/<key>.draft/                         being made; continued after a crash

A second tier, where CFSD_STORE names one: see `cfsd.store.sharing`.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from cfsd.errors import StoreError
from cfsd.spec import Spec, digest_of
from cfsd.store.digests import DigestMemory, digest_of_files, digest_of_rows, sha256_of_file, write_json
from cfsd.store.journal import METRICS, PROGRESS, Journal
from cfsd.store.locks import held, used
from cfsd.store.manifest import MANIFEST, SCHEMA, read_json, read_manifest
from cfsd.store.remote import SharedStore
from cfsd.store.sharing import PARTIAL, Sharing

DRAFT = "draft.json"
ERROR = "error.json"
REQUEST = "request.json"
METADATA = "facts.json"
INPUTS = "inputs.json"  # what a draft is made from, until its manifest says it
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
SCRATCH = {DRAFT, ERROR, REQUEST, METADATA, INPUTS, PROGRESS}  # removed when the artifact is complete
ASIDE = {MANIFEST, METRICS, LOG, "README.md"}  # not payload: not in the content digest


class Artifact(BaseModel):
    """A name for a folder of the store; what travels between stages in place of data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    key: str
    content: str
    metadata: dict[str, JsonValue] = {}


Identified = Artifact | Spec | str | int | float | None | tuple[Spec, ...] | tuple[Artifact, ...]


def key_of(stage: str, *inputs: Identified) -> str:
    """Return the 16 hex digits by which the store knows the result of `stage` on `inputs`.

    Artifacts count by content, specs by digest; where and how fast it is made does not count.
    """
    return digest_of([stage, *(_identity(value) for value in inputs)])


def _identity(value: Identified) -> JsonValue:
    if isinstance(value, Artifact):
        return f"{value.kind}:{value.content}"
    if isinstance(value, tuple):
        return [_identity(part) for part in value]
    return value.digest() if isinstance(value, Spec) else value


@dataclass
class Draft:
    """The folder in which an artifact is made; `continued` when an earlier attempt left work in it."""

    store: "Store"
    folder: Path
    continued: bool
    metadata: dict[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the journal of the folder."""
        self.journal = Journal(self.folder)


class Store:
    """Folders by kind and key. The store is the cache: what it does not hold does not exist."""

    def __init__(self, home: Path) -> None:
        """Open the store of the data folder `home`, and the shared one of CFSD_STORE. Raises BadInput for its URL."""
        self.home = home.absolute()
        self.root = self.home / "store"
        self.memory = DigestMemory(self.home)
        remote = SharedStore.of_environment()
        self.sharing = Sharing(self.root, self.memory, remote) if remote else None

    def place(self, artifact: Artifact) -> Path:
        """Return the folder of `artifact`, which may lack files that are in the shared store."""
        return self.root / artifact.kind / artifact.key

    def whereabouts(self, artifact: Artifact) -> str:
        """Return where people find `artifact`: its folder, and how to bring what is in the shared store alone."""
        folder = self.place(artifact)
        partial = (folder / PARTIAL).exists()
        return f"{folder}{f' (in part; the rest: cfsd store pull {artifact.key})' if partial else ''}"

    def has_manifest(self, artifact: Artifact) -> bool:
        """Say whether `artifact` is known, here or in the shared store; its files may be gone or damaged."""
        folder = self._known(artifact.kind, artifact.key)
        return (folder / MANIFEST).is_file()

    def path(self, artifact: Artifact, *, weights: bool = True) -> Path:
        """Return the folder of `artifact`, after what is in the shared store alone was brought into it.

        `weights` false: its safetensors files are not needed, and may stay there.

        Raises:
            StoreError: the shared store, where the rest is, does not answer, is another one than before, or is damaged.
        """
        folder = self._known(artifact.kind, artifact.key)
        if self.sharing and self.sharing.is_elsewhere(folder):
            raise StoreError(
                f"of {artifact.kind} {artifact.key} a part is here, and the rest in another shared store than "
                f"{self.sharing.remote}; name that one, or run the recipe again"
            )
        if self.sharing and self.sharing.has_rest(folder):
            with self.lock(artifact.kind, artifact.key):
                self._check_content(artifact)
                self.sharing.bring(folder, weights=weights)
        return folder

    def _known(self, kind: str, key: str) -> Path:
        """Return the folder of an artifact, with the manifest of the shared store where it was not there."""
        folder = self.root / kind / key
        if self.sharing and (not folder.exists() or self.sharing.is_elsewhere(folder)):
            self.sharing.discover(kind, key)
        return folder

    def _check_content(self, artifact: Artifact) -> None:
        if (content := self.manifest(artifact)["content"]) != artifact.content:
            raise StoreError(
                f"{artifact.kind} {artifact.key} with content {artifact.content} is not here, and the shared store has "
                f"another realisation, {content}; run the recipe again"
            )

    def manifest(self, artifact: Artifact) -> dict[str, Any]:
        """Return what was recorded when `artifact` was made. Raises StoreError where that cannot be read."""
        folder = self._known(artifact.kind, artifact.key)
        if (manifest := read_manifest(folder)) is None:
            raise StoreError(self._remedy(artifact, [MANIFEST]))
        return manifest

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact, or None if it is absent or any of its files is missing or changed.

        Of one that only the shared store has, the manifest is brought: see `path` for the rest.
        """
        folder = self._known(kind, key)
        manifest = read_manifest(folder, key)
        if manifest is None or self.damage(folder, manifest):
            return None
        return Artifact(kind=kind, key=key, content=manifest["content"], metadata=manifest["metadata"])

    def damage(self, folder: Path, manifest: dict[str, Any], *, full: bool = False) -> list[str]:
        """Return the names of the files that are missing or differ from the manifest.

        `full` reads every byte, and lets `find` do so of damaged files; otherwise known size and mtime are trusted.
        What is still in the shared store is not missing.
        """
        files = {folder / name: sha for name, sha in manifest["files"].items()}
        if self.sharing and self.sharing.has_rest(folder):
            files = {path: sha for path, sha in files.items() if os.path.lexists(path)}
        there = [path for path in files if path.is_file()]
        read = {path: sha256_of_file(path) for path in there} if full else self.memory.sha256s(there)
        damaged = [path for path, sha in files.items() if read.get(path) != sha]
        if full:
            self.memory.forget(path for path in damaged if path in read)
        return [str(path.relative_to(folder)) for path in damaged]

    def verify(self, artifact: Artifact) -> None:
        """Read the whole artifact. Raises StoreError naming what is damaged and what to do."""
        folder = self.path(artifact)
        manifest = read_manifest(folder)
        if bad := [MANIFEST] if manifest is None else self.damage(folder, manifest, full=True):
            raise StoreError(self._remedy(artifact, bad))

    def _remedy(self, artifact: Artifact, bad: list[str]) -> str:
        return (
            f"{artifact.kind} {artifact.key} is damaged ({', '.join(bad)}); "
            f"restore it, or delete the folder {self.place(artifact)} and run again"
        )

    def make(
        self,
        kind: str,
        key: str,
        work: Callable[[Draft], None],
        *,
        environment: dict[str, JsonValue] | None = None,
        inputs: Iterable[Artifact] = (),
        say: Callable[[str], None] = print,
    ) -> tuple[Artifact, bool]:
        """Return the artifact and whether `work` was executed for it.

        `work` runs under the key's lock, in the key's draft. An exception leaves the draft, which the
        next call continues if `environment` (precision, sharding, package versions) is the same. `inputs` are what it
        is made from, and recorded. What is complete is pushed to the shared store, where there is one: there the first
        realisation of a key wins, and is returned.
        """
        with self.in_use(), self.lock(kind, key, say):
            if artifact := self.find(kind, key) or self.restored(kind, key, say):
                return self._pushed(artifact, say), False
            waiting = self.root / kind / f"{key}.draft"
            if (done := read_manifest(waiting, key)) and not self.damage(waiting, done):
                return self._pushed(self._put_in_place(waiting, kind, key), say, fresh=True), False
            draft = self._open_draft(kind, key, environment or {}, say)
            made_from = [{"kind": i.kind, "key": i.key} for i in inputs]
            write_json(draft.folder / INPUTS, made_from)
            started = time.time()
            work(draft)
            recorded = {
                "environment": environment or {}, "seconds": round(time.time() - started, 3), "inputs": made_from
            }  # fmt: skip
            return self._pushed(self._complete(draft, kind, key, recorded), say, fresh=True), True

    def restored(self, kind: str, key: str, say: Callable[[str], None]) -> Artifact | None:
        """Say that what is here is damaged, and return it from the shared store if that has it. Call it locked."""
        folder = self.root / kind / key
        if not os.path.lexists(folder):
            return None
        what = f"{kind} {key} is damaged ({', '.join(self._damaged(kind, key))})"
        if (folder / PARTIAL).exists() and not self.sharing:
            what = f"of {kind} {key} a part is in a shared store only, and CFSD_STORE is not set"
        if self.sharing:
            _remove(folder)
            if artifact := self.find(kind, key):
                say(f"{what}: it is taken from the shared store {self.sharing.remote}")
                return artifact
        say(f"{what}: it is made again")
        return None

    def share(self, artifact: Artifact, say: Callable[[str], None] = print, *, again: bool = False) -> bool:
        """Push a complete artifact to the shared store if it is not there yet, and return whether it is there now.

        `again`: what is there is damaged, and is overwritten.
        """
        folder = self.place(artifact)
        if self.sharing is None or (not again and self.sharing.is_settled(folder)):
            return self.sharing is not None
        with self.lock(artifact.kind, artifact.key, say):
            if self.find(artifact.kind, artifact.key) is None:
                say(f"{artifact.kind} {artifact.key} is damaged and is not pushed; run its recipe again")
                return False
            return self.sharing.push(folder, say, again=again)

    def _pushed(self, artifact: Artifact, say: Callable[[str], None], *, fresh: bool = False) -> Artifact:
        if self.sharing is None or self.sharing.is_settled(folder := self.place(artifact)):
            return artifact
        self.sharing.push(folder, say, fresh=fresh)
        return self.find(artifact.kind, artifact.key) or artifact

    def in_use(self) -> AbstractContextManager[bool]:
        """Keep `cfsd store gc` from deleting anything for the block."""
        return used(self.root / ".locks" / "in-use")

    def _damaged(self, kind: str, key: str) -> list[str]:
        manifest = read_manifest(folder := self.root / kind / key, key)
        return [MANIFEST] if manifest is None else self.damage(folder, manifest)

    @contextmanager
    def lock(self, kind: str, key: str, say: Callable[[str], None] = print) -> Iterator[None]:
        """Hold the kernel's lock on `key`; it is freed when the process dies."""
        path = self.root / ".locks" / f"{kind}-{key}.lock"
        with held(path, f"waiting for another process that makes {kind} {key}", say):
            yield

    def _open_draft(self, kind: str, key: str, environment: dict[str, JsonValue], say: Callable[[str], None]) -> Draft:
        folder = self.root / kind / f"{key}.draft"
        mark = folder / DRAFT
        continued = mark.exists()
        if continued and read_json(mark) != environment:
            say(f"{kind} {key} was begun with other versions or settings of the machine: it starts anew")
            continued = False
        if not continued:
            _remove(folder)
            folder.mkdir(parents=True)
            write_json(mark, environment)
        return Draft(self, folder, continued=continued)

    def _complete(self, draft: Draft, kind: str, key: str, recorded: dict[str, Any]) -> Artifact:
        files = {name: path for name, path in _files(draft.folder).items() if not _is_scratch(name)}
        stamps = {name: _synced(path) for name, path in files.items()}
        digests = {name: str(stamp[2]) for name, stamp in stamps.items()}
        manifest = {
            "schema": SCHEMA, "kind": kind, "key": key, "content": _content(files, digests), "metadata": draft.metadata,
            "files": digests, "sizes": {name: stamp[0] for name, stamp in stamps.items()}, **recorded,
            "created": time.time(),
        }  # fmt: skip
        write_json(draft.folder / MANIFEST, manifest)
        place = (self.root / kind / key).relative_to(self.home)
        self.memory.remember({str(place / name): stamp for name, stamp in stamps.items()})
        return self._put_in_place(draft.folder, kind, key)

    def _put_in_place(self, draft: Path, kind: str, key: str) -> Artifact:
        """Rename a draft that has its manifest. Until then it keeps its scratch: a kill here loses nothing."""
        for name, path in _files(draft).items():
            if _is_scratch(name):
                path.unlink()
        shutil.rmtree(draft / CHECKPOINTS, ignore_errors=True)
        folder = draft.with_name(key)
        _remove(folder)  # damaged, where there is one: `find` refused it
        draft.rename(folder)
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        artifact = self.find(kind, key)
        assert artifact, "the manifest was just written"
        return artifact


def _remove(path: Path) -> None:
    """Remove a folder, or what stands in the place of one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _is_scratch(name: str) -> bool:
    return name in SCRATCH or name.startswith((".", f"{CHECKPOINTS}/"))


def _synced(path: Path) -> list[Any]:
    """Return [size, mtime_ns, sha256] of a file that is on the disk when this returns."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, sha256_of_file(path)]


def _content(files: dict[str, Path], digests: dict[str, str]) -> str:
    payload = {name: path for name, path in files.items() if name not in ASIDE}
    parts = {name: digests[name] for name in payload if not name.endswith(".parquet")}
    tables: dict[str, list[Path]] = {}
    for name, path in payload.items():
        if name.endswith(".parquet"):  # corpus-00000.parquet, corpus-00001.parquet: one table
            tables.setdefault(name.rsplit("-", 1)[0], []).append(path)
    return digest_of_files(parts | {name: digest_of_rows(paths) for name, paths in tables.items()})[:16]
