"""Metrics by hand, the paired bootstrap, and evaluations that are interrupted, repeated and compared."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

import data
import evaluate
import runtime
from conftest import measure, reply, scripted, write_video


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
        prediction(0, "vc", value=1.0), prediction(1, "vc", value=0.0), prediction(2, "vd", value=1.0, verbs=3.0)])
    assert metrics["mIoU"] == pytest.approx(20.0) and metrics["R1@0.5"] == pytest.approx(100 / 3)
    assert metrics["format"] == pytest.approx(200 / 3) and metrics["VC"] == 50.0 and metrics["VD verbs"] == 3.0
    assert metrics["rows"] == {"tvg": 3, "vc": 2, "vd": 1}
    assert metrics["without a span"] == 1 and metrics["reversed spans"] == 1


def test_anchors_are_summarized_by_hand():
    metrics = evaluate.summarize([prediction(0, anchors=0.0, anchor_gain=0.0), prediction(1, anchors=2.0, anchor_gain=0.3),
                                  prediction(2, anchors=4.0, anchor_gain=0.1), prediction(3, anchors=5.0, anchor_gain=-0.1)])
    assert metrics["2-4 anchors"] == 50.0
    assert metrics["anchor gain"] == pytest.approx(10.0)  # over the three answers that have anchors


def test_bootstrap_interval_of_a_constant_difference_is_that_difference():
    theirs = [prediction(i, video=f"{i % 5}", iou=0.2 + 0.01 * i) for i in range(20)]
    ours = [prediction(i, video=f"{i % 5}", iou=0.25 + 0.01 * i) for i in range(20)]
    a, b, low, high = evaluate.paired_bootstrap(ours, theirs)["mIoU"]
    assert a - b == pytest.approx(5) and low == pytest.approx(5) and high == pytest.approx(5)


def test_bootstrap_matches_the_normal_interval_over_videos():
    # 400 videos of one row each, differences of standard deviation 20 points: half width 1.96 * 20 / sqrt(400) = 1.96
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 0.2, 400)
    theirs = [prediction(i, video=str(i), iou=0.5) for i in range(400)]
    ours = [prediction(i, video=str(i), iou=0.5 + d) for i, d in enumerate(difference)]
    a, b, low, high = evaluate.paired_bootstrap(ours, theirs)["mIoU"]
    assert high - low == pytest.approx(2 * 1.96, rel=0.1) and low < a - b < high


def test_rows_of_one_video_are_no_independent_evidence():
    # The same 400 rows from 4 videos, each video's rows alike: the interval must be about ten times wider.
    theirs = [prediction(i, video=str(i % 4), iou=0.5) for i in range(400)]
    ours = [prediction(i, video=str(i % 4), iou=0.5 + 0.1 * (i % 4)) for i in range(400)]
    _, _, low, high = evaluate.paired_bootstrap(ours, theirs)["mIoU"]
    assert high - low > 15  # of the 400 rows taken alone: 4.4


def test_a_video_with_more_rows_weighs_more():
    # One row of the first video gains 10 points, three of the second nothing. Drawing both, the mean gain is 10 / 4;
    # the first twice, 10; the second twice, 0. Each of these two comes in a quarter of the draws.
    theirs = [prediction(i, video="one" if i == 0 else "three", iou=0.5) for i in range(4)]
    ours = [prediction(0, video="one", iou=0.6), *theirs[1:]]
    a, b, low, high = evaluate.paired_bootstrap(ours, theirs)["mIoU"]
    assert a - b == pytest.approx(2.5)
    assert (low, high) == (pytest.approx(0), pytest.approx(10))


def test_different_rows_are_not_compared():
    with pytest.raises(runtime.UserError, match="same rows"):
        evaluate.paired_bootstrap([prediction(0)], [prediction(1)])


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
    return [json.loads(line) for path in sorted((data.Path(settings.output)).glob("predictions*"))
            for line in path.read_text().splitlines() if line]


def test_every_row_is_measured_on_grounding_and_those_with_verbs_on_inversions(settings, capsys):
    runtime.run(evaluate.main, settings)
    predictions = lines(settings)
    assert sorted((p["task"], p["row"]) for p in predictions) == [
        (task, row) for task in ("ar", "tvg", "vc", "vd") for row in range(3) if task == "tvg" or row != 1]
    metrics = json.loads((data.Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"] == {"tvg": 3, "vc": 2, "ar": 2, "vd": 2}
    assert "mIoU" in capsys.readouterr().out


def test_interrupted_evaluation_goes_on_and_ends_the_same(settings, monkeypatch):
    runtime.run(evaluate.main, settings)
    path = data.Path(settings.output) / "predictions.0.jsonl"
    whole = path.read_text()
    kept = whole.splitlines(keepends=True)
    path.write_text("".join(kept[:4]) + kept[4][:30])  # as a kill in the middle of a line leaves it
    done = []
    monkeypatch.setattr(evaluate, "answers", lambda m, p, s, items, c, k, f=evaluate.answers: (
        done.extend((i.index, i.task) for i in items), f(m, p, s, items, c, k))[1])
    runtime.run(evaluate.main, settings)
    key = lambda p: (p["row"], p["task"])  # noqa: E731
    assert len(done) == len(kept) - 4
    assert evaluate.read_predictions(settings.output) == sorted(map(json.loads, kept), key=key)


def test_samples_are_k_draws_of_each_row_the_same_each_time(settings):
    settings = dataclasses.replace(settings, samples=3, tasks=("tvg",))
    runtime.run(evaluate.main, settings)
    runtime.run(evaluate.main, dataclasses.replace(settings, output=settings.output + "-again"))
    first = lines(settings)
    assert sorted((p["row"], p["sample"]) for p in first) == [(row, k) for row in range(3) for k in range(3)]
    assert len({p["completion"] for p in first}) == 9  # a random model's draws differ
    assert first == lines(dataclasses.replace(settings, output=settings.output + "-again"))
    metrics = json.loads((data.Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"] == {"tvg": 9}
    kept = evaluate.read_predictions(settings.output)
    path = data.Path(settings.output) / "predictions.0.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in kept[:4]))  # row 1 has one of three
    runtime.run(evaluate.main, settings)
    assert len(evaluate.read_predictions(settings.output)) == 9


def test_each_completion_is_written_under_its_own_row_also_beside_an_unreadable_video(settings):
    rows = "AAA 0 2##person runs.\nBBB 0 2##person sits.\nAAA 2 4##person eats.\n"
    data.Path(settings.annotations).write_text(rows)
    (data.Path(settings.videos) / "BBB.mp4").write_bytes(b"no video")
    with scripted(*(reply(f"{n} to 4") for n in range(4))):
        measure(settings, samples=2, tasks=("tvg",), micro_batch=3, max_new_tokens=60)
    found = [(p["row"], p["sample"], p["span"], p["parts"]["iou"]) for p in lines(settings)]
    assert found == [(0, 0, [0, 4], 0.5), (0, 1, [1, 4], 0.25), (1, 0, None, 0), (1, 1, None, 0),
                     (2, 0, [2, 4], 1), (2, 1, [3, 4], 0.5)]


def test_time_r1s_reward_is_no_metric_and_asks_an_evaluation_for_no_duration(settings):
    with scripted(reply("0.5 to 2")):
        metrics = measure(settings, tvg_reward="timestamp_iou", max_new_tokens=60)
    assert metrics["mIoU"] == pytest.approx(100 * (1 + 0 + 1 / 8.5) / 3)  # 0.5 to 2, 2 to 1, which is empty, and 1 to 9
    assert metrics["format"] == 100


def test_finished_evaluation_loads_no_model(settings, monkeypatch):
    runtime.run(evaluate.main, settings)
    monkeypatch.setattr(runtime, "load_model", None)
    runtime.run(evaluate.main, settings)


def test_predictions_of_other_settings_are_not_mixed_in(settings, capsys):
    runtime.run(evaluate.main, settings)
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, dataclasses.replace(settings, fps=1.0))
    assert "another --fps" in capsys.readouterr().err


def test_a_failed_start_does_not_claim_the_output_folder(settings):
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, dataclasses.replace(settings, model="no/such-model"))
    runtime.run(evaluate.main, settings)
    assert len(lines(settings)) == 9


def test_unreadable_video_scores_zero_and_is_listed(settings, capsys):
    (data.Path(settings.videos) / "BBB.mp4").write_bytes(b"no video")
    runtime.run(evaluate.main, settings)
    metrics = json.loads((data.Path(settings.output) / "metrics.json").read_text())
    assert metrics["rows"]["tvg"] == 3 and len(metrics["unreadable"]) == 1 and "BBB.mp4" in metrics["unreadable"][0]
    assert "BBB.mp4" in capsys.readouterr().out
    shutil.copy(data.Path(settings.videos) / "AAA.mp4", data.Path(settings.videos) / "BBB.mp4")  # mended
    runtime.run(evaluate.main, settings)
    assert not any(p["error"] for p in evaluate.read_predictions(settings.output))
    assert json.loads((data.Path(settings.output) / "metrics.json").read_text())["unreadable"] == []


def test_predictions_of_a_model_trained_anew_are_not_mixed_in(settings, tmp_path, capsys):
    settings = dataclasses.replace(settings, model=str(shutil.copytree(settings.model, tmp_path / "model")))
    runtime.run(evaluate.main, settings)
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    os.utime(weights, (0, 0))
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, settings)
    assert "another --model" in capsys.readouterr().err


def test_missing_videos_are_an_error_unless_allowed(settings, capsys):
    (data.Path(settings.videos) / "BBB.mp4").unlink()
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, settings)
    assert "1 of 2 videos are missing" in capsys.readouterr().err
    runtime.run(evaluate.main, dataclasses.replace(settings, allow_missing_videos=True))
    assert json.loads((data.Path(settings.output) / "metrics.json").read_text())["rows"]["tvg"] == 3


def test_against_prints_both_and_the_interval(settings, capsys):
    other = dataclasses.replace(settings, output=settings.output + "-other")
    runtime.run(evaluate.main, other)
    runtime.run(evaluate.main, dataclasses.replace(settings, against=other.output))
    table = capsys.readouterr().out.split("difference")[1]
    assert "mIoU" in table and "VC" in table and "+0.0" in table
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, dataclasses.replace(settings, against=settings.output + "-nothing"))
    assert "-nothing: holds no predictions" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_sentence(settings, capsys):
    with pytest.raises(SystemExit):
        runtime.run(evaluate.main, dataclasses.replace(settings, model="no/such-model"))
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no/such-model" in message
