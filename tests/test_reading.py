"""What docs/reading.md works through, claims and recommends; the notebook."""

import json
import os
import re
import shlex
import shutil
import sys

import pytest
import tiny
import torch
from shared import ROOT, make_config, reply

import grpo
import rewards
from engine.annotations import Sample, load_annotations

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


def insert(path, code, after):
    """Put a recipe into a file, behind the statement that begins with `after`; "": at its end."""
    text = path.read_text(encoding="utf-8")
    place = text.index("\n}\n", text.index(after)) + 3 if after else len(text)
    path.write_text(f"{text[:place]}\n\n{code}\n{text[place:]}", encoding="utf-8")


def test_a_changed_reward_task_and_prompt_train(tmp_path, checkpoint):
    reward, task, _, prompt = RECIPES
    house = tmp_path / "house"
    house.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "papers"):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, house / path.name)
    insert(house / "papers" / "rewards.py", reward, "")
    insert(house / "rewards.py", task, "INVERSIONS = {")
    insert(house / "rewards.py", prompt, "FORMATS = {")
    config = make_config(tmp_path, checkpoint)
    status, said = tiny.run_program(
        "invert4tvg.py", "--model", config.model, "--annotations", config.annotations, "--videos", config.videos,
        "--output", config.output, "--iterations", 4, "--seed", 1, "--p", 0.5, "--inversion-tasks", "ob",
        "--tvg-reward", "ends", "--inversion-format", "brief", "--max-new-tokens", 4, "--workers", 0, cwd=house)
    assert status == 0, said
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"tvg", "ob"}
    for row in rows:
        assert ("tvg/ends" in row, "ob/ob" in row) == (row["task"] == "tvg", row["task"] == "ob")


def test_the_changed_reward_task_and_prompt_by_hand(monkeypatch):
    import papers.rewards

    changed = {"rewards": vars(rewards).copy(), "papers": vars(papers.rewards).copy()}
    monkeypatch.setattr(papers.rewards, "GROUNDINGS", papers.rewards.GROUNDINGS.copy())
    changed["papers"]["GROUNDINGS"] = papers.rewards.GROUNDINGS
    exec(RECIPES[0], changed["papers"])
    sample = Sample("A.mp4", "person opens the door", 2.0, 6.0)
    for answer, total in (("2 to 6", 2), ("1 to 8", 1.5), ("4 to 8", 1), ("nothing", 0)):
        parts = rewards.score("tvg", reply(answer), sample, grounding=papers.rewards.GROUNDINGS["ends"])
        assert parts["total"] == total
    changed["rewards"]["INVERSIONS"] = inversions = {}
    exec(RECIPES[1], changed["rewards"])
    assert inversions["ob"].reward(" Door. ", "person opens the door", None) == 1
    assert inversions["ob"].reward("window", "person opens the door", None) == 0
    assert inversions["ob"].suits("person opens it") and not inversions["ob"].suits("person runs")


def test_a_data_set_of_ones_own_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ("video,length,begin,end,sentence", "A.mp4,30,2,6.5,Person runs.", "B.mp4,9,0,3,A lamp.")
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    exec(RECIPES[2], {})
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
