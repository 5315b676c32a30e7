"""Nothing lost: sealed checkpoints, the lock of an output folder, broken numbers, full disks, ranks that end together.

tests/long/ holds campaigns of kills, mutated files and many iterations; their short forms are at the end.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fuzz
import huggingface_hub
import kills
import pytest
import soak
import tiny
import torch
from shared import (
    byte_tokenizer,
    change_json,
    log_of,
    losses,
    make_config,
    refusal,
    reply,
    scripted,
    train,
    weights_of,
    write_lines,
    write_video,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AddedToken

import invert4tvg
import rewards
from engine.model import health
from engine.model.loading import load_model, newest_checkpoint
from engine.model.optimizer import MasterAdamW
from engine.model.prompts import encode_prompt
from engine.program import files
from engine.program.files import iteration_of, locked, strict_json, write_text
from engine.program.launch import launch
from engine.program.ranks import current
from engine.program.settings import UserError
from engine.run import checkpoints, opening
from engine.run.log import cut_log
from engine.run.manifest import damage
from engine.video import clips
from engine.video.frames import VideoError, read_video
from engine.words.annotations import MAX_QUERY, load_annotations


@pytest.fixture()
def quick(config):
    return dataclasses.replace(config, p=1.0, accumulation=1, group_size=2, kl_coef=0.0, save_every=1, iterations=3,
                               max_new_tokens=60)


# ---- Files


def test_what_is_no_number_is_null():
    assert strict_json({"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf,)}], "d": "NaN"}) == (
        '{"a": null, "b": [1.5, null, {"c": [null]}], "d": "NaN"}')


def test_a_log_is_cut_where_an_iteration_begins_and_where_a_line_was_cut_off(tmp_path):
    path = tmp_path / "log"
    lines = ['{"iteration": 0}\n', '{"iteration": 1}\n', '{"iteration": 1, "task": "eval"}\n', '{"iteration": 2}\n']
    for start, torn, kept in ((2, "", 3), (1, "", 1), (0, "", 0), (9, '{"iteration": 3, "x', 4), (9, '{"it"}', 4)):
        path.write_text("".join(lines) + torn)
        cut_log(path, start)
        assert path.read_text() == "".join(lines[:kept])


def test_a_file_is_replaced_in_one_piece(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")
    monkeypatch.setattr(files, "flush", lambda path: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a.json", "new, but it ends here")
    assert (tmp_path / "a.json").read_text() == "old"


# ---- Checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    """A finished run of three iterations, each with its checkpoint -> its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    config = dataclasses.replace(make_config(folder, checkpoint), p=1.0, accumulation=1, group_size=2, kl_coef=0.0,
                                 save_every=1, iterations=3, keep=3, lr=1e-2, max_new_tokens=60)
    with scripted(reply("0 to 1"), reply("0 to 4")):
        train(config)
    return config


def again(finished, tmp_path, *damages):
    """Copy the run, take its end back, damage the newest checkpoints, the newest first -> its configuration."""
    output = tmp_path / "run"
    shutil.copytree(finished.output, output)
    shutil.rmtree(output / "checkpoint-000003")
    for number, change in zip((2, 1), damages):
        change(output / f"checkpoint-{number:06d}")
    return dataclasses.replace(finished, output=str(output))


