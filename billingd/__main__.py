"""`billingd`, and `python -m billingd`."""

import io
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
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
