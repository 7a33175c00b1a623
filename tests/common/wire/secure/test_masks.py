"""Masks: they cancel in a sum, and what they hide cannot be told from anything else."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quickbloom.common.wire.secure.masks import (
    FRACTION_BITS,
    LARGEST,
    MOST_NODES,
    Integers,
    agreed,
    derive,
    pair_mask,
    private_key,
    public_bytes,
    self_mask,
    stream,
    to_integers,
    to_numbers,
)
from quickbloom.common.wire.secure.updates import Numbers

SESSION = b"s" * 16


def seed(number: int) -> bytes:
    return number.to_bytes(16, "big")


@given(st.lists(st.floats(-LARGEST, LARGEST), min_size=1, max_size=20))
def test_numbers_come_back_to_half_a_step(values: list[float]) -> None:
    back = to_numbers(to_integers(np.array(values)))
    assert np.abs(back - values).max() <= 2.0 ** -(FRACTION_BITS + 1)


def test_a_sum_over_the_most_nodes_of_the_largest_numbers_fits_and_rounding_stays_below_1e_4() -> None:
    for sign in (1.0, -1.0):
        one = to_integers(np.array([sign * LARGEST]))
        assert to_numbers(one * np.uint64(MOST_NODES)) == [sign * LARGEST * MOST_NODES]
    assert MOST_NODES * 2.0 ** -(FRACTION_BITS + 1) < 1e-4


def test_larger_numbers_are_clipped_and_infinity_is_one_of_them() -> None:
    values = np.array([LARGEST * 3, -1e300, np.inf, -np.inf, 1.0])
    assert to_numbers(to_integers(values)).tolist() == [LARGEST, -LARGEST, LARGEST, -LARGEST, 1.0]
    with pytest.raises(ValueError, match="NaN"):
        to_integers(np.array([1.0, np.nan]))


def test_the_masks_of_a_pair_cancel_and_those_of_other_pairs_and_sessions_do_not() -> None:
    one, two, three = (private_key(seed(i)) for i in range(3))
    mine, theirs = pair_mask(one, public_bytes(two), SESSION, 50), pair_mask(two, public_bytes(one), SESSION, 50)
    assert not (mine + theirs).any()
    assert mine.any()
    for other in (pair_mask(three, public_bytes(one), SESSION, 50), pair_mask(two, public_bytes(one), b"t" * 16, 50)):
        assert ((mine + other) != 0).all()


def test_the_own_mask_is_of_one_seed_and_one_session_and_no_mask_of_a_pair() -> None:
    mask = self_mask(seed(1), SESSION, 50)
    for other in (
        self_mask(seed(2), SESSION, 50),
        self_mask(seed(1), b"t" * 16, 50),
        stream(derive(seed(1), b"pair mask"), 50),
    ):
        assert ((mask - other) != 0).all()
    assert (self_mask(seed(1), SESSION, 60)[:50] == mask).all()


def test_streams_are_chacha20_of_rfc_8439() -> None:
    # Appendix A.1, test vector 1: key, counter and nonce of zeros give 76b8e0ada0f13d90...
    assert stream(bytes(32), 2).tobytes().hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_what_two_nodes_agree_on_is_x25519_of_rfc_7748() -> None:
    # Section 6.1: Alice's private key, Bob's public key, their shared secret.
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agreed(X25519PrivateKey.from_private_bytes(alice), bob).hex() == shared


@pytest.mark.parametrize("bad", [bytes(32), b"\1" + bytes(31), bytes(31), b""])
def test_bytes_that_are_no_key_are_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        agreed(private_key(seed(1)), bad)


def test_keys_of_two_purposes_differ_however_their_names_are_cut() -> None:
    assert derive(b"x" * 16, b"ab", b"c") != derive(b"x" * 16, b"a", b"bc")
    assert derive(b"x" * 16, b"ab") != derive(b"y" * 16, b"ab")


# ---- a masked update says nothing of the plain one

PLAIN = {"zeros": np.zeros(40), "huge": np.linspace(-LARGEST, LARGEST, 40)}


def masked(plain: Integers | Numbers, draw: int) -> Integers:
    """One node's update as it leaves the node, with keys of its own for every draw, and two peers."""
    own = private_key(seed(1000 * draw))
    peers = [public_bytes(private_key(seed(1000 * draw + i))) for i in (1, 2)]
    total = to_integers(plain) + self_mask(seed(1000 * draw + 3), SESSION, len(plain))
    return sum((pair_mask(own, peer, SESSION, len(plain)) for peer in peers), total)


@pytest.mark.parametrize("only", ["self", "pair"])
@pytest.mark.parametrize("name", sorted(PLAIN))
def test_either_mask_alone_makes_any_update_uniform(name: str, only: str) -> None:
    plain, other = PLAIN[name], public_bytes(private_key(seed(1)))
    masks = [
        self_mask(seed(i), SESSION, 40) if only == "self" else pair_mask(private_key(seed(i)), other, SESSION, 40)
        for i in range(2, 402)
    ]
    hidden = np.array([to_integers(plain) + mask for mask in masks])
    unit = hidden.astype(np.float64) / 2.0**64
    assert stats.kstest(unit.ravel(), "uniform").pvalue > 1e-3
    low = np.bincount((hidden & np.uint64(255)).astype(int).ravel(), minlength=256)
    assert stats.chisquare(low).pvalue > 1e-3
    bits = np.unpackbits(hidden.view(np.uint8), axis=None)
    assert abs(bits.mean() - 0.5) < 4 * 0.5 / np.sqrt(bits.size)


def test_masked_updates_are_the_same_whatever_is_hidden_and_unrelated_to_it() -> None:
    draws = {name: np.array([masked(plain, draw) for draw in range(300)]) for name, plain in PLAIN.items()}
    unit = {name: hidden.astype(np.float64) / 2.0**64 - 0.5 for name, hidden in draws.items()}
    # Two very different updates, one distribution. The keys differ, since equal ones would give equal masks.
    other = np.array([masked(PLAIN["huge"], draw) for draw in range(300, 600)]).astype(np.float64) / 2.0**64 - 0.5
    assert stats.ks_2samp(unit["zeros"].ravel(), other.ravel()).pvalue > 1e-3
    # Position by position the update grows from one end to the other; what is sent does not.
    slope = stats.pearsonr(np.tile(PLAIN["huge"], 300), unit["huge"].ravel())
    assert slope.pvalue > 1e-3
    assert stats.ttest_ind(unit["zeros"].mean(axis=1), other.mean(axis=1)).pvalue > 1e-3


def test_the_same_tests_see_a_mask_that_is_too_short() -> None:
    short = to_integers(PLAIN["huge"]) + (stream(bytes(32), 40) >> np.uint64(13))
    assert stats.kstest(short.astype(np.float64) / 2.0**64, "uniform").pvalue < 1e-3
