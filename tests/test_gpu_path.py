"""What only a GPU would show, without one: names, order of calls, devices, forks, and the plan for cards.

tests/pretend_gpu.py runs whole iterations on a device that refuses to meet the CPU's.
"""

import ast
import contextlib
import functools
import inspect
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from shared import ROOT, prompts  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import grpo
import invert4tvg
from benchmarks import accept, cards, dry_run, memory
from engine.model import decoding, health, optimizer
from engine.model.optimizer import MasterAdamW
from engine.model.prompts import Prompt
from engine.program import launch

# ---- Names of PyTorch that run on GPUs alone

FILES = [*sorted((ROOT / "engine").rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py")),
         *(ROOT / f"{name}.py" for name in ("grpo", "invert4tvg", "data", "evaluate"))]
MODULES = {"torch": torch, "dist": dist, "nn": torch.nn}


def dotted(node):
    """An expression of attributes -> its names, "torch", "cuda", "synchronize"; () for anything else."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return (*dotted(node.value), node.attr)
    return ()


def uses(tree):
    """Every name of PyTorch that a file reads -> (names, the call or None)."""
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    imported = {alias.asname or alias.name: (node.module, alias.name) for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") for alias in node.names}
    for node in ast.walk(tree):
        names = dotted(node)
        if names[:1] == ("torch",) or names[:1] == ("dist",):
            yield names, called.get(id(node))
        elif len(names) == 1 and names[0] in imported:
            module, name = imported[names[0]]
            if module == "torch.utils.tensorboard":  # needs a package that is optional
                continue
            yield (*module.split("."), name), called.get(id(node))


def look_up(names):
    found = MODULES[names[0]]
    for name in names[1:]:
        if isinstance(found, types.ModuleType) and not hasattr(found, name):
            __import__(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_used_of_pytorch_is_there_with_these_arguments(path):
    for names, call in uses(ast.parse(path.read_text(encoding="utf-8"))):
        target = look_up(names)
        if call is None or any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None
                                                                                     for k in call.keywords):
            continue
        with contextlib.suppress(ValueError):  # functions in C have no signature
            signature = inspect.signature(target)
            signature.bind(*call.args, **{k.arg: k for k in call.keywords})


def test_methods_of_a_graph_take_these_arguments():
    inspect.signature(torch.cuda.CUDAGraph.capture_begin).bind(None, pool=1, capture_error_mode="thread_local")
    assert all(hasattr(torch.cuda.CUDAGraph, name) for name in ("capture_end", "replay", "pool"))
    assert all(hasattr(torch.cuda, name) for name in ("cudart", "Stream", "stream", "mem_get_info"))


# ---- The order of calls


class Recorder:
    """Stands for torch.cuda: what is called, in order."""

    def __init__(self, monkeypatch, free=2**30):
        self.calls = calls = []

        class CUDAGraph:
            def capture_begin(self, pool=None, capture_error_mode="global"):
                calls.append(f"begin in {pool}, {capture_error_mode}")

            def capture_end(self):
                calls.append("end")

            def replay(self):
                calls.append("replay")

            def pool(self):
                return "the pool"

        @contextlib.contextmanager
        def stream(chosen):
            calls.append(f"stream {chosen}")
            yield
            calls.append("stream left")

        decoding.recording_room.cache_clear()
        for name, value in {
            "CUDAGraph": CUDAGraph, "Stream": lambda: "aside", "stream": stream,
            "graph": lambda graph, **options: contextlib.nullcontext(),
            "synchronize": lambda *_: calls.append("synchronize"), "mem_get_info": lambda *_: (free, 2**35),
            "empty_cache": lambda: calls.append("empty the cache"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def take(self):
        taken = self.calls.copy()
        self.calls.clear()
        return taken


@pytest.fixture(autouse=True)
def forget_recordings():
    yield
    decoding.recording_room.cache_clear()


RECORDING = ["synchronize", "stream aside", "begin in the pool, thread_local", "forward", "end", "stream left"]


def test_a_graph_is_recorded_aside_and_its_inputs_are_copied_before_each_replay(monkeypatch):
    recorder = Recorder(monkeypatch)
    token = torch.zeros(2)
    sums = torch.zeros(2)

    def forward(through_layer, token):
        recorder.calls.append(through_layer)
        sums.copy_(token)
        return sums

    monkeypatch.setattr(decoding, "usable", lambda forward, compiled, inputs: compiled)
    replay = decoding.record_graph(forward, "forward", (token,))
    assert recorder.take() == RECORDING  # and neither cache was emptied
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: sums.copy_(token * 10))
    assert replay(torch.tensor([1.0, 2.0])).tolist() == [10.0, 20.0]  # of the new inputs, not of those before
    assert replay(torch.tensor([3.0, 4.0])).tolist() == [30.0, 40.0]


def test_where_little_memory_is_free_the_cache_is_emptied_before_the_recording(monkeypatch):
    recorder = Recorder(monkeypatch, free=2**20)
    monkeypatch.setattr(decoding, "usable", lambda forward, compiled, inputs: compiled)
    decoding.record_graph(lambda through_layer: recorder.calls.append(through_layer), "forward", ())
    assert recorder.take() == ["empty the cache", *RECORDING]


def test_a_recording_that_fails_is_ended_all_the_same(monkeypatch):
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(decoding, "usable", lambda forward, compiled, inputs: compiled)

    def forward(through_layer):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        decoding.record_graph(forward, None, ())
    assert recorder.take()[-1] == "end"  # else the allocator would hold the memory back for ever


def test_out_of_memory_while_compiling_is_no_failed_compilation():
    tried = []

    def forward(through_layer):
        tried.append(through_layer)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        decoding.usable(forward, "compiled", ())
    assert tried == ["compiled"]


def test_a_decoder_on_a_gpu_records_once_and_replays(monkeypatch, model, prompts):  # noqa: F811
    recorded = []

    def record(forward, through_layer, inputs):
        recorded.append(through_layer)
        return lambda token, position: forward(decoding.run_layer, token, position)

    monkeypatch.setattr(decoding, "record_graph", record)
    monkeypatch.setattr(decoding, "compiled_layer", lambda: "compiled")
    hidden = {}
    for kind in ("cpu", "cuda"):
        decoder = decoding.Decoder(model.eval(), prompts, 2, 3)
        decoder._make_forward = functools.partial(on, kind, decoder._make_forward)
        with torch.no_grad():
            hidden[kind] = [decoder.step(torch.full((4,), token)) for token in (5, 6)]
    assert recorded == ["compiled"]
    assert all(torch.equal(a, b) for a, b in zip(hidden["cpu"], hidden["cuda"]))


def on(kind, make_forward, token, position):
    """Decoder._make_forward with a token that says it lies on a device of this kind."""
    return make_forward(types.SimpleNamespace(device=types.SimpleNamespace(type=kind)), position)


def test_an_offloaded_state_is_there_before_it_is_read(monkeypatch):
    """The copies to the host go on after the step has returned, until the device is waited for."""
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(optimizer, "update", lambda *args, **kwargs: calls.append("update"))
    p = mock.MagicMock(is_cuda=True)
    adamw = MasterAdamW([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, offload=True)
    adamw.param_groups[0]["params"] = [p]
    adamw.room = {"there": []}
    monkeypatch.setattr(adamw, "_step_one", lambda p, group: optimizer.update())
    adamw.step()
    assert calls == ["update", "synchronize"]


# ---- No device is mixed with another: FakeTensorMode knows what CUDA refuses


class Fakes:
    """FakeTensorMode, with values where the program asks for one; fake tensors have none.

    Only the class of fake tensors is changed: Python never quite forgets a changed `__getitem__`.
    """

    def __init__(self, truth):
        self.truth = truth  # of each yes or no

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(FakeTensorMode(allow_non_fake_inputs=False))
        # These three ask for the device first, which is not there. A mask must lie where what it selects from does.
        self.stack.enter_context(mock.patch.object(FakeTensor, "__getitem__", lambda x, mask: (x * mask).flatten()))
        self.stack.enter_context(mock.patch.object(FakeTensor, "__invert__", lambda x: x.eq(0)))
        self.stack.enter_context(mock.patch.object(FakeTensor, "copy_", lambda x, y, **_: x))
        for name, value in {"item": 1.0, "__bool__": self.truth, "__float__": 1.0, "__int__": 1, "tolist": [1.0],
                            "backward": None}.items():
            self.stack.enter_context(mock.patch.object(FakeTensor, name, lambda *_, value=value: value))
        return self

    def __exit__(self, *error):
        self.stack.close()


def on_card(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device="cuda:0")


class FakePolicy:
    """What the update asks of the policy; its passes give numbers, for fake tensors of CUDA carry no gradients here."""

    train = no_sync = staticmethod(contextlib.nullcontext)

    def __call__(self, _, ids, mask, features):
        return on_card(*ids.shape), on_card(*ids.shape)


def fake_run(tmp_path, **changes):
    """A Run on a made-up card with two micro-batches of 3 completions of 4 tokens."""
    config = invert4tvg.Config(output=str(tmp_path), **changes)
    weight = on_card(5, 6, dtype=torch.bfloat16)
    weight.grad = on_card(5, 6, dtype=torch.bfloat16)
    model = types.SimpleNamespace(device=torch.device("cuda:0"), parameters=lambda: [weight],
                                  named_parameters=lambda: [("w", weight)])
    adamw = MasterAdamW([weight], lr=1e-3)
    run = invert4tvg.Run(config, [], None, None, model, FakePolicy(), None, None, adamw)
    prompt = Prompt(on_card(7, dtype=torch.long), on_card(3, 7), on_card(4, 1176), on_card(1, 3))
    batch = invert4tvg.Batch([prompt], on_card(3, 4, dtype=torch.long), on_card(3, 4, dtype=torch.bool), None,
                             grpo.group_advantages(on_card(1, 3)).flatten(), on_card(3, 4), on_card(3, 4))
    return run, [batch, batch]


@pytest.mark.parametrize("changes", [{"mu": 2}, {"loss_reduction": "token"}], ids=["mu", "token"])
def test_an_update_and_its_checks_never_mix_devices(tmp_path, alone, changes):
    with mock.patch.object(dist, "all_reduce", lambda x: None):
        with Fakes(truth=False):  # nothing is broken
            run, batches = fake_run(tmp_path, **changes)
            assert invert4tvg.update(run, batches, 1e-3)["skipped"] == 0
        with Fakes(truth=True):  # everything is finite
            run, batches = fake_run(tmp_path)
            run.optimizer.step()
            health.check_finite(run.model, types.SimpleNamespace(optim=run.optimizer))
    assert run.optimizer.state[run.model.parameters()[0]]["master"].device.type == "cuda"


def test_the_mode_notices_a_mixture():
    with Fakes(truth=True), pytest.raises(RuntimeError, match="same device"):
        on_card(3) + torch.zeros(3)


# ---- Memory that workers inherit


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_forked_worker_has_none_of_the_optimisers_host_memory():
    p = torch.nn.Parameter(torch.zeros(2**20))
    state = MasterAdamW([p], lr=1e-3, offload=True).state_of(p)["exp_avg"]
    state.fill_(1.0)
    shared = torch.ones(2**20)  # what a worker does inherit

    def mapped(address):
        places = (line.split()[0].split(b"-") for line in Path("/proc/self/maps").open("rb"))
        return any(int(first, 16) <= address < int(last, 16) for first, last in places)

    addresses = (state.data_ptr(), shared.data_ptr())
    assert all(map(mapped, addresses))
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, bytes(map(mapped, addresses)))
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reading, 2) == bytes([False, True])
    assert state.sum() == 2**20  # here it is untouched


# ---- A GPU that torch cannot use


@pytest.mark.parametrize("visible, has_gpu, stops", [
    (None, True, True), ("0,1", True, True), ("", True, False), ("-1", True, False), (None, False, False)])
def test_a_gpu_that_torch_cannot_use_is_said_and_never_left_idle(monkeypatch, visible, has_gpu, stops):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(launch, "has_gpu", lambda: has_gpu)
    if stops:
        with pytest.raises(SystemExit, match="has a GPU that torch .* cannot use.*CUDA_VISIBLE_DEVICES="):
            launch.setup_distributed()
    else:
        assert launch.setup_distributed().type == "cpu"
        dist.destroy_process_group()


def test_nccl_knows_its_card_from_the_start_and_gloo_needs_none(monkeypatch):
    for available, expected in ((True, ("nccl", torch.device("cuda", 3))), (False, ("gloo", None))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setenv("LOCAL_RANK", "3")
        join = mock.Mock()
        monkeypatch.setattr(dist, "init_process_group", join)
        launch.setup_distributed()
        assert (*join.call_args.args, join.call_args.kwargs["device_id"]) == expected


# ---- The acceptance's plan, and what a run costs


def test_the_acceptance_chooses_a_size_and_a_way_that_fit():
    ways = {}
    for number in (1, 8):
        for gib in (24, 40, 80, 141) if number == 8 else (12, 24, 40, 80, 141):
            size, options, settings = accept.real_size_plan(number, gib)
            assert settings.world_size == number
            assert memory.need_of(settings, worst=True).most()[1] < gib * dry_run.GiB
            ways[number, gib] = f"{size} {options}".strip()
    assert ways == {(1, 12): "60m", (1, 24): "3b --lora-rank 64", (1, 40): "3b --offload-optimizer", (1, 80): "3b",
                    (1, 141): "3b", (8, 24): "3b", (8, 40): "3b", (8, 80): "3b", (8, 141): "3b"}
    with pytest.raises(RuntimeError, match="0.1 GiB of a card are free"):
        accept.real_size_plan(1, 0.1)


def test_products_are_counted_by_hand():
    with dry_run.Storages(memory_model()) as counting:
        a, b = torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")
        a @ b  # 3 x 4 x 5 multiplications, each with an addition; 12 and 20 numbers of 4 bytes are read
    assert counting.work == (2 * 60, 4 * 32)


def memory_model():
    return types.SimpleNamespace(config=types.SimpleNamespace(text_config=types.SimpleNamespace(vocab_size=7)),
                                 parameters=lambda: [])


def test_an_iterations_work_by_hand(checkpoint):
    settings = memory.Settings(model=str(checkpoint), world_size=1, max_pixels=64 * 784, max_new_tokens=16,
                               group_size=4, text_tokens=10, typical_tokens=16, accumulation=2, offload_optimizer=True)
    model = dry_run.make_model(settings)
    work = dry_run.plan(settings, worst=True)
    done = dry_run.estimate(model, settings, work).work
    V = model.config.text_config.vocab_size
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of both layers; the head has V x 32
    biases = 2 * (32 + 2 * 16)
    # A token: 8 completions of 2 prompts. Keys and values of two layers, two heads of 8: 2 x 74 of the prompts, 8 x 16.
    cache = 2 * 2 * 2 * 8 * (2 * 74 + 8 * 16)
    activations = done["token"].bytes / 2 - matrices - biases - V * 32 - cache
    assert 0 < activations < 0.2 * done["token"].bytes / 2
    scored = 8 * 4 * 2 * 2 * 2 * 8 * (74 + 16)  # each head of each completion: queries by keys, weights by values
    assert done["token"].operations == 8 * 2 * (matrices + V * 32) + scored
    # Two micro-batches of 74 + 4 x 16 tokens through the layers, 64 of them through the head.
    linear = 2 * 2 * (matrices * (74 + 64) + V * 32 * 64)
    pairs = 2 * 4 * 32 * 2 * (74 * 74 / 2 + 64 * (74 + 16))  # causal in the prompt; masked among completions
    assert done["reference"].operations == linear + pairs
    # Forward, once more for the layers and the head, and twice for gradients (none is needed below the first layer).
    assert 3.5 < done["policy"].operations / done["reference"].operations < 4.1


def test_seconds_by_hand():
    need = types.SimpleNamespace(
        work={"sampling": dry_run.Counted(4e12, 1e9), "token": dry_run.Counted(1e9, 2e9),
              "policy": dry_run.Counted(8e12, 0), "optimiser": dry_run.Counted(0, 6e9)},
        host={"optimiser, masters": 0})
    card = cards.Card("made up", 1, bandwidth=1e12, bfloat16=2e12, host_link=1e9, source="")
    work = types.SimpleNamespace(lengths=[3, 11])
    settings = types.SimpleNamespace(mu=1)
    # Ten tokens after the first, of 2 ms each; operations decide where they take longer than the bytes.
    assert cards.seconds(need, work, card, settings) == pytest.approx(
        {"tower and prompt": 2.0, "decoding": 0.02, "policy": 4.0, "optimiser": 0.006})
    need.host["optimiser, masters"] = 3e9
    assert cards.seconds(need, work, card, settings)["optimiser"] == 3.0


def test_the_last_line_says_what_to_start(tmp_path, monkeypatch):
    ways = {"3b": [("", None)], "7b": [("--offload-optimizer", None), ("--lora-rank 64", None)]}
    asked = []
    monkeypatch.setattr(memory, "ways_that_fit", lambda *given: asked.append(given) or iter(ways[given[0]]))
    place = accept.Place(torch.device("cuda"), tmp_path, cards=6)
    results = [("environment", accept.Check(accept.FREE, 79.1)), ("kernels", accept.equal("x", 1, 1, ""))]
    assert accept.verdict(place, results) == (
        "Safe to start: `GPUS=4 bash train.sh charades-3b`; `GPUS=4 bash train.sh charades-7b --offload-optimizer`.")
    assert asked == [("3b", 4, 79.1), ("7b", 4, 79.1)]
    ways["7b"] = []
    assert accept.verdict(place, results).endswith("charades-3b`; 7B does not fit 4 x 79.1 GiB.")
    results.append(("graphs", accept.equal("the tokens", 1, 2, "")))
    assert accept.verdict(place, results).startswith("Not safe to start: 1 checks failed, the first of them \"graphs: ")
