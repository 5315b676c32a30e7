"""What docs/reading.md works through, claims and recommends; the notebook."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import tiny
import torch
from shared import ROOT, log_of, make_config, reply

import grpo
import rewards
from data import prompt_text
from engine.words.annotations import load_annotations
from engine.words.samples import Sample

PAGE = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())  # the page's paragraphs, however they are wrapped
RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LOG_8 = torch.full((8, 1), 1 / 8).log()
ALL = torch.ones(8, 1, dtype=torch.bool)


def table(heading):
    """The rows of the table below a heading line that begins so, as lists of cells without the first."""
    lines = PAGE[PAGE.index(heading):].split("\n")[2:]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines[:8]]


def same(cells, numbers, digits=3):
    assert [float(cell) for cell in cells] == pytest.approx([round(float(n), digits) for n in numbers], abs=1e-9)


def step(logits, advantages, kl_coef):
    """The loss of a policy that is a softmax over eight completions of one token -> (loss, metrics, gradient)."""
    logits = logits.clone().requires_grad_()
    logps = logits.log_softmax(0).unsqueeze(1)
    loss, metrics = grpo.grpo_loss(logps, LOG_8, LOG_8, advantages, ALL, kl_coef=kl_coef)
    return loss.item(), metrics, torch.autograd.grad(loss, logits)[0]


def test_the_worked_group_is_what_the_program_computes():
    sample = Sample("A.mp4", "person opens the door", 2.0, 6.0)
    first = table("| completion | answer |")
    texts = [cells[0] if "without tags" in cells[0] else reply(cells[0]) for cells in first]
    scores = [rewards.score("tvg", text, sample) for text in texts]
    advantages = grpo.group_advantages(torch.tensor([[s["total"] for s in scores]]))[0]
    for name, column in zip(("format", "iou", "total"), list(zip(*first))[1:]):
        same(column, [s[name] for s in scores])
    same([cells[-1] for cells in first], advantages)

    loss, metrics, gradient = step(torch.zeros(8), advantages, kl_coef=0.04)
    assert loss == pytest.approx(0, abs=1e-7) and metrics["kl"] == pytest.approx(0, abs=1e-7)  # mu = 1
    assert torch.allclose(gradient, -advantages / 8, atol=1e-6)
    logits = -2 * gradient
    pi = logits.softmax(0)
    x = (1 / 8) / pi
    second = list(zip(*table("| completion | gradient |")))
    for cells, numbers in zip(second, (gradient, logits, pi, pi / (1 / 8), x - x.log() - 1)):
        same(cells, numbers)

    loss, metrics, after = step(logits, advantages, kl_coef=0.04)
    assert f"over the eight is {metrics['kl']:.3f}, the loss is {loss:.3f}." in WORDS
    ratio = 8 * pi
    smaller = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    printed = re.search(r"is (1\.469) for o1 .*?, then (.*?), and (-1\.633) for o8 .*? mean is (0\.122)\.", WORDS)
    same([printed[1], *printed[2].split(", "), printed[3], printed[4]], [*smaller, smaller.mean()])
    assert metrics["clip_high"] == metrics["clip_low"] == 1 / 8
    # Without the KL, o1 and o8 are pushed only as the others push them: by -pi_j times the rest's sum.
    _, _, plain = step(logits, advantages, kl_coef=0.0)
    weights = torch.where(torch.tensor([True] + [False] * 6 + [True]), 0, pi * 8 * advantages)
    assert torch.allclose(plain, -(weights - pi * weights.sum()) / 8, atol=1e-6)


def test_k1_in_the_loss_pulls_nowhere_and_k3_pulls_to_the_reference():
    rewards = torch.tensor([[float(cells[3]) for cells in table("| completion | answer |")]])
    logits = (grpo.group_advantages(rewards)[0] / 4).requires_grad_()
    logps = logits.log_softmax(0)
    pi = logps.exp().detach()  # the samples' weights, held fixed
    gap = LOG_8.squeeze(1) - logps
    k1, k3 = -gap, gap.exp() - gap - 1
    assert (pi * k1).sum().item() == pytest.approx((pi * k3).sum().item(), abs=1e-6)  # the same mean, KL(pi || pi_ref)
    pull_1, = torch.autograd.grad((pi * k1).sum(), logits, retain_graph=True)
    pull_3, = torch.autograd.grad((pi * k3).sum(), logits)
    assert pull_1.abs().max() < 1e-7
    assert torch.allclose(pull_3, pi - 1 / 8, atol=1e-6)
    assert f"o1 {pull_3[0]:+.3f}, o8 {pull_3[7]:+.3f}" in WORDS
    _, _, with_kl = step(logits.detach(), torch.zeros(8), kl_coef=1.0)  # the old eight, 1/8 each
    assert f"{with_kl[0]:+.3f} and {with_kl[7]:+.3f}" in WORDS


def test_advantages_do_not_depend_on_the_unit_of_the_reward():
    of_one = grpo.group_advantages(torch.tensor([[0.0, 1.0]]))
    assert torch.allclose(grpo.group_advantages(torch.tensor([[1.0, 1.1]])), of_one, atol=2e-3)  # but for the 1e-4
    r = torch.tensor([[2, 1.75, 1.5, 1.5, 1.25, 1, 1, 0]])
    assert torch.allclose(grpo.group_advantages(10 * r), grpo.group_advantages(r), atol=1e-3)
    assert grpo.group_advantages(torch.full((1, 8), 1.7)).abs().max() == 0


# ------------------------------------------------------------------------------------------------ recipes


ENDS, NEAR, OBJECT, LINE, DATA, PROMPT = RECIPES


@pytest.fixture()
def work(tmp_path):
    """A folder of one's own, with the page's file in it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.py").write_text("\n\n".join((ENDS, NEAR, OBJECT)), encoding="utf-8")
    return tmp_path / "work"


