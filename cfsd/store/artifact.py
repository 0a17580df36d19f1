"""Artifact: a reference to a content-addressed folder. Store: where the folders are, and the cache.

store/<kind>/<key>/manifest.json + payload        complete: verified, never changed
store/<kind>/<key>.draft/                         being made; continued after a crash
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from cfsd.errors import StoreError
from cfsd.spec import Spec, digest_of
from cfsd.store.digests import DigestMemory, digest_of_files, digest_of_rows, sha256_of_file, write_json
from cfsd.store.journal import METRICS, PROGRESS, Journal
from cfsd.store.locks import held

MANIFEST = "manifest.json"
SCHEMA = 2  # of the manifest; 1 called the metadata `facts`
DRAFT = "draft.json"
ERROR = "error.json"
REQUEST = "request.json"
METADATA = "facts.json"
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
SCRATCH = {DRAFT, ERROR, REQUEST, METADATA, PROGRESS}  # removed when the artifact is complete
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
        """Open the store of the data folder `home`."""
        self.home = home.absolute()
        self.root = self.home / "store"
        self.memory = DigestMemory(self.home)

    def path(self, artifact: Artifact) -> Path:
        """Return the folder of `artifact`."""
        return self.root / artifact.kind / artifact.key

    def manifest(self, artifact: Artifact) -> dict[str, Any]:
        """Return what was recorded when `artifact` was made. Raises StoreError where that cannot be read."""
        if (manifest := _manifest(self.path(artifact))) is None:
            raise StoreError(self._remedy(artifact, [MANIFEST]))
        return manifest

    def find(self, kind: str, key: str) -> Artifact | None:
        """Return the artifact, or None if it is absent or any of its files is missing or changed."""
        folder = self.root / kind / key
        manifest = _manifest(folder, key)
        if manifest is None or self.damage(folder, manifest):
            return None
        return Artifact(kind=kind, key=key, content=manifest["content"], metadata=manifest["metadata"])

    def damage(self, folder: Path, manifest: dict[str, Any], *, full: bool = False) -> list[str]:
        """Return the names of the files that are missing or differ from the manifest.

        `full` reads every byte; otherwise files of known size and mtime are trusted.
        """
        read = sha256_of_file if full else self.memory.sha256
        files = manifest["files"].items()
        return [n for n, sha in files if not (folder / n).is_file() or read(folder / n) != sha]

    def verify(self, artifact: Artifact) -> None:
        """Read the whole artifact. Raises StoreError naming what is damaged and what to do."""
        folder = self.path(artifact)
        manifest = _manifest(folder)
        if bad := [MANIFEST] if manifest is None else self.damage(folder, manifest, full=True):
            raise StoreError(self._remedy(artifact, bad))

    def _remedy(self, artifact: Artifact, bad: list[str]) -> str:
        return (
            f"{artifact.kind} {artifact.key} is damaged ({', '.join(bad)}); "
            f"restore it, or delete the folder {self.path(artifact)} and run again"
        )

    def make(
        self,
        kind: str,
        key: str,
        work: Callable[[Draft], None],
        *,
        environment: dict[str, JsonValue] | None = None,
        say: Callable[[str], None] = print,
    ) -> tuple[Artifact, bool]:
        """Return the artifact and whether `work` was executed for it.

        `work` runs under the key's lock, in the key's draft. An exception leaves the draft, which the
        next call continues if `environment` (precision, sharding, package versions) is the same.
        """
        with self.lock(kind, key, say):
            if artifact := self.find(kind, key):
                return artifact, False
            if (self.root / kind / key).exists():
                say(f"{kind} {key} is damaged ({', '.join(self._damaged(kind, key))}): it is made again")
            waiting = self.root / kind / f"{key}.draft"
            if (done := _manifest(waiting, key)) and not self.damage(waiting, done):
                return self._put_in_place(waiting, kind, key), False
            draft = self._open_draft(kind, key, environment or {}, say)
            started = time.time()
            work(draft)
            return self._complete(draft, kind, key, environment or {}, time.time() - started), True

    def _damaged(self, kind: str, key: str) -> list[str]:
        manifest = _manifest(folder := self.root / kind / key, key)
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
        if continued and _json(mark) != environment:
            say(f"{kind} {key} was begun with other versions or settings of the machine: it starts anew")
            continued = False
        if not continued:
            _remove(folder)
            folder.mkdir(parents=True)
            write_json(mark, environment)
        return Draft(self, folder, continued=continued)

    def _complete(
        self, draft: Draft, kind: str, key: str, environment: dict[str, JsonValue], seconds: float
    ) -> Artifact:
        files = {name: path for name, path in _files(draft.folder).items() if not _is_scratch(name)}
        stamps = {name: _synced(path) for name, path in files.items()}
        digests = {name: str(stamp[2]) for name, stamp in stamps.items()}
        manifest = {
            "schema": SCHEMA, "kind": kind, "key": key, "content": _content(files, digests), "metadata": draft.metadata,
            "files": digests, "environment": environment,
            "seconds": round(seconds, 3), "created": time.time(),
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


class _Manifest(BaseModel):
    """What a manifest holds; one that holds anything else is damaged."""

    model_config = ConfigDict(strict=True)

    schema_: Literal[1, 2] = Field(alias="schema")
    kind: str
    key: str
    content: str
    metadata: dict[str, Any]
    files: dict[str, str]
    environment: dict[str, Any]
    seconds: float
    created: float


def _manifest(folder: Path, key: str = "") -> dict[str, Any] | None:
    """Return the manifest in `folder`, None where there is none that can be used, or it is not that of `key`."""
    manifest = _json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        return None
    if manifest.get("schema") == 1:
        manifest["metadata"] = manifest.pop("facts", None)
    try:
        kept = _Manifest.model_validate(manifest)
    except ValidationError:
        return None
    return None if key and (kept.key, kept.kind) != (key, folder.parent.name) else manifest


def _json(path: Path) -> Any:
    """Return the value in a JSON file, None where there is no file, or half of one."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None


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
