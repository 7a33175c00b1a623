"""Packs the records of a small message into one record with one field.

Flower sends every record of a message, every array in it and every piece of an array separately.
That makes a dozen requests and replies per node at each of the four processes between server and
app, which for a small model is most of a round.
"""

from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.flower import names
from quickbloom.common.wire.checks import WireError, reads

SMALL = 2**17
"""Largest message in bytes that is packed.

Messages with the same arrays share their pieces, but a packed message has its own copies. A copy
should cost less than the requests for the pieces. The value was chosen by judgement, not measured.
"""
_NAME = "packed"


def pack(records: RecordDict) -> RecordDict:
    """Return the records packed into one; unchanged if they have more than SMALL bytes, are packed, or Flower cannot pack."""
    tensors = sum(len(array.data) for record in records.array_records.values() for array in record.values())
    to_proto = names.find("recorddict_to_proto")
    if tensors > SMALL or is_packed(records) or to_proto is None:
        return records
    content = to_proto(records).SerializeToString()
    return records if len(content) > SMALL else RecordDict({_NAME: ConfigRecord({_NAME: content})})


def is_packed(records: RecordDict) -> bool:
    """Return whether the records look like the output of `pack`, even if damaged."""
    return list(records) == [_NAME]


@reads
def unpack(records: RecordDict) -> RecordDict:
    """Return the packed records; other records are returned unchanged.

    Raises WireError for content that cannot be read or has more than SMALL bytes.
    """
    if not is_packed(records):
        return records
    content = records.config_records[_NAME][_NAME]
    if not isinstance(content, bytes) or len(content) > SMALL:
        raise WireError(f"packed records must be at most {SMALL} bytes")
    proto = names.get("ProtoRecordDict").FromString(content)
    inside: RecordDict = names.get("recorddict_from_proto")(proto)
    if is_packed(inside):
        raise WireError("packed records are packed once")
    return inside
