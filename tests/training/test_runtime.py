"""Where a run happens, in which arithmetic, and what is recorded of it."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe, evaluate, load_checkpoint, train
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.errors import CifarResnetError, UsageError
from cifar_resnet.training import engine
from cifar_resnet.training.model import build_model
from cifar_resnet.training.optim import make_optimizer
from cifar_resnet.training.runtime import (
    autocast,
    cast_at_once,
    compiled,
    environment,
    resolve_device,
    resolve_precision,
    without_emulation,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TF32 = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture
def tf32():
    """Torch's switches of TF32 as they are; they are put back."""
    before = [switch.allow_tf32 for switch in TF32]
    yield lambda: [switch.allow_tf32 for switch in TF32]
    for switch, value in zip(TF32, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture
def pretended_gpu(monkeypatch):
    """As if there were two GPUs of the last generation without bfloat16; gives those that were made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU, {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "cuda", "13.1")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    return current


@pytest.mark.parametrize("on", [False, True])
def test_tf32_is_one_switch_for_products_and_convolutions(on, tf32, pretended_gpu):
    for switch in TF32:
        switch.allow_tf32 = not on
    resolve_device("cpu", on)
    assert tf32() == [not on, not on]  # where it means nothing, what a notebook has chosen stays
    resolve_device("cuda", on)
    assert tf32() == [on, on]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_is_refused(dtype, tiny_run, monkeypatch):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for call in (train, evaluate, load_checkpoint, build_model):
            with pytest.raises(UsageError, match=rf"{dtype}; first call torch.set_default_dtype\(torch.float32\)"):
                call(*{build_model: [Recipe()], train: []}.get(call, [tiny_run]))
    finally:
        torch.set_default_dtype(before)


def test_another_default_device_is_refused(tiny_run, monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda:0"))
    with pytest.raises(UsageError, match=r'chosen cuda:0; first call torch.set_default_device\("cpu"\)'):
        evaluate(tiny_run)


def test_the_environment_of_a_gpu_holds_its_libraries_and_arithmetic(pretended_gpu, tf32):
    for on in (True, False):
        resolve_device("cuda:1", on)
        found = environment(torch.device("cuda", 1))
        assert found["tf32"] is on
        assert (found["cuda"], found["cudnn"], found["device_name"]) == ("13.1", 91000, "a GPU, cuda:1")
        assert found["device"] == "cuda:1"


def test_the_environment_of_a_cpu_holds_versions_and_no_gpus():
    found = environment(CPU)
    for name in ("torch", "torchvision", "albumentations"):
        assert found[name].split("+")[0] == importlib.metadata.version(name).split("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["cuda"], found["cudnn"], found["tf32"]) == (None, None, None)
    assert (found["device"], found["threads"], found["cpus"]) == ("cpu", torch.get_num_threads(), os.cpu_count())
    assert found["device_name"]


@pytest.mark.parametrize("name", ["tpu", "meta", "cpu:x", "cpu:1", "cuda:2", "💥"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(name, pretended_gpu):
    with pytest.raises(UsageError, match=f"--device {name}: not there; .* have cuda, .*cpu$"):
        resolve_device(name)


def test_auto_is_a_gpu_where_there_is_one(pretended_gpu, monkeypatch, tf32):
    assert resolve_device() == CUDA
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert pretended_gpu == [1]  # torch takes no device without a number; where streams are made, and graphs captured
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device() == CPU


def test_a_command_that_several_processes_were_started_for_but_do_not_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="without torchrun"):
        resolve_device("cpu")


@pytest.mark.parametrize(
    ("system", "feature", "precision"),
    [
        ("linux", "avx512_bf16", "bfloat16"),
        ("linux", "amx_bf16", "bfloat16"),
        ("linux", "bf16", "bfloat16"),
        ("linux", "avx2", "float32"),
        ("win32", "avx512_bf16", "bfloat16"),
        ("win32", "avx2", "float32"),
        ("darwin", "bf16", "float32"),
    ],
)
def test_auto_precision_is_bfloat16_where_the_cpu_multiplies_in_it(system, feature, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    monkeypatch.setattr(sys, "platform", system)
    for asked in ("auto", "float32", "bfloat16"):
        recipe = resolve_precision(Recipe(precision=asked), CPU)
        assert recipe.precision == (precision if asked == "auto" else asked)
    evaluated = without_emulation(Recipe(precision="bfloat16"), CPU).precision
    assert evaluated == precision  # emulated it would take eleven times as long
    assert without_emulation(Recipe(precision="bfloat16"), CUDA).precision == "bfloat16"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_auto_precision_is_bfloat16_where_the_gpu_multiplies_in_it(pretended_gpu, capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision(Recipe(), CUDA).precision == precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_products_are_in_the_recipes_arithmetic(precision):
    x = torch.ones(2, 2)
    with autocast(Recipe(precision=precision), CPU):
        assert (x @ x).dtype == getattr(torch, precision)
        if precision == "bfloat16":
            assert not torch.is_autocast_cache_enabled()
    assert (x @ x).dtype == torch.float32


def test_a_model_that_cannot_be_compiled_is_one_line_and_left_as_it_was(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    recipe = Recipe.build(precision="float32", width=4)
    model = build_model(recipe)
    with pytest.raises(CifarResnetError, match="Failed to find C compiler; use --compile off$"):
        compiled("on", recipe, model, CPU, [8])
    for mode, device in (("auto", CPU), ("off", CPU), ("auto", CUDA), ("off", CUDA)):
        assert compiled(mode, recipe, model, device, [8]) is model


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 10)

    def forward(self, x):
        return self.fc(self.norm(x).mean((2, 3)))


def test_one_process_compiles_as_many_models_as_it_trains_and_leaves_them_as_they_were(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    recipe = Recipe.build(precision="float32")
    for sizes in ([2, 3, 4, 5, 6], [7, 8, 9, 10, 11]):  # torch's own limit is 8 graphs of one function
        model = Small()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        forward = compiled("on", recipe, model, CPU, sizes)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert counter.frame_count == 10
    forward(torch.zeros(11, 3, 32, 32).to(memory_format=torch.channels_last))
    assert counter.frame_count == 10


def lacks_a_compiler():
    compiler = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if not shutil.which(compiler):
        return f"there is no C++ compiler: {compiler}"
    if " " in tempfile.gettempdir():
        return "torch compiles in no temporary folder with a space in its name"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"the C++ compiler would need {header}, which is not there"


def cut_off(recipe):
    """A run of the network cut off after its first layer: code for all of it would take a minute to compile."""
    state = engine.start(recipe, CPU)
    state.model.layer2, state.model.layer3, state.model.pool = torch.nn.Identity(), torch.nn.Identity(), torch.nn.MaxPool2d(16)
    state.model.fc = torch.nn.utils.skip_init(torch.nn.Linear, 2 * recipe.width, 10)
    for tensor in state.model.fc.parameters():
        torch.nn.init.normal_(tensor.data, 0, 0.1, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(state, forward=state.model, optimizer=make_optimizer(recipe, state.model))


@pytest.mark.skipif(bool(lacks_a_compiler()), reason=lacks_a_compiler())
def test_a_compiled_step_is_the_eager_one():
    """Through the real backend, for the default's steps, sharpness-aware ones among them."""
    from torch._inductor import config

    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 24), np.arange(24))
    fields = dict(width=4, batch_size=8, epochs=2, peak_epoch=1.0, max_lr=0.02, sam_share=0.5, precision="float32")
    recipe = with_statistics(Recipe.build(**fields))
    loader = TensorLoader(split, recipe, CPU)
    eager, fast = cut_off(recipe), cut_off(recipe)
    # Code without vector instructions, which g++ compiles in half of the time, and no processes that compile beside this one.
    with config.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        fast.forward = compiled("on", recipe, fast.model, CPU, [8])
    assert fast.forward is not fast.model
    runs = [engine.train(state, loader, lambda: loader.plain(24)) for state in (eager, fast)]
    for record, same in zip(*runs, strict=True):
        if isinstance(record, engine.Step):
            assert float(same.loss) == pytest.approx(float(record.loss), rel=1e-5)
        else:
            assert same.metrics["test_loss"] == pytest.approx(record.metrics["test_loss"], rel=1e-4)
    for (name, weight), other in zip(eager.model.state_dict().items(), fast.model.state_dict().values(), strict=True):
        if weight.is_floating_point():
            assert float((weight - other).norm() / weight.norm()) < 1e-3, name
    assert not torch.equal(eager.model.fc.weight, cut_off(recipe).model.fc.weight)


