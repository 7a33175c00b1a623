"""A node's steps in one secure sum, and the server's computations on the answers.

    keys     every node u draws two key pairs and a seed b_u: one pair seals envelopes, the other makes masks
    shares   u splits b_u and the seed of its masking key among all nodes, in envelopes that the server cannot open
    masked   u sends x_u + PRG(b_u) + sum over v > u of PRG(u, v) - sum over v < u of PRG(u, v)
    reveal   for a node whose x_u arrived the others send their shares of b_u, else their shares of its masking key

Both kinds of shares are never sent for one node: with both the server could remove every mask from
its update. A node answers each step once, in this order. Its knowledge after a step is in one
object of plain values (`Keys`, `Shared`, `Masked`), which can be stored between messages and is
forgotten at the next step. Nodes are named by their public masking key.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from quickbloom.common.errors import QuickbloomError
from quickbloom.common.wire.secure.masks import (
    KEY_BYTES,
    MOST_NODES,
    SEED_BYTES,
    Integers,
    agreed,
    derive,
    pair_mask,
    private_key,
    public_bytes,
    self_mask,
    to_integers,
)
from quickbloom.common.wire.secure.shares import SHARE_BYTES, digest, restore, seal, split, unseal

Random = Callable[[int], bytes]

LEAST_NODES = 3
"""Fewest nodes of a secure sum: with two nodes, each could subtract its own share."""


class SecureError(QuickbloomError):
    """A step that this node refuses or that cannot be done; the message says why."""


@dataclass(frozen=True)
class PublicKeys:
    """A node's public keys: `sealing` for envelopes, `masking` for masks and as its name."""

    sealing: bytes
    masking: bytes


@dataclass(frozen=True)
class Shares:
    """A node's message of the second step, by position of the receiver: envelopes, and digests of the shares inside.

    `own_digest`: digest of the seed of its own mask.
    """

    sealed: list[bytes]
    own_digests: list[bytes]
    masking_digests: list[bytes]
    own_digest: bytes


@dataclass(frozen=True)
class Envelope:
    """Shares that one node has sealed for another, and the digests of the two shares inside."""

    sealed: bytes
    own_digest: bytes
    masking_digest: bytes


def needed(threshold: float, nodes: int) -> int:
    """Return how many of `nodes` nodes must stay until the end: the share `threshold`, or more if that is not safe."""
    wanted = math.ceil(threshold * nodes - 1e-9)
    return next((t for t in range(wanted, nodes) if safe(t, nodes)), nodes)


def safe(threshold: int, nodes: int) -> bool:
    """Return whether a server that lies to every node about drop-outs cannot isolate a single update.

    For that the server would need `threshold` shares of the masking keys of `threshold` - 1 nodes.
    The nodes - 1 others give shares of at most nodes - threshold keys each. With three nodes a
    threshold of two is safe although both numbers are 2, since no node gives a share of its own
    key. It follows that `threshold` is more than half, so that both secrets of one node can never
    be restored.
    """
    if not LEAST_NODES <= nodes <= MOST_NODES or not threshold <= nodes:
        return False
    return threshold * (threshold - 1) > (nodes - 1) * (nodes - threshold) or (nodes, threshold) == (3, 2)


def group_of(session: bytes, threshold: int, peers: Sequence[PublicKeys]) -> bytes:
    """Return the identifier of a sum of these nodes.

    It is part of every key: nodes to which the server named different peers cannot open each
    other's envelopes.
    """
    keys = b"".join(peer.sealing + peer.masking for peer in peers)
    return digest(keys, b"group", session, threshold.to_bytes(4, "big"))


def usable(keys: PublicKeys) -> bool:
    """Return whether these are public keys with which two nodes can share a secret."""
    try:
        for key in (keys.sealing, keys.masking):
            agreed(X25519PrivateKey.generate(), key)
    except ValueError:
        return False
    return keys.sealing != keys.masking


