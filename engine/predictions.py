"""The predictions of an evaluation, as they lie in its folder."""

import json
from pathlib import Path


def key_of(prediction):
    """Which prediction it is; "sample" is the number of the completion among those of its row."""
    return prediction["row"], prediction["task"], prediction["sample"]


def video_bytes(sample) -> int | None:
    """The size of the sample's video file; None where there is none."""
    path = Path(sample.video)
    return path.stat().st_size if path.is_file() else None


def answers(prediction, samples) -> bool:
    """Whether a prediction is of its row as it is today: of the same video, query and times."""
    if prediction["row"] >= len(samples):
        return False
    s = samples[prediction["row"]]
    today = [Path(s.video).name, video_bytes(s), s.query, [s.start, s.end]]
    then = [Path(prediction["video"]).name, prediction["bytes"], prediction["query"], prediction["truth"]]
    return then == today


def late_rows(predictions) -> list[str]:
    """Name the grounding rows that start after their video's last picture has ended, once each."""
    late = {}
    for p in predictions:
        end = p.get("video_end")
        if p["task"] == "tvg" and end is not None and p["truth"][0] > end:
            late[p["row"]] = f"{p['video']}: row {p['row']} starts at {p['truth'][0]:g} of {end:g} s"
    return list(late.values())


def read_predictions(output, samples=None) -> list[dict]:
    """All predictions of an output folder, with `samples` only those that answer its rows as they are today.

    A line cut off by an interruption is left out.
    """
    predictions = {}
    for path in sorted(Path(output).glob("predictions*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                p = json.loads(line)
                if samples is not None and not answers(p, samples):
                    continue
                if key_of(p) not in predictions or not p["error"]:  # a success replaces an unreadable video's line
                    predictions[key_of(p)] = p
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return [predictions[key] for key in sorted(predictions)]
