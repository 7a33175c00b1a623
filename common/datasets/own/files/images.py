"""One image file as a viewer shows it: upright, on white, in grey from 0 (black) to 1 (white).

Pillow decodes it. This module adds what Pillow's conversion to grey leaves out: more than 8 bits,
transparency, and the orientation in the EXIF data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import DataError, in_one_line
from quickbloom.common.files import shown

_Read = TypeVar("_Read")
_MOST_PIXELS = 50_000_000
_BY_CONTENT = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
"""Formats that are recognised by the start of the file."""
_BY_SUFFIX = ("DIB", "ICO", "PCX", "SGI", "TGA")
"""Formats that need the suffix, since any file may look like one.

All other formats are refused: for them Pillow starts programs (EPS), unpacks archives (FITS), or
has poorly maintained readers.
"""
_ORIENTATION, _BITS, _PHOTOMETRIC = 274, 258, 262
"""Tags of EXIF and TIFF."""
_WIDE = ("I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Notes:
    """Changes made to an image, and facts to report about it."""

    turned: bool = False
    laid_on_white: bool = False
    vanished: bool = False
    """True if nothing is visible on white although the image is not fully transparent."""
    frames: bool = False
    brightest: float | None = None
    """Brightest pixel of an image with more than 8 bits, in 0..1."""


def formats_of(file: Path) -> list[str]:
    """Return the formats that a file of this name may have, among those that this Pillow reads."""
    Image.init()
    own = Image.registered_extensions().get(file.suffix.lower())
    return [name for name in (*_BY_CONTENT, *_BY_SUFFIX) if name in Image.OPEN and (name in _BY_CONTENT or name == own)]


def has_image_suffix(file: Path) -> bool:
    """Return whether the suffix names an image format that is read."""
    Image.init()
    name = Image.registered_extensions().get(file.suffix.lower(), "")
    return name == "MPO" or (
        name in Image.OPEN and name in (*_BY_CONTENT, *_BY_SUFFIX)
    )  # MPO: a phone's JPEG with more pictures inside


def looks_like_image(file: Path) -> bool:
    """Return whether the file begins like an image."""
    try:
        with Image.open(file, formats=formats_of(file)):
            return True
    except Exception:
        return False


def read_image(file: Path, side: int) -> tuple[Array, Notes]:
    """Return the image in `file` as float32 [side, side] in 0..1. Raises DataError if it is damaged, too large or ambiguous."""
    return _opened(file, lambda image, told: _read(image, side, told))


def read_picture(file: Path, shorter: int) -> Array:
    """Return the image in `file` in colour: uint8 [height, width, 3], its shorter side at most `shorter` pixels.

    It is upright and on white, as in `read_image`. Raises DataError like that.
    """
    return _opened(file, lambda image, told: _in_colour(image, shorter, told))


def _in_colour(image: Any, shorter: int, told: str) -> Array:
    raw = _raw_mode(image)
    if image.format == "JPEG":
        image.draft(None, (2 * shorter, 2 * shorter))  # decodes a large photo at a fraction of its size
    image.load()
    upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    if upright.mode in (*_WIDE, "I", "F"):
        pixels, _, _ = _wide(image, upright, None, told)
        upright = Image.fromarray((pixels * 255).round().astype(np.uint8))
    elif _has_alpha(upright):
        upright = _on_white(_with_alpha(upright, raw))[0]
    picture = upright.convert("RGB")
    if shorter and min(picture.size) > shorter:
        scale = shorter / min(picture.size)
        picture = picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC)
    return np.array(picture, dtype=np.uint8)  # a copy, since Pillow's own memory cannot be written to


def _opened(file: Path, read: Callable[[Any, str], _Read]) -> _Read:
    told = shown(file)
    try:
        with Image.open(file, formats=formats_of(file)) as image:
            if prod(image.size) > _MOST_PIXELS:
                raise DataError(f"the image '{told}' claims {prod(image.size)} pixels, at most {_MOST_PIXELS} are read", told)
            return read(image, told)
    except DataError:
        raise
    except Exception as error:  # pillow raises a dozen types for damaged images
        reason = in_one_line(error)
        raise DataError(f"the image '{told}' cannot be read ({reason}): remove or replace it", reason, told) from error


def _read(image: Any, side: int, told: str) -> tuple[Array, Notes]:
    raw = _raw_mode(image)
    turned = image.format == "TIFF" and _orientation(image) > 1  # Pillow rotates these while decoding
    image.load()
    upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
    wide = upright.mode in (*_WIDE, "I", "F")
    pixels, laid, vanished = _wide(image, upright, side, told) if wide else _eight_bits(upright, raw, side)
    brightest = float(pixels.max()) if wide and upright.mode != "F" else None
    return pixels, Notes(turned or upright is not image, laid, vanished, _has_frames(image), brightest)


def _raw_mode(image: Any) -> str:
    """Return how a PNG packs its samples, such as "L;2"; known only before decoding."""
    packed = image.tile[0][3] if image.format == "PNG" and image.tile else ""
    return packed if isinstance(packed, str) else ""


def _orientation(image: Any) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data: a viewer shows the image as it is
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _has_frames(image: Any) -> bool:
    """Return whether the image is animated or has pages. The second picture in a phone's photo is a preview or a depth map."""
    if image.format == "MPO":
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # only the first frame has to be readable
        return False


