from types import SimpleNamespace

import pytest
import torch

from cifar_resnet.recipe import Recipe
from cifar_resnet.training import autotune, convolution, ways
from cifar_resnet.training.autotune import Timing
from cifar_resnet.training.model import SEEDING, build_model


@pytest.fixture
def quick(monkeypatch):
    """Every layer of a narrow network is worth a choice, and a few images are enough to time."""
    monkeypatch.setattr(autotune, "MIN_FLOP", 0)
    monkeypatch.setattr(autotune, "MIN_POSITIONS", 16)
    monkeypatch.setattr(autotune, "CALL_SECONDS", 1e-9)


def test_the_layers_of_the_default_network_that_are_worth_a_choice():
    found = [(*layer.weight.shape[:2], *shape) for layer, shape in autotune.layers(build_model(Recipe()).train(), 512)]
    assert found == [  # outputs, inputs, N, C, H, W
        (128, 64, 512, 64, 32, 32), (128, 128, 512, 128, 16, 16), (256, 128, 512, 128, 16, 16),
        (512, 256, 512, 256, 8, 8), (512, 512, 512, 512, 4, 4),
    ]  # fmt: skip
    assert autotune.layers(build_model(Recipe(width=4)), 64) == []


def test_measuring_leaves_the_model_and_the_random_state_as_they_were(quick):
    model = build_model(Recipe(width=4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    autotune.measure(model, 8, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_nobody_draws_from_torchs_random_numbers_while_it_measures(quick, monkeypatch):
    locked, measure = [], autotune._measure_layer
    monkeypatch.setattr(autotune, "_measure_layer", lambda *given: locked.append(SEEDING.locked()) or measure(*given))
    autotune.measure(build_model(Recipe(width=4)).train(), 8, torch.float32)
    assert locked
    assert all(locked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_that_suits_a_layer_is_timed_in_every_direction(dtype, quick):
    timings = autotune.measure(build_model(Recipe(width=4)), 8, dtype)
    name = str(dtype).removeprefix("torch.")
    layers = [f"{name} {which}" for which in ("3>4 32x32", "4>8 32x32", "8>8 16x16", "8>16 16x16", "16>32 8x8", "32>32 4x4")]
    directions = ["forward", "input_gradient", "weight_gradient"]
    assert [(each.layer, each.direction) for each in timings] == [(layer, way) for layer in layers for way in directions]
    for each in timings:
        table = convolution.WEIGHT_GRADIENTS if each.direction == "weight_gradient" else convolution.CONVOLUTIONS
        assert list(each.seconds) == [way for way in table if convolution.possible(way, dtype, torch.Size([8, 4, 32, 32]))]
        assert min(each.seconds.values()) > 0
        assert each.chosen in each.seconds
    assert timings[3].flop == 2 * 8 * 32 * 32 * 8 * 4 * 9  # images, pixels, outputs, inputs, places of the kernel


def test_what_is_chosen_can_be_used_and_a_slow_way_is_not_chosen(quick, monkeypatch):
    """By a clock that the ways move: a call of Winograd takes a second, one of the others fifty."""
    clock = [0.0]

    def taking(seconds, way):
        def call(*given):
            clock[0] += seconds
            return way(*given)

        return call

    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for table in (convolution.CONVOLUTIONS, convolution.WEIGHT_GRADIENTS):
        for name, way in table.items():
            monkeypatch.setitem(table, name, taking(1 if name.startswith("winograd") else 50, way))
    monkeypatch.setattr(convolution, "_torch_gradients", taking(50, convolution._torch_gradients))
    model = build_model(Recipe(width=4))
    choice = autotune.choice(autotune.measure(model, 8, torch.float32))
    assert {tuple(ways) for ways in choice.values()} == {convolution.WINOGRAD}
    assert len(choice) == 6
    ways.use(model, choice)
    assert ways.used(model) == choice


@pytest.mark.parametrize(
    ("other", "calls", "seconds"),
    [
        ([1.9, 0.9, 0.9, 0.9], 4, 0.9),  # the first call prepares: it does not count
        ([1.9, 0.5], 2, 0.5),  # the other one is too slow to go on
        ([2.6], 1, 2.6),  # hopeless at first
        ([1.9, 1.6], 2, 1.6),  # slow in its second call, too
        ([0.9, 1.4, 1.0, 1.1], 4, 1.0),  # the quickest of three
        ([140, 90], 2, 90),  # what prepares is little beside a long call
        ([160], 1, 160),
    ],
)
def test_a_way_is_called_again_while_it_may_be_the_quickest(monkeypatch, other, calls, seconds):
    """Milliseconds. The calls of torch's own way take 1, or 100 where those of the other one are long."""
    usual, other, seconds = (100 if other[0] > 99 else 1) / 1000, [each / 1000 for each in other], seconds / 1000
    clock, left = [0.0], {"torch": iter([usual] * 4), "other": iter(other)}

    def call(way):
        clock[0] += next(left[way])

    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    found = autotune._seconds(["torch", "other"], call)
    assert found == pytest.approx({"torch": usual, "other": seconds})
    assert len(other) - len(list(left["other"])) == calls


def test_ties_go_to_the_way_that_is_named_first():
    assert autotune.fastest({"torch": 1.04, "rows": 1.0, "winograd": 1.01}) == "torch"
    assert autotune.fastest({"torch": 1.06, "rows": 1.04, "winograd": 1.0}) == "rows"
    assert autotune.fastest({"torch": 2.0, "rows": 3.0, "winograd": 1.0}) == "winograd"


def test_layers_for_which_all_is_torchs_need_no_entry():
    def timing(layer, direction, chosen):
        return Timing(layer, direction, {chosen: 1.0}, 1.0, chosen)

    timings = [timing("a", way, "torch") for way in ("forward", "input_gradient", "weight_gradient")]
    timings += [timing("b", "forward", "torch"), timing("b", "input_gradient", "torch"), timing("b", "weight_gradient", "side by side")]
    assert autotune.choice(timings) == {"b": ["torch", "torch", "side by side"]}
