"""Stage filter: accept or reject each row of a corpus, with a reason."""

from cfsd.filter.spec import FilterSpec

__all__ = ["FilterSpec"]