def truncated(name):
    def change(folder):
        os.truncate(folder / name, (folder / name).stat().st_size // 2)

    change.__name__ = f"truncated {name}"
    return change


def flipped(name):
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    change.__name__ = f"flipped {name}"
    return change


def missing(name):
    def change(folder):
        (folder / name).unlink()

    change.__name__ = f"missing {name}"
    return change


DAMAGES = [change(name) for name in ("model.safetensors", "optimizer.0.safetensors", "run.json", "manifest.json",
                                     "tokenizer.json") for change in (truncated, missing)] + [
    flipped("model.safetensors"), flipped("optimizer.0.safetensors"), flipped("run.json")]


@pytest.mark.parametrize("change", DAMAGES, ids=lambda f: f.__name__)
def test_every_damage_is_seen(finished, tmp_path, change):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(Path(finished.output) / folder.name, folder)
    assert damage(folder) is None
    change(folder)
    assert change.__name__.split()[1] in damage(folder)


@pytest.mark.parametrize("change", [truncated("model.safetensors"), missing("optimizer.0.safetensors"),
                                    truncated("run.json")], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, change, capsys):
    config = again(finished, tmp_path, change)
    with scripted(reply("0 to 1"), reply("0 to 4")):
        train(config, keep=1)
    said = capsys.readouterr().out
    assert f"{config.output}/checkpoint-000002 is damaged: {change.__name__.split()[1]} " in said
    assert "going on from" in said and "checkpoint-000001" in said
    whole = weights_of(finished.output)
    assert all(torch.equal(weight, whole[name]) for name, weight in weights_of(config.output).items())
    assert {path.name for path in Path(config.output).glob("checkpoint-*")} == {
        "checkpoint-000003", "checkpoint-000002.damaged"}  # only the new one is kept, and the old name is free


def test_without_a_whole_checkpoint_nothing_is_begun_anew(finished, tmp_path, capsys):
    config = again(finished, tmp_path, missing("manifest.json"), truncated("model.safetensors"))
    before = (Path(config.output) / "metrics.jsonl").read_text()
    message = refusal(capsys, config)
    assert "no checkpoint there is whole" in message and "model.safetensors" in message
    assert (Path(config.output) / "metrics.jsonl").read_text() == before
    assert {path.name for path in Path(config.output).glob("checkpoint*")} == {"checkpoint-000001", "checkpoint-000002"}


def test_old_checkpoints_go_only_when_the_new_one_is_complete(quick, monkeypatch):
    renamed = []
    rename = Path.rename

    def watching(self, target):
        renamed.append(sorted(path.name for path in self.parent.glob("checkpoint-*")))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watching)
    train(quick, keep=1)
    assert renamed == [["checkpoint-000001.partial"], ["checkpoint-000001", "checkpoint-000002.partial"],
                       ["checkpoint-000002", "checkpoint-000003.partial"]]


def test_nothing_is_renamed_before_its_files_are_on_the_disk(quick, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    rename = Path.rename

    def checking(self, target):
        assert {str(path) for path in (self, *self.iterdir())} <= {
            name.removesuffix(".partial") if name.endswith("json.partial") else name for name in done}
        done.clear()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checking)
    output = train(quick, iterations=1)
    assert output in done  # the folder in which the new name stands


# ---- When to save


def checkpoints_of(output):
    return [iteration_of(path) for path in sorted(Path(output).glob("checkpoint-*"))]


def test_a_checkpoint_due_while_steps_are_left_out_comes_after_the_next_step(quick):
    factors = iter([1.0, 1.0, math.nan, math.nan, 1.0, 1.0, 1.0, 1.0])
    with scripted(reply("0 to 1"), reply("0 to 4")), losses(lambda loss: loss * next(factors)):
        train(quick, iterations=8, save_every=3, keep=9)
    assert checkpoints_of(quick.output) == [5, 6, 8]  # that of 3 waits for the step of iteration 4; 8 is the end


def test_a_stop_is_saved_also_while_steps_are_left_out(quick, monkeypatch):
    factors = iter([1.0, math.nan, math.nan])
    stops = iter([False, False, True])
    monkeypatch.setattr(invert4tvg.StopSignal, "on_any_rank", lambda self, device: next(stops))
    with scripted(reply("0 to 1"), reply("0 to 4")), losses(lambda loss: loss * next(factors)):
        with pytest.raises(SystemExit, match="130"):
            train(quick, iterations=8, save_every=5)
    assert checkpoints_of(quick.output) == [3]  # else iterations 1 and 2 would be made again


# ---- Broken numbers


