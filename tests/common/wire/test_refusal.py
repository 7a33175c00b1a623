"""The server's word to a node that does not take part."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.refusal import KINDS, OTHER, Misfit, Refusal
from quickbloom.common.wire.roll_call import RollCallReply


def of(**fields: Any) -> RecordDict:
    return RecordDict({"refusal": ConfigRecord({"kind": "form", "reason": "it has 3 classes", **fields})})


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_comes_back_with_its_kind(kind: str) -> None:
    told = Refusal.of(Misfit(kind, "it has 3 classes"))
    assert Refusal.from_records(told.to_records()) == Refusal(kind, "it has 3 classes")
    assert Refusal.of("plain words") == Refusal(OTHER, "plain words")


def test_what_a_server_says_is_one_short_printable_line_and_an_unknown_kind_is_no_flaw() -> None:
    told = Refusal.from_records(of(kind="kind of a later release", reason="so\nit \x1b[2J\u202eis " + "x" * 10**6))
    assert (told.kind, told.reason[:13], told.reason.isprintable()) == (OTHER, "so it [2J is ", True)
    assert len(told.reason) == 1500


@pytest.mark.parametrize("records", [RecordDict(), of(reason=5), of(kind=["form"])])
def test_anything_else_is_refused(records: RecordDict) -> None:
    with pytest.raises(WireError):
        Refusal.from_records(records)


def test_a_node_says_that_it_hears_and_an_older_one_says_nothing() -> None:
    spec = DataSpec("regression", (3,), 1)
    new, old = (RollCallReply(spec, [], {}, hears=hears).to_records() for hears in (True, False))
    assert (RollCallReply.from_records(new).hears, RollCallReply.from_records(old).hears) == (True, False)
    assert set(new.config_records["roll-call"]) - set(old.config_records["roll-call"]) == {"hears"}
    new.config_records["roll-call"]["hears"] = "yes"
    with pytest.raises(WireError, match="hears"):
        RollCallReply.from_records(new)
