"""Progress of long steps, on a terminal and in a file."""

import sys

from tqdm import tqdm


def progress(iterable=None, **arguments):
    """A progress bar with the time left; where the output is no terminal, a line a minute."""
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **arguments)
    return tqdm(iterable, **{"mininterval": 60, "ncols": 100, "file": _Lines()} | arguments)


class _Lines:
    """Standard error, on which a bar that would be drawn over the one before begins a new line."""

    def write(self, text):
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(line + "\n")

    def flush(self):
        sys.stderr.flush()
