"""Rehearsal in trainings that are not ours, and corpora in the forms that other trainers read."""

from typing import Literal

Format = Literal["trl", "axolotl", "llama-factory"]

__all__ = ["Format"]
