"""Messages about moments, sums and scores: what is written is read back, and whatever else comes is a WireError."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hostile import ANYTHING
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.baselines.global_ridge import GlobalModel, Sums
from quickbloom.common.baselines.scoring import CONTENDERS
from quickbloom.common.datasets.own.scales import Moments
from quickbloom.common.wire.arrays import to_arrays
from quickbloom.common.wire.baselines import ScoresReply, ScoresRequest, SumsReply, SumsRequest
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.roll_call import MomentsReply, MomentsRequest, tell_agreed, told_agreed

Array = np.ndarray[Any, Any]
META = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.5])}


def sent(records: RecordDict) -> RecordDict:
    """As it comes out of Flower's own coding."""
    return recorddict_from_proto(recorddict_to_proto(records))


def rows(n: int = 7, d: int = 3, outputs: int = 2) -> Sums:
    rng = np.random.default_rng(n)
    return Sums.of(rng.normal(size=(n, d)), rng.normal(size=(n, outputs)))


COLUMNS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=9),
    st.tuples(st.integers(1, 10**12), st.floats(-1e30, 1e30), st.floats(0, 1e30)).map(lambda parts: Moments(*parts)),
    max_size=5,
)


@given(COLUMNS, st.lists(st.integers(0, 10**9), max_size=4))
def test_moments_arrive_as_they_were(moments: dict[str, Moments], classes: list[int]) -> None:
    assert MomentsReply.from_records(sent(MomentsReply(moments, classes).to_records())) == MomentsReply(moments, classes)


def test_requests_arrive_as_they_were() -> None:
    for request in (MomentsRequest(["A", "b/ç"]), SumsRequest(["A", "b/ç"])):
        assert type(request).from_records(sent(request.to_records())) == request
    records = RecordDict()
    tell_agreed(records, "schema", "scales")
    assert told_agreed(sent(records)) == ("schema", "scales")
    assert told_agreed(RecordDict()) == ("", "")


def test_sums_arrive_to_the_last_bit() -> None:
    found = SumsReply.from_records(sent(SumsReply(rows()).to_records()), 3, 2).sums
    for name, value in vars(rows()).items():
        assert (getattr(found, name) == value).all()
        assert getattr(found, name).dtype == np.float64


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_request_for_scores_arrives_as_it_was(classes: bool, shared: bool) -> None:
    rng = np.random.default_rng(0)
    model = GlobalModel(rng.normal(size=(3, 2)), rng.normal(size=2), np.array([0.25, 0.75]) if classes else np.array([]))
    request = ScoresRequest(META, 0.3, 4, ["A", "B"], model if shared else None, 9, "line")
    found = ScoresRequest.from_records(sent(request.to_records()), 3, 2, classes=classes)
    assert (found.lr, found.steps, found.task_ids, found.round, found.lineage) == (0.3, 4, ["A", "B"], 9, "line")
    assert all(torch.equal(found.meta[name], value) for name, value in META.items())
    assert (found.shared is not None) == shared
    if found.shared is not None:
        assert all((getattr(found.shared, name) == value).all() for name, value in vars(model).items())


def test_as_an_evaluation_it_asks_for_all_steps_of_the_run_at_the_same_rate() -> None:
    asked = ScoresRequest(META, 0.3, 4, ["A"], None, 9, "line").as_evaluation([10])
    assert (asked.lrs, asked.steps, asked.task_ids, asked.shots, asked.round) == ([0.3], 10, ["A"], 0, 9)
    assert asked.lineage == "line"
    with pytest.raises(WireError, match=r"`steps` must be at most `adapt-steps` \(3\), got 4"):
        ScoresRequest(META, 0.3, 4, ["A"]).as_evaluation([3])
    # Where their number grows, the fewest that were tried and show it.
    assert [ScoresRequest(META, 0.3, steps, ["A"]).as_evaluation([10, 20, 40]).steps for steps in (10, 11, 40)] == [10, 20, 40]


def test_scores_arrive_and_what_is_not_known_stays_so() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, len(CONTENDERS), 6))
    scores[0, 3] = np.nan
    found = ScoresReply.from_records(sent(ScoresReply(scores).to_records()), 2, 6).scores
    np.testing.assert_array_equal(found, scores)
    scores[1, 1, 0], scores[1, 1, 1] = np.inf, 1e300  # of a model that has diverged
    found = ScoresReply.from_records(sent(ScoresReply(scores).to_records()), 2, 6).scores
    assert np.isnan(found[1, 1, :2]).all()
    np.testing.assert_array_equal(found[0], scores[0])


