"""Decoding: every kind of image looks as in a viewer, or is refused with a reason."""

import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from dpnb.data import decoding
from dpnb.data.decoding import UndecodableError, decode

SIZE = 64
RAMP = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE)
COLOUR = (200, 100, 50)


def encoded(image, format="PNG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


def assert_close(got, want, tolerance):
    assert np.abs(got.astype(int) - np.broadcast_to(want, got.shape)).max() <= tolerance


def test_decoding_takes_the_largest_centred_square():
    pixels = np.zeros((30, 60, 3), np.uint8)
    pixels[:, 15:45] = 200  # the square in the middle
    assert (decode(encoded(Image.fromarray(pixels)), 12) == 200).all()
    assert (decode(encoded(Image.fromarray(pixels.transpose(1, 0, 2))), 12) == 200).all()


GREY = round(0.299 * COLOUR[0] + 0.587 * COLOUR[1] + 0.114 * COLOUR[2])


@pytest.mark.parametrize(
    ("mode", "format", "want"),
    [
        ("1", "PNG", 255),
        ("L", "PNG", GREY),
        ("LA", "PNG", GREY),
        ("P", "PNG", COLOUR),
        ("RGB", "JPEG", COLOUR),
        ("RGBA", "PNG", COLOUR),
        ("RGBX", "TIFF", COLOUR),
        ("CMYK", "JPEG", COLOUR),
        ("CMYK", "TIFF", COLOUR),
        ("LAB", "TIFF", COLOUR),
    ],
)
def test_colours_of_every_mode_that_files_have(mode, format, want):
    image = Image.new("RGB", (SIZE, SIZE), "white" if mode == "1" else COLOUR).convert(mode)
    assert_close(decode(encoded(image, format), 8), want, 5 if format == "JPEG" or mode == "P" else 1)


@pytest.mark.parametrize(
    ("mode", "by", "want"),
    [
        ("YCbCr", "RGB", COLOUR),
        ("HSV", "RGB", COLOUR),
        ("La", "LA", GREY),
        ("PA", "P", COLOUR),
        ("RGBa", "RGBA", COLOUR),
        ("I;16L", None, 128),
        ("I;16B", None, 128),
        ("I;16N", None, 128),
    ],
)
def test_colours_of_modes_that_some_plugins_yield(mode, by, want, monkeypatch):
    """No file of a format that Pillow writes opens in these modes."""
    if by is None:
        image = Image.new(mode, (SIZE, SIZE), 0x8000)
    else:
        image = Image.new("RGB", (SIZE, SIZE), COLOUR).convert(by).convert(mode)
    monkeypatch.setattr(Image, "open", lambda file: image)
    assert_close(decode(b"", 8), want, 5 if mode == "PA" else 1)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_grey_of_sixteen_bits_is_scaled(format):
    """Divided by 257, so that 65,535 is white."""
    image = Image.fromarray(RAMP.astype(np.uint16))
    assert_close(decode(encoded(image, format), SIZE), np.rint(RAMP / 257)[..., None], 1)


def test_integers_in_a_png_file_have_sixteen_bits(monkeypatch):
    """As Pillow before version 11 opens them: mode I."""
    image = Image.fromarray(RAMP.astype(np.int32))
    image.format = "PNG"
    monkeypatch.setattr(Image, "open", lambda file: image)
    assert_close(decode(b"", SIZE), np.rint(RAMP / 257)[..., None], 1)


def tiff(raw: bytes, width: int, height: int, bits: int, photometric: int) -> bytes:
    """A TIFF file of one strip of grey values, little-endian."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (278, height)]
    tags += [(279, len(raw))]
    directory = len(tags).to_bytes(2, "little")
    for tag, value in tags:
        directory += b"".join(n.to_bytes(k, "little") for n, k in ((tag, 2), (4, 2), (1, 4), (value, 4)))
    return b"II*\0" + (8 + len(raw)).to_bytes(4, "little") + raw + directory + bytes(4)


def test_tiff_says_what_is_white():
    """Zero, or the largest number of twelve bits."""
    inverted = tiff(RAMP.astype("<u2").tobytes(), SIZE, SIZE, bits=16, photometric=0)
    assert_close(decode(inverted, SIZE), np.rint(255 - RAMP / 257)[..., None], 1)
    twelve = tiff(b"\x80\x0f\xff" * 2, 2, 2, bits=12, photometric=1)  # columns of 0x800 and 0xfff
    assert_close(decode(twelve, 2), np.array([128, 255])[None, :, None], 1)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_without_a_scale_are_refused(dtype):
    image = Image.fromarray((RAMP / (1 if dtype is np.int32 else 65535)).astype(dtype))
    with pytest.raises(UndecodableError, match="of 32 bits .* nothing says which value is white"):
        decode(encoded(image, "TIFF"), SIZE)


def test_transparent_images_lie_on_white():
    """Half opaque, transparent altogether whatever the colour below, and one colour or level that is."""
    black = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode(encoded(black), 4) == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert_close(decode(encoded(half), 4), 127, 1)
    assert_close(decode(encoded(half.convert("LA")), 4), 127, 1)
    for image, transparent in (
        (Image.new("L", (8, 8), 9), 9),
        (Image.new("RGB", (8, 8), COLOUR), COLOUR),
        (Image.new("P", (8, 8), 0), 0),
        (Image.new("1", (8, 8), 0), 0),
        (Image.new("I;16", (8, 8), 300), 300),
    ):
        assert not (decode(encoded(image), 4) == 255).all()
        assert (decode(encoded(image, transparency=transparent), 4) == 255).all(), image.mode


MARKED = np.full((24, 40, 3), 128, np.uint8)
MARKED[:12, :20], MARKED[:12, 20:] = 255, 0  # above: white on the left, black on the right


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_obeyed_or_not(format, orientation):
    """Each of the eight, as the EXIF standard has it: where row 0 and column 0 of the file are seen."""
    back = {
        1: [],
        2: ["x"],
        3: ["x", "y"],
        4: ["y"],
        5: ["t"],
        6: ["t", "x"],
        7: ["t", "x", "y"],
        8: ["t", "y"],
    }
    want = MARKED[:, 8:32]
    for step in back[orientation]:
        want = {"x": want[:, ::-1], "y": want[::-1], "t": want.transpose(1, 0, 2)}[step]
    exif = Image.Exif()
    exif[0x0112] = orientation
    more = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.get(format, {"quality": 100})
    file = encoded(Image.fromarray(MARKED), format, exif=exif, **more)
    assert_close(decode(file, 24), want, 8)
    if format != "TIFF":  # which Pillow always turns
        assert_close(decode(file, 24, upright=False), MARKED[:, 8:32], 8)


def test_a_photograph_of_a_telephone_stands():
    """White above in the file, the right-hand side to a viewer."""
    top = np.zeros((64, 64, 3), np.uint8)
    top[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode(encoded(Image.fromarray(top), "JPEG", exif=exif), 64)
    assert (got[:, 52:] > 200).all() and (got[:, :44] < 50).all()


def test_damaged_exif_data_do_not_matter():
    file = encoded(Image.fromarray(MARKED), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff no directory there")
    assert_close(decode(file, 24), decode(encoded(Image.fromarray(MARKED), "JPEG"), 24), 0)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "^empty file$"),
        (b"nonsense" * 4, "^no image in a format that Pillow reads, 32 bytes$"),
    ],
)
def test_the_reason_names_no_address_in_memory(file, reason):
    with pytest.raises(UndecodableError, match=reason):
        decode(file, 8)


def test_images_cut_off_are_not_filled_up():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)), "JPEG")
    with pytest.raises(OSError, match="truncated"):
        decode(whole[: len(whole) // 2], 8)


def test_pixels_have_a_limit():
    """Before any pixel is decoded; at the limit it is; JPEG counts at the size at which it is decoded."""
    side = 9_000
    assert side**2 > decoding.MAX_PIXELS
    with pytest.raises(
        UndecodableError, match="9,000 x 9,000 pixels, the limit is 64,000,000; store it smaller"
    ):
        decode(encoded(Image.new("1", (side, side))), 8)
    with pytest.raises(UndecodableError, match="more than .* pixels, the limit is 64,000,000"):
        decode(encoded(Image.new("1", (20_000, 20_000))), 8)
    assert (decode(encoded(Image.new("L", (side, side)), "JPEG"), 8) == 0).all()


def test_jpeg_at_a_reduced_size_looks_the_same():
    """Within 2 of 255 on average even for noise; and just below the size at which that begins, to the bit."""
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 256, (150, 200, 3), np.uint8))
    for side, exact in ((2 * decoding.GAP * 64, False), (2 * decoding.GAP * 64 - 1, True)):
        image = small.resize((2 * side, side), Image.Resampling.BICUBIC)
        jpeg = encoded(image, "JPEG", quality=95)
        want = decode(encoded(Image.open(io.BytesIO(jpeg))), 64)  # PNG has no reduced size
        difference = np.abs(decode(jpeg, 64).astype(int) - want)
        assert difference.max() == 0 if exact else 0 < difference.mean() < 2


def test_only_the_first_picture_of_an_animation_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert_close(decode(file, 4), (255, 0, 0), 2)


def test_the_documentation_has_every_mode_of_pillow():
    """A new one has to be decided on."""
    table = (pathlib.Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert {"RGB", "I;16", "F"} < {*Image.MODES}
    assert [mode for mode in Image.MODES if f"`{mode}`" not in table] == []
