"""The answer on a model's constants: a hash in hexadecimal, and nothing else."""

from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.roll_call import ConstantsReply


@pytest.mark.parametrize("digest", ["", "0123456789abcdef" * 4])
def test_the_hash_of_constants_comes_back_as_it_was(digest: str) -> None:
    assert ConstantsReply.from_records(ConstantsReply(digest).to_records()).digest == digest


@pytest.mark.parametrize("fields", [{"digest": "A" * 64}, {"digest": "ab\n"}, {"digest": 5}, {}, {"digest": "", "more": 1}])
def test_anything_else_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        ConstantsReply.from_records(RecordDict({"constants": ConfigRecord(fields)}))
    with pytest.raises(WireError):
        ConstantsReply.from_records(RecordDict({}))
