"""evaluate.py: metrics by hand, the paired bootstrap, and evaluations that are interrupted, repeated and compared."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from shared import measure, reply, scripted, write_lines, write_video

import data
import engine.program.lookup
import evaluate
import rewards
from engine.program.launch import launch
from engine.program.lookup import is_ours
from engine.program.settings import UserError, parse_settings
from engine.run import predictions
from engine.run.start import from_start


def prediction(row, task="tvg", video="a.mp4", iou=0.0, value=0.0, span=(0.0, 1.0), format=1.0, verbs=1.0, **more):
    parts = {"format": format, "iou": iou} | more if task == "tvg" else {"format": format, task: value}
    if task == "vd":
        parts["vd_verbs"] = verbs
    return {"row": row, "task": task, "sample": 0, "video": video, "query": f"query {row}", "parts": parts,
            "span": span if task == "tvg" else None, "error": None}


def test_grounding_metrics_by_hand():
    metrics = evaluate.grounding_metrics([0.0, 0.3, 0.5, 0.7, 1.0])
    # IoU >= m: a row at the threshold counts, as in the released code
    assert metrics == {"R1@0.3": 80.0, "R1@0.5": 60.0, "R1@0.7": 40.0, "mIoU": 50.0}


def test_no_rows_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="no row"):
        evaluate.grounding_metrics([])


def test_summary_by_hand():
    metrics = evaluate.summarize([
        prediction(0, iou=0.6), prediction(1, iou=0.0, span=None, format=0.0), prediction(2, iou=0.0, span=(5.0, 2.0)),
        prediction(3, iou=0.0, span=(3.0, 3.0), format=0.0), prediction(0, "vc", value=1.0),
        prediction(1, "vc", value=0.0), prediction(2, "vd", value=1.0, verbs=3.0)])
    assert metrics["mIoU"] == pytest.approx(15.0) and metrics["R1@0.5"] == 25.0
    assert metrics["format"] == 50.0 and metrics["VC"] == 50.0 and metrics["VD verbs"] == 3.0
    assert metrics["rows"] == {"tvg": 4, "vc": 2, "vd": 1}
    assert metrics["without a span"] == 1 and metrics["reversed spans"] == 1  # an empty one is none of the two


def test_bootstrap_interval_of_a_constant_difference_is_that_difference():
    theirs = [prediction(i, video=f"{i % 5}", iou=0.2 + 0.01 * i) for i in range(20)]
    ours = [prediction(i, video=f"{i % 5}", iou=0.25 + 0.01 * i) for i in range(20)]
    a, b, low, high = evaluate.compare_models(ours, theirs)["mIoU"]
    assert a - b == pytest.approx(5) and low == pytest.approx(5) and high == pytest.approx(5)


def test_bootstrap_matches_the_normal_interval_over_videos():
    # 400 videos of one row each, differences of standard deviation 20 points: half width 1.96 * 20 / sqrt(400) = 1.96
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 0.2, 400)
    theirs = [prediction(i, video=str(i), iou=0.5) for i in range(400)]
    ours = [prediction(i, video=str(i), iou=0.5 + d) for i, d in enumerate(difference)]
    a, b, low, high = evaluate.compare_models(ours, theirs)["mIoU"]
    assert high - low == pytest.approx(2 * 1.96, rel=0.1) and low < a - b < high


def test_different_rows_are_not_compared():
    with pytest.raises(UserError, match="same rows"):
        evaluate.compare_models([prediction(0)], [prediction(1)])
    with pytest.raises(UserError, match="same rows"):
        evaluate.compare_models([prediction(0)], [prediction(0) | {"query": "another"}])


def test_limit_spaces_rows_evenly():
    assert evaluate.evenly_spaced(10, 4) == [0, 2, 5, 7]
    assert evaluate.evenly_spaced(3, 0) == evaluate.evenly_spaced(3, 9) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ whole evaluations


@pytest.fixture()
def settings(tmp_path, checkpoint):
    """Three rows on two videos, one without a verb."""
    (tmp_path / "videos").mkdir()
    for name in ("AAA", "BBB"):
        write_video(tmp_path / "videos" / f"{name}.mp4", [i / 5 for i in range(20)])
    (tmp_path / "test.txt").write_text("AAA 0.5 2.0##person opens the door.\nAAA 2.0 1.0##a red lamp.\n"
                                       "BBB 1.0 9.0##a person is sitting down.\n")
    return evaluate.EvalSettings(
        model=str(checkpoint), annotations=str(tmp_path / "test.txt"), videos=str(tmp_path / "videos"),
        output=str(tmp_path / "out"), max_new_tokens=5, workers=0, micro_batch=2)


def lines(settings):
    return [json.loads(line) for path in sorted((Path(settings.output)).glob("predictions*"))
            for line in path.read_text().splitlines() if line]


def test_every_row_is_measured_on_grounding_and_those_with_verbs_on_inversions(settings, capsys, monkeypatch):
    with pytest.raises(SystemExit):  # a failed start does not claim the output folder
        launch(evaluate.main, dataclasses.replace(settings, model="no/such-model"))
    said = capsys.readouterr().err
    assert "no/such-model" in said and said.count("\n") == 1
    launch(evaluate.main, settings)
    predictions = lines(settings)
    assert sorted((p["task"], p["row"]) for p in predictions) == [
        (task, row) for task in ("ar", "tvg", "vc", "vd") for row in range(3) if task == "tvg" or row != 1]
    metrics = json.loads((Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"] == {"tvg": 3, "vc": 2, "ar": 2, "vd": 2}
    assert "mIoU" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "load_model", None)  # a finished evaluation needs none
    launch(evaluate.main, settings)
    with pytest.raises(SystemExit):  # and one of other settings is not mixed in
        launch(evaluate.main, dataclasses.replace(settings, fps=1.0))
    assert "another --fps" in capsys.readouterr().err


def test_interrupted_evaluation_goes_on_and_ends_the_same(settings, monkeypatch):
    launch(evaluate.main, settings)
    path = Path(settings.output) / "predictions.0.jsonl"
    whole = path.read_text()
    kept = whole.splitlines(keepends=True)
    path.write_text("".join(kept[:4]) + kept[4][:30])  # as a kill in the middle of a line leaves it
    done = []
    answer = evaluate.answer

    def spy(model, processor, samples, items, settings, completions):
        done.extend((item.index, item.task) for item in items)
        return answer(model, processor, samples, items, settings, completions)

    monkeypatch.setattr(evaluate, "answer", spy)
    launch(evaluate.main, settings)
    assert len(done) == len(kept) - 4
    expected = sorted(map(json.loads, kept), key=lambda p: (p["row"], p["task"]))
    assert evaluate.read_predictions(settings.output) == expected


def test_samples_are_k_draws_of_each_row_the_same_each_time(settings):
    settings = dataclasses.replace(settings, samples=3, tasks=("tvg",))
    launch(evaluate.main, settings)
    launch(evaluate.main, dataclasses.replace(settings, output=settings.output + "-again"))
    first = lines(settings)
    assert sorted((p["row"], p["sample"]) for p in first) == [(row, k) for row in range(3) for k in range(3)]
    assert len({p["completion"] for p in first}) == 9  # a random model's draws differ
    assert first == lines(dataclasses.replace(settings, output=settings.output + "-again"))
    metrics = json.loads((Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"] == {"tvg": 9}
    kept = evaluate.read_predictions(settings.output)
    path = Path(settings.output) / "predictions.0.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in kept[:4]))  # row 1 has one of three
    launch(evaluate.main, settings)
    assert len(evaluate.read_predictions(settings.output)) == 9


def test_spans_are_read_where_the_reward_asks_for_them(settings, monkeypatch):
    completion = "<think>a</think> <time>[0.5, 2]</time> <answer>1 to 1.5</answer>"
    monkeypatch.setattr(evaluate, "answer", lambda model, processor, samples, items, *_: [[completion] for _ in items])
    for name, span, iou in (("papers.rewards.tvg_r1", [0.5, 2.0], 1.0), ("iou", [1.0, 1.5], 1 / 3)):
        changed = dataclasses.replace(settings, tvg_reward=name, tasks=("tvg",), output=settings.output + name)
        launch(evaluate.main, changed)
        first = lines(changed)[0]
        assert (first["span"], first["parts"]["iou"], first["truth"]) == (span, iou, [0.5, 2.0])


def test_how_many_prompts_run_together_matters_to_samples_alone(settings, capsys):
    launch(evaluate.main, dataclasses.replace(settings, tasks=("tvg",)))
    launch(evaluate.main, dataclasses.replace(settings, tasks=("tvg",), micro_batch=3, workers=1))
    settings = dataclasses.replace(settings, tasks=("tvg",), samples=2, output=settings.output + "-sampled")
    launch(evaluate.main, settings)
    with pytest.raises(SystemExit):
        launch(evaluate.main, dataclasses.replace(settings, micro_batch=3))
    assert "another --micro-batch;" in capsys.readouterr().err


def test_unreadable_video_scores_zero_and_is_listed(settings, capsys):
    mended = (Path(settings.videos) / "AAA.mp4").read_bytes()
    (Path(settings.videos) / "BBB.mp4").write_bytes(bytes(len(mended)))  # as many bytes: they do not tell them apart
    launch(evaluate.main, settings)
    metrics = json.loads((Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"]["tvg"] == 3 and len(metrics["unreadable"]) == 1 and "BBB.mp4" in metrics["unreadable"][0]
    assert "BBB.mp4" in capsys.readouterr().out
    (Path(settings.videos) / "BBB.mp4").write_bytes(mended)
    launch(evaluate.main, settings)
    assert not any(p["error"] for p in evaluate.read_predictions(settings.output))
    write_lines(Path(settings.output) / "predictions.1.jsonl", [lines(settings)[0] | {"error": "a disk that was away"}])
    assert not any(p["error"] for p in evaluate.read_predictions(settings.output))  # what was read once counts
    assert json.loads((Path(settings.output) / "metrics.json").read_text())["unreadable"] == []


def test_a_prediction_is_of_its_row_while_video_query_and_times_are_the_same(tmp_path):
    sample = data.Sample(str(tmp_path / "a.mp4"), "q", 0.0, 1.0, excerpt=(2.0, 6.0), alternatives=((2.0, 3.0),))
    Path(sample.video).write_bytes(b"a video")
    noted = {"row": 0} | json.loads(json.dumps(predictions.identity(sample)))
    (tmp_path / "moved").mkdir()
    moved = dataclasses.replace(sample, video=shutil.copy(sample.video, tmp_path / "moved"))
    assert predictions.is_current(noted, [sample]) and predictions.is_current(noted, [moved])
    for change in ({"query": "p"}, {"start": 0.5}, {"end": 2.0}, {"excerpt": (2.0, 7.0)}, {"alternatives": ()}):
        assert not predictions.is_current(noted, [dataclasses.replace(sample, **change)]), change
    assert not predictions.is_current(noted | {"row": 1}, [sample])
    Path(moved.video).write_bytes(b"another video")
    assert not predictions.is_current(noted, [moved])


def test_metrics_of_a_part_do_not_pass_for_those_of_all(settings, monkeypatch, capsys):
    answer = evaluate.answer

    def growing(model, processor, samples, items, *arguments):
        if (2, "tvg") in [(item.index, item.task) for item in items]:
            with open(f"{settings.videos}/AAA.mp4", "ab") as video:  # its copying was not finished
                video.write(b"more")
        return answer(model, processor, samples, items, *arguments)

    monkeypatch.setattr(evaluate, "answer", growing)
    with pytest.raises(SystemExit):
        measure(settings, tasks=("tvg",))
    assert "1 videos have changed since they were predicted" in capsys.readouterr().err  # the shorter file's rows
    monkeypatch.undo()
    assert measure(settings, tasks=("tvg",))["rows"] == {"tvg": 3}


def test_an_evaluation_that_measures_nothing_is_refused(settings, capsys):
    Path(settings.annotations).write_text("AAA 0 2##a red lamp.\nBBB 0 2##öffnet die tür\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        measure(settings, tasks=("vc", "ar"))
    assert "none of its 2 queries suits --tasks vc ar (an inversion needs" in capsys.readouterr().err
    assert measure(settings, tasks=("vc", "tvg"))["rows"] == {"tvg": 2}


def test_rows_that_start_after_their_video_count_and_are_named(settings, capsys):
    rows = "AAA 0.0 5.0##a red lamp.\nBBB 5.0 9.0##a person is sitting down.\n"  # of 4 s; the first only ends late
    Path(settings.annotations).write_text(rows, encoding="utf-8")
    with scripted(reply("0 to 5")):
        metrics = measure(settings, max_new_tokens=60)
    assert metrics["rows"]["tvg"] == 2 and metrics["mIoU"] == 50.0 and metrics["format"] == 100.0
    video = Path(settings.videos) / "BBB.mp4"
    assert metrics["start after their video"] == [f"{video}: row 1 starts at 5 of 4 s"]
    assert metrics["unreadable"] == [f"{video}: the segment starts at 5 s, after the video's end at 4 s."]  # VC, AR, VD
    assert "start after their video: ['" in capsys.readouterr().out


def test_predictions_of_a_model_trained_anew_are_not_mixed_in(settings, tmp_path, capsys):
    settings = dataclasses.replace(settings, model=str(shutil.copytree(settings.model, tmp_path / "model")))
    launch(evaluate.main, settings)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(SystemExit):
        launch(evaluate.main, settings)
    assert "another --model" in capsys.readouterr().err


def test_missing_videos_are_an_error_unless_allowed(settings, capsys):
    (Path(settings.videos) / "BBB.mp4").unlink()
    with pytest.raises(SystemExit):
        launch(evaluate.main, settings)
    assert "1 of 2 videos are missing" in capsys.readouterr().err
    launch(evaluate.main, dataclasses.replace(settings, allow_missing_videos=True))
    assert json.loads((Path(settings.output) / "metrics.json").read_text())["rows"]["tvg"] == 3


def test_against_prints_both_and_the_interval(settings, capsys, monkeypatch):
    mine = SimpleNamespace(ends=rewards.IOU._replace(metrics=lambda parts: {"a column": 50.0}))
    monkeypatch.setitem(sys.modules, "mine", mine)
    settings = dataclasses.replace(settings, tvg_reward="mine.ends", tasks=("tvg", "vc"))
    other = dataclasses.replace(settings, output=settings.output + "-other")
    launch(evaluate.main, other)
    launch(evaluate.main, dataclasses.replace(settings, against=other.output))
    table = capsys.readouterr().out.split("difference")[1]
    assert "mIoU" in table and "VC" in table and "+0.0" in table and "a column" in table
    file = Path(settings.annotations)
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[:2]), encoding="utf-8")  # what both hold of a row that is gone does not count
    launch(evaluate.main, dataclasses.replace(settings, against=other.output))
    file.write_text("".join([*rows[:2], "BBB 1.0 3.0##a person is sitting down.\n"]), encoding="utf-8")
    with pytest.raises(SystemExit):  # nor what the other measured by other times
        launch(evaluate.main, dataclasses.replace(settings, against=other.output))
    assert "do not hold the same rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        launch(evaluate.main, dataclasses.replace(settings, against=settings.output + "-nothing"))
    assert "-nothing: holds no predictions" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ QVHighlights


@pytest.fixture()
def highlights(settings, tmp_path):
    """Two queries, the second with two relevant windows."""
    rows = [{"qid": 1, "query": "person runs.", "vid": "AAA", "duration": 5, "relevant_windows": [[0, 4]]},
            {"qid": 2, "query": "person sits.", "vid": "BBB", "duration": 5, "relevant_windows": [[0, 1], [2, 4]]}]
    path = write_lines(tmp_path / "highlights.jsonl", rows)
    return dataclasses.replace(settings, annotations=path, tasks=("tvg",), max_new_tokens=60)


@pytest.mark.parametrize("windows, ious", [  # of 1 to 4, with 0 to 4; with 0 to 1 and 2 to 4
    ({}, [3 / 4, 2 / 3]), ({"windows": "each"}, [3 / 4, 0, 2 / 3]), ({"windows": "single"}, [3 / 4])])
def test_a_query_of_qvhighlights_is_a_row_whose_best_window_counts(highlights, windows, ious):
    with scripted(reply("1 to 4")):
        metrics = measure(highlights, **windows)
    assert metrics["mIoU"] == pytest.approx(100 * np.mean(ious)) and metrics["rows"] == {"tvg": len(ious)}


def test_a_prediction_notes_all_windows_and_is_made_again_when_one_has_changed(highlights):
    with scripted(reply("2 to 4")) as calls:
        measure(highlights)
        measure(highlights)
        assert [len(call.prompts) for call in calls] == [2]
        noted = lines(highlights)[1]
        assert (noted["truth"], noted["alternatives"], noted["parts"]["iou"]) == ([0, 1], [[2, 4]], 1)
        path = Path(highlights.annotations)
        path.write_text(path.read_text(encoding="utf-8").replace("[2, 4]", "[3, 4]"), encoding="utf-8")
        metrics = measure(highlights)
    assert [len(call.prompts) for call in calls] == [2, 1]
    assert metrics["mIoU"] == pytest.approx(50)  # 2 to 4 against 0 to 4, and against 3 to 4


# ------------------------------------------------------------------------------------------------ one's own video

def test_a_video_of_ones_own_is_searched_as_the_checkpoint_was_trained(settings, trained, capsys):
    note(trained, max_new_tokens=60, inversion_tasks=["mine.lamps"])  # which nothing here asks for
    video = Path(settings.videos) / "AAA.mp4"  # four seconds
    argv = ["--model", str(trained), "--video", str(video), "--query", "Person runs.", "a red lamp"]
    found = parse_settings(evaluate.EvalSettings, "", argv, from_start)
    with scripted(reply("1 to 2.5")) as calls:
        launch(evaluate.main, found)
    assert len(calls) == 2 and all(call.temperature == 0 for call in calls)
    (first,) = calls[0].questions()
    assert 'the event "person runs" in the video' in first and "<think>" not in first  # as in training
    printed = capsys.readouterr().out
    assert "4 frames of" in printed and "1 a second" in printed
    assert "these seconds:\n0.00, 1.00, 2.00, 3.00\n" in printed
    assert f"person runs: 1 to 2.5 s\n{reply('1 to 2.5')}" in printed
    assert not Path(found.output).exists()


def test_a_video_that_cannot_be_read_is_one_sentence(settings, capsys):
    with pytest.raises(SystemExit):
        launch(evaluate.main, dataclasses.replace(settings, video="none.mp4", query=("person runs",)))
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "none.mp4" in message


# ------------------------------------------------------------------------------------------------ settings


@pytest.fixture()
def trained(settings, tmp_path, checkpoint):
    """The output folder of a run that saw videos in its own way and answered without thinking."""
    config = dataclasses.asdict(settings) | {"fps": 1.0, "max_new_tokens": 40, "tvg_format": "answer",
                                             "reward_weights": ["anchor_weight=0"], "vd_match": "any"}
    folder = Path(shutil.copytree(checkpoint, tmp_path / "run" / "checkpoint-000002"))
    (folder / "run.json").write_text(json.dumps({"iteration": 2, "iterations": 2, "prompts": 2, "config": config}))
    return folder.parent


def test_what_a_checkpoint_was_trained_with_holds_where_the_command_line_is_silent(trained, capsys):
    def parse(*argv):
        return parse_settings(evaluate.EvalSettings, "", ["--model", str(trained), *argv], from_start)

    settings = parse()
    assert (settings.fps, settings.max_new_tokens, settings.tvg_format) == (1.0, 40, "answer")
    assert settings.vd_match == "all" and settings.micro_batch == 1  # how to measure is evaluation's own
    printed = capsys.readouterr().out
    assert "--fps 1.0" in printed and "--max-new-tokens 40" in printed and "--inversion-format" not in printed
    assert parse("--fps", "2.0").fps == 2.0  # the default, but said
    assert parse("--max-new-tokens", "7").max_new_tokens == 7
    with pytest.raises(SystemExit):  # a model that is not there is said before anything else
        parse("--model", str(trained / "none"))
    assert "run/none: there is no such folder" in capsys.readouterr().err


def test_anchors_are_measured_where_they_were_trained(settings, trained):
    note(trained, tvg_reward="papers.rewards.anchors", tvg_format="think")
    argv = ["--model", str(trained), "--annotations", settings.annotations, "--videos", settings.videos, "--output",
            settings.output, "--tasks", "tvg", "--workers", "0", "--max-new-tokens", "5"]
    launch(evaluate.main, parse_settings(evaluate.EvalSettings, "", argv, from_start))
    metrics = json.loads((Path(settings.output) / "metrics.json").read_text())
    assert metrics["2-4 anchors"] == 0 and "anchor gain" not in metrics  # a random model writes none
    assert set(lines(settings)[0]["parts"]) >= {"iou", "soft_iou", "anchors", "anchor_gain"}


# ---------------------------------------------------------------------------------------------- slips that once passed


def test_a_video_with_more_rows_weighs_more():
    # One row of the first video gains 10 points, three of the second nothing. Drawing both, the mean gain is 10 / 4;
    # the first twice, 10; the second twice, 0. Each of these two comes in a quarter of the draws.
    theirs = [prediction(i, video="one" if i == 0 else "three", iou=0.5) for i in range(4)]
    ours = [prediction(0, video="one", iou=0.6), *theirs[1:]]
    a, b, low, high = evaluate.compare_models(ours, theirs)["mIoU"]
    assert a - b == pytest.approx(2.5)
    assert (low, high) == (pytest.approx(0), pytest.approx(10))


def test_each_completion_is_written_under_its_own_row_also_beside_an_unreadable_video(settings):
    rows = "AAA 0 2##person runs.\nBBB 0 2##person sits.\nAAA 2 4##person eats.\n"
    Path(settings.annotations).write_text(rows, encoding="utf-8")
    (Path(settings.videos) / "BBB.mp4").write_bytes(b"no video")
    with scripted(*(reply(f"{n} to 4") for n in range(4))):
        measure(settings, samples=2, tasks=("tvg",), micro_batch=3, max_new_tokens=60)
    found = [(p["row"], p["sample"], p["span"], p["parts"]["iou"]) for p in lines(settings)]
    assert found == [(0, 0, [0, 4], 0.5), (0, 1, [1, 4], 0.25), (1, 0, None, 0), (1, 1, None, 0),
                     (2, 0, [2, 4], 1), (2, 1, [3, 4], 0.5)]


def test_a_batch_may_hold_two_tasks_of_one_row_and_takes_one_worker_of_three(settings, monkeypatch):
    asked, read_ahead = [], evaluate.read_ahead
    monkeypatch.setattr(evaluate, "read_ahead", lambda clips, batches, *rest: (
        asked.append(rest) or read_ahead(clips, batches, 0)))
    texts = [reply(text) for text in ("opens", "sitting", "person opens it", "a person sits")]
    with scripted(*texts):
        measure(settings, tasks=("ar", "vd"), micro_batch=4, max_new_tokens=60, workers=3)
    assert asked == [(1,)]
    found = [(p["row"], p["task"], p["completion"]) for p in lines(settings)]
    assert found == [(0, "ar", texts[0]), (2, "ar", texts[1]), (0, "vd", texts[2]), (2, "vd", texts[3])]


def test_a_new_inversion_is_measured_on_the_rows_that_suit_it(settings, monkeypatch):
    lamps = rewards.Inversion("Complete '{masked_query}'.", "provide a word,",
                              lambda answer, query, scoring: answer == "red", suits=lambda query: "lamp" in query,
                              mask=lambda query: (query.replace("red", "[]"), ("red",)), logged={"letters": len})
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(lamps=lamps))
    with scripted(reply("red")) as calls:
        metrics = measure(settings, tasks=("vc", "mine.lamps"), max_new_tokens=60)
    assert [(p["row"], p["task"]) for p in lines(settings)] == [(0, "vc"), (2, "vc"), (1, "mine.lamps")]
    assert "Complete 'a [] lamp'." in calls[-1].questions()[-1]
    assert list(metrics)[:4] == ["VC", "mine.lamps", "mine.lamps letters", "rows"]
    assert (metrics["mine.lamps"], metrics["mine.lamps letters"]) == (100, 3)
    assert evaluate.compare_models(lines(settings), lines(settings))["mine.lamps letters"] == (3, 3, 0, 0)


def note(trained, **options):
    """Let the checkpoint's run have been trained with other options."""
    record = trained / "checkpoint-000002" / "run.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    record.write_text(json.dumps(state | {"config": state["config"] | options}), encoding="utf-8")


