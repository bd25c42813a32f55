"""3x3 convolutions in float32 on an x86 CPU, with a quarter of the multiplications: Winograd's F(4x4, 3x3).

An output tile of 4x4 pixels is Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, of the kernel g, 3x3, and the input tile d, 6x6 (Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", 2016, section 4.3). Over channels the product ⊙ is a matrix product for each of
the 36 places, and the transforms are matrix products too: the Kronecker squares of A, B and G, on tiles as vectors. The
backward pass is the transposed of each, in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 8192  # tiles at a time: fewer save memory, but wait more for other programs on the same cores
MIN_CHANNELS, MIN_TILES = 64, 64  # with fewer, transforming the tiles, or the kernels, costs more than it saves

_BT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
_G = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
_AT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
INPUT, KERNEL, OUTPUT = (torch.kron(m, m).float() for m in (torch.tensor(m, dtype=torch.float64) for m in (_BT, _G, _AT)))


class Conv3x3(nn.Conv2d):
    """A convolution of 3x3 with padding 1, (N, inputs, H, W) to (N, outputs, H, W), best in channels-last layout.

    Where `usable` says so it has first derivatives only, by `backward` or `torch.autograd.grad`: elsewhere it is torch's own.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, kernel_size=3, stride=1, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not usable(x, self.weight):
            return super().forward(x)
        y: Tensor = _Winograd.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether it is float32 on a CPU whose matrix products are MKL's, large enough, and executed rather than traced."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and x.shape[1] >= MIN_CHANNELS
        and x.shape[2] % 4 == x.shape[3] % 4 == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= 16 * MIN_TILES
        and torch.backends.mkl.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix`, (out, in), times each tile: (tiles, in, channels) to (tiles, out, channels)."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles)


def _places(tiles: Tensor, kernels: Tensor) -> Tensor:
    """The channels of each place times that place's kernel: (tiles, 36, in) and (36, in, out) to (tiles, 36, out)."""
    product = tiles.new_empty(len(tiles), 36, kernels.shape[2])
    torch.bmm(tiles.transpose(0, 1), kernels, out=product.transpose(0, 1))
    return product


def _input_tiles(x: Tensor) -> Tensor:
    """Transformed overlapping tiles, (tiles, 36, C), of images (N, H, W, C) with a border of zeros."""
    tiles = functional.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4)
    return _transform(INPUT, tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, 36, x.shape[3]))


def _add_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The transposed of cutting tiles of 6x6 out of images: images, `shape` (N, H, W, C), as sums of the tiles (tiles, 36, C)."""
    n, height, width, channels = shape
    rows, columns = height // 4, width // 4
    d = tiles.view(n, rows, columns, 6, 6, channels).transpose(2, 3)
    x = tiles.new_zeros(n, rows + 1, 4, columns + 1, 4, channels)  # of the border all of one side, and more of the other
    x[:, :rows, :, :columns] += d[:, :, :4, :, :4]
    x[:, 1:, :2, :columns] += d[:, :, 4:, :, :4]
    x[:, :rows, :, 1:, :2] += d[:, :, :4, :, 4:]
    x[:, 1:, :2, 1:, :2] += d[:, :, 4:, :, 4:]
    return x.view(n, height + 4, width + 4, channels)[:, 1 : height + 1, 1 : width + 1]


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        x, kernels = x.permute(0, 2, 3, 1), _kernels(weight)
        n, height, width, _ = x.shape
        y = x.new_empty(n, height, width, len(weight))
        per = _images(height, width)
        for images, result in zip(x.split(per), y.split(per), strict=True):
            tiles = _transform(OUTPUT, _places(_input_tiles(images), kernels))
            tiles = tiles.view(-1, height // 4, width // 4, 4, 4, len(weight)).transpose(2, 3)
            result.view(tiles.shape).copy_(tiles)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        x, g, kernels = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1), _kernels(weight)
        n, height, width, channels = x.shape
        dx = x.new_empty(x.shape) if ctx.needs_input_grad[0] else None
        dkernels = torch.zeros_like(kernels)
        per = _images(height, width)
        for i in range(0, n, per):
            tiles = g[i : i + per].reshape(-1, height // 4, 4, width // 4, 4, len(weight)).transpose(2, 3)
            dproduct = _transform(OUTPUT.T, tiles.reshape(-1, 16, len(weight)))
            if ctx.needs_input_grad[1]:
                dkernels.baddbmm_(_input_tiles(x[i : i + per]).permute(1, 2, 0), dproduct.transpose(0, 1))
            if dx is not None:
                tiles = _transform(INPUT.T, _places(dproduct, kernels.transpose(1, 2)))
                dx[i : i + per] = _add_tiles(tiles, x[i : i + per].shape)
        dweight = (KERNEL.T @ dkernels.view(36, -1)).view(3, 3, channels, len(weight)).permute(3, 2, 0, 1)
        return dx if dx is None else dx.permute(0, 3, 1, 2), dweight


def _images(height: int, width: int) -> int:
    """How many images of this size at a time."""
    return max(1, CHUNK * 16 // (height * width))


def _kernels(weight: Tensor) -> Tensor:
    """Transformed kernels, (36, in, out), of weights (out, in, 3, 3)."""
    outputs, inputs = weight.shape[:2]
    return (KERNEL @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, inputs, outputs)
