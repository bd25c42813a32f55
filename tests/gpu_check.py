"""Measures what a GPU gives, and checks that the captured step trains as the plain one: at most eight minutes on one NVIDIA GPU.

    python tests/gpu_check.py gpu.json                   # everything; the runs need the real CIFAR-10 in CIFAR_RESNET_DATA_DIR
    python tests/gpu_check.py gpu.json --only steps      # some of: tests equal steps runs bench
    python tests/gpu_check.py gpu.json --device cpu --tiny --only runs steps equal    # that the script itself works

Every row is written to the JSON file at once. A row that fails is kept with its traceback, and the next one follows. Parts that
the file has already stay, but for those that are asked for. `--tiny` trains a network of width 4 on the digits.

It measures the checkout that it lies in, whether or not that is installed.

A part yields the name of each row, and a function that gives the row. A row whose "code" is not 0 has failed.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cifar_resnet import Recipe
from cifar_resnet.data import cifar
from cifar_resnet.data.datasets import with_statistics
from cifar_resnet.data.loaders import TensorLoader
from cifar_resnet.data.splits import Split
from cifar_resnet.training import engine, kernels
from cifar_resnet.training.capture import CapturedEpoch, capturable
from cifar_resnet.training.runtime import environment, resolve_device, wait_for

PARTS = ("tests", "equal", "steps", "runs", "bench")
ENDS = [float("inf")]  # when all must be done, by time.monotonic()
LONGEST = 150  # seconds of one command
ROOT = Path(__file__).resolve().parent.parent


def fields(tiny, **changes):
    small = dict(width=4, batch_size=32) if tiny else {}
    return with_statistics(Recipe.build("default", epochs=2, **{**small, **changes}))


def random_split(recipe, steps):
    """Random images for that many steps an epoch, which at fixed batches has a short last one: 336 of 512."""
    count = (steps - 1) * recipe.batch_size + recipe.batch_size * 336 // 512
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 10, count), np.arange(count))


def begun(recipe, device, steps, form):
    """State, loader, and what takes an epoch: "eager" or "captured"."""
    loader, state = TensorLoader(random_split(recipe, steps), recipe, device), engine.start(recipe, device)
    state.model.train()
    if form == "eager":
        return state, loader, engine.plain_epoch
    captured = CapturedEpoch(state, loader)
    if capturable(state):
        captured.capture()
        if kernels._left_out or not kernels.triton_works(device):
            raise RuntimeError("the captured steps are without our kernels")
    return state, loader, captured


def first_steps(recipe, device, form, from_step=0):
    """An epoch of ten steps, of two sizes: their losses, and what the run then holds: weights, the average's too, slots, totals.

    After `from_step` plain steps another loop goes on.
    """
    state, loader, run_epoch = begun(recipe, device, 10, "eager" if from_step else form)
    losses = []
    for loss in run_epoch(state, loader):
        losses.append(float(loss))
        state.step += 1
        if state.step == from_step:
            break
    if from_step:
        run_epoch = engine.plain_epoch if form == "eager" else CapturedEpoch(state, loader)
        if form != "eager" and capturable(state):
            run_epoch.capture()
        losses += [float(loss) for loss in run_epoch(state, loader)]
    return losses, [tensor.double().cpu() for tensor in state.tensors()]


def apart(one, other):
    """Two such results: the largest relative difference of the first four losses, of all, and of all other numbers, by their norms."""
    (losses, tensors), (other_losses, other_tensors) = one, other
    of_losses = np.abs(np.array(losses) / np.array(other_losses) - 1)
    norms = [((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(tensors, other_tensors, strict=True)]
    return float(of_losses[:4].max()), float(of_losses.max()), float(np.max(norms))


def equal(device, tiny):
    """Captured against plain: differences of ten losses and of what the run then holds; and those of two plain ones, as a measure.

    Captured steps have our kernels, and plain ones torch's: a difference is of the graph or of these. The first four losses judge:
    after ten steps two ways of rounding are as far apart as two seeds, so that the weights need only be finite then.
    """
    for precision in ("float32", "bfloat16"):
        for name, changes, from_step in (
            ("plain", dict(sam_share=0.0), 0),
            ("sharpness-aware", dict(sam_share=1.0), 0),
            ("resumed after step 4", dict(sam_share=0.0), 4),
            ("averaged", dict(sam_share=0.0, ema_decay=0.9, ema_every=3), 0),
            ("sgd", dict(sam_share=0.0, optimizer="sgd"), 0),
            ("fixed batches", dict(sam_share=0.0, batches="fixed"), 0),
            ("adam", dict(sam_share=0.0, optimizer="adam", max_lr=0.001), 0),
        ):
            recipe = fields(tiny, precision=precision, width=4 if tiny else 16, **changes)
            if precision == "float32" or name in ("plain", "sharpness-aware", "averaged"):
                yield f"{precision}, {name}", partial(_compared, recipe, device, from_step)


def _compared(recipe, device, from_step):
    plain, again, captured = (first_steps(recipe, device, form, from_step) for form in ("eager", "eager", "captured"))
    measure, found = apart(again, plain), apart(captured, plain)
    limits = 1e-3 if recipe.precision == "float32" else 0.02, 0.05, 10.0
    alike = all(mine <= max(limit, 5 * its) for limit, mine, its in zip(limits, found, measure, strict=True))  # also false for NaN
    return dict(plain=plain[0], again=measure, captured=found, code=0 if alike else 1)


def busy_share(profiler):
    """The share of the time between the first kernel's start and the last one's end in which the GPU works; kernels by time."""
    spans, by_kernel = [], {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith("ProfilerStep"):
            spans.append((event.time_range.start, event.time_range.end))
            short = re.sub(r"<.*", "", event.name.removeprefix("void "))[:160]
            calls, total = by_kernel.get(short, (0, 0.0))
            by_kernel[short] = calls + 1, total + event.time_range.end - event.time_range.start
    if not spans:
        return None, {}
    busy, last = 0.0, min(start for start, _ in spans)
    for start, end in sorted(spans):
        busy, last = busy + max(0.0, end - max(start, last)), max(last, end)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    ordered = sorted(by_kernel.items(), key=lambda item: -item[1][1])[:40]
    return busy / whole, {name: [calls, round(total / 1000, 3)] for name, (calls, total) in ordered}


def steps(device, tiny):
    """Milliseconds a step, and the GPU's busy share, by kind of step and form."""
    for form in ("eager", "captured"):
        for name, changes in (
            ("plain", dict(sam_share=0.0, batches="fixed")),
            ("sharpness-aware", dict(sam_share=1.0, batches="fixed")),
            ("plain, even batches", dict(sam_share=0.0)),
        ):
            yield f"{name}, {form}", partial(_timed, device, tiny, form, changes)


