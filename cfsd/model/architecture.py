"""What a kind of model can do here, as far as its configuration says so; `config` is a config.json as a mapping.

What only a model itself can show is tried where it is needed: sampling (`cfsd.generate.trial`), the output layer
(`cfsd.train.loss.objective`), rows without padding (`cfsd.train.loss.packed`), LoRA's layers (`cfsd.train.adapters`).
`benchmarks/architectures.py` measures all of it family by family and writes the table in the documentation.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

REFUSED = {
    "rwkv": "generate does not hand its state from token to token, so sampled tokens would not follow its distribution",
}
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "context_length", "n_ctx")
SWITCHING = ("longrope", "su", "dynamic")  # rotary frequencies that depend on the longest row of a pass; su: longrope
NEAR = ("sliding_window", "attention_chunk_size", "window_size", "index_topk")  # tokens that layers see at most


class Context(NamedTuple):
    """The longest row, in tokens, None if nothing limits it; and why it is shorter than the model's own limit."""

    tokens: int | None
    why: str | None = None


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return why models of this type cannot be used, or None."""
    return REFUSED.get(str(config.get("model_type")))


def context_of(config: Mapping[str, Any]) -> Context:
    """Return the longest row of which sampling token by token and one forward pass give the same distribution.

    Long rope (Phi-3, Phi-4) and dynamic rope rotate all tokens of a pass by other frequencies once its longest row
    is above a length: keys that were cached before, and shorter rows of the same batch, belong to another function.
    Sparse attention (DeepSeek-V3.2) sees all tokens up to `index_topk`, and above it those that an index picks: other
    ones in a longer pass.
    """
    text = config.get("text_config") or config
    own = next((int(text[name]) for name in POSITIONS if isinstance(text.get(name), int)), None)
    limits = [limit for limit in (_switch(text, own), _sparse(text)) if limit and limit.tokens != own]
    return min(limits, key=lambda limit: limit.tokens or 0, default=Context(own))


def sees_all(config: Mapping[str, Any]) -> bool:
    """Return whether every layer attends to all tokens before its own: a trial of a few would not show a window."""
    text = config.get("text_config") or config
    kinds = set(text.get("layer_types") or ["full_attention"])
    return kinds == {"full_attention"} and not any(text.get(name) for name in NEAR)


def _switch(text: Mapping[str, Any], own: int | None) -> Context | None:
    """Return where rotary frequencies change, if they do."""
    kinds = [kind for rope in _ropes(text) if (kind := rope.get("rope_type", rope.get("type"))) in SWITCHING]
    lengths = [rope.get("original_max_position_embeddings") for rope in _ropes(text)]
    lengths += [text.get("original_max_position_embeddings"), own]
    if not kinds or not any(lengths):
        return None
    why = f"above that its {kinds[0]} position embedding changes for all tokens of a row at once"
    return Context(min(int(length) for length in lengths if length), why)


def _sparse(text: Mapping[str, Any]) -> Context | None:
    """Return how many tokens sparse attention sees whole, if it is sparse."""
    count = text.get("index_topk")
    if not isinstance(count, int):
        return None
    return Context(count, "above that its sparse attention picks the tokens it sees, other ones in a longer pass")


def auxiliary_loss(config: Mapping[str, Any]) -> str | None:
    """Return the line that says which loss of the model's own is not trained, or None."""
    text = config.get("text_config") or config
    if not text.get("output_router_logits"):
        return None
    return "the routers' auxiliary loss (output_router_logits) is not part of this training's loss: it is left out"


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of the rotary embedding, one for all layers or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, Mapping):
            yield rope
            yield from (inner for inner in rope.values() if isinstance(inner, Mapping))