def test_ten_steps_in_a_row_without_a_finite_gradient_stop_the_run(quick, capsys):
    factors = iter([1.0] * 3 + [math.nan] + [1.0] + [math.nan] * 10)
    with scripted(reply("0 to 1"), reply("0 to 4")), losses(lambda loss: loss * next(factors)):
        message = refusal(capsys, quick, iterations=40, lr=1e-3)
    assert "10 iterations in a row had a loss or a gradient that is not finite" in message
    assert "iteration 14: " in message and ".mp4" in message
    rows = (Path(quick.output) / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(row, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for row in rows]
    assert [row["skipped"] for row in strict] == [0, 0, 0, 1, 0] + [1] * 10
    assert strict[-1]["loss"] is None and strict[-1]["grad_norm"] is None
    assert newest_checkpoint(quick.output).name == "checkpoint-000005"  # before the first of the ten


def test_a_loss_that_is_not_finite_is_left_out_though_its_gradient_is_finite(quick):
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss + math.inf

        @staticmethod
        def backward(ctx, grad):
            return grad

    with scripted(reply("0 to 2"), reply("0 to 4")), losses(Infinite.apply):
        train(quick, iterations=1)
    row = log_of(quick.output)[0]
    assert row["skipped"] == 1 and row["grad_norm"] > 0 and row["loss"] is None


def test_a_learning_rate_that_breaks_the_weights_does_not_end_with_done(lively, capsys):
    message = refusal(capsys, lively, iterations=30, lr=1e30, accumulation=1)
    assert "finite" in message


def test_weights_that_are_not_finite_are_not_saved(quick, monkeypatch, capsys):
    plain = MasterAdamW.step

    def breaking(self):
        plain(self)
        if current.iteration == 1:
            self.param_groups[0]["params"][0].data[0] = math.nan

    monkeypatch.setattr(MasterAdamW, "step", breaking)
    message = refusal(capsys, quick)
    assert "1 weights are no longer finite" in message
    assert [path.name for path in Path(quick.output).glob("checkpoint*")] == ["checkpoint-000001"]


# ---- One output, one run


def held_elsewhere(folder):
    """Hold a folder's lock in another process, which has a child of its own -> its id."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(folder):
            if os.fork() == 0:  # as a worker that decodes videos
                time.sleep(5)
                os._exit(0)
            os.write(writer, b"held")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 4)
    return pid


def test_of_two_runs_in_a_folder_the_second_is_refused_and_told_by_whom(quick, capsys):
    pid = held_elsewhere(quick.output)
    message = refusal(capsys, quick)
    assert f"is in use by process {pid} on host {socket.gethostname()} since" in message
    os.kill(pid, signal.SIGKILL)  # its lock goes with it, though its worker still lives
    os.waitpid(pid, 0)
    train(quick, iterations=1)


@pytest.mark.parametrize("text, free", [
    ("", True), (f"process {os.getpid()} on host {socket.gethostname()} since today", False),
    (f"process 999999999 on host {socket.gethostname()} since today", True),
    ("process 999999999 on host elsewhere since today", False)], ids=["none", "lives", "gone", "elsewhere"])
def test_where_a_file_system_has_no_locks_the_text_decides(tmp_path, monkeypatch, text, free):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    (tmp_path / files.LOCK).write_text(text)
    if free:
        with locked(tmp_path):
            assert f"process {os.getpid()} " in (tmp_path / files.LOCK).read_text()
        assert (tmp_path / files.LOCK).read_text() == ""
    else:
        with pytest.raises(UserError, match="is in use by process"):
            with locked(tmp_path):
                pass


def test_a_folder_that_cannot_be_written_is_one_sentence(quick, tmp_path, capsys):
    (tmp_path / "file").touch()
    message = refusal(capsys, quick, output=str(tmp_path / "file" / "run"))
    assert "cannot be written to (Not a directory)" in message


def test_the_folder_of_a_model_is_no_output(quick, tmp_path, checkpoint, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    before = (tmp_path / "model" / "config.json").read_bytes()
    message = refusal(capsys, quick, model=str(tmp_path / "model"), output=str(tmp_path / "model"))
    assert "is the folder of a model" in message
    assert (tmp_path / "model" / "config.json").read_bytes() == before


def test_space_for_the_next_checkpoint_is_checked_before_training(quick, capsys, monkeypatch):
    train(quick, iterations=1)
    size = sum(path.stat().st_size for path in newest_checkpoint(quick.output).iterdir())
    usage = shutil.disk_usage(quick.output)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    message = refusal(capsys, quick, output=quick.output + "-2")
    assert "a checkpoint takes 0.0165 GB," in message  # 16 MB of it for a real tokenizer's files
    assert f"and {size / 1e9:.3g} GB are free" in message
    assert not (Path(quick.output + "-2") / "metrics.jsonl").exists()


def test_the_bytes_of_a_checkpoint_are_those_of_its_weights_and_optimiser(quick, model):
    train(quick, iterations=1)
    folder = newest_checkpoint(quick.output)
    written = sum((folder / name).stat().st_size for name in ("model.safetensors", "optimizer.0.safetensors"))
    model.model.visual.requires_grad_(False)
    assert opening.checkpoint_bytes(model) - 16e6 == pytest.approx(written, rel=0.1)  # the rest is names
    assert opening.checkpoint_bytes(model.bfloat16()) - 16e6 == sum(
        p.numel() * (14 if p.requires_grad else 2) for p in model.parameters())


def test_a_full_disk_is_one_sentence_and_the_checkpoint_before_is_whole(quick, capsys, monkeypatch):
    saved = []
    plain = checkpoints.save_file

    def full(tensors, path):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        plain(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    message = refusal(capsys, quick)
    assert "checkpoint-000002: could not be written (No space left on device)" in message
    assert [path.name for path in Path(quick.output).glob("checkpoint-*")] == ["checkpoint-000001"]
    assert damage(newest_checkpoint(quick.output)) is None


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_flushed_is_no_error_but_a_disk_that_fails_is(tmp_path, monkeypatch, number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)  # as CIFS
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError, match="Input/output error"):
        files.flush(tmp_path)


# ---- Processes


@pytest.fixture()
def forked(quick, tmp_path):
    """-> run(settings, function=None, ranks=2): (statuses, what was printed); no process may be left behind."""
    def run(settings, function=None, ranks=2):
        log = tmp_path / "output.txt"
        pids = tiny.start(settings, log, ranks, function)
        statuses = tiny.wait(pids, 120)
        assert not tiny.left_behind(pids[0])
        return statuses, log.read_text()

    return run


def test_an_error_on_one_rank_ends_all_and_names_rank_iteration_and_video(quick, forked):
    def failing(settings):
        score = rewards.score

        def broken(task, text, sample, scoring):
            if current.iteration == 1 and os.environ["RANK"] == "1":
                raise ZeroDivisionError("a bug")
            return score(task, text, sample, scoring)

        rewards.score = broken
        launch(invert4tvg.train, settings)

    statuses, said = forked(quick, failing)
    assert statuses == [1, 1]
    assert "rank 1, iteration 1, " in said and ".mp4:" in said and "ZeroDivisionError: a bug" in said
    assert "rank 0, iteration 1: another process of this run has ended" in said


def test_a_video_that_never_comes_on_one_rank_ends_all_and_is_named(quick, forked, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe.mp4"
    os.mkfifo(pipe)
    patience = 3 if clips._start_method() == "fork" else 30  # it includes the worker's imports

    def blocking(settings):
        if os.environ["RANK"] == "1":
            invert4tvg.Clips = lambda samples, *rest: clips.Clips(
                [dataclasses.replace(sample, video=str(pipe)) for sample in samples], *rest)
        launch(invert4tvg.train, settings)

    monkeypatch.setattr(clips, "PATIENCE", float(patience))
    settings = dataclasses.replace(quick, workers=1, iterations=2)
    statuses, said = forked(settings, blocking)
    assert statuses == [1, 1]
    assert f"rank 1, iteration 0: {pipe}: not decoded within {patience} seconds" in said


def test_a_full_gpu_is_one_sentence(quick, forked):
    def full(settings):
        def sample_group(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        invert4tvg.grpo.sample_group = sample_group
        launch(invert4tvg.train, settings)

    statuses, said = forked(quick, full, ranks=1)
    assert statuses == [1] and "Traceback" not in said
    assert "rank 0, iteration 0: the GPU's memory is full; lower --micro-batch" in said


def test_weights_and_biases_is_finished_although_processes_end_without_a_clean_shutdown(quick, tmp_path, forked):
    def logging(settings):
        def finish(exit_code):
            (tmp_path / "finished.txt").write_text(f"rank {os.environ['RANK']}, status {exit_code}")

        run = SimpleNamespace(log=lambda metrics, step: signal.raise_signal(signal.SIGTERM), finish=finish)
        sys.modules["wandb"] = SimpleNamespace(init=lambda **settings: run)
        launch(invert4tvg.train, settings)

    statuses, _ = forked(dataclasses.replace(quick, iterations=9, log_to=("wandb",)), logging)
    assert statuses == [130, 130]
    assert (tmp_path / "finished.txt").read_text() == "rank 0, status 130"


def test_every_rank_finding_the_same_mistake_says_it_once(quick, forked):
    statuses, said = forked(dataclasses.replace(quick, model="/nowhere"))
    assert statuses == [1, 1] and said.count("/nowhere: ") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_a_second_one_ends_at_once(quick, tmp_path, number):
    config = dataclasses.replace(quick, iterations=100_000, save_every=100_000, workers=1)
    for signals, expected in ((1, 130), (2, -number)):
        log = Path(config.output) / "metrics.jsonl"
        log.unlink(missing_ok=True)
        pids = tiny.start(config, tmp_path / "output.txt")
        while not log.exists() or not log.read_text():  # the first iteration
            assert tiny.runs(pids[0]), (tmp_path / "output.txt").read_text()
            time.sleep(0.02)
        if signals == 1:
            os.killpg(pids[0], number)  # as a terminal or a scheduler does, to the worker too
            assert tiny.wait(pids) == [expected]
            said = (tmp_path / "output.txt").read_text()
            assert "the same command goes on" in said and "Traceback" not in said
            done = int(newest_checkpoint(config.output).name.split("-")[1])
            assert [row["iteration"] for row in log_of(config.output)] == list(range(done))
        else:
            while tiny.runs(pids[0]):
                os.kill(pids[0], number)
                time.sleep(0.001)
            assert tiny.wait(pids)[0] in (expected, 130)
            assert f"going on from {config.output}/checkpoint-{done:06d}" in (tmp_path / "output.txt").read_text()
        assert not tiny.left_behind(pids[0])


# ---- Hostile input


@pytest.fixture()
def hostile(tmp_path, checkpoint):
    """A copy of the model's folder to tamper with, and the file that code in it would make."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(checkpoint, folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    return folder, marker


def test_code_in_a_models_folder_is_not_run(hostile):
    folder, marker = hostile
    change_json(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    load_model(str(folder), torch.device("cpu"))
    change_json(folder / "config.json", model_type="unknown")
    with pytest.raises(OSError, match="no Qwen2.5-VL model could be loaded"):
        load_model(str(folder), torch.device("cpu"))
    assert not marker.exists()


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickled_weights_are_not_read(hostile):
    folder, marker = hostile
    torch.save(Bomb(marker), folder / "pytorch_model.bin")
    shutil.move(folder / "model.safetensors", folder / "other.safetensors")
    with pytest.raises(OSError):
        load_model(str(folder), torch.device("cpu"))
    assert not marker.exists()


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for m in messages %}", "{{ messages | nothing }}",
    "{% for i in range(1000000000) %}x{% endfor %}", "no place for the words"])