def _timed(device, tiny, form, changes):
    """The first step of each time is left out, as an epoch is drawn before it."""
    count, cuda = 5 if tiny else 60, device.type == "cuda"
    gc.collect()  # the memory of the row before
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    recipe = fields(tiny, precision="bfloat16" if cuda else "float32", **changes)
    began = time.perf_counter()
    state, loader, run_epoch = begun(recipe, device, count + 2, form)
    wait_for(device)
    ready, times = time.perf_counter() - began, []
    for _ in range(1 if tiny else 3):
        going = run_epoch(state, loader)
        next(going)
        wait_for(device)
        began = time.perf_counter()
        for _, _ in zip(range(count), going, strict=False):
            pass
        wait_for(device)
        times.append((time.perf_counter() - began) / count * 1000)
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _, _ in zip(range(min(count, 20)), run_epoch(state, loader), strict=False):
            pass
        wait_for(device)
    busy, kernels = busy_share(profiler)
    memory = torch.cuda.max_memory_reserved() if cuda else None
    return dict(milliseconds=times, busy=busy, ready_seconds=ready, memory=memory, kernels_of_20_steps=kernels)


IMPORTS = "import cifar_resnet.cli, cifar_resnet.jobs.repeat, cifar_resnet.jobs.train, cifar_resnet.look.figures"


def command(arguments, environment=None):
    """Runs Python in a process of its own; gives its seconds, its exit code, None where the time was up, and what it printed."""
    began, path = time.perf_counter(), os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    limit = max(1, min(LONGEST, ENDS[0] - time.monotonic()))
    how = dict(capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **(environment or {})}, timeout=limit)
    try:
        done = subprocess.run([sys.executable, *map(str, arguments)], **how)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        code, output = None, b"".join(each or b"" for each in (late.stdout, late.stderr)).decode(errors="replace")
    if "Triton kernel fails" in output or "Triton does not work" in output:
        code = code or 1  # it went on without our kernels
    return dict(seconds=time.perf_counter() - began, code=code, output=output[-1500:])


