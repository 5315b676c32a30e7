"""stages.py: what is chosen between two stages, by hand; files in and out."""

import json
from pathlib import Path

import numpy as np
import pytest

import data
import stages
from runtime import UserError

ROWS = Path(__file__).parent / "data"


def rollout(anchors, answer, start=2.0, end=6.0, task="tvg", query="q"):
    body = " ".join(f"<timestamp>{span}</timestamp>" for span in anchors)
    return {"video": "a.mp4", "query": query, "start": start, "end": end, "task": task, "parts": {},
            "completion": f"<think>so {body}</think> <answer>{answer}</answer>"}


def test_every_rule_of_the_selection_drops_its_own():
    good = rollout(["4 to 8", "3 to 6"], "2 to 6")
    rows = [good, rollout([], "person runs", task="ar"),  # not grounding
            good | {"completion": good["completion"] + " so"},  # not well-formed
            rollout(["3 to 6"], "2 to 6"),  # one anchor
            rollout(["3 to 6", "4 to 8"], "2 to 6"),  # falls on the way
            rollout(["3 to 6", "2 to 6"], "3 to 6"),  # falls at the end
            rollout(["8 to 9", "4 to 9"], "4 to 8"),  # rises, but to 1/3
            rollout(["3 to 6", "soon"], "2 to 6"), rollout(["2 to 6"] * 5, "2 to 6"),  # unreadable, five: no reward either
            dict(good), rollout(["3 to 6", "3 to 6"], "3 to 6")]  # the same again; standing still is allowed
    kept, counts = stages.select_anchors(rows)
    assert [row["completion"] for row in kept] == [good["completion"], rows[-1]["completion"]]
    assert set(kept[0]) == {"video", "query", "start", "end", "task", "completion"}
    assert [count for _, count in counts] == [10, 7, 6, 4, 3, 2]


def test_an_iou_at_the_threshold_is_enough():
    rows = [rollout(["2 to 3", "2 to 4"], "2 to 4"), rollout(["2 to 3", "2 to 3.9"], "2 to 3.9")]  # 1/2, less
    kept, _ = stages.select_anchors(rows, min_iou=0.5)
    assert [row["completion"] for row in kept] == [rows[0]["completion"]]


def test_invert_sft_pairs_a_clip_with_its_query():
    samples = [data.Sample("v/AAA.mp4", "person runs", 1, 3), data.Sample("v/BBB.mp4", "person sits", 3, 3)]
    assert stages.invert_sft(samples) == [{"video": "AAA.mp4", "query": "person runs", "start": 1, "end": 3, "task": "vd",
                                           "completion": "<answer>person runs</answer>"}]


def test_the_longest_half_in_the_files_order():
    lines = [{"completion": "a " * n} for n in (3, 9, 1, 5, 7)]
    assert [line["completion"].count("a") for line in stages.longest(lines, 0.5)] == [9, 5, 7]
    assert stages.longest(lines, 1) == lines


def prediction(row, iou, query="q", task="tvg", sample=0, truth=(0.0, 1.0)):
    return {"row": row, "task": task, "sample": sample, "query": query, "truth": truth, "parts": {"iou": iou}}


def test_difficulty_is_the_mean_iou_of_a_row():
    samples = [data.Sample("a.mp4", "q", 0, 1)] * 2
    found = stages.mean_ious([prediction(0, 0.2), prediction(1, 0.5), prediction(0, 0.4, sample=1)], samples)
    assert found == pytest.approx([0.3, 0.5])
    with pytest.raises(UserError, match="1 of 2 rows have no prediction"):
        stages.mean_ious([prediction(0, 0.2)], samples)
    for other in (prediction(0, 0.2, query="other"), prediction(0, 0.2, truth=(0.0, 2.0)), prediction(2, 0.2)):
        with pytest.raises(UserError, match="of another annotation file"):
            stages.mean_ious([other], samples)


def test_the_band_is_open_below_and_closed_above():
    difficulty = np.array([0.0, 0.1, 0.11, 0.7, 0.71, 1.0])
    assert stages.choose_rows(difficulty, 0.1, 0.7) == [2, 3]
    assert stages.choose_rows(difficulty, 0, 0.7) == [1, 2, 3]  # Time-R1's filter before each epoch
    assert stages.choose_rows(difficulty, 0.7, 1) == [4, 5]


def test_even_choice_by_hand():
    difficulty = np.array([0.5, 0.1, 0.4, 0.2, 0.3, 0.6])
    assert stages.choose_rows(difficulty, 0, 1, keep=3) == [0, 1, 4]  # of the sorted .1 .2 .3 .4 .5 .6: .1, .3, .5


