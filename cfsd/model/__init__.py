"""Models: which are usable, how they are loaded, what they predict."""

from cfsd.model.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
