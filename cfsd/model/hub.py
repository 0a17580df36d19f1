"""Models and data sets on a hub: which commit a branch or tag is, and one message for every way it fails."""

import re
from pathlib import Path
from typing import Any

from cfsd.errors import BadInput, NotHere
from cfsd.model.adapter_folder import ADAPTER_CONFIG
from cfsd.model.folder import PAYLOAD, TENSORS, UNREAD

SECONDS = 5.0  # that a hub has to answer
MAIN = "main"  # the revision where none is given
DATA = "datasets/"  # begins the names of data sets where models have theirs
_commits: dict[tuple[str, str], str] = {}  # of this process: what a branch was is not asked twice


def is_commit(revision: str) -> bool:
    """Say whether `revision` is a commit: 40 hex digits, whose content never changes."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def known_commit(name: str, revision: str) -> str | None:
    """Return the commit of `revision`, None if nobody has asked for it yet."""
    return revision if is_commit(revision) else _commits.get((name, revision))


def commit_of(name: str, revision: str) -> str:
    """Return the commit that a branch or tag is now; asked and printed once in a process.

    A data set's `name` begins with DATA. Where the hub cannot be reached, it is what the branch was when the model was
    last downloaded. Raises BadInput.
    """
    if (known := known_commit(name, revision)) is None:
        ask = _asked_for_data if name.startswith(DATA) else _asked
        known = _commits[name, revision] = ask(name, revision)
        print(f"{name}@{revision} is commit {known}")
    return known


def check_available(name: str, revision: str) -> None:
    """Raise BadInput if the model can neither be downloaded nor is in the hub's cache on this machine."""
    commit = commit_of(name, revision)
    if _cached(name, commit) is None:
        _asked(name, commit)


def check_weights_listed(name: str, revision: str) -> None:
    """Raise BadInput if the hub's list of the model's files has no safetensors."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().model_info(name, revision=commit_of(name, revision), timeout=SECONDS)
    except Exception as error:
        raise _explained(error, name, revision) from error
    files = [file.rfilename for file in found.siblings or []]
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise BadInput(
            f"hub model {name}@{revision} has no weights in *.safetensors (pickle files are never read): take a "
            "revision or a copy that has them, or convert it with save_pretrained and give the folder"
        )


def cached_folder(name: str, revision: str) -> Path | None:
    """Return where the hub's cache on this machine holds the model, None if it does not hold the whole of it."""
    folder = _cached(name, commit_of(name, revision))
    return folder if folder and (folder / "config.json").exists() and any(folder.glob("*.safetensors")) else None


def download(name: str, revision: str, *, weights: bool = True) -> Path:
    """Return the folder of a model after a download of what is lacking, `weights` false: of the small files.

    Raises BadInput.
    """
    from huggingface_hub import snapshot_download

    commit, patterns = commit_of(name, revision), _patterns(weights=weights)
    try:
        for wanted in (revision, commit):  # by the branch, so that the cache knows what it was; it may have moved since
            folder = Path(snapshot_download(name, revision=wanted, etag_timeout=SECONDS, **patterns))
            if folder.name == commit:
                break
    except Exception as error:  # of the network, of HTTP, of the disk: all end in one message
        raise _explained(error, name, revision) from error
    return folder


def _asked(name: str, revision: str) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        commit = get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=SECONDS).commit_hash
    except Exception as error:
        away = _is_away(error)
        if away and (folder := _cached(name, revision)):
            print(f"the hub cannot be reached ({away}); {name}@{revision} is what was downloaded last")
            return folder.name
        raise _explained(error, name, revision) from error
    if not commit or not is_commit(commit):
        raise BadInput(f"the hub named no commit for {name}@{revision}; give one, 40 hex digits, from the model's page")
    return str(commit)


def _asked_for_data(name: str, revision: str) -> str:
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name.removeprefix(DATA), revision=revision, timeout=SECONDS).sha
    except Exception as error:
        raise _explained(error, name, revision) from error
    return str(commit)


def _holds(name: str, revision: str, file: str) -> bool:
    """Say whether the hub has a file of the model."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=SECONDS)
    except Exception:  # the failure that is explained already is another one
        return False
    return True


def _patterns(*, weights: bool = True) -> dict[str, Any]:
    """Return which files are downloaded, and looked for in the cache: a snapshot without one of them is none."""
    return {
        "allow_patterns": [file for file in PAYLOAD if weights or file != TENSORS], "ignore_patterns": list(UNREAD)
    }  # fmt: skip


def _cached(name: str, revision: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True, **_patterns()))
    except (OSError, ValueError):
        return None


def _is_away(error: Exception) -> str:
    """Return why the hub gave no answer; empty if it did."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, HFValidationError):
        return ""
    status = _status(error) if isinstance(error, HfHubHTTPError) else 0
    return "" if 0 < status < 500 else f"{type(error).__name__}: {error}".splitlines()[0]


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _explained(error: Exception, name: str, revision: str) -> BadInput:
    """Return one message: what the hub said, and what to do."""
    from huggingface_hub import errors, get_token

    token = "the token that you gave" if get_token() else "no token was given: set HF_TOKEN, or run `hf auth login`"
    what = "data set" if name.startswith(DATA) else "hub model"
    name = name.removeprefix(DATA)
    page = f"on the page of {name}"
    if isinstance(error, errors.GatedRepoError):
        said = f"is gated: accept its terms {page} and use a token of the account that did so ({token})"
    elif isinstance(error, errors.RevisionNotFoundError):
        said = f"has no revision {revision!r}: take a branch, a tag or a commit of 40 hex digits {page}"
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        said = "has no config.json, so it is not a transformers model; take the model it was converted from"
        if _holds(name, revision, ADAPTER_CONFIG):
            said = (
                "is an adapter, not a whole model: download it, and give the folder ADAPTER as TUNED to flows.measure "
            )
            said += f"or merge it into its base: hf download {name} --revision {revision} --local-dir ADAPTER"
    elif isinstance(error, errors.RepositoryNotFoundError) or _status(error) in (401, 403):
        said = f"does not exist, or is private and the hub refused the access ({token}); check the id"
        said += f"; a folder {name!r} is not here either" if what == "hub model" else ""
    elif isinstance(error, errors.HFValidationError):
        said = f"is no name of a {what} ({error}); allowed: `org/name@revision`, or a folder that exists"
    elif isinstance(error, errors.OfflineModeIsEnabled) and what == "data set":
        said = "is not known, as the hub is not asked (HF_HUB_OFFLINE): unset it, or give a commit of 40 hex digits"
    elif isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        said = "is not in the cache of this machine, and the hub is not asked (HF_HUB_OFFLINE); unset it, or download "
        said += f"the model first: hf download {name}"
    else:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        said = f"could not be had ({why}); check the network, HF_ENDPOINT and proxies, or give a local folder"
    kind = NotHere if _is_away(error) else BadInput
    return kind(f"{what} {name}@{revision} {said}")
