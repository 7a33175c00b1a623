"""The protocol without a network: exact sums whoever drops out, secrets that are gone, and nodes that refuse a lying server."""

from dataclasses import replace
from itertools import combinations, product
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from Crypto.Protocol.SecretSharing import Shamir
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.secure.masks import Integers, to_numbers
from quickbloom.common.wire.secure.messages import recall, remember
from quickbloom.common.wire.secure.protocol import (
    Envelope,
    Keys,
    Masked,
    PublicKeys,
    SecureError,
    Shared,
    Shares,
    _envelope_key,
    envelope_for,
    group_of,
    needed,
    restore_masking,
    restore_own,
    safe,
    true_share,
    unmask,
    usable,
)
from quickbloom.common.wire.secure.shares import restore, seal, split, unseal
from quickbloom.common.wire.secure.updates import from_row, length, to_row

SESSION = b"session of tests"
LENGTH = 30


class Sum:
    """One secure sum over `nodes` nodes; who is in `gone[step]` answers nothing from that step on."""

    def __init__(self, nodes: int, threshold: float = 0.66, /, **gone: set[int]) -> None:
        self.rng = generator(nodes, "secure", *sorted(gone))
        self.threshold = 0
        self.values = self.rng.normal(size=(nodes, LENGTH)) * 50
        present = [i for i in range(nodes) if i not in gone.get("keys", set())]
        self.keys = {i: Keys.fresh(SESSION, self.rng.bytes) for i in present}
        self.peers = [self.keys[i].public for i in present]
        self.name = {i: self.keys[i].public.masking for i in present}
        self.threshold = needed(threshold, len(present))
        self.group = group_of(SESSION, self.threshold, self.peers)
        self.shared: dict[int, Shared] = {}
        self.shares: dict[int, Shares] = {}
        for i in present:
            if i not in gone.get("shares", set()):
                self.shared[i], self.shares[i] = self.keys[i].share(self.peers, self.threshold)
        self.held: dict[int, Masked] = {}
        self.sent: dict[int, Integers] = {}
        for i, stage in self.shared.items():
            opened = stage.mask(self.values[i], self.envelopes(i))
            self.held[i] = opened.after
            if i not in gone.get("masked", set()):
                self.sent[i] = opened.masked
        self.answering = [i for i in self.sent if i not in gone.get("reveal", set())]

    def envelopes(self, receiver: int) -> dict[bytes, Envelope]:
        at = list(self.keys).index(receiver)
        return {self.name[owner]: envelope_for(made, at) for owner, made in self.shares.items()}

    def total(self) -> np.ndarray[Any, Any]:
        survivors, dropped = list(self.sent), [i for i in self.shared if i not in self.sent]
        owners = survivors + dropped
        given = {
            i: self.held[i].reveal([self.name[j] for j in survivors], [self.name[j] for j in dropped]) for i in self.answering
        }
        position = {i: at for at, i in enumerate(self.keys)}
        own, masking = {}, {}
        for at, owner in enumerate(owners):
            parts = {position[i]: shares[at] for i, shares in given.items()}
            if owner in self.sent:
                expected = self.shares[owner].own_digest
                own[self.name[owner]] = restore_own(parts, self.threshold, self.group, self.name[owner], expected) or b""
            else:
                masking[self.name[owner]] = restore_masking(parts, self.threshold, self.name[owner]) or b""
        return to_numbers(unmask({self.name[i]: sent for i, sent in self.sent.items()}, own, masking, self.group))


@pytest.mark.parametrize("nodes", [3, 5, 10])
@pytest.mark.parametrize("step", ["keys", "shares", "masked", "reveal"])
@pytest.mark.parametrize("how_many", ["0", "1", "most"])
def test_the_sum_is_exact_whoever_drops_out_in_whichever_step(nodes: int, step: str, how_many: str) -> None:
    # With the first two nodes of three gone before the keys are known there is no sum of three any more.
    most = nodes - 3 if step == "keys" else nodes - needed(0.66, nodes)
    gone = set(range({"0": 0, "1": min(1, most), "most": most}[how_many]))
    run = Sum(nodes, 0.66, **{step: gone})
    expected = run.values[[i for i in range(nodes) if i not in gone or step == "reveal"]].sum(axis=0)
    assert np.abs(run.total() - expected).max() < 1e-4


def test_drop_outs_in_all_steps_at_once() -> None:
    run = Sum(14, 0.6, keys={0}, shares={1}, masked={2, 3}, reveal={4})  # 9 of 13 are needed
    assert np.abs(run.total() - run.values[4:].sum(axis=0)).max() < 1e-4


