"""Randomness is a pure function of what it is for."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from quickbloom.common.randomness import generator


def test_same_parts_give_the_same_numbers() -> None:
    assert np.array_equal(generator(7, "train", 3, "a").random(5), generator(7, "train", 3, "a").random(5))


@pytest.mark.parametrize("parts", [(8, "train", 3, "a"), (7, "split", 3, "a"), (7, "train", 4, "a"), (7, "train", 3, "b")])
def test_every_part_matters(parts: tuple[int, str, int, str]) -> None:
    assert generator(*parts).random() != generator(7, "train", 3, "a").random()


def test_parts_do_not_run_into_each_other() -> None:
    draws = {generator(*parts).random() for parts in ((1, 23), (12, 3), (123,), (1, 2, 3), (1, "2", 3, ""))}
    assert len(draws) == 5


def test_numbers_do_not_depend_on_the_process() -> None:
    # Python's own hash of a text differs from process to process; this must not.
    code = "from quickbloom.common.randomness import generator; print(generator(7, 'task').integers(2**62))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == generator(7, "task").integers(2**62)


def test_drawing_leaves_the_global_state_alone() -> None:
    before = str(np.random.get_state())
    generator(0, "x").random(100)
    assert str(np.random.get_state()) == before


def test_a_text_that_cannot_be_encoded_is_an_error() -> None:
    with pytest.raises(UnicodeEncodeError):
        generator(0, "\ud800")


def test_the_state_is_the_digest_of_the_parts() -> None:
    words = np.frombuffer(hashlib.blake2b(b"7\x1ftrain\x1f3", digest_size=32).digest(), dtype="<u8").tolist()
    # PCG64 (O'Neill 2014) by hand: the increment is odd, and the start is advanced twice.
    start, increment = (words[0] << 64) + words[1], ((((words[2] << 64) + words[3]) << 1) | 1) % 2**128
    multiplier = 47026247687942121848144207491837523525
    state = (((increment + start) * multiplier) + increment) % 2**128
    found = generator(7, "train", 3).bit_generator.state["state"]
    assert found == {"state": state, "inc": increment}


def test_equal_numbers_are_rare_and_the_mean_is_right() -> None:
    draws = np.array([generator(0, "task", k).random() for k in range(4000)])
    assert len(set(draws)) == len(draws)
    assert abs(draws.mean() - 0.5) < 4 / np.sqrt(12 * len(draws))
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(len(draws))


def test_children_are_streams_of_their_own() -> None:
    parent = generator(0, "x")
    (first, second), (third,) = parent.spawn(2), parent.spawn(1)
    again = generator(0, "x").spawn(3)
    drawn = [child.random() for child in (first, second, third)]
    assert [child.random() for child in again] == drawn
    assert len({*drawn, generator(0, "x").random()}) == 4


def test_a_generator_that_wants_another_seed_is_refused() -> None:
    """As NumPy's MT19937, which asks for 624 words of 32 bits."""
    with pytest.raises(NotImplementedError, match="PCG64 takes four of 64 bits"):
        generator(0, "any").bit_generator.seed_seq.generate_state(624, np.uint32)
