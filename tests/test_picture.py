"""Images read and written in every mode and file type; noise on them at any size."""

import os
from itertools import product

import hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image

from semkit.images.files import output_names
from semkit.images.picture import (
    _LARGEST_PROFILE,
    MODES,
    UnreadableImage,
    apply_noise,
    difference,
    fit_noise,
    read_image,
    stored_size,
    working_image,
    write_png,
)

RNG = np.random.default_rng(0)
RGB = Image.fromarray(hostile.pixels(RNG, 24, 16))
RGBA = Image.fromarray(hostile.pixels(RNG, 24, 16, 4))


def read(tmp_path, content, name="image.png"):
    (tmp_path / name).write_bytes(content)
    return read_image(tmp_path / name)


def same(image, levels, mode):
    assert image.mode == mode
    assert np.array_equal(np.asarray(image), levels)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_files_come_back_as_they_are(tmp_path, mode, kind):
    image = RGBA.convert(mode)
    same(read(tmp_path, hostile.encoded(image, kind)), np.asarray(image), mode)


def test_modes_become_canonical(tmp_path):
    palette = RGB.quantize(8)
    colours = np.array(palette.getpalette("RGB")).reshape(-1, 3).astype(np.uint8)[np.asarray(palette)]
    same(read(tmp_path, hostile.encoded(palette, "PNG")), colours, "RGB")
    alphas = np.array([0, 10, 100, 255, 255, 255, 255, 255], np.uint8)
    opened = read(tmp_path, hostile.encoded(palette, "PNG", transparency=alphas.tobytes()))
    same(opened, np.dstack([colours, alphas[np.asarray(palette)]]), "RGBA")
    opened = read(tmp_path, hostile.encoded(palette, "PNG", transparency=2))
    same(opened, np.dstack([colours, np.where(np.asarray(palette) == 2, 0, 255).astype(np.uint8)]), "RGBA")
    bits = RGB.convert("1")
    same(read(tmp_path, hostile.encoded(bits, "PNG")), np.asarray(bits) * np.uint8(255), "L")
    key = (10, 20, 30)
    levels = np.asarray(RGB).copy()
    levels[3, 4] = key
    opened = read(tmp_path, hostile.png_rgb_with_key(levels, key))
    hole = np.where((levels == key).all(-1), 0, 255).astype(np.uint8)
    same(opened, np.dstack([levels, hole]), "RGBA")
    assert opened.info == {}


def test_print_colours_become_rgb(tmp_path):
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[0, :, 0], ink[1, :, 1], ink[2, :, 2], ink[3, :, 3] = 255, 255, 255, 255
    opened = read(tmp_path, hostile.encoded(Image.fromarray(ink, "CMYK"), "TIFF"), "ink.tif")
    same(opened, np.repeat(np.uint8([[[0, 255, 255]], [[255, 0, 255]], [[255, 255, 0]], [[0, 0, 0]]]), 4, 1), "RGB")
    opened = read(tmp_path, hostile.encoded(Image.new("RGB", (4, 4), (200, 30, 60)).convert("LAB"), "TIFF"), "lab.tif")
    assert opened.mode == "RGB"
    assert np.abs(np.asarray(opened).astype(int) - (200, 30, 60)).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_rounded_to_8(tmp_path, kind):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    levels[-1, -1] = 65535
    opened = read(tmp_path, hostile.encoded(Image.fromarray(levels), kind))
    same(opened, np.rint(levels / 257).astype(np.uint8), "L")


def test_a_transparent_level_of_16_bit_grey_stays_transparent(tmp_path):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    opened = read(tmp_path, hostile.png_grey_with_key(levels, 4096))
    alpha = np.where(levels == 4096, 0, 255)
    same(opened, np.dstack([np.rint(levels / 257), alpha]).astype(np.uint8), "LA")