def test_with_one_answer_less_than_needed_nothing_is_restored() -> None:
    run = Sum(5)
    parts = {i: run.held[i].own_shares[0] for i in range(run.threshold)}
    assert restore(parts, run.threshold) == run.keys[0].own
    fewer = {i: parts[i] for i in range(run.threshold - 1)}
    assert restore_own(fewer, run.threshold, run.group, run.name[0], run.shares[0].own_digest) is None


@pytest.mark.parametrize(
    ("threshold", "nodes", "expected"),
    [(0.66, 3, 2), (0.66, 10, 7), (0.51, 4, 3), (0.6, 5, 4), (1.0, 7, 7), (0.66, 100, 66), (0.51, 1000, 619)],
)
def test_so_many_nodes_are_needed(threshold: float, nodes: int, expected: int) -> None:
    assert needed(threshold, nodes) == expected


# ---- a server that lies


def test_a_node_never_gives_both_shares_of_one_node() -> None:
    run = Sum(5)
    names = list(run.name.values())
    for liar in names[1:]:
        with pytest.raises(SecureError, match="asks for both shares of one node"):
            run.held[0].reveal(names, [liar])
    with pytest.raises(SecureError, match="asks for both shares"):
        run.held[0].reveal([*names, names[1]], [])


def test_no_two_stories_about_who_dropped_out_give_the_server_enough_of_both_shares() -> None:
    # Told apart, nodes 0..2 hear that node 4 survived and nodes 3, 4 that it dropped out: 3 own shares and 1 of the key, for
    # node 4 itself does not believe it. Over all stories, never `threshold` of both.
    run = Sum(5)
    names = list(run.name.values())
    for told in (set(part) for size in range(6) for part in combinations(range(5), size)):
        own = masking = 0
        for i in range(5):
            try:
                run.held[i].reveal(names if i in told else names[:4], [] if i in told else names[4:])
                own, masking = own + (i in told), masking + (i not in told)
            except SecureError:
                assert i == 4
        assert min(own, masking) < run.threshold


@pytest.mark.parametrize(
    ("survivors", "dropped"),
    [
        ([0, 1], [2, 3, 4]),  # too few
        ([1, 2, 3, 4], [0]),  # not with the node that is asked
        ([0, 1, 2, 3], []),  # says nothing of one
        ([0, 1, 2, 3, 4, 9], []),  # one that is no part of it
    ],
)
def test_a_node_refuses_other_sums_than_the_one_it_is_in(survivors: list[int], dropped: list[int]) -> None:
    run = Sum(5)
    names = {**run.name, 9: b"x" * 32}
    with pytest.raises(SecureError):
        run.held[0].reveal([names[i] for i in survivors], [names[i] for i in dropped])


def test_no_stories_about_drop_outs_single_out_one_node() -> None:
    # All sets of survivors that node w of n believes in have t of them and w itself; so it gives at most n - t shares of keys.
    for nodes, threshold in ((3, 2), (4, 3), (5, 4)):
        assert safe(threshold, nodes)
        others = range(1, nodes)
        believed = {w: [set(s) for s in combinations(range(nodes), threshold) if w in s and 0 in s] for w in others}
        for story in product(*believed.values()):
            against = [sum(v not in survivors for survivors in story) for v in others]
            assert sum(count >= threshold for count in against) < threshold - 1
    assert not safe(3, 5)
    assert all(2 * threshold > nodes for nodes in range(3, 60) for threshold in range(nodes + 1) if safe(threshold, nodes))


def test_nodes_that_were_told_of_other_peers_cannot_open_each_others_envelopes() -> None:
    run = Sum(5)
    alone, after = run.keys[1].share(run.peers[:4], 3), run.shared[0]
    envelopes = {**run.envelopes(0), run.name[1]: envelope_for(alone[1], 0)}
    assert after.mask(run.values[0], envelopes).after.own_shares[1] == b""
    assert after.mask(run.values[0], run.envelopes(0)).after.own_shares[1] != b""


def outsider() -> PublicKeys:
    return Keys.fresh(SESSION, generator(99, "outsider").bytes).public


def other_story(run: Sum, kind: str) -> list[PublicKeys]:
    """The peers as another node might be told of them: as many, for the same session and threshold."""
    third = run.peers[2]
    return {
        "another node": [*run.peers[:4], outsider()],
        "another order": [*run.peers[:3], run.peers[4], run.peers[3]],
        "another key for envelopes": [*run.peers[:2], PublicKeys(outsider().sealing, third.masking), *run.peers[3:]],
        "another key for masks": [*run.peers[:2], PublicKeys(third.sealing, outsider().masking), *run.peers[3:]],
    }[kind]


