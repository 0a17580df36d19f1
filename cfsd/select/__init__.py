"""Stage select: rows that stand for the bulk of a target or a corpus."""

from cfsd.select.spec import SelectSpec

__all__ = ["SelectSpec"]
