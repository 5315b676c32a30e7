"""What no paper mentions: attention, decoding, the optimiser, videos, annotation files, processes and checkpoints."""

import sys
from importlib.metadata import version

OLDEST, NEWEST = (5, 0), (5, 24)  # of transformers, on whose insides engine/model/ relies

_found = version("transformers")
if not OLDEST <= tuple(int(part) for part in _found.split(".")[:2]) <= NEWEST:
    sys.exit(f"transformers {_found} is installed, and this program works with {'.'.join(map(str, OLDEST))} to "
             f"{'.'.join(map(str, NEWEST))}: run `pip install -r requirements.txt`, in an environment of its own.")
