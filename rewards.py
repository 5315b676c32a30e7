"""What a completion is worth: format, temporal IoU, and the three inversion rewards of Invert4TVG (Eq. 5 to 11).

    tvg  temporal video grounding   IoU of the predicted and the annotated segment                Eq. 8, 10
    vc   verb completion            "person [] the door", completed with the query's verbs        Eq. 5, 11
    ar   action recognition         one word, a verb of the query                                 Eq. 6, 11
    vd   video description          a text that holds the query's verbs                           Eq. 7, 11

In this order: how two verbs compare, grounding, the three inversions, the reward of a whole completion, and how a
completion is read. Each task adds a format reward (Eq. 9).

Verbs are compared as roots: "closes" and "closed" have the root "close". SpaCy(.) in the paper is `root` here;
engine/words/verbs.py has it, with `verbs` of a text and `mask_verbs` of a query.

This file knows text, not tensors. No text that a model writes raises an error, and the work per answer is bounded:
patterns run in linear time, and at most 100 words reach spaCy.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from engine.program.lookup import look_up
from engine.words.english import looks_english
from engine.words.verbs import cosine_similarity, fill_blanks, mask_queries, mask_verbs, root, verbs

Span = tuple[float, float]  # start and end in seconds

# An answer to VC or AR that is longer scores 0: a sentence or a word was asked for. Of a description, which may well be
# long, the rest is not read.
MAX_WORDS = 100
MAX_CHARACTERS = 1000
QUOTES_AND_STOPS = " \t\n.,;:!?\"'`*()[]“”‘’"


class Similarity(NamedTuple):
    """How two roots compare, and how the comparisons of several verbs become one number."""

    compare: Callable  # (root, root) -> 0 to 1
    combine: Callable  # list of these -> 0 to 1


SIMILARITIES = {
    "binary": Similarity(lambda a, b: float(a == b), min),  # the paper's: 1 only if every verb matches
    "cosine": Similarity(cosine_similarity, np.mean),  # the variant of Table 3
}

# ------------------------------------------------------------------------------------------------ grounding


def temporal_iou(a: Span, b: Span) -> float:
    """Intersection over union of two segments; 0 if either is empty or reversed (Eq. 8)."""
    a_start, a_end = a
    b_start, b_end = b
    if not (a_start < a_end and b_start < b_end):
        return 0.0
    intersection = max(0.0, min(a_end, b_end) - max(a_start, b_start))
    union = max(a_end, b_end) - min(a_start, b_start)  # with the gap, where there is one; the ratio is 0 then anyway
    return float(intersection / union)  # Eq. 8


def iou_reward(completion: str, sample, well_formed: float) -> dict[str, float]:
    """Format plus IoU (Eq. 10). `sample` is a data.Sample."""
    span = parse_span(completion)
    iou = temporal_iou(span, (sample.start, sample.end)) if span else 0.0
    return {"format": well_formed, "iou": iou, "total": well_formed + iou}  # Eq. 10


class Format(NamedTuple):
    """How a completion is laid out: the prompt's words for it, and the blocks that make it well-formed (Eq. 9)."""

    blocks: tuple[str, ...]  # tags in order; the last one holds the answer
    preamble: str  # how the prompt's last sentence begins; the task's instruction ends it
    free_text: bool = False  # whether text may stand between and after the blocks


FORMATS = {
    "think": Format(("think", "answer"), "Output your thought process within the <think> </think> tags, then "),
    "answer": Format(("answer",), ""),
}


class Grounding(NamedTuple):
    """What --tvg-reward names. In training a sample has start < end, in an evaluation it may have any times."""

    instruction: str  # the prompt goes on with "within the <answer> </answer> tags."
    format: Format
    reward: Callable  # (completion, sample, 1 if well-formed else 0) -> parts, "iou" and "total" among them
    metrics: Callable = lambda parts: {}  # a row's parts -> its further columns of an evaluation, in percent
    needs_duration: bool = False  # samples without a known video duration are dropped from training


