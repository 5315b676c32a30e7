"""What the program costs in seconds and memory; README.md has the results."""

import os

import engine  # noqa: F401 (before transformers: engine says which versions work)

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is downloaded here
