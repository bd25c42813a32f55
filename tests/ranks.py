"""What the tests of several processes run in each of them: `torchrun tests/ranks.py MODE FOLDER ...`."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from cifar_resnet import Recipe, distributed, engine, experiment, winograd
from cifar_resnet.batches import TensorBatches, make_batches
from cifar_resnet.data import Split, with_statistics

CPU = torch.device("cpu")


def random_split(count):
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count), np.arange(count))


def gradient(recipe, batches, step):
    """Of the network at its first weights, BatchNorm in evaluation mode, at a step of the first epoch."""
    state = engine.start(recipe, CPU)
    state.step, found = step, []
    for module in state.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None

    def keep(*_):
        if not found:  # Muon's step has SGD's inside, which may call the hook again
            found.extend(each.grad.clone() for each in state.model.parameters())

    state.optimizer.register_step_pre_hook(keep)
    next(engine.train(recipe, state, batches, lambda: (), CPU))
    return torch.cat([each.flatten() for each in found])


def gradients(batch_size, last):
    """Of a plain step and of a sharpness-aware one, at a whole batch and at the epoch's last one."""
    recipes = [with_statistics(Recipe(precision="float32", batch_size=batch_size, sam_share=share)) for share in (0, 1)]
    batches = TensorBatches(random_split(batch_size + last), recipes[0], CPU)
    return [gradient(recipe, batches, step) for recipe in recipes for step in (0, 1)]


def shown(loader, **changes):
    """This rank's images and labels of every step of two epochs of 37 images at batch 16."""
    recipe = with_statistics(Recipe.build(batch_size=16, **changes))
    batches = make_batches(random_split(37), recipe, CPU, loader, 1 if loader == "albumentations" else None)
    return [batch for epoch in (0, 1) for batch in batches.epoch(epoch)]


def epoch():
    """One epoch of 40 images at batch 16 with averaging and Muon, evaluated on 31: how it ends, and what it counted."""
    recipe = with_statistics(
        Recipe.build(
            batch_size=16,
            epochs=1,
            peak_epoch=0.5,
            ema_decay=0.9,
            ema_every=2,
            sam_share=0.7,
            optimizer="muon",
            precision="float32",
        )
    )
    scores, scored = engine.scores, []
    engine.scores = lambda logits, labels: scored.append(labels) or scores(logits, labels)
    evaluated = random_split(31)
    mine = TensorBatches(evaluated.take(distributed.share(31)), recipe, CPU)
    state = engine.start(recipe, CPU)
    *_, last = engine.train(recipe, state, TensorBatches(random_split(40), recipe, CPU), lambda: mine.plain(7), CPU)
    counted = torch.equal(scored[0], torch.from_numpy(evaluated.labels))
    return dict(weights=state.model.state_dict(), averaged=state.averaged.state_dict(), metrics=last.metrics, counted=counted)


def checks(folder, *sizes):
    winograd.MIN_TILES = 10**9  # a share and the whole batch convolve the same way, and differ by the order of their sums alone
    with distributed.joined():
        found = {"epoch": epoch(), "gradients": gradients(*map(int, sizes))}
        for loader in ("tensor", "albumentations"):
            found[loader] = shown(loader) + shown(loader, flip_order="random", cutout_probability=0.5)
        torch.save(found, Path(folder) / f"{distributed.ranks()}-{distributed.rank()}.pt")


def run(folder, *options):
    """The command line; rank 1 gets a SIGTERM after its third step. Each rank leaves the number of its steps."""
    from cifar_resnet.cli import main

    train, rank, steps = engine.train, os.environ["RANK"], 0

    def counted(*arguments):
        nonlocal steps
        for record in train(*arguments):
            steps += isinstance(record, engine.Step)
            if (rank, steps) == ("1", 3):
                os.kill(os.getpid(), signal.SIGTERM)
            yield record

    experiment.engine.train = counted
    sys.argv = ["cifar-resnet", "train", *options]
    try:
        main()
    finally:
        (Path(folder) / f"steps-{rank}").write_text(str(steps))


if __name__ == "__main__":
    {"checks": checks, "run": run}[sys.argv[1]](*sys.argv[2:])
