import pytest
import torch

from cifar_resnet import PRESETS, Recipe
from cifar_resnet.engine import rates
from cifar_resnet.schedule import triangular


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"epochs": 7, "peak_epoch": 2.3}])
def test_every_step_is_that_of_torchs_one_cycle(name, changes):
    recipe = Recipe.build(name, **changes)
    total = recipe.epochs * 98
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.5)
    cycled = recipe.base_momentum is not None
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe.max_lr,
        total_steps=total,
        pct_start=recipe.peak_epoch / recipe.epochs,
        anneal_strategy="linear",
        cycle_momentum=cycled,
        base_momentum=recipe.base_momentum or 0.85,
        max_momentum=recipe.momentum,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
    )
    for step in range(total):
        lr, momentum = rates(recipe, step, total)
        group = optimizer.param_groups[0]
        assert lr == pytest.approx(group["lr"], abs=1e-9)
        assert momentum == pytest.approx(group["momentum"] if cycled else recipe.momentum, abs=1e-9)
        assert lr > 0
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def test_the_default_peaks_at_epoch_5_and_ends_small():
    recipe = Recipe()
    lrs = [rates(recipe, step, 24 * 98)[0] for step in range(24 * 98)]
    assert lrs.index(max(lrs)) + 1 == 5 * 98
    assert max(lrs) == recipe.max_lr
    assert 0 < lrs[-1] < recipe.max_lr / 1000


@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_run_of_few_steps_has_a_rate_for_each(total):
    recipe = Recipe.build(epochs=1)
    lrs = [rates(recipe, step, total)[0] for step in range(total)]
    assert all(0 < lr <= recipe.max_lr for lr in lrs)
    assert lrs[-1] == pytest.approx(recipe.max_lr / recipe.div_factor / recipe.final_div_factor)


def test_triangular_is_torchs_cyclic_lr():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.4, step_size_up=7, cycle_momentum=False)
    for step in range(50):
        assert triangular(step, 7, 0.01, 0.4) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