def arrays(**parts: Array) -> RecordDict:
    return RecordDict({"sums": to_arrays({name: torch.from_numpy(value) for name, value in parts.items()})})


def with_sums(**parts: Array | None) -> RecordDict:
    return arrays(**{name: value for name, value in {**vars(rows()), **parts}.items() if value is not None})


def with_scores(values: Any) -> RecordDict:
    return RecordDict({"metrics": MetricRecord({"scores": values})})


def with_fields(**fields: Any) -> RecordDict:
    good = {"columns": ["a"], "counts": [3], "means": [1.0], "squares": [2.0], "classes": [1, 2]}
    return RecordDict({"moments": ConfigRecord({name: v for name, v in {**good, **fields}.items() if v is not None})})


def read_sums(records: RecordDict) -> None:
    SumsReply.from_records(records, 3, 2)


def read_scores(records: RecordDict) -> None:
    ScoresReply.from_records(records, 2, 6)


def read_moments(records: RecordDict) -> None:
    MomentsReply.from_records(records)


NUMBER = 2 * len(CONTENDERS) * 6


@pytest.mark.parametrize(
    ("read", "records", "words"),
    [
        (read_sums, RecordDict(), "missing"),
        (read_sums, with_sums(gram=None), "must have the shapes"),
        (read_sums, with_sums(more=np.zeros(1)), "must have the shapes"),
        (read_sums, with_sums(gram=np.zeros((3, 3))), "must have the shapes"),
        (read_sums, with_sums(cross=np.full((4, 2), np.nan)), "must be finite"),
        (read_sums, with_sums(squares=np.array([np.inf, 1.0])), "must be finite"),
        (read_sums, with_sums(gram=-np.eye(4)), "must not be negative"),
        (read_sums, RecordDict({**with_sums(), "more": ConfigRecord()}), "unexpected field `more`"),
        (read_scores, RecordDict(), "missing"),
        (read_scores, with_scores([0.5] * (NUMBER - 1)), f"must have {NUMBER} entries"),
        (read_scores, with_scores([]), f"must have {NUMBER} entries"),
        (read_scores, with_scores(3.0), "must be numbers"),
        (read_scores, with_scores([0.5] * (NUMBER - 1) + [float("inf")]), r"must be numbers up to 1e\+38"),
        (read_scores, with_scores([0.5] * (NUMBER - 1) + [-1e300]), r"must be numbers up to 1e\+38"),
        (read_scores, RecordDict({**with_scores([0.5] * NUMBER), "more": ConfigRecord()}), "unexpected field `more`"),
        (read_moments, with_fields(counts=None), "the field 'counts' is missing"),
        (read_moments, with_fields(more=[1]), "unexpected field `more`"),
        (read_moments, with_fields(means=[1.0, 2.0]), "must have 1 entries"),
        (read_moments, with_fields(counts=[3, 4]), "cannot be read"),
        (read_moments, with_fields(counts=[-3]), "whole numbers of at least 0"),
        (read_moments, with_fields(squares=[-1.0]), "`squares` must be those of so many numbers"),
        (read_moments, with_fields(counts=[0], squares=[1.0]), "`squares` must be those of so many numbers"),
        (read_moments, with_fields(means=[1e31]), r"`means` must be at most 1e\+30"),
        (read_moments, with_fields(means=[float("nan")]), "`means` must be finite"),
        (read_moments, with_fields(classes=[-1]), "whole numbers of at least 0"),
        (read_moments, with_fields(columns=[3]), "list of texts"),
    ],
)
def test_a_flaw_is_one_sentence(read: Callable[[RecordDict], None], records: RecordDict, words: str) -> None:
    with pytest.raises(WireError, match=words) as caught:
        read(records)
    assert "\n" not in str(caught.value)


@given(ANYTHING)
def test_whatever_comes_is_read_or_a_wire_error(records: RecordDict) -> None:
    def read_request(some: RecordDict) -> None:
        ScoresRequest.from_records(some, 3, 2, classes=True)

    for read in (read_sums, read_scores, read_moments, read_request, SumsRequest.from_records, MomentsRequest.from_records):
        with suppress(WireError):
            read(records)


@pytest.mark.parametrize("part", ["weights", "intercept", "shares"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_node_takes_no_linear_model_that_is_not_finite(part: str, bad: float) -> None:
    model = {"weights": np.zeros((3, 2)), "intercept": np.zeros(2), "shares": np.full(2, 0.5)}
    model[part].flat[0] = bad
    with pytest.raises(WireError, match="must be finite"):
        ScoresRequest.from_records(ScoresRequest(META, 0.3, 4, ["A"], GlobalModel(**model)).to_records(), 3, 2, classes=True)
