"""The part of a model that gives hidden states, without the output layer."""

from torch import nn
from transformers import PreTrainedModel


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return what gives the hidden states before the output layer; where there is no such part, the model itself.

    `base_model` is found by a name, which some classes give wrongly (Llama 4's text model).
    """
    inner: nn.Module = model.base_model
    if inner is not model:
        return inner
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
