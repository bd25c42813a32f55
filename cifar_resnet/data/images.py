"""How an image file becomes 32x32 pixels. Training, evaluation and `predict` all read files by this rule."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from ..errors import DataError, UsageError, first_line

RULE = 4  # of reading; a new number makes kept images be read again
# The value of white in images of more than 8 bits: the first of these that no pixel exceeds by more than a hundredth.
WHITES, EXCESS = (1, 255, 4095, 65535), 1.01
DRAFT = 256  # pixels a side: what a JPEG's own decoder may reduce a large image to, eight times what is wanted
SUFFIXES = {  # whose files are taken for images without a look at their content
    ".apng", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
TURNS = (  # that EXIF's orientations, from 1 on, ask for
    None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
)  # fmt: skip
with suppress(ImportError):  # HEIC, where the user has the package
    import pillow_heif

    pillow_heif.register_heif_opener()


class Decoded(NamedTuple):
    """An image file's pixels before they are scaled: `image` of 8 bits, or `values` of more with the value of white unknown."""

    image: Image.Image | None
    values: np.ndarray | None = None  # uint16, int32 or float32 (H, W) or (H, W, 3)
    alpha: np.ndarray | None = None  # uint8 (H, W), of `values`
    orientation: int = 1  # of `values`, as EXIF counts

    @property
    def kind(self) -> str | None:
        """The type of `values`. Images of one type share one value of white."""
        return None if self.values is None else self.values.dtype.name

    @property
    def top(self) -> float:
        """The highest of `values` where they are not wholly transparent."""
        assert self.values is not None
        seen = self.values if self.alpha is None else self.values[self.alpha > 0]
        return float(seen.max(initial=0))


def read_image(path: Path, whites: Mapping[str, int] | None = None, picture: Image.Image | None = None) -> np.ndarray:
    """An image file as uint8 (32, 32, 3): turned as EXIF says, white where transparent, its centred square scaled to 32x32.

    Args:
        whites: the value of white of images of more than 8 bits, by type. For a type that it lacks the image itself decides.
        picture: an image in memory, which is taken in place of the file; `path` is then its name in messages.

    Raises:
        DataError: it is no image that Pillow can read, or holds values that no image has.
    """
    return scaled(decode(path, picture), whites or {}, path)


def pictures_in(array: np.ndarray) -> list[Image.Image]:
    """The images in an array of bytes: uint8 (H, W), (H, W, 3) or (N, H, W, 3).

    Raises:
        UsageError: the array is of another type or shape.
    """
    if array.dtype != np.uint8:
        scale = "; for values of 0 to 1: (255 * images).round().astype(numpy.uint8)" if array.dtype.kind == "f" else ""
        raise UsageError(f"an array of images must be of uint8, not {array.dtype}{scale}")
    if not (array.ndim == 2 or (array.ndim in (3, 4) and array.shape[-1] == 3)) or 0 in array.shape:
        raise UsageError(f"an array of images must be of the shape (H, W), (H, W, 3) or (N, H, W, 3), not {array.shape}")
    return [Image.fromarray(each) for each in (array if array.ndim == 4 else [array])]


def decode(path: Path, picture: Image.Image | None = None) -> Decoded:
    """The pixels of an image file, or of a picture. A JPEG that is far too large is decoded at an eighth to a half of its size.

    Raises:
        DataError: as from `read_image`, with the reason.
    """
    try:
        with warnings.catch_warnings(action="ignore"), ExitStack() as held:
            # Of a path, Pillow maps some TIFFs into memory, and then turns those that are not square wrongly.
            file = picture or held.enter_context(Image.open(held.enter_context(open(path, "rb"))))
            if picture is None:
                file.draft(None, (DRAFT, DRAFT))
            else:
                file.load()
            found = _deep(file, path) or Decoded(_turned(file, _orientation(file)))
    except Exception as error:  # whatever a damaged file makes its decoder raise
        raise DataError(f"{path}: {_reason(path, error)}") from None
    if found.values is not None:
        if not np.isfinite(found.values).all():
            raise DataError(f"{path}: holds values that are no numbers (NaN or infinite)")
        low, high = found.values.min(initial=0), found.values.max(initial=0)
        if low < 0 or high > WHITES[-1]:
            raise DataError(f"{path}: holds values from {low:g} to {high:g}; an image's are within 0 to {WHITES[-1]}")
    return found


