"""Spec: the settings of one stage, and the digest by which its results are identified."""

import hashlib
import json
from typing import Any, ClassVar, Protocol, Self

from pydantic import BaseModel, ConfigDict, model_validator

# Added to the probe's seed: these samples share no row with the probe or with each other.
WATCHED_SEEDS, CONTROL_SEEDS = 1_000_003, 2_000_003
REPEAT = " seed="  # before the seed in the name of a repeat


def digest_of(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Spec(BaseModel):
    """Frozen settings. Two specs with equal digests give the same result.

    `version` is raised when the code behind the spec changes what it computes.
    `neutral` names, per field added after a release, the value at which the field changes nothing:
    while a field has it, it is left out of the digest, so that older artifacts stay valid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    version: ClassVar[int] = 1
    neutral: ClassVar[dict[str, Any]] = {}

    def digest(self) -> str:
        """Return 16 hex digits over the spec's class, version and settings."""
        return digest_of([type(self).__name__, self.version, self._identity()])

    @model_validator(mode="after")
    def _refuse_unread(self) -> Self:
        unread = self.unread()
        for needed in dict.fromkeys(unread.values()):
            names = sorted(n for n in unread if unread[n] == needed and getattr(self, n) != self._default(n))
            decided_by = needed.replace(":", " ").partition(" ")[0]
            if names and decided_by not in self.model_fields_set:
                raise ValueError(f"{', '.join(names)} has no effect without {needed}: give that too, or leave it out")
        return self

    def unread(self) -> dict[str, str]:
        """Return the settings that have no effect beside the others, each with what gives it one: that field first.

        Given without that field they are refused. Beside it, as where a variant turns off what its recipe turned on,
        they are taken, and count as their defaults.
        """
        return {}

    def _identity(self) -> dict[str, Any]:
        """Return what counts for the digest: nested specs by their own digest."""
        unread = self.unread()
        values = {
            name: _identified(self._default(name) if name in unread else getattr(self, name))
            for name in sorted(type(self).model_fields)
        }
        return {n: v for n, v in values.items() if n not in self.neutral or v != _identified(self.neutral[n])}

    def _default(self, name: str) -> Any:
        return type(self).model_fields[name].get_default(call_default_factory=True)


class Seeded(Protocol):
    """A spec with a seed of its own, which a recipe fills where it is left empty."""

    @property
    def seed(self) -> int | None:
        """The seed; None: not filled by a recipe."""


def seed_of(spec: Seeded, offset: int = 0) -> int:
    """Return the seed of `spec`, 0 where it is empty, plus `offset`."""
    return (spec.seed or 0) + offset


def _identified(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.digest()
    if isinstance(value, tuple | list):
        return [_identified(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value
