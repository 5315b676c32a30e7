"""The page about a run: its numbers by hand, what it says of a run that is going, and that it needs no network."""

import base64
import io
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from shared import make_config, reply, scripted, train, write_lines, write_video

import rewards
from engine.model.loading import fingerprint, newest_checkpoint
from engine.program.settings import UserError
from evaluate import compare_models
from report import __main__ as program
from report import analysis, curves, runs, strips
from report.page import latest, make_page, marked, shade, shot_of_group

# ------------------------------------------------------------------------------------------------ numbers by hand


def prediction(row, iou, query="person opens the door", truth=(0.0, 2.0), video=None, task="tvg"):
    return {"row": row, "task": task, "sample": 0, "video": video or f"v{row}.mp4", "query": query,
            "truth": list(truth), "completion": reply(f"{truth[0]} to {truth[1]}"), "span": list(truth),
            "parts": {"format": 1.0, "iou": iou, "total": 1.0 + iou}, "error": None}


def test_smoothing_by_hand():
    y = np.array([0.0, 3.0, 6.0, 3.0, 0.0])
    assert curves.smooth(y, 3).tolist() == [1.5, 3, 4, 3, 1.5]  # at the ends of two neighbours
    assert curves.smooth(y, 9).tolist() == [2.4] * 5  # fewer values than the window: their mean


def test_a_thinned_curve_keeps_its_peaks_and_its_order():
    x, y = np.arange(3000), np.zeros(3000)
    y[1234], y[2345] = 7, -7
    shown, values = curves.thin(x, y)
    assert len(shown) <= curves.POINTS and (np.diff(shown) > 0).all()
    assert dict(zip(shown, values))[1234] == 7 and dict(zip(shown, values))[2345] == -7


def test_what_is_left_of_an_iterations_seconds_is_the_updates():
    row = {"seconds": 10.0, "wait_seconds": 2.0, "rollout_seconds": 5.0}
    assert curves.with_update_seconds([row, row | {"wait_seconds": None}]) == [
        row | {"update_seconds": 3.0}, row | {"wait_seconds": None}]


def test_a_completion_is_green_above_its_group_and_red_below_the_stronger_the_further():
    for advantage, colour in ((1.25, "good) / 0.50"), (-1.25, "bad) / 0.50"), (9, "good) / 1.00")):
        assert f"border-color:rgb(var(--{colour})" in shade(advantage)


def test_thirds_by_hand():
    found = analysis.thirds("segment", [1, 2, 3, None, 4, 5, 6], "s")
    assert [b.rows for b in found] == [[0, 1], [2, 4], [5, 6]]
    assert [b.name for b in found] == ["up to 2.7 s", "up to 4.3 s", "above 4.3 s"]
    assert analysis.thirds("video", [None, None], "s") == []
    assert [len(b.rows) for b in analysis.thirds("video", [30.0] * 4, "s")] == [4, 0, 0]  # equal ones stay together


def test_frequent_verbs_make_half_of_all():
    counts = analysis.verb_counts(["person opens it", "person opens a door and sits", "a person sits", "person runs",
                                   "a man is running", "the woman laughs", "a red lamp"])
    assert counts == {"open": 2, "sit": 2, "run": 2, "laugh": 1}  # seven
    assert len(analysis.frequent(counts)) == 2  # four of seven


def test_the_kinds_of_rows_by_hand(tmp_path):
    video = str(write_video(tmp_path / "A.mp4", [i / 5 for i in range(50)], size=(28, 28)))  # ten seconds
    rows = [("person opens the door", (0.0, 2.0)), ("person opens the door again", (8.0, 10.0)),
            ("a man sits before he laughs", (4.0, 5.0)), ("a red lamp", (0.0, 9.0))]
    predictions = [prediction(i, 0.5, query, truth, video) for i, (query, truth) in enumerate(rows)]
    found = {(b.title, b.name): b.rows for b in analysis.bins(predictions, ["person opens it"] * 5 + ["he sits"])}
    assert found["all", "all rows"] == [0, 1, 2, 3]
    assert found["middle of the segment in", "first third"] == [0]
    assert found["middle of the segment in", "middle third"] == [2, 3]  # 4.5 of 10 s
    assert found["middle of the segment in", "last third"] == [1]
    assert found["verbs", "all frequent"] == [0, 1] and found["verbs", "one rare"] == [2]
    assert found["verbs", "none"] == [3] and found["verb", "open"] == [0, 1] and found["verb", "laugh"] == [2]
    assert found["query with", '"again"'] == [1] and found["query with", '"before"'] == [2]
    assert found["query with", "none of these words"] == [0, 3] and ("query with", '"then"') not in found
    assert sum(len(rows) for (title, _), rows in found.items() if title == "segment") == 4
    excerpts = [p | {"excerpt": [0.0, 5 + p["row"] / 2]} for p in predictions]  # 5 to 6.5 s, in which times count
    found = {(b.title, b.name): b.rows for b in analysis.bins(excerpts)}
    assert found["middle of the segment in", "last third"] == [1, 2, 3] and found["video", "up to 5.5 s"] == [0, 1]


