"""Numbers as people say them, in the terminal and on pages."""

from __future__ import annotations


def plural(count: int, noun: str, several: str | None = None) -> str:
    """1 image; 1,459 images; with `several` for a noun that takes more than an s."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    return f"{number}{'th' if 10 < number % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def count_of(done: int, total: int) -> str:
    """1,459 of 2,000."""
    return f"{done:,} of {total:,}"


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 5 min 8 s, 3 h 18 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    count, large, small = (whole, "min", "s") if whole < 3600 else (round(seconds / 60), "h", "min")
    first, rest = divmod(count, 60)
    return f"{first} {large} {rest} {small}" if rest else f"{first} {large}"


def time_left(seconds: float) -> str:
    """As `duration`, in whole minutes from a minute on."""
    return duration(seconds) if seconds < 60 else duration(60 * round(seconds / 60))
