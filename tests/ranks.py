"""What the tests of several processes run in each of them: `torchrun tests/ranks.py MODE FOLDER ...`."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from cifar_resnet import Recipe
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import Share, TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import distributed, engine

sys.path.append(str(Path(__file__).parent / "training"))
from plain import Doubled, doubled

CPU = torch.device("cpu")


def random_split(count):
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count), np.arange(count))


def run_of(**changes):
    """A recipe for 40 images in steps of 15, 15 and 10, which 2 and 3 processes share unevenly; this rank's part of them."""
    fields = dict(width=4, batch_size=15, batches="fixed", epochs=1, peak_epoch=0.5, max_lr=0.05, precision="float32")
    recipe = with_statistics(Recipe.build(**fields, **changes))
    return recipe, Doubled(TensorLoader(random_split(40), recipe, CPU, Share(distributed.rank(), distributed.ranks())))


def epoch():
    """How an epoch with averaging, Muon and a last step that is sharpness-aware ends, on every rank; evaluated on 31 images."""
    recipe, loader = run_of(ema_decay=0.9, ema_every=1, sam_share=0.4, sam_radius=0.1)
    evaluated, scored, scores = random_split(31), [], engine.scores
    mine = evaluated.take(Share(distributed.rank(), distributed.ranks()).of(31))
    evaluation = Doubled(TensorLoader(mine, recipe, CPU))
    engine.scores = lambda logits, labels: scored.append(labels) or scores(logits, labels)
    state = doubled(engine.start(recipe, CPU))
    *_, last = engine.train(state, loader, lambda: evaluation.plain(7))
    engine.scores = scores
    weights, averaged = state.model.state_dict(), state.averaged.state_dict()
    return dict(weights=weights, averaged=averaged, metrics=last.metrics, labels=scored[0].tolist())


def gradient(step, **changes):
    """Of the network at its first weights, BatchNorm in evaluation mode, at a step of the epoch."""
    recipe, loader = run_of(**changes)
    state, found = doubled(engine.start(recipe, CPU)), []
    state.step = step
    for module in state.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval().train = lambda mode=True: None
    state.optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.flatten().clone() for p in state.model.parameters()))
    next(engine.train(state, loader, lambda: ()))
    return torch.cat(found)


def checks(folder):
    """The epoch, and gradients of a plain step and a sharpness-aware one, of 15 images and of 10."""
    with distributed.joined():
        gradients = [gradient(step, sam_share=share) for share in (0.0, 1.0) for step in (0, 2)]
        torch.save({"epoch": epoch(), "gradients": gradients}, Path(folder) / f"{distributed.ranks()}-{distributed.rank()}.pt")


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

    engine.train = counted
    sys.argv = ["cifar-resnet", "train", *options]
    try:
        main()
    finally:
        (Path(folder) / f"steps-{rank}").write_text(str(steps))


if __name__ == "__main__":
    {"checks": checks, "run": run}[sys.argv[1]](*sys.argv[2:])
