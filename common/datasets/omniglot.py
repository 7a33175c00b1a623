"""Omniglot: N-way K-shot episodes of handwritten characters; 1,623 characters, 50 alphabets, 20 drawers each.

Source: Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic program
induction" (2015). The split of all characters into train / validation / test is that of Vinyals et
al., "Matching Networks" (2016). The option `clients` defines the tasks:

- "alphabet": an alphabet; an episode is N random characters of it under random labels.
- "alphabet-drawers": an alphabet as written by one group of its drawers. The groups of an alphabet land in the same split.
- "unstructured": virtual devices, each an endless stream of episodes from all characters of its part of Vinyals' split. In
  training a character rotated by 90, 180 or 270 degrees is a separate class (Santoro et al. 2016). This is the published
  benchmark; the other two are federations.
"""

import math
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from quickbloom.common.datasets.base import SPLITS, Dataset, DataSpec, TaskInfo, generator, read_npz, require_below
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

FILE = "omniglot_28.npz"
CHARACTERS, ALPHABETS, DRAWERS, SIDE = 1623, 50, 20, 28

Array = np.ndarray[Any, Any]


class OmniglotOptions(Options):
    """Settings of the data set `omniglot`."""

    clients: Literal["alphabet", "alphabet-drawers", "unstructured"] = Field("alphabet", description="what one task is")
    ways: int = Field(5, ge=2, le=1000, description="classes per episode")
    train_ways: int = Field(
        0,
        ge=0,
        le=1000,
        description="classes per training episode; 0: `ways`; more is for `protonet`, which has no output per class",
    )
    shots: int = Field(1, ge=1, le=19, description="support images per class")
    query_shots: int = Field(1, ge=1, le=19, description="query images per class, in testing the images to score")
    leave_out_small: bool = Field(
        False, description="leave out alphabets that are too small for `ways` or `train-ways` instead of refusing them"
    )
    drawer_groups: Literal[1, 2, 4, 5, 10] = Field(4, description="groups of an alphabet's 20 drawers, for `alphabet-drawers`")
    rotations: Literal["auto", "on", "off", "together"] = Field(
        "auto",
        description="in training, rotated characters are separate classes; `auto`: only for `unstructured`; `together`: rotate "
        "all characters of an episode alike, and mirror half of the episodes",
    )
    distort: bool = Field(False, description="in training, shift, rotate, shear and scale every image a little")
    warp: bool = Field(
        False,
        description="in training, change every image more than `distort` does, bend it, and vary the thickness of its strokes",
    )
    fit: bool = Field(False, description="move and scale every image so that its ink fills about the middle 24 x 24 pixels")
    official_split: bool = Field(False, description="train on the 30 background alphabets, test on the 20 evaluation ones")
    train_clients: int = Field(100, ge=1, le=10_000, description="training tasks, for `unstructured`")
    validation_clients: int = Field(20, ge=1, le=10_000, description="validation tasks, for `unstructured`")
    test_clients: int = Field(50, ge=1, le=10_000, description="test tasks, for `unstructured`")
    test_episodes: int = Field(10, ge=1, le=10_000, description="episodes per held-out task on which it is scored")
    data_seed: int = Field(0, ge=0, description="seed of the test episodes, apart from the seed of the run")


class Pool(NamedTuple):
    """The images that a task's episodes are drawn from: character and drawer indices, with the task's group and split."""

    characters: Array
    drawers: Array
    group: str = ""
    split: str = ""