STORIES = ["another node", "another order", "another key for envelopes", "another key for masks"]


@pytest.mark.parametrize("kind", STORIES)
def test_nodes_that_were_told_of_as_many_but_other_peers_cannot_open_each_others_envelopes(kind: str) -> None:
    # The thresholds are equal, so only the keys in the group's digest tell the two stories apart.
    run = Sum(5)
    _, made = run.keys[1].share(other_story(run, kind), run.threshold)
    after = run.shared[0].mask(run.values[0], {**run.envelopes(0), run.name[1]: envelope_for(made, 0)}).after
    assert [share == b"" for share in after.own_shares] == [False, True, False, False, False]
    assert [share == b"" for share in after.masking_shares] == [False, True, False, False, False]


@pytest.mark.parametrize("kind", STORIES)
def test_the_masks_of_nodes_that_were_told_other_stories_do_not_cancel(kind: str) -> None:
    run = Sum(5)
    stage, _ = run.keys[1].share(other_story(run, kind), run.threshold)
    assert stage.group != run.shared[1].group
    # What node 1 sends then is of no use to a server, whatever it is told later.
    named = {run.name[i]: run.envelopes(1)[run.name[i]] for i in (0, 1)} | {
        name: run.envelopes(1)[run.name[0]] for name in stage.maskings[2:]
    }
    run.sent[1] = stage.mask(run.values[1], named).masked
    assert np.abs(run.total() - run.values.sum(axis=0)).max() > 1e6


def test_a_group_is_known_by_session_threshold_and_every_key_in_its_place() -> None:
    run = Sum(5)
    stories = [run.peers, *(other_story(run, kind) for kind in STORIES)]
    # Keys that change places between a node's two roles, and bytes that move from one key to the next.
    swapped = [PublicKeys(run.peers[0].masking, run.peers[0].sealing), *run.peers[1:]]
    groups = [group_of(SESSION, 4, peers) for peers in [*stories, swapped, run.peers[:4]]]
    groups += [group_of(SESSION, 5, run.peers), group_of(b"another session!", 4, run.peers)]
    assert len(set(groups)) == len(groups) == 9


def test_an_envelope_opens_for_one_owner_one_receiver_and_one_group() -> None:
    """The key is bound to all three, and the sealed text to the group once more, as associated data."""
    run = Sum(5)
    me, other, group = run.name[0], run.name[1], run.group
    sealed, secret = run.shares[1].sealed[0], run.keys[0].sealing
    known = (run.peers[1].sealing, group, other, me)
    key = _envelope_key(secret, *known)
    text = unseal(key, sealed, group)
    assert text is not None
    assert text[:16] == run.held[0].own_shares[1]
    assert unseal(key, sealed, b"") is None
    assert unseal(key, sealed, group_of(SESSION, 5, run.peers)) is None
    wrong = [
        (run.peers[2].sealing, group, other, me),
        (run.peers[1].sealing, group_of(SESSION, 5, run.peers), other, me),
        (run.peers[1].sealing, group, run.name[2], me),
        (run.peers[1].sealing, group, other, run.name[2]),
        (run.peers[1].sealing, group, me, other),  # sent back to whom it came from
    ]
    keys = [_envelope_key(secret, *one) for one in wrong]
    assert all(unseal(one, sealed, group) is None for one in keys)
    assert len({key, *keys}) == 6


def test_an_envelope_cannot_be_sent_back_to_whom_it_came_from() -> None:
    # Two nodes share one secret for both directions; only the order of the names tells these apart.
    run = Sum(5)
    back = envelope_for(run.shares[0], 1)  # what node 0 sealed for node 1, as if node 1 had sealed it for node 0
    after = run.shared[0].mask(run.values[0], {**run.envelopes(0), run.name[1]: back}).after
    assert after.own_shares[1] == b""
    digests = [true_share(run.shares[1], "own", 0, run.held[0].own_shares[1], run.group, run.name[1], run.name[0])]
    digests += [true_share(run.shares[1], "own", 0, run.held[0].own_shares[1], run.group, run.name[0], run.name[1])]
    digests += [true_share(run.shares[1], "own", 0, run.held[0].own_shares[1], b"another group", run.name[1], run.name[0])]
    assert digests == [True, False, False]


def test_a_node_refuses_peers_that_share_one_of_their_two_keys() -> None:
    run = Sum(5)
    for peer in (
        PublicKeys(run.peers[1].sealing, outsider().masking),
        PublicKeys(outsider().sealing, run.peers[1].masking),
        PublicKeys(run.peers[1].masking, outsider().masking),
    ):
        with pytest.raises(SecureError, match="different keys"):
            run.keys[0].share([*run.peers[:4], peer], 4)


