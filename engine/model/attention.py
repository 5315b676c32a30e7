"""Attention for G completions that share one prompt.

B prompts and their N = B * G completions lie in one row of T tokens, without padding:

    [ prompt_1 ] ... [ prompt_B ][ o_1 ] ... [ o_N ]

Every layer but attention sees the row as it is. Attention takes it apart into a padded batch of prompts and a padded
batch of completions: a prompt attends to itself, a completion to its prompt and to itself. Completions never attend
to each other, so no (T, T) mask is built.

P is the length of the longest prompt, C of the longest completion, D the size of a head. The model has `heads` query
heads and `kv_heads` heads of keys and values.
"""

import itertools
import types
from typing import NamedTuple

import torch
from torch import nn


# ------------------------------------------------------------------------------------------------ the model's input
def visual_features(model, prompts):
    """Run the vision tower -> a list of B tensors (visual tokens, H)."""
    features = []
    # Neighbours whose frames have one size go through the tower together. Their windows are then of one size too.
    for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.grid[0, 1:].tolist()):
        group = list(group)
        patches = torch.cat([prompt.patches for prompt in group]).to(model.dtype)
        grids = torch.cat([prompt.grid for prompt in group])
        features += model.get_video_features(patches, grids).pooler_output  # transformers 5 keeps the list there
    return features


@torch.no_grad()
def frozen_features(model, prompts):
    """`visual_features` without gradients, for sampling, and for all passes of a tower that is not trained."""
    return visual_features(model, prompts)


def embed(model, prompts, features, completion_ids=None):
    """Embeddings (1, T, H) of all prompts, with visual features in place of video pads, then of `completion_ids`."""
    prompt_ids = torch.cat([prompt.ids for prompt in prompts])
    ids = prompt_ids if completion_ids is None else torch.cat([prompt_ids, completion_ids])
    embeddings = model.get_input_embeddings()(ids)  # one look-up: each allocates a (V, H) gradient
    is_pad = ids == model.config.video_token_id
    is_pad[len(prompt_ids):] = False  # a demonstration may spell the pad; it stays text
    return embeddings.masked_scatter(is_pad.unsqueeze(-1), torch.cat(features).to(embeddings.dtype)).unsqueeze(0)


def run_language_model(model, embeddings, positions, attention):
    """Run the decoder layers over (rows, L, H) embeddings -> hidden states (rows, L, H).

    `attention` is a Prefill, a Packed or a decoding.Cached. It travels as the attention mask: given a dictionary,
    Qwen2_5_VLTextModel builds no mask of its own, and hands the value of "full_attention" to `group_attention`.
    """
    return model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False,
                                      attention_mask={"full_attention": attention}).last_hidden_state


# ------------------------------------------------------------------------------------------------ the row and its parts
#
# An example: prompts "abc" and "de", completions "x" and "yz" of one prompt each, in a row of 8 tokens.
#
#     row           a b c d e x y z
#     prompt_cells  0 1 2     own_cells  5 .     where in the row each cell of a padded batch stands;
#                   3 4 .                6 7     "." is padding and holds some valid index
#     row_cells     0 1 2 3 4 6 8 9              the way back: the cell, counted over both batches, of each token
class Prefill(NamedTuple):
    """Prompts alone. Every layer's keys and values are kept for the decoding that follows."""

    prompt_cells: torch.Tensor  # (B, P)
    row_cells: torch.Tensor  # (T,)
    keys_values: list  # a layer's (keys, values), each (B, kv_heads, P, D), appended by `attend`

    def attend(self, query, key, value, scaling):
        """(1, heads, T, D) queries, (1, kv_heads, T, D) keys and values -> (1, T, heads, D)."""
        q, k, v = (take_cells(x, self.prompt_cells) for x in (query, key, value))
        self.keys_values.append((k.contiguous(), v.contiguous()))  # every decoding step would copy a transposed view
        return back_to_row([attend_causally(q, k, v, scaling)], self.row_cells)