class Omniglot(Dataset):
    """Images [1, 28, 28], ink 1 on paper 0; every draw has `ways` x `shots` support and `ways` x `query-shots` query images.

    The test part of a draw is its query part: a training task is never scored, and a held-out task
    learns only from its support. Support and query come from different drawers. One image occurs
    twice (character 191, the third and the nineteenth drawer, counted from one); its second copy is
    never drawn.
    """

    name = "omniglot"
    needs_files = True
    Options = OmniglotOptions
    model = "conv4"
    inner_lr = 0.3

    def __init__(self, options: OmniglotOptions, data_dir: Path) -> None:
        self._options = options
        arrays = _read(data_dir / FILE)
        self._images = arrays["images"]
        by_default = "on" if options.clients == "unstructured" else "off"
        self._rotations = by_default if options.rotations == "auto" else options.rotations
        self._train_ways = options.train_ways or options.ways
        self._is_copy = _copies(self._images)
        if options.fit:
            self._images = fitted(self._images)
        pools = {"alphabet": _alphabets, "alphabet-drawers": _alphabet_drawers, "unstructured": _unstructured}[options.clients]
        self._pools = {task_id: self._drawable(pool) for task_id, pool in pools(arrays, options).items()}
        if options.leave_out_small:
            large = {task_id: pool for task_id, pool in self._pools.items() if self._is_large(pool)}
            self._pools = large or self._pools
        self._refuse_too_many_ways()

    @property
    def spec(self) -> DataSpec:
        return DataSpec("classification", (1, SIDE, SIDE), max(self._options.ways, self._train_ways))

    def tasks(self) -> list[TaskInfo]:
        """Return all tasks. A task that may train announces its numbers of examples in training, with `train-ways`."""
        shots, query_shots, ways = self._options.shots, self._options.query_shots, self._options.ways

        def info(name: str, pool: Pool) -> TaskInfo:
            used = self._train_ways if _may_train(pool) else ways
            return TaskInfo(name, used * shots, used * query_shots, ways * query_shots, pool.group, pool.split)

        return [info(name, pool) for name, pool in self._pools.items()]

    @classmethod
    def as_read(cls, options: OmniglotOptions, images: Array) -> Array:
        return fitted(images) if options.fit else images

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        data = self._episode(self._pools[task_id], rng, self._train_ways, self._rotations)
        if not (self._options.distort or self._options.warp):
            return data
        change = warped if self._options.warp else distorted
        support, query = change(data.support, rng), change(data.query, rng)
        return TaskData(support, query, query)

    def test_draws(self, task_id: str) -> list[TaskData]:
        rng = generator(self._options.data_seed, "omniglot", "test", task_id)
        return [self._episode(self._pools[task_id], rng, self._options.ways, "off") for _ in range(self._options.test_episodes)]

    def _episode(self, pool: Pool, rng: np.random.Generator, ways: int, rotations: str) -> TaskData:
        shots = self._options.shots
        turn, index = np.divmod(rng.choice(_classes(pool, rotations), size=ways, replace=False), len(pool.characters))
        mirrored = False
        if rotations == "together":
            turn[:], mirrored = rng.integers(4), bool(rng.integers(2))
        characters = pool.characters[index, None]
        order = rng.random((ways, len(pool.drawers)))
        order += self._is_copy[characters, pool.drawers]  # copies last, where `_drawable` ensures that none is used
        drawers = pool.drawers[order.argsort(axis=1)[:, : shots + self._options.query_shots]]
        images = self._images[characters, drawers]
        for way in np.flatnonzero(turn):
            images[way] = np.rot90(images[way], k=turn[way], axes=(1, 2))
        images = images[..., ::-1] if mirrored else images
        query = _batch(images[:, shots:])
        return TaskData(_batch(images[:, :shots]), query, query)

    def _drawable(self, pool: Pool) -> Pool:
        """Return the pool without characters that have fewer distinct images than an episode needs. Raises DataError."""
        needed = self._options.shots + self._options.query_shots
        if needed > len(pool.drawers):
            raise DataError(
                f"`shots` + `query-shots` must be at most {len(pool.drawers)}, the drawers that a task of data set `omniglot` "
                f'has of each character, got {needed}: lower one of them, or `drawer-groups` if `clients` is "alphabet-drawers"'
            )
        distinct = (~self._is_copy[pool.characters[:, None], pool.drawers]).sum(axis=1)
        return pool._replace(characters=pool.characters[distinct >= needed])

    def _is_large(self, pool: Pool) -> bool:
        trains = not _may_train(pool) or self._train_ways <= _classes(pool, self._rotations)
        return trains and self._options.ways <= len(pool.characters)

    def _refuse_too_many_ways(self) -> None:
        small = [(len(pool.characters), _classes(pool, self._rotations), name) for name, pool in self._pools.items()]
        characters, _, task_id = min(small)
        if self._options.ways > characters:
            raise DataError(
                f"`ways` must be at most {characters}, the number of characters in the smallest task '{task_id}' of "
                f"data set `omniglot`, got {self._options.ways}: lower it, or set `leave-out-small = true`"
            )
        _, classes, task_id = min(entry for entry in small if _may_train(self._pools[entry[2]]))
        if self._train_ways > classes:
            raise DataError(
                f"`train-ways` must be at most {classes}, the number of classes in the smallest training task '{task_id}' of "
                f"data set `omniglot`, got {self._train_ways}: lower it, or set `leave-out-small = true`"
            )


