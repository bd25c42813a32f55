"""What the functions of the library give: plain Python values, and objects that print as one line."""

import numpy as np
import torch
from PIL import Image

from cifar_resnet import Recipe, compare, evaluate, find_lr, load_checkpoint, misclassified, predict
from cifar_resnet.data.datasets import load
from cifar_resnet.data.loaders import make_loader
from cifar_resnet.jobs.common import opened, spread
from cifar_resnet.training.lr_finder import History

PLAIN = {int, float, str, bool, type(None)}


def foreign(value, where=""):
    """Where in a result something else than plain values stands."""
    if isinstance(value, dict):
        every = [(f"{where}.{key}", each) for key, each in value.items()]
        return foreign(list(value), f"{where} keys") + [found for place, each in every for found in foreign(each, place)]
    if isinstance(value, list | tuple) and not isinstance(value, History):
        return [found for place, each in enumerate(value) for found in foreign(each, f"{where}[{place}]")]
    return [] if type(value) in PLAIN or isinstance(value, History) else [f"{where}: {type(value).__name__}"]


def test_something_else_is_found():
    assert foreign({"a": [1, np.float64(2)], "b": (torch.tensor(1),)}, "x") == ["x.a[1]: float64", "x.b[0]: Tensor"]
    assert foreign({np.int64(1): 2}) == [" keys[0]: int64"]


def test_results_are_plain_values(tiny_run, tmp_path, no_figures):
    checkpoint = load_checkpoint(tiny_run)
    results = {
        "evaluate": evaluate(tiny_run, tmp_path, tta="flip"),
        "misclassified": misclassified(tiny_run, tmp_path, count=1),
        "compare": compare([tiny_run]),
        "predict": list(predict(tiny_run, Image.new("L", (8, 8)))),
        "history": checkpoint.history,
        "checkpoint": [checkpoint.classes, checkpoint.evaluated_on, checkpoint.environment, checkpoint.finished, checkpoint.temperature],
        "spread": spread([90.0, 91.0, 92.0]),
    }
    assert [found for name, result in results.items() for found in foreign(result, name)] == []
    assert isinstance(results["evaluate"]["calibration_error"], float)


def test_what_a_search_finds_is_plain_but_for_its_curve():
    recipe = Recipe.build("digits", epochs=1, train_limit=64, test_limit=20, batch_size=16, width=4)
    found = find_lr(recipe, num_iter=50, trial_steps=0)
    assert foreign(found, "found") == []
    assert repr(found.history) == "History(50 learning rates from 0.0001 to 10)"
    assert "\n" not in repr(found)


def test_objects_print_as_one_line(tiny_run, tiny_recipe):
    checkpoint, device = opened(tiny_run, "cpu")
    accuracy = f"{checkpoint.history[-1]['test_accuracy']:.2f} %"
    data = load(tiny_recipe)
    loader = make_loader(data.train, checkpoint.recipe, device)
    batch = next(iter(loader.epoch(0)))
    assert repr(checkpoint) == f"Checkpoint({tiny_run / 'checkpoint.pt'}: default on digits, epoch 2 of 2, test accuracy {accuracy})"
    assert repr(data) == "Data(70 training images, 40 test images, 10 classes)"
    assert repr(data.train) == "Split(70 images of 10 classes)"
    assert repr(checkpoint.state(device)) == "State(default on digits on cpu: 2 epochs and 0 steps done)"
    assert repr(batch) == f"Batch({len(batch.labels)} images on cpu)"
    assert "\n" not in repr(loader) + repr(checkpoint.recipe)
