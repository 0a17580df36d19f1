"""Stage mix: target and rehearsal rows in one table."""

from cfsd.mix.spec import MixSpec

__all__ = ["MixSpec"]
