"""The memory that a training run will need, of each GPU and of the host, from the model's config alone.

    python -m benchmarks.memory                                             # 3B on 8 GPUs of 40 GB
    python -m benchmarks.memory --model 7b --gpu-gb 80 [any option of invert4tvg.py]
    python -m benchmarks.memory --model 7b --offload-optimizer              # the paper's model on the paper's cards
    python -m benchmarks.memory --model 3b --world-size 1 --accumulation 8 --lora-rank 64 --gpu-gb 24
    python -m benchmarks.memory --table                                     # 3B and 7B, ways to train them, cards
    python -m benchmarks.memory --validate                                  # the estimate against a real process

No formula stands in for the program. Its own functions run, an iteration's phase after the other, on the meta device,
whose tensors have shapes but no memory. Every storage that lives at the same time is added up. Only three operations
are replaced, because their memory is spent inside PyTorch: attention, whose kernel depends on the device, the draw of a
token, and the way of a layer's input to host memory. All decoding steps have the same shapes, so one of them is run.
One formula remains, `reference_memory`, for what the ranks gather of a shared reference.

A phase holds what lasts (weights, reference, gradients, optimiser) and its own highest point. The run needs the largest
phase, not their sum. A column shows its phase at that point, "ever" each row at its own highest: the cache or the
logits may be gone by then.

"typical" has completions of --typical-tokens on average, from half to one and a half times that; "worst" has all of
them cut off at --max-new-tokens. The cache has room for --max-new-tokens in both. The prompt is the pixel budget's
visual tokens and --text-tokens. The rare video of more than 224 s exceeds that budget (engine.video.fit_size) and this
estimate. GiB are 2**30 bytes of tensors. LEFT_OUT names what is not counted.
"""

import ctypes
import dataclasses
import functools
import math
import os
import sys
import tempfile
import weakref
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, modeling_utils

import grpo
import invert4tvg
from benchmarks import step
from engine.annotations import load_annotations, prepare_training
from engine.attention import Prefill, Prompt, install_attention, visual_features
from engine.checkpoints import newest_checkpoint, recompute_activations
from engine.decoding import Cached
from engine.lora import add_adapters, switched_off
from engine.optimizer import MasterAdamW
from engine.prompts import MERGE, PATCH, TEMPORAL
from engine.runtime import setup_distributed
from engine.settings import UserError, flag, parse_settings
from engine.video import SIDE

GiB = 2**30
END = 1  # the id that ends a completion here
OUTSIDE = 1.5 * GiB  # of a card's nominal memory: what it hides (0.6), the CUDA context (0.5), NCCL (0.4); customary
ROWS = ("weights", "reference", "reference, gathered", "gradients", "optimiser, masters", "prompts, features",
        "KV cache", "activations", "logits", "gradients on their way", "the step's temporaries")
LEFT_OUT = """Left out of the GPU: what the caching allocator reserves but cannot use, workspaces of recorded graphs,
and a prefix sum that masked_scatter makes early in a pass, 8 bytes a number of the embeddings. Left out of the host:
Python and its libraries (some GiB a process), clips on their way from the workers, and a model's files while read or
written; all processes of a node share what they read."""
WAYS = {"full": {}, "`--offload-optimizer`": {"offload_optimizer": True}, "`--lora-rank 64`": {"lora_rank": 64}}
PHASES = ("sampling", "reference", "policy", "optimiser")


@dataclass(frozen=True)
class Settings(invert4tvg.Config):
    """A training run's settings and what is to be known of the machine and the data."""

    model: str = flag("3b", "3b, 7b (or their hub ids): the published shapes; else a checkpoint folder")
    world_size: int = flag(8, "GPUs", above=0)
    gpu_gb: float = flag(40.0, "a card's memory, GiB", above=0)
    typical_tokens: int = flag(200, "mean length of a typical group's completions", above=0)
    text_tokens: int = flag(120, "a prompt's tokens that are not the video's", above=0)
    rows: int = flag(12404, "training samples, where --annotations does not exist; Charades-STA's", above=0)
    table: bool = flag(False, "print the table of benchmarks/README.md")
    validate: bool = flag(False, "run a small model on this CPU, in float32, and compare")


def model_config(name):
    """3b, 7b, a hub id of theirs or a folder -> the model's config."""
    size = name.lower().removeprefix("qwen/qwen2.5-vl-").removesuffix("-instruct")
    if size not in step.PUBLISHED:
        try:
            return AutoConfig.from_pretrained(newest_checkpoint(name) or name)
        except (OSError, ValueError) as error:
            raise UserError(f"--model {name}: no config was found there; give 3b, 7b or a checkpoint folder."
                            ) from error
    text, half, vision = step.SIZES[size]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": step.sections(half)}
    vision = vision | dict(window_size=112, tokens_per_second=2, fullatt_block_indexes=[7, 15, 23, 31],
                           out_hidden_size=text["hidden_size"])
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision,
                            tie_word_embeddings=size == "3b")


