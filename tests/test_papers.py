"""papers/: what other papers reward, by hand, and what is chosen between two of their stages, files in and out."""

import functools
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared import write_lines
from test_evaluate import prediction as evaluated
from test_rewards import ODD, seconds, thought

import papers.rewards
import rewards
from data import Sample, Settings, prompt_text
from engine.program.settings import UserError
from engine.words.annotations import load_annotations, load_demonstrations
from engine.words.samples import Demonstration
from evaluate import summarize
from papers import stages
from papers.rewards import anchor_metrics, anchor_reward, parse_anchors, soft_iou, timestamp_aware_iou
from rewards import Scoring, format_reward, parse_span, score, temporal_iou

ROWS = Path(__file__).parent / "data"


def sample(duration=None):
    return Sample("a.mp4", "person closed the door", 2.0, 6.0, duration)


# ---- The rewards by name


def grounding(name):
    return rewards.grounding(name if name == "iou" else f"papers.rewards.{name}")


GROUNDINGS = ["iou", *(name for name, value in vars(papers.rewards).items() if isinstance(value, rewards.Grounding))]


def test_grounding_without_thinking_is_the_same_reward_in_another_format():
    for name in ("iou", "papers.rewards.timestamp_iou"):
        thinks = Settings(tvg_reward=name).grounding()
        answers = Settings(tvg_reward=name, tvg_format="answer").grounding()
        assert answers.format == rewards.FORMATS["answer"] and answers._replace(format=thinks.format) == thinks


@pytest.mark.parametrize("name", ["papers.rewards.anchors", "papers.rewards.tvg_r1"])
def test_a_paper_with_a_format_of_its_own_takes_no_other(name):
    with pytest.raises(UserError, match=f"--tvg-format answer does not go with --tvg-reward {name}"):
        Settings(tvg_reward=name, tvg_format="answer").check()
    Settings(tvg_reward=name).check()


def test_anchors_and_lists_of_times_are_asked_of_grounding_alone():
    for name in GROUNDINGS:
        asks = prompt_text("tvg", "q", grounding=grounding(name))
        assert ("<timestamp>" in asks) == name.startswith("anchors") and ("<time>" in asks) == (name == "tvg_r1")
        assert ("<answer>" in asks) == (name != "tvg_r1") and "<think>" in asks
        assert prompt_text("vd", "q", grounding=grounding(name)) == prompt_text("vd", "q")


@pytest.mark.parametrize("name", GROUNDINGS)
def test_the_prompts_own_example_is_well_formed(name):
    span = "[12.54, 17.83]" if name == "tvg_r1" else "12.54 to 17.83"
    blocks = grounding(name).format.blocks
    completion = f"<think>a</think> <{blocks[-1]}>{span}</{blocks[-1]}>"
    assert span in grounding(name).instruction
    assert format_reward("tvg", completion, Scoring(grounding(name))) == 1
    assert parse_span(completion, blocks[-1]) == (12.54, 17.83)


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("name", GROUNDINGS)
def test_odd_text_is_scored(name, text):
    for completion in (text, thought(text), f"<think><timestamp>{text}</think><time>{text}</time>"):
        parts = score("tvg", completion, sample(duration=10), Scoring(grounding=grounding(name)))
        assert 0 <= parts["iou"] <= 1 and -1 <= parts["total"] <= 4


@pytest.mark.parametrize("text", [
    "<timestamp>" * 100_000, "<timestamp>1 to 2</timestamp>" * 50_000 + "<answer>", "<time>" * 100_000,
    "<timestamp>" + "1 to " * 50_000 + "</timestamp><answer>", "</time> <time>" * 50_000])
def test_long_texts_are_read_in_linear_time(text):
    for name in GROUNDINGS:  # a pattern of quadratic time would take minutes here: the suite would not end
        assert -1 <= score("tvg", text, sample(duration=10), Scoring(grounding=grounding(name)))["total"] <= 2


# ---- TVG-R1


@pytest.mark.parametrize("answer, span", [
    ("[2.5, 4.0]", (2.5, 4)), ("[2.5,4]", (2.5, 4)), (" [ 2.5 , 4.0 ] ", (2.5, 4)), ("2 to 3 or [3, 4]", (3, 4)),
    ("[3, 4], that is 5 to 6", (5, 6)), ("[[1, 2]]", (1, 2)), ("[1, 2, 3]", None), ("[-1, 2]", None), ("(1, 2)", None),
    ("[1,200.5, 3]", None), ("[1e3, 2]", None), ("[1; 2]", None), ("[1, 2", None), ("[12:30, 14]", None)])