@pytest.mark.parametrize("conv_bias", [False, True])
def test_weights_that_are_cast_at_once_give_the_bits_of_autocast(conv_bias):
    recipe = Recipe(width=4, precision="bfloat16", conv_bias=conv_bias)
    images, found = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for forward in (lambda model: model(images), lambda model: cast_at_once(model, images)):
        model = build_model(recipe)
        with autocast(recipe, images.device):
            output = forward(model)
        output.float().square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(each.dtype == torch.float32 for each in gradients)
        found.append([output, *gradients, *model.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(one.stride() == other.stride() for one, other in zip(*found, strict=True))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
BLOCKS = """
import re, resource
from pathlib import Path
import torch
from cifar_resnet.training import runtime

runtime._cpu = lambda: {"amx_bf16": AMX}
runtime.keep_large_blocks()
runtime.keep_large_blocks()
for _ in range(8):  # glibc may take a block beside the freed one, a little larger, a few times
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = torch.ones(2**24)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
huge = sum(map(int, re.findall("AnonHugePages: +([0-9]+) kB", Path("/proc/self/smaps").read_text())))
print(huge, faults)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc alone keeps its blocks when told")
@pytest.mark.parametrize("amx", [False, True])
def test_a_freed_block_is_taken_again_and_lies_in_huge_pages_where_amx_multiplies(amx):
    command = [sys.executable, "-c", BLOCKS.replace("AMX", str(amx))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    huge, faults = map(int, done.stdout.split())
    assert faults < 10  # of 32 huge pages, or 16,384
    if HUGE_PAGES.exists() and "[madvise]" in HUGE_PAGES.read_text():
        assert (huge > 2**15) == amx  # half of it, in kB
