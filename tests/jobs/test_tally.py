"""Numbers by key, whatever the key and however many."""

from __future__ import annotations

from sdcli.jobs.tally import Tally, key_of, number


def test_a_key_is_counted_from_nothing() -> None:
    tally = Tally()
    assert tally.get(key_of("a")) is None
    assert [tally.add(key_of("a")) for _ in range(3)] == [0, 1, 2]
    assert tally.add(key_of("b")) == 0


def test_the_least_and_the_greatest_key_are_kept_apart_and_can_be_values() -> None:
    tally = Tally()
    least, greatest = "0" * 16, "f" * 16
    tally.put(least, number(greatest))
    tally.put(greatest, number(least))
    assert (tally.get(least), tally.get(greatest)) == (number(greatest), number(least))
    tally.put(least, 5)
    assert tally.get(least) == 5


def test_any_text_has_a_key() -> None:
    assert len({key_of(text) for text in ("", "a", "\ud800", "é")}) == 4
