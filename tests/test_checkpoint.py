"""Checkpoints: old ones, what is in them, and those that cannot be trusted."""

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from run_helpers import content

from cifar_resnet import load_checkpoint
from cifar_resnet.errors import CheckpointError
from cifar_resnet.run_dir import RunDir

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "data"


def test_a_checkpoint_of_schema_1_goes_on_loading():
    checkpoint = load_checkpoint(FIXTURES / "schema1.pt")
    assert checkpoint.temperature == 1
    assert checkpoint.finished
    assert (checkpoint.recipe.epochs, checkpoint.recipe.width) == (1, 64)
    assert (checkpoint.recipe.sam_share, checkpoint.recipe.flip_order) == (0, "random")
    assert checkpoint.model().fc.weight[0, 0].item() == pytest.approx(0.01)
    assert checkpoint.history[-1]["test_accuracy"] == 50


def test_a_run_directory_of_the_version_before_goes_on_loading():
    recipe, checkpoint = RunDir(FIXTURES / "run-0.1").open({"dataset": "digits", "epochs": 2})
    written = json.loads((FIXTURES / "run-0.1" / "recipe.json").read_text("utf-8"))
    assert "schema" not in written
    assert {name: value for name, value in recipe.to_dict().items() if name in written} == written
    assert (recipe.width, checkpoint.content["epoch"], checkpoint.content["step"]) == (64, 1, 1)
    assert checkpoint.history == json.loads((FIXTURES / "run-0.1" / "metrics.json").read_text("utf-8"))["epochs"]
    assert len({checkpoint, checkpoint, load_checkpoint(checkpoint.path)}) == 2  # which compares no tensors


def test_the_optimizers_tensors_are_its_own_and_laid_out_as_the_weights():
    """Fused kernels take that for granted. Those of this file have one element for all places: they would write beside it."""
    checkpoint = load_checkpoint(FIXTURES / "run-0.1")
    read = [slots["momentum_buffer"] for slots in checkpoint.content["optimizer"]["state"].values()]
    assert {each.untyped_storage().nbytes() for each in read} == {4}
    state = checkpoint.state(CPU)
    assert len(state.optimizer.state) == len(read)
    for parameter, slots in state.optimizer.state.items():
        buffer = slots["momentum_buffer"]
        assert (buffer.shape, buffer.stride()) == (parameter.shape, parameter.stride())
        assert buffer.untyped_storage().nbytes() == 4 * parameter.numel()
    slots = state.optimizer.state_dict()["state"].values()
    assert all(torch.equal(mine["momentum_buffer"], theirs) for mine, theirs in zip(slots, read, strict=True))


