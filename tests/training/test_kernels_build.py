"""Whether Triton's compiler takes our kernels, for GPUs that need not be here: its interpreter takes more than its compiler."""

import ast
import gc
import re
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import engine, fused, kernels, muon_kernels, step_kernels
from cifar_resnet.training.capture import CapturedEpoch

triton = pytest.importorskip("triton", reason="there is no Triton here")

LAUNCHED = {
    fused: "_sum_activations _finish_statistics _normalise _sum_gradients _finish_gradients _input_gradient",
    muon_kernels: "_momentum_kernel _scale_kernel _move_kernel",
    step_kernels: "_augment _cross_entropy _count",
}


class NoGPU:
    """In place of Triton's driver: a GPU for which kernels can be built."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def test_the_kernels_of_sharpness_aware_steps_can_be_built(monkeypatch, tmp_path):
    built, device, launch = {}, torch.device("cpu"), triton.runtime.JITFunction.run

    def build(kernel, *given, grid, warmup, **named):
        found = launch(kernel, *given, grid=grid, warmup=True, **named)
        built.setdefault(kernel.__name__, []).append(found.asm)
        return found

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    driver = triton.runtime.driver
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", NoGPU())
    monkeypatch.setattr(triton.runtime.JITFunction, "run", build)
    for module, names in LAUNCHED.items():
        monkeypatch.setattr(module, "triton_works", lambda *_: True)
        for kernel in (getattr(module, name).function for name in names.split()):  # a GPU that is there keeps its own
            monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    split = Split(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64), np.arange(4))
    for pad_mode in ("reflect", "mean"):
        fields = dict(width=16, batch_size=4, sam_share=1.0, epochs=2, peak_epoch=1.0, precision="bfloat16")
        recipe = with_statistics(Recipe(pad_mode=pad_mode, **fields))
        state, loader = engine.start(recipe, device), TensorLoader(split, recipe, device)
        epoch = CapturedEpoch(state, loader)
        epoch._build(epoch.kind(0))
        before = set(tmp_path.rglob("*.cubin"))
        with kernels.for_a_graph():
            assert len(list(epoch(state, loader))) == 1
        assert set(tmp_path.rglob("*.cubin")) == before  # what is launched was built
    assert set(built) == set(" ".join(LAUNCHED.values()).split())
    assert all(each["cubin"].startswith(b"\x7fELF") for kinds in built.values() for each in kinds)
    for name in ("_momentum_kernel", "_scale_kernel", "_move_kernel", "_normalise"):  # which go through memory in its order
        assert all(re.search(r"ld\.global[\w.:]*\.v4", each["ptx"]) for each in built[name])  # four numbers at once


def test_threads_that_build_kernels_do_not_disturb_each_other():
    """Python 3.11 fails to parse in two threads, where it collects garbage between: python/cpython issue 106905."""

    class Parses:
        def __init__(self, name):
            self.__name__ = name

        def warmup(self, grid):
            for _ in range(8):
                ast.parse(source)
            finished.append(self.__name__)
            return SimpleNamespace(run=None)

    def let_others_go_on(*_):
        time.sleep(1e-5)

    source, finished = Path(engine.__file__).read_text("utf-8"), []
    gc.callbacks.append(let_others_go_on)
    try:
        kernels.build(lambda: [kernels._builder(Parses(f"kernel {k}"), (1,)) for k in range(8)])
    finally:
        gc.callbacks.remove(let_others_go_on)
    assert len(finished) == 8
    assert gc.isenabled()


def test_after_a_failure_kernels_are_launched_again():
    def fails():
        assert kernels._builder
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        kernels.build(fails)
    assert kernels._builder is None
