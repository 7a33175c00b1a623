"""A round in which the server sees only the sum over the nodes: the server's side of `common.wire.secure.protocol`.

A node that fails, is late or sends an invalid answer in a step drops out: its part is missing
unless it has arrived, and all others count. Properties of an update that masking hides are checked
on the sum.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp import Grid

from quickbloom.common.config.run import RunConfig
from quickbloom.common.maths.params import Params, norm
from quickbloom.common.wire.centring import MeansRequest
from quickbloom.common.wire.messages import TrainRequest, WireError
from quickbloom.common.wire.secure.masks import FRACTION_BITS, MOST_NODES, Integers, to_numbers
from quickbloom.common.wire.secure.messages import (
    KEYS,
    MASKED,
    REVEAL,
    SESSION_BYTES,
    SHARES,
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    RevealReply,
    RevealRequest,
    SharesReply,
    SharesRequest,
)
from quickbloom.common.wire.secure.protocol import (
    LEAST_NODES,
    PublicKeys,
    Shares,
    envelope_for,
    group_of,
    needed,
    restore_masking,
    restore_own,
    true_share,
    unmask,
    usable,
)
from quickbloom.common.wire.secure.updates import Totals, from_row, length
from quickbloom.server_app.messaging.exchange import Exchange, Read, Request
from quickbloom.server_app.messaging.phases import AGGREGATING, WAITING

_ROUNDING = 1e-3
"""Rounding of counts in a sum, each of which every node has rounded."""


def unfit(nodes: int) -> str | None:
    """Return why so many nodes make no secure sum, and how to mend it; None if they make one."""
    if nodes < LEAST_NODES:
        return (
            f"it has {nodes} node{'s' * (nodes != 1)}, and a secure sum needs {LEAST_NODES}; "
            "connect more nodes, or let more tasks take part"
        )
    if nodes > MOST_NODES:
        return (
            f"it has {nodes} nodes, and a secure sum takes at most {MOST_NODES}; "
            "let fewer tasks take part, or host more tasks on a node"
        )
    return None


@dataclass
class SecureSum:
    """One secure sum. `by_node`: the tasks of every node that is asked; `request`: what a node computes for its tasks.

    `encoded`: the meta-parameters as they are sent; `kind`: of the message that asks for what is summed.
    """

    config: RunConfig
    grid: Grid
    exchange: Exchange
    number: int
    by_node: Mapping[int, list[str]]
    request: Callable[[list[str]], TrainRequest | MeansRequest]
    like: Params
    encoded: ArrayRecord | None
    timeout: float | None = None
    kind: str = MASKED
    session: bytes = field(default_factory=lambda: os.urandom(SESSION_BYTES))

    def totals(self) -> tuple[Totals, list[int]]:
        """Return the sum, and its nodes. Raises TooFewError if too many have dropped out."""
        keys = self._keys()
        threshold = needed(self.config.secure_threshold, len(keys))
        shares = self._shares(keys, threshold)
        masked = self._masked(keys, shares, threshold)
        own, dropped = self._seeds(keys, shares, masked, threshold)
        names = {node_id: keys[node_id].masking for node_id in keys}
        by_name = {names[node_id]: numbers for node_id, numbers in masked.items()}
        total = unmask(by_name, own, dropped, group_of(self.session, threshold, list(keys.values())))
        return from_row(to_numbers(total), self.like), list(masked)

    def _keys(self) -> dict[int, PublicKeys]:
        found: dict[int, PublicKeys] = {}

        def read(node_id: int, records: RecordDict, _: list[str]) -> None:
            keys = KeysReply.from_records(records).keys
            taken = {key for other in found.values() for key in (other.sealing, other.masking)}
            if not usable(keys) or taken & {keys.sealing, keys.masking}:
                raise WireError("its keys cannot be used, or are those of another node")
            found[node_id] = keys

        self._ask(KEYS, list(self.by_node), lambda *_: KeysRequest(self.session).to_records(), read)
        self._check_left(len(found), LEAST_NODES)
        return found

    def _shares(self, keys: Mapping[int, PublicKeys], threshold: int) -> dict[int, Shares]:
        found: dict[int, Shares] = {}
        request = SharesRequest(self.session, threshold, list(keys.values()))

        def read(node_id: int, records: RecordDict, _: list[str]) -> None:
            found[node_id] = SharesReply.from_records(records, len(keys)).shares

        self._ask(SHARES, list(keys), lambda *_: request.to_records(), read)
        self._check_left(len(found), threshold)
        return found

    def _masked(self, keys: Mapping[int, PublicKeys], shares: Mapping[int, Shares], threshold: int) -> dict[int, Integers]:
        found: dict[int, Integers] = {}
        position = {node_id: i for i, node_id in enumerate(keys)}

        def request(node_id: int, task_ids: list[str]) -> RecordDict:
            envelopes = {keys[owner].masking: envelope_for(made, position[node_id]) for owner, made in shares.items()}
            return MaskedRequest(self.request(task_ids), self.session, envelopes).to_records(self.encoded)

        def read(node_id: int, records: RecordDict, _: list[str]) -> None:
            found[node_id] = MaskedReply.from_records(records, length(self.like)).masked

        self._ask(self.kind, list(shares), request, read)
        self._check_left(len(found), threshold)
        return found

    def _seeds(
        self, keys: Mapping[int, PublicKeys], shares: Mapping[int, Shares], masked: Mapping[int, Integers], threshold: int
    ) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """Return by name the seeds of the survivors' own masks, and those of the masking keys of the nodes that dropped out."""
        group = group_of(self.session, threshold, list(keys.values()))
        survivors, dropped = list(masked), [node_id for node_id in shares if node_id not in masked]
        owners = survivors + dropped
        kinds = ["own"] * len(survivors) + ["masking"] * len(dropped)
        name = {node_id: keys[node_id].masking for node_id in owners}
        position = {node_id: i for i, node_id in enumerate(keys)}
        given: dict[int, dict[int, bytes]] = {}
        request = RevealRequest(self.session, [name[i] for i in survivors], [name[i] for i in dropped])

        def read(node_id: int, records: RecordDict, _: list[str]) -> None:
            came = RevealReply.from_records(records, len(owners)).shares
            for owner, kind, share in zip(owners, kinds, came, strict=True):
                at = position[node_id]
                if share and not true_share(shares[owner], kind, at, share, group, name[owner], name[node_id]):
                    raise WireError("a share that it gives is not the one that was entrusted to it")
            given[node_id] = dict(zip(owners, came, strict=True))

        self._ask(REVEAL, survivors, lambda *_: request.to_records(), read)
        self._check_left(len(given), threshold)
        seeds: dict[str, dict[bytes, bytes]] = {"own": {}, "masking": {}}
        for owner, kind in zip(owners, kinds, strict=True):
            parts = {position[node_id]: found[owner] for node_id, found in given.items() if found[owner]}
            if len(parts) < threshold:
                self._blame_for_missing(owner, [node_id for node_id, found in given.items() if not found[owner]], len(given))
            elif seed := _restored(kind, parts, threshold, group, name[owner], shares[owner]):
                seeds[kind][name[owner]] = seed
            else:
                self.exchange.blame(owner, "the shares of its secrets do not fit together")
        if sum(map(len, seeds.values())) < len(owners):
            raise self.exchange.too_few("the masks of the sum cannot be taken off")
        return seeds["own"], seeds["masking"]

    def _blame_for_missing(self, owner: int, without: Sequence[int], answered: int) -> None:
        """Most nodes are honest: if most cannot read an envelope, it is invalid, else the nodes lie that say they cannot."""
        if 2 * len(without) > answered:
            self.exchange.blame(owner, "its envelopes cannot be opened by those whom they are for")
            return
        for node_id in without:
            self.exchange.blame(node_id, f"it gives no share of node {owner}, whose envelopes others can open")

    def _ask(self, kind: str, node_ids: Sequence[int], request: Request, read: Read) -> None:
        asked = {node_id: self.by_node[node_id] for node_id in node_ids}
        messages = self.exchange.address(asked, kind, self.number, request)
        self.exchange.enter(WAITING)
        replies = self.grid.send_and_receive(messages, timeout=self.timeout)
        self.exchange.enter(AGGREGATING)
        self.exchange.receive(replies, read)

    def _check_left(self, nodes: int, least: int) -> None:
        if nodes < least:
            raise self.exchange.too_few(f"{nodes} of {len(self.by_node)} nodes are left for a secure sum that needs {least}")


