"""The kernels around the network against torch's own operations: in Triton's interpreter, a process of its own, and on CUDA."""

from itertools import product

import numpy as np
import pytest
import torch
from interpreter import check_in_the_interpreter, needs_triton, run_checks
from torch.nn import functional

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import Share, TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import engine, fused, muon_kernels, step_kernels
from cifar_resnet.training.capture import CapturedEpoch
from cifar_resnet.training.kernels import for_a_graph


def random_split(count):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 32, 32), np.uint8).transpose(0, 2, 3, 1)  # not in the kernels' order of memory
    return Split(images, rng.integers(0, 10, count), np.arange(count))


def check_batches(device):
    """Bit for bit those of the loader: pads of each kind, no hole and several, some left out, a rank's share, a short last batch."""
    kinds = product(("reflect", "black", "mean"), ((0, 0, 0.0), (4, 1, 1.0), (3, 2, 0.5)), (Share(0, 1), Share(1, 2)))
    for pad_mode, (pad, holes, probability), share in kinds:
        fields = dict(pad_mode=pad_mode, pad=pad, cutout_count=holes, cutout_probability=probability, flip_order="random")
        recipe = with_statistics(Recipe(batch_size=8, batches="fixed", **fields))
        loader = TensorLoader(random_split(13), recipe, torch.device(device), share)
        table = loader.send(loader.draw(1))
        for step, size in enumerate(loader.sizes):
            number = torch.tensor(step, device=device)
            ours, its = step_kernels.batch(loader, table, number, size), loader.batch(table, number, size)
            assert torch.equal(ours.images, its.images), fields
            assert ours.images.stride() == its.images.stride()
            assert torch.equal(ours.labels, its.labels)
            assert ours.weight == its.weight


def check_losses(device):
    """Loss and gradient in float64 words, hits as torch counts them: of few classes and many, of more rows than a tile has."""
    for classes, rows, dtype, smoothing in (
        (2, 7, torch.float32, 0.0),
        (10, 700, torch.float32, 0.1),
        (10, 700, torch.bfloat16, 0.1),
        (100, 50, torch.float32, 0.2),
    ):
        torch.manual_seed(0)
        recipe, output = Recipe(label_smoothing=smoothing), (3 * torch.randn(rows, classes, device=device)).to(dtype)
        output[::3] = output[::3].round()  # equal ones: the first is the answer
        output[1] *= 100
        labels = torch.randint(classes, (rows,), device=device)
        loss, gradient = step_kernels.cross_entropy(recipe, output, labels, 0.7)
        exact = output.double().requires_grad_()
        expected = functional.cross_entropy(exact, labels, label_smoothing=smoothing)
        (0.7 * expected).backward()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), exact.grad, rtol=tolerance, atol=tolerance / rows)
        totals, bad = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device), torch.tensor(-1, device=device)
        for step in (4, torch.tensor(5, device=device)):
            step_kernels.count(output, labels, loss, totals, bad, step)
        hits = int((output.argmax(1) == labels).sum())
        assert totals.tolist() == pytest.approx([2 + 2 * rows * float(loss), 3 + 2 * hits])
        assert int(bad) == -1


def check_bad_losses(device):
    """The first step whose loss is not finite stays, and NaN stays in the totals."""
    output, labels = torch.zeros(3, 10, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    for value in (float("nan"), float("inf")):
        totals, bad = torch.zeros(2, dtype=torch.float64, device=device), torch.tensor(-1, device=device)
        for step, loss in ((6, 1.0), (7, value), (8, value), (9, 1.0)):
            step_kernels.count(output, labels, torch.tensor(loss, device=device), totals, bad, step)
        assert int(bad) == 7
        assert not totals[0].isfinite()
    output[1, 2] = torch.nan
    loss, gradient = step_kernels.cross_entropy(Recipe(), output, labels, 1.0)
    assert loss.isnan()
    assert gradient[1].isnan().all()


def trained(device, kernels):
    """Losses of the steps, and the history, of a run with our kernels or with torch's own."""
    fields = dict(width=16, batch_size=4, batches="fixed", sam_share=0.5, epochs=1, peak_epoch=0.5, max_lr=0.01)
    recipe = with_statistics(Recipe(precision="float32", **fields))
    state, loader = engine.start(recipe, torch.device(device)), TensorLoader(random_split(7), recipe, torch.device(device))
    captured = CapturedEpoch(state, loader)

    @for_a_graph()
    def with_kernels(state, loader):
        return list(captured(state, loader))

    records = engine.train(state, loader, lambda: loader.plain(7), with_kernels if kernels else engine.plain_epoch)
    return [float(record.loss) for record in records if isinstance(record, engine.Step)], state.history


def check_run(device):
    """Two steps with all of our kernels, of two sizes, the second one sharpness-aware, are those of torch's own."""
    (losses, history), (expected, plain) = trained(device, True), trained(device, False)
    assert losses == pytest.approx(expected, rel=1e-3)
    for key in ("train_loss", "train_accuracy", "test_loss"):
        assert [epoch[key] for epoch in history] == pytest.approx([epoch[key] for epoch in plain], rel=1e-3)


CHECKS = (check_batches, check_losses, check_bad_losses, check_run)


@needs_triton
def test_in_the_interpreter_the_kernels_are_torchs_words():
    check_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu_the_kernels_are_torchs_words(check):
    check("cuda")


if __name__ == "__main__":
    fused.ROWS = fused.SUM_ROWS = fused.POOL_ROWS = 1024  # fewer programs, as each takes its time in the interpreter
    fused.FINISH, muon_kernels.BLOCK = 128, 65536
    run_checks(*CHECKS)
