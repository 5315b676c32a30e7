"""rewards.py: the paper's examples worked by hand, what is read and what is not, and the known ways to cheat."""

import string
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from data import Sample
from engine.program.settings import UserError
from engine.words.verbs import cosine_similarity, mask_verbs, verbs
from rewards import (
    FORMATS,
    Scoring,
    ar_reward,
    described_verbs,
    fill_blanks,
    format_reward,
    is_well_formed,
    parse_answer,
    parse_span,
    score,
    suitable,
    temporal_iou,
    vc_reward,
    vd_reward,
)

DOOR = "person closed the door"
WALK = "a person walks away and laughs"
COMMON = ("open put take eat sit close hold run turn start drink throw begin walk laugh look sneeze stand undress "
          "smile pour watch wash fix dress awaken cook read play get snuggle tidy talk lay lie see continue work grab "
          "leave go use remove proceed pick try come do stop flip").split()
BINARY, COSINE, ANSWER_ALONE = Scoring(), Scoring(inversion_reward="cosine"), Scoring(inversion_format="answer")


def sample(query=DOOR, start=2.0, end=6.0):
    return Sample("a.mp4", query, start, end)


def thought(answer):
    return f"<think>The person is at the door.</think> <answer>{answer}</answer>"


# ---- Reading a completion

@pytest.mark.parametrize("completion", [
    "<think>a</think> <answer>b</answer>", "<think>a</think><answer>b</answer>",
    " \n<think>\na\nb\n</think>\n\n<answer>\nb\n</answer>\n ", "<think>a < b > c</think> <answer>b</answer>"])
def test_well_formed_completions(completion):
    assert is_well_formed(completion, FORMATS["think"]) and parse_answer(completion) == "b"
    assert format_reward("vc", completion) == 1
    assert format_reward("vc", completion, ANSWER_ALONE) == 0


@pytest.mark.parametrize("completion, answer", [
    ("", None), ("b", None), ("<think>a</think> b", None), ("<answer>b", None), ("b</answer>", None),
    ("</answer>b<answer>", None), ("<answer>b</answer>", "b"), ("<think></think> <answer>b</answer>", "b"),
    ("<think> \n</think> <answer>b</answer>", "b"), ("<think>a</think> <answer> </answer>", ""),
    ("<think>a</think> <answer>b</answer> c", "b"), ("c <think>a</think> <answer>b</answer>", "b"),
    ("<think>a</think> c <answer>b</answer>", "b"), ("<answer>b</answer> <think>a</think>", "b"),
    ("<think>a</think> <answer>a</answer> <answer>b</answer>", "b"),
    ("<think>a</think> <answer>b</answer> <answer>c", "b"), ("<think>a</think> <answer>b</answer></answer>", "b"),
    ("<think>a<think>a</think></think> <answer>b</answer>", "b"), ("<think>a</think> <answer><think>b</answer>", "b"),
    ("<think><answer>a</answer></think> <answer>b</answer>", "b"), ("<answer>a<answer>b</answer></answer>", "b")])
def test_malformed_completions_keep_their_last_answer(completion, answer):
    assert not is_well_formed(completion, FORMATS["think"]) and parse_answer(completion) == answer
    assert format_reward("vc", completion) == 0


def test_the_released_format_is_an_answer_alone():
    assert format_reward("vc", " <answer>b</answer>\n", ANSWER_ALONE) == 1
    assert format_reward("vc", "<answer>b</answer> c", ANSWER_ALONE) == 0
    assert format_reward("vc", "<answer> </answer>", ANSWER_ALONE) == 0
    assert format_reward("tvg", "<answer>1 to 2</answer>", ANSWER_ALONE) == 0  # grounding still thinks


def test_grounding_format_needs_a_span():
    assert format_reward("tvg", thought("2.5 to 6")) == 1
    assert format_reward("tvg", thought("at the end")) == 0
    assert format_reward("vd", thought("at the end")) == 1


@pytest.mark.parametrize("answer, span", [
    ("2.5 to 6", (2.5, 6)), ("12.5s to 17s", (12.5, 17)), ("12  to\n 17", (12, 17)), ("12 sec to 17 seconds", (12, 17)),
    ("between 3 and 5.", (3, 5)), ("From 3 TO 5, then it stops", (3, 5)), ("[3.0 to 5.0]", (3, 5)), ("07 to 9", (7, 9)),
    ("1 to 2, or rather 3 to 4", (3, 4)), ("9 to 4", (9, 4)), ("0 to 0", (0, 0)), ("1 second to 2 secs", (1, 2)),
    ("123456 to 234567.5", (123456, 234567.5)), ("[ 123456, 234567.5]", (123456, 234567.5))])
