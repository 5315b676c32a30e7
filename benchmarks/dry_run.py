"""A dry run of a training iteration: the memory it takes and the arithmetic it does, from the model's config alone.

No formula stands in for the program. Its own functions run, an iteration's phase after the other, on the meta device,
whose tensors have shapes but no memory. Every storage that lives at the same time is added up, and so are the
operations of all matrix products, and the bytes that these read. Only three operations are replaced, because their
memory is spent inside PyTorch: attention, whose kernel depends on the device, the draw of a token, and the way of a
layer's input to host memory. All decoding steps have the same shapes, so one of them is run. One formula remains,
`reference_memory`, for what the ranks gather of a shared reference.

A phase holds what lasts (weights, reference, gradients, optimiser) and its own highest point. The run needs the largest
phase, not their sum.
"""

import functools
import math
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import modeling_utils

import grpo
from benchmarks.models import meta_model, model_config
from engine.model.attention import Prefill, visual_features
from engine.model.decoding import Cached
from engine.model.loading import recompute_activations
from engine.model.lora import add_adapters, switched_off
from engine.model.optimizer import MasterAdamW
from engine.model.prompts import MERGE, PATCH, TEMPORAL, Prompt
from engine.video.frames import SIDE

GiB = 2**30
END = 1  # the id that ends a completion here
OUTSIDE = 1.5 * GiB  # of a card's nominal memory: what it hides (0.6), the CUDA context (0.5), NCCL (0.4); customary
ROWS = ("weights", "reference", "reference, gathered", "gradients", "optimiser, masters", "prompts, features",
        "KV cache", "activations", "logits", "gradients on their way", "the step's temporaries")
PHASES = ("sampling", "reference", "policy", "optimiser")


def make_model(settings, dtype=torch.bfloat16):
    """The model of a run on the meta device, with its adapters."""
    model = meta_model(model_config(settings.model), dtype)
    if settings.lora_rank:
        add_adapters(model, settings.lora_rank, settings.seed)
    return model


# ------------------------------------------------------------------------------------------------ counting


class Counted(NamedTuple):
    """What matrix products do: two operations a multiplication, and the bytes of the matrices that they read."""

    operations: float
    bytes: float

    def __add__(self, other):
        return Counted(*(a + b for a, b in zip(self, other)))

    def __mul__(self, times):
        return Counted(*(times * a for a in self))


NOTHING = Counted(0, 0)


def products(func, args, kwargs, result):
    """-> Counted of one operation; causal attention counts without its masked half."""
    if "scaled_dot_product" in func.overloadpacket.__name__:
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        query, key = given["query"], given["key"]
        each = 10 if "backward" in func.overloadpacket.__name__ else 4  # five products, or two
        share = 0.5 if given.get("is_causal") else 1.0
        return Counted(share * each * query.numel() * key.shape[-2], query.nbytes + 2 * key.nbytes)
    operations = flop_registry.get(func.overloadpacket)
    if operations is None:
        return NOTHING
    matrices = [x for x in args if torch.is_tensor(x)]
    return Counted(operations(*matrices, out_val=result), size_of(matrices))


