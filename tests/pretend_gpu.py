"""A pretend GPU: real values on a device of its own that refuses to meet the CPU's, and counts what the host waits for.

CUDA lets nothing of the CPU but single numbers take part in its operations, and makes the host wait where it asks for a
value. A CPU shows neither. Whole iterations run here, from the clips to the optimiser's step. tests/test_devices.py
runs this.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from shared import QUERIES, alone, make_prompt, tiny_model, token_ids  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import data
import grpo
import invert4tvg
from benchmarks import accept, meter, models
from engine.model.decoding import Decoder
from engine.model.loading import load_model
from engine.model.optimizer import MasterAdamW
from engine.model.prompts import Prompt
from engine.video.clips import Item
from engine.video.frames import Clip

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


class Module(_DummyBackendModule):
    def get_amp_supported_dtype(self):  # gradient checkpointing asks
        return [torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def registered():
    _setup_privateuseone_for_python_backend("gpu", backend_module=Module())


class Attention(torch.autograd.Function):
    """scaled_dot_product_attention, whose kernels are chosen below the dispatcher, on held tensors."""

    @staticmethod
    def forward(ctx, options, *inputs):
        ctx.inputs = [x.held.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            ctx.output = attend(*ctx.inputs, **options)
        return Pretended(ctx.output.detach())

    @staticmethod
    def backward(ctx, gradient):
        return None, *map(Pretended, torch.autograd.grad(ctx.output, ctx.inputs, gradient.held))


attend = torch.nn.functional.scaled_dot_product_attention


@contextlib.contextmanager
def pretending():
    """-> the list of what the host waits for."""
    def pretending_too(make):
        def tensor(values, device=None, **options):
            made = make(values, **options)
            return Pretended(made) if device is not None and torch.device(device).type == "gpu" else made

        return tensor

    def attention(*args, **options):
        inputs = [x for x in (*args, options.get("attn_mask")) if x is not None]
        assert all(isinstance(x, Pretended) for x in inputs), "attention mixes devices"
        return Attention.apply(tree_map_only(Pretended, lambda x: x.held, options), *args)

    def summed(x, **_):  # over the only rank
        assert isinstance(x, Pretended), "NCCL takes no tensor of the CPU"

    waits.clear()
    with (mock.patch.object(torch, "tensor", pretending_too(torch.tensor)), Factories(),
          mock.patch.object(torch, "as_tensor", pretending_too(torch.as_tensor)),
          mock.patch.object(dist, "all_reduce", summed),
          mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)):
        yield waits


def moved(model):
    """The model's weights and buffers on the pretend device."""
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(Pretended(p.data), requires_grad=p.requires_grad)
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


# ------------------------------------------------------------------------------------------------ whole iterations


class Alone(grpo.Policy):
    """What DistributedDataParallel is with one rank."""

    def no_sync(self):
        return contextlib.nullcontext()


def make_run(config, folder, on_device=lambda x: x, device=lambda model: model):
    """A Run without DDP, whose tensors lie on the device that `device` and `on_device` move them to."""
    plain, processor = load_model(folder, torch.device("cpu"))
    plain.model.visual.requires_grad_(False)
    reference = load_model(folder, torch.device("cpu"))[0].requires_grad_(False)
    model = device(plain)
    processor = processor._replace(eos=on_device(processor.eos), banned=on_device(processor.banned))
    policy = Alone(model, processor.banned, config.temperature)
    reference = grpo.Policy(device(reference), processor.banned, config.temperature)
    optimizer = MasterAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2,
                            offload=config.offload_optimizer)
    samples = [data.Sample(f"{n}.mp4", query, 0.5, 2.0, 3.0) for n, query in enumerate(QUERIES)]
    suits = {"vc": [True, True, False, True]}
    sampler = data.TaskSampler(len(samples), suits, prompts=2, p=config.p, iterations=2)
    return invert4tvg.Run(config, samples, None, sampler, model, policy, reference, processor, optimizer)


make_generator = torch.Generator


