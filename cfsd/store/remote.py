"""The shared store: the artifacts of a team on object storage, or on any other place that fsspec can write to.

<url>/cfsd-store.json                             says that this is one, and of which layout
<url>/<kind>/<key>/manifest.json                  the marker: written last, so where it is, all is
<url>/<kind>/<key>/<realisation>/<files>          of the manifest with this digest, so that two homes never mix theirs
"""

import errno
import hashlib
import json
import os
import re
import stat
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

from cfsd.errors import BadEnvironment, BadInput, CfsdError, StoreError
from cfsd.machine import home, without_password
from cfsd.store.disk import FULL
from cfsd.store.manifest import MANIFEST, names_outside, parsed_manifest

STORE_VARIABLE = "CFSD_STORE"
MARK, LAYOUT = "cfsd-store.json", 1
AGAIN_SECONDS = 60.0  # until a shared store that did not answer is asked again
S3, LOCAL = ("s3", "s3a"), ("file", "local")
FLAT = (*S3, "gs", "gcs", "abfs", "abfss", "az")  # have no folders that could be made
S3_OPTIONS = {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 1}}}
EXAMPLES = "such as s3://bucket/team or file:///mnt/team/store"
GROUP_FILE = stat.S_IRGRP | stat.S_IWGRP
GROUP_FOLDER = GROUP_FILE | stat.S_IXGRP
FORBIDDEN = (PermissionError, NotImplementedError, NotADirectoryError, FileExistsError)
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError")


class Away(StoreError):
    """The shared store does not answer now."""


class Damaged(StoreError):
    """The shared store holds something else than what its manifest says."""


class Realisation(NamedTuple):
    """One artifact as one home made it."""

    kind: str
    key: str
    text: bytes  # of its manifest
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """Return what tells this realisation of the key from others."""
        return hashlib.sha256(self.text).hexdigest()[:16]

    @property
    def place(self) -> str:
        """Return the folder of its files, relative to the shared store."""
        return f"{self.kind}/{self.key}/{self.digest}"


