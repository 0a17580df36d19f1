"""Method: settings of one way to hold a model near its base, with up to three hooks into the training."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cfsd.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from cfsd.train.methods.anchors import Anchors, Penalty


class Method(Spec):
    """Every hook does nothing unless a method overrides it; state lives in what a hook returns."""

    holds_base_weights: ClassVar[bool] = False  # its penalty pulls the base's own parameters back
    trains_other_weights: ClassVar[bool] = False  # it freezes the base's parameters and trains ones it adds

    def is_on(self) -> bool:
        """Say whether the settings ask for anything."""
        raise NotImplementedError

    def adapt(self, model: "nn.Module") -> "nn.Module":
        """Return what is trained in place of `model`; the same function at the start."""
        return model

    def merge_adapter(self, model: "nn.Module", folder: Path) -> "nn.Module":
        """Return the plain transformers model that computes what `model` does; keep what else is worth it in `folder`.

        The counterpart of `adapt`, after training.
        """
        return model

    def penalty(self, anchors: "Anchors", fisher: "Anchors | None") -> "Penalty | None":
        """Return what is added to the gradient of every global batch."""
        return None
