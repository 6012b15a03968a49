"""`split_sizes`: n things over m ranks."""

from __future__ import annotations


def split_sizes(total: int, parts: int) -> list[int]:
    """`total` cut into `parts` as evenly as possible, the larger parts first; a part may be 0."""
    quotient, remainder = divmod(total, parts)
    return [quotient + (index < remainder) for index in range(parts)]