class Storages(TorchDispatchMode):
    """Adds up the bytes of all storages that operations create and that still live; `peak` is their highest sum.

    What came from outside (weights, gradients, a phase's inputs) counts nothing. The integers by which the program
    finds its way are real, on the CPU. Where they meet the meta device, they lose their values.
    """

    def __init__(self, model):
        super().__init__()
        self.vocabulary = model.config.text_config.vocab_size
        self.weights = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.shape[::-1])}
        self.storages = {}  # id -> (weak reference, bytes, [row]); a list, for the row may change
        self.now = dict.fromkeys(ROWS, 0)  # bytes a row
        self.peak = dict.fromkeys(ROWS, 0)  # the same when their sum was highest
        self.highest = dict.fromkeys(ROWS, 0)  # each row at its own highest
        self.host = self.host_peak = 0  # bytes of pinned host memory
        self.work = NOTHING  # of all matrix products so far
        self.at_token = []  # the same when each token was drawn

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors((args, kwargs)))
        self.count(given, known=True)
        if func.overloadpacket is torch.ops.aten.arange:
            kwargs = kwargs | {"device": "cpu"}
        elif any(x.is_meta for x in given) and any(x.dim() and not x.is_meta for x in given):
            if func is torch.ops.aten.index.Tensor:  # a mask says how many there are
                places = []
                for x in args[1]:
                    is_mask = x is not None and x.dtype == torch.bool
                    places += x.nonzero(as_tuple=True) if is_mask else (x,)
                args = (args[0], places)
            args, kwargs = tree_map_only(torch.Tensor, _without_values, (args, kwargs))
        result = func(*args, **kwargs)
        self.work += products(func, args, kwargs, result)
        self.count(result)
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = dict(self.now)
        self.highest = {row: max(size, self.now[row]) for row, size in self.highest.items()}
        return result

    def count(self, tree, known=False):
        for x in tensors(tree):
            storage = x.untyped_storage()
            key = id(storage)
            if key not in self.storages:
                size = 0 if known else storage.nbytes()
                row = [self.row(x)]

                def free(_, key=key, size=size, row=row):
                    self.now[row[0]] -= size
                    del self.storages[key]

                self.storages[key] = (weakref.ref(storage, free), size, row)
                self.now[row[0]] += size

    def save_on_host(self, **_):
        """torch.autograd.graph.save_on_cpu, counting. PyTorch rounds each pinned block up to a power of two."""

        def pack(x):
            size = 2 ** math.ceil(math.log2(x.nbytes))
            back = functools.partial(torch.empty, x.shape, dtype=x.dtype, device="meta")
            self.host += size
            self.host_peak = max(self.host_peak, self.host)
            weakref.finalize(back, self.let_go, size)
            return back

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda back: back())

    def let_go(self, size):
        self.host -= size

    def row(self, x):
        if x.dim() and x.shape[-1] == self.vocabulary:
            return "logits"
        return "gradients on their way" if x.shape in self.weights else "activations"

    def move(self, tree, name):
        """Book what was counted of `tree` under another row."""
        for x in tensors(tree):
            _, size, row = self.storages[id(x.untyped_storage())]
            self.now[row[0]] -= size
            self.now[name] += size
            row[0] = name


def tensors(tree):
    """Tuples, lists and dictionaries within each other -> their tensors; faster than pytree's tree_leaves."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tensors(x)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def _without_values(x):
    if x.is_meta or not x.dim():
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """scaled_dot_product_attention on CUDA: flash without a mask, else the memory-efficient kernel and a bias."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    more = -k.shape[2] % 8  # its rows are aligned to 8 columns
    if more:
        bias = nn.functional.pad(bias, (0, more))[..., :-more]
    bias = bias.expand(*q.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad, scale=scale)[0]


def cpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The same on CPUs: one flash kernel, which takes a bias."""
    bias = None if attn_mask is None else torch.where(attn_mask, 0.0, -math.inf).to(q.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)[0]


# ------------------------------------------------------------------------------------------------ an iteration's phases


class Work(NamedTuple):
    """What a rank does in an iteration."""

    grid: tuple  # of each video, in patches
    text_tokens: int
    lengths: list  # tokens of the completions of a micro-batch
    max_new_tokens: int

    @property
    def prompt_tokens(self):
        return math.prod(self.grid) // MERGE**2 + self.text_tokens


def plan(settings, worst):
    """-> Work, with a video that uses up the pixel budget."""
    tokens = settings.max_pixels // SIDE**2
    steps = min(8, tokens)
    a_step = tokens // steps
    # Of all frames of h x w tokens the one that leaves the fewest over, and of several the most square.
    h = max(range(1, math.isqrt(a_step) + 1), key=lambda h: (a_step // h * h, h))
    grid = (steps, MERGE * h, MERGE * (a_step // h))

    group = 1 if settings.demonstrations else settings.group_size
    if worst:
        lengths = [settings.max_new_tokens] * group
    else:
        factors = torch.linspace(0.5, 1.5, group).tolist() if group > 1 else [1.0]
        lengths = [min(round(factor * settings.typical_tokens), settings.max_new_tokens) for factor in factors]
    return Work(grid, settings.text_tokens, lengths * settings.micro_batch, settings.max_new_tokens)


def shares(parameters, world_size):
    """Parameters -> one list a rank, as ZeroRedundancyOptimizer parts them: the largest first, to the least loaded."""
    parts = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for p in sorted(parameters, key=lambda p: p.numel(), reverse=True):
        rank = loads.index(min(loads))
        parts[rank].append(p)
        loads[rank] += p.numel()
    return parts


def size_of(values):
    """-> bytes of the tensors among them"""
    return sum(x.nbytes for x in values if torch.is_tensor(x))


def optimiser_memory(model, settings):
    """-> bytes of (state with masters, temporaries of a step) on the rank that needs most."""
    needs = []
    for share in shares([p for p in model.parameters() if p.requires_grad], settings.world_size):
        optimizer = MasterAdamW(share, lr=1e-6, offload=settings.offload_optimizer)
        optimizer.step()  # creates the state
        with Storages(model) as storages:
            optimizer.step()
        state = size_of(x for s in optimizer.state.values() for x in s.values())
        needs.append((state, sum(storages.peak.values())))
    return max(needs, key=sum)


@contextmanager
def counted(model, attention):
    """Inside, grpo.py runs on the meta device and -> Storages counts. Completions end with their second token."""
    storages = Storages(model)
    pack = grpo.pack
    attend = Prefill.attend
    cache_after = Cached.after
    tokens = iter((0, END))

    def draw(probabilities, count, generator=None):
        """torch.multinomial, which divides by as much noise and takes the largest."""
        storages.at_token.append(storages.work)
        torch.empty_like(probabilities).div_(probabilities)
        return torch.full((len(probabilities), count), next(tokens))

    def pack_without_values(*args):  # on the CPU, the mask and what follows from it would take seconds
        row, *places = pack(*args)
        return tree_map_only(torch.Tensor, lambda x: x.to("meta"), row), *places

    def attend_and_move(self, *args):
        result = attend(self, *args)
        storages.move(self.keys_values[-1], "KV cache")
        return result

    def cache_and_move(*args):
        caches = cache_after(*args)
        storages.move([(cache.own_k, cache.own_v) for cache in caches], "KV cache")
        return caches

    replaced = [(torch, "multinomial", draw), (nn.functional, "scaled_dot_product_attention", attention),
                (grpo, "pack", pack_without_values), (Prefill, "attend", attend_and_move),
                (Cached, "after", cache_and_move)]
    if attention is gpu_attention:  # on a CPU layers' inputs stay where they are
        replaced.append((modeling_utils, "save_on_cpu", storages.save_on_host))
    else:
        replaced.append((modeling_utils, "save_on_cpu", lambda **_: nullcontext()))
    with ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(storages)
        yield storages


def make_prompts(model, work, count):
    """-> `count` prompts. Their patches have no values, their ids and positions do."""
    ids = torch.zeros(work.prompt_tokens, dtype=torch.long)
    first = work.text_tokens // 2
    ids[first:first + work.prompt_tokens - work.text_tokens] = model.config.video_token_id
    positions = torch.arange(len(ids)).expand(3, -1)
    patches = torch.empty(math.prod(work.grid), 3 * TEMPORAL * PATCH**2, device="meta")
    return [Prompt(ids, positions, patches, torch.tensor([work.grid])) for _ in range(count)]


def reference_memory(model, settings):
    """-> bytes of (the reference on a rank, what its pass gathers from the others besides).

    Formulas, for engine/model/parallel.py: a rank gathers what belongs to no layer for the whole pass, and of the
    layers the one that runs, the buffer that it arrived in, and the next one's.
    """
    if settings.lora_rank or not uses_reference(settings):
        return 0, 0
    visual = 0 if settings.train_vision else size_of(model.model.visual.parameters())
    whole = size_of(model.parameters()) - visual
    if settings.world_size == 1:
        return whole, 0
    layers = model.model.language_model.layers
    embeddings = model.get_input_embeddings().weight
    apart = embeddings.nbytes if model.lm_head.weight is not embeddings else 0
    gathered = whole - size_of(layers.parameters()) - apart + 3 * size_of(layers[0].parameters())
    return whole / settings.world_size, gathered


def uses_reference(settings):
    return bool(settings.kl_coef) and not settings.demonstrations


def lasting_memory(model, settings, state):
    """-> {row: bytes} of what every phase finds on the GPU; `state` is the optimiser's."""
    return {"weights": size_of(model.parameters()), "optimiser, masters": 0 if settings.offload_optimizer else state,
            "gradients": size_of(p for p in model.parameters() if p.requires_grad),
            "reference": reference_memory(model, settings)[0]}