def test_spans_that_are_read(answer, span):
    assert parse_span(thought(answer)) == span
    assert parse_span(f"<answer>{answer}</answer>") == span  # format is judged apart


@pytest.mark.parametrize("answer", [
    "01:12 to 01:30", "12 to 01:30", "1:12 to 15", "-3 to 5", "−3 to 5", "3 to -5", "1,200.5 to 1,300", "1e999 to 5",
    "5 to 1e3", "10% to 20%", "10 to 20%", "10 to 20 %", "nan to 3", "inf to 3", "3 to nan", ".5 to 3", "1.2.3 to 4",
    "3 to 4.5.6", "a1 to 4", "1 to 4b", "3/4 to 5", "10-12 to 15", "1 to 2-3", "1 to 2 minutes", "1 min to 2 min",
    "3 - 5", "3 5", "3to5", "٣ to ٥", "３ to ５", "1２ to 3", "3 to 5５", "1234567 to 5", "", "to", "3 to", "to 5"])
def test_spans_that_are_not_read(answer):
    assert parse_span(thought(answer)) is None


def test_a_span_outside_the_answer_is_not_read():
    assert parse_span("It lasts 3 to 5 seconds.") is None
    assert parse_span("<think>3 to 5</think> <answer>the start</answer> 3 to 5") is None
    assert parse_span("<answer>1 to 2</answer> <answer>unsure</answer>") is None


# ---- Eq. 8 and 10

@pytest.mark.parametrize("a, b, iou", [
    ((0, 4), (2, 6), 2 / 6), ((2, 6), (2, 6), 1), ((0, 10), (4, 6), 0.2), ((0, 2), (2, 4), 0), ((0, 1), (5, 6), 0),
    ((6, 2), (2, 6), 0), ((2, 6), (6, 2), 0), ((3, 3), (3, 3), 0), ((3, 3), (2, 6), 0),
    ((float("nan"), 3), (2, 6), 0)])
def test_iou_by_hand(a, b, iou):
    assert temporal_iou(a, b) == pytest.approx(iou, abs=1e-12)


seconds = st.integers(0, 120).map(lambda quarter: quarter / 4)


@given(st.tuples(seconds, seconds), st.tuples(seconds, seconds))
def test_iou_equals_a_count_of_grid_cells(a, b):
    cells = np.arange(0, 30, 0.25) + 0.125  # each span covers whole cells of a quarter of a second
    in_a, in_b = ((start < cells) & (cells < end) for start, end in (a, b))
    valid = a[0] < a[1] and b[0] < b[1]
    assert temporal_iou(a, b) == pytest.approx((in_a & in_b).sum() / (in_a | in_b).sum() if valid else 0, abs=1e-9)


@given(*[st.tuples(*[st.floats(-1e9, 1e9) | st.just(float("nan"))] * 2)] * 2)
def test_iou_is_symmetric_and_within_bounds(a, b):
    assert 0 <= temporal_iou(a, b) <= 1
    assert temporal_iou(a, b) == temporal_iou(b, a)


def test_grounding_adds_format_and_iou():
    assert score("tvg", thought("4 to 8"), sample()) == {"format": 1, "iou": 2 / 6, "total": 1 + 2 / 6}
    assert score("tvg", "<answer>4 to 8</answer>", sample()) == {"format": 0, "iou": 2 / 6, "total": 2 / 6}
    assert score("tvg", thought("6 to 2"), sample()) == {"format": 1, "iou": 0, "total": 1}


def test_of_several_segments_the_best_counts():
    one = Sample("a.mp4", "q", 0.0, 2.0, alternatives=((10.0, 14.0), (20.0, 21.0)))
    for answer, iou in [("0 to 2", 1), ("11 to 13", 1 / 2), ("10 to 21", 4 / 11), ("30 to 40", 0)]:
        parts = score("tvg", thought(answer), one)
        assert parts["iou"] == pytest.approx(iou) and parts["total"] == pytest.approx(1 + iou)
    # The IoU decides also where a reward would pay more for another segment: here the shorter one, 1 + 10 - 3.
    def short(completion, sample, well_formed):
        parts = rewards.iou_reward(completion, sample, well_formed)
        return parts | {"total": well_formed + 10 - (sample.end - sample.start)}

    one = Sample("a.mp4", "q", 0.0, 8.0, 10.0, alternatives=((2.0, 5.0),))
    parts = score("tvg", thought("0 to 5"), one, Scoring(grounding=rewards.IOU._replace(reward=short)))
    assert parts == {"format": 1, "iou": 5 / 8, "total": 1 + 10 - 8}


