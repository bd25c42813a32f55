"""A trained model for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import ExportFormat, checked
from ..checkpoint import Checkpoint, load_checkpoint
from ..errors import CifarResnetError, UsageError
from ..files import check_file, check_new_folder, writable, write_whole
from ..recipe import DATASETS
from ..runs import LATEST
from ..training.model import ResNet
from .common import say_unfinished, standing
from .space import space


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


@checked
def export(
    checkpoint: Path | str = LATEST,
    path: Path | str | None = None,
    *,
    format: ExportFormat = "onnx",
    with_preprocessing: bool = False,
    data_dir: Path | str | None = None,
    device: str = "auto",
    notify: Callable[[str], None] = lambda message: None,
) -> Path:
    """Writes the model that is evaluated in float32 for other programs, and gives the path.

    onnx: input `images`, float32 (N, 3, 32, 32), normalised; with `with_preprocessing` uint8 (N, 32, 32, 3) as image
    libraries give them. Output `logits`, float32 (N, classes). safetensors: the state dict. Both hold as metadata
    the recipe, the classes, the temperature, by which logits are to be divided before their softmax, and the `epoch` of
    `epochs` at which the run stands.

    Args:
        checkpoint: a checkpoint file, a run directory, or "latest": the newest run in `runs`.
        path: the file, or the new folder; `model.onnx`, `model.safetensors` or `space` beside the checkpoint if not given.
        data_dir: of a space, whose examples and mistakes are images of the run; so is `device`.
        notify: called with a line where the run has not ended, and with what concerns the images of a space.

    Raises:
        CifarResnetError: one line that says what was wrong; a package of an extra that is not installed, too.
    """
    if with_preprocessing and format != "onnx":
        holds = "safetensors holds weights, and no computation" if format == "safetensors" else "a space always normalises itself"
        raise UsageError(f"--with-preprocessing goes with --format onnx: {holds}")
    if format != "space" and (data_dir or device != "auto"):
        option = f"--data-dir {data_dir}" if data_dir else f"--device {device}"
        raise UsageError(f"{option} goes with --format space: {format} holds no images, and is written on the CPU")
    loaded = load_checkpoint(checkpoint)
    recipe = loaded.recipe
    if recipe.dataset not in DATASETS:  # what is published says no path of this machine
        recipe = recipe.model_copy(update={"dataset": f"./{recipe.dataset_name}"})
    path = Path(path) if path else loaded.path.parent / ("space" if format == "space" else f"model.{format}")
    if format == "space":
        check_new_folder(path)
    else:
        check_file(path, f".{format}")
    told = {"recipe": recipe.to_dict(), "classes": loaded.classes, "temperature": loaded.temperature, **standing(loaded)}
    metadata = {name: json.dumps(value) for name, value in told.items()}
    try:
        content = _onnx(loaded, metadata, with_preprocessing) if format == "onnx" else _safetensors(loaded, metadata)
        if format == "space":
            space(loaded, recipe, path, content, data_dir, device, notify)
            return path
    except ImportError as error:
        extra = "demo" if format == "space" else "export"
        raise CifarResnetError(f'export needs the package {error.name}: pip install "cifar-resnet[{extra}]"') from None
    say_unfinished(loaded, notify)
    writable(path.parent)
    write_whole(path, content)
    return path


def _safetensors(loaded: Checkpoint, metadata: dict[str, str]) -> bytes:
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in loaded.model().state_dict().items()}, metadata)


def _onnx(loaded: Checkpoint, metadata: dict[str, str], with_preprocessing: bool) -> bytes:
    import onnx  # noqa: F401
    import onnxscript  # noqa: F401

    exported = _Exported(loaded.model(), loaded.recipe.mean, loaded.recipe.std, with_preprocessing).eval()
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8) if with_preprocessing else torch.zeros(2, 3, 32, 32)
    names: dict[str, Any] = dict(
        input_names=["images"], output_names=["logits"], dynamic_shapes={"images": {0: torch.export.Dim("N")}}
    )
    program = torch.onnx.export(exported, (example,), dynamo=True, verbose=False, **names)
    assert program is not None  # as with dynamo
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    program.model.metadata_props.update(metadata)
    return program.model_proto.SerializeToString()
