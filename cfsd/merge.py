"""Stage merge: a model between base and tuned."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, PositiveFloat

from cfsd.spec import Spec

if TYPE_CHECKING:
    from torch import Tensor


class MergeSpec(Spec):
    """WiSE-FT: interpolate the weights after training."""

    neutral: ClassVar[dict[str, Any]] = {"budget": None}

    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the tuned model; 1: as trained, 0: the base")
    budget: PositiveFloat | None = Field(
        None,
        description="Divergence that is accepted, in nats per token: alpha is lowered until it is kept; "
        "empty: train.rehearsal.budget, if there is one",
    )


def interpolated(base: "Tensor", tuned: "Tensor", alpha: float) -> "Tensor":
    """Return (1 - alpha) x base + alpha x tuned, exactly `tuned` at 1."""
    return tuned.lerp(base, 1 - alpha)


def merge(base: Path, tuned: Path, alpha: float, folder: Path, device: str) -> None:
    """Write (1 - alpha) x base + alpha x tuned, computed in float32, as a whole transformers folder.

    Source: Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903, equation 1. Tied weights stay tied.
    """
    import torch

    from cfsd.checkpoint import load_model, save_model

    start, end = load_model(base, device, "float32"), load_model(tuned, device, "float32")
    anchors = dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in end.named_parameters():  # a tied weight is listed once
            parameter.copy_(interpolated(anchors[name], parameter, alpha))
    save_model(end, base, folder)
