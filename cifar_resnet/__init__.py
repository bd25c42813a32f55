"""One small ResNet through CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and why.

Importing the package imports nothing heavy; torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import bench
    from .errors import CifarResnetError
    from .evaluation import evaluate, misclassified
    from .experiment import Watcher, repeat, samples, train
    from .inference import export, predict
    from .lr_search import find_lr
    from .model import ResNet, build_model
    from .recipe import PRESETS, Recipe
    from .results import compare, report
    from .run import Checkpoint, load_checkpoint

__version__ = "0.1.0"

_HOME = {
    "benchmark": ("bench",),
    "errors": ("CifarResnetError",),
    "evaluation": ("evaluate", "misclassified"),
    "experiment": ("Watcher", "repeat", "samples", "train"),
    "inference": ("export", "predict"),
    "lr_search": ("find_lr",),
    "model": ("ResNet", "build_model"),
    "recipe": ("PRESETS", "Recipe"),
    "results": ("compare", "report"),
    "run": ("Checkpoint", "load_checkpoint"),
}
__all__ = [
    "PRESETS", "Checkpoint", "CifarResnetError", "Recipe", "ResNet", "Watcher", "bench", "build_model", "compare",
    "evaluate", "export", "find_lr", "load_checkpoint", "misclassified", "predict", "repeat", "report", "samples", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