class Packed(NamedTuple):
    """Prompts and completions, for the training passes."""

    prompt_cells: torch.Tensor  # (B, P)
    own_cells: torch.Tensor  # (N, C)
    row_cells: torch.Tensor  # (T,)
    allowed: torch.Tensor  # (B, C, P + C) bool: the keys that a completion's token may attend to, its prompt's first

    def attend(self, query, key, value, scaling):
        """(1, heads, T, D) queries, (1, kv_heads, T, D) keys and values -> (1, T, heads, D)."""
        prompt_q, prompt_k, prompt_v = (take_cells(x, self.prompt_cells) for x in (query, key, value))
        own = (take_cells(x, self.own_cells).chunk(len(self.allowed)) for x in (query, key, value))
        batches = [attend_causally(prompt_q, prompt_k, prompt_v, scaling)]
        # Group by group: the completions of one share a mask, and a batch of several would need a mask for each.
        for shared_k, shared_v, own_q, own_k, own_v, allowed in zip(prompt_k, prompt_v, *own, self.allowed):
            keys = prompt_then_own(shared_k, own_k)
            values = prompt_then_own(shared_v, own_v)
            batches.append(attend_to_allowed(own_q, keys, values, allowed, scaling))
        return back_to_row(batches, self.row_cells)


def take_cells(x, cells):
    """(1, heads, T, D), (rows, columns) places in the row -> a padded batch (rows, heads, columns, D)."""
    tokens_first = x[0].transpose(0, 1)  # (T, heads, D)
    return tokens_first.index_select(0, cells.flatten()).unflatten(0, cells.shape).transpose(1, 2)


def back_to_row(batches, row_cells):
    """Padded batches (rows, heads, columns, D) -> (1, T, heads, D)."""
    cells = torch.cat([batch.transpose(1, 2).flatten(0, 1) for batch in batches])  # (all cells, heads, D)
    return cells.index_select(0, row_cells).unsqueeze(0)


def attend_causally(q, k, v, scaling):
    """Each prompt attends to itself. Padding is on the right, so no real token ever sees it and no mask is needed."""
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)


def prompt_then_own(prompt, own):
    """(kv_heads, P, D) of a prompt, (G, kv_heads, C, D) of its completions -> (G, kv_heads, P + C, D)."""
    return torch.cat([prompt.expand(len(own), -1, -1, -1), own], dim=2)


