"""Images as a viewer shows them: made with Pillow or byte by byte, and compared with values worked out by hand."""

import io
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.files.tables import read_table
from quickbloom.common.datasets.own.text import Text
from quickbloom.common.errors import DataError

image_module = pytest.importorskip("PIL.Image")
SIDE = 8


def png(width: int, depth: int, color: int, rows: Iterable[bytes], more: bytes = b"") -> bytes:
    """A PNG, byte by byte. `color`: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA; `more`: chunks before the pixels."""
    lines = [b"\0" + row for row in rows]
    header = struct.pack(">IIBBBBB", width, len(lines), depth, color, 0, 0, 0)
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(b"".join(lines))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(form: str, samples: bytes, tags: dict[int, tuple[int, int]]) -> bytes:
    """A TIFF of SIDE x SIDE samples. `form`: "<" or ">", the order of bytes; `tags`: (type, value) beside the size."""
    head = b"II*\0" if form == "<" else b"MM\0*"
    known = {
        256: (4, SIDE),
        257: (4, SIDE),
        259: (3, 1),
        273: (4, 8),
        277: (3, 1),
        278: (4, SIDE),
        279: (4, len(samples)),
        **tags,
    }
    entries = b"".join(
        struct.pack(form + "HHI", tag, kind, 1)
        + (struct.pack(form + "HH", value, 0) if kind == 3 else struct.pack(form + "I", value))
        for tag, (kind, value) in sorted(known.items())
    )
    table = struct.pack(form + "H", len(known)) + entries + struct.pack(form + "I", 0)
    return head + struct.pack(form + "I", 8 + len(samples)) + samples + table


def saved(image: Any, form: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class Images(NamedTuple):
    """What is read of a folder."""

    pixels: Any
    classes: list[str | None]
    tasks: list[str | None]
    remarks: list[str]


def read(folder: Path, side: int = SIDE) -> Images:
    table = read_table(str(folder), side)
    classes, tasks = table["class"], table["task"]
    assert isinstance(classes, Text)
    assert isinstance(tasks, Text)
    return Images(table["pixels"], classes.cells(), tasks.cells(), table.remarks)


def seen(tmp_path: Path, name: str, content: bytes, side: int = SIDE) -> tuple[Any, list[str]]:
    """(the pixels of one image [side, side], what is said of it)"""
    found = read(put(tmp_path, {f"c/{name}": content}), side)
    assert found.pixels.shape == (1, 1, side, side)
    return found.pixels[0, 0], found.remarks


RAMP = (np.arange(SIDE)[None] * 7000 + np.arange(SIDE)[:, None] * 1900).astype(np.uint16)
"""0 .. 62300"""


def sixteen_bits() -> dict[str, tuple[str, bytes]]:
    white_is_zero = {258: (3, 16), 262: (3, 0)}
    wide_rgb = np.repeat(RAMP.astype(">u2")[..., None], 3, 2)
    opaque = np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2).astype(">u2")
    return {
        "mode I;16": ("a.png", saved(image_module.fromarray(RAMP), "PNG")),
        "mode I": ("a.pgm", saved(image_module.fromarray(RAMP.astype(np.int32)), "PPM")),
        "grey, by hand": ("a.png", png(SIDE, 16, 0, [row.tobytes() for row in RAMP.astype(">u2")])),
        "RGB": ("a.png", png(SIDE, 16, 2, [row.tobytes() for row in wide_rgb])),
        "with alpha": ("a.png", png(SIDE, 16, 4, [row.tobytes() for row in opaque])),
        "TIFF": ("a.tif", saved(image_module.fromarray(RAMP), "TIFF")),
        "TIFF, compressed": ("a.TIFF", saved(image_module.fromarray(RAMP), "TIFF", compression="tiff_lzw")),
        "TIFF, big-endian": ("a.tif", tiff(">", RAMP.astype(">u2").tobytes(), {258: (3, 16), 262: (3, 1)})),
        "TIFF, white is 0": ("a.tif", tiff("<", (65535 - RAMP).astype("<u2").tobytes(), white_is_zero)),
        "PGM": ("a.PGM", b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes()),
        "TIFF of decimal numbers": ("a.tif", saved(image_module.fromarray((RAMP / 65535).astype(np.float32)), "TIFF")),
        "JPEG 2000": ("a.jp2", saved(image_module.fromarray(RAMP), "JPEG2000")),
    }


