"""Images as a source gives them, uint8 with channels last, to the `pixel_values` that models take: normalized, channels first.

    source = open_source("images", path="photos", size=224)
    batches = record_batches(source, channels_first(**NORMALIZED["imagenet"]), batch_size=256, mesh=mesh)

Crops and flips are in images.py, whose views end here, other augmentation in augment.py; any function of a record may stand before this one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# what models were trained with: see the image_mean and image_std of a folder's preprocessor_config.json
NORMALIZED = {
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},  # ViT, SigLIP
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},  # DeiT, DINOv2
    "clip": {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)},
}


def channels_first(*, mean: Sequence[float], std: Sequence[float]) -> "ChannelsFirst":
    """{"image": uint8 [H, W, C], ...} -> {"pixel_values": float32 [C, H, W] = (image / 255 - mean) / std, ...}; other fields stay."""
    return ChannelsFirst(tuple(mean), tuple(std))


@dataclasses.dataclass(frozen=True)
class ChannelsFirst:
    """A class, so that worker processes can be given it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, record: dict[str, Any], rng: Any = None) -> dict[str, Any]:
        record = dict(record)
        image = record.pop("image")
        if image.shape[-1] != len(self.mean):
            raise ValueError(f"an image of {image.shape[-1]} channels cannot be normalized with the means of {len(self.mean)}")
        pixels = (image.astype(np.float32) / 255 - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(2, 0, 1)), **record}
