"""Coded updates: what comes back, what it costs, that nothing is lost over the rounds, and that nonsense is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickbloom.common.maths.params import Params
from quickbloom.common.wire.compression import KINDS, CodingError, decode, encode, with_feedback

LOSSY = [kind for kind in KINDS if kind != "float32"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def update(seed: int = 0) -> Params:
    random = torch.Generator().manual_seed(seed)
    return {"body.weight": torch.randn(20, 30, generator=random), "body.bias": 1e-7 * torch.randn(30, generator=random)}


def size(params: Params) -> int:
    return sum(value.numel() * value.element_size() for value in params.values())


@pytest.mark.parametrize(("kind", "relative"), [("float32", 0.0), ("bfloat16", 2**-8), ("float16", 2**-10), ("int8", 1 / 127)])
def test_what_comes_back_is_as_close_as_the_type_allows(kind: str, relative: float) -> None:
    sent = update()
    back = decode(encode(sent, kind, 0.05, rng()), kind, sent)
    for name, value in sent.items():
        assert back[name].dtype == torch.float32
        # bfloat16 keeps the exponent: its error is relative to each number. The scaled types' is relative to the largest.
        bound = value.abs() if kind == "bfloat16" else value.abs().max()
        assert ((back[name] - value).abs() <= relative * bound).all()


@pytest.mark.parametrize(("kind", "bytes_"), [("float32", 2520), ("bfloat16", 1260), ("float16", 1268), ("int8", 638)])
def test_bytes_by_hand(kind: str, bytes_: int) -> None:
    assert size(encode(update(), kind, 0.05, rng())) == bytes_  # 630 numbers; two scales of 4 bytes


def test_top_k_sends_the_largest_by_hand() -> None:
    sent = {"w": torch.tensor([[0.1, -5.0, 0.2], [3.0, 0.0, -0.3]])}
    coded = encode(sent, "top-k", 0.34, rng())  # 6 * 0.34 = 2.04: three numbers
    assert coded["w#index"].tolist() == [1, 3, 5]
    assert decode(coded, "top-k", sent)["w"].tolist() == [[0.0, -5.0, 0.0], [3.0, 0.0, pytest.approx(-0.3)]]
    assert len(encode(sent, "top-k", 1e-9, rng())["w"]) == 1  # one at least


def test_int8_is_right_on_average() -> None:
    sent = {"w": torch.tensor([1.0, 0.3003, -0.7119, 1e-4])}
    draws = torch.stack([decode(encode(sent, "int8", 0.05, rng(i)), "int8", sent)["w"] for i in range(4000)])
    # A draw is off by less than 1/127; the mean of 4,000 by less than 1/127 / 2 / sqrt(4000) * 4.
    assert (draws.mean(dim=0) - sent["w"]).abs().max() < 1 / 127 / 2 / 4000**0.5 * 4
    assert draws.std(dim=0)[1] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_does_not_change_is_not_sent(kind: str) -> None:
    sent = {"frozen": torch.zeros(1000, 10), "w": torch.ones(3), "empty": torch.zeros(0)}
    coded = encode(sent, kind, 0.05, rng())
    assert size(coded) < 30
    back = decode(coded, kind, sent)
    assert back["frozen"].shape == (1000, 10)
    assert not back["frozen"].any()
    assert back["empty"].shape == (0,)


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_lost_comes_with_a_later_update(kind: str) -> None:
    """The sum of what arrives differs from the sum of what was to be sent by what is still kept, and by no more."""
    random, arrived, wanted = rng(), torch.zeros(20, 30), torch.zeros(20, 30)
    lost = {"w": torch.zeros(20, 30)}
    for number in range(60):
        gradient = {"w": update(number)["body.weight"]}
        coded, left = with_feedback(gradient, 1.0, lost, kind, 0.05, random)
        lost = left or {}
        arrived += decode(coded, kind, gradient)["w"]
        wanted += gradient["w"]
    assert torch.allclose(arrived + lost["w"], wanted, atol=1e-4)
    without = torch.zeros(20, 30)
    for number in range(60):
        gradient = {"w": update(number)["body.weight"]}
        without += decode(encode(gradient, kind, 0.05, rng(number)), kind, gradient)["w"]
    assert (arrived - wanted).norm() < (without - wanted).norm()


@pytest.mark.parametrize("kind", LOSSY)
def test_what_is_lost_is_kept_in_units_of_the_sum(kind: str) -> None:
    """Weights change from round to round, as with a part of a node's tasks: the server's sum is off by what is kept, no more.

    By the definition of the sum, in float64. Kept in units of the mean, top-k was 27 % off after 1,000 rounds.
    """
    random, weights = rng(), np.random.default_rng(5).integers(0, 60, size=300)
    arrived, wanted = torch.zeros(20, 30).double(), torch.zeros(20, 30).double()
    steady = update(1000)["body.weight"]
    lost: Params | None = None
    for number, weight in enumerate(weights.tolist()):
        gradient = {"w": steady + update(number)["body.weight"]} if weight else {"w": torch.zeros(20, 30)}
        coded, lost = with_feedback(gradient, float(weight), lost, kind, 0.05, random)
        arrived += weight * decode(coded, kind, gradient)["w"].double()
        wanted += weight * gradient["w"].double()
    assert 0 in weights
    assert lost is not None
    assert float((arrived + lost["w"].double() - wanted).norm() / wanted.norm()) < 1e-5
    assert float((arrived - wanted).norm() / wanted.norm()) < {"top-k": 0.08}.get(kind, 1e-3)


def test_an_update_that_counts_for_nothing_loses_nothing_and_brings_nothing_back() -> None:
    kept = {"w": torch.tensor([1.0, -2.0])}
    coded, lost = with_feedback({"w": torch.zeros(2)}, 0.0, kept, "top-k", 0.5, rng())
    assert coded["w"].shape == (0,)
    assert lost is kept
    # By hand, with weight 4: 8 + 1/4 is sent, and -1 - 2/4 is lost, times 4.
    coded, lost = with_feedback({"w": torch.tensor([8.0, -1.0])}, 4.0, kept, "top-k", 0.5, rng())
    assert (coded["w"].tolist(), coded["w#index"].tolist()) == ([8.25], [0])
    assert lost is not None
    assert lost["w"].tolist() == [0.0, -6.0]


def broken() -> list[Any]:
    good = {"w": torch.tensor([1.0, 2.0, 3.0])}

    def coded(kind: str, **changes: torch.Tensor | None) -> Any:
        parts = encode(good, kind, 1.0, rng())
        parts |= {name.replace("_", "#"): value for name, value in changes.items() if value is not None}
        return kind, {name: value for name, value in parts.items() if changes.get(name.replace("#", "_"), 0) is not None}

    return [
        (*coded("float32", w=None), "is missing"),
        (*coded("float32", v=torch.ones(1)), "unexpected tensor `v`"),
        (*coded("float32", w=torch.ones(4)), "has shape"),
        (*coded("float32", w=torch.ones(3).double()), "has dtype"),
        (*coded("float32", w=torch.tensor([1.0, float("nan"), 0])), "NaN"),
        (*coded("float32", w_scale=torch.tensor(1.0)), "unexpected tensor `w#scale`"),
        (*coded("bfloat16", w=torch.ones(3)), "has dtype"),
        (*coded("bfloat16", w=torch.full((3,), 0x7F80, dtype=torch.int16)), "NaN, infinity"),
        (*coded("float16", w_scale=None), "needs one float32 as its scale"),
        (*coded("float16", w_scale=torch.tensor(float("inf"))), "NaN, infinity"),
        (*coded("int8", w_scale=torch.ones(1)), "needs one float32"),
        (*coded("int8", w=torch.ones(2, dtype=torch.int8)), "has shape"),
        (*coded("top-k", w_index=None), "needs a list of int32"),
        (*coded("top-k", w_index=torch.tensor([0, 1, 3], dtype=torch.int32)), "must rise and lie within its 3"),
        (*coded("top-k", w_index=torch.tensor([0, 0, 1], dtype=torch.int32)), "must rise"),
        (*coded("top-k", w_index=torch.tensor([-1, 0, 1], dtype=torch.int32)), "must rise"),
        (*coded("top-k", w=torch.ones(2)), "has shape"),
        (*coded("top-k", w_index=torch.tensor([0, 1, 2])), "needs a list of int32"),
    ]


@pytest.mark.parametrize(("kind", "coded", "words"), broken())
def test_nonsense_is_refused_in_words(kind: str, coded: Params, words: str) -> None:
    with pytest.raises(CodingError, match=words):
        decode(coded, kind, {"w": torch.zeros(3)})


DTYPES = [torch.float32, torch.float64, torch.float16, torch.int8, torch.int16, torch.int32, torch.bool]


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_whatever_comes_is_decoded_or_refused(kind: str, data: st.DataObject) -> None:
    like = {"w": torch.zeros(2, 3), "b": torch.zeros(())}
    names = st.sampled_from(["w", "b", "w#scale", "b#scale", "w#index", "b#index", "x"])
    shapes = st.sampled_from([(), (0,), (1,), (2, 3), (6,), (3, 2), (2, 0)])
    coded = {
        name: torch.full(shape, data.draw(st.sampled_from([0.0, 1.0, -1.0, 100.0]))).to(dtype)
        for name, shape, dtype in data.draw(st.lists(st.tuples(names, shapes, st.sampled_from(DTYPES)), max_size=7))
    }
    try:
        back = decode(coded, kind, like)
    except CodingError:
        return
    assert {name: (value.shape, value.dtype) for name, value in back.items()} == {
        name: (value.shape, value.dtype) for name, value in like.items()
    }
    assert all(torch.isfinite(value).all() for value in back.values())