class Need(NamedTuple):
    """What a run needs, in bytes, on the GPU or of the process that needs most."""

    peaks: dict  # {phase: {row: bytes}}, each phase's highest point
    highest: dict  # {row: bytes}, each row's own highest, which do not come together
    host: dict  # {what: bytes} of pinned host memory
    work: dict  # {part: Counted}: a phase's on a rank, and a "token"'s; "sampling" ends with the first token here

    def most(self):
        """-> (the phase that needs most, bytes of all its rows and of what lies outside of PyTorch)"""
        totals = {name: sum(rows.values()) + OUTSIDE for name, rows in self.peaks.items()}
        phase = max(totals, key=totals.get)
        return phase, totals[phase]


def estimate(model, settings, work, attention=gpu_attention):
    """A meta model of `make_model` -> Need."""
    if not settings.lora_rank:
        model.requires_grad_(True).model.visual.requires_grad_(settings.train_vision)
    for module in model.modules():  # an earlier estimate may have switched it on
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    if settings.gradient_checkpointing:
        recompute_activations(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    state, temporaries = optimiser_memory(model, settings)
    lasting = lasting_memory(model, settings, state)
    host = {"optimiser, masters": state if settings.offload_optimizer else 0, "layers' inputs": 0}

    micro = settings.micro_batch
    G = len(work.lengths) // micro
    prompts = make_prompts(model, work, micro * settings.accumulation)
    mask = torch.arange(max(work.lengths)) < torch.tensor(work.lengths).unsqueeze(1)
    completions = torch.zeros(mask.shape, dtype=torch.long)
    banned = torch.tensor([2, 3])
    peaks = {}
    highest = dict.fromkeys(ROWS, 0)
    work_of = {}

    @contextmanager
    def phase(name, features):
        held = size_of(x for p in prompts for x in p) + size_of(features or ())
        with counted(model, attention) as storages:
            yield
        peaks[name] = {row: storages.peak[row] + lasting.get(row, 0) for row in ROWS} | {"prompts, features": held}
        work_of[name] = storages.work * settings.accumulation
        if storages.at_token:  # the steps are alike: the second token's stands for all
            first, second = storages.at_token
            work_of.update(sampling=first, token=second + first * -1)
        if name == "reference":
            peaks[name]["reference, gathered"] = reference_memory(model, settings)[1]
        host["layers' inputs"] = max(host["layers' inputs"], storages.host_peak)
        for row in ROWS:
            highest[row] = max(highest[row], storages.highest[row], peaks[name][row])

    features = None
    if not (settings.demonstrations and settings.train_vision):
        with phase("sampling", None), torch.no_grad():
            features = visual_features(model, prompts)
            if not settings.demonstrations:
                grpo.sample_group(model, prompts, G, work.max_new_tokens, torch.tensor([END]), banned,
                                  features=features)
    if settings.train_vision:
        features = None
    inputs = prompts[:micro], completions, mask, banned, 1.0, features and features[:micro]
    if uses_reference(settings):
        with phase("reference", features), torch.no_grad(), switched_off(model):
            grpo.group_logps(model, *inputs)
    with phase("policy", features):
        logps, _ = grpo.group_logps(model.train(), *inputs)
        logps.sum().backward()  # the loss itself is of (N, C) numbers
    rest = {"prompts, features": peaks["policy"]["prompts, features"], "the step's temporaries": temporaries}
    peaks["optimiser"] = dict.fromkeys(ROWS, 0) | lasting | rest
    highest["the step's temporaries"] = temporaries
    work_of["policy"] *= settings.mu
    work_of["optimiser"] = Counted(0, settings.mu * (2 * state + 2 * lasting["gradients"]))  # read and written
    return Need(peaks, highest, host, work_of)
