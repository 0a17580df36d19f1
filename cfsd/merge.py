"""Stage merge: a model between base and tuned."""

from pathlib import Path

from pydantic import Field

from cfsd.spec import Spec


class MergeSpec(Spec):
    """WiSE-FT: interpolate the weights after training."""

    alpha: float = Field(1.0, ge=0, le=1, description="Weight of the tuned model; 1: as trained, 0: the base")


def merge(base: Path, tuned: Path, spec: MergeSpec, folder: Path, device: str) -> None:
    """Write (1 - alpha) x base + alpha x tuned, computed in float32, as a whole transformers folder.

    Source: Wortsman et al. 2021, WiSE-FT, arXiv:2109.01903, equation 1. Tied weights stay tied.
    """
    import torch

    from cfsd.checkpoint import load_model, save_model

    start, end = load_model(base, device, "float32"), load_model(tuned, device, "float32")
    anchors = dict(start.named_parameters())
    with torch.no_grad():
        for name, parameter in end.named_parameters():  # a tied weight is listed once
            parameter.lerp_(anchors[name], 1 - spec.alpha)
    save_model(end, base, folder)
