"""Head: the output layer of a model by itself, so that logits are made of a few hidden states at a time.

C tokens, D hidden width, V vocabulary.
"""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from cfsd.model.decoder import decoder_of
from cfsd.model.undisturbed import mode_kept

TRIAL = 16  # tokens of a row
MAX_APART = 1e-4  # total variation of the distributions that the head and the model give; 1 is the most
MAX_APART_HALF = 2e-2  # in 16 bits
log = logging.getLogger(__name__)


class Head(NamedTuple):
    """The output layer as the model uses it: logits = limit(scale x weight hidden + bias)."""

    weight_VD: Tensor | None  # None: the hidden states are the logits themselves
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def cast(self, dtype: torch.dtype) -> "Head":
        """Return the layer with its weights in `dtype`."""
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self.weight_VD, self.bias_V))
        return self._replace(weight_VD=weight, bias_V=bias)

    def product(self, hidden_CD: Tensor) -> Tensor:
        """Return logits before the soft limit, in memory of their own."""
        if self.weight_VD is None:
            return hidden_CD.clone()
        return linear(hidden_CD if self.scale == 1 else hidden_CD * self.scale, self.weight_VD, self.bias_V)

    def limited(self, logits_CV: Tensor) -> Tensor:
        """Return `logits_CV` after the soft limit, in the same memory."""
        return logits_CV if self.softcap is None else logits_CV.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """Return the logits of hidden states."""
        return self.limited(self.product(hidden_CD))


@torch.no_grad()
def head_of(model: PreTrainedModel) -> Any:
    """Return a function that gives the output layer of a model like `model`, or None where that is not one layer.

    The logits of a few tokens are compared with those of the layer.
    """
    config: Any = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))

    def head(model: PreTrainedModel) -> Head:
        layer: Any = model.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), softcap, scale)

    if isinstance(model.get_output_embeddings(), nn.Linear) and _gives_the_logits(model, head(model)):
        return head
    log.warning("%s: the output is more than one linear layer; all logits of a batch are held at once", type(model))
    return lambda model: None


def _gives_the_logits(model: PreTrainedModel, head: Head) -> bool:
    """Compare the distributions after random tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    count = model.config.get_text_config(decoder=True).vocab_size
    token_ids = torch.randint(count, (2, TRIAL), generator=generator).to(model.device)
    with mode_kept(model):
        model.eval()
        wanted: Any = model(input_ids=token_ids, use_cache=False).logits
        hidden: Any = getattr(decoder_of(model)(input_ids=token_ids, use_cache=False), "last_hidden_state", None)
    assert head.weight_VD is not None
    if hidden is None or hidden.shape[-1] != head.weight_VD.shape[1]:
        return False
    logits = head.logits(hidden)
    if logits.shape != wanted.shape:
        return False
    own, theirs = (part.to(torch.promote_types(part.dtype, torch.float32)).softmax(-1) for part in (logits, wanted))
    apart = 0.5 * (own - theirs).abs().sum(-1).max()
    halves = model.dtype.itemsize <= 2 or torch.is_autocast_enabled(model.device.type)
    return bool(apart <= (MAX_APART_HALF if halves else MAX_APART))  # not with NaN