def _may_train(pool: Pool) -> bool:
    """Return whether the published split, if there is one, lets a task train."""
    return pool.split in ("", "train")


def _classes(pool: Pool, rotations: str) -> int:
    """Return the number of classes that an episode of a task is drawn from."""
    return len(pool.characters) * (4 if rotations == "on" else 1)


def _batch(images: Array) -> Batch:
    """Return u8 [ways, count, 28, 28] as float [ways * count, 1, 28, 28] with labels 0..ways-1."""
    ways, count = images.shape[:2]
    x = torch.from_numpy(np.ascontiguousarray(images)).reshape(ways * count, 1, SIDE, SIDE).float().div_(255)
    return Batch.of(x, torch.arange(ways).repeat_interleave(count))


def fitted(images: Array) -> Array:
    """Return images, u8 [..., 28, 28], moved and scaled so that their ink is centred with a longer side of 24 pixels.

    The scale is limited to 0.8 to 1.6, so that a dot stays small. Along the shorter side it is
    multiplied by the square root of longer / shorter, at most 1.5, so that flat characters stay
    recognisable. Ink is what is darker than 0.3.
    """
    flat = images.reshape(-1, SIDE, SIDE)
    is_ink, place = flat > 0.3 * 255, np.arange(SIDE)
    has_ink = np.stack([is_ink.any(axis=1), is_ink.any(axis=2)])  # [across or down, image, place]
    first, last = np.where(has_ink, place, SIDE).min(axis=2), np.where(has_ink, place, -1).max(axis=2)
    sides = np.where(last < 0, 24, last - first + 1)
    middles = np.where(last < 0, 0, (first + last - SIDE + 1) / 2)
    longer = sides.max(axis=0)
    scales = np.clip(24 / longer, 0.8, 1.6) * np.minimum(np.sqrt(longer / sides), 1.5)
    moves = np.stack([np.zeros(len(flat)), np.zeros(len(flat)), *1 / scales, *middles], axis=1)
    result = np.empty_like(flat)
    for some in np.array_split(np.arange(len(flat)), math.ceil(len(flat) / 2000)):
        x = torch.from_numpy(flat[some]).unsqueeze(1).float()
        result[some] = F.grid_sample(x, _affine_grid(moves[some], x), align_corners=False).round().squeeze(1).numpy()
    return result.reshape(images.shape)


def distorted(batch: Batch, rng: np.random.Generator) -> Batch:
    """Return every image [1, 28, 28] under its own random affine map.

    Rotation is up to 10 degrees, shear up to 0.2, scale 0.85 to 1.15 along each axis, shift up to 2
    pixels: slightly gentler than Koch, Zemel, Salakhutdinov 2015.
    """
    low, high = np.array([[-math.radians(10), -0.2, 0.85, 0.85, -2, -2], [math.radians(10), 0.2, 1.15, 1.15, 2, 2]])
    grid = _affine_grid(rng.uniform(low, high, size=(len(batch.x), 6)), batch.x)
    return batch._replace(x=F.grid_sample(batch.x, grid, align_corners=False))