def test_a_node_hides_nothing_for_nodes_that_it_was_not_told_of() -> None:
    run = Sum(5)
    with pytest.raises(SecureError, match="6 nodes are left"):
        run.shared[0].mask(run.values[0], {**run.envelopes(0), outsider().masking: run.envelopes(0)[run.name[1]]})


def test_a_masking_key_that_is_restored_wrongly_is_none() -> None:
    run = Sum(5)
    parts = {i: run.held[i].masking_shares[2] for i in range(run.threshold)}
    seed = restore_masking(parts, run.threshold, run.name[2])
    assert seed == run.keys[2].masking
    assert restore_masking(parts, run.threshold, run.name[1]) is None
    assert restore_masking({**parts, 0: bytes(16)}, run.threshold, run.name[2]) is None
    # Neither secret is restored from the shares of the other.
    own = {i: run.held[i].own_shares[2] for i in range(run.threshold)}
    assert restore_masking(own, run.threshold, run.name[2]) is None
    assert restore_own(parts, run.threshold, run.group, run.name[2], run.shares[2].own_digest) is None
    assert restore_own(own, run.threshold, run.group, run.name[1], run.shares[2].own_digest) is None
    assert restore_own(own, run.threshold, b"another group", run.name[2], run.shares[2].own_digest) is None


def test_the_smallest_threshold_that_is_safe() -> None:
    # t (t - 1) > (n - 1) (n - t), by hand: for n = 7, t = 4 gives 12 < 18 and t = 5 gives 20 > 12.
    assert [next(t for t in range(n + 1) if safe(t, n)) for n in (3, 4, 5, 7, 10)] == [2, 3, 4, 5, 7]
    # Equal is not safe: n = 16, t = 10 gives 90 = 15 * 6. n = 9, t = 6 gives 30 > 24; n = 6, t = 4 gives 12 > 10.
    assert (safe(6, 9), safe(4, 6), safe(10, 16), safe(11, 16)) == (True, True, False, True)


@pytest.mark.parametrize("threshold", [0, 1, 2, 3, 6])
def test_a_node_refuses_a_threshold_that_two_groups_could_reach(threshold: int) -> None:
    run = Sum(5)
    with pytest.raises(SecureError, match="not safe"):
        run.keys[0].share(run.peers, threshold)


def test_a_node_refuses_to_be_alone_or_one_of_two_or_left_out() -> None:
    run = Sum(5)
    for peers, threshold in ((run.peers[:1], 1), (run.peers[:2], 2)):
        with pytest.raises(SecureError, match="not safe"):
            run.keys[0].share(peers, threshold)
    with pytest.raises(SecureError, match="must be among them"):
        run.keys[0].share(run.peers[1:], 3)
    with pytest.raises(SecureError, match="different keys"):
        run.keys[0].share([*run.peers[:4], run.peers[1]], 4)
    with pytest.raises(SecureError, match="`least-in-sum` is 5, but 4"):
        run.keys[0].share(run.peers, 4, least=5)
    with pytest.raises(SecureError, match="no usable key"):
        run.keys[0].share([*run.peers[:4], PublicKeys(bytes(32), b"y" * 32)], 4)


def test_a_node_hides_nothing_among_too_few() -> None:
    run = Sum(5)
    few = dict(list(run.envelopes(0).items())[: run.threshold - 1])
    with pytest.raises(SecureError, match="3 nodes are left for a secure sum that needs 4"):
        run.shared[0].mask(run.values[0], few)
    without_me = {name: sealed for name, sealed in run.envelopes(0).items() if name != run.name[0]}
    with pytest.raises(SecureError, match="with this one"):
        run.shared[0].mask(run.values[0], without_me)


def test_the_server_cannot_read_or_swap_envelopes() -> None:
    run = Sum(5)
    swapped = dict(zip(run.name.values(), reversed(run.envelopes(0).values()), strict=True))
    swapped[run.name[0]] = run.envelopes(0)[run.name[0]]
    after = run.shared[0].mask(run.values[0], swapped).after
    assert after.own_shares[1:].count(b"") == 3  # the one in the middle stayed where it was
    assert unseal(bytes(32), run.shares[0].sealed[1], run.group) is None


