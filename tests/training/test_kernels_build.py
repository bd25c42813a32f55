"""Whether Triton's compiler takes our kernels, for GPUs that need not be here: its interpreter takes more than its compiler."""

import numpy as np
import pytest
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import engine, fused, muon_kernels, step_kernels
from cifar_resnet.training.capture import CapturedEpoch

triton = pytest.importorskip("triton", reason="there is no Triton here")

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
}
LAUNCHED = {
    fused: "_sum_activations _finish_statistics _normalise _sum_gradients _finish_gradients _input_gradient",
    muon_kernels: "_momentum_kernel _scale_kernel _move_kernel",
    step_kernels: "_augment _cross_entropy _count",
}


def kind(value):
    """Triton's name of the type of an argument."""
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    return "*" + NAMES[value.dtype] if torch.is_tensor(value) else {int: "i32", float: "fp32"}[type(value)]


def builder(capability, built):
    """In place of a launch: builds the kernel for an NVIDIA GPU of this capability; `built` has its machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def run(kernel, *given, grid, warmup, **named):
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        options = {name: values.pop(name) for name in [*values] if name not in kernel.arg_names}
        fixed = {each.name for each in kernel.params if each.is_constexpr or values[each.name] is None}
        signature = {name: "constexpr" if name in fixed else kind(values[name]) for name in kernel.arg_names}
        constants = {name: values[name] for name in kernel.arg_names if name in fixed}
        key = kernel.__name__, *signature.values(), *constants.values()
        if key not in built:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            built[key] = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]

    return run


def test_the_kernels_of_sharpness_aware_steps_can_be_built(monkeypatch, tmp_path):
    built, device = {}, torch.device("cpu")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.JITFunction, "run", builder(90, built))
    for module in LAUNCHED:
        monkeypatch.setattr(module, "triton_works", lambda *_: True)
    split = Split(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64), np.arange(4))
    for changes in (dict(pad_mode="reflect", precision="bfloat16"), dict(pad_mode="mean", precision="float32")):
        recipe = with_statistics(Recipe(width=16, batch_size=4, sam_share=1.0, epochs=2, peak_epoch=1.0, **changes))
        state, loader = engine.start(recipe, device), TensorLoader(split, recipe, device)
        with fused.for_a_graph():
            assert len(list(CapturedEpoch(state, loader)(state, loader))) == 1
    assert {name for name, *_ in built} == set(" ".join(LAUNCHED.values()).split())
    assert all(code.startswith(b"\x7fELF") for code in built.values())
