"""What acts on weights. A method is one file and one line in `Methods`: the fields are the registry."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, field_validator, model_validator

from cfsd.spec import Spec
from cfsd.train.methods.ewc import Ewc
from cfsd.train.methods.l2 import L2
from cfsd.train.methods.lora import Lora
from cfsd.train.methods.method import Method

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from cfsd.train.methods.anchors import Penalty


class Methods(Spec):
    """Each method's settings, off by default. Penalties add up; a method that is off is in no key."""

    l2: L2 = Field(L2(), description="L2-SP: pull towards the base's weights")
    ewc: Ewc = Field(Ewc(), description="EWC: pull towards them by how much the base's text depends on each")
    lora: Lora = Field(Lora(), description="LoRA: train small matrices beside the base's, folded in at the end")

    @field_validator("*")
    @classmethod
    def _off_is_neutral(cls, method: Method) -> Method:
        return method if method.is_on() else type(method)()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        added = [name for name, method in self.by_name().items() if method.trains_other_weights]
        held = [name for name, method in self.by_name().items() if method.holds_base_weights]
        if added and held:
            raise ValueError(
                f"methods {' and '.join(held)} with {' and '.join(added)}: {held[0]} holds the base's weights, which "
                f"{added[0]} does not train; turn one of them off, such as {held[0]}.weight=0 or {added[0]}.rank=0"
            )
        return self

    def by_name(self) -> dict[str, Method]:
        """Return the methods that are on."""
        methods = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: method for name, method in methods.items() if method.is_on()}

    def active(self) -> tuple[Method, ...]:
        """Return the methods that are on, in the order of the fields."""
        return tuple(self.by_name().values())

    def adapt(self, model: "PreTrainedModel") -> "nn.Module":
        """Return what is trained in place of `model`, which is changed."""
        adapted: nn.Module = model
        for method in self.active():
            adapted = method.adapt(adapted)
        return adapted

    def merge_adapter(self, model: "nn.Module", folder: Path) -> "PreTrainedModel":
        """Return the plain transformers model after training; `folder` is where it is going to be saved."""
        for method in reversed(self.active()):
            model = method.merge_adapter(model, folder)
        plain: Any = model
        merged: PreTrainedModel = plain
        return merged

    def penalties(self, base: Path, fisher: Path | None) -> "list[Penalty]":
        """Return what the trainer adds to each global batch's gradient; `base` and `fisher` are artifacts' folders."""
        from cfsd.train.methods.anchors import Anchors

        anchors, curvature = Anchors(base), Anchors(fisher) if fisher else None
        found = [method.penalty(anchors, curvature) for method in self.active()]
        return [penalty for penalty in found if penalty]

    def _identity(self) -> dict[str, Any]:
        return {name: method.digest() for name, method in self.by_name().items()}
