"""Nothing is silently wrong: results are tied to contents, and a model is checked before anything runs."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import change_json, log_of, make_config, measure, reply, scripted, tiny_model, train, write_video
from transformers import Qwen2_5_VLForConditionalGeneration

import evaluate
from engine.model.loading import find_model, fingerprint, load_model, newest_checkpoint
from engine.run.predictions import read_predictions

CPU = torch.device("cpu")


@pytest.fixture()
def copy(checkpoint, tmp_path):
    """A model folder that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def refusal(folder):
    """The one sentence with which a model is refused."""
    with pytest.raises(OSError) as error:
        load_model(str(folder), CPU)
    message = str(error.value)
    assert message.startswith(f"--model {folder}: ") and message.endswith(".") and "\n" not in message
    return message


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


# ---- A model is checked


@pytest.mark.parametrize("damage", [
    shutil.rmtree, lambda folder: (folder / "preprocessor_config.json").write_text("{}"),
    lambda folder: (folder / "model.safetensors").unlink(),
    lambda folder: os.truncate(folder / "model.safetensors", 1000)])
def test_a_model_that_cannot_be_loaded_is_named_in_one_sentence(damage, copy):
    damage(copy)
    refusal(copy)


def test_missing_weights_would_be_random_and_are_refused(copy):
    change_weights(copy, lambda weights: {k: v for k, v in weights.items() if "layers.1." not in k})
    assert "lacks 12 weights, " in refusal(copy)


def test_a_head_tied_to_the_embeddings_is_not_missing(tokenizer, copy):
    # As in the published 3B, whose files hold no lm_head.
    plain = tiny_model(tokenizer)
    plain.set_attn_implementation("sdpa")
    plain.config.tie_word_embeddings = plain.config.text_config.tie_word_embeddings = True
    Qwen2_5_VLForConditionalGeneration._from_config(plain.config).save_pretrained(copy)
    assert "lm_head.weight" not in load_file(copy / "model.safetensors")
    model, _ = load_model(str(copy), CPU)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_left_over_weights_are_of_another_model(copy):
    change_weights(copy, lambda weights: weights | {"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)})
    assert "has no place for 1 weights" in refusal(copy)


def test_weights_of_another_shape_are_refused(copy):
    change_weights(copy, lambda weights: {k: v[:3] if k == "lm_head.weight" else v for k, v in weights.items()})
    refusal(copy)


def test_weights_that_are_not_finite_are_refused(copy):
    change_weights(copy, lambda weights: {k: v * float("nan") if "norm" in k else v for k, v in weights.items()})
    assert "are not finite" in refusal(copy)


def test_an_adapter_is_no_model(copy):
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "LoRA adapter" in refusal(copy)


def test_quantised_weights_cannot_be_trained(copy):
    change_json(copy / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantised" in refusal(copy)


def test_a_tokenizer_without_a_chat_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    assert "no chat template" in refusal(copy)


def test_a_tokenizer_that_is_not_the_models_is_refused(copy):
    ours = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    for token in ours["added_tokens"]:
        token["content"] = token["content"].replace("<|video_pad|>", "<|other|>")
    (copy / "tokenizer.json").write_text(json.dumps(ours), encoding="utf-8")
    assert "tokenizer_config.json of the model" in refusal(copy)
    for path in copy.glob("tokenizer*"):
        path.unlink()  # then transformers makes one without words, and no error
    assert "tokenizer has " in refusal(copy)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tokenizer, tmp_path):
    tiny_model(tokenizer, vocab_size=len(tokenizer) - 1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}', encoding="utf-8")
    assert f"its tokenizer has {len(tokenizer)} ids" in refusal(tmp_path)


def test_only_ids_that_the_tokenizer_can_write_are_sampled(tokenizer, tmp_path):
    tiny_model(tokenizer, vocab_size=len(tokenizer) + 40).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}', encoding="utf-8")
    _, processor = load_model(str(tmp_path), CPU)
    assert set(range(len(tokenizer), len(tokenizer) + 40)) <= set(processor.banned.tolist())
    assert not set(processor.eos.tolist()) & set(processor.banned.tolist())


# ---- Which folder is meant


def test_a_root_that_holds_weights_is_the_model_whatever_stands_beside_them(copy):
    for name in ("checkpoint-500", "checkpoint-1000"):
        shutil.copytree(copy, copy.parent / name)
        shutil.move(copy.parent / name, copy / name)
    assert find_model(copy) == copy


def test_a_model_of_the_hub_is_had_with_all_its_files_but_those_that_are_not_read(copy, tmp_path, monkeypatch):
    for name in ("README.md", "pytorch_model.bin", "merges.txt"):
        (copy / name).touch()

    def download(name, allow_patterns):
        assert name == "publisher/model"
        for path in copy.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, tmp_path / "hub")
        return str(tmp_path / "hub")

    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("publisher/model", CPU)
    assert {path.name for path in copy.iterdir()} - {path.name for path in (tmp_path / "hub").iterdir()} == {
        "README.md", "pytorch_model.bin"}


