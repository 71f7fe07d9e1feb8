"""What ends a demo before its proof."""


class DemoFailed(Exception):
    """Something that had to happen did not; the text says what was waited for."""


class InVain(DemoFailed):
    """It did not happen in time."""
