"""data.py: settings, the words of the prompts, draws counted, and the clips that training sees."""

import dataclasses
import math
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import walk, write_lines, write_video

import rewards
from data import (
    Item,
    Sample,
    Settings,
    TaskSampler,
    build_prompt,
    load_imitated,
    load_training,
    make_sampler,
    prompt_text,
    report_unreadable,
)
from engine.model.loading import Processor
from engine.program.settings import UserError
from engine.video.frames import Clip, VideoError
from invert4tvg import Config
from rewards import INVERSIONS

# ---- Settings


def test_a_setting_reaches_the_clips_and_the_rewards():
    settings = Settings(fps=1.0, max_pixels=5, min_frame_pixels=3, max_frame_pixels=4,
                        inversion_format="answer", vd_match="any")
    settings.check()
    dataclasses.replace(settings, min_frame_pixels=4).check()  # one size for all frames
    assert settings.clip_settings() == {"fps": 1, "max_pixels": 5, "min_frame_pixels": 3, "max_frame_pixels": 4}
    scoring = settings.scoring()
    assert scoring.inversion_format == "answer" and scoring.vd_match == "any"
    completion = "<think>a</think> <answer>person laughs</answer>"
    sample = Sample("a.mp4", "a person walks away and laughs", 2.0, 6.0)
    assert rewards.score("vd", completion, sample, scoring)["total"] == 1  # any verb, but it has thought


def test_training_rows_are_those_that_can_be_trained_on(alone, tmp_path, capsys):
    write_video(tmp_path / "AAA.mp4")  # 4 s
    write_video(tmp_path / "BBB.webm", codec="libvpx", container_options={"live": "1"})  # states no duration
    (tmp_path / "rows.txt").write_text("AAA 1.0 9.0##a door.\nBBB 1.0 2.0##a lamp.\nAAA 2.0 1.0##a box.\n"
                                       "CCC 0.0 1.0##a bed.\n")
    settings = Config(annotations=str(tmp_path / "rows.txt"), videos=str(tmp_path))
    with pytest.raises(UserError, match="1 of 3 videos are missing"):
        load_training(settings)
    settings = dataclasses.replace(settings, allow_missing_videos=True)
    assert [s.query for s in load_training(settings)[0]] == ["a door", "a lamp"]
    printed = capsys.readouterr().out
    assert "2 samples; 1 ends clamped to the video's, 1 rows dropped for start >= end: AAA.mp4 from 2 to 1 s" in printed
    assert "2 of 2 queries have no verb; 0 look not English" in printed
    load_training(dataclasses.replace(settings, p=1.0))
    assert "have no verb" not in capsys.readouterr().out  # grounding alone needs none
    timed = dataclasses.replace(settings, tvg_reward="papers.rewards.timestamp_iou")
    assert [s.query for s in load_training(timed)[0]] == ["a door"]
    (tmp_path / "rows.txt").write_text("AAA 2.0 1.0##a box.\n")
    with pytest.raises(UserError, match="no row is left"):
        load_training(settings)


def test_demonstrations_without_a_video_are_named_and_the_others_keep_their_texts_and_tasks(alone, tmp_path, capsys):
    for name in ("AAA.mp4", "BBB.mp4"):
        (tmp_path / name).touch()
    rows = [{"video": name, "query": f"query {name}", "start": 0, "end": 2, "task": task, "completion": f"text {name}"}
            for name, task in (("GONE", "tvg"), ("AAA", "vc"), ("BBB", "mine.object"))]
    config = Config(demonstrations=write_lines(tmp_path / "three.jsonl", rows), videos=str(tmp_path),
                    inversion_tasks=("vc", "mine.object"))
    with pytest.raises(UserError, match="1 of 3 videos are missing"):
        load_imitated(config)
    config = dataclasses.replace(config, allow_missing_videos=True)
    samples, completions, tasks = load_imitated(config)
    assert ([s.query for s in samples], completions, tasks) == (
        ["query aaa", "query bbb"], ["text AAA", "text BBB"], ["vc", "mine.object"])
    assert capsys.readouterr().out.count(f"missing: {tmp_path / 'GONE.mp4'}\n") == 2  # each time
    write_lines(tmp_path / "three.jsonl", rows[:1])
    with pytest.raises(UserError, match="three.jsonl: no row is left to train on"):
        load_imitated(config)


# ---- Prompts


def test_prompts_show_the_query_to_tvg_and_the_blanked_query_to_vc_alone():
    def ask(task):
        return prompt_text(task, "person opens the door {x}")

    assert 'event "person opens the door {x}" in the video' in ask("tvg") and "'person [] the door {x}'" in ask("vc")
    assert "12.54 to 17.83" in ask("tvg")
    assert ask("ar").startswith("Use a verb to describe the event")
    assert ask("vd").startswith("Describe what people have done")
    assert "opens" not in ask("vc") + ask("ar") + ask("vd") and "[]" not in ask("tvg") + ask("ar") + ask("vd")


