"""The package as it is installed: what it imports and declares, and what it asks of an operating system."""

import ast
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from run_helpers import content, equal_weights

import cifar_resnet
from cifar_resnet import evaluate, train
from cifar_resnet.data import loaders
from cifar_resnet.errors import RunDirectoryError
from cifar_resnet.files import write_whole
from cifar_resnet.jobs import bench

ROOT, PACKAGE = Path(__file__).parent.parent, Path(cifar_resnet.__file__).parent
MODULES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
PROJECT, TOOLS = (tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[part] for part in ("project", "tool"))
MAY_BE_MISSING = {"IPython", "cv2", "pillow_heif", "triton"}  # the package does without

# What Python's documentation marks as not available on Windows, as far as a program like this one may come to use it.
POSIX_MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline", "curses"}
POSIX_NAMES = {
    "os": {
        "O_DIRECTORY", "O_NOFOLLOW", "WNOHANG", "chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid",
        "getgid", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "mkfifo", "nice", "openpty",
        "sched_getaffinity", "sched_setaffinity", "setgid", "setpgid", "setpriority", "setsid", "setuid", "statvfs", "sysconf",
        "tcgetpgrp", "tcsetpgrp", "ttyname", "uname", "wait", "wait3", "wait4", "waitid",
    },
    "signal": {
        "SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGIO", "SIGKILL", "SIGPIPE", "SIGPROF", "SIGPWR", "SIGQUIT",
        "SIGSTOP", "SIGSYS", "SIGTRAP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGWINCH",
        "SIGXCPU", "SIGXFSZ", "alarm", "getitimer", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt",
        "sigpending", "sigtimedwait", "sigwait", "sigwaitinfo",
    },
}  # fmt: skip
USED = {"data/loaders.py": {"os.nice", "signal.alarm"}, "jobs/bench.py": {"resource"}}  # each behind a look at sys.platform
# Modules that are imported in functions alone, or by an exported space, whose files lie in one folder.
WITH_EXTRA = {"look/page.py": {"gradio"}, "look/space_app.py": {"safetensors", "page"}}


def imported(tree, inside=True):
    """The top-level names of what a module imports absolutely; with `inside`, in its functions too."""
    nodes = ast.walk(tree) if inside else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def distributions(names):
    """Those that have modules of these names, spelled as pyproject.toml spells them; none of Python's own."""
    others = set(names) - set(sys.stdlib_module_names) - {"cifar_resnet"} - MAY_BE_MISSING
    return {{"PIL": "pillow", "sklearn": "scikit-learn"}.get(name, name.replace("_", "-")) for name in others}


def declared(requirements):
    return {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in requirements}


def extras():
    return {name for extra in PROJECT["optional-dependencies"].values() for name in declared(extra)}


def test_what_is_imported_is_declared():
    """At the top of a module, by every installation; in a function, at least by an extra."""
    for path, tree in MODULES.items():
        always = declared(PROJECT["dependencies"]) | WITH_EXTRA.get(path, set())
        assert distributions(imported(tree, inside=False)) <= always, path
        assert distributions(imported(tree)) <= always | extras(), path


def test_what_is_declared_is_imported():
    used = set().union(*(distributions(imported(tree)) for tree in MODULES.values()))
    assert declared(PROJECT["dependencies"]) <= used


def test_every_dependency_has_a_lowest_version():
    assert [each for each in PROJECT["dependencies"] if not re.fullmatch(r"[\w-]+>=[\d.]+", each)] == []


def test_what_is_no_module_is_installed_too():
    patterns = TOOLS["setuptools"]["package-data"]["*"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert len(files) > 1
    assert [path.name for path in files if not any(path.match(pattern) for pattern in patterns)] == []


def posix_only(tree):
    """What of POSIX_MODULES and POSIX_NAMES a module names."""
    names = {f"{node.value.id}.{node.attr}" for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)}  # fmt: skip
    known = {f"{module}.{name}" for module, names in POSIX_NAMES.items() for name in names}
    return set(imported(tree)) & POSIX_MODULES | names & known


def test_what_only_posix_has_is_named_here():
    assert {path: names for path, tree in MODULES.items() if (names := posix_only(tree))} == USED
    for path, names in USED.items():
        functions = [node for node in ast.walk(MODULES[path]) if isinstance(node, ast.FunctionDef) and posix_only(node)]
        assert functions
        assert all("sys.platform" in ast.unparse(function) for function in functions), names


def test_text_is_read_and_written_in_a_named_encoding():
    """Windows would take the encoding of its language."""
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            whole = ast.unparse(node)
            if name in ("read_text", "write_text") or (isinstance(node.func, ast.Name) and name == "open"):
                assert "encoding=" in whole or re.search(r"'[rwax]b'", whole), f"{path}: {whole}"


def test_it_trains_where_what_only_posix_has_is_missing(tmp_path, tiny_recipe, tiny_run, monkeypatch, no_figures):
    """And where a folder cannot be opened, as on Windows; the libraries are those of this system."""
    expected = evaluate(tiny_run, run_dir=tmp_path)["confusion_matrix"]
    opened, handlers = os.open, []

    def open_file(path, *rest, **named):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **named)

    with monkeypatch.context() as here:
        for module, names in POSIX_NAMES.items():
            for name in names - {"uname"}:  # which Python itself asks for
                here.delattr(f"{module}.{name}", raising=False)
        for name in POSIX_MODULES:
            here.setitem(sys.modules, name, None)
        here.setattr("os.open", open_file)
        here.setattr("sys.platform", "win32")
        train(tiny_recipe, tmp_path / "run", loader="albumentations", workers=0)
        assert len(evaluate(tmp_path / "run")["confusion_matrix"]) == len(expected)
        assert bench._peak_memory(torch.device("cpu"))["process"] is None
        here.setattr("signal.signal", lambda number, handler: handlers.append(number))
        loaders.give_way(0)
    assert signal.SIGINT in handlers
    assert signal.SIGTERM not in handlers
    if sys.platform != "win32":
        assert bench._peak_memory(torch.device("cpu"))["process"] > 2**20


AFRESH = """
import multiprocessing, sys

if __name__ == "__main__":
    from pathlib import Path
    from cifar_resnet import Recipe, train

    multiprocessing.set_start_method(sys.argv[1])
    train(Recipe.build(file=Path("recipe.json")), "run", loader="albumentations", workers=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_trains_where_workers_start_afresh(method, tmp_path, tiny_recipe, no_figures):
    """As they do on Windows and macOS, and on Linux from Python 3.14 on: the weights are those of a run without workers."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"there is no {method} here")
    (tmp_path / "recipe.json").write_text(tiny_recipe.to_json())
    (tmp_path / "script.py").write_text(AFRESH)
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # on which the last bits depend
    done = subprocess.run([sys.executable, "script.py", method], cwd=tmp_path, capture_output=True, text=True, env=threads)
    assert (done.returncode, done.stderr) == (0, "")
    train(tiny_recipe, tmp_path / "alone", loader="albumentations", workers=0)
    assert equal_weights(content(tmp_path / "run"), content(tmp_path / "alone"))


def test_a_file_that_windows_lets_nobody_replace_for_a_moment_is_replaced(tmp_path, monkeypatch):
    refused, replace = [], os.replace

    def busy(part, path):
        if len(refused) < most:
            refused.append(path)
            raise PermissionError(13, "Access is denied")
        replace(part, path)

    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("os.replace", busy)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    file, most = tmp_path / "metrics.json", 3
    write_whole(file, "new")
    assert (file.read_text("utf-8"), len(refused)) == ("new", 3)
    most = 1000
    with pytest.raises(RunDirectoryError, match="could not be written: Access is denied"):
        write_whole(file, "newer")
    assert file.read_text("utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


STARTED = """
import importlib
import sys
import cifar_resnet
from cifar_resnet import Recipe

class Watcher:
    def begin(self, *_):
        print("begins with", sorted({"matplotlib", "torch._dynamo"} & set(sys.modules)))

job = importlib.import_module("cifar_resnet.jobs.train")
job.save_figure = lambda figure, path: path.touch()  # what draws is imported, and takes no time
small = dict(epochs=1, train_limit=20, test_limit=10, batch_size=10, width=4, label_smoothing=0.0)
for optimizer in ("muon", "sgd", "adam", "adamw"):
    recipe = Recipe.build("digits", optimizer=optimizer, sam_share=0.5, ema_decay=0.5, ema_every=1, **small)
    cifar_resnet.train(recipe, optimizer, watcher=Watcher(), device="cpu")
print("ends with", sorted({"sympy", "torch._dynamo"} & set(sys.modules)))
"""


def test_training_imports_neither_the_compiler_nor_before_its_first_step_what_draws(tmp_path):
    """Each takes seconds of a start on a slow machine. Saving and reading a checkpoint are part of a training."""
    methods = (torch.optim.Optimizer.zero_grad, torch.optim.SGD.step)
    if not all(hasattr(each, "__wrapped__") for each in methods):
        pytest.skip("this torch does not say what the methods of its optimizers wrap")
    done = subprocess.run([sys.executable, "-c", STARTED], cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("begins", "ends"))]
    assert lines[0] == "begins with []"  # the later ones follow what the first one drew at its end
    assert lines[-1] == "ends with []"
    assert len(lines) == 5


@pytest.mark.cifar10
def test_reading_cifar10_that_is_there_imports_no_torchvision():
    """Which imports torch's compiler, and so takes seconds."""
    code = "import sys; from cifar_resnet import Recipe; from cifar_resnet.data.datasets import load; load(Recipe()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cifar_resnet.data.cifar" in done.stdout.split()
    assert {"torchvision", "torch._dynamo", "sympy"} & set(done.stdout.split()) == set()


def test_a_notebook_can_complete_the_names():
    import cifar_resnet

    assert {"train", "evaluate", "Recipe"} <= set(dir(cifar_resnet))
    assert all(hasattr(cifar_resnet, name) for name in dir(cifar_resnet))
