"""`billingd`, and `python -m billingd`."""

import io
import signal
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    if "run" in sys.argv[1:]:
        # The daemon promises to end with 0 on SIGTERM, also while it is still loading. Once it can drain, it
        # takes the signal over.
        signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
        signal.signal(
            signal.SIGHUP, signal.SIG_IGN
        )  # "read it again" while it is being read asks for nothing
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a far side's words need not fit the terminal
    try:
        from billingd.cli import program  # inside, so that Ctrl-C while it loads leaves no traceback

        program(prog_name="billingd")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
