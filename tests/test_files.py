import os
from pathlib import Path

import hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image
from torchvision.datasets import ImageFolder

from semkit import files

RNG = np.random.default_rng(0)
RGB = Image.fromarray(hostile.pixels(RNG, 24, 16))
RGBA = Image.fromarray(hostile.pixels(RNG, 24, 16, 4))


def read(tmp_path, content, name="image.png"):
    (tmp_path / name).write_bytes(content)
    return files.read_image(tmp_path / name)


def same(image, levels, mode):
    assert image.mode == mode
    assert np.array_equal(np.asarray(image), levels)


@pytest.mark.parametrize("mode", files.MODES)
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


def test_integers_that_do_not_fit_16_bits_are_refused(tmp_path):
    content = hostile.encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF")
    with pytest.raises(files.UnreadableImage, match=r"deep\.tif: grey levels from 70000 to 70000 do not fit 16 bits"):
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
    files.write_png(opened, tmp_path / "again.png")
    same(files.read_image(tmp_path / "again.png"), upright, "RGB")


def test_broken_exif_does_not_matter(tmp_path):
    same(read(tmp_path, hostile.encoded(RGB, "PNG", exif=b"Exif\0\0not exif")), np.asarray(RGB), "RGB")


def test_first_frame_and_content_before_suffix(tmp_path):
    first, second = (Image.new("L", (5, 4), level) for level in (10, 200))
    content = hostile.encoded(first, "GIF", save_all=True, append_images=[second])
    opened = read(tmp_path, content, "named.jpg")
    assert opened.convert("L").getextrema() == (10, 10)


