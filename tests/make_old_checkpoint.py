"""Makes a finished run's checkpoint whose every tensor is one number repeated, so that the file is small.

    python tests/make_old_checkpoint.py tests/data/schema2.pt

It is made once for a schema and then kept: what is tested is that checkpoints written back then go on loading. The versions
before made `schema1.pt`, and in the same way `run-0.1`, a run directory of a run that was stopped: neither can be made again.
"""

import sys
from pathlib import Path

import torch

from cifar_resnet import Recipe
from cifar_resnet.checkpoint import save_checkpoint
from cifar_resnet.data.datasets import load, with_statistics
from cifar_resnet.training.engine import start


def constant(value):
    if torch.is_tensor(value):
        return torch.full((1,), 0.01).to(value.dtype).expand(value.shape) if value.dim() else value
    if isinstance(value, dict):
        return {key: constant(each) for key, each in value.items()}
    return value


if __name__ == "__main__":
    path = Path(sys.argv[1])
    if path.exists():
        sys.exit(f"{path} is there already, and is to be kept")
    recipe = with_statistics(Recipe.build("default", dataset="digits", epochs=1, ema_decay=0.9, precision="float32"))
    state = start(recipe, torch.device("cpu"))
    state.model(torch.zeros(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    row = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 50.0, "test_loss": 1.0, "test_accuracy": 50.0}
    state.epoch, state.history = 1, [{**row, "seconds": 1.0, "images_per_second": 1437.0}]
    save = torch.save
    torch.save = lambda content, buffer: save(constant(content), buffer)
    save_checkpoint(path, state, load(recipe), {"torch": str(torch.__version__)})
