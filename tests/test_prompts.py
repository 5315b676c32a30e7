"""model/prompts.py: prompt ids, patches and positions against transformers and plain loops; completions as text."""

import itertools
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from shared import SPECIALS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import grpo
from engine.model.prompts import completion_texts, encode_completions, encode_prompt, patchify, position_ids

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

# ---- Prompt ids


def test_prompt_ids_are_the_template_with_one_pad_a_token(tokenizer):
    text = tokenizer.decode(encode_prompt(tokenizer, "Where?", 3))
    assert text == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
                    + "<|video_pad|>" * 3 + "<|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n")


@given(st.lists(st.sampled_from([*SPECIALS, "a door ", "\ue000", "{query}", "</answer>"]), max_size=6))
def test_a_query_never_becomes_a_control_token(tokenizer, parts):
    specials = set(tokenizer.convert_tokens_to_ids(SPECIALS))
    plain, hostile = (encode_prompt(tokenizer, text, 2) for text in ("", "".join(parts)))
    assert [i for i in hostile if i in specials] == [i for i in plain if i in specials]
    assert "".join(parts) in tokenizer.decode(hostile)


# ---- Patches and positions

def test_patches_are_those_of_transformers():
    image = torch.randint(0, 256, (1, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=10**7, image_mean=MEAN, image_std=STD)
    theirs = processor(images=[Image.fromarray(image[0].permute(1, 2, 0).numpy())], return_tensors="pt")
    ours, grid = patchify(image.expand(2, -1, -1, -1), MEAN, STD)
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-6)
    assert grid.tolist() == theirs["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_patches_match_a_plain_loop():
    frames = torch.randint(0, 256, (4, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    patches, grid = patchify(frames, MEAN, STD)
    assert grid.tolist() == [[2, 4, 6]] and patches.shape == (48, 1176)
    x, expected = frames.double() / 255, []
    for g, block_row, block_column, row, column in itertools.product(range(2), range(2), range(3), range(2), range(2)):
        top, left = 28 * block_row + 14 * row, 28 * block_column + 14 * column
        expected.append(torch.cat([(x[2 * g + f, c, top:top + 14, left:left + 14].flatten() - MEAN[c]) / STD[c]
                                   for c in range(3) for f in range(2)]))
    torch.testing.assert_close(patches.double(), torch.stack(expected), rtol=0, atol=1e-5)


PAD = 7


def test_positions_by_hand():
    ids = [1, 1, 1] + [PAD] * 4 + [1, 1]  # two grids of 1 x 2 tokens, 2 s each at 1 frame a second
    assert position_ids(ids, (2, 2, 4), 1.0, PAD, 2).tolist() == [
        [0, 1, 2, 3, 3, 7, 7, 8, 9],   # 3 + floor(1 * 2 positions a second * 2 s)
        [0, 1, 2, 3, 3, 3, 3, 8, 9],
        [0, 1, 2, 3, 4, 3, 4, 8, 9]]   # the text goes on behind the largest, 7
    ids = [1] + [PAD] * 6 + [1]  # one grid, 2 x 3 tokens: now the width is the largest
    assert position_ids(ids, (1, 4, 6), 2.0, PAD, 2).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(0, 9),
       st.sampled_from([0.8, 1.0, 1.92, 2.0, 3.0, 4.0]), st.sampled_from([2, 25]))
def test_positions_match_a_plain_loop(t, h, w, before, after, fps, tokens_per_second):
    expected = [(k, k, k) for k in range(before)]
    for g, y, x in itertools.product(range(t), range(h), range(w)):
        time = int(Fraction(g * tokens_per_second * 2) / Fraction(str(fps)))
        expected.append((before + time, before + y, before + x))
    top = 1 + max(max(p) for p in expected)
    expected += [(top + k,) * 3 for k in range(after)]
    ids = [1] * before + [PAD] * (t * h * w) + [1] * after
    assert position_ids(ids, (t, 2 * h, 2 * w), fps, PAD, tokens_per_second).T.tolist() == [list(p) for p in expected]


def test_visual_positions_agree_with_transformers_where_it_is_right(model, tokenizer):
    ids = torch.tensor([encode_prompt(tokenizer, "Where?", 3 * 2 * 4)])
    grid, pad = torch.tensor([[3, 4, 8]]), model.config.video_token_id
    types = (ids == pad).int() * 2
    last = int(types.nonzero()[-1, 1])
    for fps in (1.0, 2.0):  # whole seconds per grid: it truncates others; the text behind the video it places otherwise
        seconds = torch.tensor([2 / fps])
        theirs, _ = model.model.get_rope_index(ids, types, video_grid_thw=grid, second_per_grid_ts=seconds)
        ours = position_ids(ids[0], grid[0].tolist(), fps, pad, 2)
        assert ours[:, :last + 1].tolist() == theirs[:, 0, :last + 1].tolist()


# ---- Completions


def test_completions_are_encoded_with_their_end_and_decoded_without_it(tokenizer):
    texts = ["<answer>1 to 2</answer>", "", "走 a"]
    ids, mask = encode_completions(tokenizer, texts, torch.device("cpu"))
    assert ids.shape == mask.shape == (3, 24) and not ids[~mask].any()
    assert mask.sum(1).tolist() == [24, 1, 6]  # a byte a token, and the end
    assert mask.tolist() == [sorted(row, reverse=True) for row in mask.tolist()]  # padding on the right
    assert [row[inside][-1] for row, inside in zip(ids, mask)] == [tokenizer.eos_token_id] * 3
    rollout = grpo.Rollout(ids, torch.zeros(3, 24), mask, torch.ones(3, dtype=torch.bool))
    assert completion_texts(tokenizer, rollout) == texts