def iterations(run):
    """Two of them on random frames -> (metrics without seconds, weights)."""
    metrics = []
    for iteration in range(2):
        frames = np.random.default_rng(iteration).integers(0, 255, (4, 3, 28, 56), dtype=np.uint8)
        clip = Clip(frames, np.arange(4) / 2, 2.0, 2.0)
        items = [Item(index, task, clip) for index, task in (run.sampler.candidates(iteration, s)[0] for s in (0, 1))]
        with mock.patch.object(invert4tvg, "random_generator", lambda *_: make_generator().manual_seed(1)):
            metrics.append(invert4tvg.grpo_iteration(run, iteration, items, lr=1e-2))
    values = [{name: value for name, value in row.items() if "seconds" not in name} for row in metrics]
    return values, [p.detach() for p in run.model.parameters()]


@pytest.mark.parametrize("changes", [{"mu": 2}, {"micro_batch": 1, "loss_reduction": "token"},
                                     {"offload_optimizer": True}], ids=["mu", "micro-batches", "offload"])
def test_whole_iterations_run_on_the_device_as_on_a_cpu(alone, checkpoint, tmp_path, monkeypatch, changes):  # noqa: F811
    config = invert4tvg.Config(**{"output": str(tmp_path), "group_size": 3, "max_new_tokens": 5, "micro_batch": 2,
                                  "p": 0.5, "save_rollouts": 0} | changes)
    scored = iter(range(100))  # every completion is worth something else, so that the weights move
    monkeypatch.setattr(invert4tvg.rewards, "score", lambda *args, **kwargs: {"total": float(next(scored) % 5)})
    expected = iterations(make_run(config, checkpoint))
    scored = iter(range(100))
    with pretending():
        values, weights = iterations(make_run(config, checkpoint, Pretended, moved))
    for row, other in zip(values, expected[0], strict=True):  # gradients are added up in another order
        assert row == pytest.approx(other, rel=1e-3, abs=1e-6) and row["grad_norm"] > 0
    assert all(torch.allclose(a.held, b, atol=1e-4) for a, b in zip(weights, expected[1], strict=True))


def test_a_step_that_is_not_finite_is_left_out(alone, checkpoint, tmp_path):  # noqa: F811
    config = invert4tvg.Config(output=str(tmp_path), group_size=3, max_new_tokens=5, micro_batch=2, save_rollouts=0)
    with pretending():
        run = make_run(config, checkpoint, Pretended, moved)
        run.model.lm_head.weight.held[0, 0] = float("nan")
        values, _ = iterations(run)
    assert [row["skipped"] for row in values] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------ the acceptance


@pytest.fixture()
def place(tmp_path, monkeypatch):
    """The acceptance's place on the device: its models are moved there, and what it asks of CUDA answers nothing."""
    def load(name, device):
        model, processor = load_model(name, torch.device("cpu"))
        return moved(model), processor._replace(eos=Pretended(processor.eos), banned=Pretended(processor.banned))

    place = accept.Place(torch.device("gpu:0"), tmp_path, cards=1)
    text, half, vision = models.SIZES["5m"]
    monkeypatch.setitem(models.SIZES, "5m", (text | {"num_hidden_layers": 2}, half, vision))
    (tmp_path / "5m").mkdir()
    models.make_checkpoint(tmp_path / "5m", "5m", torch.device("cpu"))
    monkeypatch.setattr(accept.loading, "load_model", load)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make_generator())
    for name in ("set_sync_debug_mode", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    return place


def test_a_stage_of_the_acceptance_runs_on_the_device(place):
    """Sampling, the packed pass, its backward pass and a step; `graphs` and `fresh_shapes` are more of the same."""
    with pretending():
        checks = list(accept.eager(place))
    assert len(checks) == 4 and all(check.passed for check in checks)


def test_the_acceptances_iterations_at_the_real_size_run_on_the_device(place, alone, monkeypatch):  # noqa: F811
    cell = models.Cell(256, 8)
    config = invert4tvg.Config(model=str(place.folder / "5m"), max_new_tokens=8, save_rollouts=0)
    monkeypatch.setattr(invert4tvg, "make_run", lambda *_, **__: make_run(config, config.model, Pretended, moved))
    device = SimpleNamespace(type="cpu")  # the meter's: it reads the memory of the process
    with pretending():
        prompt, measured = meter.measured_iterations(config, cell, meter.Meter(device), torch.device("gpu:0"))
    assert len(prompt.ids) == 256 and measured["seconds"]["policy"] > measured["seconds"]["optimiser"] > 0
