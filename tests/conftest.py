"""How the tests are spread over processes; what they share is in tests/shared.py."""

import inspect
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The method stands alone. Where a folder that only uses it is gone, the test files that import from it or read it as
# ROOT / "folder" go with it, and of other files the tests that name a module of it, "folder.module".
BESIDE = ("papers", "demo", "report", "benchmarks", "docs")
GONE = "|".join(folder for folder in BESIDE if not (ROOT / folder).is_dir())
NAMED = re.compile(rf'^(?:from|import) (?:{GONE})\b|ROOT / "(?:{GONE})"', re.MULTILINE)
collect_ignore = [path.name for path in (ROOT / "tests").glob("*.py")
                  if GONE and NAMED.search(path.read_text(encoding="utf-8"))]


def pytest_collection_modifyitems(items):
    if GONE:
        module = re.compile(rf"\b(?:{GONE})\.\w")
        items[:] = [item for item in items if not module.search(item.name + inspect.getsource(item.function))]


def pytest_xdist_auto_num_workers(config):
    """All tests are spread over the cores; for single files or tests no other process needs to start.

    One process more than there are cores: many tests wait for what they have started.
    """
    everything = all(Path(name).resolve() in (ROOT, ROOT / "tests") for name in config.args)
    return min(4, os.cpu_count() + 1) if everything else 0


def pytest_configure(config):
    """The process that only hands out the tests does without what they share, whose libraries take seconds to load."""
    if not config.getoption("numprocesses", 0):
        config.pluginmanager.import_plugin("shared")