# The paper prints no prompt for grounding. The words are Time-R1's, the paper's baseline.
TVG_QUESTION = (
    'To accurately pinpoint the event "{query}" in the video, determine the precise time period of the event.')
IOU = Grounding('provide the start and end times in seconds, in the format "12.54 to 17.83",', FORMATS["think"],
                iou_reward)


class Scoring(NamedTuple):
    """The settings of `score`. Each is an option of the command line."""

    grounding: Grounding = IOU  # --tvg-reward, in the format of --tvg-format
    inversion_format: str = "think"  # a key of FORMATS
    inversion_reward: str = "binary"  # a key of SIMILARITIES
    vd_match: str = "all"  # or "any"
    vd_verb_cap: int = 0  # most distinct verbs of a description; 0: no limit


DEFAULTS = Scoring()

# ------------------------------------------------------------------------------------------------ inversions
#
# mask_verbs("person is closing the door") gives ("person is [] the door", ("close",)): the query with [] for each verb,
# auxiliaries left alone, and the roots of its verbs in order, the gold verbs.


def vc_reward(answer: str, query: str, scoring: Scoring) -> float:
    """Verb completion (Eq. 5): 1 if the answer's verbs v_pred have the roots of the query's verbs v_gt, in order.

    The answer is read in two ways, and the better one counts. (1) If it repeats the words around the blanks, its verbs
    are the words in their place; the tagger would miss some of them. (2) In any other sentence its verbs are those that
    the tagger finds. Either way there must be as many verbs as the query has, so extra verbs earn nothing.
    """
    masked_query, gold = mask_verbs(query)
    if not gold or is_too_long(answer):
        return 0.0
    from_blanks = fill_blanks(answer, masked_query)
    from_tagger = verbs(re.sub(r"[\[\]]", " ", answer))  # some models keep the brackets: "person [opens] the door"
    similarity = SIMILARITIES[scoring.inversion_reward]

    def in_order(predicted):
        if len(predicted) != len(gold):
            return 0.0
        return float(similarity.combine([similarity.compare(p, g) for p, g in zip(predicted, gold)]))

    return max(in_order(from_blanks), in_order(from_tagger))  # Eq. 5


def ar_reward(answer: str, query: str, scoring: Scoring) -> float:
    """Action recognition (Eq. 6): 1 if the answer is one word whose root is in S_gt, the roots of the query's verbs."""
    _, gold = mask_verbs(query)
    word = answer.strip(QUOTES_AND_STOPS)
    if is_too_long(answer) or len(word.split()) != 1:
        return 0.0
    similarity = SIMILARITIES[scoring.inversion_reward]
    return max((similarity.compare(root(word), g) for g in gold), default=0.0)  # Eq. 6


def vd_reward(answer: str, query: str, scoring: Scoring) -> float:
    """Video description (Eq. 7): 1 if the query's verbs v_gt are in S_pred, the roots of the answer's verbs.

    Paper: "the verb" in Eq. 7, "verbs" in the text. With several, vd_match "all" asks for each, "any" for one of them.
    Paper: an answer may name any number of verbs, so a list of common ones scores. A vd_verb_cap forbids that: an
    answer with more distinct verbs scores 0.
    """
    _, gold = mask_verbs(query)
    predicted = described_verbs(answer)
    if not gold or not predicted:
        return 0.0
    if scoring.vd_verb_cap and len(predicted) > scoring.vd_verb_cap:
        return 0.0
    similarity = SIMILARITIES[scoring.inversion_reward]
    nearest = [max(similarity.compare(p, g) for p in predicted) for g in gold]  # to each gold verb
    combine = max if scoring.vd_match == "any" else similarity.combine
    return float(combine(nearest))  # Eq. 7


@functools.lru_cache(maxsize=64)  # the reward and the log ask for the same answer one after the other
def described_verbs(answer: str) -> frozenset[str]:
    """S_pred of Eq. 7: the set of roots in the first hundred words of a description."""
    return frozenset(verbs(" ".join(answer[:MAX_CHARACTERS].split()[:MAX_WORDS])))


