"""Names Recurly gives: internal ids of 13 base-36 characters, UUIDs of 32 hexadecimal ones."""

import string
from itertools import count
from typing import Final
from uuid import uuid4

DIGITS: Final = string.digits + string.ascii_lowercase
SPACE: Final = len(DIGITS) ** 12
STRIDE: Final = 2_862_933_555_777_941_761
"""Coprime to 36, so that every count gives another id, and neighbours do not look alike."""


class Identifiers:
    """Gives out ids that are never given twice."""

    def __init__(self) -> None:
        self._orders = count(1)

    def order(self) -> int:
        """The next number of a growing sequence."""
        return next(self._orders)

    @staticmethod
    def internal(order: int) -> str:
        """The internal id of the record made as number `order`."""
        rest, id_ = order * STRIDE % SPACE, ""
        for _ in range(12):
            rest, digit = divmod(rest, len(DIGITS))
            id_ = DIGITS[digit] + id_
        return "s" + id_

    @staticmethod
    def uuid() -> str:
        """32 hexadecimal characters."""
        return uuid4().hex
