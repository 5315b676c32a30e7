"""engine/program/ and the log: the command line, how a program ends, signals, metrics and the log."""

import dataclasses
import datetime
import importlib
import io
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing
from shared import ROOT

import engine.program.launch as joining
import rewards
from engine.model import health
from engine.program.earlier import changed_options
from engine.program.launch import StopSignal, launch, setup_distributed
from engine.program.progress import progress
from engine.program.ranks import current, on_rank_0, random_generator, say, together
from engine.program.settings import UserError, flag, option, parse_settings
from engine.run import manifest
from engine.run.log import Log, combine, group_metrics
from engine.run.manifest import seal
from engine.video.clips import _start_method
from engine.video.frames import VideoError
from evaluate import EvalSettings
from invert4tvg import Config

# ---- The command line


@pytest.mark.parametrize("argv, words", [
    (["--p", "1.5"], "--p is 1.5"), (["--group-size", "1"], "--group-size is 1; it must be at least 2"),
    (["--no-such-option"], "--no-such-option"), (["--inversion-tasks", "vc", "xy"], "xy: is not among vc,"),
    (["--mu", "x"], "'x'"),
    (["--min-frame-pixels", "900000"], "--max-frame-pixels"),
    (["--demonstrations", "d.jsonl", "--annotations", "a.txt"], "--annotations"),
    (["--eval-annotations", "a.txt"], "--eval-every"), (["--seed", str(2**70)], f"at most {2**63 - 1}"),
    (["--reward-weights", "x=2"], "--reward-weights"), (["--tvg-reward", "giou"], "giou: is not among iou;"),
    (["--tvg-format", "none"], "'none'"), (["--inversion-format", "thinking"], "'thinking'"),
    (["--inversion-reward", "cos"], "'cos'"), (["--inversion-tasks", "tvg"], "tvg: is not among vc, ar, vd;"),
    (["--tvg-reward", "none.x"], "none.x: there is no module none; put none.py into the current folder"),
    (["--tvg-reward", "rewards.none"], "rewards.py has no none; define a rewards.Grounding of this name"),
    (["--tvg-reward", "rewards.TASKS"], "rewards.TASKS: is of the class tuple; name a rewards.Grounding"),
    (["--inversion-tasks", "rewards.IOU"], "is of the class Grounding; name a rewards.Inversion"),
    (["--vd-match", "some"], "'some'"), (["--resume"], "--resume"),
    (["--lr", "nan"], "--lr is nan; it must be a finite number"),
    (["--clip-epsilon", "1e39"], "--clip-epsilon is 1e+39; it must be at most 1e+30"), (["@none.args"], "none.args")])
