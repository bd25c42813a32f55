"""Shows whether a change of the code changes what training gives: run it before the change, and after.

    python tests/golden.py golden.json

The first call writes the file: for each of a few small trainings the SHA-256 of its final weights and of its metrics, clocks
left out. A later call trains again, and names what came out otherwise; the exit code is then 1. Hashes hold on one machine,
with one version of torch and one number of threads, so the file is no part of the repository.
"""

import hashlib
import json
import signal
import sys
import tempfile
from pathlib import Path

import torch

import cifar_resnet
from cifar_resnet import Recipe

COMMON = dict(dataset="digits", epochs=2, train_limit=100, test_limit=40, batch_size=32, batches="fixed", precision="float32")
MUON = dict(recipe="default", **COMMON, sam_share=0.0)
CASES = {  # name: (recipe fields, options of train, step after which it is stopped and resumed)
    "muon, clipped": (dict(MUON, grad_clip=0.01), {}, None),
    "muon, SAM": (dict(MUON, sam_share=0.5, peak_epoch=0.5), {}, None),
    "muon, SAM, stopped": (dict(MUON, sam_share=0.6), {}, 3),
    "whitening start": (dict(MUON, init="whiten"), {}, None),
    "sgd, averaged": (dict(COMMON, recipe="digits", ema_decay=0.9, ema_every=2), {}, None),
    "sgd with cycled momentum, clipped, averaged, stopped": (
        dict(COMMON, recipe="eva6-s9", mean=(0.3,) * 3, std=(0.3,) * 3, max_lr=0.1, ema_decay=0.8, ema_every=1, holdout=40), {}, 5,
    ),
    "adam, softmax, albumentations": (
        dict(COMMON, recipe="eva8-s8", mean=(0.3,) * 3, std=(0.3,) * 3, max_lr=0.001), dict(loader="albumentations", workers=1), None,
    ),
    "adamw, log-softmax, holdout": (
        dict(COMMON, recipe="eva4-s11", optimizer="adamw", max_lr=0.001, holdout=40, mean=(0.3,) * 3, std=(0.3,) * 3), {}, None,
    ),
    "bfloat16": (dict(MUON, train_limit=40, test_limit=10, batch_size=16, epochs=1, peak_epoch=0.3, precision="bfloat16"), {}, None),
    "page, albumentations, stopped": (dict(COMMON, recipe="page"), dict(loader="albumentations", workers=0), 2),
}  # fmt: skip


class Stopped(cifar_resnet.Watcher):
    """Sends SIGINT after a number of steps."""

    def __init__(self, after):
        self.after = after

    def step(self, step, state):
        self.after -= 1
        if self.after == 0:
            signal.raise_signal(signal.SIGINT)


def digest(value):
    """SHA-256 of tensors and plain values, in order."""
    found = hashlib.sha256()

    def add(each):
        if torch.is_tensor(each):
            found.update(each.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if each.dim() else repr(each.item()).encode())
        elif isinstance(each, dict):
            for key, inner in each.items():
                found.update(str(key).encode())
                add(inner)
        elif isinstance(each, list | tuple):
            for inner in each:
                add(inner)
        else:
            found.update(repr(each).encode())

    add(value)
    return found.hexdigest()[:16]


def trained(fields, options, stop_after, folder):
    """Hashes of the weights that are evaluated, of all weights, and of the metrics of a run."""
    recipe = Recipe.build(fields["recipe"], **{name: value for name, value in fields.items() if name != "recipe"})
    if stop_after is not None:
        try:
            cifar_resnet.train(recipe, folder, watcher=Stopped(stop_after), device="cpu", **options)
            raise SystemExit(f"the run was not stopped: {fields}")
        except cifar_resnet.CifarResnetError as stopped:
            if "SIGINT" not in str(stopped):
                raise
            checkpoint = cifar_resnet.train(resume=folder, device="cpu", **options)
    else:
        checkpoint = cifar_resnet.train(recipe, folder, device="cpu", **options)
    clocks = ("seconds", "images_per_second")
    history = [{key: value for key, value in row.items() if key not in clocks} for row in checkpoint.history]
    weights = [checkpoint.content["model"], checkpoint.content["averaged"] or ()]
    return {"weights": digest(weights), "metrics": digest(history)}


def range_test():
    recipe = Recipe.build("default", **{**COMMON, "batch_size": 16})
    found = cifar_resnet.find_lr(recipe, device="cpu", num_iter=24, trial_steps=0, start_lr=1e-4, end_lr=1.0)
    return {"history": digest([found.history.lr.tolist(), found.history.loss.tolist()])}


def main(path):
    torch.set_num_threads(2)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, case) in enumerate(CASES.items()):
            found[name] = trained(*case, Path(folder) / str(number))
            print(f"{name}: {found[name]}", flush=True)
    found["range test"] = range_test()
    print(f"range test: {found['range test']}", flush=True)
    if not path.exists():
        path.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    before = json.loads(path.read_text("utf-8"))
    other = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print(f"other than in {path}: {', '.join(other)}" if other else f"all as in {path}")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