class SharedStore:
    """What a team shares below one URL. Its methods raise Away where it does not answer."""

    def __init__(self, url: str) -> None:
        """Open the store at `url`; nothing is asked of it yet. Raises BadInput."""
        self.url = checked_url(url)
        self.name = hashlib.sha256(self.url.encode()).hexdigest()[:8]  # by which a home remembers what it holds
        self.scheme = urlsplit(self.url).scheme
        self.root = str(self._class()._strip_protocol(self.url)).rstrip("/")

    def __str__(self) -> str:
        return without_password(self.url)

    @classmethod
    def of_environment(cls) -> "SharedStore | None":
        """Return the one that CFSD_STORE names, None where it is not set or empty. Raises BadInput."""
        url = os.environ.get(STORE_VARIABLE, "").strip()
        return cls(url) if url else None

    def check(self) -> None:
        """Write its mark, which shows that a run can. Raises BadInput where it cannot, Away where it is away."""
        try:
            with self._reached():
                if self.scheme in LOCAL and not (above := Path(self.root).parent).is_dir():
                    raise FileNotFoundError(errno.ENOENT, "no such folder", str(above))
                if not self._is_marked() or self.scheme not in LOCAL:
                    self._write(MARK, json.dumps({"store": "cfsd", "layout": LAYOUT}).encode())
                elif not os.access(self.root, os.W_OK):  # the mark is the one's who came first
                    raise PermissionError(errno.EACCES, "no right to write", self.root)
        except Away as away:
            if refusal := _refusal(away.__cause__):
                _away_until.pop(self.url, None)
                raise BadEnvironment(f"the shared store {self} {refusal}") from away
            raise

    def _is_marked(self) -> bool:
        """Say whether the mark is there. Raises BadEnvironment where it is another layout's."""
        known = self._read(MARK)
        if known is not None and (not isinstance(mark := _json(known), dict) or mark.get("layout") != LAYOUT):
            raise BadEnvironment(f"the shared store {self} has another layout than {LAYOUT}; give another place")
        return known is not None

    def realisation(self, kind: str, key: str) -> Realisation | None:
        """Return the one that the store holds of the key, None if none; half a manifest is none."""
        with self._reached():
            text = self._read(f"{kind}/{key}/{MANIFEST}")
        manifest = parsed_manifest(_json(text)) if text else None
        if not text or not manifest or (manifest["kind"], manifest["key"]) != (kind, key):
            return None
        return Realisation(kind, key, text, manifest)

    def damage(self, known: Realisation) -> list[str]:
        """Return the names of files that are missing, of another size, or would lie outside the folder."""
        if outside := names_outside(known.manifest):
            return outside
        there, sizes = self.sizes(known), known.manifest.get("sizes", {})
        return [n for n in known.manifest["files"] if n not in there or there[n] != sizes.get(n, there[n])]

    def sizes(self, known: Realisation) -> dict[str, int]:
        """Return the bytes of the files that are there, by name."""
        with self._reached():
            return self._sizes(known.place)

    def bring(self, known: Realisation, name: str, to: Path) -> None:
        """Copy a file to `to`. Raises Damaged where it is gone."""
        with self._reached(writes_here=True):
            try:
                self._fs().get_file(self._path(f"{known.place}/{name}"), str(to))
            except FileNotFoundError as error:
                raise Damaged(f"the shared store {self} lacks {name} of {known.kind} {known.key}") from error

    def push(self, own: Realisation, files: Mapping[str, Path], replace: Realisation | None = None) -> Realisation:
        """Copy files, then the manifest, and return what the store holds of the key then: the first one wins.

        What an attempt that was cut short copied is not copied again. `replace`: a damaged one, to be overwritten.
        """
        if (first := self.realisation(own.kind, own.key)) and (replace is None or first.digest != replace.digest):
            return first
        with self._reached():
            there = self._sizes(own.place)
            for name, path in files.items():
                if replace or there.get(name) != path.stat().st_size:
                    self._make_folder(f"{own.place}/{name}")
                    self._fs().put_file(str(path), self._path(f"{own.place}/{name}"))
                    self._open_to_group(f"{own.place}/{name}")
        published = self._publish(own, anew=first is not None)
        if first and first.digest != own.digest:
            with self._reached():
                self._fs().rm(self._path(first.place), recursive=True)
        return published

    def _publish(self, own: Realisation, *, anew: bool) -> Realisation:
        with self._reached():
            marker = f"{own.kind}/{own.key}/{MANIFEST}"
            exists = self._read(marker) is not None  # half a manifest, where it is not to be replaced
            try:
                self._write(marker, own.text, only_new=not anew and not exists)
            except FileExistsError:
                pass  # another home was first by a moment
            except OSError as error:
                if "condition" not in str(error).lower():
                    raise
        return self.realisation(own.kind, own.key) or own

    def listed(self) -> dict[tuple[str, str], int]:
        """Return the bytes of every artifact, by kind and key."""
        with self._reached():
            found = {tuple(name.split("/")): size for name, size in self._sizes("").items()}
        total: dict[tuple[str, str], int] = defaultdict(int)
        for (kind, key, *_), size in (parts for parts in found.items() if len(parts[0]) > 2):
            total[kind, key] += size
        return {place: total[place] for place in sorted(total) if (*place, MANIFEST) in found and _is_place(*place)}

    def _read(self, name: str) -> bytes | None:
        try:
            return bytes(self._fs().cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes, *, only_new: bool = False) -> None:
        self._make_folder(name)
        self._fs().pipe_file(self._path(name), content, mode="create" if only_new else "overwrite")
        self._open_to_group(name)

    def _sizes(self, folder: str) -> dict[str, int]:
        root = self._path(folder).rstrip("/")
        try:
            found = self._fs().find(root, detail=True)
        except FileNotFoundError:
            return {}
        return {name.removeprefix(f"{root}/"): int(entry["size"]) for name, entry in found.items()}

    def _make_folder(self, name: str) -> None:
        if self.scheme not in FLAT:
            self._fs().makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    def _open_to_group(self, name: str) -> None:
        """Let a group that may write to a shared disk write to a new file and the folders above it, whatever umask."""
        root = Path(self.root)
        if self.scheme not in LOCAL or not root.stat().st_mode & stat.S_IWGRP:
            return
        file = root / name
        for path in (file, *file.parents[: len(file.relative_to(root).parts) - 1]):
            known = path.stat()
            if known.st_uid == os.geteuid():  # others' are theirs to open
                path.chmod(stat.S_IMODE(known.st_mode) | (GROUP_FOLDER if path.is_dir() else GROUP_FILE))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _class(self) -> Any:
        """Return fsspec's class for the protocol. Raises BadInput where there is none, or its package is missing."""
        try:
            return fsspec.get_filesystem_class(self.scheme)
        except ImportError as error:
            wanted = "pip install 'cfsd[s3]'" if self.scheme in S3 else "install it"
            raise BadInput(f"the shared store {self} needs a package that is not here: {wanted} ({error})") from error
        except ValueError as error:
            raise BadInput(f"the shared store {self} has an unknown protocol; give a URL {EXAMPLES}") from error

    def _fs(self) -> Any:
        """Return fsspec's file system of this process, which fsspec keeps; one of before a fork does not work."""
        options = S3_OPTIONS if self.scheme in S3 else {}
        fs, _ = fsspec.core.url_to_fs(self.url, use_listings_cache=False, **options)
        fs.retries = 2  # s3fs's own, each of which waits
        return fs

    @contextmanager
    def _reached(self, *, writes_here: bool = False) -> Iterator[None]:
        """Raise Away for whatever a place that does not answer makes of the block, and ask it again in a minute."""
        if time.monotonic() < _away_until.get(self.url, 0):
            raise Away(f"the shared store {self} did not answer a moment ago")
        try:
            yield
        except CfsdError:
            raise
        except Exception as error:
            if writes_here and isinstance(error, OSError) and error.errno in FULL:
                raise
            _away_until[self.url] = time.monotonic() + AGAIN_SECONDS
            why = without_password(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise Away(f"the shared store {self} does not answer ({type(error).__name__}: {why})") from error


_away_until: dict[str, float] = {}


def checked_url(url: str) -> str:
    """Return the URL of a shared store without slashes at its end. Raises BadInput for what cannot be one."""
    shown, parts = without_password(url), _split(url)
    if parts is None or not parts.scheme or "://" not in url:
        raise BadInput(f"the shared store {shown!r} is no URL; give --store, or CFSD_STORE, one {EXAMPLES}")
    if "@" in parts.netloc or "?" in url or "::" in url:
        raise BadInput(
            f"the shared store {shown!r} must have no user, password or query, and one protocol: credentials belong "
            "where the protocol's library looks for them, for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws"
        )
    if any(ord(letter) < 32 for letter in url):
        raise BadInput(f"the shared store {shown!r} has a character that no name may have; give a URL {EXAMPLES}")
    if parts.scheme in LOCAL:
        _check_folder(url, Path(url.partition("://")[2]))
    elif parts.scheme in ("http", "https") or not parts.netloc:
        raise BadInput(f"the shared store {shown!r} cannot be written to; give a URL {EXAMPLES}")
    return url.rstrip("/")


def _is_place(kind: str, key: str) -> bool:
    """Say whether these are names as a store gives them, which lead nowhere else."""
    return bool(re.fullmatch(r"[a-z][a-z_-]*", kind) and re.fullmatch(r"[0-9a-f]{16}", key))


def _split(url: str) -> Any:
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _check_folder(url: str, folder: Path) -> None:
    if not folder.is_absolute():
        raise BadInput(f"the shared store {url!r} is not absolute; give three slashes, as in file:///mnt/team/store")
    if folder.resolve().is_relative_to(home().resolve()):
        raise BadInput(
            f"the shared store {url!r} lies in the data folder {home()}; give a folder outside it, or leave it out"
        )


def _refusal(error: BaseException | None) -> str | None:
    """Return why a store cannot be used at all, and what to do; None where it only does not answer."""
    words = without_password(str(error).splitlines()[0]) if error and str(error) else type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"does not exist ({words}); make its bucket or folder first, or correct --store"
    if isinstance(error, FORBIDDEN) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        return f"cannot be written to ({words}); ask for the permission, or go without it: --store ''"
    if type(error).__name__ in NO_CREDENTIALS:
        return (
            f"cannot be used without credentials ({words}); for s3 set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE, or go without it: --store ''"
        )
    return None


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
