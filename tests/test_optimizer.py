import numpy as np
import pytest
import torch
from torch import nn

from cifar_resnet import Recipe
from cifar_resnet.model import build_model
from cifar_resnet.optimizer import Muon, make_optimizer, orthogonalise, set_rates, sharpest


def test_orthogonalise_keeps_the_singular_vectors_and_evens_the_values():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((8, 8), (16, 72), (72, 16))]
    for matrix, orthogonal in zip(matrices, orthogonalise(matrices), strict=True):
        u, values, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
        found = u.T @ orthogonal.numpy() @ v.T
        values /= np.linalg.norm(values)
        for _ in range(3):  # the iteration acts on the singular values alone
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(found, np.diag(values), atol=1e-6)


def airbench_step(kernel, gradients, lr, momentum):
    """cifar10-airbench's Muon in its own words, on one kernel."""
    buffer = torch.zeros_like(kernel)
    for gradient in gradients:
        buffer = momentum * buffer + gradient
        g = gradient + momentum * buffer
        kernel = kernel * (len(kernel) ** 0.5 / kernel.norm())
        x = g.reshape(len(g), -1)
        x = x / (x.norm() + 1e-7)
        transposed = x.size(0) > x.size(1)
        x = x.T if transposed else x
        for _ in range(3):
            a = x @ x.T
            b = -4.7750 * a + 2.0315 * a @ a
            x = 3.4445 * x + b @ x
        kernel = kernel - lr * (x.T if transposed else x).view(g.shape)
    return kernel


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_kernels_as_airbench_does_and_the_rest_as_sgd(layout):
    torch.manual_seed(0)
    kernel, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    gradients = [(torch.randn(6, 4, 3, 3), torch.randn(6)) for _ in range(3)]
    mine = [nn.Parameter(kernel.clone().to(memory_format=layout)), nn.Parameter(bias.clone())]
    plain = nn.Parameter(bias.clone())
    common = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    special = dict(muon_momentum=0.6, lr_factor=0.5, momentum=0.0, nesterov=False, weight_decay=0.0)
    optimizer = Muon([{"params": [mine[1]]}, {"params": [mine[0]], **special}], torch.float32, fused=True, **common)
    sgd = torch.optim.SGD([plain], **common)
    set_rates(optimizer, 0.1, 0.9)
    for of_kernel, of_bias in gradients:
        mine[0].grad, mine[1].grad, plain.grad = of_kernel.clone().to(memory_format=layout), of_bias.clone(), of_bias.clone()
        optimizer.step()
        sgd.step()
    expected = airbench_step(kernel, [each for each, _ in gradients], 0.05, 0.6)
    torch.testing.assert_close(mine[0].detach(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], plain)


def test_muon_takes_every_kernel_but_the_first():
    model = build_model(Recipe.build(optimizer="muon", precision="float32"))
    optimizer = make_optimizer(Recipe.build(optimizer="muon", precision="float32", muon_lr_factor=0.25), model)
    rest, kernels = optimizer.param_groups
    assert sorted(tuple(p.shape) for p in kernels["params"]) == sorted(
        [
            (128, 64, 3, 3),
            (128, 128, 3, 3),
            (128, 128, 3, 3),
            (256, 128, 3, 3),
            (512, 256, 3, 3),
            (512, 512, 3, 3),
            (512, 512, 3, 3),
        ]
    )
    assert {id(p) for group in (rest, kernels) for p in group["params"]} == {id(p) for p in model.parameters()}
    set_rates(optimizer, 0.4, 0.8)
    assert [group["lr"] for group in (rest, kernels)] == [0.4, 0.4]
    assert kernels["lr_factor"] == 0.25
    assert [group["momentum"] for group in (rest, kernels)] == [0.8, 0.0]


def test_dirac_kernels_pass_their_inputs_on():
    model = build_model(Recipe.build(init="dirac"))
    x = torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(model.layer1[0](x)[:, :64], x)
    block = model.layer1[-1].block
    y = torch.randn(1, 128, 8, 8)
    torch.testing.assert_close(block[0](y), y)
    assert not torch.equal(build_model(Recipe.build(init="dirac", seed=1)).layer1[0].weight, model.layer1[0].weight)


def test_sharpest_lends_the_weights_where_the_loss_is_highest_nearby_and_takes_them_back():
    """To first order the loss rises by the radius times the gradient's length, each kernel in units of its norm."""
    torch.manual_seed(0)
    model = build_model(Recipe.build()).double()
    images, labels, radius = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 10, 1e-6

    def loss():
        return nn.functional.cross_entropy(model(images), labels)

    before = loss()
    before.backward()
    kernels = [weight for weight in model.parameters() if weight.dim() > 1]
    length = torch.cat([(weight.norm() * weight.grad).flatten() for weight in kernels]).norm()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), sharpest(model, radius):  # noqa: PT012
        moves = [(tensor - kept[name]) / kept[name].norm() for name, tensor in model.state_dict().items() if "weight" in name]
        assert float(torch.cat([move.flatten() for move in moves]).norm()) == pytest.approx(radius, rel=1e-6)
        assert (loss() - before).item() == pytest.approx(radius * length.item(), rel=1e-2)
        assert all(weight.grad is None for weight in model.parameters())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