def meta_model(config, dtype):
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(dtype)
    install_attention(model)
    return model


def make_model(settings, dtype=torch.bfloat16):
    """The model of a run on the meta device, with its adapters."""
    model = meta_model(model_config(settings.model), dtype)
    if settings.lora_rank:
        add_adapters(model, settings)
    return model


# ------------------------------------------------------------------------------------------------ counting storages


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

    Formulas, for engine/parallel.py: a rank gathers what belongs to no layer for the whole pass, and of the layers the
    one that runs, the buffer that it arrived in, and the next one's.
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

    @contextmanager
    def phase(name, features):
        held = size_of(x for p in prompts for x in p) + size_of(features or ())
        with counted(model, attention) as storages:
            yield
        peaks[name] = {row: storages.peak[row] + lasting.get(row, 0) for row in ROWS} | {"prompts, features": held}
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
    return Need(peaks, highest, host)


# ------------------------------------------------------------------------------------------------ the report


def print_budget(title, need, settings):
    """Print a table, GiB, a column a phase -> whether the largest fits."""
    peaks = need.peaks
    totals = {name: sum(rows.values()) + OUTSIDE for name, rows in peaks.items()}
    print(f"\n{title}\n{'GiB of the GPU':<28}" + "".join(f"{name:>12}" for name in peaks) + f"{'ever':>12}")
    for row in ROWS:
        if need.highest[row]:
            sizes = [rows[row] for rows in peaks.values()] + [need.highest[row]]
            print(f"{row:<28}" + "".join(f"{size / GiB:12.2f}" for size in sizes))
    print(f"{'PyTorch tensors together':<28}" + "".join(f"{(x - OUTSIDE) / GiB:12.2f}" for x in totals.values()))
    print(f"{'CUDA, NCCL, hidden':<28}" + f"{OUTSIDE / GiB:12.2f}" * len(peaks))
    print(f"{'total':<28}" + "".join(f"{x / GiB:12.2f}" for x in totals.values()))
    phase, total = need.most()
    left = settings.gpu_gb - total / GiB
    verdict = f"it fits, with {left:.1f} to spare." if left >= 0 else f"IT DOES NOT FIT, {-left:.1f} are missing."
    print(f"The {phase} phase needs most, {total / GiB:.1f} of {settings.gpu_gb:g} GiB: {verdict}")
    print(f"{'GiB of the host, pinned':<28}{'a process':>12}{f'all {settings.world_size}':>12}")
    for what, size in (*need.host.items(), ("together", sum(need.host.values()))):
        print(f"{what:<28}{size / GiB:12.2f}{settings.world_size * size / GiB:12.2f}")
    return left >= 0


