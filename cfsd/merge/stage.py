"""Stage merge: a model between base and tuned."""

from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from cfsd.model.loading import load_model, save_model
from cfsd.model.rounding import exact_folder, rounding_of


def interpolated(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """Return (1 - alpha) x base + alpha x tuned, exactly `tuned` at 1."""
    return tuned.lerp(base, 1 - alpha)


def merge(base: Path, tuned: Path, alpha: float, folder: Path, device: str) -> dict[str, JsonValue]:
    """Write (1 - alpha) x base + alpha x tuned, from the weights before rounding, as a whole transformers folder.

    Computed in float32 on the CPU, where two models of 4 bytes a weight have room beside each other, and saved in the
    base's number format; return the metadata of that rounding, or of the one with which `device` measures.

    Source: Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903, equation 1. Tied weights stay tied.
    """
    start, end = (load_model(folder, "cpu", "float32") for folder in (base, exact_folder(tuned)))
    anchors = dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in end.named_parameters():  # a tied weight is listed once
            parameter.copy_(interpolated(anchors[name], parameter, alpha))
    rounding = rounding_of(end, lambda name, _: anchors[name], base, device)
    save_model(end, base, folder)
    return rounding.metadata() | ({"said": [line]} if (line := rounding.note()) else {})
