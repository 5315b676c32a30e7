"""One's own video: where the models of the runs see each query in it."""

import dataclasses

import torch

import rewards
from data import Sample
from engine.model.loading import load_model
from engine.run.start import from_start
from engine.video.clips import Item
from engine.video.frames import read_video
from engine.words.text import normalize_query
from evaluate import EvalSettings, answer
from report.runs import Evaluation


def look(run, video, queries, trusted=()) -> Evaluation:
    """The greedy answers of a run's newest checkpoint, as predictions without a truth.

    A reward from outside this repository is imported where its name is among the `trusted`. Raises UserError where it
    is not or the run has no checkpoint, VideoError where the video cannot be read.
    """
    settings = EvalSettings(model=str(run.folder), video=str(video), query=tuple(queries))
    given = {}
    if run.config.get("tvg_reward") in trusted:
        given["tvg_reward"] = run.config["tvg_reward"]
    settings = dataclasses.replace(settings, **given | from_start(settings, given))
    clip = read_video(video, **settings.clip_settings())
    model, processor = load_model(settings.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    block = settings.grounding().format.blocks[-1]
    predictions = []
    for row, query in enumerate(map(normalize_query, queries)):
        sample = Sample(video, query, 0.0, 0.0)
        [[text]] = answer(model, processor, [sample], [Item(0, "tvg", clip)], settings, completions=0)
        predictions.append({"row": row, "task": "tvg", "sample": 0, "video": video, "query": query, "truth": None,
                            "completion": text, "span": rewards.parse_span(text, block), "parts": {}, "error": None})
    return Evaluation(run.name, predictions, {})
