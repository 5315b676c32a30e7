"""A pretend GPU: real values on a device of its own that refuses to meet the CPU's, and counts what the host waits for.

CUDA lets nothing of the CPU but single numbers take part in its operations, and makes the host wait where it asks for a
value. A CPU shows neither. Forward passes only: the backward pass of such a device would need threads of its own.
tests/test_devices.py runs this.
"""

import contextlib
from unittest import mock

import pytest
import torch
from shared import make_prompt, tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import grpo
from engine.attention import Prompt
from engine.decoding import Decoder

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
         aten.repeat_interleave.Tensor, aten._unique2.default}  # the host needs a value to go on
MAY_MIX = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default}


class Pretended(torch.Tensor):
    """A tensor that says gpu:0 and holds a CPU's."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device="gpu:0")

    def __init__(self, held):
        self.held = held

    def tolist(self):
        waits.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


waits = []  # names of operations for which the host waited


def run(func, args, kwargs):
    """An operation on held tensors; it raises where a CPU tensor takes part that is no single number."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    pretended = [isinstance(x, Pretended) for x in given]
    if func not in MAY_MIX and any(pretended):
        strays = [x for x, ours in zip(given, pretended) if not ours and x.dim()]
        assert not strays, f"{func} mixes devices: {[tuple(x.shape) for x in strays]}"
    masks = func in (aten.index.Tensor, aten.index_put_.default) and any(
        x is not None and x.dtype == torch.bool for x in args[1])
    if any(pretended) and (func in WAITS or masks):
        waits.append(str(func))
    to = kwargs.get("device")
    leaves = to is not None and torch.device(to).type == "cpu"
    if leaves and any(pretended):
        waits.append(f"{func} to the CPU")
    arrives = (any(pretended) or to is not None) and not leaves
    if to is not None:
        kwargs = kwargs | {"device": "cpu"}
    held, options = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    if func is aten.bmm.dtype:  # bfloat16 to float32, which CPUs lack
        result = torch.bmm(held[0].float(), held[1].float())
    else:
        result = func(*held, **options)
    if func is aten._local_scalar_dense.default or not arrives:
        return result
    wrapped = tree_map_only(torch.Tensor, Pretended, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(pretended) else wrapped


class Factories(TorchDispatchMode):
    """Makes torch.zeros(device="gpu:0") and moves from the CPU pretend, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if to is not None and torch.device(to).type == "gpu":
            return run(func, args, kwargs)
        return func(*args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def registered():
    _setup_privateuseone_for_python_backend("gpu")


@contextlib.contextmanager
def pretending():
    """-> the list of what the host waits for."""
    make, attend = torch.tensor, torch.nn.functional.scaled_dot_product_attention

    def tensor(values, device=None, **options):
        made = make(values, **options)
        return Pretended(made) if device is not None and torch.device(device).type == "gpu" else made

    def attention(*args, **options):  # its kernels are chosen below the dispatcher
        inputs = [x for x in (*args, options.get("attn_mask")) if x is not None]
        assert all(isinstance(x, Pretended) for x in inputs), "attention mixes devices"
        held = [tree_map_only(Pretended, lambda x: x.held, x) for x in (args, options)]
        return Pretended(attend(*held[0], **held[1]))

    waits.clear()
    with (mock.patch.object(torch, "tensor", tensor), Factories(),
          mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)):
        yield waits


def moved(model):
    """The model's weights and buffers on the pretend device."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(Pretended(p.data), requires_grad=False)
        for name, x in list(module._buffers.items()):
            if x is not None:
                module._buffers[name] = Pretended(x)
    return model


def on_gpu(prompts):
    return [Prompt(*map(Pretended, prompt)) for prompt in prompts]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request, tokenizer):
    """A model and its copy on the pretend device, with two prompts and the banned ids for each."""
    plain, ours = (tiny_model(tokenizer).to(request.param).eval() for _ in range(2))
    prompts = [make_prompt(tokenizer, plain, 56, 84, 24, "when is the door opened"),
               make_prompt(tokenizer, plain, 28, 56, 12, "add a verb", seed=1)]
    banned = token_ids(tokenizer, "<|video_pad|>", "<|image_pad|>")
    return (plain, prompts, banned), (moved(ours), on_gpu(prompts), Pretended(banned))


@torch.no_grad()
def forward_passes(model, prompts, banned):
    """Tower, sampling, packed pass and loss of one prompt and of two -> all that came out."""
    found = []
    for some in (prompts[:1], prompts):
        rollout = grpo.sample_group(model, some, 3, 6, banned[:0], banned, temperature=0.0)
        logps, entropy = grpo.group_logps(model, some, rollout.ids, rollout.mask, banned, 0.7)
        advantages = grpo.group_advantages(rollout.logps.sum(1).view(-1, 3)).flatten()
        loss, _ = grpo.grpo_loss(logps, logps, logps - 0.1, advantages, rollout.mask)
        found += [rollout.ids, rollout.logps, logps, entropy, loss]
    return found


def test_no_tensor_of_the_cpu_meets_one_of_the_gpu(pair):
    plain, ours = pair
    with pretending():
        found = [x.held for x in forward_passes(*ours)]
    assert all(x.isfinite().all() for x in found)
    if plain[0].dtype == torch.float32:  # CPUs lack the product of bfloat16 with a float32 result
        assert all(torch.equal(a, b) for a, b in zip(found, forward_passes(*plain), strict=True))


@torch.no_grad()
def test_a_token_makes_the_host_wait_once(pair):
    """To learn whether all completions have ended; a decoding step itself never, or no graph could hold it."""
    model, prompts, banned = pair[1]
    with pretending() as waits:
        features = grpo.visual_features(model, prompts)
        counts = []
        for tokens in (4, 10):
            waits.clear()
            grpo.sample_group(model, prompts, 3, tokens, banned[:0], banned, features=features)
            counts.append(len(waits))
        assert counts[1] - counts[0] == 6
        decoder = Decoder(model, prompts, 3, 4, features)
        token = Pretended(torch.zeros(6, dtype=torch.long))
        waits.clear()
        decoder.step(token)
        decoder.step(token)
        assert waits == []


def test_the_device_notices_a_mixture_and_a_wait():
    ours, theirs = Pretended(torch.ones(3)), torch.ones(3)
    with pretending() as waits:
        with pytest.raises(AssertionError, match="mixes devices"):
            ours + theirs
        assert (ours + theirs.sum()).held.tolist() == [4.0] * 3  # a single number may come from anywhere
        assert waits == []
        assert bool((ours + torch.zeros(3, device="gpu:0")).sum() == 3)
        assert ours[ours > 0].held.tolist() == [1.0] * 3
        assert ours.cpu().tolist() == [1.0] * 3
        assert len(waits) == 3
