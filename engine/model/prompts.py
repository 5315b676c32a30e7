"""Qwen2.5-VL's input and output: prompt ids, patches and positions in, completions as text out.

T frames of H x W pixels; two frames make one grid step, and 28 x 28 pixels of it one visual token.
"""

import functools
import re
from typing import NamedTuple

import jinja2
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PATCH, MERGE, TEMPORAL = 14, 2, 2  # patches of 14 x 14 pixels x 2 frames, 2 x 2 of them are one token


class Prompt(NamedTuple):
    """One prompt with its video, on the model's device."""

    ids: torch.Tensor  # (P,) token ids
    positions: torch.Tensor  # (3, P) from prompts.position_ids
    patches: torch.Tensor  # (patches, 1176) from prompts.patchify; 1176 = 3 channels x 2 frames x 14 x 14 pixels
    grid: torch.Tensor  # (1, 3) frames / 2, height / 14, width / 14


def encode_prompt(tokenizer, text: str, visual_tokens: int) -> list[int]:
    """-> prompt ids: chat template, `visual_tokens` video pads, `text`, the assistant's opening.

    The text is tokenised apart from the template, and a token's own spelling in it in two parts, so that a query which
    spells "<|im_end|>" stays text.
    """
    before, after, pad_at = _template(tokenizer)
    parts = re.split(_inside_tokens(tokenizer), text)
    body = [token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]]
    return before[:pad_at] + [before[pad_at]] * visual_tokens + before[pad_at + 1:] + body + after


@functools.lru_cache(maxsize=1)
def _inside_tokens(tokenizer):
    """A pattern of the places behind the first character of what spells an added token, such as "<|im_end|>"."""
    spelled = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelled)


def check_template(tokenizer):
    """Raise ValueError, which says why, where a tokenizer's chat template does not make prompts."""
    try:
        _template(tokenizer)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"makes no prompt ({error})") from error


@functools.lru_cache(maxsize=1)
def _template(tokenizer):
    """-> (ids before the user's words, ids after them, index of the video pad in the former)."""
    slot = "\ue000"  # a private-use character, which no template contains: the user's words go here
    messages = [{"role": "system", "content": "You are a helpful assistant."},  # what Qwen2.5-VL's template defaults to
                {"role": "user", "content": "<|vision_start|><|video_pad|><|vision_end|>" + slot}]
    template = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in template.split(slot))
    return before, after, before.index(tokenizer.convert_tokens_to_ids("<|video_pad|>"))


def patchify(frames: Tensor, mean: list[float], std: list[float]) -> tuple[Tensor, Tensor]:
    """(T, 3, H, W) uint8 -> ((T/2 * H/14 * W/14, 1176) float32 patches in Qwen2.5-VL's order, (1, 3) grid in patches)

    `mean` and `std` are the checkpoint's, per channel, for pixels in [0, 1].
    """
    T, C, H, W = frames.shape
    steps, rows, columns = T // TEMPORAL, H // PATCH, W // PATCH
    mean, std = (torch.tensor(x, device=frames.device).view(1, C, 1, 1) for x in (mean, std))
    pixels = (frames.float() / 255 - mean) / std
    pixels = pixels.view(
        steps, TEMPORAL, C,  # 0 grid step, 1 frame of the pair, 2 channel
        rows // MERGE, MERGE, PATCH,  # 3 row of blocks, 4 row of patches in the block, 5 row of pixels in the patch
        columns // MERGE, MERGE, PATCH)  # 6, 7, 8 the same for columns
    # Blocks of 2 x 2 patches follow one another row by row, then the patches in a block; a patch is (C, frame, H, W).
    patches = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * columns, C * TEMPORAL * PATCH * PATCH)
    return patches, torch.tensor([(steps, rows, columns)], device=frames.device)


def position_ids(ids: list[int], grid: list[int], fps: float, video_token_id: int,
                 tokens_per_second: int) -> Tensor:
    """-> (3, P) time, height and width positions of a prompt holding one video, by the rule the checkpoints learned.

    Text counts up in all three rows. With `first` text tokens before the video, the visual token (g, h, w) stands at
    first + (floor(g * tokens_per_second * 2 / fps), h, w), and the text after it behind the largest of all three.
    transformers computed this until 5.2 and something else since (docs/checkpoints.md), so the model never infers it.
    """
    ids = torch.as_tensor(ids)
    steps, rows, columns = grid[0], grid[1] // MERGE, grid[2] // MERGE
    first = int((ids == video_token_id).nonzero()[0])
    seconds_per_step = TEMPORAL / fps  # the TRUE sampling rate: the only way in which seconds reach the model
    times = (torch.arange(steps, dtype=torch.float64) * tokens_per_second * seconds_per_step).long()
    visual = torch.stack(torch.meshgrid(times, torch.arange(rows), torch.arange(columns), indexing="ij"))
    visual = visual.view(3, -1) + first
    before = torch.arange(first).expand(3, -1)
    after = torch.arange(len(ids) - first - visual.shape[1]) + int(visual.max()) + 1
    return torch.cat([before, visual, after.expand(3, -1)], dim=1)


def completion_texts(tokenizer, rollout) -> list[str]:
    """grpo.Rollout -> its N completions as text, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.ids, rollout.mask)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def encode_completions(tokenizer, texts: list[str], device) -> tuple[Tensor, Tensor]:
    """N texts -> ids (N, C), each with the end-of-turn token, zeros after it, and their mask (N, C)."""
    rows = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor([*tokens, tokenizer.eos_token_id], device=device))
    masks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)