@pytest.mark.parametrize("noted, given, wanted", [
    ({"tvg_reward": "mine.ends"}, [], "names mine.ends, which is not of this repository"),
    ({"tvg_reward": "mine.ends"}, ["--tasks", "tvg"], "if you trust it, give --tvg-reward mine.ends;"),
    ({"tvg_reward": "iou", "inversion_tasks": ["ar", "mine.lamps"]}, [], "give --tasks tvg vc ar vd mine.lamps;")])
def test_a_checkpoint_does_not_decide_what_is_imported(trained, monkeypatch, capsys, noted, given, wanted):
    note(trained, **noted)
    argv = ["--model", str(trained), *given]
    with pytest.raises(SystemExit):
        parse_settings(evaluate.EvalSettings, "", argv, from_start)
    said = capsys.readouterr().err
    assert wanted in said and said.count("\n") == 1 and "mine" not in sys.modules
    lamps = rewards.INVERSIONS["vc"]
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(ends=rewards.IOU, lamps=lamps))
    argv += ["--tvg-reward", noted["tvg_reward"], "--tasks", "tvg", "mine.lamps"]  # the command line decides
    assert parse_settings(evaluate.EvalSettings, "", argv, from_start).tasks == ("tvg", "mine.lamps")


def test_a_checkpoint_inside_the_repository_brings_no_module_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.program.lookup, "ROOT", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "__init__.py").touch()
    (tmp_path / "room" / "file.py").touch()
    assert is_ours("room.file.name", tmp_path / "runs" / "run.json")
    assert not is_ours("room.file.name", tmp_path / "room" / "checkpoint" / "run.json")
    assert not is_ours("room.none.name", tmp_path / "run.json") and not is_ours("os.path.join", tmp_path / "run.json")


