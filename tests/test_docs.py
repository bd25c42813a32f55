"""What the documentation says: its commands parse, its links lead somewhere, its table of fields is the Recipe's."""

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import typer

from cifar_resnet import cli as command_line
from cifar_resnet.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def test_the_recipe_page_has_every_field_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {"none": None, "yes": True, "no": False}
    assert [name for name, _ in rows] == list(Recipe.model_fields)
    for name, text in rows:
        default = Recipe.model_fields[name].default
        named = next((word for word, value in shown.items() if value is default), None)
        assert text == (named or (f"{default:g}" if isinstance(default, float) else str(default))), name


def commands(text):
    """What follows `cifar-resnet` in blocks of code and between backticks, without comments."""
    blocks = "\n".join(re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL))
    lines = [re.sub(r"\s+#.*", "", line) for line in blocks.splitlines()]
    quoted = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [
        re.search(r"(?:^|[ /])cifar-resnet ([a-z-].*)|-m cifar_resnet ([a-z-].*)", " ".join(each.split()))
        for each in lines + quoted
    ]
    return [match[1] or match[2] for match in found if match]


@EACH_PAGE
def test_every_command_told_of_can_be_given(page):
    group = typer.main.get_command(command_line.app)
    checked = 0
    for told in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(told)
        if words[0] in ("--install-completion", "--quiet", "--version") or {"--help", "--help-all"} & set(words):
            continue
        assert words[0] in group.commands, told
        if len(words) > 1 and words[1].isupper() and words[0] not in ("compare", "report", "predict", "export"):
            words[1:] = [words[1]]
        values = iter(words[1:])
        arguments = [{"N": "1", "S": "1", "DIR": "1", "NAME": "default"}.get(word, word) for word in values]
        context = group.commands[words[0]].make_context(words[0], arguments)
        given = {
            name: value
            for name, value in context.params.items()
            if name in Recipe.model_fields and value is not None and not isinstance(value, Path)
        }
        if given.get("max_lr") != "find":
            Recipe.build(
                given.pop("recipe", None), **{name: float(value) if name == "max_lr" else value for name, value in given.items()}
            )
        checked += 1
    assert checked >= (16 if page == ROOT / "README.md" else 0)


def test_the_readme_tells_of_every_command():
    told = {words.split()[0] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert set(typer.main.get_command(command_line.app).commands) <= told


@EACH_PAGE
def test_python_in_the_docs_is_whole_and_imports_what_there_is(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        tree = ast.parse(block)
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, str(page), "exec"), {})


def test_the_pages_link_to_every_page():
    linked = {
        (page.parent / target.partition("#")[0]).resolve() for page in PAGES for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }  # fmt: skip
    assert [page.name for page in PAGES if "docs" in page.parts and page not in linked] == []


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_every_link_leads_somewhere(page):
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


def test_the_page_on_architecture_names_files_that_are_there():
    """Paths inside the package, or inside the repository."""
    built = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|html))`", built)
    assert len(named) >= 15
    assert [name for name in named if not (ROOT / "cifar_resnet" / name).exists() and not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_pictures(tmp_path):
    """On a tiny network."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", 4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in kept) == 3  # for the page of the repository
    small = {"train_limit=300": "train_limit=64, test_limit=40, batch_size=32, width=4", "views=6": "views=2", "count=10": "count=2"}
    source = "\n".join(cell.source for cell in notebook.cells)
    assert all(source.count(usual) == 1 for usual in small)
    for cell in notebook.cells:
        for usual, less in small.items():
            cell.source = cell.source.replace(usual, less)
    notebook.cells[1].source = f"import torch\ntorch.backends.mps.is_available = lambda: False\n{notebook.cells[1].source}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []
