"""engine/model/attention.py and decoding.py: the shared prompt against the repeated one in the library's model."""

import math

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file
from shared import make_prompt, tiny_model, token_ids

import grpo
from engine.model.attention import embed, install_attention, pack, pack_prompts, run_language_model, visual_features
from engine.model.decoding import Cached, Decoder, advance, run_layer, usable
from engine.model.loading import recompute_activations
from engine.model.prompts import Prompt

LENGTHS = [20, 1, 7, 20, 3, 13, 2, 1]  # of four completions of each of two prompts


@pytest.fixture()
def completions():
    """-> ids and mask (8, 20) of completions of different lengths."""
    mask = torch.arange(20) < torch.tensor(LENGTHS).unsqueeze(1)
    ids = torch.randint(0, 200, (8, 20), generator=torch.Generator().manual_seed(3))
    return ids * mask, mask


def library_logits(model, prompt, completion, temperature=1.0):
    """The plain computation: the library's own model on one prompt with its video and one completion -> (C, V)."""
    model.set_attn_implementation("sdpa")
    del model.model.visual.patch_embed.forward
    ids = torch.cat([prompt.ids, completion]).unsqueeze(0)
    more = prompt.positions[:, -1:] + 1 + torch.arange(len(completion))
    logits = model(input_ids=ids, position_ids=torch.cat([prompt.positions, more], 1).unsqueeze(1),
                   pixel_values_videos=prompt.patches, video_grid_thw=prompt.grid).logits[0] / temperature
    install_attention(model)
    return logits[len(prompt.ids) - 1:-1]


def library_logps(model, prompt, completion, banned, temperature=1.0):
    """The same with `banned` ids left out -> (C,) log-probabilities of the completion."""
    logits = library_logits(model, prompt, completion, temperature)
    logits[:, banned] = -math.inf
    return logits.log_softmax(-1).gather(1, completion.unsqueeze(1)).squeeze(1)


# ------------------------------------------------------------------------------------------------ packed pass


def test_the_row_and_its_parts_by_hand():
    # The example of engine/model/attention.py: prompts "abc" and "de", completions "x" and "yz" of one prompt each.
    prompts = [Prompt(torch.arange(n), torch.arange(n).expand(3, n) + 10 * n, None, None) for n in (3, 2)]
    mask = torch.tensor([[True, False], [True, True]])
    attention, positions, predictor = pack(prompts, mask)
    assert attention.prompt_cells[0].tolist() == [0, 1, 2] and attention.prompt_cells[1, :2].tolist() == [3, 4]
    assert attention.own_cells[0, 0] == 5 and attention.own_cells[1].tolist() == [6, 7]
    assert attention.row_cells.tolist() == [0, 1, 2, 3, 4, 6, 8, 9]
    assert positions.tolist() == [[[30, 31, 32, 20, 21, 33, 22, 23]]] * 3
    assert predictor.tolist() == [2, 4, 6]  # c predicts x, e predicts y, y predicts z
    seen = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]  # keys: the prompt's three, own two
    assert attention.allowed.int().tolist() == [*map(list, seen)]
    prefill, positions, last = pack_prompts(prompts)
    assert prefill.prompt_cells[0].tolist() == [0, 1, 2] and prefill.prompt_cells[1, :2].tolist() == [3, 4]
    assert prefill.row_cells.tolist() == [0, 1, 2, 3, 4] and last.tolist() == [2, 4]
    assert positions.tolist() == [[[30, 31, 32, 20, 21]]] * 3