def test_the_settings_of_the_optimizer_are_the_recipes_whatever_the_file_says(tiny_run, tmp_path):
    good = content(tiny_run)
    groups = [{**group, "weight_decay": 0.9, "fused": "?", "nesterov": False} for group in good["optimizer"]["param_groups"]]
    torch.save({**good, "optimizer": {**good["optimizer"], "param_groups": groups}}, tmp_path / "changed.pt")
    found, expected = (load_checkpoint(path).state(CPU).optimizer.param_groups for path in (tmp_path / "changed.pt", tiny_run))
    for mine, theirs in zip(found, expected, strict=True):
        assert {key: value for key, value in mine.items() if key != "params"} == {
            key: value for key, value in theirs.items() if key != "params"
        }


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_checkpoints_that_cannot_be_trusted_are_refused_in_one_line(tiny_run, tmp_path, refused):
    source, bad, was_here = tiny_run / "checkpoint.pt", tmp_path / "bad.pt", tmp_path.parent / "was-here"
    good = content(tiny_run)

    def refused_with(word):
        line = refused(1, "evaluate", bad)
        assert str(bad) in line
        assert word in line
        assert os.listdir(tmp_path) == (["bad.pt"] if bad.exists() else [])

    def changed(**changes):
        torch.save({**good, **changes}, bad)

    refused_with("no checkpoint")
    for text in (b"", b"not a zip", b"PK\x03\x04"):
        bad.write_bytes(text)
        refused_with("not a checkpoint")
    bad.write_bytes(source.read_bytes()[:-1000])
    refused_with("cut short")
    bad.write_bytes(pickle.dumps(Hostile(was_here)))
    refused_with("not a checkpoint")
    changed(extra=Hostile(was_here))
    refused_with("must not")
    assert not was_here.exists()
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in archive.infolist():
            target.writestr(entry.filename, archive.read(entry))
    refused_with("compressed")
    torch.save([1, 2], bad)
    refused_with("not a checkpoint of cifar-resnet")

    def with_slots(index, slots):
        return dict(optimizer={**good["optimizer"], "state": {**good["optimizer"]["state"], index: slots}})

    buffer = good["optimizer"]["state"][0]["momentum_buffer"]
    for changes, word in (
        (dict(kind="something else"), "not a checkpoint of cifar-resnet"),
        (dict(schema=99), "schema 99"),
        (dict(recipe={**good["recipe"], "epochs": -1}), "--epochs -1"),
        (dict(recipe={**good["recipe"], "schema": 4}), "a recipe of schema 4; this version of cifar-resnet reads 1 to 3"),
        (dict(classes=["a", "b"]), "2 classes"),
        (dict(classes=list(range(10))), "class names"),
        (with_slots(0, {"momentum_buffer": torch.tensor(0.0)}), "optimizer state of another model"),
        (with_slots(0, {"momentum_buffer": buffer.long()}), "optimizer state of another model"),
        (with_slots(0, {"exp_avg": buffer}), "optimizer state of another model"),
        (with_slots(0, {"momentum_buffer": {}}), "no attribute 'shape'"),
        (with_slots(99, {"momentum_buffer": buffer}), "not in range"),
        (dict(history=[{}]), "metrics"),
        (dict(history=[{**row, "seconds": torch.tensor(1.0)} for row in good["history"]]), "not JSON serializable"),
        (dict(environment=None), "does not say where it was trained"),
        (dict(environment={"tf32": torch.ones(2)}), "not JSON serializable"),
        (dict(evaluated_on="images"), "on what it was evaluated"),
        (dict(epoch=2.0), "place"),
        (dict(step=None), "place"),
        (dict(seconds="long"), "not supported between"),
        (dict(epoch=7), "place"),
        (dict(averaged=None), "averaged"),
        (dict(temperature=-1.0), "the temperature -1.0"),
        (dict(temperature=float("nan")), "the temperature nan"),
        (dict(temperature="warm"), "the temperature 'warm'"),
        (dict(whites={"uint16": 0}), "the values of white {'uint16': 0}"),
        (dict(whites=[255]), "the values of white [255]"),
        *((dict(data={"evaluation": each}), "which images it was trained on") for each in (
            {"images": "8", "sha256": "a"}, {"images": 8, "sha256": 9}, {"images": 8}, ["images", "sha256"], None,
        )),
    ):
        changed(**changes)
        refused_with(word)
    weights = {name: tensor.clone() for name, tensor in good["averaged"].items()}
    weights["fc.weight"][0, 0] = float("nan")
    changed(averaged=weights)
    refused_with("not finite")
    del weights["fc.weight"]
    changed(averaged=weights)
    refused_with("state_dict")


def test_a_checkpoint_that_claims_a_wide_network_is_refused_before_it_is_built(tiny_run, tmp_path, monkeypatch):
    """At width 1024 the network alone takes 7 GB."""
    good, built = content(tiny_run), []
    monkeypatch.setattr("cifar_resnet.checkpoint.build_model", lambda recipe, classes: built.append(recipe.width))
    torch.save({**good, "recipe": {**good["recipe"], "width": 1024}}, tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match="has a model of width 4, its recipe 1024"):
        load_checkpoint(tmp_path / "wide.pt")
    assert built == []


def test_one_flipped_bit_in_any_entry_is_found(tiny_run, tmp_path):
    """200 places, each inside an entry's data; the archive's padding and file names are not data."""
    whole, rng = (tiny_run / "checkpoint.pt").read_bytes(), random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        spans = []
        for entry in archive.infolist():
            name, extra = (
                int.from_bytes(whole[entry.header_offset + k : entry.header_offset + k + 2], "little") for k in (26, 28)
            )
            spans.append((entry.header_offset + 30 + name + extra, entry.file_size))
    for _ in range(200):
        first, size = rng.choice([span for span in spans if span[1]])
        flipped = bytearray(whole)
        flipped[first + rng.randrange(size)] ^= 1 << rng.randrange(8)
        (tmp_path / "bad.pt").write_bytes(flipped)
        with pytest.raises(CheckpointError, match="checksum"):
            load_checkpoint(tmp_path / "bad.pt")
