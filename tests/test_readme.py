"""What the README states and a machine can count."""

import csv
import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "demo"))
import ablations  # noqa: E402
import table  # noqa: E402

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


@pytest.mark.parametrize("sweep", ablations.SWEEPS)
def test_the_tables_of_many_runs_are_those_of_the_data(sweep):
    with open(ROOT / "demo" / f"{sweep}.csv", newline="") as file:
        for line in ablations.table(sweep, list(csv.DictReader(file))).splitlines():
            if line.startswith("|"):
                assert line in README


def test_ablations_by_hand():
    def row(seed, run, metric):
        return {"seed": seed, "run": run} | dict.fromkeys(ablations.METRICS, metric)

    rows = [row(0, "tvg-only", 30), row(1, "tvg-only", 40), row(2, "tvg-only", 50),
            row(0, "vd", 31), row(1, "vd", 44)]  # seed 2 is not there yet
    assert ablations.gains(rows, "vd") == [1, 4] and ablations.gains(rows, "tvg-only") == []
    printed = ablations.table("ablations", rows)
    assert "| TVG only |" + " 40.0 (10.0) |" * 7 + "  | 78.7" in printed
    # Levels: mean 37.5, deviation 9.2 (of 31 and 44). Gains: mean 2.5, deviation 2.1 (of 1 and 4).
    assert "| VD |" + " 37.5 (9.2) |" * 7 + " +2.5 (2.1) | 79.1" in printed


def test_the_demos_table_by_hand(tmp_path, capsys):
    for split in ("train", "test"):  # the best constant guess is 2.0 to 4.0 s, IoU 1, and "rise"
        (tmp_path / f"{split}.txt").write_text("A 2.0 4.0##the red square rises.\n" * 3)
    metrics = dict.fromkeys(table.COLUMNS, 50.0)
    for run, gain in {"warm": 0, "grpo": 5, "tvg-only": 3, "supervised": 0}.items():
        for folder in (run, f"{run}-test"):
            (tmp_path / folder).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text('{"seconds": 30.0}\n' * 4)
        (tmp_path / f"{run}-test" / "metrics.json").write_text(json.dumps({k: v + gain for k, v in metrics.items()}))
    (tmp_path / "warm-1.1").mkdir()  # a round of the first warm-up, beside train.sh's note of its options
    (tmp_path / "warm-1.1.options").touch()
    (tmp_path / "warm-1.1" / "metrics.jsonl").write_text('{"seconds": 60.0}\n')
    table.main(tmp_path)
    printed = capsys.readouterr().out
    assert '| constant guess (2.0 to 4.0 s; "rise") | |' + " 100.0 |" * 7 in printed
    assert "| warm start (supervised, short on purpose) | 3.0 |" + " 50.0 |" * 7 in printed
    assert "| + GRPO with inversion, p = 0.8 | 2.0 |" + " 55.0 |" * 7 in printed
    assert "+5.0 mIoU" in printed and "+2.0 points of VC, AR and VD" in printed