@pytest.mark.parametrize("kind", list(sixteen_bits()))
def test_images_of_more_than_8_bits_keep_their_shades(tmp_path: Path, kind: str) -> None:
    pixels, _ = seen(tmp_path, *sixteen_bits()[kind])
    np.testing.assert_allclose(pixels, RAMP / 65535, atol=1.1 / 255)


def test_images_of_16_bits_are_scaled_as_those_of_8(tmp_path: Path) -> None:
    eight = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    eight[:, :10] = [0] * 5 + [255] * 5  # beside an edge the curve between pixels goes beyond black and white
    wide, _ = seen(tmp_path / "a", "a.png", saved(image_module.fromarray(eight.astype(np.uint16) * 257), "PNG"))
    plain, _ = seen(tmp_path / "b", "a.png", saved(image_module.fromarray(eight), "PNG"))
    np.testing.assert_allclose(wide, plain, atol=3 / 255)  # of 8 bits, each of the two ways is rounded and cut off
    assert wide.min() >= 0
    assert wide.max() <= 1


def test_a_tiff_of_12_bits_is_white_at_4095(tmp_path: Path) -> None:
    level = np.full((SIDE, SIDE), 1024)
    packed = bytes(b for a, c in level.reshape(-1, 2) for b in (a >> 4, (a & 15) << 4 | c >> 8, c & 255))
    pixels, _ = seen(tmp_path, "a.tif", tiff("<", packed, {258: (3, 12), 262: (3, 1)}))
    np.testing.assert_allclose(pixels, 1024 / 4095, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "a.tif",
            tiff("<", RAMP.astype("<i4").tobytes(), {258: (3, 32), 262: (3, 1), 339: (3, 2)}),
            "nothing says which is white",
        ),
        (
            "a.tif",
            tiff(">", RAMP.astype(">i2").tobytes(), {258: (3, 16), 262: (3, 1), 339: (3, 2)}),
            "nothing says which is white",
        ),
        (
            "a.tif",
            saved(image_module.fromarray(RAMP.astype(np.float32)), "TIFF"),
            "decimal pixels of 0 to 62300, 0 .* was expected",
        ),
        ("a.pfm", saved(image_module.fromarray(np.full((8, 8), np.nan, np.float32)), "PPM"), "decimal pixels of nan to nan"),
        ("a.tif", saved(image_module.fromarray(np.full((8, 8), -0.5, np.float32)), "TIFF"), "decimal pixels of -0.5 to -0.5"),
    ],
    ids=["32 bits", "with a sign", "large", "NaN", "negative"],
)
def test_pixels_of_which_nothing_says_what_is_white_are_refused(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        seen(tmp_path, name, content)


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("PNG", "L"),
        ("PNG", "RGB"),
        ("BMP", "RGB"),
        ("TIFF", "L"),
        ("TIFF", "RGB"),
        ("PPM", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "RGB"),
    ],
)
def test_ordinary_images_are_as_before_to_the_last_bit(tmp_path: Path, form: str, mode: str) -> None:
    """Grey, scaled, divided in float64: the inputs of models that are in use must not move."""
    rng = np.random.default_rng(0)
    shape = (23, 31) if mode == "L" else (23, 31, 3)
    content = saved(image_module.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), form)
    pixels, remarks = seen(tmp_path, f"a.{form.lower()}", content)
    before = np.asarray(image_module.open(io.BytesIO(content)).convert("L").resize((SIDE, SIDE)), dtype=np.float64) / 255
    np.testing.assert_array_equal(pixels, before.astype(np.float32))
    assert not remarks
    levels = np.arange(256)
    np.testing.assert_array_equal(levels.astype(np.float32) / np.float32(255), (levels / 255).astype(np.float32))


