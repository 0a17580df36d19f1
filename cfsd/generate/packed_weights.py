"""Matrix products on a CPU, with weights laid out for them once and not at every step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsd.machine import room_for_a_copy


@contextmanager
def packed_weights(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """Within the block the linear layers of `model` multiply about `rows` rows at a time by packed weights.

    Only float32 on CPUs where torch has oneDNN. The packed weights are a second copy, so where memory is small only
    the output layer's are packed.
    """
    head, layers = model.get_output_embeddings(), _linear_layers(model)
    if not room_for_a_copy(sum(layer.weight.nbytes for layer in layers)):
        layers = [layer for layer in layers if layer is head]
    with ExitStack() as undo:
        for layer in layers:
            own: Any = layer
            own.forward = partial(_product, torch.ops.mkldnn._reorder_linear_weight(layer.weight, rows), layer.bias)
            undo.callback(delattr, layer, "forward")
        yield


def _product(packed: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
    return product


def _linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return []
    plain = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    return [layer for layer in plain if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]
