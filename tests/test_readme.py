"""What the README states and a machine can count."""

import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_lines_of_modules_are_those_of_the_files():
    stated = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    stated |= dict(re.findall(r"`(\w+\.py)` \((\d+)\)", README))
    modules = {path.name: path.read_text().count("\n") for path in ROOT.glob("*.py")}
    assert {name: int(lines) for name, lines in stated.items()} == modules
    assert max(modules.values()) <= 450


def test_every_test_that_the_readme_names_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
