"""The pictures of a rollout: processed once per prompt, kept in host memory, seen once per forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers import ProcessorMixin


PIXELS, GRID = "pixel_values", "image_grid_thw"


def shareable(processor: Any) -> bool:
    """Whether `processor` gives every picture its own rows of `pixel_values` and a grid, as Qwen's do."""
    return isinstance(processor, ProcessorMixin) and GRID in processor.image_processor.model_input_names


def pictures_of(row: dict[str, Any]) -> list:
    """The pictures of a row in TRL's format: `images` (a list), or `image` (one)."""
    if row.get("images") is not None:
        return list(row["images"])
    return [row["image"]] if row.get("image") is not None else []


class Pictures:
    """
    What the model needs to know of the pictures of some prompts.

    TRL processes every row of a group again, twice, and keeps `pixel_values` of a whole rollout on the device, once
    per row: 26 GB for 1,024 rows of one megapixel.

    Args:
        fields (`dict`):
            What the processor made of the prompts, without `input_ids` and `attention_mask`: `pixel_values` `(patches
            of all prompts, channels)`, `image_grid_thw` `(pictures of all prompts, 3)`, and per-token lists.
        num_images (`list[int]`):
            Pictures of each prompt.
    """

    def __init__(self, fields: dict[str, Any], num_images: Sequence[int]):
        self.num_images = list(num_images)
        self.per_token = {name: value for name, value in fields.items() if name not in (PIXELS, GRID)}
        tensors = [name for name, value in self.per_token.items() if isinstance(value, torch.Tensor)]
        if tensors:
            raise NotImplementedError(f"{', '.join(tensors)}: no rule how these belong to prompts.")
        self.grids = self.pixels = None
        if PIXELS in fields:
            grid = torch.as_tensor(fields[GRID])
            self.grids = grid.split(self.num_images)
            self.pixels = torch.as_tensor(fields[PIXELS]).split([int(g.prod(-1).sum()) for g in self.grids])

    def order(self, prompts: Sequence[int]) -> list[int]:
        """Which of the distinct pictures, in the order of `pixel_values`, each picture of these rows is."""
        start, count = {}, 0
        for i in sorted(set(prompts)):
            start[i], count = count, count + self.num_images[i]
        return [start[i] + j for i in prompts for j in range(self.num_images[i])]

    def unpadded(self, prompts: Sequence[int]) -> dict[str, Any]:
        """
        The processor's fields for rows of `prompts` (numbers of prompts, in any order, repeated at will), with
        `pixel_values` of each picture once: to be used inside [`SharedFeatures.of`].
        """
        fields = {name: [lists[i] for i in prompts] for name, lists in self.per_token.items()}
        return {**self._tensors(prompts), **fields}

    def padded(self, prompts: Sequence[int], prompt_length: int, length: int, device: torch.device) -> dict[str, Any]:
        """
        The same as arguments of the model: per-token fields `(rows, length)`, padded on the left to `prompt_length`,
        where a completion follows.
        """
        fields = {name: value.to(device) for name, value in self._tensors(prompts).items()}
        for name, lists in self.per_token.items():
            padded = torch.zeros(len(prompts), length, dtype=torch.long)
            for row, i in zip(padded, prompts, strict=True):
                row[prompt_length - len(lists[i]) : prompt_length] = torch.tensor(lists[i])
            fields[name] = padded.to(device)
        return {**fields, "num_images": [self.num_images[i] for i in prompts]}

    def _tensors(self, prompts: Sequence[int]) -> dict[str, torch.Tensor]:
        if self.pixels is None or not any(self.num_images[i] for i in prompts):
            return {}
        pixels = torch.cat([self.pixels[i] for i in sorted(set(prompts))])
        return {PIXELS: pixels, GRID: torch.cat([self.grids[i] for i in prompts])}


class SharedFeatures:
    """
    Lets a model look once at each picture of a batch in which several rows have the same one. The rows of a group do.

    Args:
        models (`list[PreTrainedModel | PeftModel | None]`):
            The models to teach, policy and reference.
    """

    def __init__(self, models: Sequence[torch.nn.Module | None]):
        self._order: list[int] | None = None
        for model in filter(None, models):
            *_, seeing = (m for m in model.modules() if hasattr(type(m), "get_image_features"))
            seeing.get_image_features = partial(self._look, seeing.get_image_features)

    @contextmanager
    def of(self, order: list[int]):
        """Inside, `pixel_values` holds distinct pictures and picture `i` of the batch is number `order[i]` of them."""
        self._order = order
        try:
            yield
        finally:
            self._order = None

    def _look(self, get_image_features, pixel_values, image_grid_thw=None, **kwargs):
        if self._order is None:
            return get_image_features(pixel_values, image_grid_thw, **kwargs)
        distinct = [self._order.index(i) for i in range(max(self._order) + 1)]
        seen = get_image_features(pixel_values, image_grid_thw[distinct], **kwargs)
        seen.pooler_output = tuple(seen.pooler_output[i] for i in self._order)
        if getattr(seen, "deepstack_features", None) is not None:  # Qwen3-VL
            seen.deepstack_features = [tuple(layer[i] for i in self._order) for layer in seen.deepstack_features]
        return seen