def warped(batch: Batch, rng: np.random.Generator) -> Batch:
    """Return every image [1, 28, 28] randomly moved, bent and drawn with another pen, each in its own way.

    Moved: rotation up to 15 degrees, shear up to 0.3, scale 0.82 to 1.22 along each axis, shift up
    to 2 pixels. Bent: the points of a 5 x 5 grid are shifted along each axis by normal numbers of
    deviation up to 1.5 pixels, and the image between them smoothly (elastic distortions, Simard,
    Steinkraus, Platt 2003). Pen: the image moves up to half the way towards one with strokes a
    pixel thicker, or thinner, on each side.
    """
    count = len(batch.x)
    low, high = np.array([[-math.radians(15), -0.3, -0.2, -0.2, -2, -2], [math.radians(15), 0.3, 0.2, 0.2, 2, 2]])
    moves = rng.uniform(low, high, size=(count, 6))
    moves[:, 2:4] = np.exp(moves[:, 2:4])
    net = rng.standard_normal((count, 2, 5, 5)) * rng.uniform(0, 1.5 * 2 / SIDE, size=(count, 1, 1, 1))
    bent = F.interpolate(torch.from_numpy(net).to(batch.x.dtype), size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    x = F.grid_sample(batch.x, _affine_grid(moves, batch.x) + bent.movedim(1, -1), align_corners=False)
    pen = torch.from_numpy(rng.uniform(-0.5, 0.5, size=(count, 1, 1, 1))).to(x.dtype)
    thick, thin = F.max_pool2d(x, 3, stride=1, padding=1), -F.max_pool2d(-x, 3, stride=1, padding=1)
    return batch._replace(x=x + torch.where(pen > 0, pen * (thick - x), pen * (x - thin)))


def _affine_grid(moves: Array, images: Tensor) -> Tensor:
    """Return where the pixels of the new images are read in the old.

    `moves`: angle, shear, width, height, right, down of each image.
    """
    angle, shear, width, height, right, down = moves.T
    # affine_grid takes the map from the new image to the old, with coordinates from -1 to 1.
    cos, sin = np.cos(angle), np.sin(angle)
    rows = [[cos * width, (shear - sin) * width, right * 2 / SIDE], [sin * height, cos * height, down * 2 / SIDE]]
    maps = torch.from_numpy(np.moveaxis(np.array(rows), -1, 0)).to(images.dtype)
    return F.affine_grid(maps, list(images.shape), align_corners=False)


def _alphabets(arrays: dict[str, Array], options: OmniglotOptions) -> dict[str, Pool]:
    pools = {}
    for index, name in enumerate(arrays["alphabet_names"]):
        slug = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
        split = ("train" if arrays["alphabet_is_background"][index] else "test") if options.official_split else ""
        characters = np.flatnonzero(arrays["alphabet"] == index)
        pools[slug] = Pool(characters, np.arange(DRAWERS), slug, split)
    return pools


def _alphabet_drawers(arrays: dict[str, Array], options: OmniglotOptions) -> dict[str, Pool]:
    groups = np.split(np.arange(DRAWERS), options.drawer_groups)
    return {
        f"{slug}-drawers-{number}": pool._replace(drawers=drawers)
        for slug, pool in _alphabets(arrays, options).items()
        for number, drawers in enumerate(groups)
    }


def _unstructured(arrays: dict[str, Array], options: OmniglotOptions) -> dict[str, Pool]:
    pools = {}
    counts = (options.train_clients, options.validation_clients, options.test_clients)
    for part, (split, count) in enumerate(zip(SPLITS, counts, strict=True)):
        pool = Pool(np.flatnonzero(arrays["vinyals_split"] == part), np.arange(DRAWERS), split=split)
        pools.update({f"{split}-{k:03d}": pool for k in range(count)})
    return pools


def _read(path: Path) -> dict[str, Array]:
    byte = np.dtype(np.uint8)
    arrays = read_npz(
        path,
        {
            "images": (byte, (CHARACTERS, DRAWERS, SIDE, SIDE)),
            "alphabet": (byte, (CHARACTERS,)),
            "alphabet_names": (np.dtype("<U41"), (ALPHABETS,)),
            "alphabet_is_background": (np.dtype(np.bool_), (ALPHABETS,)),
            "vinyals_split": (byte, (CHARACTERS,)),
        },
    )
    require_below(path, "alphabet", arrays["alphabet"], ALPHABETS)
    require_below(path, "vinyals_split", arrays["vinyals_split"], len(SPLITS))
    return arrays


def _copies(images: Array) -> Array:
    """Return bool [character, drawer]: True for an exact copy of an earlier drawer's image of the same character."""
    copies = np.zeros(images.shape[:2], dtype=bool)
    for character, drawn in enumerate(images):
        seen = [image.tobytes() for image in drawn]
        if len(set(seen)) < len(seen):
            copies[character] = [image in seen[:drawer] for drawer, image in enumerate(seen)]
    return copies


__all__ = ["FILE", "Omniglot", "OmniglotOptions", "Pool"]