def runs(device, tiny):
    """`train` of both recipes: once without compiled kernels, once with these, and five seeds; whole seconds and results."""
    if not tiny:
        cifar.check_at_hand("cifar10", None)  # else each command would try to download the images
    small = ["--dataset", "digits", "--train-limit", 200, "--width", 4, "--batch-size", 64] if tiny else []
    for recipe in ("default", "sprint"):
        with tempfile.TemporaryDirectory() as folder:
            cache = dict(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TRITON_CACHE_DIR=f"{folder}/triton")
            cache |= dict(PYTHONPYCACHEPREFIX=f"{folder}/bytecode", PYTHONDONTWRITEBYTECODE="")
            # As pip leaves its packages, which some machines do not keep.
            yield f"{recipe}, compiling Python's code", partial(command, ["-c", IMPORTS], cache)
            common = ["-m", "cifar_resnet", "train", "--recipe", recipe, "--device", device, *small]
            for name in ("cold", "warm"):
                yield f"{recipe}, {name}", partial(_trained, [*common, "--run-dir", f"{folder}/run-{name}"], cache, device)
            seeds = [*common, "--repeat", 2 if tiny else 5, "--run-dir", f"{folder}/five"]
            yield f"{recipe}, seeds", partial(_trained, seeds, cache, device)


def _trained(arguments, cache, device):
    """A run or a repetition. It has failed, too, where its steps were not captured on a GPU."""
    row, folder = command(arguments, cache), Path(arguments[-1])
    if row["code"] == 0:
        every = [json.loads(path.read_text("utf-8")) for path in sorted([*folder.glob("metrics.json"), *folder.glob("s*/metrics.json")])]
        row["training_seconds"] = [each["final"]["seconds"] for each in every]
        row["accuracies"] = [each["final"]["test_accuracy"] for each in every]
        row |= dict(startup=[each["environment"]["startup_seconds"] for each in every], environment=every[0]["environment"])
        if (folder / "repeat.json").exists():
            repeat = json.loads((folder / "repeat.json").read_text("utf-8"))
            row |= {key: repeat[key] for key in ("count", "mean", "std", "interval")}
        if device.type == "cuda" and not all(each["environment"]["captured"] for each in every):
            row["code"] = 1
    return row


def tests(device, tiny):
    """The tests that need CUDA."""
    yield "pytest", partial(_tested, device)


def _tested(device):
    row = command(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda", "-n", "0", ROOT / "tests"])
    if device.type == "cuda" and row["code"] == 0 and "there is no CUDA device here" in row["output"]:
        row["code"] = 1  # the tests saw no GPU
    return row


BENCH = """
import json, sys
from cifar_resnet import Recipe, bench
recipe = Recipe(**json.loads(sys.argv[2]))
found = bench(recipe, rounds=6, seconds=0.5, profile=True, device=sys.argv[3], progress=False)
json.dump(found, open(sys.argv[1], "w"))
"""


def bench(device, tiny):
    yield "bench", partial(_benched, device, dict(width=4, batch_size=32) if tiny else {})


def _benched(device, recipe):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "bench.json")
        row = command(["-c", BENCH, file, json.dumps(recipe), device])
        return row | (json.loads(file.read_text("utf-8")) if file.exists() else {})


def attempted(row_of):
    """The row, or the traceback of what failed."""
    try:
        return row_of()
    except Exception:
        print(traceback.format_exc(), flush=True)
        return dict(code=1, failed=traceback.format_exc())


def shown(row):
    """A row without what is long."""
    return json.dumps({key: value for key, value in row.items() if len(json.dumps(value)) < 200}, default=str)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=460, help="after these nothing more begins (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    ENDS[0] = time.monotonic() + options.seconds
    device = resolve_device(options.device)
    driver = ""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    where = {"environment": environment(device), "driver": driver, "python": platform.python_version()}
    content, failed = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}, False
    print(driver, flush=True)
    for part in (each for each in PARTS if each in options.only):
        began, rows = time.perf_counter(), {}
        content[part] = {**where, "rows": rows}
        try:
            for name, row_of in globals()[part](device, options.tiny):
                if time.monotonic() > ENDS[0]:
                    sys.exit("the time is up")
                rows[name] = row = attempted(row_of)
                failed |= row.get("code", 0) != 0
                options.output.write_text(json.dumps(content, indent=1) + "\n")
                print(f"{part}, {name}: {shown(row)}", flush=True)
        except Exception:
            content[part]["failed"], failed = traceback.format_exc(), True
            print(content[part]["failed"], flush=True)
        content[part]["seconds"] = time.perf_counter() - began
        options.output.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{part}: {content[part]['seconds']:.1f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
