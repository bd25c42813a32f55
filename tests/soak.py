"""Kills a run again and again, resumes it, and compares it with the run that nobody disturbed.

    python tests/soak.py                 # 100 kills on the real CIFAR-10
    python tests/soak.py --kills 6 --dataset digits --width 4

The run has the default recipe with averaging and bfloat16, on 300 images: three epochs of three steps. It is
killed by SIGKILL at a random moment counted from its first step; two of five kills wait for the next write, which is slowed, and
fall inside it. After `--chain` kills a run is left to its end. Every time all named files must be whole, and the checkpoint must
load; at the end weights, averaged weights, optimizer and metrics, times aside, must be the undisturbed run's to the bit, and
nothing else may be in the folder. Prints kills, those inside a write, resumes and mismatches; exit code 1 if there are any.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILES = ["checkpoint.pt", "curves.png", "learning_rate.png", "metrics.csv", "metrics.json", "recipe.json"]
SLOW = 0.1  # seconds that each half of a write and each flush takes longer
STARTED, WRITING = 0, 1  # bytes that a run sets for who watches it


def child(folder, flags, dataset, width):
    """Trains in `folder`, or goes on there, with slow writes, saving at every step."""
    from cifar_resnet import Recipe, Watcher, checkpoint, files, run_dir, train

    with open(flags, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 2)
    write_whole, fsync = files.write_whole, os.fsync

    def watched(path, content):
        shared[WRITING] = 1
        write_whole(path, content)
        shared[WRITING] = 0

    class Slow:
        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)  # noqa: SIM115

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            time.sleep(SLOW)
            self.file.write(content[len(content) // 2 :])

    class First(Watcher):
        def step(self, step, state):
            shared[STARTED] = 1

    files.write_whole = checkpoint.write_whole = run_dir.write_whole = watched
    files.open = lambda path, *rest, **options: (Slow if str(path).endswith(".part") else open)(path, *rest, **options)
    os.fsync = lambda number: (time.sleep(SLOW), fsync(number))
    if (Path(folder) / "recipe.json").exists():
        target = dict(resume=folder)
    else:
        options = dict(batch_size=128, ema_decay=0.9, ema_every=2, precision="bfloat16", epochs=3)
        target = dict(
            run_dir=folder,
            recipe=Recipe.build("default", dataset=dataset, width=int(width), train_limit=300, test_limit=100, **options),
        )
    train(**target, save_every_minutes=1e-9, watcher=First())


def same(a, b):
    import torch

    if isinstance(a, dict):
        return a.keys() == b.keys() and all("second" in str(key) or same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def content(folder):
    """What a run's checkpoint holds but where it ran; every JSON file must parse."""
    from cifar_resnet import load_checkpoint

    for path in folder.glob("*.json"):
        json.loads(path.read_text("utf-8"))
    return {**load_checkpoint(folder).content, "environment": {}} if (folder / "checkpoint.pt").exists() else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--chain", type=int, default=4, help="kills of one run before it is left to its end")
    parser.add_argument("--dataset", default="cifar10", help="cifar10 or digits")
    parser.add_argument("--width", type=int, default=64, help="of the network; 4 for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    base = Path(tempfile.mkdtemp(prefix="soak-"))
    flags = base / "flags"
    flags.write_bytes(bytes(2))
    with open(flags, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 2)

    def started(folder):
        """A run, once its first step is done or it has ended."""
        shared[:] = bytes(2)
        process = subprocess.Popen([sys.executable, __file__, "child", folder, flags, given.dataset, str(given.width)])
        while not shared[STARTED] and process.poll() is None:
            time.sleep(0.002)
        return process

    began = time.monotonic()
    process, first = started(base / "whole"), time.monotonic()
    assert process.wait() == 0
    length = time.monotonic() - first
    whole = content(base / "whole")
    print(f"undisturbed: {time.monotonic() - began:.0f} s, {length:.0f} s of them from the first step", flush=True)

    killed = inside = resumes = mismatches = runs = 0
    while killed < given.kills:
        folder, of_this = base / f"run-{runs}", 0
        while True:
            process = started(folder)
            if of_this < given.chain and killed < given.kills and process.poll() is None:
                end = time.monotonic() + chance.uniform(0, length / 2)
                while time.monotonic() < end and process.poll() is None:
                    time.sleep(0.002)
                if chance.random() < 0.4:
                    while not shared[WRITING] and process.poll() is None:
                        time.sleep(0.002)
                    time.sleep(chance.uniform(0, 3 * SLOW))
                process.kill()
            code = process.wait()
            if code == -9:
                killed, of_this, inside, resumes = killed + 1, of_this + 1, inside + shared[WRITING], resumes + 1
                content(folder)
                continue
            break
        runs += 1
        right = code == 0 and sorted(os.listdir(folder)) == FILES and same(content(folder), whole)
        mismatches += not right
        print(
            f"run {runs}: {of_this} kills, {'equal' if right else f'NOT EQUAL: exit code {code}, {os.listdir(folder)}'}; "
            f"so far {killed} kills, {inside} inside a write, {resumes} resumes, {mismatches} mismatches",
            flush=True,
        )
        if right:
            shutil.rmtree(folder)
    print(f"{killed} kills, {inside} inside a write, {resumes} resumes, {runs} runs to the end, {mismatches} mismatches")
    if not mismatches:
        shutil.rmtree(base)
    sys.exit(mismatches > 0)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
