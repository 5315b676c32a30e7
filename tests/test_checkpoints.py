"""engine/model/loading.py: models that cannot be loaded, runs that go on, and runs that are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shared import log_of, refusal, timeless_log_of, train, train_once, weights_of, write_share
from torch.distributed.optim import ZeroRedundancyOptimizer

import invert4tvg
from engine.model import loading
from engine.model.loading import load_model, newest_checkpoint
from engine.model.optimizer import MasterAdamW
from engine.program.earlier import changed_options
from engine.program.launch import StopSignal
from engine.run.checkpoints import load_optimizer
from engine.run.opening import note_origin
from engine.words.samples import Sample

CPU = torch.device("cpu")


# ---- Models


def test_the_newest_complete_checkpoint_is_the_run(tmp_path):
    assert newest_checkpoint(tmp_path) is None and newest_checkpoint(tmp_path / "nothing") is None
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-1000012.partial", "checkpoint-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").touch()
    (tmp_path / "checkpoint-5000000").mkdir()  # another program's, as it stands beside the final weights
    assert newest_checkpoint(tmp_path).name == "checkpoint-1000000"  # by number, not by name


def test_a_checkpoint_is_loaded_with_the_ids_that_end_and_those_that_are_banned(checkpoint, tmp_path, tokenizer):
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoint-000003")
    (run / "checkpoint-000003" / "run.json").touch()
    model, processor = load_model(str(run), CPU)
    assert model.dtype == torch.float32
    assert processor.tokenizer.convert_ids_to_tokens(processor.eos.tolist()) == ["<|im_end|>"]
    assert sorted(processor.tokenizer.convert_ids_to_tokens(processor.banned.tolist())) == [  # all but the end
        "<|endoftext|>", "<|im_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_pad|>",
        "<|vision_start|>"]
    generation = json.loads((run / "checkpoint-000003" / "generation_config.json").read_text())
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>")]
    (run / "checkpoint-000003" / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": ends}))
    assert load_model(str(run), CPU)[1].eos.tolist() == sorted(ends)


def test_each_parameter_finds_its_saved_state_whatever_number_of_ranks_wrote_it(alone, model, tmp_path):
    saved = {name: {"step": 7, "exp_avg": torch.full_like(p, i), "exp_avg_sq": torch.full_like(p, 2 * i)}
             for i, (name, p) in enumerate(model.named_parameters())}
    for rank in range(2):
        write_share(tmp_path, rank, {name: saved[name] for name in list(saved)[rank::2]})
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=MasterAdamW, lr=1e-3)
    load_optimizer(tmp_path, model, optimizer)
    for name, p in model.named_parameters():
        state = optimizer.optim.state[p]
        assert state["step"] == 7 and torch.equal(state["exp_avg"], saved[name]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], saved[name]["exp_avg_sq"])


# ---- Going on


def test_a_run_that_goes_on_equals_an_uninterrupted_one_bit_for_bit(lively):
    train(lively, save_every=2, save_rollouts=1)
    assert any(row["grad_norm"] > 0 for row in log_of(lively.output))
    whole, log = weights_of(lively.output), timeless_log_of(lively.output)
    state = load_file(newest_checkpoint(lively.output) / "optimizer.0.safetensors")
    rollouts = Path(lively.output) / "rollouts.0.jsonl"
    written = rollouts.read_text()
    assert written.count("\n") == 4 * 2 * 3  # iterations, prompts, completions
    shutil.rmtree(newest_checkpoint(lively.output))  # as if it had died after iteration 3
    for path in (rollouts, Path(lively.output) / "metrics.jsonl"):
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"iteration": 4, "vid')  # while writing
    train(lively, save_every=2, save_rollouts=1)
    again = weights_of(lively.output)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for name, value in load_file(newest_checkpoint(lively.output) / "optimizer.0.safetensors").items():
        assert torch.equal(value, state[name]) and (not name.endswith(".step") or value == 4)
    assert timeless_log_of(lively.output) == log
    assert rollouts.read_text() == written


def test_a_finished_run_is_left_as_it_is_and_loads_no_model(config, monkeypatch, capsys):
    changes = {"iterations": 1, "eval_every": 1, "eval_limit": 1, "eval_annotations": config.annotations}
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "on_any_rank", lambda self, device: True)  # in the last iteration: that is the end
        train(config, **changes)
    log = (Path(config.output) / "metrics.jsonl").read_text()
    monkeypatch.setattr(loading, "load_model", None)
    monkeypatch.setattr(invert4tvg.data, "load_training", None)
    capsys.readouterr()
    train(config, **changes)
    train(config, **changes, keep=5, save_every=7, workers=1)  # these may change
    assert capsys.readouterr().out.count("is finished: ") == 2
    assert (Path(config.output) / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("has_metrics", [False, True])
@pytest.mark.parametrize("line", [b"", b'{"iteration": 1, "ta'])
def test_a_run_that_only_lacks_its_last_evaluation_makes_it(config, has_metrics, line):
    changes = {"iterations": 1, "eval_every": 1, "eval_limit": 1, "eval_annotations": config.annotations}
    train(config, **changes)
    log = timeless_log_of(config.output)
    assert [(row["iteration"], row["task"] == "eval") for row in log] == [(0, True), (0, False), (1, True)]
    if not has_metrics:  # as if it had died while measuring; else, before its line was written
        shutil.rmtree(Path(config.output) / "eval-000001")
    path = Path(config.output) / "metrics.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]) + line)
    (Path(config.output) / "environment.json").unlink()  # it notes the end
    train(config, **changes)
    assert timeless_log_of(config.output) == log
    assert (Path(config.output) / "eval-000001" / "metrics.json").exists()


def test_a_changed_option_is_refused_and_named(config, capsys):
    train(config, iterations=1)
    written = (Path(config.output) / "metrics.jsonl").read_text()
    message = refusal(capsys, config, iterations=1, lr=1e-2, weight_decay=0.1)
    assert "another --lr, --weight-decay;" in message and config.output in message
    assert "--iterations" in refusal(capsys, config, iterations=2)
    assert "number of prompts an iteration (3, not 2:" in refusal(capsys, config, iterations=1, accumulation=3)
    assert (Path(config.output) / "metrics.jsonl").read_text() == written


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoint-000001/optimizer.0.safetensors"])
def test_a_damaged_run_is_named(config, capsys, name):
    train_once(config, iterations=2)
    (Path(config.output) / name).write_text("damaged}\n")
    assert name.split("/")[-1] in refusal(capsys, config, iterations=2)


def test_the_configuration_is_noted_beside_the_log_and_what_a_crash_left_is_removed(config):
    partial = Path(config.output) / "checkpoint-000007.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").touch()
    train(config, iterations=1, lr=1e-5)
    noted = json.loads((Path(config.output) / "config.json").read_text(encoding="utf-8"))
    assert changed_options(noted, config) == ["--lr", "--iterations"]
    assert not partial.exists()


def test_what_a_run_learns_from_is_told_by_every_field_of_its_rows_by_completions_and_by_tasks(alone, config):
    sample = Sample("videos/a.mp4", "q", 0.0, 1.0)

    def digest(completions=("x",), tasks=("vd",), **changes):
        return note_origin(config, None, [dataclasses.replace(sample, **changes)], completions, tasks, [])["rows"]

    changes = [{"video": "videos/b.mp4"}, {"query": "p"}, {"start": 0.5}, {"end": 2.0}, {"excerpt": (0.0, 4.0)},
               {"alternatives": ((2.0, 3.0),)}, {"completions": ("y",)}, {"tasks": ("vc",)}]
    assert len({digest(), *(digest(**change) for change in changes)}) == 1 + len(changes)
    assert digest(video="elsewhere/a.mp4") == digest()  # the same file in another folder


def test_a_checkpoint_that_cannot_be_deleted_is_said_once_and_ends_no_run(config, monkeypatch, capsys):
    refused = []
    remove = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if Path(path).name == "checkpoint-000001" and len(refused) < 2:
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    output = Path(train(config, iterations=4, save_every=1, keep=1))
    assert len(refused) == 2 and capsys.readouterr().out.count("checkpoint-000001: could not be deleted (Perm") == 1
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-000004"]  # tried again, with success