# ---- A checkpoint keeps the files it came with


def test_a_checkpoint_keeps_every_file_but_the_weights_and_all_may_read_it(tmp_path, copy):
    (copy / "README.md").write_text("as it came", encoding="utf-8")
    change_json(copy / "config.json", _of_the_publisher="kept")
    config = make_config(tmp_path, copy)
    with scripted(reply("0 to 1")):
        train(config, iterations=1, p=1.0)
    saved = newest_checkpoint(config.output)
    for path in copy.iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            assert (saved / path.name).read_bytes() == path.read_bytes(), path.name
    assert (saved / "README.md").read_text(encoding="utf-8").startswith("---\n")  # the card is the new model's own
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in saved.iterdir())
    assert load_file(copy / "model.safetensors").keys() == load_file(saved / "model.safetensors").keys()


def test_a_checkpoint_has_the_published_layout(tmp_path, copy):
    # As Qwen published it and transformers 4.57 reads it: a flat config.json with rope_scaling, and these names of
    # weights. What transformers 5 writes, 4.57 does not run.
    ours = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    text, vision = ours["text_config"], ours["vision_config"]
    rope = text.pop("rope_parameters")
    published = text | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "torch_dtype": "bfloat16",
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "rope_theta": rope["rope_theta"],
        "transformers_version": "4.41.2", "tie_word_embeddings": False, "vision_config": vision}
    published |= {name: value for name, value in ours.items() if name.endswith("_token_id")}
    (copy / "config.json").write_text(json.dumps(published), encoding="utf-8")
    config = make_config(tmp_path, copy)
    with scripted(reply("0 to 1")):
        train(config, iterations=1, p=1.0, train_vision=True)
    saved = newest_checkpoint(config.output)
    assert json.loads((saved / "config.json").read_text(encoding="utf-8")) == published
    names = load_file(saved / "model.safetensors")
    assert {name.split(".0.")[0] for name in names if ".1." not in name} == {
        "lm_head.weight", "model.embed_tokens.weight", "model.layers", "model.norm.weight", "visual.blocks",
        "visual.merger.ln_q.weight", "visual.merger.mlp", "visual.merger.mlp.2.bias", "visual.merger.mlp.2.weight",
        "visual.patch_embed.proj.weight"}
    assert "model.layers.0.self_attn.q_proj.weight" in names and "visual.blocks.0.attn.qkv.weight" in names
    assert load_model(str(saved), CPU)[0].config.text_config.rope_parameters["mrope_section"] == [2, 1, 1]


# ---- Runs


@pytest.fixture()
def config(tmp_path, copy):
    return dataclasses.replace(make_config(tmp_path, copy), p=1.0, save_every=1, keep=9, iterations=2, lr=1e-2,
                               max_new_tokens=60)


def begin(config):
    """Train, and take the last iteration back."""
    with scripted(reply("0 to 1"), reply("0 to 4"), "x"):
        train(config)
    shutil.rmtree(newest_checkpoint(config.output))


