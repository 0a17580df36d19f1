"""The folders that a run writes to: the data folder, and what libraries keep in HOME and in the temporary folder."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

from cfsd.errors import BadEnvironment, BadInput
from cfsd.machine import HOME_VARIABLE, expanded_user, home
from cfsd.store.disk import full_disk
from cfsd.store.locks import check_locks
from cfsd.store.remote import STORE_VARIABLE

TEMPORARY_BYTES = 32 << 20  # a temporary folder with less room is not used
ELSEWHERE = "choose another data folder with --home, or with CFSD_HOME"
CACHES = {  # what libraries write below HOME, where HOME is there but cannot be written
    "XDG_CACHE_HOME": "", "MPLCONFIGDIR": "matplotlib", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules",
    "TORCHINDUCTOR_CACHE_DIR": "torch", "TRITON_CACHE_DIR": "triton",
}  # fmt: skip


def home_from_command_line() -> None:
    """Put `--home` and `--store` into the environment, where all that is imported later finds them. Raises BadInput."""
    if (folder := _given("--home")) is not None:
        os.environ[HOME_VARIABLE] = _absolute(folder)
    if (url := _given("--store")) is not None:
        os.environ[STORE_VARIABLE] = url


def _given(option: str) -> str | None:
    """Return the last value of an option on the command line."""
    value = None
    for i, word in enumerate(sys.argv):
        if word == option and i + 1 < len(sys.argv):
            value = sys.argv[i + 1]
        elif word.startswith(f"{option}="):
            value = word.removeprefix(f"{option}=")
    return value


def _absolute(given: str) -> str:
    if not given.strip():
        raise BadInput("--home is empty; give a folder, or leave it out for $CFSD_HOME, else ./data")
    return str(expanded_user(Path(given)).absolute())


def check_data_folder() -> None:
    """Make the data folder and try what runs need of it. Raises BadEnvironment."""
    folder = home()
    if any(ord(letter) < 32 for letter in str(folder)) or not _is_text(str(folder)):
        raise BadEnvironment(
            f"the data folder's name {str(folder)!r} has characters that no list of files can hold: {ELSEWHERE}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_locks(folder)
        _try_link(folder)
    except OSError as error:
        if full := full_disk(error, folder):
            raise full from error
        what = "is not a folder" if error.errno == errno.EEXIST else f"cannot be used: {error.strerror or error}"
        raise BadEnvironment(f"the data folder {folder} {what}; {ELSEWHERE}") from error


def _try_link(folder: Path) -> None:
    link = folder / f".link-{uuid4().hex}"  # machines that share a folder may have processes of the same number
    try:
        link.symlink_to("nowhere")
    except OSError as error:
        raise BadEnvironment(
            f"the filesystem of {folder} has no symbolic links ({error.strerror}), which stand for the weights of "
            f"models outside the store; {ELSEWHERE}, on another disk"
        ) from error
    link.unlink()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def settle_user_folders() -> None:
    """Give libraries folders below the data folder in place of a HOME or a temporary folder that they cannot use."""
    user = os.environ.get("HOME", "")
    if not user or not Path(user).is_dir():
        os.environ["HOME"] = str(_made(home() / "user"))
    elif not _is_writable(Path(user)):
        cache, models = home() / "user" / "cache", Path(user) / ".cache" / "huggingface"
        if models.is_dir() and "XDG_CACHE_HOME" not in os.environ:  # what an administrator put there is read
            os.environ.setdefault("HF_HOME", str(models))
        for name, place in CACHES.items():
            os.environ.setdefault(name, str(cache / place))
    if not _has_room(_temporary_folder()):
        os.environ["TMPDIR"] = str(_made(home() / "tmp"))
        tempfile.tempdir = None


def _temporary_folder() -> Path:
    return Path(next((os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), "/tmp"))


def _has_room(folder: Path) -> bool:
    try:
        return _is_writable(folder) and shutil.disk_usage(folder).free >= TEMPORARY_BYTES
    except OSError:
        return False


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
