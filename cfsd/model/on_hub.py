"""What a user may take from a hub: a model or a data set, named with a branch, tag or commit."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from cfsd.model import hub
from cfsd.spec import Spec


class OnHub(Spec):
    """A spec of one kind or another, of which `hub` names something on a hub.

    A branch or tag counts as the commit that it is when a run begins, in keys and in every record.
    """

    prefix: ClassVar[str] = ""  # of the names on the hub

    kind: str
    name: str | None = None
    revision: str | None = Field(
        None, description="hub only: a commit, branch or tag; empty: main. What counts and is recorded is the commit"
    )

    @model_serializer(mode="wrap")
    def _recorded(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write the commit in place of the branch or tag, once it is known."""
        written: dict[str, Any] = write(self)
        if self.kind == "hub" and "revision" in written:
            written["revision"] = hub.known_commit(*self.place()) or self.revision
        return written

    def check_fields(self, what: str, kinds_of: Mapping[str, tuple[str, ...]]) -> None:
        """Raise ValueError at a revision in the name, and at a field that belongs to other kinds alone.

        `kinds_of` says to which.
        """
        for name, kinds in kinds_of.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].get_default():
                meant = " or ".join(f"`kind: {kind}`" for kind in kinds)
                raise ValueError(
                    f"{name} is for a {what} of kind {' or '.join(kinds)}, and this is of kind {self.kind}; "
                    f"set {meant} if that is meant, or {name} to null"
                )
        if self.kind == "hub" and "@" in (self.name or ""):
            raise ValueError(f"the name of a {what} on a hub has no '@': give what is behind it as `revision`")

    def place(self) -> tuple[str, str]:
        """Return the name on the hub and the revision of kind hub."""
        assert self.name, "what is on a hub has a name"
        return f"{self.prefix}{self.name}", self.revision or hub.MAIN

    def commit(self) -> str:
        """Return the commit of kind hub; asked once in a process. Raises BadInput."""
        return hub.commit_of(*self.place())
