"""Training and evaluation in two processes, through the program's own loop: they do together what one does alone.

Two processes are started once and run a list of jobs. Scripted texts stand in the sampler's place where the runs must
agree; completions have different lengths, so that the ranks' shares differ.
"""

import contextlib
import dataclasses
import gc
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from shared import (
    byte_tokenizer,
    lines_of,
    log_of,
    make_config,
    make_prompt,
    measure,
    reply,
    rollouts_of,
    scripted,
    states_of,
    train,
    weights_of,
    write_lines,
    write_video,
)

import evaluate
import grpo
import invert4tvg
from engine.model import optimizer
from engine.model.loading import load_model
from engine.model.optimizer import clip_gradients
from engine.model.parallel import data_parallel, frozen_reference
from engine.program.launch import launch

# Two completions for each of four prompts, of 2 to 60 tokens.
TEXTS = [reply("0 to 4"), "x", reply("1 to 3"), reply("2 to 3") + " and so on, and on",
         reply("0 to 1"), "none", reply("10 to 14"), reply("2 to 3.5")]


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def steep_steps():
    """Give Adam a large epsilon, and clip nothing: a step then grows with the gradient, and a wrong scale shows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(optimizer, "EPSILON", 0.1)
    patch.setattr(invert4tvg, "clip_gradients", lambda parameters, max_norm: clip_gradients(parameters, 100.0))
    return patch


def run_as(rank, jobs):
    """Run `jobs`, (program, settings, texts to script or None, port), as rank `rank` of two."""
    gc.freeze()  # process groups of earlier tests have no threads here
    steep_steps()
    for program, settings, texts, port in jobs:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        with scripted(*texts) if texts else contextlib.nullcontext():
            program(settings)


def check_reference(settings):
    """Log-probabilities of a reference in shares, against the whole one's; either rank has other lengths."""

    def program(settings, device):
        rank = dist.get_rank()
        model, processor = load_model(settings.model, device)
        prompts = [make_prompt(byte_tokenizer(), model, 56, 28 * (1 + rank), 12, "when" + " and then" * 9 * rank)]
        # At 2**25 logits a chunk has 127,000 tokens here; with two a chunk, 3 run on one rank and 15 on the other.
        grpo.MAX_LOGITS_AT_ONCE = 2 * model.config.text_config.vocab_size
        ids = torch.arange(6 + 24 * rank).view(1, -1) + 40
        with torch.no_grad():
            features = grpo.visual_features(model, prompts)
        inputs = prompts, ids, torch.ones_like(ids, dtype=torch.bool)
        for keep_tower in (False, True):
            policy = grpo.Policy(load_model(settings.model, device)[0], processor.banned, 1.0)
            if keep_tower:  # and a head tied to the embeddings, as in the published 3B
                policy.model.lm_head.weight = policy.model.get_input_embeddings().weight
            given = None if keep_tower else features
            with torch.no_grad():
                expected, _ = policy(*inputs, given)
            reference = frozen_reference(policy, keep_tower)
            shared = sum(p.to_local().numel() for p in reference.parameters())
            everything = sum(p.numel() for p in reference.parameters())
            assert everything / 2 <= shared < everything / 2 + 2000, (shared, everything)
            for _ in range(2):
                with torch.no_grad():
                    found, _ = reference(*inputs, given)
                assert torch.equal(found, expected)

    launch(program, settings)


def check_gradients(settings):
    """Gradients lie in DDP's buckets from the first pass on, also where passes come before that do not average."""

    def program(settings, device):
        model, processor = load_model(settings.model, device)
        model.model.visual.requires_grad_(False)
        prompts = [make_prompt(byte_tokenizer(), model, 28, 28, 4, "when")]
        ids = torch.arange(6).view(1, -1) + 40
        inputs = prompts, ids, torch.ones_like(ids, dtype=torch.bool), None
        policy = data_parallel(grpo.Policy(model, processor.banned, 1.0))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert not any(p.grad.any() for p in trained)
        places = [p.grad.data_ptr() for p in trained]
        assert len({p.grad.untyped_storage().data_ptr() for p in trained}) == 1  # 25 MB hold all of this model
        assert trained[0].grad.untyped_storage().nbytes() == 4 * sum(p.numel() for p in trained)
        for average in (False, True, False, True):
            with contextlib.nullcontext() if average else policy.no_sync():
                policy(*inputs)[0].sum().backward()
            assert [p.grad.data_ptr() for p in trained] == places
            assert any(p.grad.any() for p in trained)

    launch(program, settings)