@dataclass(frozen=True)
class Keys:
    """A node's secrets after the first step. `sealing` is a private key; `masking` and `own` are seeds."""

    session: bytes
    sealing: bytes
    masking: bytes
    own: bytes

    @classmethod
    def fresh(cls, session: bytes, random: Random) -> "Keys":
        return cls(session, random(KEY_BYTES), random(SEED_BYTES), random(SEED_BYTES))

    @property
    def public(self) -> PublicKeys:
        sealing = X25519PrivateKey.from_private_bytes(self.sealing)
        return PublicKeys(public_bytes(sealing), public_bytes(private_key(self.masking)))

    def share(self, peers: Sequence[PublicKeys], threshold: int, least: int = 0) -> tuple["Shared", Shares]:
        """Take the second step: split the secrets among `peers`, all nodes of the sum including this one.

        `least`: smallest sum that this node takes part in. Raises SecureError for an unsafe
        request.
        """
        if not safe(threshold, len(peers)):
            raise SecureError(f"a secure sum of {len(peers)} nodes of which {threshold} suffice is not safe")
        if threshold < least:
            raise SecureError(f"node setting `least-in-sum` is {least}, but {threshold} nodes would suffice for this sum")
        if len({key for peer in peers for key in (peer.sealing, peer.masking)}) != 2 * len(peers) or self.public not in peers:
            raise SecureError("the nodes of a secure sum must have different keys, and this node must be among them")
        me, group = self.public.masking, group_of(self.session, threshold, peers)
        own, masking = (split(secret, threshold, len(peers)) for secret in (self.own, self.masking))
        sealed, own_digests, masking_digests = [], [], []
        for peer, own_share, masking_share in zip(peers, own, masking, strict=True):
            key = _envelope_key(self.sealing, peer.sealing, group, me, peer.masking)
            sealed.append(seal(key, own_share + masking_share, group))
            own_digests.append(digest(own_share, b"own", group, me, peer.masking))
            masking_digests.append(digest(masking_share, b"masking", group, me, peer.masking))
        keys = {"session": self.session, "sealing": self.sealing, "masking": self.masking, "own": self.own}
        shared = Shared(
            **keys, group=group, threshold=threshold, sealings=[p.sealing for p in peers], maskings=[p.masking for p in peers]
        )
        return shared, Shares(sealed, own_digests, masking_digests, digest(self.own, b"seed", group, me))


@dataclass(frozen=True)
class Shared:
    """A node's secrets after the second step, with the public keys of all nodes by position. `group`: see `group_of`."""

    session: bytes
    group: bytes
    sealing: bytes
    masking: bytes
    own: bytes
    threshold: int
    sealings: list[bytes]
    maskings: list[bytes]

    def mask(self, values: "np.ndarray[tuple[int], np.dtype[np.float64]]", envelopes: Mapping[bytes, Envelope]) -> "Opened":
        """Take the third step: mask `values`. `envelopes`: those for this node, by the name of the sender.

        Nodes without an envelope are not part of the sum. Shares that are unreadable or do not
        match their digests are stored as empty; their owner's masks are then restored by other
        nodes, or not at all. Raises SecureError if too few nodes are left.
        """
        own_key = private_key(self.masking)
        me, names = public_bytes(own_key), set(self.maskings)
        if not envelopes.keys() <= names or me not in envelopes or len(envelopes) < self.threshold:
            raise SecureError(f"{len(envelopes)} nodes are left for a secure sum that needs {self.threshold}, with this one")
        total = to_integers(values) + self_mask(self.own, self.group, len(values))
        own_shares, masking_shares = [], []
        for owner, envelope in envelopes.items():
            if owner != me:
                total += pair_mask(own_key, owner, self.group, len(values))
            own_share, masking_share = self._shares_in(envelope, owner, me)
            own_shares.append(own_share)
            masking_shares.append(masking_share)
        after = Masked(self.session, me, self.threshold, list(envelopes), own_shares, masking_shares)
        return Opened(after, total)

    def _shares_in(self, envelope: Envelope, owner: bytes, me: bytes) -> tuple[bytes, bytes]:
        """Return the shares of the owner's own mask and masking key; both empty unless both match their digests."""
        sealing = self.sealings[self.maskings.index(owner)]
        text = unseal(_envelope_key(self.sealing, sealing, self.group, owner, me), envelope.sealed, self.group) or b""
        own, masking = text[:SHARE_BYTES], text[SHARE_BYTES:]
        digests = [digest(s, k, self.group, owner, me) for s, k in ((own, b"own"), (masking, b"masking"))]
        return (own, masking) if digests == [envelope.own_digest, envelope.masking_digest] else (b"", b"")


