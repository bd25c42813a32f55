"""3x3 convolutions on a CPU, and the ways to compute them; `autotune` finds the quickest for each layer.

Images are (N, H, W, C) here, the memory order of channels-last tensors, and kernels (3, 3, inputs, outputs). An input gradient is
a convolution of the output's gradient with the kernels turned by 180 degrees, inputs and outputs swapped. So one way serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

TRIPLES = 32 * 2**20  # bytes of pixels with two neighbours each, at a time
SIDE = 8  # images in one that is wide
PART = 128  # outputs at a time
MIN_POSITIONS = 1024  # pixels of a batch: with fewer, those of single images, torch's own convolution is quickest
MIN_CHANNELS = 64  # with fewer, where nothing was measured, Winograd's transforms would cost more than they save
TILES = 4096  # of Winograd at a time: fewer save memory, but wait more for other programs on the same cores

# Winograd's F(4x4, 3x3) needs a quarter of the multiplications. An output tile of 4x4 pixels is Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, of the
# kernel g, 3x3, and the input tile d, 6x6 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, section 4.3).
# Over channels the product ⊙ is a matrix product for each of the 36 places, and the transforms are matrix products too: the
# Kronecker squares of A, B and G, on tiles as vectors. The weight gradient is the transposed of each, in reverse.
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


class Ways(NamedTuple):
    """By which way a layer's output and its two gradients are computed; keys of `CONVOLUTIONS`, `CONVOLUTIONS`, `WEIGHT_GRADIENTS`."""

    forward: str = "torch"
    input_gradient: str = "torch"
    weight_gradient: str = "torch"


TORCH, WINOGRAD = Ways(), Ways("winograd", "winograd", "winograd")


class Conv3x3(nn.Conv2d):
    """A convolution of 3x3 with padding 1, (N, inputs, H, W) to (N, outputs, H, W), best in channels-last layout.

    It is torch's own but on a CPU, where `ways.use` may name other ways. These have first derivatives only.
    """

    ways: Mapping[str, Ways] | None = None  # by `layer_name`; torch's own for what is not in it. None: nothing was measured

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, kernel_size=3, stride=1, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        ways = self._ways(x)
        if ways == TORCH:
            return super().forward(x)
        dtype = compute_type(x)
        y: Tensor = _Convolution.apply(x.to(dtype), self.weight.to(dtype), ways)
        return y if self.bias is None else y + self.bias.to(dtype).view(-1, 1, 1)

    def _ways(self, x: Tensor) -> Ways:
        if x.device.type != "cpu" or x.dim() != 4 or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return TORCH
        if x.shape[0] * x.shape[2] * x.shape[3] < MIN_POSITIONS:
            return TORCH
        dtype = compute_type(x)
        if self.ways is not None:
            return self.ways.get(layer_name(dtype, len(self.weight), x.shape), TORCH)
        usual = x.shape[1] >= MIN_CHANNELS and possible("winograd", dtype, x.shape) and torch.backends.mkl.is_available()
        return WINOGRAD if usual else TORCH


def compute_type(x: Tensor) -> torch.dtype:
    """In which arithmetic a convolution of `x` is computed: autocast's, where it is on."""
    on = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if on else x.dtype


def layer_name(dtype: torch.dtype, outputs: int, shape: torch.Size) -> str:
    """What a layer is called in a choice of ways, such as "float32 64>128 32x32"; `shape` is that of its input, (N, C, H, W)."""
    _, inputs, height, width = shape
    return f"{str(dtype).removeprefix('torch.')} {inputs}>{outputs} {height}x{width}"