def _restored(kind: str, parts: Mapping[int, bytes], threshold: int, group: bytes, owner: bytes, made: Shares) -> bytes | None:
    if kind == "own":
        return restore_own(parts, threshold, group, owner, made.own_digest)
    return restore_masking(parts, threshold, owner)


def check_totals(totals: Totals, tasks: int, most_weight: float, max_norm: float, *, nodes: int = 1) -> str | None:
    """Return in words why honest nodes cannot have this sum; None if they can.

    `max_norm`: of the mean meta-gradient, 0: any; `nodes`: their number, since each rounds every
    number of the sum. Under privacy no honest task's data may decide this.
    """
    weight, within = totals.weight, totals.within
    if not 0 <= totals.tasks <= tasks or (weight > 0) != (totals.tasks > 0):
        return f"it counts {totals.tasks} tasks of weight {weight:g}, and {tasks} were asked for"
    if not 0 <= weight <= most_weight * (1 + _ROUNDING) or not -_ROUNDING <= within <= weight + _ROUNDING:
        return f"its weight is {weight:g}, and the tasks asked for can have at most {most_weight:g}"
    if totals.losses < -_ROUNDING * (1 + totals.tasks):
        return f"its losses add up to {totals.losses:g}"
    size = sum(value.numel() for value in totals.gradient.values())
    rounding = nodes * 2.0 ** -(FRACTION_BITS + 1) * math.sqrt(size) / max(weight, 1e-300)
    if max_norm and (found := norm(totals.gradient)) > max_norm * (1 + _ROUNDING) + rounding:
        return f"its mean meta-gradient has norm {found:.6g}, above the {max_norm:g} to which every task is clipped"
    return None
