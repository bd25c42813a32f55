import os
import re
from pathlib import Path

import pytest

from cifar_resnet.recipe import Recipe

ROOT = Path(__file__).parent.parent


def test_the_recipe_page_has_every_field_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    shown = {"none": None, "yes": True, "no": False}
    assert [name for name, _ in rows] == list(Recipe.model_fields)
    for name, text in rows:
        default = Recipe.model_fields[name].default
        named = next((word for word, value in shown.items() if value is default), None)
        assert text == (named or (f"{default:g}" if isinstance(default, float) else str(default))), name


def test_the_notebook_runs_and_shows_its_pictures(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 2
    assert [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []


def test_the_types_agree():
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    out, err, code = api.run(
        ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull, str(ROOT / "cifar_resnet")]
    )
    assert code == 0, out + err
