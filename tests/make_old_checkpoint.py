"""Makes tests/data/schema1.pt: a finished run's checkpoint, each tensor one number repeated, so that it is small.

    python tests/make_old_checkpoint.py

It is made once for a schema and then kept: what is tested is that checkpoints written back then go on loading.
"""

from pathlib import Path

import torch

from cifar_resnet import Recipe, run
from cifar_resnet.data import with_statistics
from cifar_resnet.engine import start


def constant(value):
    if torch.is_tensor(value):
        return torch.full((1,), 0.01).to(value.dtype).expand(value.shape) if value.dim() else value
    if isinstance(value, dict):
        return {key: constant(each) for key, each in value.items()}
    return value


if __name__ == "__main__":
    recipe = with_statistics(Recipe.build("digits", epochs=1, ema_decay=0.9, precision="float32"))
    state = start(recipe, torch.device("cpu"))
    state.model(torch.zeros(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    row = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 50.0, "test_loss": 1.0, "test_accuracy": 50.0}
    state.epoch, state.history = 1, [{**row, "seconds": 1.0, "images_per_second": 1437.0}]
    folder = Path(__file__).parent / "data"
    folder.mkdir(exist_ok=True)
    save = torch.save
    torch.save = lambda content, buffer: save(constant(content), buffer)
    run.save_checkpoint(folder / "schema1.pt", recipe, state, tuple("0123456789"), "test", {"torch": "2.15.0"})