def is_too_long(answer: str) -> bool:
    return len(answer) > MAX_CHARACTERS or len(answer.split()) > MAX_WORDS


def has_verb(query: str) -> bool:
    """Whether a query has a verb, and is English: spaCy's English model takes "die" of "öffnet die tür" for one.

    Other queries are never used for inversion; if one without a verb is scored anyway, it gets 0.
    """
    _, gold = mask_verbs(query)
    return bool(gold) and looks_english(query)


class Inversion(NamedTuple):
    """An inversion task. One of your own is named by its place, MODULE.NAME: --inversion-tasks vc ar mine.object."""

    question: str  # {masked_query} is the first of what `mask` returns
    instruction: str  # as in Grounding
    reward: Callable  # (answer, query, scoring) -> 0 to 1
    suits: Callable = has_verb  # query -> whether the task can be asked about it
    logged: dict = {}  # name -> function of the answer: a number for the log and the metrics, no part of the reward
    mask: Callable = mask_verbs  # query -> (the query with [] for each gold word, gold words)


INVERSIONS = {
    "vc": Inversion("Add a verb for the event '{masked_query}' based on the video.", "provide the completed sentence",
                    vc_reward),
    "ar": Inversion("Use a verb to describe the event based on the video.", "provide the verb, a single word,",
                    ar_reward),
    "vd": Inversion("Describe what people have done based on the video.", "provide the description in one sentence",
                    vd_reward, logged={"vd_verbs": lambda answer: len(described_verbs(answer))}),
}
TASKS = ("tvg", "vc", "ar", "vd")  # the paper's, trained and measured by default; others are asked for by name


# ------------------------------------------------------------------------------------------------ a whole completion


def inversion(task: str, option: str = "task") -> Inversion:
    """The inversion task of a name, in INVERSIONS or at MODULE.NAME. Raises UserError where there is none."""
    return look_up(option, task, INVERSIONS, Inversion)


def any_task(task: str, option: str = "task") -> Inversion | Grounding:
    """Grounding for "tvg", else the inversion task of a name. Raises UserError where there is none."""
    return look_up(option, task, {"tvg": IOU} | INVERSIONS, Inversion)


def grounding(name: str, option: str = "reward") -> Grounding:
    """What grounding asks for and rewards, by name: "iou" or MODULE.NAME. Raises UserError where there is none."""
    return look_up(option, name, {"iou": IOU}, Grounding)


def suitable(task: str, queries: list[str]) -> list[bool]:
    """Which queries a task can be asked about: all for grounding, those that the inversion's `suits` accepts."""
    if task == "tvg":
        return [True] * len(queries)
    mask_queries(queries)  # one pass of spaCy fills the cache of mask_verbs
    suits = inversion(task).suits
    return [bool(suits(query)) for query in queries]


def score(task: str, completion: str, sample, scoring: Scoring = DEFAULTS) -> dict[str, float]:
    """The parts of a completion's reward by name, and their sum "total": by default 0 to 2 (Eq. 10, 11).

    `sample` is a data.Sample. Where several segments answer its query, the one with the highest IoU counts, as in a
    measurement; of equal ones that with the highest total. What a task logs is among the parts and not in the sum, such
    as "vd_verbs", the distinct verbs of a description: it rises where a model lists verbs. Raises UserError for an
    unknown task.
    """
    well_formed = format_reward(task, completion, scoring)
    if task == "tvg":
        parts = [scoring.grounding.reward(completion, one, well_formed) for one in sample.by_segment()]  # Eq. 10
        return max(parts, key=lambda p: (p["iou"], p["total"]))
    answer = parse_answer(completion) or ""
    reward = inversion(task).reward(answer, sample.query, scoring)
    logged = {name: float(count(answer)) for name, count in inversion(task).logged.items()}
    return {"format": well_formed, task: reward} | logged | {"total": well_formed + reward}  # Eq. 11


# ------------------------------------------------------------------------------------------------ reading a completion

