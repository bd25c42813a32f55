"""Numbers as people say them."""

import pytest

from cifar_resnet.look.words import count_of, duration, plural, time_left


@pytest.mark.parametrize(
    ("seconds", "words", "left"),
    [
        (0.42, "0.4 s", "0.4 s"), (9.94, "9.9 s", "9.9 s"), (9.97, "10 s", "10 s"), (59.6, "1 min", "1 min"), (308, "5 min 8 s", "5 min"),
        (3599.7, "1 h", "1 h"), (7080, "1 h 58 min", "1 h 58 min"), (11_880, "3 h 18 min", "3 h 18 min"), (190_000, "52 h 47 min", "52 h 47 min"),
    ],
)  # fmt: skip
def test_durations_have_two_units(seconds, words, left):
    assert (duration(seconds), time_left(seconds)) == (words, left)


def test_counts_have_commas_and_one_is_singular():
    assert count_of(1459, 2000) == "1,459 of 2,000"
    assert [plural(count, "image") for count in (0, 1, 1459)] == ["0 images", "1 image", "1,459 images"]
    assert plural(2, "class", "classes") == "2 classes"
