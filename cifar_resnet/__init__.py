"""One small ResNet through CIFAR-10: find the learning rate, train, evaluate, see what it gets wrong and why."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