@pytest.mark.parametrize(("channels", "mode"), [(2, "RGBA"), (3, "RGB"), (4, "RGBA")])
def test_of_16_bit_colours_and_alpha_the_high_byte_is_read(tmp_path, channels, mode):
    levels = hostile.deep(np.random.default_rng(1), 6, 5, channels)
    high = (levels // 256).astype(np.uint8)
    grey = channels == 2
    same(read(tmp_path, hostile.png_by_hand(levels)), high[..., [0, 0, 0, 1]] if grey else high, mode)


def test_integers_that_do_not_fit_16_bits_are_refused(tmp_path):
    content = hostile.encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF")
    with pytest.raises(UnreadableImage, match=r"deep\.tif: grey levels from 70000 to 70000 do not fit 16 bits"):
        read(tmp_path, content, "deep.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(tmp_path, orientation, kind):
    # What EXIF says of the stored first row and first column, written out: where each lies in the upright picture.
    stored = np.asarray(RGB)
    turned = stored.swapaxes(0, 1) if orientation >= 5 else stored
    upright = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    opened = read(tmp_path, hostile.encoded(RGB, kind, exif=exif, **options))
    same(opened, upright, "RGB")
    write_png(opened, tmp_path / "again.png")
    same(read_image(tmp_path / "again.png"), upright, "RGB")


RAMP = np.arange(16 * 24).astype(np.uint8).reshape(16, 24)
TIFFS = {  # kind -> (an image to save, its pixels as read_image gives them)
    "1": (RGB.convert("1"), np.asarray(RGB.convert("1")) * np.uint8(255)),
    "L": (RGB.convert("L"), np.asarray(RGB.convert("L"))),
    "LA": (RGBA.convert("LA"), np.asarray(RGBA.convert("LA"))),
    "P": (RGB.quantize(8), np.asarray(RGB.quantize(8).convert("RGB"))),
    "RGB": (RGB, np.asarray(RGB)),
    "RGBA": (RGBA, np.asarray(RGBA)),
    "CMYK": (RGB.convert("CMYK"), np.asarray(RGB.convert("CMYK").convert("RGB"))),
    "16-bit grey": (Image.fromarray(RAMP * np.uint16(257)), RAMP),
}
CODECS = (None, "packbits", "tiff_lzw", "tiff_adobe_deflate")


@pytest.mark.parametrize(("kind", "codec"), [*product(TIFFS, CODECS), ("1", "group4")])
def test_portrait_tiffs_have_the_pixels_that_were_saved(tmp_path, kind, codec):
    image, stored = TIFFS[kind]
    for orientation in range(1, 9):
        turned = stored.swapaxes(0, 1) if orientation >= 5 else stored
        upright = turned[:: -1 if orientation in (3, 4, 7, 8) else 1, :: -1 if orientation in (2, 3, 6, 7) else 1]
        tags = {ExifTags.Base.Orientation: orientation}
        opened = read(tmp_path, hostile.encoded(image, "TIFF", compression=codec, tiffinfo=tags), "scan.tif")
        assert np.array_equal(np.asarray(opened), upright), orientation
        assert sorted(stored_size(tmp_path / "scan.tif")) == [16, 24]


def test_broken_exif_does_not_matter(tmp_path):
    same(read(tmp_path, hostile.encoded(RGB, "PNG", exif=b"Exif\0\0not exif")), np.asarray(RGB), "RGB")


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_and_content_before_suffix(tmp_path, kind):
    first, second = (Image.new("L", (5, 4), level) for level in (10, 200))
    content = hostile.encoded(first, kind, save_all=True, append_images=[second], lossless=True)
    opened = read(tmp_path, content, "named.jpg")
    assert opened.convert("L").getextrema() == (10, 10)


CORRUPT = {
    "bomb.png": "exceeds limit",
    "damaged.png": "broken",
    "empty.jpg": "the file is empty",
    "float.tif": "32-bit float pixels have no fixed scale",
    "no palette.png": "the file is damaged",
    "script.jpg": "not in an image format that semkit reads",
    "text.png": "not in an image format that semkit reads",
    "truncated.bmp": "truncated",
    "truncated.jpeg": "truncated",
    "truncated.png": "truncated",
    "truncated.tiff": "truncated",
    "truncated.webp": "decoder",
}


def test_corrupt_files_are_named_in_one_line(tmp_path):
    assert hostile.make_corrupt(tmp_path) == list(CORRUPT)
    for name, reason in CORRUPT.items():
        with pytest.raises(UnreadableImage) as error:
            read_image(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ") and reason in message and "\n" not in message


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    for name, reason in (("pipe.png", "not a file"), ("gone.png", "no such file"), (".", "not a file")):
        with pytest.raises(UnreadableImage, match=reason):
            read_image(tmp_path / name)


def test_colour_profile_is_kept_where_it_still_fits(tmp_path):
    assert read(tmp_path, hostile.encoded(RGB, "PNG", icc_profile=b"profile")).info == {"icc_profile": b"profile"}
    assert read(tmp_path, hostile.encoded(RGB.convert("CMYK"), "TIFF", icc_profile=b"profile")).info == {}
    huge = os.urandom(_LARGEST_PROFILE + 1)
    opened = read(tmp_path, hostile.encoded(RGB, "JPEG", icc_profile=huge))
    with pytest.warns(UserWarning, match=r"huge\.png: its colour profile of 1\.0 MiB is left out"):
        write_png(opened, tmp_path / "huge.png")
    same(read_image(tmp_path / "huge.png"), np.asarray(opened), "RGB")


@pytest.mark.whole
def test_every_hostile_file_is_read_protected_and_within_the_radius(hostile_folder, tmp_path):
    folder, names = hostile_folder
    outputs = output_names(names)
    noise = RNG.integers(-8, 9, (3, 32, 32)).astype(np.int8)
    sizes, modes = set(), set()
    for name in names:
        image = read_image(folder / name)
        write_png(apply_noise(image, noise, 8), tmp_path / outputs[name])
        protected = read_image(tmp_path / outputs[name])
        # In a handful of pixels the noise may average out, or be clipped away.
        assert difference(image, protected) in range(min(image.size) > 4, 9), name
        sizes.add(image.size)
        modes.add(image.mode)
    assert modes == set(MODES)
    assert {(1, 1), (7, 300), (300, 7), (200, 150)} <= sizes
    assert sum(1 for path in tmp_path.rglob("*") if path.is_file()) == len(names)


drawings = st.tuples(st.sampled_from(MODES), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
noises = arrays.arrays(np.int8, st.tuples(st.just(3), st.integers(1, 6), st.integers(1, 6)))


@settings(deadline=None)
@given(drawings, noises, st.sampled_from([0, 1, 2.5, 8, 16, 127, 300]))
def test_noise_stays_within_radius_and_box_and_spares_alpha(drawn, noise, radius):
    mode, width, height, seed = drawn
    channels = len(mode)
    shape = (height, width, channels) if channels > 1 else (height, width)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(levels)
    protected = apply_noise(image, noise, radius)
    assert (protected.mode, protected.size) == (mode, (width, height))
    assert difference(image, protected) <= radius
    assert np.array_equal(np.asarray(image), levels)
    if noise.shape[1:] == (height, width):
        clipped = noise.clip(-min(int(radius), 127), min(int(radius), 127)).astype(int)
        added = np.rint(clipped.mean(0))[..., None] if mode[0] == "L" else np.moveaxis(clipped, 0, -1)
        colour = levels.reshape(height, width, channels)[..., : added.shape[-1]]
        result = np.asarray(protected).reshape(height, width, channels)[..., : added.shape[-1]]
        assert np.array_equal(result, (colour + added).clip(0, 255))


def test_an_image_of_another_mode_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"mode L, LA, RGB, RGBA is needed, got CMYK"):
        write_png(RGB.convert("CMYK"), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_noise_of_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"int8 noise of shape \(3, height, width\) is needed, got float32"):
        apply_noise(RGB, np.zeros((3, 4, 4), np.float32), 8)
    with pytest.raises(ValueError, match="write pixel levels: 8, not 8/255"):
        apply_noise(RGB, np.zeros((3, 4, 4), np.int8), 8 / 255)


def plainly_resized(planes, size, resample):
    return np.stack([np.asarray(Image.fromarray(plane).resize(size, resample)) for plane in planes])


def plainly_fitted(noise, size, limit):
    """fit_noise as its docstring has it, the whole image at once."""
    up = lambda planes: plainly_resized(planes, size, Image.Resampling.BICUBIC)  # noqa: E731
    wanted = noise.astype(np.float32)
    fitted = up(wanted).clip(-limit, limit)
    for _ in range(3):
        missing = wanted - plainly_resized(fitted, noise.shape[:0:-1], Image.Resampling.BILINEAR)
        fitted = (fitted + up(missing)).clip(-limit, limit)
    return np.rint(fitted).astype(np.int8)


LARGE = [pytest.param(size, marks=pytest.mark.whole) for size in ((1300, 700), (32, 20000), (5, 90000), (300001, 1))]


@pytest.mark.parametrize("size", [*LARGE, (900, 31), (20, 33), (700, 32)])
def test_noise_of_a_large_photo_is_made_in_strips_to_the_same_bytes(size):
    noise = np.random.default_rng(2).integers(-8, 9, (3, 32, 32)).astype(np.int8)
    wanted = plainly_fitted(noise, size, 8)
    assert np.array_equal(fit_noise(noise, size, 8), wanted)
    grey = Image.new("L", size, 128)
    assert np.array_equal(apply_noise(grey, noise, 8), np.rint(128 + wanted.mean(0)))


def test_constant_noise_stays_constant_at_any_size():
    noise = np.stack([np.full((32, 32), level, np.int8) for level in (5, -3, 8)])
    for size in ((120, 90), (7, 300), (5, 5), (1, 1)):
        fitted = fit_noise(noise, size, 8)
        assert fitted.shape == (3, *size[::-1])
        assert np.array_equal(fitted, np.broadcast_to(noise[:, :1, :1], fitted.shape))


def test_working_image():
    small = RGB.resize((8, 8))
    assert np.array_equal(working_image(small, 8), np.moveaxis(np.asarray(small), -1, 0))
    expected = np.asarray(RGBA.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(working_image(RGBA, 8), np.moveaxis(expected, -1, 0))
    grey = working_image(RGB.convert("L"), 8)
    assert grey.shape == (3, 8, 8) and (grey == grey[:1]).all()
