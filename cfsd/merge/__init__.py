"""Stage merge: a model between base and tuned."""

from cfsd.merge.spec import MergeSpec

__all__ = ["MergeSpec"]