HALF = np.zeros((SIDE, SIDE), dtype=np.uint8)
HALF[:, SIDE // 2 :] = 255
"""Transparent on the left, opaque on the right."""
OPAQUE = np.full_like(HALF, 255)


def transparent() -> dict[str, tuple[str, bytes]]:
    """In each, 0 is to be seen on the right; on the left is nothing, whatever colour that has."""
    black = np.zeros_like(HALF)
    rgba = image_module.fromarray(np.stack([black, black, black, HALF], 2), "RGBA")
    grey = image_module.fromarray(np.stack([black, HALF], 2), "LA")
    palette = image_module.fromarray((HALF > 0).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 0, 0])
    left_200 = image_module.fromarray(np.where(HALF > 0, 0, 200).astype(np.uint8))
    wide = [struct.pack(">8H", *[700] * 4, *[0] * 4)] * SIDE
    named = chunk(b"tRNS", struct.pack(">H", 700))
    wide_rgb = [struct.pack(">24H", *[65000, 300, 90] * 4, *[0] * 12)] * SIDE
    return {
        "RGBA": ("a.png", saved(rgba, "PNG")),
        "LA": ("a.png", saved(grey, "PNG")),
        "palette": ("a.png", saved(palette, "PNG", transparency=0)),
        "palette with alphas": ("a.png", saved(palette, "PNG", transparency=bytes([0, 255]))),
        "grey, one shade": ("a.png", saved(left_200, "PNG", transparency=200)),
        "RGB, one colour": ("a.png", saved(left_200.convert("RGB"), "PNG", transparency=(200, 200, 200))),
        "2 bits, one shade": ("a.png", png(8, 2, 0, [b"\x55\x00"] * SIDE, chunk(b"tRNS", b"\0\1"))),
        "4 bits, one shade": ("a.png", png(8, 4, 0, [b"\x77\x77\0\0"] * SIDE, chunk(b"tRNS", b"\0\7"))),
        "1 bit, one shade": ("a.png", png(8, 1, 0, [b"\xf0"] * SIDE, chunk(b"tRNS", b"\0\1"))),
        "16 bits, one shade": ("a.png", png(8, 16, 0, wide, named)),
        "16 bits RGB, one colour": ("a.png", png(8, 16, 2, wide_rgb, chunk(b"tRNS", struct.pack(">3H", 65000, 300, 90)))),
        "GIF": ("a.gif", saved(palette, "GIF", transparency=0)),
        "WebP": ("a.webp", saved(rgba, "WEBP", lossless=True)),
        "TIFF": ("a.tif", saved(rgba, "TIFF")),
        "TIFF, grey": ("a.tif", saved(grey, "TIFF")),
        "TGA": ("a.tga", saved(rgba, "TGA")),
        "ICO": ("a.ico", saved(rgba.resize((16, 16), 0), "ICO", sizes=[(16, 16)])),
    }


@pytest.mark.parametrize("kind", list(transparent()))
def test_what_is_transparent_is_white(tmp_path: Path, kind: str) -> None:
    pixels, remarks = seen(tmp_path, *transparent()[kind])
    edge = slice(2, 6)  # scaling may bend what lies at it
    assert pixels[:, :2].min() > 0.98, pixels
    assert pixels[:, 6:].max() < 0.02, pixels
    assert pixels[:, edge].min() >= 0
    assert "1 image is transparent in parts and laid on white" in remarks


