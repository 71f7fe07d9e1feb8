"""What ends a demo before its proof."""


class DemoFailed(Exception):
    """Something that had to happen did not; the text says what was waited for."""

    exit_code = 1


class StoreAway(DemoFailed):
    """The daemon did not reach the database of --store."""

    exit_code = 4


class InVain(DemoFailed):
    """It did not happen in time."""
