"""A trained model at work: on image files, and exported for other programs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import analysis
from .batches import TensorBatches
from .data import Split, read_image
from .device import resolve_device, without_emulation
from .errors import CifarResnetError, DataError, UsageError
from .model import ResNet
from .run import load_checkpoint, write_whole

CHUNK = 1000  # images in memory at a time


def predict(
    checkpoint: Path | str,
    images: Sequence[Path | str],
    *,
    top: int = 3,
    tta: str = "none",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    skipped: Callable[[str], object] = warnings.warn,
) -> Iterator[dict[str, Any]]:
    """For each image file its most probable classes: {"image": path, "classes": [{"class", "probability"}, ...]}.

    Args:
        images: files, or folders, whose files are taken in the order of their names. Files are read as `data.read_image` says.
        top: how many classes.
        tta: "none", "flip" or "flip-shift"; see `analysis.views`.
        progress: called with how many files are done, of how many.
        skipped: called with a line for each file that is no image.

    Raises:
        CifarResnetError: one line that says what was wrong.
    """
    place, loaded = resolve_device(device), load_checkpoint(checkpoint)
    if top < 1:
        raise UsageError(f"--top {top} must be at least 1")
    files = [
        file
        for path in map(Path, images)
        for file in (sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path])
    ]
    if not files:
        raise UsageError(f"there are no files in {', '.join(map(str, images))}")
    model, recipe = loaded.model(place), without_emulation(loaded.recipe, place)
    for start in range(0, len(files), CHUNK):
        read, pixels = [], []
        for done, file in enumerate(files[start : start + CHUNK], start=start + 1):
            try:
                pixels.append(read_image(file))
                read.append(file)
            except DataError as error:
                skipped(str(error))
            progress(done, len(files))
        if not read:
            continue
        split = Split(np.stack(pixels), np.zeros(len(read), np.int64), np.arange(len(read)))
        batches = TensorBatches(split, recipe, place)
        probabilities = torch.softmax(analysis.mean_logits(recipe, model, batches, place, tta).double(), dim=1)
        for file, row in zip(read, probabilities, strict=True):
            best = row.topk(min(top, len(row)))
            classes = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            yield {"image": str(file), "classes": [{"class": loaded.classes[i], "probability": p} for i, p in classes]}


class _Exported(nn.Module):
    """Logits of normalised images, float32 (N, 3, 32, 32); or of pixels, uint8 (N, 32, 32, 3), where it normalises itself."""

    def __init__(self, model: ResNet, mean: Any, std: Any, with_preprocessing: bool) -> None:
        super().__init__()
        self.model, self.with_preprocessing = model, with_preprocessing
        self.mean, self.std = nn.Buffer(torch.tensor(mean).view(3, 1, 1)), nn.Buffer(torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if self.with_preprocessing:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.model.logits(images)


def export(
    checkpoint: Path | str, path: Path | str | None = None, *, format: str = "onnx", with_preprocessing: bool = False
) -> Path:
    """Writes the model that is evaluated in float32 for other programs, and gives the path.

    onnx: input `images`, float32 (N, 3, 32, 32), normalised; with `with_preprocessing` uint8 (N, 32, 32, 3) as image
    libraries give them. Output `logits`, float32 (N, classes). safetensors: the state dict. Both hold the recipe and the
    classes as metadata.

    Args:
        checkpoint: a checkpoint file, or a run directory.
        path: the file; `model.onnx` or `model.safetensors` beside the checkpoint if not given.

    Raises:
        CifarResnetError: one line that says what was wrong; a package of the extra `export` that is not installed, too.
    """
    if format not in ("onnx", "safetensors"):
        raise UsageError(f"--format {format}: it is onnx or safetensors")
    if with_preprocessing and format != "onnx":
        raise UsageError("--with-preprocessing goes with --format onnx: safetensors holds weights, and no computation")
    loaded = load_checkpoint(checkpoint)
    model, path = loaded.model(), Path(path) if path else loaded.path.parent / f"model.{format}"
    metadata = {"recipe": json.dumps(loaded.recipe.model_dump(mode="json")), "classes": json.dumps(loaded.classes)}
    try:
        if format == "safetensors":
            from safetensors.torch import save

            write_whole(path, save({name: value.contiguous() for name, value in model.state_dict().items()}, metadata))
            return path
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise CifarResnetError(f"export needs the package {error.name}: pip install 'cifar-resnet[export]'") from None
    exported = _Exported(model, loaded.recipe.mean, loaded.recipe.std, with_preprocessing).eval()
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8) if with_preprocessing else torch.zeros(2, 3, 32, 32)
    names: dict[str, Any] = dict(
        input_names=["images"], output_names=["logits"], dynamic_shapes={"images": {0: torch.export.Dim("N")}}
    )
    program = torch.onnx.export(exported, (example,), dynamo=True, verbose=False, **names)
    assert program is not None  # as with dynamo
    program.model.metadata_props.update(metadata)
    write_whole(path, program.model_proto.SerializeToString())
    return path
