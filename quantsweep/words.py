"""Numbers with their words: "1 shard", "62 shards", "1.7 GPU-minutes".

What is said to people is put together in many places; how a number is said is here.
"""

from __future__ import annotations

LEAST_HOURS = 0.1
"""Less than that is said in minutes, and less than a minute in seconds: as hours it would round to next to nothing."""


def count(number: int, one: str, many: str | None = None) -> str:
    """A number with the word for one, or for many (by default the same with an s).

    >>> count(1, "shard"), count(1200, "shard"), count(0, "trial is", "trials are")
    ('1 shard', '1,200 shards', '0 trials are')
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def time_unit(hours: float) -> tuple[float, str]:
    """(units in an hour, the unit's word) in which so many hours are best said.

    >>> time_unit(2.5), time_unit(0.05), time_unit(0.001)
    ((1.0, 'hours'), (60.0, 'minutes'), (3600.0, 'seconds'))
    """
    if hours >= LEAST_HOURS or hours == 0:
        return 1.0, "hours"
    return (60.0, "minutes") if hours * 60 >= 1 else (3600.0, "seconds")


def rounded(number: float) -> str:
    """Two digits of a number that is not known better.

    >>> rounded(15254.98), rounded(0.1432), rounded(7.0), rounded(0)
    ('15,000', '0.14', '7', '0')
    """
    if number >= 10:
        return f"{int(float(f'{number:.2g}')):,}"
    return f"{number:.2g}"


def about(seconds: float) -> str:
    """A length of time that is not known well, with no more digits than are meant.

    >>> about(7), about(48), about(200), about(5000), about(20_000), about(400_000)
    ('10 s', '50 s', '3 min', '1.4 h', '5.6 h', '4.6 days')
    """
    if seconds < 90:
        return f"{max(5, 5 * round(seconds / 5)) if seconds < 20 else 10 * round(seconds / 10)} s"
    if seconds < 90 * 60:
        minutes = seconds / 60
        return f"{round(minutes) if minutes < 20 else 5 * round(minutes / 5)} min"
    if seconds < 48 * 3600:
        return f"{rounded(seconds / 3600)} h"
    days = seconds / 86400
    return f"{rounded(days)} days" if days < 730 else f"{rounded(days / 365)} years"
