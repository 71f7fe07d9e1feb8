"""Billing periods: whole plan intervals counted from an anchor."""

import calendar
from datetime import datetime, timedelta


def boundary(anchor: datetime, unit: str, length: int, count: int) -> datetime:
    """The end of the `count`th interval after `anchor`.

    Months are counted from the original anchor and clamped to the month's last day, so that a subscription
    of the 31st bills on the 28th of February and again on the 31st of March.
    """
    if unit == "days":
        return anchor + timedelta(days=length * count)
    months = anchor.month - 1 + length * count
    year, month = anchor.year + months // 12, months % 12 + 1
    return anchor.replace(year=year, month=month, day=min(anchor.day, calendar.monthrange(year, month)[1]))
