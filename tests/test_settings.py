"""Settings, followed from the command line to the place where they act: rewards, prompts, clips, sampler, optimiser.

One row, "the man runs and laughs" from 1 to 3 s of a video of 5 s. Scripted texts stand in the sampler's place, and the
sampler's stand-in notes what it was asked. Each run trains one iteration and evaluates before and after it.
"""

import json

import pytest
import torch
from shared import lines_of, log_of, measure, parse, reply, rollouts_of, scripted, train, walk, write_lines, write_video

import data
import evaluate
import invert4tvg
import rewards
from engine.words.verbs import cosine_similarity

SAMPLE = data.Sample("AAA.mp4", "the man runs and laughs", 1.0, 3.0, 5.0)
FRAMES = [i / 5 for i in range(25)]  # five seconds


@pytest.fixture()
def words(tmp_path, checkpoint):
    """The command line of a quick run."""
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "AAA.mp4", FRAMES, size=(112, 112))
    row = {"duration": SAMPLE.duration, "timestamps": [[SAMPLE.start, SAMPLE.end]], "sentences": [SAMPLE.query]}
    (tmp_path / "rows").write_text(json.dumps({"AAA": row}))
    return ["--model", checkpoint, "--annotations", tmp_path / "rows", "--videos", tmp_path / "videos", "--output",
            tmp_path / "run", "--workers", 0, "--max-new-tokens", 120]


TRAINING = ["--group-size", 2, "--kl-coef", 0, "--iterations", 1]


def evaluated(output, iteration, task):
    """The parts of the only prediction of a task."""
    lines = lines_of(f"{output}/eval-{iteration:06d}/predictions.0.jsonl")
    (parts,) = [line["parts"] for line in lines if line["task"] == task]
    return parts


ANCHORED = ("<think><timestamp>0 to 4</timestamp><timestamp>1 to 4</timestamp></think>"
            "<answer>1 to 3</answer>")  # soft IoUs 1/2 and 2/3, then 1
RUN_AND_EAT = cosine_similarity("run", "eat")
FOLLOWED = [  # task, answer, options, its reward without them and with them, what the prompt says with them
    ("ar", reply("eat"), ["--inversion-reward", "cosine"], 1, 1 + RUN_AND_EAT, "then provide the verb"),
    ("vd", reply("he runs"), ["--vd-match", "any"], 1, 2, "then provide the description"),
    ("vd", reply("he runs and laughs"), ["--vd-verb-cap", 1], 2, 1, "then provide the description"),
    ("ar", "<answer>runs</answer>", ["--inversion-format", "answer"], 1, 2, "\nProvide the verb"),
    ("tvg", "<answer>1 to 2</answer>", ["--tvg-format", "answer"], 0.5, 1.5, "\nProvide the start and end times"),
    ("tvg", reply("1 to 2"), ["--tvg-format", "answer"], 1.5, 0.5, "\nProvide the start and end times"),
    ("tvg", "<think>a</think><time>[1, 2]</time>", ["--tvg-reward", "papers.rewards.tvg_r1"], 0, 0.55, "<time>"),
    ("tvg", reply("1 to 2"), ["--tvg-reward", "papers.rewards.timestamp_iou"], 1.5, 1 + 0.5 * (1 - 1 / 5), "<answer>"),
    # 1 for the format, 1 for the answer, and the anchors' 1/3 * 1/2 + 2/3 * 2/3 and 1/2 for rising
    ("tvg", ANCHORED, ["--tvg-reward", "papers.rewards.anchors"], 2, 2 + 1 / 6 + 4 / 9 + 1 / 2, "<timestamp>"),
    ("tvg", ANCHORED, ["--tvg-reward", "papers.rewards.anchors_unrewarded"], 2, 2, "<timestamp>")]


@pytest.mark.parametrize("task, text, options, plain, changed, asked", FOLLOWED,
                         ids=[" ".join(map(str, row[2])) for row in FOLLOWED])