def run_evaluation(settings):
    """`measure` without its last step: metrics.json is written by rank 0, after the other one has ended perhaps."""
    launch(evaluate.main, settings)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, checkpoint):
    """Settings by name, after two processes have run them; of "... alone", after one process has."""
    folder = tmp_path_factory.mktemp("jobs")
    base = make_config(folder, checkpoint)
    write_video(folder / "videos" / "BBB.mp4", [i / 5 for i in range(25)], size=(56, 56), g="5")
    (folder / "one.txt").write_text("AAA 0 2##person opens the door.\n")
    demonstrations = [{"video": "AB"[i % 2] * 3, "query": f"query {i}", "start": 0, "end": 2, "task": "vd",
                       "completion": "x" * n} for i, n in enumerate((1, 30, 8, 48))]
    base = dataclasses.replace(
        base, p=1.0, min_frame_pixels=784, max_new_tokens=70, group_size=2, accumulation=2, iterations=1, lr=1e-2,
        save_rollouts=1, keep=9, save_every=1)
    settings = {
        "completion": dataclasses.replace(base, iterations=0, epochs=2.0),
        "offloaded": dataclasses.replace(base, iterations=0, epochs=2.0, offload_optimizer=True),
        "token": dataclasses.replace(base, loss_reduction="token"),
        "adapted": dataclasses.replace(base, lora_rank=2),
        "supervised": dataclasses.replace(base, loss_reduction="token",
                                          demonstrations=write_lines(folder / "demos.jsonl", demonstrations)),
        "sampled": dataclasses.replace(base, annotations=str(folder / "one.txt"), max_new_tokens=8),
        "evaluated": evaluate.EvalSettings(model=str(checkpoint), annotations=base.annotations, videos=base.videos,
                                           min_frame_pixels=784, max_new_tokens=5, workers=0, tasks=("tvg",), limit=3)}
    alone = {f"{name} alone": dataclasses.replace(settings[name], accumulation=4)
             for name in ("completion", "token", "adapted", "supervised")} | {"evaluated alone": settings["evaluated"]}
    settings, alone = ({name: dataclasses.replace(one, output=str(folder / name)) for name, one in each.items()}
                       for each in (settings, alone))
    programs = [(run_evaluation if name == "evaluated" else train, one,
                 None if name in ("sampled", "evaluated") else TEXTS, free_port()) for name, one in settings.items()]
    programs += [(check, base, None, free_port()) for check in (check_reference, check_gradients)]
    # Forked, they need not import everything anew; libraries of macOS may crash in a fork. This raises what a check
    # has found.
    method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(run_as, (programs,), nprocs=2, start_method=method)
    patch = steep_steps()
    for name, one in alone.items():
        if name == "evaluated alone":
            measure(one)
        else:
            with scripted(*TEXTS):
                train(one)
    patch.undo()
    return settings | alone


def difference(a, b):
    """The largest one between two runs' weights."""
    a, b = weights_of(a.output), weights_of(b.output)
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("name, iterations", [("completion", 2), ("token", 1), ("adapted", 1), ("supervised", 1)])
def test_two_processes_take_the_steps_of_one_with_twice_the_prompts(jobs, checkpoint, name, iterations):
    together, alone = jobs[name], jobs[f"{name} alone"]
    norms, expected = ([row["grad_norm"] for row in log_of(one.output)] for one in (together, alone))
    assert len(norms) == iterations  # "completion": two epochs of four rows
    assert norms == pytest.approx(expected, rel=1e-4)
    assert difference(together, alone) < 1e-5
    before = load_file(checkpoint / "model.safetensors")
    assert max((weight - before[name]).abs().max() for name, weight in weights_of(together.output).items()) > 1e-3