def test_a_bins_metric_and_its_interval_by_hand():
    # Two videos, of one row and of three. Drawing both, or one twice, gives mIoU 0.5, 0.2 or their pooled 0.275.
    rows = [prediction(0, 0.5, video="a.mp4"), *(prediction(i, 0.2, video="b.mp4") for i in (1, 2, 3))]
    found = analysis.compare(rows)
    assert found["mIoU"][0] == pytest.approx(27.5) and found["mIoU"][2:] == pytest.approx((20, 50))
    assert found["R1@0.5"][0] == 25 and found["R1@0.5"][2:] == pytest.approx((0, 100))
    assert list(found) == sorted(analysis.METRICS)


def test_the_table_of_errors_compares_rows_of_the_same_video_query_and_times():
    ours = [prediction(i, iou) for i, iou in enumerate((0.9, 0.8, 0.4, 0.1))]
    other = [prediction(i, iou) for i, iou in enumerate((0.5, 0.3, 0.6, 0.1))]
    theirs = [p | {"row": 3 - p["row"]} for p in reversed(other)]  # the same rows in another order of the file
    table = {(row["title"], row["name"]): row for row in analysis.error_table([("a", ours), ("b", theirs)])}
    low, gain, high = table["all", "all rows"]["differences"][0]
    assert gain == pytest.approx(55 - 37.5)
    assert (low, high) == pytest.approx(compare_models(ours, other, draws=analysis.DRAWS)["mIoU"][2:])
    assert table["all", "all rows"]["metrics"][1]["mIoU"][0] == pytest.approx(37.5)
    won, lost = analysis.changed_rows(ours, theirs)
    assert [(a["row"], round(gain, 1)) for gain, a, _ in won] == [(1, 0.5), (0, 0.4)]
    assert [(a["row"], round(gain, 1)) for gain, a, _ in lost] == [(2, -0.2)]


def test_evaluations_of_other_rows_are_not_compared():
    assert analysis.differences([prediction(0, 1.0)], [prediction(0, 1.0, query="a lamp")]) == (
        "they have no row in common")
    both = analysis.differences([prediction(0, 0.75)], [prediction(0, 0.25)])
    assert both["mIoU"] == pytest.approx((75, 25, 50, 50)) and list(both)[0] == "mIoU"


def test_cases_by_hand():
    ours = [prediction(i, iou) for i, iou in enumerate((0.1, 0.9, 0.5, 0.7))]
    theirs = [prediction(i, iou) for i, iou in enumerate((0.1, 0.8, 0.9, 0.1))]
    cases = strips.choose_cases([("a", ours), ("b", theirs)], each=2)
    rows = {kind: [p["row"] for p in found] for kind, found in cases.items()}
    assert rows["best"] == [1, 3] and rows["worst"] == [0, 2]
    assert rows["most changed"] == [3, 2]  # +0.6 and -0.4
    assert len(rows["random"]) == 2 and cases == strips.choose_cases([("a", ours), ("b", theirs)], each=2)