def test_what_is_rewarded_reaches_scores_and_prompts_of_training_and_evaluation(
        words, task, text, options, plain, changed, asked):
    assert rewards.score(task, text, SAMPLE)["total"] == pytest.approx(plain)
    draw = ["--p", 1] if task == "tvg" else ["--p", 0, "--inversion-tasks", task]
    measured = ["--eval-every", 1, "--eval-annotations", words[3]]
    with scripted(text) as calls:
        output = train(parse(invert4tvg.Config, *words, *TRAINING, *draw, *measured, *options))
    assert log_of(output)[1][f"{task}/total"] == pytest.approx(changed)  # the rows before and after it are evaluations
    # These two say what training pays for. An evaluation measures with equal verbs and without a cap, whatever is paid.
    trained_alone = options[0] in ("--inversion-reward", "--vd-verb-cap")
    assert evaluated(output, 1, task)["total"] == pytest.approx(plain if trained_alone else changed)
    questions = [question for call in calls for question in call.questions()]
    assert sum(asked in question for question in questions) >= 3
    (own,) = [call for call in calls if call.group_size == 2]
    assert asked in own.questions()[0]


@pytest.mark.parametrize("options, grid", [
    (["--min-frame-pixels", 3136], [5, 8, 8]),  # 2 frames a second: ten, two of them a step; 112 x 112 as it is
    (["--fps", 1], [3, 8, 8]),  # five frames, made even
    (["--min-frame-pixels", 784, "--max-frame-pixels", 3136], [5, 4, 4]),  # 56 x 56
    (["--min-frame-pixels", 784, "--max-pixels", 3920], [5, 2, 2]),  # five steps of 784 pixels
    (["--min-frame-pixels", 50176], [5, 16, 16])])  # 224 x 224
def test_limits_of_a_clip_reach_the_decoder_in_training_and_evaluation(words, options, grid):
    measured = ["--eval-every", 1, "--eval-annotations", words[3]]
    with scripted(reply("1 to 2")) as calls:
        train(parse(invert4tvg.Config, *words, *TRAINING, "--p", 1, *measured, *options))
    trained = [call.prompts[0] for call in calls if call.group_size == 2]
    whole = [call.prompts[0] for call in calls if call.group_size == 1 and "determine" in call.questions()[0]]
    assert len(trained) == 1
    assert len(whole) == 2
    for prompt in trained + whole:
        assert prompt.grid.tolist() == [grid]
        assert len(prompt.patches) == grid[0] * grid[1] * grid[2]


def test_what_the_sampler_is_asked_for(words):
    with scripted(reply("1 to 2")) as calls:
        train(parse(invert4tvg.Config, *words, *TRAINING, "--group-size", 3, "--temperature", 0.7, "--eval-every", 1,
                    "--eval-annotations", words[3], "--p", 1))
    asked = {(call.group_size, call.max_new_tokens, call.temperature) for call in calls}
    assert asked == {(3, 120, 0.7), (1, 120, 0.0)}  # training; evaluation is greedy


# ------------------------------------------------------------------------------------------------ what is drawn


def test_seed_p_and_tasks_reach_the_sampler(words, tmp_path):
    queries = [f"person {verb} there" for verb in ("runs", "sits", "laughs", "eats", "walks", "smiles")]
    (tmp_path / "rows").write_text("".join(f"AAA {i / 2} {i / 2 + 1}##{query}.\n" for i, query in enumerate(queries)))
    with scripted(reply("runs")):
        output = train(parse(
            invert4tvg.Config, *words, *TRAINING, "--save-rollouts", 1, "--seed", 3, "--p", 0.3, "--inversion-tasks",
            "ar", "vd", "--iterations", 8, "--accumulation", 2, "--save-every", 100))
    drawn = [(line["query"], line["task"]) for line in rollouts_of(output)[::2]]  # groups of two
    suits = dict.fromkeys(("ar", "vd"), [True] * 6)
    expected = data.TaskSampler(6, suits, prompts=2, p=0.3, seed=3, iterations=8)
    assert drawn == [(queries[index], task) for slots in walk(expected) for index, task in slots]
    assert {task for _, task in drawn} == {"tvg", "ar", "vd"}