# ---- Eq. 5, verb completion

@pytest.mark.parametrize("answer", [
    "Person [closes] the door", "person closed the door", "PERSON [ closing ]  the door.", "person closes the door!",
    "Person [is closing] the door", '"Person [has closed] the door."', "A man closes it",  # the last ones by the tagger
    "they [close] it"])  # which finds no verb between brackets
def test_completion_in_any_tense_is_rewarded(answer):
    assert vc_reward(answer, DOOR, BINARY) == 1


@pytest.mark.parametrize("answer", [
    "person [opens] the door", "person [] the door", "the door", "", "close the door and close the window",
    "person [closes opens] the door", "person [closes, opens] the door", "person [is] the door"])
def test_completion_with_other_verbs_is_not_rewarded(answer):
    assert vc_reward(answer, DOOR, BINARY) == 0


def test_completion_keeps_the_order_of_verbs():
    assert vc_reward("a person walked away and laughed", WALK, BINARY) == 1
    assert vc_reward("a person laughs away and walks", WALK, BINARY) == 0
    assert vc_reward("a person walks away", WALK, BINARY) == 0


def test_a_filled_frame_counts_where_the_tagger_misses_the_verb():
    query, answer = "person opening box", "person open box"
    assert mask_verbs(query) == ("person [] box", ("open",)) and verbs(answer) == []
    assert vc_reward(answer, query, BINARY) == 1


@pytest.mark.parametrize("answer", [
    "person open box (red)", "Person  [OPENED]\n box (red).", "person [ is opening ] box (red)!",
    '"person [has been opened] box (red)."', "person will have been opening box (red)"])
def test_a_filled_frame_is_recognised(answer):
    assert fill_blanks(answer, "person [] box (red).") == ["open"]


@pytest.mark.parametrize("answer", [
    "person [open close] box (red)", "person open box red", "person open box", "a person open box (red)",
    "person box (red)", "person [] box (red)", "person open box (red) close", "",
    "person [is was is was open] box (red)"])
def test_an_unfilled_frame_is_not(answer):
    assert fill_blanks(answer, "person [] box (red).") == []


def test_auxiliaries_of_two_blanks():
    assert fill_blanks("she has been walking and is laughing", "she [] and []") == ["walk", "laugh"]
    assert fill_blanks("she has a dog", "she [] a dog") == ["have"]


@pytest.mark.parametrize("blank, extra", [
    ("[close]", " " + " ".join(COMMON)), ("close", ", " + ", ".join(COMMON)), (" ".join(COMMON[:15]), ""),
    ("[" + ", ".join(COMMON[:15]) + "]", ""), ("/".join(COMMON[:15]), "")])
def test_lists_of_verbs_complete_nothing(blank, extra):
    assert vc_reward(f"person {blank} the door{extra}", DOOR, BINARY) == 0


# ---- Eq. 6, action recognition

@pytest.mark.parametrize("answer", ["walk", "Walking", "laughed.", '"walks"', " [laugh] ", "**walk**", "‘walk’"])
def test_any_verb_of_the_query_is_recognised(answer):
    assert ar_reward(answer, WALK, BINARY) == 1


@pytest.mark.parametrize("answer", [
    "run", "away", "walk away", "walk, laugh", "walk/laugh", "walk,laugh", "", ".", "a"])
def test_other_answers_are_not_recognised(answer):
    assert ar_reward(answer, WALK, BINARY) == 0


@pytest.mark.parametrize("verb", ["open", "sneeze", "ride", "dress", "pass", "scrape", "hope", "stare"])
def test_a_lone_verb_needs_no_context(verb):
    assert ar_reward(verb, f"a person {verb}s it" if verb[-1] != "s" else f"a person {verb}es it", BINARY) == 1


# ---- Eq. 7, video description

def test_a_description_holds_the_verb():
    assert vd_reward("A person jumps and laughs", "a person jumps", BINARY) == 1
    assert vd_reward("A person was jumping", "a person jumps", BINARY) == 1
    assert vd_reward("A person laughs", "a person jumps", BINARY) == 0
    assert vd_reward("", "a person jumps", BINARY) == 0


def test_queries_in_other_languages_or_without_a_verb_suit_grounding_alone():
    queries = [DOOR, "öffnet die tür", "a red door", WALK]
    assert {task: suitable(task, queries) for task in rewards.TASKS} == {
        "tvg": [True] * 4} | dict.fromkeys(("vc", "ar", "vd"), [True, False, False, True])