def test_a_runs_own_evaluations_are_those_named_by_an_iteration(tmp_path):
    for name in ("eval-000200", "eval-best"):  # the second is the user's own, in the run's folder
        (tmp_path / "run" / name).mkdir(parents=True)
        write_lines(tmp_path / "run" / name / "predictions.0.jsonl", [prediction(0, 0.5)])
    for number in (1, 2):  # and those that evaluate.py made of its newest checkpoint, in folders beside it
        checkpoint = tmp_path / "run" / f"checkpoint-{number:06d}"
        checkpoint.mkdir()
        (checkpoint / "run.json").touch()
        (checkpoint / "model.safetensors").write_bytes(b"weights" * number)
        (tmp_path / f"test-{number}").mkdir()
        (tmp_path / f"test-{number}" / "settings.json").write_text(json.dumps({"model": fingerprint(checkpoint)}))
        write_lines(tmp_path / f"test-{number}" / "predictions.0.jsonl", [prediction(0, 0.5)])
    found = runs.read_run_folder(tmp_path / "run").evaluations
    assert [evaluation.label for evaluation in found] == ["run, iteration 200", "test-2"]


def test_few_of_many_evaluations_are_stacked():
    ours, theirs = (runs.Run(Path(name), name) for name in "ab")
    entries = [(run, runs.Evaluation(f"{run.name}{i}", [], {})) for run in (ours, theirs) for i in range(0, 13, 1)]
    assert [e.label for _, e in latest(entries)] == ["a12", "a0", "a4", "a7", "a11", "b12"]
    assert [e.label for _, e in latest(entries[:1])] == ["a0"]
    assert [e.label for _, e in latest(entries[:2])] == ["a1", "a0"]


def test_anchors_are_bars_before_the_answer():
    text = ("<think> <timestamp>0 to 9</timestamp> <timestamp>2 to 6</timestamp> </think> <answer>3 to 5</answer>")
    bars = strips.answer_bars("tar", text, (3.0, 5.0), 0.8)
    assert [(bar.kind, bar.start, bar.end) for bar in bars] == [
        ("anchor", 0, 9), ("anchor", 2, 6), ("answer", 3, 5)] and bars[-1].note == "IoU 0.80"
    assert strips.answer_bars("a", "?", None)[0].note == "no span"
    assert strips.answer_bars("a", reply("5 to 3"), (5.0, 3.0), 0.0)[0].note == "5 to 3, reversed"


def test_a_film_shows_the_middles_of_eight_stretches_of_a_video_or_of_its_excerpt(tmp_path):
    video = str(write_video(tmp_path / "A.mp4", [i / 5 for i in range(40)], size=(28, 28)))  # 40 grey levels in 8 s
    for shot, middles in ((strips.Shot(video), [0.5 + k for k in range(8)]),
                          (strips.Shot(video, (4.0, 8.0)), [4.25 + k / 2 for k in range(8)])):
        data = base64.b64decode(strips.film(shot).removeprefix("data:image/jpeg;base64,"))
        grey = np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float)
        shown = [(grey[:, 28 * k + 10:28 * k + 18].mean() - 8) / 6 / 5 for k in range(8)]  # seconds, as painted
        assert grey.shape == (28, 8 * 28) and shown == pytest.approx(middles, abs=0.21)
    assert strips.film(strips.Shot(str(tmp_path / "gone.mp4"))) is None


# ------------------------------------------------------------------------------------------------ a run


def test_how_far_a_run_is_and_when_it_ends(tmp_path):
    rows = [{"iteration": i, "task": "tvg", "seconds": 2.0 if i < 60 else 4.0} for i in range(100)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "environment.json").write_text('{"iterations": 250}')
    run = runs.read_run_folder(tmp_path)
    now = (tmp_path / "metrics.jsonl").stat().st_mtime
    going = runs.state(run, now + 30)
    assert going == {"done": 100, "total": 250, "status": "running", "seconds_left": 150 * 4.0}  # of the last fifty
    assert runs.state(run, now + 601)["status"] == "stopped"
    (tmp_path / "environment.json").write_text('{"iterations": 100}')
    assert runs.state(runs.read_run_folder(tmp_path), now + 601)["status"] == "finished"


