"""Film strips as in the paper's Figures 7 to 14: frames on a time axis, and segments as bars below them."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

import rewards
from engine.video.frames import VideoError, read_video
from engine.video.stream import video_duration
from papers.rewards import parse_anchors
from report.analysis import changed_rows, grounding
from report.runs import row_of

FRAMES = 8
FRAME_PIXELS = 50_000  # decoded, so that sides of multiples of 28 hardly change the picture's proportions
FRAME_HEIGHT = 84  # shown at most
MAX_VIDEOS = 100  # decoded for one page: about 25 kB and a third of a second each


class Bar(NamedTuple):
    """A segment on the axis: kind "truth", "answer" or "anchor"; `note` stands to the right of it."""

    label: str
    kind: str
    start: float
    end: float
    note: str = ""


class Strip(NamedTuple):
    """`picture` is the number of a film strip of the page, or None; `duration` the seconds of the axis."""

    picture: int | None
    duration: float
    bars: list[Bar]

    def ticks(self) -> list[float]:
        """Five times along the axis, in seconds."""
        return [self.duration * i / 4 for i in range(5)]


class Shot(NamedTuple):
    """A video: a file, or the excerpt of it from start to end, in seconds, from whose beginning all times count."""

    path: str
    excerpt: tuple[float, float] | None = None

    def seconds(self) -> float | None:
        return self.excerpt[1] - self.excerpt[0] if self.excerpt else video_duration(self.path)


class Films:
    """The film strips of a page, each video decoded once."""

    def __init__(self):
        self.numbers = {}  # Shot -> place in `pictures`
        self.pictures = []  # data URLs

    def add(self, shots):
        """Decode the videos that are new, up to MAX_VIDEOS in all; one that cannot be read has no picture."""
        new = [shot for shot in dict.fromkeys(shots) if shot not in self.numbers]
        new = new[:MAX_VIDEOS - len(self.numbers)]
        with ThreadPoolExecutor(2) as pool:
            for shot, picture in zip(new, pool.map(film, new)):
                self.numbers[shot] = len(self.pictures) if picture else None
                self.pictures += [picture] if picture else []

    def strip(self, shot, bars) -> Strip:
        """The strip of a video with segments below it."""
        shown = max((bar.end for bar in bars), default=1.0)
        return Strip(self.numbers.get(shot), shot.seconds() or shown or 1.0, bars)


def film(shot) -> str | None:
    """A video -> FRAMES of its frames side by side, at the middles of equal stretches, as the data URL of a JPEG."""
    duration = shot.seconds()
    if not duration:
        return None
    begin = shot.excerpt[0] if shot.excerpt else 0.0
    try:
        clip = read_video(shot.path, fps=FRAMES / duration, start=begin + duration / FRAMES / 2, end=begin + duration,
                          min_frame_pixels=28**2, max_frame_pixels=FRAME_PIXELS)
    except VideoError:
        return None
    frames = clip.frames[:FRAMES].permute(0, 2, 3, 1).numpy()  # (T, H, W, 3)
    picture = Image.fromarray(np.concatenate(list(frames), axis=1))
    picture.thumbnail((picture.width, FRAME_HEIGHT))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def answer_bars(label, completion, span, iou=None) -> list[Bar]:
    """The bars of one grounding completion: its anchors in the order written, then its answer."""
    bars = [Bar(f"{label}, anchor {k}", "anchor", *anchor)
            for k, anchor in enumerate(parse_anchors(completion), 1) if anchor and anchor[0] < anchor[1]]
    note = "" if iou is None else f"IoU {iou:.2f}"
    if span is None:
        return [*bars, Bar(label, "answer", 0.0, 0.0, "no span")]
    if span[0] >= span[1]:
        return [*bars, Bar(label, "answer", 0.0, 0.0, f"{span[0]:g} to {span[1]:g}, reversed")]
    return [*bars, Bar(label, "answer", *span, note)]


def truth_bars(truth, alternatives) -> list[Bar]:
    """The annotated segment of a query, and in QVHighlights the further ones."""
    return [Bar("annotated", "truth", *segment) for segment in (truth, *alternatives)]


def group_strip(films, shot, group) -> Strip:
    """The strip beside a group of completions."""
    first = group.rows[0]
    bars = truth_bars((first["start"], first["end"]), first.get("alternatives", ()))
    if group.task == "tvg":
        for names, row in group.distinct():
            span = rewards.last_span(answer_of(row["completion"]))
            bars += answer_bars(names, row["completion"], span, row["parts"]["iou"])
    return films.strip(shot, bars)


def answer_of(completion) -> str:
    """The body of the answer, in whichever block it stands."""
    return rewards.parse_answer(completion) or rewards.parse_answer(completion, "time") or ""


# ------------------------------------------------------------------------------------------------ cases


def choose_cases(entries, each=4, seed=0) -> dict[str, list[dict]]:
    """Evaluations of the same rows, [(label, predictions)] -> {kind of case: predictions of the first evaluation}.

    "best" and "worst" by the first's IoU, of equal ones the first in the file; "most changed" between first and last.
    Rows without a truth, of one's own video, are "your own".
    """
    ours = entries[0][1]
    own = [p for p in ours if p["task"] == "tvg" and not p.get("truth")]
    rows = sorted(grounding(ours), key=lambda p: -p["parts"]["iou"])
    cases = {"your own": own, "best": rows[:each], "worst": rows[::-1][:each]}
    drawn = np.random.default_rng(seed).permutation(len(rows))[:each]
    cases["random"] = [rows[i] for i in sorted(drawn)]
    if len(entries) > 1 and rows:
        won, lost = changed_rows(ours, entries[-1][1], each)
        changed = sorted(won + lost, key=lambda pair: -abs(pair[0]))[:each]
        cases["most changed"] = [prediction for _, prediction, _ in changed]
    return {kind: chosen for kind, chosen in cases.items() if chosen}


def case_bars(prediction, entries) -> list[Bar]:
    """The truth, and the answer of every evaluation to a row, one below the other."""
    bars = truth_bars(prediction["truth"], prediction.get("alternatives") or ()) if prediction.get("truth") else []
    for label, predictions in entries:
        for p in predictions:
            if p["task"] == "tvg" and p["sample"] == 0 and row_of(p) == row_of(prediction):
                iou = p["parts"].get("iou") if prediction.get("truth") else None
                bars += answer_bars(label, p["completion"], p["span"], iou)
    return bars