def test_the_prompt_of_verb_completion_word_for_word():
    assert prompt_text("vc", "person opens the door") == (
        "Add a verb for the event 'person [] the door' based on the video.\n"
        "Output your thought process within the <think> </think> tags, then provide the completed sentence within the "
        "<answer> </answer> tags.")
    assert prompt_text("vc", "person opens the door", "answer") == (
        "Add a verb for the event 'person [] the door' based on the video.\n"
        "Provide the completed sentence within the <answer> </answer> tags.")


def test_inversions_may_answer_without_thinking_but_tvg_may_not():
    for task in rewards.TASKS:
        asks = prompt_text(task, "q", "answer")
        assert ("<think>" in asks) == (task == "tvg") and asks.endswith("within the <answer> </answer> tags.")
        assert "<think>" in prompt_text(task, "q")


# ---- The task sampler (Eq. 13)


def sampler(n=50, prompts=4, verbless=(), tasks=INVERSIONS, **options):
    suits = {task: [i not in verbless for i in range(n)] for task in tasks}
    return TaskSampler(n, suits, prompts, **options)


def test_a_draw_depends_on_seed_and_iteration_alone():
    one, two, other = sampler(iterations=40), sampler(iterations=40), sampler(iterations=40, seed=1)
    assert two.index(33, 2, 1) == one.index(33, 2, 1)  # asked first, before any other draw
    np.random.seed(5)
    assert walk(one) == walk(two)
    for draw in (lambda s: [s.task(k) for k in range(40)], lambda s: [s.index(0, k) for k in range(4)],
                 lambda s: [s.index(0, 0, attempt) for attempt in range(1, 5)]):
        assert draw(one) != draw(other)
    assert [[(two.index(k, s), two.task(k)) for s in range(4)] for k in (30, 7)] == [walk(one)[30], walk(one)[7]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_task_and_one_global_draw(world_size):
    options = dict(prompts=8, verbless=range(0, 50, 3), p=0.5, iterations=60, seed=3)
    single = walk(sampler(**options))
    ranks = [walk(sampler(**options, rank=r, world_size=world_size)) for r in range(world_size)]
    for iteration, parts in zip(single, zip(*ranks), strict=True):
        assert all(len(part) == 8 // world_size for part in parts)
        assert iteration == [slot for part in parts for slot in part]
        assert len({task for _, task in iteration}) == 1


def test_every_sample_comes_once_an_epoch():
    draw = sampler(n=24, prompts=4, p=1, iterations=18)
    drawn = [index for slots in walk(draw) for index, _ in slots]  # 72 = 3 epochs
    epochs = [drawn[:24], drawn[24:48], drawn[48:]]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_an_epoch_may_end_inside_an_iteration():
    drawn = [index for slots in walk(sampler(n=7, prompts=4, p=1, iterations=7)) for index, _ in slots]  # 28 = 4 epochs
    assert Counter(drawn) == {i: 4 for i in range(7)}
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7))


def test_tasks_come_as_often_as_equation_13_says():
    n, draw = 20_000, sampler(p=0.8)
    counts = Counter(draw.task(k) for k in range(n))
    for task, share in {"tvg": 0.8, "vc": 0.2 / 3, "ar": 0.2 / 3, "vd": 0.2 / 3}.items():
        assert abs(counts[task] - n * share) < 4 * math.sqrt(n * share * (1 - share)), task
    assert sum(counts.values()) == n and len(counts) == 4


def test_p_one_is_tvg_alone_p_zero_never_and_tasks_may_be_fewer():
    assert {sampler(p=1, verbless=range(50)).task(k) for k in range(500)} == {"tvg"}  # it needs no verb
    assert {sampler(p=0).task(k) for k in range(500)} == {"vc", "ar", "vd"}
    assert {sampler(p=0.5, tasks=("ar",)).task(k) for k in range(500)} == {"tvg", "ar"}


def test_inversions_never_draw_a_query_without_a_verb():
    verbless = set(range(0, 50, 2))
    inversions, tvg = [], []
    for slots in walk(sampler(verbless=verbless, p=0.5, iterations=400)):
        (tvg if slots[0][1] == "tvg" else inversions).extend(index for index, _ in slots)
    assert not verbless & set(inversions) and verbless < set(tvg)
    assert set(inversions) == set(range(1, 50, 2))  # the redraws reach every sample that has one