@dataclass(frozen=True)
class Masked:
    """Shares entrusted by others, after the third step, when the node's own secrets are gone. b"" marks an unreadable share."""

    session: bytes
    me: bytes
    threshold: int
    owners: list[bytes]
    own_shares: list[bytes]
    masking_shares: list[bytes]

    def reveal(self, survivors: Sequence[bytes], dropped: Sequence[bytes]) -> list[bytes]:
        """Take the fourth step: return the share of every survivor's own mask, then of every dropped node's masking key.

        Raises SecureError if both kinds are requested for one node, if the nodes are not those of
        the sum, or if too few have survived: a sum of few nodes reveals too much about each.
        """
        asked = [*survivors, *dropped]
        if len(set(asked)) != len(asked):
            raise SecureError("the server asks for both shares of one node, which would unmask it")
        if set(asked) != set(self.owners) or self.me not in survivors:
            raise SecureError("the server asks for shares of other nodes than those of this sum")
        if len(survivors) < self.threshold:
            raise SecureError(f"the server asks for a sum of {len(survivors)} nodes, and {self.threshold} are needed")
        own, masking = (dict(zip(self.owners, shares, strict=True)) for shares in (self.own_shares, self.masking_shares))
        return [own[name] for name in survivors] + [masking[name] for name in dropped]


@dataclass(frozen=True)
class Opened:
    """Result of the third step: the object to store, and the numbers to send."""

    after: Masked
    masked: Integers


def _envelope_key(own: bytes, other: bytes, group: bytes, owner: bytes, receiver: bytes) -> bytes:
    try:
        shared = agreed(X25519PrivateKey.from_private_bytes(own), other)
    except ValueError:
        raise SecureError("a node of the secure sum has no usable key") from None
    return derive(shared, b"envelope", group, owner, receiver)


# ---- the server's side


def envelope_for(shares: Shares, position: int) -> Envelope:
    """Return the envelope in `shares` for the node at `position`."""
    return Envelope(shares.sealed[position], shares.own_digests[position], shares.masking_digests[position])


def true_share(shares: Shares, kind: str, position: int, share: bytes, group: bytes, owner: bytes, receiver: bytes) -> bool:
    """Return whether `share` is what `owner` gave to the node at `position`. `kind`: "own" or "masking"."""
    digests = shares.own_digests if kind == "own" else shares.masking_digests
    return digest(share, kind.encode(), group, owner, receiver) == digests[position]


def restore_own(shares: Mapping[int, bytes], threshold: int, group: bytes, owner: bytes, expected: bytes) -> bytes | None:
    """Return the seed of a survivor's own mask; None if the shares do not give the announced seed."""
    seed = restore(shares, threshold)
    return seed if digest(seed, b"seed", group, owner) == expected else None


def restore_masking(shares: Mapping[int, bytes], threshold: int, owner: bytes) -> bytes | None:
    """Return the seed of a dropped node's masking key; None if the shares do not give that key."""
    seed = restore(shares, threshold)
    return seed if public_bytes(private_key(seed)) == owner else None


def unmask(
    masked: Mapping[bytes, Integers], own: Mapping[bytes, bytes], dropped: Mapping[bytes, bytes], group: bytes
) -> Integers:
    """Return the sum of the survivors' values.

    `masked`, `own`: the survivors' masked values and seeds; `dropped`: seeds of the other nodes'
    masking keys.
    """
    total: Integers = np.sum(list(masked.values()), axis=0, dtype=np.uint64)
    for seed in own.values():
        total -= self_mask(seed, group, len(total))
    for seed in dropped.values():
        key = private_key(seed)
        for name in masked:
            total += pair_mask(key, name, group, len(total))  # the negative of the mask that `name` added
    return total