def test_half_transparent_black_is_grey(tmp_path: Path) -> None:
    """0.25 of black on white: 255 * (1 - 64 / 255)."""
    pixels, _ = seen(tmp_path, "a.png", saved(image_module.new("RGBA", (9, 9), (0, 0, 0, 64)), "PNG"))
    np.testing.assert_allclose(pixels, 1 - 64 / 255, atol=1.1 / 255)


def test_an_image_that_is_opaque_all_over_is_as_without_alpha(tmp_path: Path) -> None:
    rgb = image_module.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    plain, _ = seen(tmp_path / "a", "a.png", saved(rgb, "PNG"))
    alpha, remarks = seen(tmp_path / "b", "a.png", saved(rgb.convert("RGBA"), "PNG"))
    np.testing.assert_array_equal(plain, alpha)
    assert not remarks


def test_white_on_transparent_is_remarked_on(tmp_path: Path) -> None:
    rgba = image_module.fromarray(np.stack([OPAQUE, OPAQUE, OPAQUE, HALF], 2), "RGBA")
    other = saved(image_module.fromarray(HALF), "PNG")
    remarks = read(put(tmp_path, {"c/a.png": saved(rgba, "PNG"), "c/b.png": other})).remarks
    assert any("1 transparent image is all white on white" in remark for remark in remarks)


SHADES = np.kron(np.array([[0, 90], [170, 255]], dtype=np.uint8), np.ones((8, 8), dtype=np.uint8))
"""Four squares: 0 upper left, 90 upper right, 170 lower left, 255 lower right."""
UPRIGHT = {
    1: SHADES,
    2: SHADES[:, ::-1],
    3: SHADES[::-1, ::-1],
    4: SHADES[::-1],
    5: SHADES.T,
    6: np.rot90(SHADES, -1),
    7: SHADES[::-1, ::-1].T,
    8: np.rot90(SHADES),
}
"""What is to be seen of an image with this orientation, as the EXIF standard has it: one with 6 is turned clockwise."""


@pytest.mark.parametrize("orientation", list(UPRIGHT))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "TIFF of 16 bits", "TIFF, compressed", "AVIF"])
def test_images_are_turned_as_the_exif_data_say(tmp_path: Path, form: str, orientation: int) -> None:
    exif = image_module.Exif()
    exif[274] = orientation
    image = image_module.fromarray(SHADES.astype(np.uint16) * 257 if "16" in form else SHADES)
    kind, options = form.split()[0].strip(","), {"compression": "tiff_lzw"} if "compressed" in form else {}
    if kind not in image_module.registered_extensions().values():
        pytest.skip(f"this Pillow has no {kind}")
    pixels, remarks = seen(tmp_path, f"a.{kind.lower()}", saved(image, kind, exif=exif, **options), side=16)
    corners = np.ix_([3, 12], [3, 12])
    np.testing.assert_allclose(pixels[corners], UPRIGHT[orientation][corners] / 255, atol=0.03)
    assert remarks == (["1 image is turned or mirrored as the EXIF data say"] if orientation > 1 else [])


