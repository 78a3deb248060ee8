"""Faster decoding on a CPU: a preallocated key-value cache, and a head that multiplies few rows in slices.

transformers' own cache grows by concatenation: each token copies the keys and values of all tokens before it, in every
layer.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.trainer_utils import unwrap_peft_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MANY_ROWS, SLICE = 16, 768


@contextmanager
def in_slices(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block, a model's head on a CPU multiplies a few rows by one slice of its weight at a time.

    MKL is slow at multiplying fewer than 16 rows by a weight this large: for 8 rows of width 576 and a vocabulary of
    49,152 it takes 15 ms on two threads and 31 on one; in slices 8 and 16. No other thread may call the head meanwhile.
    """
    import torch

    head = model.get_output_embeddings()
    plain = type(head) is torch.nn.Linear and head.bias is None and "forward" not in vars(head)
    if not plain or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        yield
        return

    def forward(self: Any, x: Any) -> Any:
        if x[..., 0].numel() >= MANY_ROWS or torch.is_autocast_enabled("cpu"):
            return torch.nn.functional.linear(x, self.weight)
        return torch.cat([x @ part.mT for part in self.weight.split(SLICE)], -1)

    head.forward = MethodType(forward, head)
    try:
        yield
    finally:
        del head.forward


class LayerWithRoom(DynamicLayer):  # type: ignore[misc]
    """Keys and values (B, heads, T, size) as views of tensors with room for `room` tokens after the first update.

    When the room is used up, or once rows were selected or repeated, it grows like transformers' own.
    """

    keys: Any
    values: Any

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.storage: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shapes = [(*new.shape[:-2], end + self.room, new.shape[-1]) for new in (key_states, value_states)]
            self.storage = [key_states.new_empty(shape) for shape in shapes]
        elif end > self.storage[0].shape[-2] or self.keys.data_ptr() != self.storage[0].data_ptr():
            return super().update(key_states, value_states)  # type: ignore[no-any-return]
        for stored, new in zip(self.storage, (key_states, value_states), strict=True):
            stored[..., begin:end, :] = new
        self.keys, self.values = (stored[..., :end, :] for stored in self.storage)
        return self.keys, self.values


def cache_with_room(model: "PreTrainedModel", tokens: int) -> DynamicCache | None:
    """An empty cache for `generate(past_key_values=)`; None if the model or its generation_config needs another kind.

    Other kinds of layers, such as those with a sliding window, stay transformers'.
    """
    from ...upstream.transformers import takes_dynamic_cache

    base = unwrap_peft_model(model)
    takes_it = "past_key_values" in inspect.signature(base.forward).parameters  # Mamba has another name for it
    if not (takes_it and takes_dynamic_cache(base)) or base.generation_config.cache_implementation:
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [LayerWithRoom(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
