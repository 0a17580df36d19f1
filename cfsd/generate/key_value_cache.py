"""Keys and values of the tokens so far, in memory that is laid out once.

transformers' own cache grows by concatenation: every step copies all that is there, which at 512 tokens of
SmolLM2-135M takes half as long as the attention that reads it.
"""

from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)  # attention alone; anything else keeps a state of its own kind


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values, B x heads x capacity x width each, written in place.

    Sliding-window layers keep all tokens too: the model's mask hides those that left the window.
    """

    def __init__(self, capacity: int) -> None:
        """Hold at most `capacity` tokens per row."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.used = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return views of all."""
        if not self.is_initialized:  # takes the memory; on CPU its pages count only once they are written
            self.dtype, self.device = key_states.dtype, key_states.device
            self.all_keys, self.all_values = (
                states.new_empty(*states.shape[:2], self.capacity, states.shape[-1])
                for states in (key_states, value_states)
            )
            self.is_initialized = True
        before, self.used = self.used, self.used + key_states.shape[-2]
        self.all_keys[:, :, before : self.used] = key_states
        self.all_values[:, :, before : self.used] = value_states
        return self._show()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold each row `repeats` times."""
        held = []
        for states in (self.all_keys, self.all_values):
            wider = states.new_empty(repeats * len(states), *states.shape[1:])
            wider[:, :, : self.used] = states[:, :, : self.used].repeat_interleave(repeats, dim=0)
            held.append(wider)
        self.all_keys, self.all_values = held
        self._show()

    def _show(self) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self.all_keys[:, :, : self.used], self.all_values[:, :, : self.used]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, ascending, moved together within the same memory."""
        count = len(indices)
        for held in (self.all_keys, self.all_values):
            held[:count, :, : self.used] = held[indices, :, : self.used]
        self.all_keys, self.all_values = self.all_keys[:count], self.all_values[:count]
        self._show()


def preallocated(model: PreTrainedModel, capacity: int) -> Cache | None:
    """Return an empty cache for `model`, or None where the model keeps more than keys and values."""
    kind: Any = type(model)
    if kind._is_stateful or not kind._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) not in PLAIN for layer in cache.layers):
        return None
    cache.layers = [PreallocatedLayer(capacity) for _ in cache.layers]
    return cache