def test_each_inversion_draws_the_queries_that_suit_it():
    suits = {"even": [i % 2 == 0 for i in range(10)], "small": [i < 3 for i in range(10)]}
    draw = TaskSampler(10, suits, prompts=4, p=0.3, iterations=200)
    drawn = {task: set() for task in ("tvg", *suits)}
    for slots in walk(draw):
        for index, task in slots:
            drawn[task].add(index)
    assert drawn == {"tvg": set(range(10)), "even": {0, 2, 4, 6, 8}, "small": {0, 1, 2}}
    with pytest.raises(ValueError, match="none .*--p 1"):
        TaskSampler(10, suits | {"none": [False] * 10}, prompts=4)


def test_redraws_after_unreadable_videos_avoid_verbless_queries_too():
    draw = sampler(verbless=range(40), p=0)
    drawn = np.array([[draw.index(k, 0, attempt) for attempt in range(8)] for k in range(100)])
    assert {*drawn.flat} == set(range(40, 50))
    # Each attempt is a draw of its own: of two, one in ten is the same by chance.
    assert max((drawn[:, a] == drawn[:, b]).mean() for a in range(8) for b in range(a)) < 0.3


def test_draws_are_those_of_their_seeds_for_a_run_may_go_on_with_a_newer_version():
    # data.py's streams: 0 the order of an epoch, 1 tasks, 2 redraws. Sample 0 to 9 have no verb.
    draw = sampler(n=50, prompts=4, verbless=range(10), p=0.5, seed=7, tasks=("vc", "ar"))
    suited = np.arange(10, 50)
    for k in range(13, 40):  # from the second epoch on
        task = np.random.default_rng([7, 1, k])
        expected = "tvg" if task.random() < 0.5 else ("vc", "ar")[task.integers(2)]
        assert draw.task(k) == expected
        for slot in range(4):
            epoch, place = divmod(4 * k + slot, 50)
            first = np.random.default_rng([7, 0, epoch]).permutation(50)[place]
            redraws = [np.random.default_rng([7, 2, k, slot, attempt]) for attempt in (0, 5)]
            redraws = [int(rng.integers(50) if expected == "tvg" else rng.choice(suited)) for rng in redraws]
            assert draw.index(k, slot) == (first if expected == "tvg" or first >= 10 else redraws[0])
            assert draw.index(k, slot, 5) == redraws[1]


# ---- Candidates


def test_a_slots_candidates_are_its_draws_for_one_task():
    draw = sampler(n=8, prompts=2, p=0.5)
    for iteration in range(12):
        candidates = draw.candidates(iteration, 1)
        assert candidates == [(draw.index(iteration, 1, attempt), draw.task(iteration)) for attempt in range(8)]


def test_demonstrations_keep_their_own_task():
    tasks = ["tvg", "vc", "ar", "vd"] * 2
    draw = sampler(n=8, prompts=2, p=1)
    for iteration in range(8):
        for index, task in draw.candidates(iteration, 0, tasks):
            assert task == tasks[index]


# ---------------------------------------------------------------------------------------------- slips that once passed


def test_time_is_counted_at_the_clips_true_rate_whatever_was_asked_for(model, tokenizer):
    # One frame a second: each step of two frames is 2 s, and the model counts two positions a second.
    clip = Clip(torch.zeros(4, 3, 28, 56, dtype=torch.uint8), np.arange(4.0), 1.0)
    processor = Processor(tokenizer, {"image_mean": [0.5] * 3, "image_std": [0.3] * 3}, None, None)
    prompt = build_prompt(model, processor, Sample("a.mp4", "q", 0.0, 1.0), "tvg", clip, Settings(fps=2.0))
    time = prompt.positions[0][prompt.ids == model.config.video_token_id]
    assert (time - time[0]).tolist() == [0, 0, 4, 4]


def test_a_runs_sampler_knows_which_queries_suit_each_of_its_inversions(monkeypatch):
    two = rewards.Inversion("How many people?", "provide a number,", None, suits=lambda query: "two" in query)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(two=two))
    samples = [Sample("a.mp4", query, 0.0, 1.0) for query in ("person opens the door", "two red lamps")]
    draw = make_sampler(Config(inversion_tasks=("vc", "mine.two")), samples, prompts=2, rank=0, world_size=1)
    assert draw.suits == {"vc": [True, False], "mine.two": [False, True]}


def test_every_redraw_is_counted_and_one_slot_without_a_clip_stops_the_run(capsys):
    clip = Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), np.arange(2.0), 2.0)
    redrawn = Item(0, "tvg", clip, ["bad.mp4"] * 2)  # twice the same video
    assert report_unreadable([Item(1, "tvg", clip), redrawn]) == 2
    assert capsys.readouterr().err.count("redrawn: bad.mp4") == 1
    with pytest.raises(VideoError, match="8 draws for one slot"):
        report_unreadable([redrawn, Item(1, "tvg", None, ["bad.mp4"] * 8)])