def test_lists_of_times_are_read_in_either_tag(answer, span):
    assert parse_span(thought(answer)) == span
    assert parse_span(f"<think>a</think> It is <time>{answer}</time>.", "time") == span


def test_a_reward_reads_the_block_that_it_asks_for_alone():
    for completion in ("<answer>1 to 2</answer> <time>[3, 4]</time>", "<time>[3, 4]</time> <answer>1 to 2</answer>"):
        assert parse_span(completion) == (1, 2) and parse_span(completion, "time") == (3, 4)
    both = "<think>a</think> <time>[2, 6]</time> <answer>4 to 8</answer>"  # truth 2 to 6
    assert score("tvg", both, sample(), Scoring(grounding=grounding("tvg_r1")))["iou"] == 1
    for name in ("iou", "timestamp_iou", "anchors"):
        assert score("tvg", both, sample(), Scoring(grounding=grounding(name)))["iou"] == 2 / 6


@pytest.mark.parametrize("completion, form", [
    ("<think>a</think> <time>[1, 2]</time>", 1), ("<think>a</think> So it is <time>[1, 2]</time>, I think.", 1),
    ("a <think>a</think> <time>[1, 2]</time>", 0), ("<think>a</think> <time>soon</time>", 0),
    ("<time>[1, 2]</time> <think>a</think>", 0), ("<think>a</think> <answer>1 to 2</answer>", 0),
    ("<think> </think> <time>[1, 2]</time>", 0)])
def test_the_format_of_tvg_r1(completion, form):
    assert format_reward("tvg", completion, Scoring(grounding("tvg_r1"))) == form
    assert format_reward("tvg", completion) == float("<answer>" in completion)


def test_the_tags_of_tvg_r1_are_text_to_the_paper():
    assert format_reward("tvg", "<think>at <time> 3 </time></think> <answer>1 to 2</answer>") == 1


def test_tvg_r1_weighs_iou_and_format():
    # truth 2 to 6: IoU of 4 to 8 is 2 / 6
    assert score("tvg", "<think>a</think> <time>[4, 8]</time>", sample(), Scoring(grounding=grounding("tvg_r1"))) == {
        "format": 1, "iou": 2 / 6, "total": pytest.approx(0.1 + 0.9 * 2 / 6)}
    malformed = "a <think>a</think> <time>[2, 6]</time>"
    assert score("tvg", malformed, sample(), Scoring(grounding=grounding("tvg_r1")))["total"] == pytest.approx(0.9)
    assert score("tvg", thought("2 to 6"), sample(), Scoring(grounding=grounding("tvg_r1")))["total"] == 0  # no <time>


# ---- Time-R1


@pytest.mark.parametrize("span, value", [
    ((2, 6), 1), ((4, 8), 2 / 6 * 0.8 * 0.8), ((1, 6), 4 / 5 * 0.9), ((7, 9), 0), ((6, 2), 0), ((2, 30), 0)])
def test_time_r1_by_hand(span, value):  # duration 10, truth 2 to 6; the end of 2 to 30 is off by more than the video
    assert timestamp_aware_iou(span, (2, 6), 10) == pytest.approx(value)


def test_two_errors_beyond_the_video_are_not_rewarded():  # (1 - 12 / 10) * (1 - 14 / 10) would be positive
    assert timestamp_aware_iou((0, 30), (12, 16), 10) == 0


def test_time_r1_adds_the_format():
    assert score("tvg", thought("4 to 8"), sample(duration=10), Scoring(grounding=grounding("timestamp_iou"))) == {
        "format": 1, "iou": 2 / 6, "timestamp_iou": pytest.approx(0.64 / 3), "total": pytest.approx(1 + 0.64 / 3)}


def test_without_a_duration_iou_alone_counts():  # evaluation does not need it
    found = score("tvg", thought("4 to 8"), sample(), Scoring(grounding=grounding("timestamp_iou")))
    assert found == score("tvg", thought("4 to 8"), sample()) == {"format": 1, "iou": 2 / 6, "total": 1 + 2 / 6}


# ---- TAR-TVG


@pytest.mark.parametrize("span, value", [
    ((2, 6), 1), ((4, 8), 2 / 6), ((8, 12), -0.2), ((6, 7), 0), ((6, 2), -1), (None, -1), ((3, 3), -1)])
def test_soft_iou_by_hand(span, value):  # truth 2 to 6; 8 to 12 leaves a gap of 2 in a hull of 10
    assert soft_iou(span, (2, 6)) == pytest.approx(value)