CORRUPT = {
    "bomb.png": "exceeds limit",
    "damaged.png": "broken",
    "empty.jpg": "the file is empty",
    "float.tif": "32-bit float pixels have no fixed scale",
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
        with pytest.raises(files.UnreadableImage) as error:
            files.read_image(tmp_path / name)
        message = str(error.value)
        assert message.startswith(f"{tmp_path / name}: ") and reason in message and "\n" not in message


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    for name, reason in (("pipe.png", "not a file"), ("gone.png", "no such file"), (".", "not a file")):
        with pytest.raises(files.UnreadableImage, match=reason):
            files.read_image(tmp_path / name)


def test_odd_names_are_shown_in_one_printable_line():
    assert files.shown("größe/日本.png") == "größe/日本.png"
    assert files.shown("a\nb\x1b") == r"a\nb\x1b"
    assert files.shown(os.fsdecode(b"caf\xe9.png")) == r"caf\xe9.png"


def test_colour_profile_is_kept_where_it_still_fits(tmp_path):
    assert read(tmp_path, hostile.encoded(RGB, "PNG", icc_profile=b"profile")).info == {"icc_profile": b"profile"}
    assert read(tmp_path, hostile.encoded(RGB.convert("CMYK"), "TIFF", icc_profile=b"profile")).info == {}
    huge = os.urandom(files._LARGEST_PROFILE + 1)
    opened = read(tmp_path, hostile.encoded(RGB, "JPEG", icc_profile=huge))
    files.write_png(opened, tmp_path / "huge.png")
    same(files.read_image(tmp_path / "huge.png"), np.asarray(opened), "RGB")


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    return folder, hostile.make_hostile(folder, 200)


def test_listing_agrees_with_what_was_written_and_with_image_folder(hostile_folder):
    folder, names = hostile_folder
    listing = files.find_images(folder)
    assert [n for images in listing.images.values() for n in images] == names and len(names) >= 200
    assert listing.ignored == ("cats/notes.txt",) and listing.loose == ()
    theirs = ImageFolder(folder)
    assert list(listing.images) == theirs.classes
    theirs = [Path(path).relative_to(folder).as_posix() for path, _ in theirs.samples]
    ours = [n for n in names if not n.endswith(".gif")]
    assert sorted(n for n in theirs if not Path(n).name.startswith(".")) == ours


def test_every_hostile_file_is_read_protected_and_within_the_radius(hostile_folder, tmp_path):
    folder, names = hostile_folder
    outputs = files.output_names(names)
    noise = RNG.integers(-8, 9, (3, 32, 32)).astype(np.int8)
    sizes, modes = set(), set()
    for name in names:
        image = files.read_image(folder / name)
        files.write_png(files.apply_noise(image, noise, 8), tmp_path / outputs[name])
        protected = files.read_image(tmp_path / outputs[name])
        # In a handful of pixels the noise may average out, or be clipped away.
        assert files.difference(image, protected) in range(min(image.size) > 4, 9), name
        sizes.add(image.size)
        modes.add(image.mode)
    assert modes == set(files.MODES)
    assert {(1, 1), (7, 300), (300, 7), (200, 150)} <= sizes
    assert sum(1 for path in tmp_path.rglob("*") if path.is_file()) == len(names)


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        RGB.save(tmp_path / "set" / name / "1.png")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    RGB.save(elsewhere / "2.png")
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/a/self").symlink_to(tmp_path / "set/a")
    (tmp_path / "set/b/more").symlink_to(elsewhere)
    (tmp_path / "set/c").symlink_to(elsewhere)
    listing = files.find_images(tmp_path / "set")
    assert listing.images == {"a": ("a/1.png",), "b": ("b/1.png", "b/more/2.png"), "c": ("c/2.png",)}
    assert listing.ignored == ("a/self/", "a/up/")


def test_split_folders(tmp_path):
    for name, found in (("cats", None), ("Val", None), ("Train", ("Train", "Val")), ("test", ("Train", "test"))):
        (tmp_path / name).mkdir()
        assert files.split_folders(tmp_path) == found


def test_output_names_by_example():
    names = ["c/a.jpg", "c/b.jpg", "c/b.PNG", "c/B.tif", "d/b.jpg", "c/x.y.gif", "e/t.jpg", "e/t.png", "e/t.jpg.jpg"]
    assert files.output_names(names) == {
        "c/a.jpg": "c/a.png",
        "c/b.jpg": "c/b.jpg.png",
        "c/b.PNG": "c/b.PNG.png",
        "c/B.tif": "c/B.tif.png",
        "d/b.jpg": "d/b.png",
        "c/x.y.gif": "c/x.y.png",
        "e/t.jpg": "e/t.jpg.png",
        "e/t.png": "e/t.png.png",
        "e/t.jpg.jpg": "e/t.jpg.jpg.png",
    }
    assert files.output_names(["a.png/1.jpg", "a.jpg"]) == {"a.png/1.jpg": "a.png/1.png", "a.jpg": "a.jpg.png"}
    with pytest.raises(ValueError, match=r"no name for the PNG of a\.jpg: a\.jpg\.png is a folder"):
        files.output_names(["a.png/1.jpg", "a.jpg.png/1.jpg", "a.jpg"])


part = st.text("abAB.é", min_size=1, max_size=4).filter(lambda s: s.strip("."))
name = st.tuples(st.sampled_from(["", "c/", "C/", "d/e/"]), part, st.sampled_from([".png", ".jpg", ".PNG", ".jpg.png"]))


@settings(deadline=None)
@given(st.lists(name.map("".join), unique=True, max_size=12))
def test_output_names_never_meet(names):
    outputs = files.output_names(names)
    assert list(outputs) == names
    assert len(set(outputs.values())) == len(names)
    for original, output in outputs.items():
        stem, _ = os.path.splitext(original)
        assert output in (stem + ".png", original + ".png")
        twins = [n for n in names if n != original and os.path.splitext(n)[0].casefold() == stem.casefold()]
        assert not twins or output == original + ".png"


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / ("long" * 60 + ".json")
    files.atomic_write(path, b"first")
    old = os.umask(0)
    os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o666 & ~old

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(path, fail)
    files.atomic_write(path.with_name("second"), lambda file: file.write(b"second"))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == {path.name: b"first", "second": b"second"}
    with pytest.raises(ValueError, match=r"mode L, LA, RGB, RGBA is needed, got CMYK"):
        files.write_png(RGB.convert("CMYK"), tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


images = st.tuples(st.sampled_from(files.MODES), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
noises = arrays.arrays(np.int8, st.tuples(st.just(3), st.integers(1, 6), st.integers(1, 6)))


@settings(deadline=None)
@given(images, noises, st.sampled_from([0, 1, 2.5, 8, 16, 127, 300]))
def test_noise_stays_within_radius_and_box_and_spares_alpha(drawn, noise, radius):
    mode, width, height, seed = drawn
    channels = len(mode)
    shape = (height, width, channels) if channels > 1 else (height, width)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(levels)
    protected = files.apply_noise(image, noise, radius)
    assert (protected.mode, protected.size) == (mode, (width, height))
    assert files.difference(image, protected) <= radius
    assert np.array_equal(np.asarray(image), levels)
    if noise.shape[1:] == (height, width):
        clipped = noise.clip(-min(int(radius), 127), min(int(radius), 127)).astype(int)
        added = np.rint(clipped.mean(0))[..., None] if mode[0] == "L" else np.moveaxis(clipped, 0, -1)
        colour = levels.reshape(height, width, channels)[..., : added.shape[-1]]
        result = np.asarray(protected).reshape(height, width, channels)[..., : added.shape[-1]]
        assert np.array_equal(result, (colour + added).clip(0, 255))


def test_noise_of_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"int8 noise of shape \(3, height, width\) is needed, got float32"):
        files.apply_noise(RGB, np.zeros((3, 4, 4), np.float32), 8)
    with pytest.raises(ValueError, match="write pixel levels: 8, not 8/255"):
        files.apply_noise(RGB, np.zeros((3, 4, 4), np.int8), 8 / 255)


def test_constant_noise_stays_constant_at_any_size():
    noise = np.stack([np.full((32, 32), level, np.int8) for level in (5, -3, 8)])
    for size in ((120, 90), (7, 300), (5, 5), (1, 1)):
        fitted = files.fit_noise(noise, size, 8)
        assert fitted.shape == (3, *size[::-1])
        assert np.array_equal(fitted, np.broadcast_to(noise[:, :1, :1], fitted.shape))


def test_difference_says_what_does_not_match():
    shifted = Image.fromarray(np.asarray(RGBA) + np.uint8([0, 0, 0, 1]))
    for other, message in (
        (RGBA.crop((0, 0, 9, 9)), "the original has 24x16 pixels, the protected image 9x9"),
        (RGB, "the original has mode RGBA, the protected image RGB"),
        (shifted, "the alpha channels differ"),
    ):
        with pytest.raises(ValueError, match=message):
            files.difference(RGBA, other)
    assert files.difference(RGBA, RGBA) == 0
    one = np.asarray(RGB).copy()
    one[5, 6, 1] ^= 1
    assert files.difference(RGB, Image.fromarray(one)) == 1


def test_working_image():
    small = RGB.resize((8, 8))
    assert np.array_equal(files.working_image(small, 8), np.moveaxis(np.asarray(small), -1, 0))
    expected = np.asarray(RGBA.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR))
    assert np.array_equal(files.working_image(RGBA, 8), np.moveaxis(expected, -1, 0))
    grey = files.working_image(RGB.convert("L"), 8)
    assert grey.shape == (3, 8, 8) and (grey == grey[:1]).all()


def test_survival():
    noise = np.kron(RNG.choice([-8, 8], (3, 16, 16)), np.ones((2, 2))).astype(np.int8)
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    assert files.noise_survival(grey, files.apply_noise(grey, noise, 8), noise) == pytest.approx((1, 1))
    large = grey.resize((120, 90))
    correlation, share = files.noise_survival(large, files.apply_noise(large, noise, 8), noise)
    assert 0.97 < correlation < 1 and 0.7 < share < 1
    # Better than what a bilinear enlargement alone would leave.
    plain = files._resized(noise.astype(np.float32), (120, 90), Image.Resampling.BILINEAR)
    plain = Image.fromarray(np.moveaxis(128 + np.rint(plain), 0, -1).astype(np.uint8))
    assert files.noise_survival(large, plain, noise) < (correlation, share)
    assert files.noise_survival(grey, grey, noise) == (0, 0)
    assert files.noise_survival(grey, grey, 0 * noise) == (0, 0)
