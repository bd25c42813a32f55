"""How an image file becomes 32x32 pixels: modes, depths, sizes, and why one cannot be read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from cifar_resnet.data.images import decode, read_image, white_of
from cifar_resnet.errors import DataError


def noise(shape=(32, 32, 3), seed=0, dtype=np.uint8, high=256):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def gradient(dtype, top):
    """Grey from 0 to `top`, left to right."""
    return np.tile(np.linspace(0, top, 32), (32, 1)).astype(dtype)


@pytest.mark.parametrize("kind", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_images_of_every_mode_are_read(kind, tmp_path):
    grey = np.linspace(0, 255, 64 * 48).reshape(64, 48).astype(np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if kind == "I;16" else Image.fromarray(grey).convert(kind)
    path = tmp_path / ("x.jpg" if kind == "CMYK" else "x.png")
    image.save(path)
    found = read_image(path)
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    if kind != "1":  # the centred 48x48, from grey 32 to 223
        assert found[0].mean() == pytest.approx(34, abs=4)
        assert found[-1].mean() == pytest.approx(221, abs=4)


def test_images_are_turned_cut_and_laid_on_white(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64, 0] = 200  # the centred square is red
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png") == [200, 0, 0]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(noise()).save(tmp_path / "turned.webp", exif=exif, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "turned.webp"), np.rot90(noise(), -1))
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert (read_image(tmp_path / "float.tiff") == 127).all()


@pytest.mark.parametrize("orientation", range(10))
def test_a_photo_is_turned_whatever_else_its_exif_says(orientation, tmp_path):
    """Here it gives the resolution as text, with which ImageOps.exif_transpose fails."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)
    Image.fromarray(noise()).save(tmp_path / "x.webp", exif=exif, lossless=True)
    plain = Image.fromarray(noise())
    plain.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(plain)
    np.testing.assert_array_equal(read_image(tmp_path / "x.webp"), expected)
    picture = Image.open(tmp_path / "x.webp")
    np.testing.assert_array_equal(read_image(tmp_path / "x.webp", picture=picture), expected)
    assert exif.endswith(picture.info["exif"])  # which the picture keeps


def test_exif_that_is_rubbish_loses_no_photo(tmp_path):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x011A], exif[0x0131] = 6, 72.0, "a camera"
    Image.fromarray(noise()).save(buffer, "jpeg", exif=exif, quality=95)
    whole, rng, path = buffer.getvalue(), np.random.default_rng(0), tmp_path / "x.jpg"
    start = whole.index(b"Exif") + 6
    pixels = np.asarray(Image.open(io.BytesIO(whole)))
    turned = {ImageOps.exif_transpose(picture).tobytes() for picture in all_ways(pixels)}
    for _ in range(300):
        spoilt = bytearray(whole)
        for place in rng.integers(start + 18, start + len(exif.tobytes()) - 6, 3):
            spoilt[place] = rng.integers(256)
        path.write_bytes(spoilt)
        assert read_image(path).tobytes() in turned


def all_ways(pixels):
    """Images of these pixels that EXIF asks to be turned in each of the eight ways."""
    for orientation in range(1, 9):
        image = Image.fromarray(pixels)
        image.getexif()[0x0112] = orientation
        yield image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_an_opaque_image_is_what_compositing_and_lanczos_make_of_it(mode, tmp_path):
    """As every image was read before opaque ones went without compositing."""
    Image.fromarray(noise((70, 50, 3))).convert(mode).save(tmp_path / "x.png")
    image = Image.open(tmp_path / "x.png").convert("RGBA")
    laid = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), ImageOps.fit(laid, (32, 32), Image.Resampling.LANCZOS))


