"""What is lost where weights trained in float32 are saved in 16 bits, and where the weights before that are kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from cfsd.machine import usual_precision
from cfsd.model.folder import ROUNDED_AWAY, stored_formats

EXACT = "float32"  # the folder beside rounded weights that holds them as they were trained


def exact_folder(model: Path) -> Path:
    """Return the folder of the weights before rounding: one in `model`, or `model` itself where nothing was rounded."""
    return model / EXACT if (model / EXACT).is_dir() else model


def is_rounded(base: Path) -> bool:
    """Say whether models made from `base`, which are saved in its format, lose bits of the float32 they come in."""
    number_format: torch.dtype = getattr(torch, stored_formats(base).shortest())
    return number_format.itemsize < torch.float32.itemsize


class Rounding(NamedTuple):
    """What fewer bits than float32 take back of the change of the weights since the base."""

    by: Literal["saving", "measuring"] | None = None  # None: nothing is rounded
    to: str = "float32"
    undone: float = 0.0  # share of the change, along its own direction

    def metadata(self) -> dict[str, JsonValue]:
        """Return what an artifact tells of it."""
        return {"rounding_undid": self.undone} if self.by else {}

    def note(self) -> str | None:
        """Return the line that says that much of the training was taken back, or None."""
        if self.undone <= ROUNDED_AWAY:
            return None
        why, otherwise = {
            "saving": ("the base's number format", "convert the base to float32, in which the result is then saved"),
            "measuring": ("as on CUDA", "measure with machine.device cpu, in float32"),
            None: ("", ""),
        }[self.by]
        return (
            f"{self.by} in {self.to}, {why}, takes back {self.undone:.0%} of the change of the weights, and what is "
            f"left is what the report measures: raise train.learning_rate, or {otherwise}"
        )


@torch.no_grad()
def rounding_of(
    model: nn.Module, anchor_of: Callable[[str, Tensor], Tensor], base: Path, device: str = "cpu"
) -> Rounding:
    """Return what saving `model` in the format of `base` takes back, or else measuring it on `device`.

    theta* is `anchor_of` a parameter's name and value, r rounds: undone = 1 - <r(theta) - r(theta*), theta - theta*> /
    |theta - theta*|^2, 1 where all weights fall back to the base's, 0 where rounding is noise across the change.
    """
    formats = stored_formats(base)
    by: Literal["saving", "measuring"] = "saving" if is_rounded(base) else "measuring"
    if by == "measuring" and usual_precision(device) == "float32":
        return Rounding()
    undone, moved = 0.0, 0.0
    for name, parameter in model.named_parameters():
        anchor = anchor_of(name, parameter)
        to: torch.dtype = getattr(torch, formats.of(name)) if by == "saving" else torch.bfloat16
        change = parameter - anchor
        left = parameter.to(to).to(change.dtype) - anchor.to(to)
        undone += float(((change - left) * change).sum(dtype=torch.float64))
        moved += float(change.square().sum(dtype=torch.float64))
    return Rounding(by, formats.shortest() if by == "saving" else "bfloat16", undone / moved if moved else 0.0)