def print_measures(settings, worst):
    """Print what each change of settings would leave of the peak."""
    changes = [{"kl_coef": 0.0}, {"max_new_tokens": settings.max_new_tokens // 2}, {"micro_batch": 1},
               {"max_pixels": settings.max_pixels // 2}, {"train_vision": False}, {"gradient_checkpointing": True},
               {"world_size": 2 * settings.world_size}, {"offload_optimizer": True}]
    if not settings.lora_rank and not settings.train_vision:
        changes.append({"lora_rank": 64})
    needs = []
    for change in changes:
        changed = dataclasses.replace(settings, **change)
        if changed != settings:
            need = estimate(make_model(changed), changed, plan(changed, worst))
            needs.append((need.most()[1], *change.popitem()))
    for need, name, value in sorted(needs):
        print(f"  with {name} = {value}: {need / GiB:.1f} GiB" + (", fits" if need <= settings.gpu_gb * GiB else ""))


def print_run(settings):
    """Print iterations and tokens of the whole run."""
    rows = settings.rows
    source = "--rows"
    if Path(settings.annotations).exists():
        samples = load_annotations(settings.annotations, settings.videos, settings.windows)
        rows = len(prepare_training(samples)[0])
        source = settings.annotations
    prompts = settings.micro_batch * settings.accumulation * settings.world_size
    iterations = settings.iterations or math.ceil(settings.epochs * rows / prompts)
    million = iterations * prompts / 1e6
    print(f"\n{rows:,} samples ({source}), {prompts} prompts an iteration: {iterations:,} iterations")
    for title, worst in (("typical", False), ("worst", True)):
        work = plan(settings, worst)
        read = work.prompt_tokens  # tokens of a prompt and of its completions
        written = sum(work.lengths) // settings.micro_batch
        print(f"  {title}: {prompts * read:,} prompt and {prompts * written:,} completion tokens an iteration; "
              f"{million * read:,.0f} and {million * written:,.0f} million in all")


def report(settings):
    model = make_model(settings)
    everything = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    work = plan(settings, worst=False)
    print(f"{settings.model}: {everything:,} parameters, {vision:,} of them vision tower and merger, "
          f"{'trained' if settings.train_vision else 'frozen'}; bfloat16"
          f"{f'; adapters of rank {settings.lora_rank}' if settings.lora_rank else ''}\n"
          f"{settings.world_size} x {settings.gpu_gb:g} GiB; prompts of {work.prompt_tokens:,} tokens: a GPU samples "
          f"{settings.micro_batch * settings.accumulation} together and trains on {settings.micro_batch} at a time, "
          f"{len(work.lengths) // settings.micro_batch} completions each")
    for name, worst in (("typical", False), ("worst", True)):
        work = plan(settings, worst)
        mean = sum(work.lengths) / len(work.lengths)
        title = f"{name}: {mean:,.0f} tokens a completion, {max(work.lengths):,} the longest"
        if not print_budget(title, estimate(model, settings, work), settings):
            print_measures(settings, worst)
    print(f"\n{LEFT_OUT}")
    print_run(settings)


def print_table(settings):
    """Print both published models, with eight prompts an iteration on eight cards or on one, trained in WAYS."""
    print("| model | GPUs | training | typical | worst | host | fits a card of |\n|---|---|---|---|---|---|---|")
    for model in ("3b", "7b"):
        for world_size in (8, 1):
            for title, change in WAYS.items():
                one = dataclasses.replace(settings, model=model, world_size=world_size, accumulation=8 // world_size,
                                          **change)
                typical, worst = (estimate(make_model(one), one, plan(one, worst)) for worst in (False, True))
                sizes = [need.most()[1] / GiB for need in (typical, worst)]
                host = max(sum(need.host.values()) for need in (typical, worst)) * world_size / GiB
                cards = ", ".join(f"{gb} GB" for gb in (24, 40, 80) if max(sizes) < gb) or "none of these"
                print(f"| {model.upper()} | {world_size} | {title} | {sizes[0]:.1f} | {sizes[1]:.1f} | {host:.0f} | "
                      f"{cards} |", flush=True)


# ------------------------------------------------------------------------------------------------ a real process


def validate():
    """Take three iterations with a real model on the CPU and compare the last one's peaks with the estimate's.

    A peak is resident memory above the process before the models. The 5m model goes first: its surplus of some 30 MiB
    is the code that it loads.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU, whatever else this machine has
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    device = setup_distributed()
    meter = step.Meter(device)
    print(f"{'MiB':<14}{'estimated':>12}{'measured':>12}{'ratio':>12}")
    for size, cell in (("5m", step.Cell(256, 24)), ("60m", step.Cell(128, 16)), ("60m", step.Cell(2048, 64)),
                       ("60m", step.Cell(1024, 256))):
        with tempfile.TemporaryDirectory() as folder:
            step.make_checkpoint(Path(folder), size, device)
            settings = Settings(model=folder, max_new_tokens=cell.completion)
            meter.rest()
            prompt, measured = measured_iterations(settings, cell, meter, device)
            peak = measured["MiB"]
            grid = tuple(prompt.grid[0].tolist())
            text = len(prompt.ids) - math.prod(grid) // MERGE**2
            work = Work(grid, text, [cell.completion] * cell.group, cell.completion)
            settings = dataclasses.replace(settings, world_size=1)
            peaks = estimate(make_model(settings, torch.float32), settings, work, cpu_attention).peaks
        print(f"{size} {step.name_of(cell)}")
        for name in PHASES:
            estimated = sum(peaks[name].values()) / 2**20
            print(f"  {name:<12}{estimated:12.0f}{peak[name]:12.0f}{estimated / peak[name]:12.3f}")


def measured_iterations(settings, cell, meter, device):
    """-> (the prompt, {quantity: {phase: value}} of the last of three iterations)"""
    run = invert4tvg.make_run(settings, device, samples=[], completions=None, sampler=None,
                               folder=settings.model, start=settings.model)
    optimizer_step = run.optimizer.step

    def measured_step():  # the update's last part is a phase of its own
        meter.settle()
        meter.open.remove("policy")
        with meter("optimiser"):
            optimizer_step()
        meter.open.append("policy")

    run.optimizer.step = measured_step
    prompt = step.make_prompt(run.model, run.processor, *step.make_video(run.processor.tokenizer, cell.prompt))
    advantages = grpo.group_advantages(torch.linspace(0, 1, cell.group).unsqueeze(0)).flatten()
    for _ in range(3):
        meter.take()
        with meter("sampling"), torch.no_grad():
            features = visual_features(run.model, [prompt])
            sampled = grpo.sample_group(run.model, [prompt], cell.group, cell.completion, run.processor.eos[:0],
                                        run.processor.banned, features=features)
        with meter("reference"):
            batches = invert4tvg.micro_batches(run, [prompt], sampled.ids, sampled.mask, features, advantages,
                                               sampled.logps)
        with meter("policy"):
            invert4tvg.update(run, batches, 1e-6)
    return prompt, meter.take()


if __name__ == "__main__":
    given = parse_settings(Settings, __doc__)
    try:
        if given.validate:
            validate()
        elif given.table:
            print_table(given)
        else:
            report(given)
    except (UserError, ValueError) as error:
        sys.exit(f"memory.py: {error}")
