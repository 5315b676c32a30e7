"""What other papers ask of grounding and reward it with: `--tvg-reward papers.rewards.NAME`.

    timestamp_iou       format + IoU weighted by the errors of both ends   Time-R1
    anchors             format + soft IoU + anchors' reward                TAR-TVG
    anchors_unrewarded  format + soft IoU, with the anchors' prompt        TAR-TVG's ablation
    tvg_r1              0.1 format + 0.9 IoU                               TVG-R1

An anchor is an estimate of the segment that TAR-TVG's model writes in a <timestamp> block while it thinks. The wording
of TAR-TVG's and TVG-R1's prompts is ours: neither is public.
"""

import functools
import re

import rewards
from rewards import Format, Grounding, Span, last_span, parse_span, temporal_iou

# ------------------------------------------------------------------------------------------------ Time-R1


def timestamp_aware_iou(span: Span, truth: Span, duration: float) -> float:
    """IoU * (1 - |start error| / duration) * (1 - |end error| / duration), in [0, 1].

    In Time-R1's code a factor turns negative where an error exceeds the duration, so two such errors are rewarded. Here
    it is clamped at 0.
    """
    start_factor = max(0.0, 1 - abs(span[0] - truth[0]) / duration)
    end_factor = max(0.0, 1 - abs(span[1] - truth[1]) / duration)
    return temporal_iou(span, truth) * start_factor * end_factor


def timestamp_iou_reward(completion: str, sample, well_formed: float) -> dict[str, float]:
    """Without the annotated duration, which evaluation does not need, IoU alone counts."""
    parts = rewards.iou_reward(completion, sample, well_formed)
    span = parse_span(completion)
    if sample.duration:
        value = timestamp_aware_iou(span, (sample.start, sample.end), sample.duration) if span else 0.0
        parts |= {"timestamp_iou": value, "total": well_formed + value}
    return parts


# ------------------------------------------------------------------------------------------------ TAR-TVG

ANCHOR = re.compile(r"<timestamp>([^<]*)(</timestamp>)?")
ANCHORS_WANTED = range(2, 5)  # two to four


def parse_anchors(completion: str) -> list[Span | None]:
    """The segments of the <timestamp> blocks before the answer, in order; None where one cannot be read."""
    thought = completion[:max(completion.rfind("<answer>"), 0)]
    return [last_span(body) if closed else None for body, closed in ANCHOR.findall(thought)]


def soft_iou(span: Span | None, truth: Span) -> float:
    """IoU without max(0, .) around the overlap: a gap between two segments counts as negative overlap. In (-1, 1].

    (min(e, e') - max(s, s')) / (max(e, e') - min(s, s')); -1 for None, an empty or a reversed segment.
    """
    if span is None or not (span[0] < span[1] and truth[0] < truth[1]):
        return -1.0
    overlap = min(span[1], truth[1]) - max(span[0], truth[0])
    return overlap / (max(span[1], truth[1]) - min(span[0], truth[0]))


def anchor_reward(anchors: list[Span | None], answer: Span | None, truth: Span, progress_weight: float = 0.5) -> float:
    """For two to four anchors that approach the answer: sum_k w_k soft IoU(a_k) + progress_weight * progress.

    The weights w_k = 2k / (K(K + 1)) grow with k and sum to 1. Progress is 1 if the IoU rises strictly from anchor to
    anchor and to the answer. Another number of anchors, or one that cannot be read, earns 0. The paper's formula is not
    public: this is our reading of its abstract and reviews ("increasingly accurate temporal estimations").
    """
    K = len(anchors)
    if K not in ANCHORS_WANTED or None in anchors:
        return 0.0
    weighted = sum(2 * k / (K * (K + 1)) * soft_iou(anchor, truth) for k, anchor in enumerate(anchors, start=1))
    ious = [temporal_iou(span, truth) for span in (*anchors, answer or (0, 0))]
    progress = all(earlier < later for earlier, later in zip(ious, ious[1:]))
    return weighted + progress_weight * progress


def tar_tvg_reward(completion: str, sample, well_formed: float, anchor_weight: float = 1.0,
                   progress_weight: float = 0.5) -> dict[str, float]:
    """The number of anchors, and the rise in IoU from the first to the answer, are there to be logged alone."""
    parts = rewards.iou_reward(completion, sample, well_formed)
    span = parse_span(completion)
    truth = (sample.start, sample.end)
    anchors = parse_anchors(completion)
    soft = soft_iou(span, truth)
    value = anchor_reward(anchors, span, truth, progress_weight)
    gain = parts["iou"] - temporal_iou(anchors[0] or (0, 0), truth) if anchors else 0.0
    return parts | {"soft_iou": soft, "anchor_reward": value, "anchors": float(len(anchors)), "anchor_gain": gain,
                    "total": well_formed + soft + anchor_weight * value}


def anchor_metrics(parts: dict[str, float]) -> dict[str, float]:
    """An evaluation's columns: the share of answers with two to four anchors, and the gain of those that have any.

    Predictions of a model that was not asked for anchors have neither.
    """
    if "anchors" not in parts:
        return {}
    metrics = {"2-4 anchors": 100.0 * (parts["anchors"] in ANCHORS_WANTED)}
    if parts["anchors"]:
        metrics["anchor gain"] = 100 * parts["anchor_gain"]
    return metrics


# ------------------------------------------------------------------------------------------------ TVG-R1


def tvg_r1_reward(completion: str, sample, well_formed: float) -> dict[str, float]:
    span = parse_span(completion, "time")
    iou = temporal_iou(span, (sample.start, sample.end)) if span else 0.0
    return {"format": well_formed, "iou": iou, "total": 0.1 * well_formed + 0.9 * iou}


# ------------------------------------------------------------------------------------------------ by name

ANCHORS_THINKING = (
    "Output your thought process within the <think> </think> tags, and in it two to four estimates of the time period, "
    "each better than the one before, as <timestamp>12.54 to 17.83</timestamp>, then ")
THINK_THEN_TIME = Format(("think", "time"), rewards.FORMATS["think"].preamble, free_text=True)

timestamp_iou = rewards.IOU._replace(reward=timestamp_iou_reward, needs_duration=True)
anchors = rewards.IOU._replace(format=Format(("think", "answer"), ANCHORS_THINKING), reward=tar_tvg_reward,
                               metrics=anchor_metrics)
anchors_unrewarded = anchors._replace(reward=functools.partial(tar_tvg_reward, anchor_weight=0))
tvg_r1 = Grounding("provide the start and end times in seconds as a list, [12.54, 17.83],", THINK_THEN_TIME,
                   tvg_r1_reward)
