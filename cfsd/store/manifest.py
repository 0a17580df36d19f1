"""The manifest of an artifact: what was recorded when it was made. It is written last, so where it is, all is."""

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MANIFEST = "manifest.json"
SCHEMA = 2  # of the manifest; 1 called the metadata `facts`


class _Manifest(BaseModel):
    """What a manifest holds; one that holds anything else is damaged."""

    model_config = ConfigDict(strict=True)

    schema_: Literal[1, 2] = Field(alias="schema")
    kind: str
    key: str
    content: str
    metadata: dict[str, Any]
    files: dict[str, str]  # sha256 by name
    environment: dict[str, Any]
    seconds: float
    created: float
    sizes: dict[str, int] = {}  # bytes by name; manifests of older versions have none
    inputs: list[dict[str, str]] = []  # kind and key of the artifacts that it was made from; older ones have none


def read_manifest(folder: Path, key: str = "") -> dict[str, Any] | None:
    """Return the manifest in `folder`, None where there is none that can be used, or it is not that of `key`."""
    manifest = parsed_manifest(read_json(folder / MANIFEST))
    if manifest is None or (key and (manifest["key"], manifest["kind"]) != (key, folder.parent.name)):
        return None
    return manifest


def parsed_manifest(manifest: Any) -> dict[str, Any] | None:
    """Return `manifest` with the names that fields have now, None where it is not one."""
    if not isinstance(manifest, dict):
        return None
    if manifest.get("schema") == 1:
        manifest["metadata"] = manifest.pop("facts", None)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError:
        return None
    return manifest


def names_outside(manifest: dict[str, Any]) -> list[str]:
    """Return the names of files that would be written outside the artifact's folder, or over what it keeps there."""
    return [n for n in manifest["files"] if not n or PurePosixPath(n).is_absolute() or _is_odd(PurePosixPath(n).parts)]


def _is_odd(parts: tuple[str, ...]) -> bool:
    return not parts or ".." in parts or parts[0].startswith(".") or parts == (MANIFEST,)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, None where there is no file, or half of one."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
