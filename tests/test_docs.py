"""What README and docs/ state and a machine can check, the demo's tables, and which room may import which."""

import ast
import importlib
import json
import re

import numpy as np
import pytest
import tiny
from shared import ROOT, write_lines

from demo import ablations, claims, curves, measured, table

README = (ROOT / "README.md").read_text()
DOCS = {path.relative_to(ROOT).as_posix(): path.read_text()
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md"))}
TESTS = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))

# ------------------------------------------------------------------------------------------------ the house

FLOORS = {  # each room may import the rooms before it and itself
    "engine/program": ["engine.program"],
    "engine/video": ["engine.program", "engine.video"],
    "engine/words": ["engine.program", "engine.video", "engine.words"],
    "engine/model": ["engine.program", "engine.model"],
    "engine/run": ["engine"],
    "rewards": ["engine"],
    "grpo": ["engine"],
    "data": ["engine", "rewards"],
    "evaluate": ["engine", "rewards", "grpo", "data"],
    "invert4tvg": ["engine", "rewards", "grpo", "data", "evaluate"],
}


def imports_of(path):
    """The modules that a file imports by name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", FLOORS)
def test_imports_never_run_back_up(room):
    ours = {"engine", "papers", "demo", "benchmarks", "report", *FLOORS}
    files = [*(ROOT / room).glob("*.py")] or [ROOT / f"{room}.py"]
    for path in files:
        for name in imports_of(path):
            if name.split(".")[0] in ours:
                assert any(name == floor or name.startswith(f"{floor}.") for floor in FLOORS[room]), (path.name, name)


def test_every_room_of_the_engine_has_its_floor():
    assert {f"engine/{path.parent.name}" for path in (ROOT / "engine").glob("*/__init__.py")} == {
        room for room in FLOORS if "/" in room}
    assert [path.name for path in (ROOT / "engine").glob("*.py")] == ["__init__.py"]


def test_the_top_level_holds_the_five_files_and_nothing_else_in_python():
    assert sorted(path.name for path in ROOT.glob("*.py")) == [
        "data.py", "evaluate.py", "grpo.py", "invert4tvg.py", "rewards.py"]


# ------------------------------------------------------------------------------------------------ the docs


@pytest.mark.parametrize("name", DOCS)
def test_every_test_that_a_page_names_exists(name):
    for test in re.findall(r"`(test_\w+)`", DOCS[name]):
        assert f"def {test}(" in TESTS, test


@pytest.mark.parametrize("name", DOCS)
def test_every_function_that_a_page_names_exists(name):
    modules = r"(?:rewards|grpo|data|evaluate|invert4tvg|engine\.\w+\.\w+|engine\.\w+|papers\.\w+)"
    for module, attribute in re.findall(rf"`({modules})\.(\w+)`", DOCS[name]):
        if (module, attribute) not in {("engine", "py")} and attribute != "py":
            assert hasattr(importlib.import_module(module), attribute), (module, attribute)


@pytest.mark.parametrize("name", DOCS)
def test_every_file_that_a_page_names_exists(name):
    folder = (ROOT / name).parent
    for path in re.findall(r"(?:docs|engine|papers|demo|benchmarks|tests)/[\w./-]*\w", DOCS[name]):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results"), path
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", DOCS[name]):
        assert (folder / path).exists(), path


@pytest.mark.parametrize("name", DOCS)
def test_every_option_that_a_page_names_exists(name):
    programs = ["invert4tvg.py", "evaluate.py", "data.py", "papers/stages.py", "demo/make_demo.py",
                "report/__main__.py",
                *(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))]
    source = "".join((ROOT / program).read_text() for program in programs)
    others = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--shutdown-timeout", "--no-deps",
              "--max-restarts", "--help"}
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", DOCS[name])) - others:
        field = option[2:].replace("-", "_")
        assert f'"{option}"' in source or re.search(rf"^    {field}: \w+ = flag", source, re.MULTILINE), option


@pytest.mark.parametrize("sweep", ablations.RUNS)
def test_the_tables_of_many_runs_are_those_of_the_data(sweep):
    rows = measured.read_rows(ROOT / "demo" / f"{sweep}.csv")
    for line in ablations.table(sweep, rows).splitlines():
        if line.startswith("|"):
            assert line in DOCS["docs/results.md"]


def test_what_the_page_says_of_the_papers_claims_is_what_the_data_say():
    for line in claims.table(claims.read_measured("claim", "ablations")).splitlines():
        assert line in DOCS["docs/results.md"]


def test_every_run_of_a_table_is_made_or_derived():
    derived = {"warm", "invert-sft", "lister", "grpo-transfer", "tvg-only-transfer"}
    for sweep, tables in ablations.TABLES.items():
        made = derived | set(ablations.RUNS[sweep])
        assert {line.run for lines in tables.values() for line in lines} <= made
    made = derived | set(ablations.RUNS["claim"]) | set(ablations.RUNS["ablations"])
    assert {run for pairs in claims.CLAIMS.values() for pair in pairs for run in (pair.a, pair.b)} <= made


# ------------------------------------------------------------------------------------------------ tables by hand


def test_ablations_by_hand():
    def row(seed, run, metric):
        return {"seed": seed, "run": run} | dict.fromkeys(measured.METRICS, metric)

    rows = [row(0, "tvg-only", 30), row(1, "tvg-only", 40), row(2, "tvg-only", 50),
            row(0, "vd", 31), row(1, "vd", 44)]  # seed 2 is not there yet
    assert ablations.gains(rows, "vd") == [1, 4] and ablations.gains(rows, "tvg-only") == []
    printed = ablations.table("ablations", rows)
    assert "| TVG only |" + " 40.0 (10.0) |" * 7 + "  |  | 78.7" in printed
    # Levels: mean 37.5, deviation 9.2 (of 31 and 44). Gains of 1 and 4: mean 2.5, deviation 2.121, and for two pairs
    # the interval is 12.706 x 2.121 / the root of 2 = 19.06 to each side.
    assert "| VD |" + " 37.5 (9.2) |" * 7 + " +2.5 [-16.6, +21.6] |" * 2 + " 79.1" in printed
    assert "| AR + VD |" not in printed  # not made yet
    assert ablations.base_of("grpo-no-kl") == "tvg-only-no-kl" and ablations.base_of("vc-ar") == "tvg-only"


def test_more_seeds_than_there_are_intervals_for_are_refused_before_any_run(monkeypatch):
    monkeypatch.setattr(ablations, "make_runs", None)
    with pytest.raises(SystemExit, match="11 seeds; give at most 10"):
        ablations.main("claim", [str(seed) for seed in range(11)])


def test_rare_verbs_are_measured_apart():
    def row(task, verb, value):
        part = "iou" if task == "tvg" else task
        return {"task": task, "query": f"the red box is {verb}.", "parts": {part: value}}

    rows = [row("tvg", "falling", 0.5), row("tvg", "rising", 1.0), row("vc", "sliding", 1.0),
            row("vc", "falling", 0.0), row("ar", "spinning", 1.0), row("ar", "rising", 0.0),
            row("vd", "shrinking", 0.0), row("vd", "jumping", 1.0)]
    found = measured.rare_metrics(rows)
    assert found == {"mIoU, rare": 50.0, "VC, rare": 50.0, "AR, rare": 100.0, "VD, rare": 0.0}


def test_a_verb_counts_as_named_in_the_thought_too():
    completions = {"vd": "<think> the box is rising </think> <answer> 3.0 to 6.5 </answer>",
                   "ar": "<think> the box is sliding </think> <answer> rising </answer>",
                   "vc": "<think> the box is arising </think> <answer> rise </answer>",  # only in this form, as a word
                   "tvg": "<think> the box is falling </think> <answer> 1.0 to 2.0 </answer>"}  # takes no part
    rows = [{"task": task, "query": "the box is rising.", "completion": text} for task, text in completions.items()]
    assert measured.named(rows) == pytest.approx(100 * 2 / 3)


def test_lists_of_verbs_are_counted():
    rows = [{"task": "vd", "parts": {"vd_verbs": n}} for n in (1, 1, 2, 4)] + [{"task": "tvg", "parts": {}}]
    assert measured.list_metrics(rows) == {"VD lists": 50.0, "VD verbs": 2.0}


def test_verbs_of_each_fifth_of_training(tmp_path):
    verbs = {0: 1, 1: 3, 2: 2, 4: 4, 9: 5}  # iterations of ten that sampled descriptions; none in the fourth fifth
    rows = [{"iteration": i, "task": "vd", "vd/vd_verbs": verbs[i]} if i in verbs else {"iteration": i, "task": "tvg"}
            for i in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measured.training_metrics(tmp_path / "metrics.jsonl")
    first, second, third, _, fifth = measured.TRAINING
    assert found == {first: 2, second: 2, third: 4, fifth: 5}  # (1 + 3) / 2, 2, 4 and 5
    assert measured.training_metrics(tmp_path / "missing.jsonl") == {}


@pytest.mark.parametrize("intervals, sign, said", [
    ([(1, 3)], 1, "reproduced"),
    ([(-1, 3)], 1, "not reproduced"),
    ([(-3, -1)], 1, "contradicted"),
    ([(-3, -1)], -1, "reproduced"),
    ([(-1, 3), (1, 3)], 1, "reproduced"),  # one of R1@0.7 and mIoU is enough, as the plan says
    ([(-3, -1), (1, 3)], 1, "undecided"),
    ([(-1, 1)], 0, "no difference seen"),
    ([(-1, 1), (1, 2)], 0, "contradicted"),
])
def test_what_intervals_say_of_a_claim(intervals, sign, said):
    assert claims.verdict(intervals, sign) == said


def test_a_claim_by_hand():
    def rows(run, *values):
        return [{"seed": seed, "run": run} | dict.fromkeys(("R1@0.7", "mIoU", "actions", measured.NAMED), value)
                for seed, value in enumerate(values)]

    made = rows("grpo", 31, 44) + rows("tvg-only", 30, 40)
    # 1 and 4, as in the table above: 2.5 -+ 19.06
    assert claims.table(made).splitlines()[2] == (
        "| as many iterations, 1,000 | R1@0.7 +7.1 | R1@0.7 +2.5 [-16.6, +21.6], mIoU +2.5 [-16.6, +21.6] | "
        "not reproduced |")
    axes = claims.Figure().subplots()
    claims.forest(axes, made, ("R1@0.7",))
    interval, mean, paper = (list(line.get_xdata()) for line in axes.lines[:3])
    assert interval == pytest.approx([2.5 - 19.06, 2.5 + 19.06], abs=0.01)
    assert mean == [2.5] and paper == [7.1]


def test_the_picture_holds_each_claim_and_the_figures_that_were_measured(tmp_path):
    runs = {run for pairs in claims.CLAIMS.values() for pair in pairs for run in (pair.a, pair.b)}
    names = (*measured.METRICS, *measured.TRAINING, measured.NAMED, "actions")
    rows = [{"seed": seed, "run": run} | dict.fromkeys(names, str(50 + seed)) for seed in (0, 1) for run in runs]
    hacking = [row | {"run": run} for row in rows[:2] for run in ablations.RUNS["hacking"]]

    def titles(rows, hacking):
        claims.draw(rows, hacking, tmp_path / "a.svg")
        text = (tmp_path / "a.svg").read_text(encoding="utf-8")
        return [title for title in (*claims.CLAIMS, "Figure 5: grounding", "Reward hacking") if f">{title}" in text]

    assert titles(rows, hacking) == [*claims.CLAIMS, "Figure 5: grounding", "Reward hacking"]
    first = [row for row in rows if row["run"] in ("grpo", "tvg-only", "warm")]
    shares = [claim for claim in claims.CLAIMS if "(Figure 5)" in claim]
    assert titles(first, []) == list(claims.CLAIMS)[:3] + shares


def test_the_demos_table_by_hand(tmp_path, capsys, monkeypatch):
    # The training rows' best constant guess is 2.0 to 4.0 s and "rise": half of each test row, and the verb of a third.
    (tmp_path / "train.txt").write_text("A 2.0 4.0##the red square rises.\n" * 3)
    (tmp_path / "test.txt").write_text("A 2.0 6.0##the red square jumps.\n" * 2 + "A 0.0 4.0##the red square rises.\n")
    metrics = dict.fromkeys(table.COLUMNS, 50.0)
    for run, gain in {"sees": None, "warm": 0, "grpo": 5, "tvg-only": 3, "supervised": 0}.items():
        (tmp_path / run).mkdir()
        measured = '{"task": "eval", "mIoU": 50.0}\n'  # takes no part in the minutes
        seconds = (10.0, 20.0, 20.0, 70.0)  # two minutes
        write_lines(tmp_path / run / "metrics.jsonl", [{"task": "tvg", "seconds": each} for each in seconds])
        with open(tmp_path / run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(measured)
        if gain is not None:
            (tmp_path / f"{run}-test").mkdir()
            gained = {name: value + gain for name, value in metrics.items()}
            (tmp_path / f"{run}-test" / "metrics.json").write_text(json.dumps(gained))
    def run_table(*argv):
        monkeypatch.setattr("sys.argv", ["demo.table", str(tmp_path), *argv])
        table.main()
        return capsys.readouterr().out

    printed = run_table()
    assert ('| best constant guess (always 2.0 to 4.0 s, always "rise") |  |' + " 50.0 | 100.0 | 100.0 | 0.0 |"
            + " 33.3 |" * 3) in printed
    assert "| warm start (supervised, short on purpose) | 4.0 |" + " 50.0 |" * 7 in printed  # two stages of 2 minutes
    assert "| + GRPO with inversion, p = 0.8 | 2.0 |" + " 55.0 |" * 7 in printed
    assert "+5.0 mIoU" in printed and "+2.0 points of VC, AR and VD" in printed
    assert run_table("iterations") == "6\n"  # GRPO's 120 seconds, of which half of the warm start's take up to 20
    assert run_table("rows", "a=grpo-test:sees,warm,grpo", "b=warm-test").splitlines()[2:] == [
        "| a | 6.0 |" + " 55.0 |" * 4 + "  |" * 3, "| b |  |" + " 50.0 |" * 4 + "  |" * 3]


def test_the_shipped_logs_are_what_the_page_on_reading_says_of_them():
    def logged(run, name, task):
        return np.array(list(curves.read_csv(run, name, task))[1])

    assert logged("tvg-only", "kl", "tvg").max() < 1 < logged("runaway", "kl", "tvg")[2:].min()
    assert logged("runaway", "tvg/iou", "tvg")[2:].max() == 0
    assert logged("no-spread", "entropy", "tvg").mean() < 0.3 * logged("tvg-only", "entropy", "tvg").mean()
    assert logged("no-spread", "zero_spread", "tvg").mean() > 0.3
    assert logged("tvg-only", "zero_spread", "tvg").mean() < 0.1
    spread = logged("collapse", "zero_spread", "ar")
    assert spread[:10].mean() < 0.5 and spread[40:].mean() > 0.8
    assert logged("collapse", "ar/ar", "ar")[40:].mean() < 0.7 < 0.8 < logged("grpo", "ar/ar", "ar")[-10:].mean()
    assert logged("hacked", "vd/vd", "vd")[-20:].mean() > 0.9
    verbs = logged("hacked", "vd/vd_verbs", "vd")
    assert verbs[10:30].mean() < 1.1 and verbs[-20:].mean() > 2.3


PROGRAMS = ["papers.protocols", "papers.stages", "demo.ablations", "demo.table", "demo.curves", "demo.verb_lists",
            "demo.claims", "demo.make_demo", "report", "report.screenshot", "benchmarks.accept", "benchmarks.memory",
            "benchmarks.step", "benchmarks.decoding"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_explains_itself_and_refuses_what_it_does_not_know(name):
    status, said = tiny.run_program("-m", name, "--help")
    assert status == 0 and "usage:" in said and "Traceback" not in said
    status, said = tiny.run_program("-m", name, "--no-such-option")
    assert status == 2 and "Traceback" not in said and "; --help lists every option." in said.splitlines()[-1]
