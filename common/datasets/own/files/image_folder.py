"""Folders of images, folder/TASK/CLASS/image or folder/CLASS/image: which files count, and remarks on the others."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from quickbloom.common.datasets.own.files.images import Notes, has_image_suffix, looks_like_image, read_image
from quickbloom.common.datasets.own.files.pictures import PictureFiles, Pictures
from quickbloom.common.datasets.own.text import Array
from quickbloom.common.errors import DataError, as_told
from quickbloom.common.files import shown
from quickbloom.common.formatting import counted

_SYSTEM = {
    "#recycle",
    "$recycle.bin",
    "@eadir",
    "__macosx",
    "desktop.ini",
    "ehthumbs.db",
    "icon\r",
    "system volume information",
    "thumbs.db",
}
"""Names, in lower case, that operating systems and storage leave in folders. Names that begin with a point count as well."""
_NOT_READ = {
    *(".avif", ".jp2", ".webp"),  # where this Pillow was built without
    *(".ai", ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".emf", ".eps", ".fit", ".fits", ".heic", ".heics", ".heif", ".hif"),
    *(".icns", ".jxl", ".jxr", ".nef", ".nii", ".orf", ".ps", ".psd", ".raf", ".raw", ".rw2", ".svg", ".svgz", ".wmf", ".xcf"),
}
"""Suffixes of image formats that are not read. Camera files hold a small preview that would be taken for the image."""
_MOST_TOLD = 5
_DARK, _ALIKE = 0.1, 0.02


@dataclass(frozen=True)
class ImageFolder:
    """Images of a folder. `pixels`: float32 [rows, 1, side, side] in 0..1, or pictures. `remarks`: sentences for a person.

    `files`: where each lies in the folder, such as "ward-7/ill/3.png".
    """

    pixels: Array | Pictures
    files: list[str]
    classes: list[str]
    tasks: list[str]
    remarks: list[str]


@dataclass
class _Found:
    """Files of a folder. The counters count suffixes of skipped files."""

    images: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    not_read: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


def read_images(folder: Path, side: int, limit: int) -> ImageFolder:
    """Return the images of a folder in the order of their paths. `limit`: most bytes of pixels. Raises DataError.

    `side`: pixels each way; 0: pictures for an encoder, which are decoded only when they are encoded.
    """
    with warnings.catch_warnings(action="ignore"):  # pillow's warnings; too large images are refused below
        found = _find(folder)
        passed = list(_passed_over(found))
        if not found.images:
            also = f"; {passed[0]}" if passed else ""
            raise DataError(f"the folder '{shown(folder)}' holds no images as CLASS/image or TASK/CLASS/image{also}")
        pixels, noticed = _decoded(folder, found.images, side, limit) if side else (PictureFiles(found.images), [])
    places = [file.relative_to(folder) for file in found.images]
    names = [_names(place) for place in places]
    tasks, classes = [task for task, _ in names], [label for _, label in names]
    return ImageFolder(pixels, [shown(place.as_posix()) for place in places], classes, tasks, [*passed, *noticed])


def _decoded(folder: Path, files: list[Path], side: int, limit: int) -> tuple[Array, list[str]]:
    """Return (pixels [files, 1, side, side], remarks)."""
    _check_size(folder, len(files), side, limit)
    pixels = np.empty((len(files), 1, side, side), dtype=np.float32)
    notes = []
    for row, file in enumerate(files):
        pixels[row, 0], noted = read_image(file, side)
        notes.append(noted)
    return pixels, [*_changed(notes), *_shades(pixels)]


def _find(folder: Path) -> _Found:
    found = _Found()
    for at, folders, files in os.walk(folder, onerror=_raise):
        here = Path(at)
        folders[:] = [name for name in folders if not _leave_out(found, here / name, is_folder=True)]
        for name in files:
            if not _leave_out(found, here / name, is_folder=False):
                _sort_in(found, here / name, folder)
    found.images.sort()
    return found


def _raise(error: OSError) -> None:
    """Raise the error: a folder that cannot be opened must not silently be missing from the data."""
    raise error


def _leave_out(found: _Found, path: Path, *, is_folder: bool) -> bool:
    """Return whether to skip a path: a hidden or system file, a link to a folder, or no regular file. Notes the first two."""
    name = path.name.lower()
    if name in _SYSTEM or name.startswith("."):
        if is_folder or has_image_suffix(path):
            found.hidden.append(path.name)
        return True
    if path.is_symlink() and (is_folder or not path.exists()):
        found.links.append(path.name)
        return True
    return not is_folder and not path.is_file()


def _sort_in(found: _Found, file: Path, folder: Path) -> None:
    suffix, depth = file.suffix.lower(), len(file.relative_to(folder).parts)
    if has_image_suffix(file):
        if depth not in (2, 3):
            told = shown(file)
            raise DataError(f"the image '{told}' must lie in '{shown(folder)}' as CLASS/image or as TASK/CLASS/image", told)
        found.images.append(file)
    elif suffix in _NOT_READ:
        found.not_read[suffix] += 1
    elif depth in (2, 3) and looks_like_image(file):
        found.images.append(file)
    else:
        found.others[suffix or "without a suffix"] += 1


def _check_size(folder: Path, images: int, side: int, limit: int) -> None:
    size = images * side * side * np.dtype(np.float32).itemsize
    if size > limit:
        raise DataError(
            f"the {images} images of '{shown(folder)}' take {size / 1e9:.1f} GB, at most {limit / 1e9:.1f} GB are read: "
            "split or thin them out, or set a smaller `own.image-side`"
        )


def _names(path: Path) -> tuple[str, str]:
    """Return (task, class) of an image. Raises DataError."""
    parts, folder = path.parts, shown(path.parent)
    if folder != str(path.parent):
        raise DataError(f"the name of the folder '{folder}' is not in UTF-8: rename it", folder)
    task = parts[0] if len(parts) == 3 else "all"
    return task, parts[-2]


def _passed_over(found: _Found) -> Iterator[str]:
    if count := found.not_read.total():
        yield (
            f"{_are(count, 'image')} of a format that is not read and passed over: {_by_suffix(found.not_read)}; save as PNG "
            "or JPEG what is to count"
        )
    if count := found.others.total():
        what = "1 file is no image and is" if count == 1 else f"{count} files are no images and are"
        yield f"{what} passed over: {_by_suffix(found.others)}"
    if count := len(found.hidden):
        what = "1 hidden or system file or folder is" if count == 1 else f"{count} hidden or system files or folders are"
        yield f"{what} passed over: {_some(found.hidden)}"
    if found.links:
        yield f"{_are(len(found.links), 'link')} not followed: {_some(found.links)}; put there what should be read"


def _are(count: int, thing: str) -> str:
    return f"{counted(count, thing)} {'is' if count == 1 else 'are'}"


def _by_suffix(counts: Counter[str]) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST_TOLD]
    rest = counts.total() - sum(count for _, count in most)
    return ", ".join(f"{count} {as_told(suffix, 20)}" for suffix, count in most) + (f" and {rest} more" if rest else "")


def _some(names: list[str]) -> str:
    different = sorted({as_told(name, 40) for name in names})
    return ", ".join(different[:_MOST_TOLD]) + (" and others" if len(different) > _MOST_TOLD else "")


def _changed(notes: list[Notes]) -> Iterator[str]:
    """Yield remarks on changes made to images, with counts."""
    if count := sum(noted.turned for noted in notes):
        yield f"{_are(count, 'image')} turned or mirrored as the EXIF data say"
    if count := sum(noted.laid_on_white for noted in notes):
        yield f"{_are(count, 'image')} transparent in parts and laid on white"
    if count := sum(noted.vanished for noted in notes):
        yield f"{_are(count, 'transparent image')} all white on white: lay what is to be seen on another colour"
    if count := sum(noted.frames for noted in notes):
        yield f"{_are(count, 'image')} of several frames or pages, of which the first is used"
    wide = [noted.brightest for noted in notes if noted.brightest is not None]
    if wide and max(wide) < _DARK:
        yield (
            f"no pixel of {counted(len(wide), 'image')} with more than 8 bits has more than {100 * max(wide):.2g} % of white: "
            "spread their values if they are not meant to be dark"
        )


def _shades(pixels: Array) -> Iterator[str]:
    low, high = float(pixels.min()), float(pixels.max())
    if high - low < _ALIKE:
        yield f"all pixels of all images are between {low:.3g} and {high:.3g}: there is nothing to tell them apart by"