# A number of seconds that is no part of something longer: 12, 12.5, "12.5 s", "12 seconds". Without these conditions
# "01:12 to 01:20" would be read as 12 to 1. A span is "a to b" or, as TVG-R1's answers have it, "[a, b]".
NUMBER = r"""
    (?<! [\w.+\-−–] )          # not the end of a word, a date or a range: x3, 1.200.5, -3, 10-12
    (?<! [0-9][:,/] )          # not the end of a clock time, a fraction or a long number: 01:12, 3/4, 1,200
    ( [0-9]{1,6} (?:\.[0-9]+)? )
    (?: \s* (?:seconds?|secs?|s) )?
    (?! \w )                   # not the beginning of a word: 1e9, 3rd
    (?! [:.,/\-−–][0-9] )      # not the beginning of 1:30, 3/4, 1,200 or 10-12
    (?! \s* (?:%|min) )        # not a share, and not minutes
"""
# Inside brackets nothing else can be meant.
LISTED = r"( [0-9]{1,6} (?:\.[0-9]+)? )"
SPAN = re.compile(rf"{NUMBER} \s+ (?:to|and) \s+ {NUMBER}  |  \[ \s* {LISTED} \s* , \s* {LISTED} \s* \]",
                  re.IGNORECASE | re.VERBOSE)


def format_reward(task: str, completion: str, scoring: Scoring = DEFAULTS) -> float:
    """1 for <think>...</think> <answer>...</answer>, else 0 (Eq. 9).

    For grounding the answer must hold a span, as in the template "t_s to t_e" of Section 2.3. Paper: one format for all
    tasks. The released code asks inversion tasks for <answer>...</answer> alone, and a completion that thinks
    scores 0 there: inversion_format "answer".
    """
    if task != "tvg":
        return float(is_well_formed(completion, FORMATS[scoring.inversion_format]))  # Eq. 9
    layout = scoring.grounding.format
    return float(is_well_formed(completion, layout) and parse_span(completion, layout.blocks[-1]) is not None)  # Eq. 9


def is_well_formed(completion: str, layout: Format) -> bool:
    """Whether a completion is its blocks in order, each with a body, and (but for free_text) nothing else."""
    tags = tag_pattern(layout.blocks)
    tags_in_order = []
    for block in layout.blocks:
        tags_in_order += [f"<{block}>", f"</{block}>"]
    if tags.findall(completion) != tags_in_order:
        return False
    pieces = tags.split(completion)  # before, first body, between, second body, after
    bodies = pieces[1::2]
    outside = pieces[:1] if layout.free_text else pieces[0::2]
    return all(body.strip() for body in bodies) and not any(text.strip() for text in outside)


def parse_answer(completion: str, block: str = "answer") -> str | None:
    """The body of the last complete <answer>...</answer>, without stray tags; None where there is none.

    It counts also where the rest of the completion is malformed: of "<answer>a<answer>b</answer>c</answer>" it is "b".
    """
    last_closing = max(0, completion.rfind(f"</{block}>"))
    start = completion.rfind(f"<{block}>", 0, last_closing)
    if start < 0:
        return None
    start += len(f"<{block}>")
    end = completion.index(f"</{block}>", start)
    return tag_pattern((block,)).sub(" ", completion[start:end]).strip()


@functools.cache
def tag_pattern(blocks: tuple[str, ...]) -> re.Pattern:
    """Opening and closing tags. <think> and <answer> are tags in every format."""
    names = "|".join(dict.fromkeys(("think", "answer", *blocks)))
    return re.compile(rf"</?(?:{names})>")


def parse_span(completion: str, block: str = "answer") -> Span | None:
    """The segment (start, end), in seconds, that the answer names last; None where there is none.

    A reversed segment is returned as it stands and has IoU 0. Nothing outside the answer is read.
    """
    return last_span(parse_answer(completion, block) or "")


def last_span(text: str) -> Span | None:
    """The last "a to b", "a and b" or "[a, b]" of a text, in seconds; None where there is none."""
    matches = SPAN.findall(text)
    if not matches:
        return None
    to_start, to_end, listed_start, listed_end = matches[-1]  # the groups of the form that is not there are ""
    return float(to_start or listed_start), float(to_end or listed_end)