def test_the_completions_of_a_group_share_one_mask(model, prompts, completions, banned, monkeypatch):
    # With a mask for each completion, 7B needs 0.5 GiB more at the worst.
    attend, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*inputs, attn_mask=None, **options):
        shapes.append(attn_mask if attn_mask is None else tuple(attn_mask.shape))
        return attend(*inputs, attn_mask=attn_mask, **options)

    ids, mask = completions
    features = visual_features(model, prompts)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    grpo.group_logps(model, prompts, ids, mask, banned, features=features)
    longest = max(len(prompt.ids) for prompt in prompts)
    group = 2 * 20, longest + 20  # two heads share their keys, completions have 20 tokens
    assert shapes == [None, group, group] * 2  # in each layer: both prompts, and one group after the other


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_vision", [False, True])
def test_packed_group_equals_repeated_prompts_in_values_and_gradients(model, prompts, completions, banned,
                                                                      checkpointing, train_vision):
    ids, mask = completions
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    model.model.visual.requires_grad_(train_vision)

    plain = [library_logps(model, prompts[n // 4], ids[n][mask[n]], banned) for n in range(8)]
    sum((logp * weights[n, :len(logp)]).sum() for n, logp in enumerate(plain)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if checkpointing:
        recompute_activations(model)
    model.train()
    features = None if train_vision else [f.detach() for f in visual_features(model, prompts)]
    logps, _ = grpo.group_logps(model, prompts, ids, mask, banned, features=features)
    (logps * weights).sum().backward()

    assert (logps[mask] - torch.cat(plain)).abs().max() < 1e-5
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert any("visual" in name for name in found) == train_vision
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-5 * max(1, expected[name].abs().max()), name


def test_the_vision_tower_sees_the_same_windows_as_the_librarys(tokenizer, model):
    # 10 x 12 patches in windows of 8 x 8: whole ones, and narrow ones at the right and lower edges.
    prompts = [make_prompt(tokenizer, model, 140, 168, 4, "a"), make_prompt(tokenizer, model, 56, 56, 2, "b", seed=1)]
    found = torch.cat(visual_features(model, prompts))
    model.set_attn_implementation("sdpa")
    del model.model.visual.patch_embed.forward
    assert (found - torch.cat(visual_features(model, prompts))).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ decoding


def test_every_step_of_a_batch_equals_the_librarys_forward_pass(model, prompts, completions):
    ids, _ = completions  # given tokens of full length: what comes after an end is computed, too, and thrown away
    with torch.no_grad():
        decoder = Decoder(model, prompts, 4, 20)
        hidden = [decoder.start()] + [decoder.step(ids[:, step]).clone() for step in range(19)]
        logits = model.lm_head(torch.stack(hidden, 1))  # (8, 20, V)
        for n in range(8):
            expected = library_logits(model, prompts[n // 4], ids[n])
            assert (logits[n] - expected).abs().max() < 1e-5


def test_scores_of_a_decoding_step_are_those_of_float32(monkeypatch):
    # Keys with a large common offset, as biases give them: rounding a score of 300 to bfloat16 would move it by one.
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))  # CPUs have none
    noise = torch.Generator().manual_seed(0)
    q, k, own = (torch.randn(n, 1, m, 16, generator=noise) + 4 for n, m in ((2, 1), (1, 40), (2, 1)))
    v, w = (torch.randn(n, 1, m, 16, generator=noise) for n, m in ((1, 40), (2, 1)))
    q, k, v, own, w = (x.bfloat16() for x in (q, k, v, own, w))
    buffers = torch.zeros(2, 1, 3, 16).bfloat16(), torch.zeros(2, 1, 3, 16).bfloat16()
    allowed = torch.arange(43).expand(2, 1, 1, 43) <= 40
    found = Cached(k, v, *buffers, torch.tensor(0), allowed).attend(q, own, w, 1.0)
    keys, values = (torch.cat([x.expand(2, -1, -1, -1), y], 2).double() for x, y in ((k, own), (v, w)))
    expected = (q.double() @ keys.mT).softmax(-1) @ values
    assert (found[:, 0].double() - expected[:, :, 0]).abs().max() < 0.02


def decode_once(decoder, step, token):
    """A step as a GPU takes it, but for the graph."""
    with torch.no_grad():
        decoder.caches[0].advance_to(0)
        return advance(decoder.model, decoder.caches, step, token, decoder.last_position + 1)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_layer_is_compiled_for_a_whole_run_and_for_all_layers(tokenizer, layers):
    # What CUDA compiles: a graph break, or a compilation for each layer or prompt, would cost more than it saves.
    torch._dynamo.reset()
    model = tiny_model(tokenizer, num_hidden_layers=layers).eval()
    prompts = [make_prompt(tokenizer, model, 28, 56, 8, "verb " * k, seed=k) for k in range(1, 13)]
    count = torch._dynamo.testing.CompileCounter()
    step = torch.compile(run_layer, backend=count, fullgraph=True, dynamic=True)
    token = torch.arange(3)
    counts = []
    for k in range(12):  # iterations of one prompt, all of other lengths
        decoder = Decoder(model, [prompts[k]], 3, 20 + 7 * k)
        expected = decode_once(Decoder(model, [prompts[k]], 3, 20 + 7 * k), run_layer, token)
        assert torch.allclose(decode_once(decoder, step, token), expected, atol=1e-5)
        counts.append(count.frame_count)
    # Dynamo may tie its first version to tensors of the first layer, which the second layer no longer finds.
    assert counts[0] <= 2 and counts[-1] == counts[0]


def test_where_nothing_can_be_compiled_sampling_goes_on_without(model, prompts, monkeypatch):
    tried = []

    def broken(*_):
        tried.append(1)
        raise RuntimeError("no C compiler")

    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    step = torch.compile(run_layer, backend=broken, dynamic=True)
    inputs = torch.arange(8), Decoder(model, prompts, 4, 5).last_position + 1

    def forward(through_layer, *inputs):
        return advance(model, Decoder(model, prompts, 4, 5).caches, through_layer, *inputs)

    with torch.no_grad():
        with pytest.warns(UserWarning, match="could not be compiled.*no C compiler"):
            assert usable(forward, step, inputs) is run_layer
        usable(forward, step, inputs)  # in the next iteration
        assert len(tried) == 1
        torch._dynamo.config.disable = False
        torch._dynamo.reset()
        fine = torch.compile(run_layer, backend="eager", dynamic=True)
        assert usable(forward, fine, inputs) is fine


def test_a_video_pad_inside_a_completion_is_a_token_like_others(tokenizer, model, prompts):
    pad = int(token_ids(tokenizer, "<|video_pad|>"))
    more = torch.tensor([65, pad, 66])
    with torch.no_grad():
        features = visual_features(model, prompts)
        row = embed(model, prompts, features, more)[0]
        assert torch.equal(row[-3:], model.get_input_embeddings()(more))
    pads = torch.cat([prompt.ids for prompt in prompts]) == pad
    assert torch.equal(row[:-3][pads], torch.cat(features))


# ------------------------------------------------------------------------------------------------ inside transformers


def test_the_places_in_transformers_that_we_rely_on_have_not_moved(tokenizer, model, prompts, tmp_path):
    """If this fails, a new release of transformers has moved what its message names: look there first."""
    seen = []  # once a layer

    class Noted:
        def attend(self, query, key, value, scaling):
            seen.append((query.shape, key.shape, scaling))
            return query.transpose(1, 2)

    embeddings = torch.zeros(1, 5, 32)
    run_language_model(model, embeddings, torch.zeros(3, 1, 5, dtype=torch.long), Noted())
    assert seen == 2 * [((1, 4, 5, 8), (1, 2, 5, 8), 8**-0.5)], (
        "Qwen2_5_VLTextModel no longer hands the value of attention_mask['full_attention'] to the registered attention")
    with torch.no_grad():
        decoder = Decoder(model, prompts[:1], 1, 2)
        seen.clear()
        advance(model, [Noted(), Noted()], run_layer, torch.zeros(1, dtype=torch.long), decoder.last_position)
    assert len(seen) == 2, "a decoder layer no longer takes hidden states, attention_mask and position_embeddings"
    features = model.get_video_features(prompts[0].patches, prompts[0].grid)
    assert isinstance(features.pooler_output, tuple | list), (
        "get_video_features no longer keeps its list in pooler_output")
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # which would plan for every new shape
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    for name in ("visual.patch_embed.proj.weight", "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight",
                 "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
                 "lm_head.weight"):
        assert name in names, f"save_pretrained no longer writes {name}, the name in the published checkpoints"