@pytest.fixture()
def mine(work, monkeypatch):
    """The page's file as a module."""
    monkeypatch.syspath_prepend(work)
    yield importlib.import_module("mine")
    del sys.modules["mine"]


def run(config, cwd, *argv):
    """A program in a folder, on the rows of `config`."""
    rows = ("--annotations", config.annotations, "--videos", config.videos, "--workers", 0)
    status, said = tiny.run_program(*argv, *rows, cwd=cwd)
    assert status == 0, said


def test_rewards_and_a_task_of_ones_own_train_and_are_measured(tmp_path, checkpoint, work):
    config = make_config(tmp_path, checkpoint)
    learn = ("--model", checkpoint, "--iterations", 4, "--seed", 1, "--max-new-tokens", 4, "--p", 0.5,
             "--inversion-tasks", "mine.object", "--eval-every", 4, "--eval-annotations", config.annotations)
    for name in ("ends", "near"):
        output = tmp_path / name
        run(config, work, ROOT / "invert4tvg.py", *learn, "--tvg-reward", f"mine.{name}", "--output", output)
        measured, *rows, last = log_of(output)
        assert measured["task"] == last["task"] == "eval" and {"VD", "mine.object", "mine.object words"} <= last.keys()
        assert {row["task"] for row in rows} == {"tvg", "mine.object"}
        for row in rows:
            assert (f"tvg/{name}" in row) == (row["task"] == "tvg")
            assert ("mine.object/mine.object" in row and "mine.object/words" in row) == (row["task"] != "tvg")
    run(config, work, ROOT / "evaluate.py", "--model", output, "--tvg-reward", "mine.near", "--tasks", "tvg",
        "mine.object", "--output", tmp_path / "test")
    metrics = json.loads((tmp_path / "test" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["rows"] == {"tvg": 4, "mine.object": 4} and {"mine.object", "mine.object words"} <= metrics.keys()


def test_a_changed_line_and_prompt_train(tmp_path, checkpoint):
    house = tmp_path / "house"
    house.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, house)
    source = (house / "grpo.py").read_text(encoding="utf-8")
    begin = source.index("    return ((r - mean)")
    (house / "grpo.py").write_text(source[:begin] + LINE + source[source.index("\n", begin) + 1:], encoding="utf-8")
    source = (house / "rewards.py").read_text(encoding="utf-8")
    place = source.index("\n}\n", source.index("FORMATS = {")) + 3
    (house / "rewards.py").write_text(f"{source[:place]}{PROMPT}{source[place:]}", encoding="utf-8")
    config = make_config(tmp_path, checkpoint)
    run(config, house, "invert4tvg.py", "--model", checkpoint, "--iterations", 2, "--p", 0.5, "--max-new-tokens", 4,
        "--inversion-format", "brief", "--output", tmp_path / "run")
    namespace = {}
    exec((house / "grpo.py").read_text(encoding="utf-8"), namespace)
    r = torch.tensor([[2, 1, 1, 0.0]])
    assert namespace["group_advantages"](r).tolist() == [[1, 0, 0, -1]]  # divided by the spread: 1.22, 0, 0, -1.22


def test_the_rewards_and_the_task_by_hand(mine):
    sample = Sample("A.mp4", "person opens the door", 2.0, 6.0)

    def total(name, answer, sample=sample):
        scoring = rewards.Scoring(rewards.grounding(f"mine.{name}"))
        return rewards.score("tvg", reply(answer), sample, scoring)["total"]

    assert [total("ends", answer) for answer in ("2 to 6", "1 to 8", "4 to 8", "nothing")] == [2, 1.5, 1, 0]
    assert total("near", "2 to 6") == 2 and total("near", "nothing") == 0 and total("near", "6 to 2") == 1
    assert total("near", "8 to 12") == pytest.approx(1 + math.exp(-6 / 4))  # moved by 6 s, no overlap
    assert total("near", "9 to 13") < total("near", "8 to 12")  # nearer is better
    assert total("near", "2 to 6", Sample("A.mp4", "a lamp", 6.0, 6.0)) == 1  # no length to divide by

    task = mine.object
    assert [task.reward(answer, sample.query, None) for answer in (" Door. ", "window")] == [1, 0]
    assert task.suits("person opens it") and not task.suits("person runs")
    assert "'person opens the []'" in prompt_text("mine.object", "person opens the door")


@pytest.mark.parametrize("a, b, distance", [
    ((2, 6), (8, 12), 6), ((8, 12), (2, 6), 6), ((0, 10), (4, 6), 2), ((2, 4), (2, 8), 2), ((1, 4), (3, 5), 1.5),
    ((3, 3), (2, 6), 1.25)])
def test_the_distance_of_two_segments_by_hand_and_by_sorted_quantiles(mine, a, b, distance):
    assert mine.wasserstein(a, b) == pytest.approx(distance)
    q = (np.arange(10_000) + 0.5) / 10_000
    points = [np.sort(start + (end - start) * q) for start, end in (a, b)]
    assert mine.wasserstein(a, b) == pytest.approx(np.abs(points[0] - points[1]).mean(), rel=1e-4)


def test_a_data_set_of_ones_own_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ("video,length,begin,end,sentence", "A.mp4,30,2,6.5,Person runs.", "B.mp4,9,0,3,A lamp.")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    exec(DATA, {})
    found = load_annotations("mine.json", tmp_path)
    assert [(s.query, s.start, s.end, s.duration) for s in found] == [("person runs", 2, 6.5, 30), ("a lamp", 0, 3, 9)]


# ------------------------------------------------------------------------------------------------ the notebook


def run_notebook(notebook):
    """Run the cells in IPython, as Jupyter's kernel does, and their programs forked from here; print what is shown."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    os.chdir(ROOT / "docs")  # where Jupyter starts the kernel
    shell = InteractiveShell.instance()

    def system(command):
        python, *argv = shlex.split(shell.var_expand(command, depth=1))
        assert python == sys.executable
        status, said = tiny.run_program(*argv)
        print(said)
        assert status == 0, command

    shell.system = system
    for cell in notebook.cells:
        if cell.cell_type == "code":
            with capture_output() as shown:
                result = shell.run_cell(cell.source)
            print(shown.stdout, *(kind for output in shown.outputs for kind in output.data))
            result.raise_error()


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("IPython")
    notebook = nbformat.read(ROOT / "docs" / "demo.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    monkeypatch.setenv("DEMO_SIZE", "small")
    monkeypatch.setenv("DEMO_FOLDER", str(tmp_path / "demo"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # it writes down what was run
    status = tiny.wait(tiny.start(notebook, tmp_path / "output.txt", function=run_notebook))
    printed = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert status == [0], printed
    assert "mIoU" in printed and "image/svg+xml" in printed
    assert (tmp_path / "demo" / "grpo" / "report.html").is_file()