def test_all_or_any_of_several_verbs():
    assert vd_reward("A person laughs", WALK, BINARY) == 0
    assert vd_reward("A person laughs", WALK, Scoring(vd_match="any")) == 1
    assert vd_reward("A person jumps", WALK, Scoring(vd_match="any")) == 0
    assert vd_reward("He laughs and then he walks", WALK, BINARY) == 1


def test_a_cap_counts_distinct_verbs():
    answer = "A person walks, walks and laughs"
    assert len(described_verbs(answer)) == 2
    assert vd_reward(answer, WALK, Scoring(vd_verb_cap=2)) == 1
    assert vd_reward(answer, WALK, Scoring(vd_verb_cap=1)) == 0


def test_the_number_of_verbs_is_logged_and_not_added():
    parts = score("vd", thought("A person walks and laughs"), sample(WALK))
    assert parts == {"format": 1, "vd": 1, "vd_verbs": 2, "total": 2}


# ---- Eq. 11 and the variants

@pytest.mark.parametrize("task, answer", [("vc", "a person walks away and laughs"), ("ar", "walk"),
                                          ("vd", "a person walks and laughs")])
def test_inversion_adds_format_and_reward(task, answer):
    parts = score(task, thought(answer), sample(WALK))
    assert (parts["format"], parts[task], parts["total"]) == (1, 1, 2)
    parts = score(task, f"<answer>{answer}</answer>", sample(WALK))
    assert (parts["format"], parts[task], parts["total"]) == (0, 1, 1)
    parts = score(task, f"<answer>{answer}</answer>", sample(WALK), Scoring(inversion_format="answer"))
    assert (parts["format"], parts[task], parts["total"]) == (1, 1, 2)
    assert score(task, thought("jump"), sample(WALK))["total"] == 1
    assert score(task, answer, sample(WALK))["total"] == 0


@pytest.mark.parametrize("task", ["vc", "ar", "vd"])
@pytest.mark.parametrize("inversion_reward", ["binary", "cosine"])
def test_silence_earns_nothing_where_the_query_has_no_verb(task, inversion_reward):
    for answer in ("a red door", "door"):
        parts = score(task, thought(answer), sample("a red door"), Scoring(inversion_reward=inversion_reward))
        assert (parts["format"], parts[task], parts["total"]) == (1, 0, 1)


def test_an_unknown_task_or_setting_is_named():  # unknown values of settings: see test_runtime.py
    with pytest.raises(UserError, match="task tgv: is not among vc, ar, vd"):
        score("tgv", "", sample())
    with pytest.raises(TypeError, match="inversion_fromat"):
        score("vd", "", sample(), Scoring(inversion_fromat="think"))


def test_where_no_segment_overlaps_the_one_with_the_highest_total_counts():
    def near(completion, sample, well_formed):
        return {"iou": 0.0, "total": well_formed + 1 / sample.start}

    two = Sample("a.mp4", DOOR, 10.0, 11.0, alternatives=((4.0, 5.0), (8.0, 9.0)))
    assert score("tvg", thought("1 to 2"), two, Scoring(grounding=rewards.IOU._replace(reward=near)))["total"] == 1.25


def test_cosine_rewards_by_hand():
    close = cosine_similarity("open", "close")
    assert vc_reward("person [opens] the door", DOOR, COSINE) == pytest.approx(close)
    assert vc_reward("person opens and opens the door", DOOR, COSINE) == 0  # two verbs for one
    half = cosine_similarity("sit", "laugh")
    assert vc_reward("a person walks away and sits", WALK, COSINE) == pytest.approx((1 + half) / 2)
    assert ar_reward("run", WALK, COSINE) == max(cosine_similarity("run", v) for v in ("walk", "laugh")) > 0
    predicted = {"run", "walk"}
    expected = [1, max(cosine_similarity(p, "laugh") for p in predicted)]
    answer = "a person runs and a person walks"
    assert described_verbs(answer) == predicted and expected[1] < 1
    assert vd_reward(answer, WALK, COSINE) == pytest.approx(sum(expected) / 2)
    assert vd_reward(answer, WALK, Scoring(inversion_reward="cosine", vd_match="any")) == 1


def test_cosine_raises_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # spaCy's W007 among them
        for task in ("vc", "ar", "vd"):
            score(task, thought("a person sits"), sample(), Scoring(inversion_reward="cosine"))


# ---- Whatever a model writes

