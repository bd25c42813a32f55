import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from cifar_resnet import Recipe, build_model
from cifar_resnet.data import datasets
from cifar_resnet.data.loaders import make_loader
from cifar_resnet.data.splits import Data
from cifar_resnet.look import analysis
from cifar_resnet.training import calibration

CPU = torch.device("cpu")


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 6, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator).flatten()
    found = calibration.fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.03)
    grid = np.linspace(0.9, 1.1, 21) * found
    losses = [torch.nn.functional.cross_entropy(logits.double() / each, labels).item() for each in grid]
    assert grid[np.argmin(losses)] == pytest.approx(found, rel=0.011)
    believed = analysis.probabilities(logits, found)
    assert torch.equal(believed.argmax(1), logits.argmax(1))
    assert analysis.calibration_error(analysis.reliability(logits, labels, found)) < 1.5


def test_the_temperature_is_that_of_scipys_search():
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 10, (500,), generator=generator)
        logits = torch.randn(500, 10, generator=generator) * (0.5 + seed) + 2 * seed * torch.nn.functional.one_hot(labels, 10)

        def loss(log_temperature, logits=logits, labels=labels):
            scaled = logits.double() / np.exp(log_temperature)
            return torch.nn.functional.cross_entropy(scaled, labels, label_smoothing=1 / 501).item()

        expected = np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded", options={"xatol": 1e-8}).x)
        assert calibration.fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-4)


def test_images_that_are_all_right_do_not_ask_for_the_temperature_0():
    """Of 99 the hundredth may be wrong: confidence is about 99 %."""
    labels = torch.arange(99) % 3
    logits = torch.nn.functional.one_hot(labels, 3).float()
    found = calibration.fit_temperature(logits, labels)
    assert analysis.probabilities(logits, found).max(1).values.mean().item() == pytest.approx(0.99, abs=0.005)


def digits(**fields):
    recipe = datasets.with_statistics(Recipe.build("default", dataset="digits", width=4, batch_size=32, train_limit=200, **fields))
    return recipe, datasets.load(recipe)


def test_without_a_holdout_the_images_judged_by_are_not_looked_at():
    recipe, data = digits()
    model = build_model(recipe)
    others = Data(data.train, data.train.take(slice(5)), data.classes, "test")
    found = [calibration.find_temperature(recipe, model, each, CPU, accuracy=50.0) for each in (data, others)]
    assert found[0] == found[1] == pytest.approx(calibration.fit_temperature(*mixed(recipe, model, data)), rel=1e-3)


def test_training_images_that_are_too_easy_give_no_temperature():
    """A network that is right about 8 % or so of them, said to be right about none of the others, and about nearly as many."""
    recipe, data = digits()
    model = build_model(recipe)
    logits, labels = mixed(recipe, model, data)
    hits = 100 * (logits.argmax(1) == labels).double().mean().item()
    assert hits > 6
    assert calibration.find_temperature(recipe, model, data, CPU, accuracy=hits - 5.1) is None
    assert calibration.find_temperature(recipe, model, data, CPU, accuracy=hits - 4.9) is not None


def mixed(recipe, model, data):
    """Logits and labels of the training images in a shuffled order, each with a quarter of the one before."""
    order = np.random.default_rng(calibration.SEED).permutation(200)
    (batch,) = make_loader(data.train.take(order), recipe, CPU).plain(200)
    images = torch.stack([0.75 * batch.images[i] + 0.25 * batch.images[i - 1] for i in range(200)])
    with torch.no_grad():
        return model.eval().logits(images), batch.labels


def test_with_a_holdout_it_alone_is_looked_at():
    recipe, data = digits(holdout=100)
    model = build_model(recipe)
    (batch,) = make_loader(data.evaluation, recipe, CPU).plain(100)
    with torch.no_grad():
        expected = calibration.fit_temperature(model.eval().logits(batch.images), batch.labels)
    assert calibration.find_temperature(recipe, model, data, CPU, accuracy=0.0) == pytest.approx(expected, rel=1e-3)
