"""A small ResNet that names what is on an image, in the browser. All that it shows lies beside this file; nothing is fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import page
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

HERE = Path(__file__).parent
SETTINGS = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
MISTAKES = json.loads((HERE / "mistakes.json").read_text(encoding="utf-8"))
MEAN, STD = (torch.tensor(SETTINGS[name]).view(3, 1, 1) for name in ("mean", "std"))
# The arithmetic of the run, where this processor has it.
CAPABILITIES: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
BFLOAT16 = SETTINGS["precision"] == "bfloat16" and any(CAPABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def chain(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    """Convolution, max pooling where asked for, BatchNorm and ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=SETTINGS["conv_bias"])
    pooling: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    norm: list[nn.Module] = [nn.BatchNorm2d(outputs), nn.ReLU()]
    return [convolution, *(pooling + norm if SETTINGS["pool_position"] == "before-bn" else norm + pooling)]


class ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]
        self.block = nn.Sequential(*(module for each in convolutions for module in (each, nn.BatchNorm2d(channels), nn.ReLU())))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ResNet(nn.Module):
    """Normalised images, (N, 3, 32, 32), to logits, (N, classes)."""

    def __init__(self) -> None:
        super().__init__()
        width, classes = SETTINGS["width"], len(SETTINGS["classes"])
        convolution, norm, relu = chain(3, width)
        after = [norm, relu] if SETTINGS["prep_order"] == "bn-relu" else [relu, norm]
        self.prep = nn.Sequential(convolution, *after)
        self.layer1 = nn.Sequential(*chain(width, 2 * width, pool=True), ResBlock(2 * width))
        self.layer2 = nn.Sequential(*chain(2 * width, 4 * width, pool=True))
        self.layer3 = nn.Sequential(*chain(4 * width, 8 * width, pool=True), ResBlock(8 * width))
        self.fc = nn.Linear(8 * width, classes, bias=SETTINGS["fc_bias"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.fc(functional.max_pool2d(x, 4).flatten(1)) * SETTINGS["logit_scale"]


def normalised(images: np.ndarray) -> Tensor:
    return (torch.tensor(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def views(images: Tensor) -> list[tuple[float, Tensor]]:
    """Test-time augmentation: the images, their mirror images, and each of these shifted by a pixel, with the weight of each view."""
    found = []
    for view in (images, images.flip(3)):
        padded = functional.pad(view, (1, 1, 1, 1), mode="reflect")
        moved = [padded[..., start : start + 32, start : start + 32] for start in (0, 2)]
        found += [(1 / 4, view), *((1 / 8, each) for each in moved)]
    return found


@torch.inference_mode()
def probabilities(images: np.ndarray, augmented: bool) -> np.ndarray:
    seen = normalised(images)
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        logits = sum(weight * MODEL(view).float() for weight, view in (views(seen) if augmented else [(1.0, seen)]))
    return torch.softmax(torch.as_tensor(logits).double() / SETTINGS["temperature"], dim=1).numpy()


def grad_cam(images: np.ndarray, names: Sequence[str], layer: str) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) of these classes: float32 (N, 32, 32), each with a maximum of 1."""
    kept: list[Tensor] = []
    hook = getattr(MODEL, layer).register_forward_hook(lambda module, given, output: kept.append(output))
    try:
        logits = MODEL(normalised(images).requires_grad_())
    finally:
        hook.remove()
    labels = torch.tensor([SETTINGS["classes"].index(name) for name in names])
    (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), kept)
    maps = functional.relu((kept[0] * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True))
    maps = functional.interpolate(maps.detach(), (32, 32), mode="bilinear")[:, 0]
    return (maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)).numpy()


def read(file: str) -> np.ndarray:
    """An image file, turned as EXIF says, white where transparent, its centred square: uint8 (32, 32, 3)."""
    with Image.open(file) as opened:
        if opened.mode[0] in "IF":
            raise page.Problem("This image has more than 8 bits a channel. Save it as an ordinary PNG or JPEG first.")
        image = page.turned(opened).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (32, 32), Image.Resampling.LANCZOS))


def mistakes(order: str, true: str | None, predicted: str | None) -> list[page.Mistake]:
    chosen = [each for each in MISTAKES if true in (None, each["true"]) and predicted in (None, each["predicted"])]
    found = [
        page.Mistake(each["name"], each["true"], each["predicted"], each["confidence"], read(str(HERE / each["file"])))
        for each in chosen
    ]
    if order == "by class":
        found.sort(key=lambda each: [SETTINGS["classes"].index(name) for name in (each.true, each.predicted)])
    return found


def overlays(shown: Sequence[page.Mistake]) -> tuple[np.ndarray, np.ndarray]:
    """What Grad-CAM of the class predicted, and of the true one, lays over these mistakes: uint8 (N, 32, 32, 4)."""
    files = {each["name"]: each["file"] for each in MISTAKES}
    predicted, true = (
        np.stack([np.asarray(Image.open(HERE / files[each.name].replace(".png", f"-{kind}.png"))) for each in shown])
        for kind in ("predicted", "true")
    )
    return predicted, true


MODEL = ResNet().eval()
MODEL.load_state_dict(load_file(HERE / "model.safetensors"))
CONTENT = page.Content(
    title=SETTINGS["title"],
    notice=SETTINGS["notice"],
    classes=SETTINGS["classes"],
    examples=[(read(str(HERE / each["file"])), each["class"]) for each in SETTINGS["examples"]],
    augmented=SETTINGS["mirrored"],
    orders=["surest first", "by class"],
    read=read,
    probabilities=probabilities,
    grad_cam=grad_cam,
    mistakes=mistakes,
    overlays=overlays,
    run=lambda: (HERE / "run.html").read_text(encoding="utf-8"),
)

if __name__ == "__main__":
    grad_cam(np.zeros((1, 32, 32, 3), np.uint8), SETTINGS["classes"][:1], "layer2")  # so that the first answer is quick
    app = page.build(CONTENT)
    print(f"the page is at {page.launch(app)}, until Ctrl-C", flush=True)
    app.block_thread()