def white_of(top: float) -> int:
    """The value of white for images whose highest value is `top`, at most 65535."""
    return next(white for white in WHITES if top <= EXCESS * white)


def scaled(found: Decoded, whites: Mapping[str, int], path: Path) -> np.ndarray:
    """Decoded pixels as `read_image` gives them.

    Raises:
        DataError: a value is above the type's value of white.
    """
    image = found.image or _in_8_bits(found, whites, path)
    if 0 in image.size:
        raise DataError(f"{path}: has no pixels")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.LANCZOS))
    except ValueError as error:  # of a mode that Pillow does not convert
        raise DataError(f"{path}: {_reason(path, error)}") from None


def _deep(file: Image.Image, path: Path) -> Decoded | None:
    """What a file of more than 8 bits a channel holds, else None."""
    tags = getattr(file, "tag_v2", {})
    if tags.get(Base.PlanarConfiguration) == 2 and max(tags.get(Base.BitsPerSample, [8])) > 8:
        raise UnidentifiedImageError  # Pillow and OpenCV both read such channels, one after the other, wrongly
    # Before getexif(), which loads the file and empties the list.
    tiles = file.tile if isinstance(file, ImageFile.ImageFile) else []
    several = file.mode[0] != "I" and bool(tiles) and ";16" in str(tiles[0][3])
    if file.mode[0] in "IF":
        values = np.asarray(file)
        transparent = file.info.get("transparency")
        alpha = np.where(values == transparent, 0, 255).astype(np.uint8) if isinstance(transparent, int) else None
        return Decoded(None, values.astype(np.uint16) if values.dtype.kind == "u" else values, alpha, _orientation(file))
    channels = _channels_of_16_bits(path) if several else None
    if channels is None:
        return None
    alpha = (channels[..., 3] >> 8).astype(np.uint8) if channels.shape[2] == 4 else None
    turned = file.format == "TIFF"  # by OpenCV
    return Decoded(None, channels[..., 2::-1], alpha, 1 if turned else _orientation(file))


def _channels_of_16_bits(path: Path) -> np.ndarray | None:
    """Blue, green, red and perhaps alpha, uint16 (H, W, 3 or 4), by OpenCV, as Pillow keeps the upper 8 bits alone.

    None where OpenCV is not there, as it is with Albumentations, or cannot read the file.
    """
    try:
        import cv2
    except ImportError:
        return None
    found: np.ndarray | None = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    return found if found is not None and found.dtype == np.uint16 and found.shape[2:] in ((3,), (4,)) else None


def _in_8_bits(found: Decoded, whites: Mapping[str, int], path: Path) -> Image.Image:
    assert found.values is not None
    white = whites.get(str(found.kind)) or white_of(found.top)
    if found.top > EXCESS * white:
        raise DataError(f"{path}: holds values up to {found.top:g}, where white is {white} in the training images of its type")
    image = Image.fromarray((found.values.clip(0, white).astype(np.float64) * (255 / white)).astype(np.uint8))
    if found.alpha is not None:
        image.putalpha(Image.fromarray(found.alpha))
    return _turned(image, found.orientation)


def _orientation(image: Image.Image) -> int:
    """How EXIF asks to turn the image, 1 to 8. 1 leaves it as it is: so where EXIF cannot be read, and for a TIFF, which loading turns."""
    image.load()
    with suppress(Exception):  # of whatever kind: the pixels are there
        found = int(image.getexif().get(Base.Orientation, 1))
        return found if 1 <= found <= len(TURNS) else 1
    return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned as this orientation asks. ImageOps.exif_transpose also writes EXIF anew, and fails where any tag is odd."""
    turn = TURNS[orientation - 1]
    return image.copy() if turn is None else image.transpose(turn)


def _reason(path: Path, error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if os.path.isdir(path):
        return "is a folder"
    if known := getattr(error, "strerror", None):
        return str(known)
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "is empty"
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, the most that are read"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that can be read"
    message = first_line(error)
    return message if "truncated" in message else f"damaged ({message})"