def possible(way: str, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether a way is of use for images (N, C, H, W) of this type. In float32 only Winograd's won, which needs tiles that fill them."""
    if way == "winograd":
        return dtype == torch.float32 and shape[2] % 4 == shape[3] % 4 == 0
    return way == "torch" or dtype == torch.bfloat16


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ways: Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.ways = ways
        return CONVOLUTIONS[ways.forward](x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0)).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, kernels = ctx.saved_tensors[0].permute(0, 2, 3, 1), ctx.saved_tensors[1].permute(2, 3, 1, 0)
        g, dx, dweight = gradient.permute(0, 2, 3, 1).contiguous(), None, None
        if ctx.needs_input_grad[1]:
            dweight = WEIGHT_GRADIENTS[ctx.ways.weight_gradient](x, g).permute(3, 2, 0, 1)
        if ctx.needs_input_grad[0]:
            dx = input_gradient(ctx.ways.input_gradient, x, g, kernels).permute(0, 3, 1, 2)
        return dx, dweight, None


def input_gradient(way: str, x: Tensor, g: Tensor, kernels: Tensor) -> Tensor:
    """Of images (N, H, W, inputs), by a way of `CONVOLUTIONS`; `g` is the output's gradient, (N, H, W, outputs)."""
    if way == "torch":
        return _torch_gradients(x, g, kernels, [True, False, False])[0].permute(0, 2, 3, 1)
    return CONVOLUTIONS[way](g, kernels.flip(0, 1).mT)


def _torch(x: Tensor, kernels: Tensor) -> Tensor:
    return functional.conv2d(x.permute(0, 3, 1, 2), kernels.permute(3, 2, 0, 1), padding=1).permute(0, 2, 3, 1)


def _in_parts(x: Tensor, kernels: Tensor) -> Tensor:
    """torch's own, of a few outputs at a time: so many kernels stay in a cache."""
    y = x.new_empty(*x.shape[:3], kernels.shape[3])
    for part, some in zip(y.split(PART, 3), kernels.split(PART, 3), strict=True):
        part.copy_(_torch(x, some))
    return y


def _torch_gradients(x: Tensor, g: Tensor, kernels: Tensor, which: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    tensors = g.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), kernels.permute(3, 2, 0, 1)
    return torch.ops.aten.convolution_backward(*tensors, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, which)


def _torch_weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    kernels = x.new_empty(g.shape[3], 3, 3, x.shape[3]).permute(1, 2, 3, 0)  # only their shape and order matter
    return _torch_gradients(x, g, kernels, [False, True, False])[1].permute(2, 3, 1, 0)


def _pieces(*images: Tensor, size: int) -> Iterator[tuple[Tensor, ...]]:
    """A few images at a time, of each tensor as many; at least one."""
    return zip(*(each.split(max(1, size)) for each in images), strict=True)


def _triples(x: Tensor) -> Tensor:
    """Each pixel between its neighbours in the row, zeros beyond the images: (H, W N, 3 C) of (N, H, W, C)."""
    n, height, width, channels = x.shape
    pixels, triples = x.permute(1, 2, 0, 3), x.new_empty(height, width, n, 3, channels)
    left, middle, right = triples.unbind(3)
    left[:, 1:], left[:, 0] = pixels[:, :-1], 0
    middle[:] = pixels
    right[:, :-1], right[:, -1] = pixels[:, 1:], 0
    return triples.view(height, -1, 3 * channels)