def test_epochs_count_passes_over_the_samples_and_the_rate_may_stay(words, tmp_path):
    (tmp_path / "rows").write_text(f"AAA 1 3##{SAMPLE.query}.\n" * 5)
    options = [*TRAINING, "--p", 1, "--iterations", 0, "--epochs", 1.5, "--micro-batch", 2, "--accumulation", 2]
    with scripted(reply("1 to 2")):
        output = train(parse(invert4tvg.Config, *words, *options, "--lr", 3e-4, "--lr-schedule", "constant"))
    assert [row["lr"] for row in log_of(output)] == [3e-4] * 2  # 7.5 prompts, four an iteration


# ------------------------------------------------------------------------------------------------ what is evaluated


def test_rows_and_videos_of_the_evaluation_are_the_ones_named(words, tmp_path):
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other" / "CCC.mp4", FRAMES[:10])
    rows = [{"qid": i, "vid": "CCC", "query": f"person runs {i} times", "duration": 2,
             "relevant_windows": [[0, i + 1], [0, 1]]} for i in range(4)]
    measured = ["--eval-every", 1, "--eval-annotations", write_lines(tmp_path / "test.jsonl", rows), "--eval-videos",
                tmp_path / "other", "--eval-limit", 2]
    with scripted(reply("1 to 2")):
        output = train(parse(invert4tvg.Config, *words, *TRAINING, "--p", 1, *measured))
    for iteration in (0, 1):
        lines = lines_of(f"{output}/eval-{iteration:06d}/predictions.0.jsonl")
        assert sorted({line["row"] for line in lines}) == [0, 2]  # two of four, evenly spaced
        assert {line["video"] for line in lines} == {str(tmp_path / "other" / "CCC.mp4")}
        assert len(lines) == 2 * 4  # all four tasks
        # A query is one row, whose best window counts, though training takes each window for a row.
        assert {(line["query"], str(line["alternatives"])) for line in lines} == {
            (f"person runs {i} times", "[[0.0, 1.0]]") for i in (0, 2)}


def test_evaluate_py_measures_the_rows_tasks_and_windows_named(words, tmp_path):
    rows = [{"qid": i, "vid": "AAA", "query": f"person runs {i} times", "duration": 5,
             "relevant_windows": [[0, 2], [3, 4]] if i == 1 else [[0, 2]]} for i in range(4)]
    words[3] = write_lines(tmp_path / "windows.jsonl", rows)
    settings = parse(evaluate.EvalSettings, *words, "--limit", 2, "--tasks", "vd", "tvg", "--windows", "single")
    with scripted(reply("1 to 2")) as calls:
        measure(settings)
    lines = lines_of(f"{settings.output}/predictions.0.jsonl")
    # Rows 0, 2 and 3 have one window; two of these three are the first and the second.
    assert {(line["query"], line["task"]) for line in lines} == {
        (f"person runs {i} times", task) for i in (0, 2) for task in ("tvg", "vd")}
    assert [call.max_new_tokens for call in calls] == [120] * 4


# ------------------------------------------------------------------------------------------------ where torch is told


def test_activations_are_recomputed_unless_that_is_switched_off(words, tmp_path):
    def layers_entered(name):
        entered = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: entered.append(type(module).__name__))
        with scripted(reply("1 to 2")):
            train(parse(invert4tvg.Config, *words, *TRAINING, "--p", 1, name), output=str(tmp_path / name))
        hook.remove()
        return entered.count("Qwen2MLP")

    # The language model has two layers.
    assert layers_entered("--gradient-checkpointing") == layers_entered("--no-gradient-checkpointing") + 2


def test_a_missing_evaluation_file_is_named_by_its_own_option(words, capsys):
    with pytest.raises(SystemExit):
        train(parse(invert4tvg.Config, *words, *TRAINING, "--eval-every", 1, "--eval-annotations", "none.txt"))
    assert "--eval-annotations none.txt: cannot be read" in capsys.readouterr().err