def test_a_wrong_option_is_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_settings(Config, "", argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


def test_a_module_in_the_current_folder_is_found_and_may_be_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    (tmp_path / "good_one.py").write_text("import rewards\nends = rewards.IOU", encoding="utf-8")
    (tmp_path / "bad_one.py").write_text("raise ValueError('on two\\nlines')", encoding="utf-8")
    assert parse_settings(Config, "", ["--tvg-reward", "good_one.ends"]).grounding() is rewards.IOU
    with pytest.raises(SystemExit):
        parse_settings(Config, "", ["--inversion-tasks", "vc", "bad_one.x"])
    message = capsys.readouterr().err
    assert "bad_one.x: the module bad_one cannot be imported (ValueError: on two lines); mend it" in message
    assert message.count("\n") == 1


def test_the_papers_tasks_stay_the_default_beside_a_new_line(tmp_path):
    source = (ROOT / "rewards.py").read_text(encoding="utf-8")
    line = 'INVERSIONS["new"] = INVERSIONS["vc"]\n'
    (tmp_path / "rewards.py").write_text(source.replace("TASKS = (", f"{line}TASKS = (", 1), encoding="utf-8")

    def defaults(folder):
        tiny.forget_project()
        sys.path.insert(0, str(folder))
        programs = importlib.import_module("invert4tvg"), importlib.import_module("evaluate")
        assert "new" in programs[0].rewards.INVERSIONS
        print(programs[0].Config.inversion_tasks, programs[1].EvalSettings.tasks)

    status = tiny.wait(tiny.start(tmp_path, tmp_path / "output.txt", function=defaults))
    said = (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert status == [0] and said == "('vc', 'ar', 'vd') ('tvg', 'vc', 'ar', 'vd')\n", said


def test_of_several_processes_one_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        parse_settings(Config, "", ["--mu", "0"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""


def test_every_setting_is_an_option_with_its_explanation(capsys):
    with pytest.raises(SystemExit):
        parse_settings(Config, "text", ["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert option(field.name) in text
    settings = parse_settings(Config, "", ["--inversion-tasks", "vc", "--no-gradient-checkpointing"])
    assert settings == Config(inversion_tasks=("vc",), gradient_checkpointing=False)
    assert parse_settings(Config, "", []) == Config() and parse_settings(EvalSettings, "", []) == EvalSettings()


def with_changes(cls, f, value):
    """`cls` with one setting changed and, where it needs another one, that."""
    return cls(**({f.metadata["needs"]: 1} if f.metadata["needs"] else {}) | {f.name: value})


LIMITED = [(cls, f) for cls in (Config, EvalSettings) for f in dataclasses.fields(cls)
           if any(f.metadata[limit] is not None for limit in ("above", "least", "most"))]


@pytest.mark.parametrize("cls, f", LIMITED, ids=lambda x: getattr(x, "name", None))
def test_every_limit_holds_and_is_named(cls, f):
    above, least, most = (f.metadata[limit] for limit in ("above", "least", "most"))
    step = 1 if f.type is int else 1e-3
    beyond = [above, None if least is None else least - step, None if most is None else most + step]
    for value in beyond:
        if value is not None:
            with pytest.raises(UserError, match=f"{option(f.name)} is {value}".replace(".", "[.]")):
                with_changes(cls, f, value).check()
    for value in (least, most):
        if value is not None:
            with_changes(cls, f, value).check()


def another(f):
    """A value of a setting that is not its default."""
    if f.type is bool:
        return not f.default
    if f.metadata["choices"]:
        return f.metadata["choices"][-1:] if f.type is tuple else f.metadata["choices"][-1]
    if f.type is tuple:
        return f.default[-1:] or ("x",)
    return f.default / 2 if f.type is float else f.default + (1 if f.type is int else "x")


@pytest.mark.parametrize("cls, f", [
    (cls, f) for cls in (Config, EvalSettings) for f in dataclasses.fields(cls)
    if f.metadata["unless"] or f.metadata["needs"]], ids=lambda x: getattr(x, "name", None))
def test_an_option_without_meaning_is_refused_beside_its_reason(cls, f):
    other = f.metadata["unless"] or f.metadata["needs"]
    config = cls(**{f.name: another(f)})
    if f.metadata["unless"]:
        config.check()
        config = dataclasses.replace(config, **{other: "demos.jsonl"})
    with pytest.raises(UserError, match=f"{option(f.name)} has no meaning .*{option(other)};"):
        config.check()
    if f.metadata["needs"]:
        dataclasses.replace(config, **{other: {"video": "a.mp4", "query": ("person runs",)}.get(other, 1)}).check()


def test_a_query_that_says_nothing_is_refused():
    with pytest.raises(UserError, match="--query ' . ' says nothing"):
        EvalSettings(video="a.mp4", query=("person runs", " . ")).check()


def test_options_may_stand_in_a_file(tmp_path):
    (tmp_path / "run.args").write_text("# a comment\n--lr 1e-3 --inversion-tasks vc vd  # another\n\n"
                                       "--output 'a folder'\n--no-gradient-checkpointing\n")
    given = parse_settings(Config, "", [f"@{tmp_path / 'run.args'}", "--lr", "1e-4"])
    assert given == Config(lr=1e-4, inversion_tasks=("vc", "vd"), output="a folder", gradient_checkpointing=False)


@dataclasses.dataclass(frozen=True)
class Small:
    size: int = flag(1, "a size")
    names: tuple = flag(("a", "b"), "names")
    folder: str = flag("here", "a folder", free=True)

    def check(self):
        pass


def test_inherited_options_give_way_to_the_command_line():
    def inherit(settings, given):
        assert settings.folder == "there"  # what the command line gave decides where to look
        return {name: value for name, value in {"size": 5, "names": ("c",)}.items() if name not in given}

    assert parse_settings(Small, "", ["--folder", "there"], inherit) == Small(5, ("c",), "there")
    assert parse_settings(Small, "", ["--folder", "there", "--size", "1"], inherit) == Small(1, ("c",), "there")


def test_a_mistake_is_said_before_anything_is_inherited(capsys):
    with pytest.raises(SystemExit):
        parse_settings(EvalSettings, "", ["--video", "a.mp4"], lambda *_: pytest.fail("asks for a model first"))
    assert "--video has no meaning without --query" in capsys.readouterr().err


def test_changed_options_are_those_that_matter():
    before = json.loads(json.dumps(dataclasses.asdict(Small())))
    assert changed_options(before, Small()) == changed_options(before, Small(folder="there")) == []
    older = {"folder": "here"}  # of a version without the two others, which therefore had their defaults
    assert changed_options(older, Small()) == [] and changed_options(older, Small(size=2)) == ["--size"]
    assert changed_options(before, Small(2, ("a",))) == ["--size", "--names"]
    assert changed_options(before | {"reward_weights": []}, Small()) == []  # an option that is gone, at its default
    assert changed_options(before | {"reward_weights": ["anchor_weight=0"]}, Small()) == [
        "--reward-weights, which is no longer an option"]
    assert changed_options(before | {"save_minutes": 5.0}, Small()) == []  # it might change


def test_a_mistyped_option_is_said_before_spacy_and_transformers_are_imported():
    # Both in one process, so that torch is imported once; nothing of the project is left from the first.
    command = textwrap.dedent("""
        import runpy, sys
        for program in ("invert4tvg.py", "evaluate.py"):
            sys.argv = [program, "--nope"]
            try:
                runpy.run_path(program, run_name="__main__")
            except SystemExit as stop:
                late = {"spacy", "transformers", "torch.distributed.optim"}
                print(program, stop.code, *sorted(({"torch"} | late) & sys.modules.keys()))
            for name in [name for name in sys.modules if name.split(".")[0] in ("engine", "papers", "data", "grpo",
                                                                                "rewards", "evaluate")]:
                del sys.modules[name]
    """)
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["invert4tvg.py 2 torch", "evaluate.py 2 torch"], done.stderr
    for program in ("invert4tvg.py", "evaluate.py"):
        assert f"{program}: unrecognized arguments: --nope; --help" in done.stderr


@pytest.mark.parametrize("name", ["invert4tvg", "evaluate", "demo.make_demo", "papers.protocols", "report.__main__"])
def test_every_program_can_be_the_first_that_is_imported(tmp_path, name):
    """Programs that other tests fork from a process that has loaded everything."""

    def imported(name):
        tiny.forget_project("benchmarks", "demo", "engine", "papers", "report")
        importlib.import_module(name)

    status = tiny.wait(tiny.start(name, tmp_path / "output.txt", function=imported))
    assert status == [0], (tmp_path / "output.txt").read_text()


def test_what_is_printed_may_hold_names_that_the_console_cannot_show(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    parse_settings(EvalSettings, "", [])
    print("видео", flush=True)
    assert sys.stdout.buffer.getvalue() == b"?????\n"


# ---- How processes find each other


@pytest.mark.parametrize("variables, copies", [
    ({"SLURM_NTASKS": "2"}, 1),  # plain python in `salloc -n 2` or in a batch script
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 1),  # in a batch step
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # srun -n 1
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, 2)])  # srun -n 2
def test_copies_that_srun_has_started_are_refused_and_an_allocation_is_not(monkeypatch, variables, copies):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if copies > 1:
        with pytest.raises(SystemExit, match="Slurm started 2 copies of this program"):
            setup_distributed()
    else:
        assert setup_distributed().type == "cpu" and dist.get_world_size() == 1
        dist.destroy_process_group()


@pytest.mark.parametrize("variables, words", [
    ({"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29501"}, "nowhere.invalid"), ({}, "MASTER_ADDR expected"),
    ({"MASTER_ADDR": "localhost", "MASTER_PORT": "http"}, "'http'")])
def test_processes_that_do_not_find_each_other_give_up_with_one_sentence(monkeypatch, variables, words):
    monkeypatch.setattr(joining, "JOINING", datetime.timedelta(seconds=1))
    for name, value in ({"RANK": "1", "WORLD_SIZE": "2"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"could not be joined .*{words}.*start them with torchrun"):
        setup_distributed()


# ---- How a program ends


@pytest.mark.parametrize("error, status, message", [
    (UserError("It is wrong."), 1, "It is wrong.\n"), (VideoError("a.mp4: broken."), 1, "a.mp4: broken.\n"),
    (OSError("no such model"), 1, "no such model\n"), (ImportError("no spaCy"), 1, "no spaCy\n"),
    (KeyboardInterrupt(), 130, "")])
def test_a_users_mistake_is_one_sentence_and_a_status(error, status, message, capsys, tmp_path):
    def program(settings, device):
        assert device.type == "cpu" and dist.get_world_size() == 1
        say("said once")
        raise error

    with pytest.raises(SystemExit) as stop:
        launch(program, Config(output=str(tmp_path)))
    printed = capsys.readouterr()
    assert stop.value.code == status and printed.out == "said once\n"
    assert printed.err.endswith(message) and printed.err.count("\n") == message.count("\n")
    assert not dist.is_initialized()


def test_a_bug_keeps_its_traceback_and_is_placed(tmp_path):
    def program(settings, device):
        for iteration in range(3, 5):
            current.iteration = iteration
            current.videos = ["a.mp4"]
            if iteration == 4:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as error:
        launch(program, Config(output=str(tmp_path)))
    assert error.value.__notes__ == ["rank 0, iteration 4, a.mp4"]
    dist.destroy_process_group()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_asks_to_stop_and_a_second_is_left_to_the_system(number, alone):
    stop = StopSignal()
    assert not stop.on_any_rank(alone)
    signal.raise_signal(number)
    assert stop.on_any_rank(alone)
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert signal.getsignal(each) == signal.SIG_DFL


def test_a_closed_terminal_does_not_stop_what_nohup_has_started(alone):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.on_any_rank(alone)
    signal.raise_signal(signal.SIGTERM)
    assert stop.on_any_rank(alone) and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_no_worker_outlives_its_program(tmp_path):
    workers = []

    def program(settings, device):
        workers.append(multiprocessing.get_context(_start_method()).Process(target=time.sleep, args=(60,)))
        workers[0].start()
        raise UserError("It is wrong.")

    with pytest.raises(SystemExit):
        launch(program, Config(output=str(tmp_path)))
    workers[0].join(10)
    assert workers[0].exitcode == -signal.SIGKILL


def test_the_end_of_torchrun_asks_to_stop_too(alone, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = StopSignal()
    assert not stop.on_any_rank(alone)
    monkeypatch.setattr(os, "getppid", lambda: stop.torchrun + 1)
    assert stop.on_any_rank(alone)


# ---- Numbers


def test_random_numbers_depend_on_their_stream_alone():
    def draw(*stream):
        return torch.rand(3, generator=random_generator(torch.device("cpu"), *stream)).tolist()

    first = draw(0, 1, 2)
    torch.manual_seed(5)
    assert draw(0, 1, 2) == first
    assert len({tuple(draw(*stream)) for stream in ((0, 1, 2), (1, 1, 2), (0, 2, 1), (0, 1, 3), (0, 12))}) == 5


def test_group_metrics_by_hand():
    parts = ((1.0, 0.5, 0.0), (0.0, 0.0, 0.0), (1.0, 0.25, 3.0), (1.0, 0.25, 4.0))
    scores = [{"format": f, "iou": i, "total": f + i, "anchors": a} for f, i, a in parts]  # the last one only logged
    metrics = group_metrics("tvg", scores, G=2)
    assert metrics["tvg/format"] == 0.75 and metrics["tvg/iou"] == 0.25 and metrics["tvg/total"] == 1.0
    assert metrics["tvg/format_std"] == pytest.approx(0.5**0.5 / 2)  # of 1, 0 and of 1, 1
    assert metrics["tvg/total_std"] == pytest.approx(1.5 * 0.5**0.5 / 2)
    assert metrics["zero_spread"] == 0.5 and len(metrics) == 9  # the totals of the second group are equal
    assert group_metrics("tvg", scores[:2] * 2, G=2)["zero_spread"] == 0  # those of none, though all anchors are


def test_metrics_are_averaged_over_those_that_have_them():
    rows = [{"loss": 1.0, "gap_max": 3.0}, {"loss": 2.0, "kl": 0.5}, {"loss": 6.0, "gap_max": 1.0}]
    assert combine(rows) == {"loss": 3.0, "gap_max": 3.0, "kl": 0.5}
    assert combine([]) == {}


def test_the_log_has_a_line_an_iteration_and_is_appended_to(alone, tmp_path):
    config = SimpleNamespace(output=str(tmp_path), log_to=())
    Log(config, "1234", 0, 3).write(0, "tvg", {"tvg/total": 1.5, "lr": 0.1})
    log = Log(config, "1234", 1, 3)
    log.write(1, "sft", {"nll": 0.25})
    log.write(2, "eval", {"mIoU": 20.0})
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"iteration": 0, "task": "tvg", "tvg/total": 1.5, "lr": 0.1}, {"iteration": 1, "task": "sft", "nll": 0.25},
        {"iteration": 2, "task": "eval", "mIoU": 20.0}]
    assert log.bar.n == 2 and log.bar.total == 3 and "sft nll 0.250" in str(log.bar)


# ---- Progress


def test_where_the_output_is_no_terminal_progress_is_whole_lines(capsys):
    assert list(progress(range(3), desc="reading", mininterval=0)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("reading:   0%") and lines[-1].startswith("reading: 100%")
    assert all(line.startswith("reading: ") for line in lines)


def test_a_terminal_is_redrawn_and_a_file_gets_a_line_a_minute(monkeypatch):
    assert progress(range(3)).mininterval == 60
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert progress(range(3)).mininterval < 1


# ---- Every setting's limits


def test_which_options_may_change_when_a_run_or_an_evaluation_goes_on():
    def free(cls):
        return {f.name for f in dataclasses.fields(cls) if f.metadata["free"]}

    both = {"output", "allow_missing_videos", "workers", "micro_batch"}
    assert free(Config) == both | {"accumulation", "save_every", "keep", "log_to", "offload_optimizer"}
    assert free(EvalSettings) == both | {"against"}


def test_which_options_have_no_meaning_beside_others():
    # Nothing is drawn, sampled, rewarded, or held near a reference.
    found = {f.name for f in dataclasses.fields(Config) if f.metadata["unless"] == "demonstrations"}
    assert found == {"annotations", "p", "inversion_reward", "vd_verb_cap", "group_size", "temperature", "kl_coef",
                     "save_rollouts"}
    # And with a video of one's own, which is asked about: it is no row of a file, and nothing is written.
    fields = dataclasses.fields(EvalSettings)
    assert {f.name for f in fields if f.metadata["unless"] == "video"} == {
        "annotations", "videos", "windows", "output", "tasks", "samples", "limit", "against"}
    assert {f.name: f.metadata["needs"] for f in fields if f.metadata["needs"]} == {"video": "query", "query": "video"}


def test_every_number_is_above_zero_or_may_be_zero():
    numbers = [f for cls in (Config, EvalSettings) for f in dataclasses.fields(cls) if f.type in (int, float)]
    above = {f.name for f in numbers if f.metadata["above"] == 0}
    least = {f.name for f in numbers if f.metadata["least"] == 0}
    assert above | least == {f.name for f in numbers} - {"group_size"}  # two or more: one has nothing to compare with
    assert least == {"p", "vd_verb_cap", "clip_epsilon", "kl_coef", "weight_decay", "iterations", "seed",
                     "eval_every", "eval_limit", "workers", "samples", "limit", "save_rollouts", "lora_rank"}


def test_what_is_inherited_is_checked_together_with_what_is_given(capsys):
    sizes = ["--min-frame-pixels", "900000"]  # alone, this would be refused
    inherited = parse_settings(EvalSettings, "", sizes, lambda *_: {"max_frame_pixels": 1_000_000})
    assert inherited.max_frame_pixels == 1_000_000
    with pytest.raises(SystemExit):
        parse_settings(EvalSettings, "", ["--min-frame-pixels", "800"], lambda *_: {"max_frame_pixels": 784})
    assert "--min-frame-pixels 800 is above --max-frame-pixels 784" in capsys.readouterr().err


def as_one_of_two(rank, folder):
    """Rank `rank` of two, on which everything differs, notes what both decide."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    cpu = torch.device("cpu")
    found = {}
    stop = StopSignal()
    stop.is_stopping = rank == 1
    found["stops"] = stop.on_any_rank(cpu)
    found["finite"] = health.finite_on_all_ranks([1.0, math.nan if rank == 1 else 1.0], cpu)
    def fail():
        raise UserError(f"It is wrong on rank {rank}.")

    for name, function in (("together", lambda: together(fail if rank == 1 else lambda: None)),
                           ("on rank 0", lambda: on_rank_0(fail))):
        try:
            function()
        except UserError as error:
            found[name] = str(error)
    found["newest"] = manifest.newest_whole(folder).name
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def test_what_one_of_two_processes_sees_both_decide(tmp_path):
    # The newest checkpoint is damaged in the file that rank 0 reads, the one before it in that of rank 1.
    for number, damaged in ((1, ""), (2, "b"), (3, "a")):
        folder = tmp_path / f"checkpoint-{number:06d}"
        folder.mkdir()
        for name in "ab":
            (folder / name).write_text("whole")
        (folder / "manifest.json").write_text(json.dumps({"files": seal(sorted(folder.iterdir()))}))
        if damaged:
            (folder / damaged).write_text("wrong")  # of the same size
    (tmp_path / "checkpoint-000002.damaged").mkdir()  # an earlier one of that name
    torch.multiprocessing.start_processes(as_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) == {
            "stops": True, "finite": False, "together": "It is wrong on rank 1.", "on rank 0": "It is wrong on rank 0.",
            "newest": "checkpoint-000001"}
    assert {path.name for path in tmp_path.glob("checkpoint*")} == {
        "checkpoint-000001", "checkpoint-000002.damaged", "checkpoint-000003.damaged"}
    assert (tmp_path / "checkpoint-000002.damaged" / "b").read_text() == "wrong"  # it takes the earlier one's place