def test_gaussian_choice_follows_its_weights():
    # Two groups of rows, at IoU 0.3 (weight 1) and 0.7 (weight exp(-2) = 0.135): drawing few of many, their shares are
    # 1 : 0.135. Rows at 0 are never drawn.
    difficulty = np.repeat([0.3, 0.7, 0.0], 10_000)
    rows = stages.choose_rows(difficulty, 0, 1, keep=1000, choose="gaussian", seed=1)
    easy = sum(10_000 <= row < 20_000 for row in rows)
    assert len(set(rows)) == 1000 and max(rows) < 20_000
    assert easy / 1000 == pytest.approx(0.135 / 1.135, abs=0.04)  # four standard deviations


def test_histogram_counts_all_and_kept():
    lines = stages.histogram(np.array([0.0, 0.05, 0.55, 1.0]), [2])
    assert [line.split()[:3] for line in lines[1:]] == [
        [f"{i / 10:.1f}-{(i + 1) / 10:.1f}", str({0: 2, 5: 1, 9: 1}.get(i, 0)), str(int(i == 5))] for i in range(10)]


def test_chosen_rows_are_read_back_as_annotations(tmp_path, capsys):
    samples = data.load_annotations(ROWS / "charades_sta.txt", "")
    (tmp_path / "p").mkdir()
    lines = [prediction(i, i / len(samples), s.query, truth=[s.start, s.end]) for i, s in enumerate(samples)]
    (tmp_path / "p" / "predictions.0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stages.main(stages.parse([
        "difficulty", "--annotations", str(ROWS / "charades_sta.txt"), "--predictions", str(tmp_path / "p"),
        "--difficulty", "0", "0.5", "--output", str(tmp_path / "rows.json")]))
    back = data.load_annotations(tmp_path / "rows.json", "")
    expected = [s for i, s in enumerate(samples) if 0 < i / len(samples) <= 0.5]
    assert [(s.video, s.query, s.start, s.end) for s in back] == [(s.video, s.query, s.start, s.end) for s in expected]
    assert f"{len(back)} of {len(samples)} rows kept" in capsys.readouterr().out


def test_demonstrations_are_read_back(tmp_path):
    stages.main(stages.parse(["invert-sft", "--annotations", str(ROWS / "charades.json"), "--output", str(tmp_path / "d")]))
    assert all(d.task == "vd" and d.sample.query in d.completion for d in data.load_demonstrations(tmp_path / "d", ""))


@pytest.mark.parametrize("argv, words", [
    (["difficulty", "--annotations", "a", "--predictions", "p", "--output", "o", "--difficulty", "0.7", "0.1"], "no band"),
    (["difficulty", "--annotations", "a", "--predictions", "p", "--output", "o", "--difficulty", "10", "70"], "as IoU"),
    (["longest", "--demonstrations", "d", "--output", "o", "--share", "0"], "--share is 0"), (["anchors"], "--rollouts"),
    (["anchors", "--rollouts", "r", "--output", "o", "--keep", "-3"], "--keep is -3"),
    (["other"], "'other'"), ([], "STAGE")])
def test_a_wrong_option_is_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        stages.parse(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


@pytest.mark.parametrize("line", ['{"a": 1}', '[{}]', "{broken}", '{"video": 1, "query": 1, "task": 1, "completion": 1}'])
def test_a_line_that_is_no_rollout_is_named_and_a_torn_last_one_left_out(line, tmp_path):
    path = tmp_path / "rollouts.0.jsonl"
    good = rollout(["4 to 8", "3 to 6"], "2 to 6")
    path.write_text(json.dumps(good) + '\n{"video": "a.mp4", "qu')
    assert stages.read_rollouts(tmp_path) == [good]
    if line.endswith("}"):
        path.write_text(json.dumps(good) + "\n" + line)
        with pytest.raises(UserError, match="rollouts.0.jsonl, line 2: is no rollout"):
            stages.read_rollouts(tmp_path)


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path):
    (tmp_path / "rollouts.0.jsonl").write_text(json.dumps(rollout([], "2 to 6")) + "\n")
    with pytest.raises(UserError, match="no row is left"):
        stages.main(stages.parse(["anchors", "--rollouts", str(tmp_path), "--output", str(tmp_path / "o")]))
    with pytest.raises(UserError, match="--save-rollouts"):
        stages.main(stages.parse(["anchors", "--rollouts", str(tmp_path / "no"), "--output", str(tmp_path / "o")]))
    with pytest.raises(UserError, match="is no folder"):
        stages.main(stages.parse(["difficulty", "--annotations", str(ROWS / "charades.json"), "--predictions",
                                  str(tmp_path / "no"), "--output", str(tmp_path / "o")]))
    assert not (tmp_path / "o").exists()
