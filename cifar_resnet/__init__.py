"""One small ResNet through CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and why.

Importing the package imports nothing heavy; torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from .jobs.train import Watcher, Watchers, train
    from .jobs.training_labels import training_labels
    from .presets import PRESETS
    from .recipe import Recipe
    from .run_dir import Checkpoint, load_checkpoint
    from .training.model import ResNet, build_model

__version__ = "0.2.0"

_HOME = {
    "errors": ("CifarResnetError",),
    "jobs.bench": ("bench",),
    "jobs.compare": ("compare",),
    "jobs.demo": ("demo",),
    "jobs.evaluate": ("evaluate",),
    "jobs.export": ("export",),
    "jobs.find_lr": ("find_lr",),
    "jobs.misclassified": ("misclassified",),
    "jobs.predict": ("predict",),
    "jobs.repeat": ("repeat",),
    "jobs.report": ("report",),
    "jobs.samples": ("samples",),
    "jobs.track": ("track",),
    "jobs.train": ("Watcher", "Watchers", "train"),
    "jobs.training_labels": ("training_labels",),
    "recipe": ("Recipe",),
    "presets": ("PRESETS",),
    "run_dir": ("Checkpoint", "load_checkpoint"),
    "training.model": ("ResNet", "build_model"),
}
__all__ = [
    "PRESETS", "Checkpoint", "CifarResnetError", "Recipe", "ResNet", "Watcher", "Watchers", "bench", "build_model",
    "compare", "demo", "evaluate", "export", "find_lr", "load_checkpoint", "misclassified", "predict", "repeat", "report",
    "samples", "track", "train", "training_labels",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