@given(st.tuples(seconds, seconds), st.tuples(seconds, seconds))
def test_soft_iou_is_iou_where_segments_meet(a, b):
    soft = soft_iou(a, b)
    assert -1 <= soft <= 1 and max(soft, 0) == pytest.approx(temporal_iou(a, b))


def anchored(*spans, answer="2 to 6"):
    body = " ".join(f"first <timestamp>{span}</timestamp>" for span in spans)
    return f"<think>a {body}</think> <answer>{answer}</answer>"


def test_anchors_are_read_before_the_answer_only():
    assert parse_anchors(anchored("1 to 2", "soon", "[3, 4]")) == [(1, 2), None, (3, 4)]
    assert parse_anchors("<think><timestamp>1 to 2<timestamp></think><answer>") == [None, None]
    assert parse_anchors("<think>a</think> <answer><timestamp>1 to 2</timestamp></answer>") == []
    assert parse_anchors("<timestamp>1 to 2</timestamp>") == []
    assert format_reward("tvg", anchored("1 to 2"), Scoring(grounding("anchors"))) == 1


def test_anchor_reward_by_hand():
    # truth 2 to 6. IoUs: 4 to 8 1/3, 3 to 6 3/4, 2 to 6 1: rising. Weights of two anchors: 1/3, 2/3.
    assert anchor_reward([(4, 8), (3, 6)], (2, 6), (2, 6)) == pytest.approx(1 / 9 + 2 / 3 * 3 / 4 + 0.5)
    assert anchor_reward([(3, 6), (4, 8)], (2, 6), (2, 6)) == pytest.approx(1 / 3 * 3 / 4 + 2 / 9)  # falls
    assert anchor_reward([(3, 6), (3, 6)], (2, 6), (2, 6)) == pytest.approx(3 / 4)  # stands still
    assert anchor_reward([(4, 8), (3, 6)], (3, 6), (2, 6)) == pytest.approx(1 / 9 + 1 / 2)  # so does the answer
    assert anchor_reward([(4, 8), (3, 6)], None, (2, 6)) == pytest.approx(1 / 9 + 1 / 2)


def test_an_anchor_that_cannot_be_read_costs_the_reward_of_all():
    assert anchor_reward([(2, 6), None, (2, 6)], (2, 6), (2, 6)) == 0
    parts = score("tvg", anchored("soon", "2 to 6"), sample(), Scoring(grounding=grounding("anchors")))
    assert parts["anchors"] == 2 and parts["anchor_reward"] == 0 and parts["anchor_gain"] == 1


@pytest.mark.parametrize("count, reward", [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (5, 0)])
def test_two_to_four_anchors_earn(count, reward):
    assert anchor_reward([(2, 6)] * count, (2, 6), (2, 6)) == pytest.approx(reward)


def test_tar_tvg_by_hand():
    reward = functools.partial(papers.rewards.tar_tvg_reward, anchor_weight=2, progress_weight=3)
    weighted = papers.rewards.anchors._replace(reward=reward)
    parts = score("tvg", anchored("4 to 8", "3 to 6"), sample(), Scoring(grounding=weighted))
    value = 1 / 9 + 1 / 2 + 3
    assert parts == {"format": 1, "iou": 1, "soft_iou": 1, "anchor_reward": pytest.approx(value), "anchors": 2,
                     "anchor_gain": pytest.approx(2 / 3), "total": pytest.approx(1 + 1 + 2 * value)}
    worst = score("tvg", "nothing", sample(), Scoring(grounding=grounding("anchors")))
    assert worst["total"] == -1 and worst["anchor_gain"] == 0


def test_anchors_are_summarized_by_hand():
    predictions = [evaluated(row, anchors=anchors, anchor_gain=gain)
                   for row, (anchors, gain) in enumerate([(0.0, 0.0), (2.0, 0.3), (4.0, 0.1), (5.0, -0.1)])]
    metrics = summarize(predictions, papers.rewards.anchors)
    assert metrics["2-4 anchors"] == 50.0
    assert metrics["anchor gain"] == pytest.approx(10.0)  # over the three answers that have anchors
    assert not {"2-4 anchors", "anchor gain"} & set(summarize(predictions))


def test_anchor_metrics_by_hand():
    assert anchor_metrics({"anchors": 3.0, "anchor_gain": 0.25}) == {"2-4 anchors": 100, "anchor gain": 25}
    assert anchor_metrics({"anchors": 5.0, "anchor_gain": -0.5}) == {"2-4 anchors": 0, "anchor gain": -50}
    assert anchor_metrics({"anchors": 0.0, "anchor_gain": 0.0}) == {"2-4 anchors": 0}  # no gain without an anchor