ODD = ["", "\0", "a\0b", "\ud800", "walk\udfff", "nan", "1e999 to 5", "走る 走る", "🚪", "[" * 50, "[]" * 20, "((((*",
       "\\1", "walk\u200b", "\u202ewalk", "İ", "<answer><answer>", "</think><think>"]


@pytest.mark.parametrize("text", ODD)
@pytest.mark.parametrize("task", rewards.TASKS)
def test_odd_text_is_scored(task, text):
    for completion in (text, thought(text)):
        for inversion_reward in ("binary", "cosine"):
            assert 0 <= score(task, completion, sample(), Scoring(inversion_reward=inversion_reward))["total"] <= 2


@pytest.mark.parametrize("query", ["\ud800", "[] []", "person [] (*+ walks", "\0 walks", "walk walk walk"])
def test_odd_queries_are_scored(query):
    for task in ("vc", "ar", "vd"):
        assert 0 <= score(task, thought("a person walks"), sample(query))["total"] <= 2


words = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<ANSWER>", "< answer>", "<answer", " ", "\n",
                         "3", "to", "5.5", "person", "closes", "[closed]", "[]", "the", "door", "nan", ".", "走"])
texts = st.one_of(st.text(st.characters()), st.text(string.printable), st.lists(words, max_size=20).map(" ".join),
                  st.lists(words, max_size=20).map("".join))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(rewards.TASKS), texts, st.booleans(), st.sampled_from(["binary", "cosine"]),
       st.sampled_from(["think", "answer"]), st.sampled_from(["all", "any"]))
def test_score_never_raises_and_stays_within_bounds(task, text, wrap, inversion_reward, inversion_format, match):
    parts = score(task, thought(text) if wrap else text, sample(), Scoring(inversion_format=inversion_format,
                  inversion_reward=inversion_reward, vd_match=match))
    name = "iou" if task == "tvg" else task
    assert parts["format"] in (0, 1) and 0 <= parts[name] <= 1 and parts["total"] == parts["format"] + parts[name]
    assert all(type(part) is float for part in parts.values())


@given(st.lists(words, max_size=12).map("".join))
def test_a_well_formed_completion_has_an_answer(text):
    for form in FORMATS.values():
        assert parse_answer(text) or not is_well_formed(text, form)


def test_an_over_long_answer_scores_zero_and_is_not_tagged(tagged):
    mask_verbs(DOOR)
    tagged.clear()
    frame = "person closes the door"
    assert vc_reward(frame + " now" * 97, DOOR, BINARY) == 0 and tagged == []  # 101 words
    assert vc_reward(frame + " " + "x" * 1000, DOOR, BINARY) == 0 and tagged == []
    assert vc_reward(frame + " now" * 96, DOOR, BINARY) == 1 and len(tagged) == 1  # 100 words
    assert ar_reward("close" + "e" * 1000, DOOR, COSINE) == 0 < ar_reward("close" + "e" * 900, DOOR, COSINE)


def test_a_description_is_read_to_its_hundredth_word(tagged):
    mask_verbs(DOOR)
    tagged.clear()
    assert vd_reward("well " * 95 + "a person closes the door", DOOR, BINARY) == 1  # "closes" is word 98
    assert vd_reward("well " * 100 + "a person closes the door", DOOR, BINARY) == 0
    assert vd_reward("person " * 100_000, DOOR, BINARY) == 0
    assert all(len(text.split()) <= 100 and len(text) <= 1000 for text in tagged) and len(tagged) == 3


@pytest.mark.parametrize("text", [
    "<think>" * 100_000, "<answer>" * 100_000 + "</answer>" * 100_000, "</think> <answer>" * 50_000,
    thought("9" * 100_000), thought("1" + " " * 100_000), thought("1 to " * 50_000), thought("1." * 100_000 + " to 3"),
    thought("0." + "1" * 100_000 + " to 3"), thought("[]" * 50_000), thought("close " * 50_000), thought("is " * 90)])
def test_long_texts_are_bounded(text, tagged):
    for task in rewards.TASKS:  # a pattern of quadratic time would take minutes here: the suite would not end
        assert 0 <= score(task, text, sample())["total"] <= 2
    assert sum(map(len, tagged)) <= 2 * rewards.MAX_CHARACTERS + len(DOOR)


# ---------------------------------------------------------------------------------------------- slips that once passed


def test_two_words_are_no_answer_even_where_similar_ones_count():
    cosine = Scoring(inversion_reward="cosine")
    assert ar_reward("strolls", WALK, cosine) > 0
    assert ar_reward("walk away", WALK, cosine) == 0
