"""Images in arrays: which one is meant, where the channels are, and what white is."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from loopback import LoopbackGrid

from quickbloom import adapt, predict
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.files.image_arrays import inputs_of, read_array, white_of
from quickbloom.common.datasets.own.files.tables import LIMIT
from quickbloom.common.errors import DataError
from quickbloom.server_app.app import run_federation

Array = np.ndarray[Any, Any]
SIDE = 8


def shades(rows: int = 40, *shape: int) -> Array:
    """uint8, all of 0..255."""
    return np.random.default_rng(0).integers(0, 256, (rows, *(shape or (SIDE, SIDE))), dtype=np.uint8)


def own(path: Path, arrays: dict[str, Array], schema: str = "", **options: Any) -> Own:
    """The data set of an .npz with these arrays of 40 rows: two tasks, two classes."""
    columns = {"task": np.repeat(["A", "B"], 20), "label": np.tile([0, 1], 20)}
    np.savez(path / "own.npz", allow_pickle=False, **columns, **arrays)
    return Own(OwnOptions.model_validate({"path": str(path / "own.npz"), **options}), Path(), schema)


def inputs(data: Own, task: str = "A") -> Array:
    """All inputs of a task, in the order of the file."""
    parts, (draw,) = data.rows[task], data.test_draws(task)
    x = np.concatenate([part.x.numpy() for part in (draw.support, draw.query, draw.test)])
    return x[np.argsort(np.concatenate(parts))]


# Which array


def test_two_arrays_of_images_are_refused_until_one_is_named(tmp_path: Path) -> None:
    image, mask = shades(), np.ones((40, SIDE, SIDE), np.float32)
    with pytest.raises(DataError, match=r"hold two arrays of images, `image` and `mask`: name one with `own\.features`"):
        own(tmp_path, {"image": image, "mask": mask})
    data = own(tmp_path, {"image": image, "mask": mask}, features="image")
    np.testing.assert_array_equal(inputs(data)[:, 0], (image[:20] / 255).astype(np.float32))
    assert own(tmp_path, {"image": image}).spec == data.spec
    assert (inputs(own(tmp_path, {"image": image, "mask": mask}, features="mask")) == 1).all()


@pytest.mark.parametrize("names", [("a", "b", "c"), ("pixels", "mask"), ("b", "a")])
def test_the_arrays_are_named_whatever_they_are_called(tmp_path: Path, names: tuple[str, ...]) -> None:
    arrays = {name: shades(40, SIDE + i, SIDE + i) for i, name in enumerate(names)}
    with pytest.raises(DataError, match="arrays of images, " + ".*".join(f"`{name}`" for name in names)):
        own(tmp_path, arrays)
    for i, name in enumerate(names):
        assert own(tmp_path, arrays, features=name).spec.input_shape == (1, SIDE + i, SIDE + i)


def test_images_of_other_nodes_may_be_called_otherwise(tmp_path: Path) -> None:
    first = own(tmp_path, {"image": shades()})
    for options in ({"schema": first.spec.schema}, {"features": "pixels"}):
        second = own(tmp_path, {"scan": shades()}, **options)
        assert second.spec == first.spec
        np.testing.assert_array_equal(inputs(second), inputs(first))


def test_columns_that_are_named_need_no_images(tmp_path: Path) -> None:
    arrays = {"image": shades(), "mask": shades(), "age": np.arange(40.0), "words": np.full((40, 2, 2), "x")}
    assert own(tmp_path, arrays, features="age").spec.input_shape == (1,)
    with pytest.raises(DataError, match=r"have no column `imgae`: did you mean `image`\?"):
        own(tmp_path, arrays, features="imgae")


def test_images_with_other_columns_are_refused_by_the_name_of_their_array(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images cannot be mixed with other columns: set `own\.features=scan`"):
        own(tmp_path, {"scan": shades(), "age": np.arange(40.0)})
    assert own(tmp_path, {"scan": shades(), "age": np.arange(40.0)}, features="scan").spec.input_shape == (1, SIDE, SIDE)


def test_a_column_of_the_name_that_images_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold the images `scan` and a column `pixels`, as images are called: rename it"):
        own(tmp_path, {"scan": shades(), "pixels": np.arange(40.0)})


def test_a_function_gives_images_by_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("given_data")
    columns = {"task": np.repeat(["A", "B"], 20), "label": np.tile([0, 1], 20)}
    module.load = lambda: {**columns, "x": shades(40, 9, 9, 3), "y": shades()}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "given_data", module)
    with pytest.raises(DataError, match="two arrays of images, `x` and `y`"):
        Own(OwnOptions(path="given_data:load"), Path())
    assert Own(OwnOptions(path="given_data:load", features="x"), Path()).spec.input_shape == (3, 9, 9)


def test_a_personal_model_is_given_the_array_that_it_was_trained_on(tmp_path: Path) -> None:
    light = np.tile([0, 1], 50)
    image = np.clip(np.random.default_rng(0).normal(90 + 70 * light[:, None, None], 30, (100, 8, 8)), 0, 255).astype(np.uint8)
    columns = {"task": np.repeat(list("ABCDE"), 20), "target": np.where(light > 0, "day", "night")}
    np.savez(tmp_path / "a.npz", allow_pickle=False, **columns, mask=255 - image, image=image)
    settings = {"dataset": "own", "min-nodes": 1, "rounds": 2, "algorithm": "fomaml", "evaluate-every": 0, "model": "mlp"}
    config = parse_run_config({**settings, "own.features": "image", "output-dir": str(tmp_path / "run")})
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: {"data-path": str(tmp_path / "a.npz")}}), config)
    models = adapt(tmp_path / "run" / "checkpoints", tmp_path / "a.npz", tmp_path / "mine")
    found = predict(tmp_path / "mine", tmp_path / "a.npz")
    assert {score.part for score in found.scores} == {"cross-validation"}  # the data are known again
    alone = columns | {"image": image}
    np.savez(tmp_path / "b.npz", allow_pickle=False, **alone)
    assert [row["prediction"] for row in predict(tmp_path / "mine", tmp_path / "b.npz").rows] == [
        row["prediction"] for row in found.rows
    ]
    # The same pictures in another type and with the channels last are the same inputs.
    np.savez(tmp_path / "c.npz", allow_pickle=False, **columns, image=(image / 255)[..., None])
    turned = predict(tmp_path / "mine", tmp_path / "c.npz")
    assert [row["prediction"] for row in turned.rows] == [row["prediction"] for row in found.rows]
    assert turned.remarks == ["the last axis of the images `image`, (100, 8, 8, 1), is taken for their channels"]
    np.savez(tmp_path / "d.npz", allow_pickle=False, **columns, image=image.astype(float))
    with pytest.raises(DataError, match=r"have decimal pixels of .*, those of the model's own data 0 to 1: scale them alike"):
        predict(tmp_path / "mine", tmp_path / "d.npz")
    assert len(models) == 5


# Where the channels are


@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((12, 12, 3), True),
        ((12, 12, 1), True),
        ((12, 20, 4), True),
        ((64, 64, 10), True),
        ((9, 9, 2), True),
        ((3, 12, 12), False),
        ((1, 12, 20), False),
        ((10, 64, 64), False),
        ((10, 64, 48), False),
        ((2, 9, 9), False),
        ((1, 3, 3), False),
        ((1, 4, 4), False),
        ((4, 4, 1), True),
        ((1, 1, 1), None),
        ((3, 3, 3), None),
        ((12, 12, 12), None),
        ((3, 20, 4), None),
        ((48, 64, 10), None),
        ((1, 28, 3), None),
    ],
)
def test_channels_are_found_first_or_last_or_the_array_is_refused(shape: tuple[int, ...], turned: bool | None) -> None:
    array = shades(5, *shape)
    if turned is None:
        with pytest.raises(DataError, match="the axes of the images `x` cannot be told apart"):
            read_array("x", array, LIMIT)
        return
    images, remarks = read_array("x", array, LIMIT)
    assert images.flags.c_contiguous
    if turned:
        assert all((images[:, c] == array[..., c]).all() for c in range(shape[-1]))
        assert remarks == [f"the last axis of the images `x`, {array.shape}, is taken for their channels"]
    else:
        assert (images == array).all()
        assert not remarks


def test_channels_first_and_last_are_the_same_data(tmp_path: Path) -> None:
    first = shades(40, 3, 12, 12)
    one, other = own(tmp_path, {"image": first}), own(tmp_path, {"image": np.moveaxis(first, 1, -1)})
    assert one.spec == other.spec
    np.testing.assert_array_equal(inputs(one), inputs(other))
    assert (one.remarks, len(other.remarks)) == ([], 1)


def test_measurements_that_are_taken_for_images_are_remarked_on() -> None:
    _, remarks = read_array("walk", shades(40, 50, 3), LIMIT)
    assert remarks == [
        "the array `walk` is taken for grey images of 50 x 3 pixels: if it holds measurements, save it as [rows, n] with "
        "`walk.reshape(len(walk), -1)`"
    ]
    assert read_array("image", shades(40, 50, 40), LIMIT)[1] == []


# What white is


def of_every_type() -> dict[str, Array]:
    """The same pictures, black or white or of three shades between."""
    level = shades() // 64 * 51
    return {
        "uint8": level,
        "int64": level.astype(np.int64),
        "int32": level.astype(">i4"),
        "uint16": level.astype(np.uint16) * 257,
        "uint16, big-endian": (level.astype(np.uint16) * 257).astype(">u2"),
        "float32": (level / 255).astype(np.float32),
        "float64": level / 255,
        "float32 to 255": level.astype(np.float32),
        "float64 to 255": level.astype(">f8"),
    }


@pytest.mark.parametrize("kind", list(of_every_type()))
def test_a_picture_gives_the_same_inputs_whatever_its_type(tmp_path: Path, kind: str) -> None:
    array = of_every_type()[kind]
    data = own(tmp_path, {"image": array})
    wanted = (of_every_type()["uint8"] / 255).astype(np.float32)
    np.testing.assert_array_equal(inputs(data, "A")[:, 0], wanted[:20])
    np.testing.assert_array_equal(inputs(data, "B")[:, 0], wanted[20:])


@pytest.mark.parametrize("kind", ["float32", "float64", "float16", "bool"])
@pytest.mark.parametrize("bright", [1.01, 1.9, 255.0, 1e6])
def test_a_pixel_of_another_task_or_of_a_test_row_does_not_change_the_others(tmp_path: Path, kind: str, bright: float) -> None:
    array = (shades() > 127).astype(np.float64) * 0.9 if kind != "bool" else (shades() > 127).astype(np.float64)
    array = array.astype(kind)
    wanted = inputs(own(tmp_path, {"image": array}), "A")
    changed = array.astype(np.float64)
    test_row = own(tmp_path, {"image": array}).rows["B"][2][0]
    changed[test_row, 0, 0] = bright
    data = own(tmp_path, {"image": changed})
    np.testing.assert_allclose(inputs(data, "A"), wanted, rtol=1e-3)
    assert inputs(data, "B")[test_row - 20].max() == pytest.approx(min(bright, 2), rel=1e-6)
    assert len(data.remarks) == (bright > 2)


@pytest.mark.parametrize("bright", [1.01, 3.0, 255.0, 60000.0])
def test_a_dead_pixel_in_the_support_does_not_make_the_task_black(tmp_path: Path, bright: float) -> None:
    array = shades() / 255
    row = own(tmp_path, {"image": array}).rows["A"][0][0]
    array[row, 3, 3] = bright
    data = own(tmp_path, {"image": array})
    other = np.delete(inputs(data, "A"), row, axis=0)
    np.testing.assert_array_equal(other[:, 0], np.delete(array[:20], row, axis=0).astype(np.float32))


@pytest.mark.parametrize(
    ("support", "white"),
    [
        (np.array([0.0, 0.5, 1.0]), 1),
        (np.array([0.0, 0.01, 0.02]), 1),
        (np.zeros(9), 1),
        (np.linspace(-0.05, 1.06, 99), 1),
        (np.linspace(0, 255, 256), 255),
        (np.linspace(-12, 267, 400), 255),
        (np.linspace(0, 16, 99), 255),
        (np.linspace(-1, 1, 99), 0),
        (np.where(np.arange(99) < 80, -0.4242, 2.8215), 0),  # digits, standardised as usual
        (np.random.default_rng(0).normal(size=99), 0),
        (np.linspace(0, 4095, 99), 0),
        (np.linspace(-1000, 3000, 99), 0),
        (np.linspace(0, 5, 99), 0),
        (np.full(9, -1.0), 0),
    ],
)
def test_what_white_is_is_told_from_the_support(support: Array, white: float) -> None:
    assert white_of(support.astype(np.float32)) == white


def test_every_task_has_the_scale_of_its_own_support(tmp_path: Path) -> None:
    level = shades() // 64 * 51
    data = own(tmp_path, {"image": np.where(np.arange(40)[:, None, None] < 20, level / 255, level)})
    wanted = (level / 255).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([inputs(data, "A"), inputs(data, "B")])[:, 0], wanted)


def test_a_task_whose_pixels_have_no_scale_is_left_out_and_named(tmp_path: Path) -> None:
    array = shades() / 255
    array[20:] = array[20:] * 2 - 1
    data = own(tmp_path, {"image": array})
    assert [info.task_id for info in data.tasks()] == ["A"]
    assert data.left_out["B"].startswith("the pixels of its support are neither 0 to 1 nor 0 to 255")
    with pytest.raises(DataError, match=r"no task of '.*' can be used: .* neither 0 to 1 nor 0 to 255: divide them by"):
        own(tmp_path, {"image": array * 2 - 1})


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (shades().astype(np.int16) - 1000, "hold int16 of -1000 to -745, and nothing says which is white"),
        (shades().astype(np.int64) * 16, "hold int64 of 0 to 4080, and nothing says which is white: save them as uint8"),
        (shades().astype(np.uint32) * 256, "hold uint32 of 0 to 65280"),
        (shades() // 255, "hold uint8 of at most 1, of which 255 is white: .* save them as bool if 1 is white"),
        (shades().astype(np.int64) // 255, "hold int64 of at most 1"),
        (shades().astype(np.uint16), "hold uint16 of at most 255, of which 65535 is white: .* as uint8 if 255 is white"),
        (np.where(np.arange(40)[:, None, None] < 6, 0.5, np.nan), "the images `image` have missing pixels, first in row 7"),
        (np.where(shades() > 250, np.inf, 0.5), "holds infinite values"),
        (shades().astype(np.complex64), "the array `image` must hold numbers, as images do, got complex64"),
        (np.full((40, 3, 3), "x"), "the array `image` must hold numbers"),
        (np.zeros((40, 0, 5)), r"the images `image` have no pixels, their array has the shape \(40, 0, 5\)"),
    ],
)
def test_pixels_of_which_nothing_says_what_is_white_are_refused(tmp_path: Path, array: Array, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        own(tmp_path, {"image": array})


def test_dark_images_are_remarked_on(tmp_path: Path) -> None:
    for array, told in ((shades() // 16, "above 15, where 255"), (shades() / 16.0, "above 15.9375, where 255")):
        (remark,) = own(tmp_path, {"image": array}).remarks
        assert told in remark
    assert not own(tmp_path, {"image": np.zeros((40, 8, 8), np.uint8)}).remarks


def test_inputs_are_as_before_to_the_last_bit() -> None:
    """Formerly all was turned into float64 and divided by 255."""
    for kind in (np.uint8, np.float32, np.float64):
        images = np.random.default_rng(1).uniform(0, 255, (3, 1, 8, 8)).astype(kind)
        np.testing.assert_array_equal(inputs_of(images, 255.0), (images.astype(np.float64) / 255).astype(np.float32))


def test_images_are_refused_by_what_they_take_as_inputs() -> None:
    with pytest.raises(DataError, match=r"the images `image` take 0\.0 GB as inputs, at most 0\.0 GB are read"):
        read_array("image", shades(), 4 * 40 * 64 - 1)
    read_array("image", shades(), 4 * 40 * 64)