@pytest.mark.parametrize("then, today", [("iou", "iou"), ("anchors", "papers.rewards.anchors"),
                                         ("timestamp_iou", "papers.rewards.timestamp_iou")])
def test_a_reward_of_an_earlier_version_is_read(trained, then, today):
    note(trained, tvg_reward=then, reward_weights=[])
    assert from_start(evaluate.EvalSettings(model=str(trained)))["tvg_reward"] == today


def test_rows_that_are_alike_are_sampled_with_noise_of_their_own(settings):
    Path(settings.annotations).write_text("AAA 0 2##person runs.\n" * 2, encoding="utf-8")
    measure(settings, samples=2, tasks=("tvg",), micro_batch=1)
    assert len({p["completion"] for p in lines(settings)}) == 2 * 2


def test_all_that_shapes_what_a_model_sees_and_writes_comes_from_its_checkpoint(trained):
    used_to = {"fps": 1.0, "max_pixels": 400_000, "min_frame_pixels": 784, "max_frame_pixels": 50_176,
               "max_new_tokens": 40, "inversion_format": "answer", "tvg_format": "answer",
               "tvg_reward": "papers.rewards.timestamp_iou"}
    note(trained, **used_to)
    assert from_start(evaluate.EvalSettings(model=str(trained))) == used_to


def test_time_r1s_reward_asks_an_evaluation_for_no_duration(settings):
    with scripted(reply("0.5 to 2")):
        metrics = measure(settings, tvg_reward="papers.rewards.timestamp_iou", max_new_tokens=60)
    assert metrics["mIoU"] == pytest.approx(100 * (1 + 0 + 1 / 8.5) / 3)  # 0.5 to 2, 2 to 1, which is empty, and 1 to 9
    assert metrics["format"] == 100
