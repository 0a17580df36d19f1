"""A digest follows what the settings say, and nothing else."""

from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ValidationError

from cfsd.spec import Spec, digest_of


class Inner(Spec):
    depth: int = 1


class Plain(BaseModel):
    place: str = "here"


class Outer(Spec):
    rate: float = 0.1
    inner: Inner = Inner()
    many: tuple[Inner, ...] = ()
    plain: Plain = Plain()


def renamed(name: str, **namespace: Any) -> type[Spec]:
    """Return a spec class `name` with one field, as if another release had written it."""
    return type(name, (Spec,), {"__module__": __name__, "__annotations__": {"depth": int}, "depth": 1, **namespace})


def test_equal_settings_have_equal_digests_of_16_hex_digits() -> None:
    assert Outer().digest() == Outer(rate=0.1, inner=Inner(depth=1)).digest()
    assert len(bytes.fromhex(Outer().digest())) == 8


def test_every_change_of_a_setting_changes_the_digest() -> None:
    variants = [
        Outer(), Outer(rate=0.2), Outer(inner=Inner(depth=2)), Outer(many=(Inner(),)),
        Outer(many=(Inner(), Inner())), Outer(many=(Inner(depth=2), Inner())), Outer(many=(Inner(), Inner(depth=2))),
        Outer(plain=Plain(place="there")),
    ]  # fmt: skip
    assert len({spec.digest() for spec in variants}) == len(variants)


def test_class_name_and_version_are_part_of_the_digest() -> None:
    digests = {cls().digest() for cls in (renamed("A"), renamed("B"), renamed("A", version=2))}
    assert len(digests) == 3
    assert renamed("A")().digest() == renamed("A", version=1)().digest()


def test_a_version_raised_inside_reaches_the_outer_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Outer().digest()
    monkeypatch.setattr(Inner, "version", 2)
    assert Outer().digest() != before


def test_a_field_added_later_leaves_old_digests_alone_while_neutral() -> None:
    class Old(Spec):
        rate: float = 0.1

    class New(Spec):
        neutral: ClassVar[dict[str, Any]] = {"extra": 0}
        rate: float = 0.1
        extra: int = 0

    old = Old().digest()
    New.__name__ = "Old"
    assert New().digest() == old
    assert New(extra=1).digest() != old


def test_specs_are_frozen_and_refuse_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        Inner(depht=2)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        Inner().depth = 2  # type: ignore[misc]


def test_the_order_of_a_mapping_does_not_count_but_types_do() -> None:
    assert digest_of({"a": 1, "b": [2, None]}) == digest_of({"b": [2, None], "a": 1})
    values: list[Any] = [1, "1", True, None, [1], [[1]], {"1": 1}]
    assert len({digest_of(value) for value in values}) == len(values)