# ---- Between two stages


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
            rollout(["3 to 6", "soon"], "2 to 6"),  # one cannot be read: no reward either
            rollout(["2 to 6"] * 5, "2 to 6"),  # five: no reward either
            dict(good), rollout(["3 to 6", "3 to 6"], "3 to 6")]  # the same again; standing still is allowed
    kept, counts = stages.select_anchors(rows)
    assert [row["completion"] for row in kept] == [good["completion"], rows[-1]["completion"]]
    assert set(kept[0]) == {"video", "query", "start", "end", "task", "completion"}
    assert [count for _, count in counts] == [10, 7, 6, 4, 3, 2]


def test_anchors_are_measured_on_the_segment_that_the_answer_hits_best():
    row = rollout(["62 to 75", "60 to 78"], "60 to 80", start=0.0, end=10.0)  # IoU 0 with 0 to 10
    assert stages.select_anchors([row])[0] == []
    found, _ = stages.select_anchors([row | {"alternatives": [[60.0, 80.0]]}])  # 13/20, 18/20, 1
    assert [kept["completion"] for kept in found] == [row["completion"]]


def test_invert_sft_pairs_a_clip_with_its_query():
    samples = [Sample("v/AAA.mp4", "person runs", 1, 3), Sample("v/BBB.mp4", "person sits", 3, 3)]
    assert stages.invert_sft(samples) == [
        {"video": "AAA.mp4", "query": "person runs", "start": 1, "end": 3, "task": "vd",
         "completion": "<answer>person runs</answer>"}]


def test_the_longest_half_in_the_files_order():
    lines = [{"completion": "a " * n} for n in (3, 9, 1, 5, 7)]
    assert [line["completion"].count("a") for line in stages.longest(lines, 0.5)] == [9, 5, 7]
    assert stages.longest(lines, 1) == lines


def prediction(row, iou, query="q", task="tvg", sample=0, truth=(0.0, 1.0)):
    return {"row": row, "task": task, "sample": sample, "query": query, "truth": truth, "parts": {"iou": iou}}


def test_difficulty_is_the_mean_iou_of_a_row():
    samples = [Sample("a.mp4", "q", 0, 1)] * 2
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


def test_demonstrations_are_read_back(tmp_path):
    path = tmp_path / "demos.jsonl"
    stages.main(stages.parse(["invert-sft", "--annotations", str(ROWS / "charades.json"), "--output", str(path)]))
    back = load_demonstrations(path, "", rewards.TASKS)
    assert len(back) == 3 and all(d.task == "vd" and d.sample.query in d.completion for d in back)
    stages.main(stages.parse(["longest", "--demonstrations", str(path), "--output", str(tmp_path / "half.jsonl")]))
    half = load_demonstrations(tmp_path / "half.jsonl", "", rewards.TASKS)
    assert len(half) == 2 and {d.completion for d in half} <= {d.completion for d in back}


def test_the_options_of_a_stage_reach_it(tmp_path):
    def rows(*argv):
        stages.main(stages.parse([*map(str, argv), "--output", str(tmp_path / "out")]))
        text = (tmp_path / "out").read_text(encoding="utf-8")
        return json.loads(text) if argv[0] == "difficulty" else [json.loads(line) for line in text.splitlines()]

    lines = [rollout(["2 to 3", "2 to 3.5"], "2 to 4"), rollout(["4 to 8", "3 to 6"], "2 to 6"),  # IoU 1/2, then 1
             rollout(["2 to 3", "2 to 4", "2 to 5"], "2 to 5.5"), rollout(["2 to 3", "2 to 4", "2 to 5"], "2 to 6")]
    write_lines(tmp_path / "rollouts.0.jsonl", lines)
    for options, kept in (([], [0, 1, 2, 3]), (["--min-iou", 0.6], [1, 2, 3]), (["--min-anchors", 3], [2, 3]),
                          (["--keep", 2], [0, 2])):
        assert [row["completion"] for row in rows("anchors", "--rollouts", tmp_path, *options)] == [
            lines[i]["completion"] for i in kept]
    assert len(rows("longest", "--demonstrations", tmp_path / "rollouts.0.jsonl", "--share", 0.75)) == 3
    windows = "--annotations", ROWS / "qvhighlights.jsonl"  # of four queries two have a single window
    assert [len(rows("invert-sft", *windows, *options)) for options in ([], ["--windows", "single"])] == [6, 2]

    single = load_annotations(ROWS / "qvhighlights.jsonl", "", "single")
    write_lines(tmp_path / "predictions.0.jsonl", [
        prediction(i, 0.5, s.query, truth=[s.start, s.end]) | {"error": None} for i, s in enumerate(single)])
    assert len(rows("difficulty", *windows, "--predictions", tmp_path, "--windows", "single")) == 2
    samples = load_annotations(ROWS / "charades_sta.txt", "")
    write_lines(tmp_path / "predictions.0.jsonl", [
        prediction(i, i / 6, s.query, truth=[s.start, s.end]) | {"error": None} for i, s in enumerate(samples)])
    for options in ({"keep": 2}, {"keep": 3, "choose": "gaussian"}, {"keep": 3, "choose": "gaussian", "seed": 6}):
        argv = [word for name, value in options.items() for word in (f"--{name}", value)]
        found = rows("difficulty", "--annotations", ROWS / "charades_sta.txt", "--predictions", tmp_path,
                     "--difficulty", 0, 1, *argv)
        expected = stages.choose_rows(np.arange(6) / 6, 0, 1, **options)
        assert [row["difficulty"] for row in found] == [round(100 * i / 6, 2) for i in expected], options
        back = load_annotations(tmp_path / "out", "")  # as training reads it
        assert [(s.video, s.query, s.start, s.end) for s in back] == [
            (s.video, s.query, s.start, s.end) for s in (samples[i] for i in expected)]