def test_damaged_exif_data_do_not_matter(tmp_path: Path) -> None:
    content = saved(image_module.fromarray(SHADES), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    pixels, _ = seen(tmp_path, "a.jpg", content)
    assert pixels[0, 0] < 0.1 < 0.9 < pixels[-1, -1]


def test_of_several_frames_or_pages_the_first_is_used_and_that_is_said(tmp_path: Path) -> None:
    one, other = (image_module.fromarray(shades) for shades in (SHADES, SHADES[::-1]))
    files = {
        "c/a.gif": saved(one, "GIF", save_all=True, append_images=[other]),
        "c/b.tif": saved(one, "TIFF", save_all=True, append_images=[other]),
        "c/c.png": saved(one, "PNG", save_all=True, append_images=[other]),
        "c/d.webp": saved(one, "WEBP", save_all=True, append_images=[other], lossless=True),
        "c/e.png": saved(one, "PNG"),
    }
    found = read(put(tmp_path, files))
    np.testing.assert_allclose(found.pixels, np.broadcast_to(found.pixels[4], found.pixels.shape), atol=0.02)
    assert "4 images are of several frames or pages, of which the first is used" in found.remarks


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "I;16", "L", "HSV"])
def test_shades_are_the_same_in_every_mode(tmp_path: Path, mode: str) -> None:
    black_white = image_module.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((8, 8), dtype=np.uint8)))
    image = black_white.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "HSV") else black_white.convert(mode)
    form = {"CMYK": "TIFF", "YCbCr": "JPEG", "HSV": "TIFF"}.get(mode, "PNG")
    if mode == "I;16":
        image = image_module.fromarray(np.asarray(black_white, dtype=np.uint16) * 257)
    if mode == "HSV":
        image = image.convert("RGB")
    pixels, _ = seen(tmp_path, f"a.{form.lower()}", saved(image, form), side=16)
    np.testing.assert_allclose(pixels[np.ix_([3, 12], [3, 12])], np.eye(2), atol=0.02)


def test_hidden_and_system_files_are_passed_over(tmp_path: Path) -> None:
    image, rubbish = saved(image_module.fromarray(SHADES), "PNG"), b"\0\5\x16\7"
    files = {f"t/{c}/{i}.png": image for c in "ab" for i in range(4)} | {
        "t/.ipynb_checkpoints/0-checkpoint.png": image,
        "t/a/.ipynb_checkpoints/0-checkpoint.png": image,
        "t/a/._0.png": rubbish,
        "__MACOSX/t/a/0.png": rubbish,
        "t/@eaDir/0.jpg": image,
        ".git/x/0.png": rubbish,
        "$RECYCLE.BIN/c/0.png": image,
        "System Volume Information/c/0.png": image,
        "t/.DS_Store": rubbish,
        "t/b/Thumbs.db": rubbish,
        "t/b/desktop.ini": b"[.ShellClassInfo]",
    }
    found = read(put(tmp_path, files))
    assert (found.classes, set(found.tasks)) == (list("aaaabbbb"), {"t"})  # in the order of the paths
    (remark,) = found.remarks
    assert remark.startswith(
        "8 hidden or system files or folders are passed over: $RECYCLE.BIN, ._0.png, .git, .ipynb_checkpoints"
    )


def test_a_hidden_folder_may_be_named(tmp_path: Path) -> None:
    image = saved(image_module.fromarray(SHADES), "PNG")
    assert len(read(put(tmp_path / ".cache", {"c/a.png": image})).classes) == 1


