"""What is noted of a run beside its log, and where the log is shown too."""

import dataclasses
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from shared import change_sealed, log_of, train, train_once

from engine.model.loading import newest_checkpoint
from engine.program.settings import UserError
from engine.run import log
from engine.run.card import model_card
from engine.run.log import open_boards


def test_a_run_notes_its_environment_and_its_checkpoint_has_a_card(config):
    output = Path(train(config, iterations=2, eval_every=2, eval_annotations=config.annotations, eval_limit=1, p=1.0))
    environment = json.loads((output / "environment.json").read_text())
    assert environment["iterations"] == 2 and environment["processes"] == 1
    assert environment["torch"] == version("torch") and environment["python"].startswith("3.")
    checkpoint = newest_checkpoint(output)
    card = (checkpoint / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# run\n" in card
    assert "| stage | GRPO, iteration 2 of 2 |" in card and "| prompts an iteration | 2 |" in card
    mean = json.loads((output / "eval-000000" / "metrics.json").read_text())["mIoU"]  # the end is measured after saving
    assert f"Measured at iteration 0 on train.txt, percent:\n\n| | |\n|---|---|\n| R1@0.3 | {0:.1f} |" in card
    assert f"| mIoU | {mean:.1f} |" in card


def test_a_card_shows_the_runs_own_newest_measurement_until_then(config, tmp_path):
    # eval-best is the user's; the run was interrupted after iteration 9 and goes on from an earlier checkpoint
    for name in ("eval-000004", "eval-000009", "eval-best"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "metrics.json").write_text(json.dumps({"mIoU": 10.0 + ord(name[-1])}))
    progress = {"iteration": 8, "iterations": 20, "prompts": 2}
    assert "Measured at iteration 4 on" in model_card(config, progress)
    card = model_card(config, progress | {"iteration": 9})
    assert "Measured at iteration 9 on" in card and f"| mIoU | {10 + ord('9'):.1f} |" in card
    assert "Nothing was measured" in model_card(config, progress | {"iteration": 3})


def test_a_card_of_a_run_that_measured_nothing_says_so_and_replaces_that_of_its_start(config, checkpoint, tmp_path):
    first = newest_checkpoint(train(config, iterations=1, p=1.0))
    again = train(config, iterations=1, p=1.0, model=str(first), seed=5, output=str(tmp_path / "second"))
    card = (newest_checkpoint(again) / "README.md").read_text()
    assert "Nothing was measured" in card and "# second" in card and "| seed | 5 |" in card
    assert f"| start | {first} |" in card


@pytest.mark.parametrize("name, package", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_board_that_is_not_installed_is_one_sentence(name, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(UserError, match=f"--log-to {name}: .*pip install {name}"):
        open_boards(SimpleNamespace(output=str(tmp_path), log_to=(name,)), "1234", 0)


def test_a_missing_key_of_wandb_is_one_sentence(config, monkeypatch):
    class Error(Exception):
        pass

    def init(**settings):
        raise Error("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))  # as wandb 0.31
    with pytest.raises(UserError, match="--log-to wandb: No API key configured. .*; .*WANDB_MODE=offline[.]"):
        open_boards(dataclasses.replace(config, log_to=("wandb",)), "1234", 0)


def test_a_curve_at_wandb_is_known_by_its_run(config, monkeypatch):
    runs = []
    package = SimpleNamespace(init=lambda **settings: runs.append(settings), Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(log, "at_exit", [])
    open_boards(dataclasses.replace(config, output="other/run", log_to=("wandb",)), "1234", 0)
    [run] = runs
    assert (run["id"], run["name"], run["resume"], run["config"]["lr"]) == ("1234", "run", "allow", config.lr)


def test_a_run_has_an_identity_that_it_keeps_and_one_begun_anew_has_another(config):
    def identity(output):
        of_folder = json.loads((Path(output) / "environment.json").read_text())["run"]
        of_checkpoints = {json.loads(path.read_text())["run"] for path in Path(output).glob("checkpoint-*/run.json")}
        assert of_checkpoints == {of_folder}
        return of_folder

    train_once(config, iterations=2, keep=9)
    first = identity(config.output)
    moved = Path(config.output).rename(Path(config.output).with_name("moved"))
    train(config, iterations=2, keep=9, output=str(moved))
    assert identity(moved) == first and len(list(moved.glob("checkpoint-*"))) == 2
    train(config, iterations=1)  # anew in the place of the first
    assert identity(config.output) != first


def test_a_run_of_an_earlier_version_keeps_its_curve(config):
    """It was known by the digest of its folder's path."""
    output = train_once(config, iterations=2)
    (output / "environment.json").unlink()
    change_sealed(newest_checkpoint(output) / "run.json", run=None)
    train(config, iterations=2)
    expected = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]
    assert json.loads((output / "environment.json").read_text())["run"] == expected


def test_boards_get_every_line_of_the_log(config, monkeypatch):
    shown = []

    class Writer:  # as tensorboard's, it keeps what was not flushed to itself when the program ends
        def __init__(self, folder, purge_step):
            self.where = folder, purge_step
            self.waiting = []

        def add_scalar(self, name, value, iteration):
            self.waiting.append(("tensorboard", *self.where, iteration, name, value))

        def flush(self):
            shown.extend(self.waiting)
            self.waiting.clear()

    def init(**settings):
        def log(metrics, step):
            shown.extend(("wandb", settings["name"], settings["resume"], step, *item) for item in metrics.items())
        return SimpleNamespace(log=log, finish=None)

    monkeypatch.setattr(log, "at_exit", [])
    for name, contents in (("torch.utils.tensorboard", {"SummaryWriter": Writer}), ("wandb", {"init": init})):
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    output = train(config, iterations=2, p=1.0, log_to=("tensorboard", "wandb"))
    expected = {(row["iteration"], name, row[name])
                for row in log_of(output) for name in row.keys() - {"iteration", "task"}}
    for board, where in (("tensorboard", (output, 0)), ("wandb", ("run", "allow"))):
        found = [line for line in shown if line[0] == board]
        assert {line[3:] for line in found} == expected and len(found) == len(expected) > 20
        assert {line[1:3] for line in found} == {where}
