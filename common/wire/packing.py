"""A message whose records travel as one.

Flower sends every record of a message, every array in it and every piece of an array by itself: a dozen requests there and back
for each node, at each of the four processes between server and app, which for a small model is most of a round. Here the
records of a small message are one record of one field.
"""

from flwr.app import ConfigRecord, RecordDict

from quickbloom.common.flower import names
from quickbloom.common.wire.checks import WireError, reads

SMALL = 2**17
"""Bytes of a message that travels so, at the most. Messages with the same arrays share their pieces, and packed they have
copies of their own: a copy is to cost less than the requests for the pieces. Chosen by judgement, not measured."""
_NAME = "packed"


def pack(records: RecordDict) -> RecordDict:
    """The same records in one; as they are if they have more than SMALL bytes, are packed already, or Flower cannot pack."""
    tensors = sum(len(array.data) for record in records.array_records.values() for array in record.values())
    to_proto = names.find("recorddict_to_proto")
    if tensors > SMALL or is_packed(records) or to_proto is None:
        return records
    content = to_proto(records).SerializeToString()
    return records if len(content) > SMALL else RecordDict({_NAME: ConfigRecord({_NAME: content})})


def is_packed(records: RecordDict) -> bool:
    """Whether these records are those of `pack`, however damaged."""
    return list(records) == [_NAME]


@reads
def unpack(records: RecordDict) -> RecordDict:
    """What was packed; as they are if nothing was. Raises WireError for what cannot be read, or has more than SMALL bytes."""
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
