"""Targets and documents as users have them."""

from cfsd.data.replay import Replay
from cfsd.data.target import Target

__all__ = ["Replay", "Target"]