def test_a_chat_template_that_makes_no_prompt_is_one_sentence(hostile, template):
    folder, _ = hostile
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(OSError, match="its chat template makes no prompt") as error:
        load_model(str(folder), torch.device("cpu"))
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("special", [True, False])
def test_a_query_becomes_no_added_token_of_either_kind(special):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<tool_call>", special=special), AddedToken("<|fim|>", special=special)])
    query = "a <tool_call> and <|fim|><tool_call>"
    added = set(tokenizer.convert_tokens_to_ids(["<tool_call>", "<|fim|>"]))
    ids = encode_prompt(tokenizer, query, 1)
    assert not added & set(ids) and query in tokenizer.decode(ids)


def test_a_query_is_cut_at_its_stated_length(config):
    Path(config.annotations).write_text("AAA 0 2##" + "person opens " * 1000 + "\n", encoding="utf-8")
    sample, = load_annotations(config.annotations, config.videos)
    assert MAX_QUERY - 20 < len(sample.query) <= MAX_QUERY


def test_a_playlist_leads_nowhere_and_a_colon_is_part_of_a_name(tmp_path):
    inside, outside = tmp_path / "videos", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        write_video(folder / "a.mp4", [k / 5 for k in range(10)])
    (inside / "list.mp4").write_text(f"ffconcat version 1.0\nfile {outside / 'a.mp4'}\n")
    (inside / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\nhttp://localhost:9/a.ts\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(VideoError):
            read_video(str(inside / name))
    (inside / "b:c.mp4").write_bytes((inside / "a.mp4").read_bytes())
    with contextlib.chdir(inside):
        assert read_video("b:c.mp4").frames.shape == read_video("a.mp4").frames.shape


def test_without_a_hub_id_no_network_is_asked(quick, forked):
    """A whole run in a process of its own, where the hub is not switched off and every look-up or connection fails."""
    def connected(settings):
        def refuse(*arguments, **named):
            print("network", arguments)
            raise OSError("no network")

        huggingface_hub.constants.HF_HUB_OFFLINE = False
        socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
        with contextlib.suppress(Exception):
            huggingface_hub.model_info("publisher/model")
        print("begun")
        launch(invert4tvg.train, settings)

    statuses, said = forked(dataclasses.replace(quick, iterations=1), connected, ranks=1)
    asked, run = said.split("begun")
    assert statuses == [0] and "done: " in run and "network" not in run
    assert "network" in asked  # a hub that is asked for a model would be seen


# ---- The campaigns


@pytest.fixture()
def short(lively, monkeypatch):
    """The scripts of tests/long/ with a model and runs of seconds."""
    def make(folder, **changes):
        folder.mkdir(parents=True, exist_ok=True)
        line = {"video": "AAA", "query": "person runs", "start": 0, "end": 2, "completion": reply("1 to 2")}
        write_lines(folder / "demos.jsonl", [line | {"task": task} for task in rewards.TASKS])
        settings = {"max_new_tokens": 8, "workers": 1, "output": str(folder / "run")}
        return dataclasses.replace(lively, **settings | changes)

    monkeypatch.setattr(tiny, "make", make)
    fewer = {"iterations": 2, "save_every": 1, "eval_every": 2, "eval_limit": 1, "accumulation": 1}
    monkeypatch.setattr(kills, "CHANGES", kills.CHANGES | fewer)
    # A slow disk: most kills while a checkpoint is written then hit at the first attempt.
    plain = files.flush
    monkeypatch.setattr(files, "flush", lambda path: (time.sleep(0.02), plain(path)))
    # How soon a worker notices that its trainer was killed.
    monkeypatch.setattr(torch.utils.data._utils.worker, "MP_STATUS_CHECK_INTERVAL", 0.5)


def test_a_short_campaign_of_kills(short, tmp_path, capsys, monkeypatch):
    # One kill of each of two kinds: the others' moments are among theirs, and the long campaign has all four.
    kinds = ("one process, while a checkpoint is written", "one of two processes")
    monkeypatch.setattr(kills, "KINDS", {kind: kills.KINDS[kind] for kind in kinds})
    assert kills.campaign(tmp_path, kills=1) == []
    assert capsys.readouterr().out.count("kills survived") == 2


def test_a_short_campaign_of_mutilated_files(short, tmp_path, capsys):
    counts = {"annotations": 200, "videos": 20, "completions": 100, "checkpoints": 3, "commands": 4}
    assert fuzz.campaign(tmp_path / "new", **counts, seed=1) == []
    assert capsys.readouterr().out.count("mishandled 0") == 5


@pytest.mark.skipif(sys.platform != "linux", reason="memory and descriptors are counted in /proc")
def test_a_short_campaign_of_endurance(short, tmp_path):
    assert soak.campaign(tmp_path, iterations=12) == []


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_is_not_finite_is_seen_without_another_tensor_of_the_size(broken, dtype):
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple) else [result])
                         if torch.is_tensor(x) and x.untyped_storage().data_ptr() != x_storage)
            return result

    x = torch.linspace(-3, 3, 1000).to(dtype)
    x_storage = x.untyped_storage().data_ptr()
    with Sizes():
        assert health.is_finite(x)
    assert max(sizes) == 1
    x[617] = broken
    assert not health.is_finite(x)