@pytest.mark.parametrize(("dtype", "suffix"), [("float32", "tif"), ("int32", "tif"), ("uint16", "png"), ("uint16", "tif")])
@pytest.mark.parametrize("top", [255, 3000, 4095, 60000, 65535])
def test_values_of_more_than_8_bits_are_scaled_by_the_first_white_that_holds_them(dtype, suffix, top, tmp_path):
    Image.fromarray(gradient(dtype, top)).save(tmp_path / f"x.{suffix}")
    white = next(white for white in (255, 4095, 65535) if top <= white)
    expected = gradient(dtype, top) / white * 255
    np.testing.assert_allclose(read_image(tmp_path / f"x.{suffix}"), np.repeat(expected[..., None], 3, 2), atol=1)


def test_a_white_that_is_given_counts_instead_of_the_images_own(tmp_path):
    Image.fromarray(gradient(np.uint16, 4095)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", {"uint16": 65535}).max() == 15
    with pytest.raises(DataError, match=r"x.png: holds values up to 4095, where white is 255"):
        read_image(tmp_path / "x.png", {"uint16": 255})
    assert [white_of(top) for top in (0, 1, 1.005, 1.5, 255, 256, 4095, 4500, 65535)] == [
        1,
        1,
        1,
        255,
        255,
        255,
        4095,
        65535,
        65535,
    ]


def png(values, exif=None):
    """A PNG file of 16 bits of several channels, which Pillow does not write: of uint16 (H, W, C)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    more = b"" if exif is None else chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_12_bits_in_16_of_several_channels_keep_their_levels(channels, tmp_path):
    """Pillow alone keeps the upper 8 bits of 16, so 16 levels of 4,096."""
    values = noise((32, 32, channels), dtype=np.uint16, high=4096)
    if channels in (2, 4):
        values[..., -1] = 65535
        values[:4, :, -1] = 0
    (tmp_path / "x.png").write_bytes(png(values))
    found, colours = read_image(tmp_path / "x.png"), values[..., : 3 if channels > 2 else 1]
    if channels in (2, 4):
        assert (found[:4] == 255).all()
        found, colours = found[4:], colours[4:]
    np.testing.assert_allclose(found, np.broadcast_to(colours / 4095 * 255, found.shape), atol=1)


def test_a_value_that_stands_for_transparent_is_white(tmp_path):
    values = gradient(np.uint16, 4095)
    values[:8] = 0
    Image.fromarray(values).save(tmp_path / "key.png", transparency=0)
    found = read_image(tmp_path / "key.png")
    assert (found[:8] == 255).all()
    np.testing.assert_allclose(found[8:, 1:, 0], values[8:, 1:] / 4095 * 255, atol=1)


def tiff(values, orientation=1, planar=False):
    """A TIFF file of 16 bits of three channels, not packed, which Pillow does not write: of uint16 (H, W, 3)."""
    height, width, _ = values.shape
    at, size = 8 + 2 + 11 * 12 + 4, 2 * height * width  # behind the directory: numbers of bits, strips if several, pixels
    first = at + 6 + 24 * planar
    tags = (
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, at), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 3, at + 6) if planar else (273, 4, 1, first), (274, 3, 1, orientation), (277, 3, 1, 3), (278, 3, 1, height),
        (279, 4, 3, at + 18) if planar else (279, 4, 1, 3 * size), (284, 3, 1, 1 + planar),
    )  # fmt: skip
    strips = struct.pack("<6I", first, first + size, first + 2 * size, size, size, size) if planar else b""
    pixels = (values.transpose(2, 0, 1) if planar else values).astype("<u2").tobytes()
    entries = b"".join(struct.pack("<HHII", *each) for each in tags)
    return b"II*\0" + struct.pack("<IH", 8, 11) + entries + bytes(4) + struct.pack("<3H", 16, 16, 16) + strips + pixels


def test_channels_of_16_bits_one_after_the_other_are_refused(tmp_path):
    """Pillow and OpenCV read them, but not as they are."""
    (tmp_path / "x.tif").write_bytes(tiff(noise((32, 32, 3), dtype=np.uint16, high=65536), planar=True))
    assert Image.open(tmp_path / "x.tif").convert("RGB").size == (32, 32)
    with pytest.raises(DataError, match="x.tif: not an image that can be read"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(
    "kind",
    ["8 bits.png", "8 bits.tif", "RGBA.tif", "16 bits.png", "16 bits.tif", "float.tif", "int.tif", "channels.tif", "channels.png", "packed.tif"],
)
def test_an_image_of_every_depth_is_turned_once(kind, orientation, tmp_path):
    """It is then the same as an image that was stored as it is shown. The turns are what the EXIF standard says."""
    shown = gradient(np.uint16, 65535) // 2 + np.arange(32, dtype=np.uint16)[:, None] * 500
    shown = shown[:, :20]  # not square
    stored = np.ascontiguousarray({
        2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1],
        5: shown.T, 6: shown.T[::-1], 7: shown.T[::-1, ::-1], 8: shown.T[:, ::-1],
    }[orientation])  # fmt: skip

    def read(values, turned):
        exif, path = Image.Exif(), tmp_path / f"{turned} {kind}"
        exif[0x0112] = turned
        if kind.startswith("channels"):
            values = np.repeat(values[..., None], 3, 2)
            path.write_bytes(tiff(values, turned) if kind.endswith("tif") else png(values, exif))
        else:
            small, pixels = (values // 257).astype(np.uint8), {"1": values, "p": values, "i": values.astype(np.int32)}
            pixels |= {"8": small, "R": np.dstack([small] * 4), "f": (values / 65535).astype(np.float32)}
            options = {"compression": "tiff_adobe_deflate"} if kind == "packed.tif" else {}
            Image.fromarray(pixels[kind[0]]).save(path, exif=exif, **options)
        return read_image(path)

    np.testing.assert_array_equal(read(stored, orientation), read(shown, 1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.where(np.eye(32) > 0, np.nan, 7).astype(np.float32), "no numbers"),
        (np.full((32, 32), np.inf, np.float32), "no numbers"),
        (gradient(np.float32, 255) - 9, "from -9 to 246"),
        (gradient(np.int32, 70000), "from 0 to 70000"),
        (gradient(np.float32, 1e9), "from 0 to 1e\\+09"),
    ],
    ids=["NaN", "infinite", "negative", "too large", "far too large"],
)
def test_values_that_no_image_has_are_refused(values, said, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=f"x.tif: holds values .*{said}"):
        read_image(tmp_path / "x.tif")


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_known_by_its_content(format, tmp_path):
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(tmp_path / "x.bin", format)
    np.testing.assert_allclose(read_image(tmp_path / "x.bin"), 99, atol=2)


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    """Against the whole image: the difference is that of rounding."""
    smooth = Image.fromarray(noise((12, 16, 3))).resize((1600, 1200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    assert decode(tmp_path / "x.jpg").image.size == (400, 300)
    whole = ImageOps.fit(Image.open(tmp_path / "x.jpg").convert("RGB"), (32, 32), Image.Resampling.LANCZOS)
    difference = np.abs(read_image(tmp_path / "x.jpg").astype(int) - np.asarray(whole))
    assert difference.mean() < 0.5
    assert difference.max() <= 2
    smooth.crop((0, 0, 511, 511)).save(tmp_path / "small.jpg")
    assert decode(tmp_path / "small.jpg").image.size == (511, 511)


def test_why_an_image_cannot_be_read_is_said(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(noise((64, 64, 3))).save(file, "JPEG")
    contents = {
        "cut.jpg": (file.getvalue()[:900], "truncated"),
        "none.png": (b"", "is empty"),
        "text.png": (b"not an image", "not an image that can be read"),
        "bomb.jpg": (file.getvalue(), "has more than 2,000 pixels"),
    }
    for name, (content, said) in contents.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if name == "bomb.jpg" else None)
        with pytest.raises(DataError, match=f"{name}: .*{said}"):
            read_image(tmp_path / name)
    for name, said in {"missing.png": "No such file", ".": "is a folder", "\0.png": "damaged"}.items():
        with pytest.raises(DataError, match=said):
            read_image(tmp_path / name)
