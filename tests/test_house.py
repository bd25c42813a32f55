"""The house: which room may import which, and how large and how well labelled a function is."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import cifar_resnet

PACKAGE = Path(cifar_resnet.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)

# Room: the rooms that it may import besides itself.
GROUND = {"arguments", "errors", "files", "presets", "recipe", "signals"}
RUN = {"runs", "checkpoint", "run_dir"}
BELOW = {
    "errors": set(),
    "arguments": {"errors"},
    "files": {"errors"},
    "presets": {"errors"},
    "signals": set(),
    "recipe": {"arguments", "errors", "files", "presets"},
    "data": GROUND,
    "training": GROUND | {"data"},
    "runs": GROUND,
    "checkpoint": GROUND | {"data", "training", "runs"},
    "run_dir": GROUND | {"data", "training", "runs", "checkpoint"},
    "look": GROUND | {"data", "training"},
    "jobs": GROUND | RUN | {"data", "training", "look"},
    "cli": GROUND | RUN | {"data", "training", "look", "jobs"},
    "__main__": {"cli"},
}
FOR_TYPES = {"look": {"checkpoint"}}  # what a room may import under TYPE_CHECKING besides


def tree(path):
    return ast.parse((PACKAGE / path).read_text(encoding="utf-8"))


def room(path):
    """data/loaders.py: data; recipe.py: recipe."""
    return path.parts[0].removesuffix(".py")


def imports(path):
    """What of the package a module imports, with names from its top: ("data", "loaders", "Batch"), and the kind of each.

    The kind is "top", "inside" a function, or "types" where it is under TYPE_CHECKING.
    """
    found = []

    def visit(node, kind):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            kind = "types"
        elif isinstance(node, FUNCTION) and kind == "top":
            kind = "inside"
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            above = ["cifar_resnet", *path.parent.parts][: len(path.parent.parts) + 2 - node.level]
            names = [[*above, *(node.module or "").split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [[*node.module.split("."), alias.name] for alias in node.names]
        else:
            names = []
        found.extend((tuple(filter(None, name[1:])), kind) for name in names if name[0] == "cifar_resnet")
        for child in ast.iter_child_nodes(node):
            visit(child, kind)

    visit(tree(path), "top")
    return found


def test_the_imports_are_found():
    """So that the next tests look at something."""
    found = dict(imports(Path("look") / "progress.py"))
    assert found[("recipe", "Recipe")] == "top"
    assert found[("data", "splits", "Data")] == "types"
    assert dict(imports(Path("cli.py")))[("jobs", "evaluate", "evaluate")] == "inside"
    assert ("look", "figures") in dict(imports(Path("jobs") / "train.py"))
    assert ("__version__",) in dict(imports(Path("training") / "runtime.py"))
    assert {room(path) for path in MODULES} == {*BELOW, "__init__"}


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=str)
def test_imports_point_one_way(path):
    for (target, *_), kind in imports(path):
        allowed = BELOW[room(path)] | {room(path), "__version__"}
        if kind == "types":
            allowed |= FOR_TYPES.get(room(path), set())
        assert target in allowed, f"{path} imports {target}"


def test_the_command_line_imports_nothing_heavy_at_its_top():
    heavy = {"torch", "numpy", "matplotlib", "scipy", "sklearn", "albumentations", "captum", "torchinfo", "torchvision"}
    shown = [Path("look") / f"{name}.py" for name in ("console", "progress", "words")]
    light = {path.stem for path in shown}
    for path in (Path("cli.py"), *shown, Path("recipe.py"), Path("presets.py"), Path("errors.py"), Path("arguments.py")):
        for name, kind in imports(path):
            inside = name == ("__version__",) or name[0] in GROUND or (name[0] == "look" and name[1] in light)
            assert kind != "top" or inside, f"{path} imports {name}"
        top = [node for node in tree(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        named = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
        named |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom) and not node.level}
        assert not named & heavy, path


def called(path):
    """The names of what a module calls, of functions and of methods; but `Image.open`, which reads."""
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and ast.unparse(node.func) != "Image.open"]
    return {function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "") for function in calls}


WRITES = {"open", "write_text", "write_bytes", "mkdir", "touch", "unlink", "write_whole", "write_json"}


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in ("look", "training")], ids=str)
def test_nothing_that_looks_or_trains_writes_files(path):
    assert not called(path) & WRITES


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in ("jobs", "training", "data")], ids=str)
def test_nothing_but_the_command_line_and_the_console_prints(path):
    assert "print" not in called(path)
    assert ("look", "console") not in {name[:2] for name, _ in imports(path)}


def test_every_job_is_a_function_of_its_files_name():
    for path in MODULES:
        if room(path) == "jobs" and path.stem not in ("__init__", "common", "convolutions", "interrupt", "space", "watch"):
            functions = [node.name for node in tree(path).body if isinstance(node, FUNCTION)]
            assert path.stem in functions
            assert path.stem in cifar_resnet.__all__


def functions():
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, FUNCTION):
                yield f"{path}:{node.lineno} {node.name}", node


def test_no_function_is_longer_than_a_screen():
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    assert len(lengths) > 200
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_every_function_is_annotated():
    """Parameters and what comes back; `self` and `cls` aside, and Triton's kernels, whose parameters are compiled as they come."""
    bare = []
    for name, node in functions():
        if "triton.jit" in map(ast.unparse, node.decorator_list):
            continue
        given = node.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        first = {each.arg for each in every[:1]} & {"self", "cls"}
        bare += [f"{name}: {each.arg}" for each in every if each.annotation is None and each.arg not in first]
        bare += [f"{name}: what it gives"] if node.returns is None else []
    assert bare == []


def test_no_two_test_files_share_a_name():
    """pytest imports them by it, as there are no packages of tests."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