def attend_to_allowed(q, k, v, allowed, scaling):
    """(G, heads, C, D) queries to (G, kv_heads, P + C, D) keys and values -> (G, heads, C, D)."""
    G, heads, C, D = q.shape
    kv_heads = k.shape[1]
    # Query heads that share keys stand one after the other as queries, so that no key is repeated for them.
    q = q.reshape(G, kv_heads, heads // kv_heads * C, D)
    mask = allowed.repeat(heads // kv_heads, 1)  # (heads / kv_heads * C, P + C)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(G, heads, C, D)


def pack_prompts(prompts):
    """Lay B prompts out as one row -> (Prefill, positions (3, 1, T), last).

    `last` (B,) is the place in the row of each prompt's last token.
    """
    is_prompt, positions, last = _lay_out_prompts(prompts)
    prompt_cells = _numbered(is_prompt).view(is_prompt.shape)
    row_cells = is_prompt.flatten().nonzero().squeeze(1)
    return Prefill(prompt_cells, row_cells, []), positions.unsqueeze(1), last


def pack(prompts, mask):
    """Lay B groups out as one row -> (Packed, positions (3, 1, T), predictor).

    `mask` (N, C) is True on the completions' tokens, which are padded on the right. The positions of every completion
    continue its prompt's as if the others were absent. `predictor` (completion tokens,) is the place in the row whose
    hidden state predicts each completion token: the token before it, which for the first is its prompt's last.
    """
    is_prompt, positions, last = _lay_out_prompts(prompts)
    G = len(mask) // len(prompts)
    N, C = mask.shape

    is_token = torch.cat([is_prompt.flatten(), mask.flatten()])  # over the cells of both batches
    place = _numbered(is_token)
    prompt_cells = place[:is_prompt.numel()].view(is_prompt.shape)
    own_cells = place[is_prompt.numel():].view(N, C)
    row_cells = is_token.nonzero().squeeze(1)

    column = torch.arange(C, device=mask.device)
    causal = (column <= column.unsqueeze(1)).expand(len(prompts), C, C)
    sees_prompt = is_prompt.unsqueeze(1).expand(-1, C, -1)  # (B, C, P)
    allowed = torch.cat([sees_prompt, causal], dim=2)

    last_position = positions[:, last].repeat_interleave(G, dim=1)  # (3, N)
    own_positions = last_position.unsqueeze(2) + 1 + column  # (3, N, C)
    first_predictor = last.repeat_interleave(G).unsqueeze(1)  # (N, 1)
    predictor = torch.cat([first_predictor, own_cells[:, :-1]], dim=1)  # shifted right by one
    positions = torch.cat([positions, own_positions[:, mask]], dim=1)
    return Packed(prompt_cells, own_cells, row_cells, allowed), positions.unsqueeze(1), predictor[mask]


def _lay_out_prompts(prompts):
    """-> (is_prompt (B, P) bool, False at padding; positions (3, tokens); last (B,) places in the row)."""
    device = prompts[0].ids.device
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
    longest = max(len(prompt.ids) for prompt in prompts)
    is_prompt = torch.arange(longest, device=device) < lengths.unsqueeze(1)
    positions = torch.cat([prompt.positions for prompt in prompts], dim=1)
    return is_prompt, positions, lengths.cumsum(0) - 1


def _numbered(is_token):
    """Flattened: the rank of each True among all of them; arbitrary, but a valid index, where False."""
    return is_token.flatten().cumsum(0) - 1


# ------------------------------------------------------------------------------------------------ inside transformers
def group_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """The language model's attention, in the form that transformers calls; see `run_language_model`."""
    return attention_mask.attend(query, key, value, scaling), None


def window_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    """The vision tower's attention within frames or windows, all in one batch: (1, heads, T, D) -> (1, T, heads, D).

    transformers would call the kernel for one window after the other, some 200 of them in each of 28 layers.
    """
    starts = cu_seq_lens_q[:-1].long()
    lengths = cu_seq_lens_q.diff()
    column = torch.arange(max_length_q, device=query.device)
    inside = column < lengths.unsqueeze(1)  # (windows, longest window)
    cells = torch.where(inside, starts.unsqueeze(1) + column, 0)
    q, k, v = (take_cells(x, cells) for x in (query, key, value))
    mask = None if inside.all() else inside[:, None, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2)[inside].unsqueeze(0), None


def install_attention(model):
    """Put the attention above into Qwen2.5-VL, and a faster first layer. `checkpoints.load_model` calls this.

    What grpo.py does needs it. The model's own forward and `generate` no longer work afterwards.
    """
    from transformers import AttentionInterface  # not above: a mistyped option should not wait for it

    AttentionInterface.register("group", group_attention)
    # Qwen2_5_VLVisionAttention hands over all windows at once only where the name of the attention holds "flash".
    AttentionInterface.register("window_flash", window_attention)
    # On Hopper and Blackwell PyTorch would prefer cuDNN's attention, which plans each new shape for half a second
    # (FunASR issue 3704); here nearly every iteration brings new shapes. The flash kernel plans nothing.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.set_attn_implementation({"text_config": "group", "vision_config": "window_flash"})
    first = model.model.visual.patch_embed
    first.forward = types.MethodType(_embed_patches, first)


def _embed_patches(self, patches):
    """The tower's first layer: a convolution whose stride is its kernel, three times as slow as a matrix product."""
    return nn.functional.linear(patches, self.proj.weight.flatten(1))
