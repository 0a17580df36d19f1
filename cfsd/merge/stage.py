"""Stage merge: a model between base and tuned."""

from pathlib import Path

import torch
from torch import Tensor

from cfsd.model.loading import load_model, save_model


def interpolated(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) x base + alpha x tuned, exactly `tuned` at 1."""
    return tuned.lerp(base, 1 - alpha)


def merge(base: Path, tuned: Path, alpha: float, folder: Path, device: str) -> None:
    """Write (1 - alpha) x base + alpha x tuned, computed in float32, as a whole transformers folder.

    Source: Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903, equation 1. Tied weights stay tied.
    """
    start, end = load_model(base, device, "float32"), load_model(tuned, device, "float32")
    anchors = dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in end.named_parameters():  # a tied weight is listed once
            parameter.copy_(interpolated(anchors[name], parameter, alpha))
    save_model(end, base, folder)