def test_the_log_is_the_mean_over_both_processes(jobs):
    together, alone = (log_of(jobs[name].output) for name in ("completion", "completion alone"))
    for row, expected in zip(together, alone, strict=True):
        for name in ("tvg/total", "tvg/iou", "tvg/format", "tvg/total_std", "length", "loss", "kl", "zero_spread"):
            assert row[name] == pytest.approx(expected[name], abs=1e-5), name


def test_each_process_draws_its_own_share_of_an_iterations_rows(jobs):
    first, second = (rollouts_of(jobs["completion"].output, rank) for rank in (0, 1))
    alone = rollouts_of(jobs["completion alone"].output)
    for iteration in (0, 1):
        shares = [[line for line in lines if line["iteration"] == iteration] for lines in (first, second, alone)]
        kls = [[line.pop("kl") for line in lines] for lines in shares]  # after a step the weights differ by rounding
        assert kls[0] + kls[1] == pytest.approx(kls[2], abs=1e-5)
        assert shares[0] + shares[1] == shares[2]
        assert len({line["query"] for line in shares[2]}) == 4  # four rows, four prompts


def test_both_processes_together_save_every_adapter(jobs):
    states = [states_of(f"{jobs['adapted'].output}/checkpoint-000001", rank) for rank in (0, 1)]
    assert states[0] and states[1] and not states[0].keys() & states[1].keys()
    together = states[0] | states[1]
    assert len(together) == 2 * 2 * 7 and all("weight" in state for state in together.values())  # A, B; layers; targets


def test_an_offloaded_optimiser_takes_the_same_steps_bit_for_bit(jobs):
    plain, offloaded = jobs["completion"], jobs["offloaded"]
    weights, others = weights_of(plain.output), weights_of(offloaded.output)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert [row["grad_norm"] for row in log_of(plain.output)] == [row["grad_norm"] for row in log_of(offloaded.output)]
    states = [[states_of(f"{one.output}/checkpoint-000002", rank) for rank in (0, 1)]
              for one in (plain, offloaded)]
    for rank in (0, 1):
        assert states[0][rank].keys() == states[1][rank].keys()
        for name, state in states[0][rank].items():
            assert torch.equal(state["exp_avg_sq"], states[1][rank][name]["exp_avg_sq"])


def test_two_processes_sample_the_same_prompt_differently(jobs):
    texts = [line["completion"] for rank in (0, 1) for line in rollouts_of(jobs["sampled"].output, rank)]
    assert len(set(texts)) == len(texts) == 2 * 2 * 2  # processes, prompts of each, completions of each


def test_one_process_goes_on_with_what_two_have_saved(jobs, tmp_path):
    shutil.copytree(Path(jobs["completion"].output) / "checkpoint-000001", tmp_path / "checkpoint-000001")
    states = [load_file(tmp_path / "checkpoint-000001" / f"optimizer.{rank}.safetensors") for rank in (0, 1)]
    assert states[0] and states[1] and not states[0].keys() & states[1].keys()  # a share each
    patch = steep_steps()
    with scripted(*TEXTS):
        train(jobs["completion alone"], output=str(tmp_path))
    patch.undo()
    resumed = dataclasses.replace(jobs["completion"], output=str(tmp_path))
    assert difference(resumed, jobs["completion"]) < 1e-5


def test_an_evaluation_in_two_processes_holds_every_row_once_and_the_same(jobs):
    first, second = (lines_of(f"{jobs['evaluated'].output}/predictions.{rank}.jsonl") for rank in (0, 1))
    alone = lines_of(f"{jobs['evaluated alone'].output}/predictions.0.jsonl")
    assert [line["row"] for line in first] == [0, 2]
    assert [line["row"] for line in second] == [1]
    assert sorted(first + second, key=lambda line: line["row"]) == alone
    metrics = [(Path(jobs[name].output) / "metrics.json").read_text() for name in ("evaluated", "evaluated alone")]
    assert metrics[0] == metrics[1]
