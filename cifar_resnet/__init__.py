"""One small ResNet through CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and why.

Importing the package imports nothing heavy; torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load_checkpoint
    from .errors import CifarResnetError
    from .jobs.bench import bench
    from .jobs.compare import compare
    from .jobs.demo import demo
    from .jobs.evaluate import evaluate
    from .jobs.export import export
    from .jobs.find_lr import find_lr
    from .jobs.misclassified import misclassified
    from .jobs.predict import predict
    from .jobs.repeat import repeat
    from .jobs.report import report
    from .jobs.samples import samples
    from .jobs.track import track
    from .jobs.train import train
    from .jobs.training_labels import training_labels
    from .jobs.watch import Watcher, Watchers
    from .presets import PRESETS
    from .recipe import Recipe
    from .training.model import ResNet, build_model

__version__ = "0.2.0"

_MODULES = {  # of the names that are no job's
    "CifarResnetError": "errors", "PRESETS": "presets", "Recipe": "recipe", "Checkpoint": "checkpoint", "load_checkpoint": "checkpoint",
    "ResNet": "training.model", "build_model": "training.model", "Watcher": "jobs.watch", "Watchers": "jobs.watch",
}  # fmt: skip
__all__ = [
    "PRESETS", "Checkpoint", "CifarResnetError", "Recipe", "ResNet", "Watcher", "Watchers", "bench", "build_model",
    "compare", "demo", "evaluate", "export", "find_lr", "load_checkpoint", "misclassified", "predict", "repeat", "report",
    "samples", "track", "train", "training_labels",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, f'jobs.{name}')}", __name__), name)