def _eight_bits(image: Any, raw: str, side: int) -> tuple[Array, bool, bool]:
    laid = vanished = False
    if _has_alpha(image):
        image, laid, vanished = _on_white(_with_alpha(image, raw))
    # The float32 quotient is correctly rounded, since both operands are exact.
    return np.asarray(image.convert("L").resize((side, side)), dtype=np.float32) / np.float32(255), laid, vanished


def _has_alpha(image: Any) -> bool:
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette.endswith("A")


def _with_alpha(image: Any, raw: str) -> Any:
    """Return the image as RGBA."""
    if image.mode == "La":
        return image.convert("LA").convert("RGBA")
    clear = image.info.get("transparency")
    # A PNG gives the transparent colour at its own bit depth, but Pillow has expanded the pixels to 8 bits.
    if raw in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    if raw == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")


def _on_white(image: Any) -> tuple[Any, bool, bool]:
    alpha = image.getchannel("A").getextrema()
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    vanished = alpha[1] > 0 and alpha[0] < 255 and white.convert("L").getextrema()[0] == 255
    return white, alpha[0] < 255, vanished


def _wide(image: Any, upright: Any, side: int | None, told: str) -> tuple[Array, bool, bool]:
    """Return pixels of 16 bits or decimal ones, scaled, with flags for transparency and for a vanished image.

    `side`: pixels each way; None: as many as the image has.
    """
    values = np.asarray(upright)
    clear = image.info.get("transparency")
    pixels = values.astype(np.float32) / np.float32(_white(image, upright.mode, told))
    if upright.mode == "F":
        _require_unit(pixels, told)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow inverts only 8-bit images
        pixels = 1 - pixels
    transparent = values == clear if isinstance(clear, int) else np.zeros(values.shape, dtype=bool)
    pixels[transparent] = 1
    vanished = bool(transparent.any() and not transparent.all() and (pixels == 1).all())
    scaled = pixels if side is None else np.asarray(Image.fromarray(pixels).resize((side, side)))
    return scaled.clip(0, 1), bool(transparent.any()), vanished  # bicubic interpolation overshoots


def _white(image: Any, mode: str, told: str) -> float:
    """Return the value of white. Raises DataError if it is unknown."""
    if mode == "F":
        return 1.0
    if mode in _WIDE:
        bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
        return float(2**bits - 1)
    if image.format in ("PNG", "PPM"):  # of 16 bits
        return 65535.0
    raise DataError(
        f"the image '{told}' has pixels of 32 bits or with a sign, and nothing says which is white: save it with 8 or 16 bits",
        told,
    )


def _require_unit(pixels: Array, told: str) -> None:
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        span = f"{low:g} to {high:g}"
        raise DataError(
            f"the image '{told}' has decimal pixels of {span}, 0 (black) to 1 (white) was expected: divide them by what is "
            "white, or save it with 8 or 16 bits",
            told,
            span,
        )
