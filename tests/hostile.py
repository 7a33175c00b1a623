"""What a hostile node may reply: records of every kind, with every kind of content."""

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.error import Error
from hypothesis import strategies as st

Record = ArrayRecord | ConfigRecord | MetricRecord

TEXTS = st.text(max_size=12)
VALUES = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.lists(st.integers(-(2**40), 2**40), max_size=5),
    st.lists(st.floats(), max_size=5),
)
MORE_VALUES = VALUES | TEXTS | st.binary(max_size=9) | st.booleans() | st.lists(TEXTS, max_size=3)
VALUE_ARRAYS: list[np.ndarray[Any, Any]] = [
    np.zeros(3),
    np.zeros((10, 32), np.float32),
    np.zeros(10, np.float32),
    np.array(7),
    np.zeros((0, 4)),
]
ARRAYS = st.one_of(
    st.sampled_from([Array(value) for value in VALUE_ARRAYS]),
    st.builds(
        Array, TEXTS, st.lists(st.integers(-9, 9), max_size=3).map(tuple), st.sampled_from(["numpy.ndarray", "x"]), st.binary()
    ),
)
FIELDS = st.sampled_from(["weight", "losses", "within", "scores", "reason", "packed"]) | TEXTS
RECORDS: st.SearchStrategy[Record] = st.one_of(
    st.dictionaries(FIELDS, VALUES, max_size=5).map(MetricRecord),
    st.dictionaries(FIELDS, MORE_VALUES, max_size=5).map(lambda fields: ConfigRecord(dict(fields))),
    st.dictionaries(TEXTS, ARRAYS, max_size=3).map(ArrayRecord),
)
NAMES = st.sampled_from(["gradient", "metrics", "error", "settings", "secure", "masked", "packed"]) | TEXTS
ANYTHING = st.dictionaries(NAMES, RECORDS, max_size=4).map(RecordDict)
ERRORS = st.builds(Error, code=st.integers(-9, 999), reason=st.none() | st.text(max_size=400))
