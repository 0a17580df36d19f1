"""Proof by forward passes that a model is causal: no later token changes an earlier prediction.

What decides it is the architecture and its flags, not the weights: a small model of the same config is tried before
anything runs, in float32 on the CPU. The real one is tried again when it is first loaded, with room for rounding.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cfsd.errors import BadInput

TOKENS = 12  # of a trial
VOCABULARY = 64  # of the small model
WIDTH = 256  # of the small model, where heads can be left out to reach it
MAX_INNER = 32
MAX_LAYERS = 16
EXACT, ROUNDED = 1e-4, 0.2  # of the logits' deviation: what the small and the real model may change
LAYER_CYCLES = "period|interval|_every_|sparse_step"  # fields that say after how many layers another kind comes


def check_architecture(config: PretrainedConfig, name: str) -> list[str]:
    """Check on a small random model of the same architecture that it is causal; return what is to be said.

    Raises:
        BadInput: if it is not, as BERT and Gemma 3 with `use_bidirectional_attention`.
    """
    for divided in (True, False):
        try:
            changed = _changed_by_later(small_copy(config, divided))
        except Exception:  # sizes of some architectures depend on each other in ways that we do not know
            continue
        if not changed.finite:
            continue
        if changed.max > EXACT * changed.deviation:
            raise _refused(name)
        return []
    return ["that the model is causal could not be tried on a small copy; it is tried when it is first loaded"]


def check_predictions(model: PreTrainedModel, where: Path) -> None:
    """Check that a loaded model's logits are finite and that a later token changes no earlier one much.

    Raises:
        BadInput: if not: the weights are damaged, or the model reads the whole text.
    """
    changed = _changed_by_later(model)
    if not changed.finite:
        raise BadInput(
            f"the model in {str(where)!r} predicts NaN or infinite logits for random tokens: its weights are damaged, "
            "or too large for the precision; copy the model again"
        )
    if changed.mean > ROUNDED * changed.deviation:
        raise _refused(str(where))


def _refused(name: str) -> BadInput:
    return BadInput(
        f"the model in {name!r} is not causal: its prediction at a token changes with the tokens after it, "
        "so it cannot write text; allowed are decoders such as Llama, Qwen, Gemma or GPT-2"
    )


class _Changed:
    """How much the logits before a token change with it: at most, and on average where it is most."""

    def __init__(self, logits_TTV: torch.Tensor) -> None:
        """Compare row t, whose token t differs, with row 0."""
        self.finite = bool(torch.isfinite(logits_TTV).all())
        self.deviation = float(logits_TTV[0].std())
        change_TTV = (logits_TTV - logits_TTV[0]).abs()
        before = [change_TTV[t, :t] for t in range(1, len(logits_TTV))]
        self.max = max(float(change.max()) for change in before)
        self.mean = max(float(change.mean(-1).max()) for change in before)


@torch.no_grad()
def _changed_by_later(model: PreTrainedModel) -> _Changed:
    """Return the changes when each token but the first is replaced in turn, all rows in one batch."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids_TT = torch.randint(1, vocabulary, (1, TOKENS), generator=generator).repeat(TOKENS, 1)  # 0 pads the small model
    for t in range(1, TOKENS):
        ids_TT[t, t] = ids_TT[t, t] % (vocabulary - 1) + 1
    return _Changed(model(input_ids=ids_TT.to(model.device), use_cache=False).logits.float().cpu())


def small_copy(config: PretrainedConfig, divided: bool) -> PreTrainedModel:
    """Return a random model with few layers, one of every kind at least, and, `divided`, with fewer heads."""
    small: Any = copy.deepcopy(config)
    layers = int(small.num_hidden_layers)
    kept = min(layers, _layers_of_every_kind(small, layers))
    for name, value in list(vars(small).items()):
        if isinstance(value, list | tuple) and len(value) == layers:
            setattr(small, name, value[:kept])
        elif type(value) is int and re.search("intermediate_size|ffn_dim|ffn_hidden", name):
            setattr(small, name, min(value, MAX_INNER))
        elif type(value) is int and name.startswith("vocab_size"):
            setattr(small, name, min(value, VOCABULARY))
    small.num_hidden_layers, small.vocab_size = kept, min(VOCABULARY, small.vocab_size)
    small.pad_token_id = None if getattr(small, "pad_token_id", None) is None else 0
    small.bos_token_id = small.eos_token_id = None
    if getattr(small, "num_kv_shared_layers", None):  # of the last layers, which may be among those left out
        small.num_kv_shared_layers = 0
    if divided:
        _leave_out_heads(small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    return model


def _layers_of_every_kind(config: Any, layers: int) -> int:
    kinds = getattr(config, "layer_types", None) or []
    firsts = [kinds.index(kind) + 1 for kind in set(kinds)]
    cycles = [v for n, v in vars(config).items() if type(v) is int and v <= layers and re.search(LAYER_CYCLES, n)]
    return min(MAX_LAYERS, max(2, *firsts, *cycles, 2))


def _leave_out_heads(config: Any) -> None:
    """Divide width and heads by the same power of two, so that the size of a head stays."""
    heads = "num_attention_heads" if hasattr(config, "num_attention_heads") else "num_heads"  # of attention, of a state
    count, factor = getattr(config, heads), 1
    while all(n % (2 * factor) == 0 for n in (config.hidden_size, count)) and (
        config.hidden_size // (2 * factor) >= WIDTH
    ):
        factor *= 2
    config.hidden_size //= factor
    setattr(config, heads, count // factor)
    if isinstance(groups := getattr(config, "num_key_value_heads", None), int):
        config.num_key_value_heads = max(1, groups // factor)
