"""Attention of one new token per row on a CPU, where the heads that share keys and values read them together.

B rows, H heads, G heads of keys and values that S = H / G share, T tokens so far, D width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"  # transformers' name of torch's attention, which models take unless they were told or need otherwise


@contextmanager
def grouped_attention(device: torch.device) -> Iterator[None]:
    """Within the block models that use torch's attention use ours for single tokens, on a CPU."""
    if device.type != "cpu":
        yield
        return
    ALL_ATTENTION_FUNCTIONS[SDPA] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[SDPA]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Return what `sdpa_attention_forward` returns, B x 1 x H x D; all but single tokens that see all are left to it.

    query: B x H x 1 x D; key, value: B x G x T x D.
    """
    special = any(value is not None for name, value in named.items() if name in ("softcap", "position_bias", "cache"))
    if attention_mask is not None or query.shape[2] != 1 or special:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **named)
        return out
    rows, groups, width = query.shape[0], key.shape[1], query.shape[3]
    scale = named.get("scaling") or width**-0.5
    query_BGDS = (query.reshape(rows, groups, -1, width) * scale).transpose(2, 3)
    weights_BGST = torch.matmul(key, query_BGDS).transpose(2, 3).softmax(-1)  # long keys times few queries, as they lie
    return torch.matmul(weights_BGST, value).reshape(rows, 1, -1, value.shape[3]), None