def test_shares_that_are_not_those_of_the_digests_are_kept_as_none() -> None:
    run = Sum(4)
    for field in ("own_digest", "masking_digest"):
        envelopes = run.envelopes(0)
        envelopes[run.name[2]] = replace(envelopes[run.name[2]], **{field: bytes(32)})
        after = run.shared[0].mask(run.values[0], envelopes).after
        assert [share == b"" for share in after.own_shares] == [False, False, True, False]
        assert [share == b"" for share in after.masking_shares] == [False, False, True, False]


def test_a_share_is_known_by_its_digest() -> None:
    run = Sum(3)
    share = run.held[1].own_shares[0]
    known = (run.group, run.name[0], run.name[1])
    assert true_share(run.shares[0], "own", 1, share, *known)
    assert not true_share(run.shares[0], "own", 1, bytes(16), *known)
    assert not true_share(run.shares[0], "masking", 1, share, *known)
    assert not true_share(run.shares[0], "own", 2, share, run.group, run.name[0], run.name[2])


# ---- secrets


def test_keys_are_fresh_in_every_session_and_b_and_masking_key_are_shared_apart() -> None:
    one, two = Keys.fresh(SESSION, np.random.bytes), Keys.fresh(SESSION, np.random.bytes)
    assert not {one.sealing, one.masking, one.own, *vars(one.public).values()} & {two.sealing, two.masking, two.own}
    assert one.public != two.public


def test_what_a_node_knows_after_masking_holds_none_of_its_secrets() -> None:
    run = Sum(4)
    kept = [part for value in vars(run.held[0]).values() for part in (value if isinstance(value, list) else [value])]
    assert not {run.keys[0].sealing, run.keys[0].masking, run.keys[0].own} & set(kept)


def test_a_step_is_remembered_once_and_what_comes_after_replaces_it() -> None:
    run, state = Sum(3), RecordDict()
    for stage in (run.keys[0], run.shared[0], run.held[0]):
        remember(state, stage)
        assert list(state) == ["secure"]
        assert recall(state) == stage
        assert list(state) == []
        assert recall(state) is None


@pytest.mark.parametrize(
    "bad", [PublicKeys(bytes(32), b"k" * 32), PublicKeys(b"k" * 32, bytes(32)), PublicKeys(b"k" * 32, b"k" * 32)]
)
def test_keys_that_would_make_every_node_fail_are_not_usable(bad: PublicKeys) -> None:
    assert not usable(bad)
    assert usable(Keys.fresh(SESSION, np.random.bytes).public)


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=9), st.randoms())
def test_shares_are_combined_as_the_library_combines_them(values: list[bytes], random: Random) -> None:
    places = random.sample(range(4096), len(values))
    theirs = Shamir.combine([(place + 1, value) for place, value in zip(places, values, strict=True)], ssss=False)
    assert restore(dict(zip(places, values, strict=True)), len(values)) == theirs


def test_shares_and_envelopes() -> None:
    secret = bytes(range(16))
    shares = split(secret, 3, 5)
    for chosen in combinations(range(5), 3):
        assert restore({i: shares[i] for i in chosen}, 3) == secret
    assert restore({0: shares[0], 1: shares[1]}, 2) != secret
    sealed = seal(b"k" * 32, secret, b"here")
    assert unseal(b"k" * 32, sealed, b"here") == secret
    assert unseal(b"k" * 32, sealed, b"there") is None
    assert unseal(b"k" * 32, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"here") is None
    assert unseal(b"k" * 32, b"", b"here") is None


# ---- rows


def test_the_sum_of_rows_is_the_row_of_one_node_with_all_tasks() -> None:
    one: Params = {"w": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0])}
    two: Params = {"b": torch.tensor([-1.0]), "w": torch.tensor([[0.5, 0.0]])}  # in an order of its own
    rows = to_row(one, 2.0, [0.5, float("nan"), 1.5], 1.0) + to_row(two, 6.0, [4.0], 0.0)
    assert len(rows) == length(one)
    totals = from_row(rows, one)
    # (2 * 1 + 6 * 0.5) / 8, (2 * 2) / 8, (2 * 3 - 6) / 8
    assert totals.gradient["w"].tolist() == [[0.625, 0.5]]
    assert totals.gradient["b"].tolist() == [0.0]
    assert (totals.weight, totals.losses, totals.tasks, totals.within) == (8.0, 6.0, 3, 1.0)


def test_a_sum_of_nothing_is_zero() -> None:
    totals = from_row(to_row({"w": torch.zeros(2)}, 0.0, [float("nan")], 0.0), {"w": torch.zeros(2)})
    assert totals.gradient["w"].tolist() == [0.0, 0.0]
    assert (totals.weight, totals.tasks) == (0.0, 0)
