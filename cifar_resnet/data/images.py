"""How an image file becomes 32x32 pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import DataError


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (32, 32, 3): turned as EXIF says, white where transparent, its centred square scaled to 32x32.

    Raises:
        DataError: it is no image that Pillow can read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode[0] in "IF":  # more than 8 bits
                pixels = np.asarray(image, np.float64)
                most = 1 if image.mode[0] == "F" and pixels.max() <= 1 else 65535
                image = Image.fromarray((pixels.clip(0, most) * (255 / most)).astype(np.uint8))
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert("RGB")
            return np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS))
    except Exception as error:  # whatever a damaged file makes its decoder raise
        reason = "is a folder" if path.is_dir() else getattr(error, "strerror", None) or "not an image that can be read"
        raise DataError(f"{path}: {reason}") from None