def _by_rows(x: Tensor, kernels: Tensor) -> Tensor:
    """One matrix product for each row of the kernels, with the triples of all rows of images that it sees."""
    _, height, width, inputs, outputs = *x.shape, kernels.shape[3]
    above, here, below = kernels.reshape(3, 3 * inputs, outputs)
    y = x.new_empty(*x.shape[:3], outputs)
    for images, result in _pieces(x, y, size=TRIPLES // (3 * x[0].numel() * x.element_size())):
        triples = _triples(images)
        total = torch.mm(triples.flatten(0, 1), here).view(height, -1, outputs)
        total[1:].flatten(0, 1).addmm_(triples[:-1].flatten(0, 1), above)
        total[:-1].flatten(0, 1).addmm_(triples[1:].flatten(0, 1), below)
        result.copy_(total.view(height, width, -1, outputs).permute(2, 0, 1, 3))
    return y


def _side_by_side(x: Tensor) -> Tensor:
    """Images of (N, H, W, C) in wide ones, (N / SIDE, H, SIDE (W + 1), C), with a column of zeros between them."""
    if missing := -len(x) % SIDE:
        x = functional.pad(x, (0, 0, 0, 0, 0, 0, 0, missing))
    n, height, width, channels = x.shape
    wide = x.new_empty(n // SIDE, height, SIDE, width + 1, channels)
    wide[:, :, :, :width], wide[:, :, :, width] = x.reshape(-1, SIDE, height, width, channels).transpose(1, 2), 0
    return wide.view(-1, height, SIDE * (width + 1), channels)


def _weight_gradient_side_by_side(x: Tensor, g: Tensor) -> Tensor:
    """torch's own, of wider images: on AMX they take less time than many narrow ones."""
    return _torch_weight_gradient(_side_by_side(x), _side_by_side(g))


def _transform(matrix: Tensor, tiles: Tensor) -> Tensor:
    """`matrix`, (out, in), times each tile: (tiles, in, channels) to (tiles, out, channels)."""
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles)


def _winograd_tiles(x: Tensor) -> Tensor:
    """Transformed overlapping tiles, (tiles, 36, C), of images (N, H, W, C) with a border of zeros."""
    tiles = functional.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 6, 4).unfold(2, 6, 4)
    return _transform(INPUT, tiles.permute(0, 1, 2, 4, 5, 3).reshape(-1, 36, x.shape[3]))


def _in_tiles(x: Tensor) -> Tensor:
    """A view of images as their tiles, (N, H / 4, W / 4, 4, 4, C)."""
    n, height, width, channels = x.shape
    return x.view(n, height // 4, 4, width // 4, 4, channels).transpose(2, 3)


def _winograd_images(x: Tensor) -> int:
    """How many images at a time."""
    return TILES * 16 // (x.shape[1] * x.shape[2])


def _winograd_kernels(kernels: Tensor) -> Tensor:
    """Transformed kernels, (36, inputs, outputs), in the order of memory that they have: putting it right would take longer."""
    if kernels.stride(3) > kernels.stride(2):
        return _winograd_kernels(kernels.mT).mT
    return (KERNEL @ kernels.reshape(9, -1)).view(36, *kernels.shape[2:])


def _winograd(x: Tensor, kernels: Tensor) -> Tensor:
    outputs = kernels.shape[3]
    transformed, y = _winograd_kernels(kernels), x.new_empty(*x.shape[:3], outputs)
    for images, result in _pieces(x, y, size=_winograd_images(x)):
        tiles = _winograd_tiles(images)
        product = tiles.new_empty(len(tiles), 36, outputs)
        torch.bmm(tiles.transpose(0, 1), transformed, out=product.transpose(0, 1))
        _in_tiles(result).copy_(_transform(OUTPUT, product).view(_in_tiles(result).shape))
    return y


def _winograd_weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    inputs, outputs = x.shape[3], g.shape[3]
    total = x.new_zeros(36, outputs, inputs)
    for images, gradients in _pieces(x, g, size=_winograd_images(x)):
        tiles = _transform(OUTPUT.T, _in_tiles(gradients).reshape(-1, 16, outputs))
        total.baddbmm_(tiles.permute(1, 2, 0), _winograd_tiles(images).transpose(0, 1))
    return (KERNEL.T @ total.view(36, -1)).view(3, 3, outputs, inputs).mT


CONVOLUTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of images and kernels
    "torch": _torch,
    "parts": _in_parts,
    "rows": _by_rows,
    "winograd": _winograd,
}
WEIGHT_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of images and the output's gradient
    "torch": _torch_weight_gradient,
    "side by side": _weight_gradient_side_by_side,
    "winograd": _winograd_weight_gradient,
}
