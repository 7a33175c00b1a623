"""Messages of a secure sum, one pair for each step of `protocol`, and a node's state between them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from quickbloom.common.wire.arrays import arrays_of, to_arrays
from quickbloom.common.wire.centring import MeansRequest
from quickbloom.common.wire.checks import WireError, byte_strings, config_of, ints, nothing_else, reads
from quickbloom.common.wire.messages import TrainRequest
from quickbloom.common.wire.secure.masks import KEY_BYTES, Integers
from quickbloom.common.wire.secure.protocol import Envelope, Keys, Masked, PublicKeys, Shared, Shares
from quickbloom.common.wire.secure.shares import DIGEST_BYTES, SEALED_BYTES, SHARE_BYTES

KEYS = "query.secure_keys"
SHARES = "query.secure_shares"
MASKED = "train.masked"
REVEAL = "query.secure_reveal"
SESSION_BYTES = 16


Asked = TypeVar("Asked", bound=TrainRequest | MeansRequest)


@dataclass(frozen=True)
class KeysRequest:
    """Request to draw keys for a new session and forget any earlier one."""

    session: bytes

    def to_records(self) -> RecordDict:
        return RecordDict({"secure": ConfigRecord({"session": [self.session]})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "KeysRequest":
        return cls(_session(config_of(records, "secure")))


@dataclass(frozen=True)
class KeysReply:
    """A node's public keys."""

    keys: PublicKeys

    def to_records(self) -> RecordDict:
        return RecordDict({"secure": ConfigRecord({"keys": [self.keys.sealing, self.keys.masking]})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "KeysReply":
        fields = _only(records, {"keys"})
        return cls(PublicKeys(*byte_strings(fields["keys"], "keys", KEY_BYTES, 2)))


@dataclass(frozen=True)
class SharesRequest:
    """Request to split this node's secrets among `peers`, so that `threshold` of them can restore one."""

    session: bytes
    threshold: int
    peers: list[PublicKeys]

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {"session": [self.session], "threshold": self.threshold}
        lists = {"sealings": [peer.sealing for peer in self.peers], "maskings": [peer.masking for peer in self.peers]}
        return RecordDict({"secure": ConfigRecord({**fields, **lists})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "SharesRequest":
        fields = config_of(records, "secure")
        sealings, maskings = (byte_strings(fields[name], name, KEY_BYTES) for name in ("sealings", "maskings"))
        peers = [PublicKeys(sealing, masking) for sealing, masking in zip(sealings, maskings, strict=True)]
        (threshold,) = ints([fields["threshold"]], "threshold", least=1)
        return cls(_session(fields), threshold, peers)


@dataclass(frozen=True)
class SharesReply:
    """Envelopes for all peers, in the order of the request, and digests of their contents."""

    shares: Shares

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = asdict(self.shares)
        return RecordDict({"secure": ConfigRecord({**fields, "own_digest": [self.shares.own_digest]})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, peers: int) -> "SharesReply":
        fields = _only(records, {"sealed", "own_digests", "masking_digests", "own_digest"})
        sealed = byte_strings(fields["sealed"], "sealed", SEALED_BYTES, peers)
        own, masking = (byte_strings(fields[f"{kind}_digests"], "digests", DIGEST_BYTES, peers) for kind in ("own", "masking"))
        (digest,) = byte_strings(fields["own_digest"], "own_digest", DIGEST_BYTES, 1)
        return cls(Shares(sealed, own, masking, digest))


@dataclass(frozen=True)
class MaskedRequest(Generic[Asked]):
    """Request to compute what `of` asks for, but send it masked. `envelopes`: those for this node, by the sender's name."""

    of: Asked
    session: bytes
    envelopes: Mapping[bytes, Envelope]

    def to_records(self, encoded: ArrayRecord | None = None) -> RecordDict:
        made = self.envelopes.values()
        fields: dict[str, Any] = {"session": [self.session], "owners": list(self.envelopes)}
        fields |= {"sealed": [envelope.sealed for envelope in made], "own_digests": [envelope.own_digest for envelope in made]}
        fields |= {"masking_digests": [envelope.masking_digest for envelope in made]}
        return RecordDict({**self.of.to_records(encoded), "secure": ConfigRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, of: type[Asked]) -> "MaskedRequest[Asked]":
        fields = config_of(records, "secure")
        owners = byte_strings(fields["owners"], "owners", KEY_BYTES)
        sealed = byte_strings(fields["sealed"], "sealed", SEALED_BYTES, len(owners))
        own, masking = (
            byte_strings(fields[name], name, DIGEST_BYTES, len(owners)) for name in ("own_digests", "masking_digests")
        )
        if len(set(owners)) != len(owners):
            raise WireError("`owners` names a node twice")
        envelopes = map(Envelope, sealed, own, masking)
        return cls(cast(Asked, of.from_records(records)), _session(fields), dict(zip(owners, envelopes, strict=True)))


@dataclass(frozen=True)
class MaskedReply:
    """A node's masked numbers, [length] integers mod 2^64."""

    masked: Integers

    def to_records(self) -> RecordDict:
        return RecordDict({"masked": to_arrays({"sum": torch.from_numpy(self.masked.view(np.int64))})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, length: int) -> "MaskedReply":
        nothing_else(records, {"masked"})
        arrays = arrays_of(records, "masked")
        nothing_else(arrays, {"sum"})
        came = arrays["sum"]
        if came.dtype != torch.int64 or came.shape != (length,):
            raise WireError(f"the masked numbers must be {length} of int64, got {tuple(came.shape)} of {came.dtype}")
        return cls(came.numpy().view(np.uint64))


@dataclass(frozen=True)
class RevealRequest:
    """Request for the shares that unmask the sum of `survivors`; the masked numbers of `dropped` did not arrive."""

    session: bytes
    survivors: list[bytes]
    dropped: list[bytes]

    def to_records(self) -> RecordDict:
        fields: dict[str, Any] = {"session": [self.session], "survivors": self.survivors, "dropped": self.dropped}
        return RecordDict({"secure": ConfigRecord(fields)})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict) -> "RevealRequest":
        fields = config_of(records, "secure")
        survivors, dropped = (byte_strings(fields[name], name, KEY_BYTES) for name in ("survivors", "dropped"))
        return cls(_session(fields), survivors, dropped)


@dataclass(frozen=True)
class RevealReply:
    """Shares for the survivors, then for the dropped nodes; empty where this node could not read its envelope."""

    shares: list[bytes]

    def to_records(self) -> RecordDict:
        return RecordDict({"secure": ConfigRecord({"shares": self.shares})})

    @classmethod
    @reads
    def from_records(cls, records: RecordDict, number: int) -> "RevealReply":
        fields = _only(records, {"shares"})
        return cls(byte_strings(fields["shares"], "shares", SHARE_BYTES, number, empty=True))


# ---- a node's state between two steps; never part of a message

Stage = Keys | Shared | Masked
_STAGES: dict[str, type[Stage]] = {stage.__name__: stage for stage in (Keys, Shared, Masked)}
_KEPT = "secure"


def remember(state: RecordDict, stage: Stage) -> None:
    """Store `stage` in the node's state, in place of any earlier one."""
    fields: dict[str, Any] = {"stage": type(stage).__name__, **asdict(stage)}
    state[_KEPT] = ConfigRecord(fields)


def recall(state: RecordDict) -> Stage | None:
    """Remove the stored stage from the node's state and return it; None if there is none."""
    kept = state.pop(_KEPT, None)
    if not isinstance(kept, ConfigRecord):
        return None
    fields: dict[str, Any] = dict(kept)
    return _STAGES[fields.pop("stage")](**fields)


def _session(fields: Mapping[str, Any]) -> bytes:
    (session,) = byte_strings(fields["session"], "session", SESSION_BYTES, 1)
    return session


def _only(records: RecordDict, known: set[str]) -> ConfigRecord:
    nothing_else(records, {"secure"})
    fields = config_of(records, "secure")
    nothing_else(fields, known)
    return fields