def test_every_image_is_read_whatever_its_suffix_and_the_others_are_counted(tmp_path: Path) -> None:
    image = image_module.fromarray(SHADES)
    images = {
        "t/c/a.TIF": saved(image, "TIFF"),
        "t/c/b.Png": saved(image, "PNG"),
        "t/c/c.jfif": saved(image, "JPEG"),
        "t/c/d": saved(image, "PNG"),
        "t/c/e.scan": saved(image, "TIFF"),
        "t/c/f.pgm": saved(image, "PPM"),
        "t/c/g.tga": saved(image, "TGA"),
        "t/c/h.jp2": saved(image, "JPEG2000"),
        "t/c/i.pcx": saved(image, "PCX"),
        "t/c/j.jpg": saved(image, "PNG"),  # its content counts
    }
    others = {
        "README": b"words",
        "t/labels.csv": b"a,b",
        "t/c/notes.txt": b"P5 is a format",
        "t/c/more.txt": b"",
        "t/c/x.heic": b"\0\0\0\x18ftypheic",
        "t/c/y.dng": saved(image, "TIFF"),  # the small preview of a camera
        "t/c/z.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    found = read(put(tmp_path, images | others))
    assert len(found.classes) == len(images)
    np.testing.assert_allclose(found.pixels, np.broadcast_to(found.pixels[0], found.pixels.shape), atol=0.02)
    not_read, others_told = found.remarks
    assert not_read.startswith(
        "3 images are of a format that is not read and passed over: 1 .dng, 1 .eps, 1 .heic; save as PNG"
    )
    assert others_told == "4 files are no images and are passed over: 2 .txt, 1 .csv, 1 without a suffix"


def test_a_folder_without_images_that_are_read_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images .*; 2 images are of a format that is not read .* 2 \.heic"):
        read(put(tmp_path, {"c/a.heic": b"x", "c/b.HEIC": b"y"}))


def test_links_to_folders_are_not_followed_and_that_is_said(tmp_path: Path) -> None:
    image = saved(image_module.fromarray(SHADES), "PNG")
    folder = put(tmp_path / "in", {"t/c/a.png": image})
    outside = put(tmp_path / "out", {"x.png": image})
    (folder / "t" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "t" / "away").symlink_to(outside, target_is_directory=True)
    (folder / "t" / "c" / "gone.png").symlink_to(tmp_path / "nowhere")
    (folder / "t" / "c" / "b.png").symlink_to(outside / "x.png")
    found = read(folder)
    assert len(found.classes) == 2
    assert found.remarks == ["3 links are not followed: again, away, gone.png; put there what should be read"]


def test_a_folder_name_that_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        Path(os.fsdecode(folder)).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    Path(os.fsdecode(folder + b"/a.png")).write_bytes(saved(image_module.fromarray(SHADES), "PNG"))
    with pytest.raises(DataError, match=r"the name of the folder 'caf\\xe9' is not in UTF-8: rename it"):
        read(tmp_path)


def test_class_names_are_the_same_from_every_system(tmp_path: Path) -> None:
    image = saved(image_module.fromarray(SHADES), "PNG")
    found = read(put(tmp_path, {"t/cafe\u0301/a.png": image, "t/caf\u00e9/b.png": image}))
    assert set(found.classes) == {"caf\u00e9"}


def test_a_truncated_image_is_refused_whatever_its_suffix(tmp_path: Path) -> None:
    content = saved(image_module.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99), dtype=np.uint8)), "PNG")
    for name in ("a.png", "a"):
        with pytest.raises(DataError, match=r"the image '.*' cannot be read .*: remove or replace it"):
            seen(tmp_path / name, name, content[: len(content) // 2])


def test_images_as_good_as_black_are_remarked_on(tmp_path: Path) -> None:
    camera = saved(image_module.fromarray(RAMP // 16), "PNG")  # 12 bits in 16
    bright = saved(image_module.fromarray(SHADES), "PNG")
    assert read(put(tmp_path, {"c/a.png": camera, "c/b.png": bright})).remarks == [
        "no pixel of 1 image with more than 8 bits has more than 5.9 % of white: spread their values if they are not meant to "
        "be dark"
    ]
    black = saved(image_module.fromarray(SHADES // 255), "PNG")
    assert read(put(tmp_path / "m", {"c/a.png": black})).remarks == [
        "all pixels of all images are between 0 and 0.00392: there is nothing to tell them apart by"
    ]


def test_remarks_on_images_reach_the_data_set(tmp_path: Path) -> None:
    files = {f"t/{c}/{i}.png": saved(image_module.fromarray(SHADES // (1 + i)), "PNG") for c in "ab" for i in range(4)}
    own = Own(OwnOptions(path=str(put(tmp_path, {**files, "t/a/notes.txt": b"x"}))), Path())
    assert own.remarks == ["1 file is no image and is passed over: 1 .txt"]


def test_more_images_than_memory_is_taken_for_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.common.datasets.own.files.tables.LIMIT", 1000)
    folder = put(tmp_path, {f"c/{i}.png": saved(image_module.fromarray(SHADES), "PNG") for i in range(4)})
    with pytest.raises(DataError, match=r"the 4 images of .* at most 0.0 GB are read"):
        read(folder)
