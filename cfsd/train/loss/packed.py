"""Rows of different lengths in one forward pass without padding: packed, each attending to itself alone.

B rows, T tokens of the longest, N real tokens of all rows, D hidden width.
"""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cfsd.model.architecture import sees_all
from cfsd.model.decoder import decoder_of
from cfsd.model.undisturbed import mode_kept

ATTENTION = "cfsd_packed"
TRIAL = (16, 16, 7, 1)  # lengths: equal ones are computed at once


def packed_forward(model: nn.Module, token_ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Return the hidden states (N, D) of the real tokens, row by row; `prepare_packed` must have returned True."""
    lengths_B = real_BT.sum(1)
    ends = nn.functional.pad(lengths_B.cumsum(0), (1, 0)).to(torch.int32)
    positions_BT = torch.arange(real_BT.shape[1], device=real_BT.device).expand_as(real_BT)
    output: Any = model(
        input_ids=token_ids_BT[real_BT][None], position_ids=positions_BT[real_BT][None], use_cache=False,
        attention_mask=real_BT.new_ones(1, 1, 1, 1),  # not looked at, but keeps one of N x N from being made
        cu_seq_lens_q=ends,
    )  # fmt: skip
    hidden_1ND: Tensor = output.last_hidden_state
    return hidden_1ND[0]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Attend as `sdpa` does, or, where the ends of rows are passed, within each row: tensors are (1, heads, N, D)."""
    sdpa: Any = sdpa_attention_forward
    ends = named.pop("cu_seq_lens_q", None)
    if ends is None:
        whole: tuple[Tensor, None] = sdpa(module, query, key, value, attention_mask, **named)
        return whole
    attended_rows, start = [], 0
    for length, same in groupby(end - begin for begin, end in pairwise(ends.tolist())):
        rows = len(list(same))
        parts = (_rows_of(tensor, start, rows, length) for tensor in (query, key, value))
        attended, _ = sdpa(module, *parts, None, **named)  # (rows, length, heads, D)
        attended_rows.append(attended.flatten(0, 1))
        start += rows * length
    return torch.cat(attended_rows)[None], None


def _rows_of(tensor: Tensor, start: int, rows: int, length: int) -> Tensor:
    """Return `rows` rows of `length` tokens each from (1, heads, N, D) as (rows, heads, length, D)."""
    part = tensor[0, :, start : start + rows * length]
    return part.view(part.shape[0], rows, length, part.shape[2]).transpose(0, 1)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@torch.no_grad()
def prepare_packed(model: PreTrainedModel) -> bool:
    """Make `model` ready for `packed_forward`, and say whether it is; where it is not, it stays as it was.

    It is tried: the hidden states of packed rows are compared with those of padded rows. Only on CPUs: on CUDA a
    product per row would wait for its launch, and padded rows are faster.
    """
    config: Any = model.config.get_text_config()
    plain = config._attn_implementation
    if model.device.type != "cpu" or plain != "sdpa" or not sees_all(config.to_dict()):
        return False
    model.set_attn_implementation(ATTENTION)
    with torch.autocast("cpu", enabled=False):  # to see more than rounding
        agree = _agree(model)
    if agree:
        return True
    model.set_attn_implementation(plain)
    return False


def _agree(model: PreTrainedModel) -> bool:
    longest = max(TRIAL)
    real_BT = torch.arange(longest)[None] < torch.tensor(TRIAL)[:, None]
    count = model.config.get_text_config(decoder=True).vocab_size
    token_ids_BT = torch.randint(count, real_BT.shape, generator=torch.Generator().manual_seed(0)) * real_BT
    decoder = decoder_of(model)
    with mode_kept(model):
        model.eval()
        try:
            wanted: Tensor = decoder(input_ids=token_ids_BT, use_cache=False).last_hidden_state[real_BT]
            packed: Tensor = packed_forward(decoder, token_ids_BT, real_BT)
        except (AttributeError, TypeError, ValueError, RuntimeError):  # a model that takes no such arguments
            return False
    return bool(torch.allclose(packed.float(), wanted.float(), rtol=1e-3, atol=1e-3))
