"""Images for Qwen-VL: stretched to a square by bicubic resizing, with CLIP's mean and deviation, by PIL alone.

Transformers' backends would do, but for the last grey level: torchvision resizes to slightly other pixels, and what
transformers makes of an image on its way to PIL changes between its versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class QwenVLImageProcessor(BaseImageProcessor):
    """Pixel values (N, 3, S, S) of images; the aspect is not kept and nothing is cut off.

    Args:
        size: `height` and `width` in pixels; 448 in the published model.
        image_mean: of each channel.
        image_std: of each channel.
        **kwargs: what transformers keeps beside them.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        *,
        size: Mapping[str, int] | None = None,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = DEVIATION,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 448, "width": 448})
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def preprocess(self, images: Any, *, return_tensors: Any = None) -> BatchFeature:
        """`pixel_values` of an image or a list: PIL images, arrays (H, W, 3) of bytes, paths or addresses."""
        fetched = self.fetch_images(images if isinstance(images, list | tuple) else [images])
        return BatchFeature({"pixel_values": [self._pixels(image) for image in fetched]}, tensor_type=return_tensors)

    def _pixels(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """(3, S, S) in float32, step by step as the original's: to [0, 1], then by channel."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        side = (self.size["width"], self.size["height"])
        levels = np.asarray(picture.convert("RGB").resize(side, Image.Resampling.BICUBIC))
        mean, deviation = (np.array(each, dtype=np.float32) for each in (self.image_mean, self.image_std))
        return ((levels.astype(np.float32) / np.float32(255) - mean) / deviation).transpose(2, 0, 1)
