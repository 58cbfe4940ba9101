"""A folder of images as people have them: every file type and mode, odd sizes, odd names; and broken files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

CLASSES = ("-kühe", "cats", "Äpfel & Birnen", "日本 'ねこ'")
SIZES = ((1, 1), (7, 300), (200, 150), (1, 9), (33, 31), (32, 32), (64, 48), (5, 8), (120, 90), (13, 1))


def pixels(rng: np.random.Generator, width: int, height: int, channels: int = 3) -> np.ndarray:
    """A smooth random picture, uint8 [height,width,channels], with full black and white in it."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 4), dtype=np.uint8), "RGBA")
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)[..., :channels]
    return (smooth * 1.5 - 64).clip(0, 255).astype(np.uint8)


def grey16(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A picture of mode I;16 that uses all 16 bits."""
    return Image.fromarray(deep(rng, width, height, 1)[..., 0])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_by_hand(levels: np.ndarray, more: bytes = b"") -> bytes:
    """A PNG of uint8 or uint16 levels [height,width,channels], 1 to 4 of them; more: chunks before the pixels."""
    height, width, channels = levels.shape
    bits, kind = 8 * levels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(levels.dtype.newbyteorder(">")))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def png_rgb_with_key(levels: np.ndarray, key: tuple[int, int, int]) -> bytes:
    """An RGB PNG whose colour `key` is transparent (tRNS)."""
    return png_by_hand(levels, _chunk(b"tRNS", struct.pack(">HHH", *key)))


def png_grey_with_key(levels: np.ndarray, key: int) -> bytes:
    """A grey PNG of uint16 levels [height,width] whose level `key` is transparent (tRNS)."""
    return png_by_hand(levels[..., None], _chunk(b"tRNS", struct.pack(">H", key)))


def deep(rng: np.random.Generator, width: int, height: int, channels: int) -> np.ndarray:
    """A picture that uses all 16 bits, uint16 [height,width,channels]."""
    fine = rng.integers(0, 256, (height, width, channels), dtype=np.uint16)
    return pixels(rng, width, height, channels).astype(np.uint16) * 256 + fine


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """The bytes of a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _palette(rgb: Image.Image) -> Image.Image:
    return rgb.quantize(16)


def _turned(rgb: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(rgb, "JPEG", exif=exif)


def kinds(rng: np.random.Generator, width: int, height: int) -> dict[str, bytes]:
    """File name -> bytes: one file of every kind, of one size; the names are unique without regard to case."""
    rgb = Image.fromarray(pixels(rng, width, height))
    rgba = Image.fromarray(pixels(rng, width, height, 4), "RGBA")
    deep_grey = grey16(rng, width, height)
    half = bytes(range(0, 256, 16))  # the alpha of 16 palette entries
    files = {
        "photo.jpg": encoded(rgb, "JPEG"),
        "grey.JPEG": encoded(rgb.convert("L"), "JPEG"),
        "print.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "plain.png": encoded(rgb, "PNG"),
        "alpha.PNG": encoded(rgba, "PNG"),
        "grey.png": encoded(rgb.convert("L"), "PNG"),
        "grey alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(_palette(rgb), "PNG"),
        "palette with alpha.png": encoded(_palette(rgb), "PNG", transparency=half),
        "palette with hole.png": encoded(_palette(rgb), "PNG", transparency=0),
        "bits.png": encoded(rgb.convert("1"), "PNG"),
        "deep.png": encoded(deep_grey, "PNG"),
        "deep colours.png": png_by_hand(deep(rng, width, height, 3)),
        "deep grey alpha.png": png_by_hand(deep(rng, width, height, 2)),
        "key.png": png_rgb_with_key(np.asarray(rgb), tuple(int(v) for v in np.asarray(rgb)[0, 0])),
        "lossy.webp": encoded(rgb, "WEBP", quality=60),
        "alpha.webp": encoded(rgba, "WEBP", lossless=True),
        "bitmap.bmp": encoded(rgb, "BMP"),
        "palette.bmp": encoded(_palette(rgb), "BMP"),
        "bits.bmp": encoded(rgb.convert("1"), "BMP"),
        "scan.tif": encoded(rgb, "TIFF"),
        "alpha.tiff": encoded(rgba, "TIFF", compression="tiff_lzw"),
        "print.tif": encoded(rgb.convert("CMYK"), "TIFF"),
        "deep.TIF": encoded(deep_grey, "TIFF"),
        "lab.tiff": encoded(rgb.convert("LAB"), "TIFF"),
        "bits.tiff": encoded(rgb.convert("1"), "TIFF", compression="group4"),
        "moving.gif": encoded(_palette(rgb), "GIF", save_all=True, append_images=[_palette(rgb.convert("L"))]),
        "moving.webp": encoded(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
        "stereo.jpg": encoded(rgb, "MPO", save_all=True, append_images=[rgb]),
        "map.ppm": encoded(rgb, "PPM"),
        "really a png.jpg": encoded(rgb, "PNG"),
    }
    return files | {f"turned {way}.jpg": _turned(rgb, way) for way in range(1, 9)}


ODD_NAMES = ("-rf.png", "a  b.png", 'quo"te.png', "it's.png", "größe.png", "z.y.x.png", "new\nline.png", "%s{0}.png")


def make_hostile(folder: Path, n: int = 200, seed: int = 0) -> list[str]:
    """Writes at least n image files (and some that are none) in CLASSES below folder; their relative names, sorted."""
    rng = np.random.default_rng(seed)
    written = []

    def write(name: str, content: bytes) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        written.append(name)

    for label, name in enumerate(CLASSES):
        same = encoded(Image.fromarray(pixels(rng, 20, 10 + label)), "PNG")
        for odd in (*ODD_NAMES, "twin.png", "twin.jpg", "Twin.JPG.png"):
            write(f"{name}/{odd}", same)
    turn = 0
    while len(written) < n:
        for i, (file, content) in enumerate(kinds(rng, *SIZES[turn % len(SIZES)]).items()):
            below = ("", "nested/", "nested/déeper/still/")[i % 3]
            write(f"{CLASSES[(turn + i) % len(CLASSES)]}/{below}{turn} {file}", content)
        turn += 1
    (folder / CLASSES[1] / "notes.txt").write_text("not an image")
    (folder / CLASSES[1] / ".hidden.png").write_bytes(b"not an image either")
    return sorted(written)


def make_corrupt(folder: Path) -> list[str]:
    """Writes files that are no images, though their names say so, into folder; their names, sorted."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    files = {f"truncated.{kind.lower()}": encoded(rgb, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")}
    files = {name: content[: len(content) // 2] for name, content in files.items()}
    damaged = bytearray(encoded(rgb, "PNG"))
    damaged[len(damaged) // 2] ^= 255
    files |= {"empty.jpg": b"", "text.png": b"<html>404</html>", "damaged.png": bytes(damaged)}
    files["script.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    files["bomb.png"] = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0"))
    header = struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)
    files["no palette.png"] = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"\0\0"))
    files["no palette.png"] += _chunk(b"IEND", b"")
    files["float.tif"] = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return sorted(files)