def test_a_log_that_is_being_written_is_read_and_null_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "task": "tvg", "kl": null}\n{"iteration": 1, "task": "tvg", "kl": 0.5}\n{"iter')
    run = runs.read_run_folder(tmp_path)
    assert len(run.log) == 2 and [list(v) for v in runs.values(run.log, "kl")] == [[1], [0.5]]
    path.write_text('{"iteration": 0, "task": "tvg"}\n{"iter\n{"iteration": 1, "task": "tvg"}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2: is no JSON"):
        runs.read_run_folder(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        runs.read_run_folder(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither"):
        runs.read_run_folder(tmp_path / "empty")


def test_a_page_waits_for_the_first_iteration(tmp_path):
    assert not program.has_begun(tmp_path / "gone")
    (tmp_path / "metrics.jsonl").touch()
    assert not program.has_begun(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [{"iteration": 0, "task": "eval", "mIoU": 1.0}])
    assert not program.has_begun(tmp_path)
    write_lines(tmp_path / "metrics.jsonl", [{"iteration": 0, "task": "eval"}, {"iteration": 0, "task": "tvg"}])
    assert program.has_begun(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "predictions.0.jsonl").touch()
    assert program.has_begun(tmp_path / "evaluation")


def test_a_watched_page_is_opened_once_and_written_anew_until_the_run_ends(monkeypatch, tmp_path, capsys):
    slept, opened, written = [], [], []

    def write_page(args):
        written.append(args.against)
        return tmp_path / "report.html", len(written) < 3

    monkeypatch.setattr(program, "has_begun", lambda folder: folder == "run" or slept)  # OTHER later
    monkeypatch.setattr(program, "write_page", write_page)
    monkeypatch.setattr(program, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(program, "webbrowser", SimpleNamespace(open=opened.append))
    program.main(["run"])
    assert len(written) == 1 and not opened  # neither watched nor opened
    program.main(["run", "--against", "other", "--watch", "--open"])
    assert written[1:] == [["other"]] * 2 and slept[:2] == [1, 60] and len(opened) == 1


def test_folders_of_one_name_are_told_apart_by_the_folder_above(tmp_path):
    assert program.names_of([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "b" / "c"]) == [
        "a/run", "b/run", "c"]


def rollout(iteration, n, total, **notes):
    return {"iteration": iteration, "video": "AAA.mp4", "query": "person runs", "start": 0.0, "end": 2.0, "task": "vd",
            "completion": f"<answer>{iteration} {n}</answer>", "parts": {"format": 1.0, "vd": total, "total": total},
            "cut_off": False, "kl": 0.0} | notes


def test_groups_flags_and_advantages_by_hand(tmp_path):
    used = [-1.0, 1.0, 1.0, -1.0]  # as the run used them, here without the division by the deviation
    first = [rollout(0, n, total, advantage=a) for n, (total, a) in enumerate(zip((0, 2, 2, 0), used))]
    second = [rollout(0, n, 1.0) for n in range(4)]
    third = [rollout(5, n, n, kl=n / 10, cut_off=n == 2) for n in range(4)]
    third[1]["parts"]["format"] = 0.0
    write_lines(tmp_path / "rollouts.0.jsonl", [*first, *second])
    path = write_lines(tmp_path / "rollouts.1.jsonl", third)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"iteration": 6, "vid')  # being written
    groups = runs.read_groups(tmp_path, 4)
    assert [group.iteration for group in groups] == [5, 0, 0]  # the newest first
    assert [row["advantage"] for row in groups[1].rows] == used
    write_lines(tmp_path / "metrics.jsonl", [{"iteration": 0, "task": "vd"}])
    page = make_page([runs.read_run_folder(tmp_path)])
    assert page.count("advantage <b>") == 4  # a completion of an earlier version is shown without
    assert groups[2].flags() == {"no-spread"} and groups[0].flags() == {"cut-off", "malformed"}
    assert groups[0].kl() == 0.3 and groups[1].kl() == 0
    same = runs.Group(0, "vd", [row | {"completion": "ab"[n % 2]} for n, row in enumerate(first)])
    assert [names for names, _ in same.distinct()] == ["o1, o3", "o2, o4"]
    run = runs.Run(tmp_path, "run", config={"videos": str(tmp_path)})
    assert shot_of_group(run, same) == strips.Shot(str(tmp_path / "AAA.mp4"))
    same.rows[0].update(video_start=2.0, video_end=9.0)
    assert shot_of_group(run, same).excerpt == (2.0, 9.0)


def test_few_iterations_of_many_are_read_and_few_groups_of_many_shown(tmp_path):
    rows = [rollout(i, n, n, kl=i / 3000 if i < 300 else 0.01) for i in range(3000) for n in range(2)]
    write_lines(tmp_path / "rollouts.0.jsonl", rows)
    groups = runs.read_groups(tmp_path, 2)
    assert len(groups) == runs.MAX_ITERATIONS and (groups[0].iteration, groups[-1].iteration) == (2999, 0)
    chosen = runs.choose_groups(groups, most=20)
    highest = sorted(groups, key=lambda group: -group.kl())[:5]
    assert highest[-1].kl() > 0.01 and all(group in chosen for group in highest)  # those that few iterations have
    assert len(chosen) <= 20 and chosen == [group for group in groups if group in chosen]  # the newest first
    assert groups[0] in chosen and groups[-1] in chosen


def test_what_differs_between_runs():
    a, b = (runs.Run(Path(name), name, config=config) for name, config in
            (("a", {"p": 0.8, "seed": 0}), ("b", {"p": 1.0, "seed": 0, "new": 3})))
    assert runs.differences([a, b]) == {"p": [0.8, 1.0], "new": [None, 3]}


# ------------------------------------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoint):
    """Two runs of three iterations, measured at the start and the end, every completion kept."""
    place = tmp_path_factory.mktemp("report")
    config = make_config(place, checkpoint)
    texts = [reply("0 to 2"), reply("1 to 3"), reply("person opens the door"), "<b>no tags</b> & more"]
    with scripted(*texts):
        for name, p in (("one", 1.0), ("two", 0.4)):
            train(config, output=str(place / name), p=p, iterations=3, save_rollouts=1, max_new_tokens=60, eval_every=3,
                  eval_annotations=config.annotations)
    return place


def test_a_page_is_one_file_that_needs_no_network_and_shows_every_part(folder, capsys):
    program.main([str(folder / "one"), "--against", str(folder / "two")])
    assert capsys.readouterr().out.strip() == f"open this: {folder / 'one' / 'report.html'}"
    page = (folder / "one" / "report.html").read_text()
    assert "<b>finished</b>: 3 iterations of 3" in page
    for anchor in ("curves", "beside", "rollouts", "strips", "errors", "configuration"):
        assert f'href="#{anchor}"' in page and f'id="{anchor}"' in page
    for name in ("tvg/iou", "kl, grounding", "entropy, grounding", "zero_spread, grounding", "seconds", "mIoU", "VC"):
        assert f"<figcaption>{name}<small>" in page, name
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    assert page.count("data:image/jpeg;base64,") == 2  # two videos, each once
    sources = re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page)
    assert all(source.startswith(("#", "data:")) for found in sources for source in found if source)
    assert "<b>no tags</b>" not in page and "&lt;b&gt;" in page  # what a model writes is text
    assert '<tr><td>p</td><td>1.0</td><td>0.4</td></tr>' in page


def test_settings_of_other_programs_beside_a_run_are_none_of_an_evaluation(folder, capsys):
    (folder / ".vscode").mkdir()
    (folder / ".vscode" / "settings.json").write_text('{ // an editor\'s, which JSON does not allow\n}')
    assert {evaluation.label for evaluation in runs.read_run_folder(folder / "one").evaluations} == {
        "one, iteration 0", "one, iteration 3"}
    shutil.rmtree(folder / ".vscode")


def test_the_numbers_of_a_page_are_those_of_its_files(folder):
    run = runs.read_run_folder(folder / "one")
    assert len(run.log) == 3 and [row["iteration"] for row in run.held_out] == [0, 3]
    assert len(run.groups) == 3 * 2 and all(len(group.rows) == 3 for group in run.groups)
    mean = json.loads((folder / "one" / "eval-000003" / "metrics.json").read_text())["mIoU"]
    [entries] = runs.comparable([run])
    assert analysis.compare(analysis.grounding(entries[-1][1].predictions))["mIoU"][0] == pytest.approx(mean)
    moved = [p | {"video": f"elsewhere/{Path(p['video']).name}"} for p in entries[-1][1].predictions]
    run.evaluations[-1] = run.evaluations[-1]._replace(predictions=moved)  # as if made in another folder
    page = make_page([run])
    assert f"<td>{mean:.1f}<small>" in page
    assert "middle of the segment in" in page  # the videos' lengths are known, by the folder of the run's own


def test_a_page_of_a_run_that_has_just_begun(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"iteration": 0, "task": "sft", "nll": 2.0, "seconds": 60.0}])
    (tmp_path / "config.json").write_text('{"iterations": 11, "videos": "gone"}')
    page = make_page([runs.read_run_folder(tmp_path)], watched=True)
    assert "<b>running</b>: 1 iterations of 11; about 10 min left" in page and 'http-equiv="refresh"' in page
    assert time.strftime("%Y-%m-%d") in page and 'id="rollouts"' not in page and "nll" in page


def test_a_page_knows_a_task_of_ones_own_from_the_run(tmp_path):
    rows = [{"iteration": 0, "task": "eval", "VC": 50.0, "mIoU": 20.0, "mine.object": 40.0},
            {"iteration": 0, "task": "mine.object", "mine.object/mine.object": 0.5, "kl": 0.1},
            {"iteration": 1, "task": "tvg", "tvg/iou": 0.5, "kl": 0.2}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    found = curves.sections([runs.read_run_folder(tmp_path)])
    names = {title: [chart["name"] for chart in charts] for title, charts in found.items()}
    assert names == {"Held-out": ["mIoU", "VC", "mine.object"], "Rewards": ["tvg/iou", "mine.object/mine.object"],
                     "Policy": ["kl, grounding", "kl, inversions"]}


def test_a_reward_of_ones_own_is_imported_where_the_command_line_names_it(folder, tmp_path, monkeypatch, alone):
    run = shutil.copytree(folder / "one", tmp_path / "run")
    for record in (run / "config.json", *run.glob("checkpoint-*/run.json")):
        text = record.read_text(encoding="utf-8")
        record.write_text(text.replace('"tvg_reward": "iou"', '"tvg_reward": "mine.ends"'), encoding="utf-8")
    argv = [str(run), "--video", str(folder / "videos" / "AAA.mp4"), "--query", "Person jumps."]
    with pytest.raises(SystemExit, match="names mine.ends, which is not of this repository"):
        program.main(argv)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(ends=rewards.IOU))
    with scripted(reply("1 to 4")):
        program.main([*argv, "--tvg-reward", "mine.ends"])
    assert 'title="1.0 to 4.0 s"' in (run / "report.html").read_text(encoding="utf-8")


def test_where_a_model_sees_a_query_in_ones_own_video_as_it_was_trained_to(folder, alone, tmp_path):
    video = str(folder / "videos" / "AAA.mp4")  # five seconds
    run = Path(shutil.copytree(folder / "one", tmp_path / "one"))
    record = newest_checkpoint(run) / "run.json"
    state = json.loads(record.read_text(encoding="utf-8"))
    state["config"] |= {"fps": 1.0, "tvg_reward": "papers.rewards.tvg_r1"}
    record.write_text(json.dumps(state), encoding="utf-8")
    with scripted("<think>a</think><time>[1, 4]</time><answer>2 to 3</answer>") as calls:
        program.main([str(run), "--video", video, "--query", "Person jumps.", "a door"])
    assert [call.prompts[0].grid[0, 0] for call in calls] == [3, 3]  # six frames
    page = (run / "report.html").read_text()
    own = page[page.index("a video of your own"):]
    assert "“person jumps”" in own and "“a door”" in own and own.count('title="1.0 to 4.0 s"') == 2


def test_a_mistake_is_one_sentence(folder, capsys):
    for argv, words in ((["x", "--video", "a.mp4"], "--video and --query belong together"),
                        (["x", "--against", *"abcdef"], "a page shows 5 beside the run")):
        with pytest.raises(SystemExit):
            program.parse(argv)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="^report: .*gone: there is no such folder; give"):
        program.main([str(folder / "gone")])


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "PIL"])
def test_a_package_that_is_not_installed_is_one_sentence(package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    for name in [name for name in sys.modules if name.startswith("report.") and name != "report.__main__"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=f"^report: .*{package}.*; pip install -r report/requirements.txt"):
        program.main([str(folder / "one")])


def test_a_completion_is_marked_up_and_escaped():
    assert str(marked("<answer>a & b</answer>")) == (
        '<span class="soft" style="display:inline">&lt;answer&gt;</span><b>a &amp; b</b>'
        '<span class="soft" style="display:inline">&lt;/answer&gt;</span>')
