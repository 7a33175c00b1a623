"""A node's part in one secure sum, step by step, and what the server does with the answers.

    keys     every node u draws two key pairs and a seed b_u: one pair seals envelopes, the other makes masks
    shares   u splits b_u and the seed of its masking key among all nodes, in envelopes that the server cannot open
    masked   u sends x_u + PRG(b_u) + sum over v > u of PRG(u, v) - sum over v < u of PRG(u, v)
    reveal   of a node whose x_u came the others give their shares of b_u, of one that dropped out those of its masking key

Of no node both are ever given: with both the server could take every mask off one update. A node answers each step once, in
this order; what it knows of a step is all in the object of that step (`Keys`, `Shared`, `Masked`), of plain values, so that it
can be kept between messages, and is forgotten with the next one. Nodes are named by their public masking key.
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
"""Of a secure sum: of two nodes, each would know the other's part by taking off its own."""


class SecureError(QuickbloomError):
    """A step that this node refuses, or that cannot be done; the text says why."""


@dataclass(frozen=True)
class PublicKeys:
    """What a node tells all others: `sealing` for envelopes, `masking` for masks, which also is its name."""

    sealing: bytes
    masking: bytes


@dataclass(frozen=True)
class Shares:
    """What a node sends in the second step, by the position of the receiver: envelopes and digests of what is in them.

    `own_digest`: of the seed of its own mask.
    """

    sealed: list[bytes]
    own_digests: list[bytes]
    masking_digests: list[bytes]
    own_digest: bytes


@dataclass(frozen=True)
class Envelope:
    """What one node has sealed for another, and the digests of the two shares in it."""

    sealed: bytes
    own_digest: bytes
    masking_digest: bytes


def needed(threshold: float, nodes: int) -> int:
    """How many of so many nodes must stay until the end: the part `threshold`, or more where that is not safe."""
    wanted = math.ceil(threshold * nodes - 1e-9)
    return next((t for t in range(wanted, nodes) if safe(t, nodes)), nodes)


def safe(threshold: int, nodes: int) -> bool:
    """Whether a server that tells every node another story of who dropped out cannot single out one update.

    For that it would need `threshold` shares of the masking keys of `threshold` - 1 nodes, and the nodes - 1 others give shares
    of at most nodes - threshold keys each. Of three nodes two are safe although both numbers are 2, since no node gives a share
    of its own key. It follows that `threshold` is more than half, so nobody's two secrets can both be restored.
    """
    if not LEAST_NODES <= nodes <= MOST_NODES or not threshold <= nodes:
        return False
    return threshold * (threshold - 1) > (nodes - 1) * (nodes - threshold) or (nodes, threshold) == (3, 2)


def group_of(session: bytes, threshold: int, peers: Sequence[PublicKeys]) -> bytes:
    """What a sum of these nodes is known by. It is part of every key, so that nodes that the server told of other peers than
    one another can open none of each other's envelopes."""
    keys = b"".join(peer.sealing + peer.masking for peer in peers)
    return digest(keys, b"group", session, threshold.to_bytes(4, "big"))


def usable(keys: PublicKeys) -> bool:
    """Whether these are public keys with which two nodes can share a secret."""
    try:
        for key in (keys.sealing, keys.masking):
            agreed(X25519PrivateKey.generate(), key)
    except ValueError:
        return False
    return keys.sealing != keys.masking


@dataclass(frozen=True)
class Keys:
    """After the first step: the secrets of one session. `sealing` is a private key, `masking` and `own` are seeds."""

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
        """The second step: split the secrets among `peers`, which are all nodes of the sum with this one.

        `least`: nodes that a sum must have for this node to be in it. Raises SecureError for what would not be safe.
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
    """After the second step: the secrets, and the public keys of all nodes by position. `group`: see `group_of`."""

    session: bytes
    group: bytes
    sealing: bytes
    masking: bytes
    own: bytes
    threshold: int
    sealings: list[bytes]
    maskings: list[bytes]

    def mask(self, values: "np.ndarray[tuple[int], np.dtype[np.float64]]", envelopes: Mapping[bytes, Envelope]) -> "Opened":
        """The third step: hide `values`. `envelopes`: for this node, by the name of the node that sealed them.

        Those who sealed none are no part of the sum. Shares that cannot be read or are not those of the digests are kept as
        none: their owner's masks are then restored without this node, or not at all. Raises SecureError if too few are left.
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
        """The shares of the owner's own mask and masking key; empty unless both are there and what their digests say."""
        sealing = self.sealings[self.maskings.index(owner)]
        text = unseal(_envelope_key(self.sealing, sealing, self.group, owner, me), envelope.sealed, self.group) or b""
        own, masking = text[:SHARE_BYTES], text[SHARE_BYTES:]
        digests = [digest(s, k, self.group, owner, me) for s, k in ((own, b"own"), (masking, b"masking"))]
        return (own, masking) if digests == [envelope.own_digest, envelope.masking_digest] else (b"", b"")


@dataclass(frozen=True)
class Masked:
    """After the third step, when the node's own secrets are gone: what others entrusted to it. b"": could not be read."""

    session: bytes
    me: bytes
    threshold: int
    owners: list[bytes]
    own_shares: list[bytes]
    masking_shares: list[bytes]

    def reveal(self, survivors: Sequence[bytes], dropped: Sequence[bytes]) -> list[bytes]:
        """The fourth step: of every survivor the share of its own mask, of all others that of its masking key, in this order.

        Raises SecureError if both kinds are asked for of one node, if other nodes are asked for than those of the sum, or if
        too few have survived: a sum of few says too much of each.
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
    """What the third step makes: what to keep, and what to send."""

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
    """What of `shares` goes to the node at `position`."""
    return Envelope(shares.sealed[position], shares.own_digests[position], shares.masking_digests[position])


def true_share(shares: Shares, kind: str, position: int, share: bytes, group: bytes, owner: bytes, receiver: bytes) -> bool:
    """Whether `share` is what `owner` gave to the node at `position`. `kind`: "own" or "masking"."""
    digests = shares.own_digests if kind == "own" else shares.masking_digests
    return digest(share, kind.encode(), group, owner, receiver) == digests[position]


def restore_own(shares: Mapping[int, bytes], threshold: int, group: bytes, owner: bytes, expected: bytes) -> bytes | None:
    """The seed of a survivor's own mask; None if the shares do not give the one that it had announced."""
    seed = restore(shares, threshold)
    return seed if digest(seed, b"seed", group, owner) == expected else None


def restore_masking(shares: Mapping[int, bytes], threshold: int, owner: bytes) -> bytes | None:
    """The seed of a dropped node's masking key; None if the shares do not give its key."""
    seed = restore(shares, threshold)
    return seed if public_bytes(private_key(seed)) == owner else None


def unmask(
    masked: Mapping[bytes, Integers], own: Mapping[bytes, bytes], dropped: Mapping[bytes, bytes], group: bytes
) -> Integers:
    """The sum of what the survivors hid. `masked`, `own`: their updates and seeds; `dropped`: the seeds of the others."""
    total: Integers = np.sum(list(masked.values()), axis=0, dtype=np.uint64)
    for seed in own.values():
        total -= self_mask(seed, group, len(total))
    for seed in dropped.values():
        key = private_key(seed)
        for name in masked:
            total += pair_mask(key, name, group, len(total))  # minus what `name` had added
    return total