@pytest.mark.parametrize("argv, words", [
    (["difficulty", "--annotations", "a", "--predictions", "p", "--output", "o", "--difficulty", "0.7", "0.1"],
     "no band"),
    (["difficulty", "--annotations", "a", "--predictions", "p", "--output", "o", "--difficulty", "10", "70"],
     "--difficulty: it is 10"),
    (["longest", "--demonstrations", "d", "--output", "o", "--share", "0"], "--share: it is 0"),
    (["anchors", "--rollouts", "r", "--output", "o", "--min-anchors", "1"], "--min-anchors: it is 1"),
    (["anchors", "--rollouts", "r", "--output", "o", "--min-iou", "x"], "--min-iou"), (["anchors"], "--rollouts"),
    (["anchors", "--rollouts", "r", "--output", "o", "--keep", "-3"], "--keep: it is -3"),
    (["other"], "'other'"), ([], "STAGE")])
def test_a_wrong_option_is_one_sentence(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        stages.parse(argv)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and words in message and message.count("\n") == 1


@pytest.mark.parametrize("line", [
    '{"a": 1}', '[{}]', "{broken}", '{"video": 1, "query": 1, "task": 1, "completion": 1}'])
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


def test_stages_are_a_program(tmp_path, monkeypatch, capsys):
    def run(annotations):
        monkeypatch.setattr(sys, "argv", ["stages", "invert-sft", "--annotations", str(annotations), "--output",
                                          str(tmp_path / "demos.jsonl")])
        monkeypatch.delitem(sys.modules, "papers.stages", raising=False)
        runpy.run_module("papers.stages", run_name="__main__")  # what python -m does

    run(ROWS / "charades.json")
    assert "6 rows, 3 with start < end" in capsys.readouterr().out
    assert len(load_demonstrations(tmp_path / "demos.jsonl", "", rewards.TASKS)) == 3
    with pytest.raises(SystemExit, match="papers.stages: .*none.json"):
        run(tmp_path / "none.json")


def test_an_iou_at_the_threshold_is_enough():
    rows = [rollout(["2 to 3", "2 to 4"], "2 to 4"), rollout(["2 to 3", "2 to 3.9"], "2 to 3.9")]  # 1/2, less
    kept, _ = stages.select_anchors(rows, min_iou=0.5)
    assert [row["completion"] for row in kept] == [rows[0]["completion"]]


@pytest.mark.parametrize("name", ["completion", "solution"])
def test_demonstrations_with_the_field_names_of_tvg_r1_are_read(name, tmp_path):
    row = {"dataset": "charades", "problem": "A door.", "choices": "", "video": "x/AO8RW.mp4", "video_length": 30.5,
           "gt_frame": [1, 2.5], "ground_truth": "", name: "<think>a</think> <time>[1, 2.5]</time>"}
    (tmp_path / "cold.jsonl").write_text(json.dumps(row) + "\n")
    sample = Sample(str(Path("v/AO8RW.mp4")), "a door", 1.0, 2.5, 30.5, "line 1")
    assert load_demonstrations(tmp_path / "cold.jsonl", "v", rewards.TASKS, stages.from_tvg_r1) == [
        Demonstration(sample, "tvg", row[name])]