def test_a_run_whose_rows_have_changed_does_not_go_on(config, capsys):
    begin(config)
    Path(config.annotations).write_text("AAA 0 2##person opens the door.\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        train(config)
    assert "its rows, or the videos that are there, have changed" in capsys.readouterr().err


def test_rows_that_start_after_their_video_are_named_counted_and_not_trained_on(config, tmp_path, capsys):
    entry = {"duration": 28.8, "timestamps": [[20.0, 25.0]], "sentences": ["person sits"]}  # AAA has five seconds
    rows = {"AAA": entry, "BBB": {"duration": 5, "timestamps": [[0, 2]], "sentences": ["person eats"]}}
    Path(config.annotations).write_text(json.dumps(rows), encoding="utf-8")
    with scripted(reply("0 to 1")) as calls:
        train(config, iterations=1)
    assert ["person eats" in question for call in calls for question in call.questions()] == [True, True]
    assert log_of(config.output)[0]["redrawn"] >= 1
    assert "AAA.mp4: the segment starts at 20 s, after the video's end at 5 s." in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_reference_though_the_models_folder_has_a_newer_checkpoint(config, copy, tmp_path):
    run = tmp_path / "other"
    shutil.copytree(copy, run / "checkpoint-000001")
    (run / "checkpoint-000001" / "run.json").write_text('{"config": {}}', encoding="utf-8")
    config = dataclasses.replace(config, model=str(run))
    with scripted(reply("0 to 1"), reply("0 to 4"), "x"):
        train(config)
        expected = log_of(config.output)[1]["kl"]
        shutil.rmtree(newest_checkpoint(config.output))
        shutil.copytree(newest_checkpoint(config.output), run / "checkpoint-000002")  # the other run has gone on
        train(config)
    assert log_of(config.output)[1]["kl"] == expected > 0


def test_a_run_whose_start_has_other_weights_now_does_not_go_on(config, copy, capsys):
    begin(config)
    change_weights(copy, lambda weights: {k: v + 1 if k == "lm_head.weight" else v for k, v in weights.items()})
    with pytest.raises(SystemExit):
        train(config)
    assert "the reference of its KL, are gone or changed" in capsys.readouterr().err


def test_a_fingerprint_sees_one_changed_number(copy):
    before = fingerprint(copy)
    change_weights(copy, lambda weights: {k: v + 1e-3 if k == "lm_head.weight" else v for k, v in weights.items()})
    assert fingerprint(copy) != before
    # One weight may have several megabytes, and one model several files; the optimiser's are none of its weights.
    seen = {fingerprint(copy)}
    for number, place in ((2, 0), (2, 2**21), (2, 2**22 - 1), (3, 0)):
        name = f"model-{number}.safetensors"
        content = bytearray((copy / name).read_bytes() if (copy / name).exists() else bytes(2**22))
        content[place] = 1
        (copy / name).write_bytes(content)
        seen.add(fingerprint(copy))
    assert len(seen) == 5
    (copy / "optimizer.0.safetensors").write_bytes(b"its state")
    assert fingerprint(copy) in seen


# ---- Evaluations


def test_rows_that_changed_are_predicted_again_and_rows_that_are_gone_do_not_count(config, checkpoint, tmp_path):
    rows = ["AAA 0 2##person opens the door.", "AAA 1 3##person sits.", "BBB 0 2##person eats.", "BBB 0 4##a lamp."]
    file = Path(config.annotations)
    file.write_text("\n".join(rows), encoding="utf-8")
    settings = evaluate.EvalSettings(model=str(checkpoint), annotations=str(file), videos=config.videos, tasks=("tvg",),
                                     output=str(tmp_path / "out"), workers=0, max_new_tokens=60)
    with scripted(reply("0 to 2")) as calls:
        assert measure(settings)["mIoU"] == pytest.approx(100 * (1 + 1 / 3 + 1 + 1 / 2) / 4)
        mended = [rows[0], "AAA 0 4##person sits.", rows[2]]  # and the last row is gone
        file.write_text("\n".join(mended), encoding="utf-8")
        write_video(Path(config.videos) / "BBB.mp4", [i / 5 for i in range(20)])  # another video under row 2's name
        del calls[:]
        metrics = measure(settings)
    assert len(calls) == 2  # rows 1 and 2
    assert metrics["rows"] == {"tvg": 3}
    assert metrics["mIoU"] == pytest.approx(100 * (1 + 1 / 2 + 1) / 3)
    assert len(read_predictions(settings.output)) == 4  # nothing is deleted
