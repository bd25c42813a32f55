import copy
import inspect
import json
import pickle
import re
from pathlib import Path

import pytest

from cifar_resnet import PRESETS, Recipe
from cifar_resnet.cli import train
from cifar_resnet.errors import UsageError


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_survives_json(name, tmp_path):
    recipe = Recipe.build(name)
    assert recipe.recipe == name
    file = tmp_path / "recipe.json"
    file.write_text(recipe.to_json())
    assert Recipe.build(file=file) == recipe
    assert Recipe.load(json.loads(recipe.to_json())) == recipe
    assert json.loads(recipe.to_json()) == recipe.to_dict()
    assert set(recipe.to_dict()) == {"schema", *Recipe.model_fields}
    assert recipe.to_dict()["schema"] == 3
    assert recipe.batches == ("even" if name in ("default", "sprint", "cifar100", "digits") else "fixed")


def test_the_documented_figures_stand_in_the_presets():
    expected = {
        "eva6-s9": dict(
            max_lr=0.507,
            batch_size=128,
            div_factor=16,
            cutout_fill=0.473363,
            flip_probability=0.1,
            prep_order="relu-bn",
            grad_clip=0.1,
        ),
        "eva8-s8": dict(max_lr=1.17e-4, output="softmax", peak_epoch=7.2, optimizer="adam", weight_decay=1e-2, div_factor=40),
        "eva4-s11": dict(momentum=0.95, base_momentum=0.85, weight_decay=1e-2, cutout_count=2, loss="nll", final_div_factor=1),
        "era-s10": dict(fc_bias=False, div_factor=100, final_div_factor=100, optimizer="adam", std=(0.2023, 0.1994, 0.2010)),
        "week5-s10": dict(weight_decay=1e-4, optimizer="adam", peak_epoch=5),
        "page": dict(max_lr=0.4, logit_scale=0.125, pool_position="after-relu", fc_bias=False, label_smoothing=0),
    }
    for name, fields in expected.items():
        fields |= dict(sam_share=0, flip_order="random", init="default", width=64)
        assert {field: getattr(Recipe.build(name), field) for field in fields} == fields, name


def test_preset_then_file_then_options(tmp_path):
    file = tmp_path / "part.json"
    file.write_text('{"max_lr": 0.2, "weight_decay": 0.001}')
    recipe = Recipe.build("page", file, max_lr=0.3, momentum=None)
    assert (recipe.max_lr, recipe.weight_decay, recipe.momentum, recipe.fc_bias) == (0.3, 0.001, 0.9, False)


def test_a_mean_has_three_values():
    for mean in ([0.1, 0.2], [0.1, 0.2, 0.3, 0.4]):
        with pytest.raises(UsageError, match=r"--mean \[0.1, 0.2.*\]: (it takes a value for each of three|tuple should have at most 3)"):
            Recipe(mean=mean)


def test_a_recipe_does_not_change_and_its_copies_are_equal():
    recipe = Recipe.build("page", epochs=3)
    with pytest.raises(UsageError, match=r"a recipe does not change; recipe.replace\(seed=...\) gives another"):
        recipe.seed = 5
    assert recipe == copy.deepcopy(recipe) == pickle.loads(pickle.dumps(recipe))
    assert recipe.replace(seed=5) == Recipe.build("page", epochs=3, seed=5)


# What a file lacks

ODD = dict(  # a value of each field that no preset has
    init="default", muon_lr_factor=0.77, muon_momentum=0.55, flip_order="random", sam_share=0.33, sam_radius=0.07, grad_clip=0.5,
    width=8, max_lr=0.123, weight_decay=0.0123, ema_every=9, pad=3,
)  # fmt: skip


@pytest.mark.parametrize("name", ["default", "sprint", "page"])
def test_a_saved_recipe_without_one_of_its_lines_has_the_presets_value_there(name, tmp_path):
    whole, file = Recipe.build(name, **ODD).to_dict(), tmp_path / "recipe.json"
    for field in ODD:
        part = {key: value for key, value in whole.items() if key != field}
        file.write_text(json.dumps(part))
        for found in (Recipe.load(part), Recipe.build(file=file)):
            assert getattr(found, field) == getattr(Recipe.build(name), field), field
            assert {key: value for key, value in found.to_dict().items() if key != field} == part


# The values with which a run gives what it gave before the field was there.
BEFORE = dict(
    init="default",
    muon_lr_factor=0.3,
    muon_momentum=0.6,
    flip_order="random",
    sam_share=0.0,
    sam_radius=0.01,
    grad_clip=0.0,
    width=64,
    batches="fixed",
)


def test_a_recipe_of_schema_1_gets_the_values_that_its_run_had(tmp_path):
    """A run's own file has no number then; one that says 1 is the same."""
    whole = {name: value for name, value in Recipe.build("sprint", **ODD).to_dict().items() if name != "schema"}
    assert Recipe.load(whole).to_dict() == {"schema": 3, **whole}
    for field, value in BEFORE.items():
        part = {key: each for key, each in whole.items() if key != field}
        numbered = tmp_path / "numbered.json"
        numbered.write_text(json.dumps({"schema": 1, **part}))
        for found in (Recipe.load(part), Recipe.load({"schema": 1, **part}), Recipe.build(file=numbered)):
            assert getattr(found, field) == value, field
            assert {key: each for key, each in found.to_dict().items() if key not in (field, "schema")} == part


def test_a_recipe_of_schema_2_takes_what_is_left_in_its_last_step(tmp_path):
    """Of every preset, in a run's folder and as a file to start from; one that says otherwise is heard."""
    for name in PRESETS:
        written = {key: value for key, value in Recipe.build(name).to_dict().items() if key != "batches"} | {"schema": 2}
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps(written))
        for found in (Recipe.load(written), Recipe.build(file=file)):
            assert found == Recipe.build(name, batches="fixed")
        assert Recipe.load({**written, "batches": "even"}).batches == "even"
    assert Recipe.load({"schema": 2, "recipe": "sprint"}).muon_lr_factor == 0.3  # the preset's, as before


def test_a_part_written_by_hand_has_the_presets_values_for_the_rest(tmp_path):
    file = tmp_path / "part.json"
    file.write_text('{"recipe": "sprint", "max_lr": 0.2}')
    assert Recipe.build(file=file) == Recipe.build("sprint", max_lr=0.2)
    file.write_text('{"max_lr": 0.2}')
    assert Recipe.build("page", file) == Recipe.build("page", max_lr=0.2)
    assert Recipe.build(file=file) == Recipe.build(max_lr=0.2)
    assert Recipe.build(file=file).muon_lr_factor == 0.2


@pytest.mark.parametrize("number", [4, 0, -1, "2", None, True, [2], 1.5])
def test_a_schema_of_the_future_or_none_at_all_is_refused_in_one_line(number, tmp_path, refused):
    small = Recipe.build("digits", epochs=1, train_limit=10, test_limit=10, batch_size=10, width=1)
    file, written = tmp_path / "recipe.json", {**small.to_dict(), "schema": number}
    file.write_text(json.dumps(written))
    line = refused(2, "summary", "--recipe-file", file)
    assert f"{file}: a recipe of schema {number!r}; this version of cifar-resnet reads 1 to 3" in line
    with pytest.raises(UsageError, match="^here: a recipe of schema"):
        Recipe.load(written, "here: ")
    assert "reads 1 to 3" in refused(2, "train", "--resume", tmp_path)


# Which settings count


def test_digits_choose_their_preset_unless_one_is_named():
    assert Recipe.build(dataset="digits").recipe == "digits"
    assert Recipe.build("page", dataset="digits").recipe == "page"


def test_the_peak_moves_with_the_epochs_unless_it_is_given():
    assert Recipe.build(epochs=12).peak_epoch == pytest.approx(2.5)
    assert Recipe.build("eva8-s8", epochs=12).peak_epoch == pytest.approx(3.6)
    assert Recipe.build(epochs=12, peak_epoch=4).peak_epoch == 4


@pytest.mark.parametrize(
    ("written", "options", "peak"),
    [
        (dict(epochs=6), {}, 1.25),
        (dict(epochs=4, peak_epoch=3), {}, 3),
        (dict(epochs=6), dict(epochs=12), 2.5),
        (dict(epochs=6, peak_epoch=3), dict(epochs=12), 6),
        (dict(peak_epoch=6), dict(epochs=12), 3),
        (dict(epochs=6), dict(peak_epoch=4), 4),
    ],
)
def test_the_epochs_of_a_file_move_the_peak_too(written, options, peak, tmp_path):
    (tmp_path / "part.json").write_text(json.dumps(written))
    assert Recipe.build("default", tmp_path / "part.json", **options).peak_epoch == pytest.approx(peak)


def test_mean_and_std_of_a_file_are_not_taken_for_another_dataset(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(Recipe.build("digits", mean=(0.3,) * 3, std=(0.2,) * 3).to_json())
    assert Recipe.build(file=file).mean == Recipe.build(file=file, dataset="digits").mean == (0.3,) * 3
    other = Recipe.build(file=file, dataset="cifar10")
    assert (other.recipe, other.mean, other.std) == ("digits", None, None)
    assert Recipe.build(file=file, dataset="cifar10", mean=(0.5,) * 3).mean == (0.5,) * 3


def test_a_file_of_a_run_that_is_no_recipe_is_named(tmp_path, refused):
    (tmp_path / "repeat.json").write_text(json.dumps({"schema": 1, "recipe": Recipe().to_dict(), "count": 3}))
    line = refused(2, "train", "--recipe-file", tmp_path / "repeat.json")
    assert f"{tmp_path / 'repeat.json'}: its recipe is no name; give the recipe.json of a run" in line


def test_flips_alternate_only_where_half_the_images_flip(tmp_path):
    assert Recipe.build().alternates
    assert not Recipe.build(flip_probability=0.2).alternates
    assert not Recipe.build(flip_order="random").alternates
    whole = tmp_path / "recipe.json"
    whole.write_text(Recipe().to_json())
    assert not Recipe.build(file=whole, flip_probability=0.0, epochs=5).alternates


MUON = {"muon_lr_factor", "muon_momentum"}
HOLES = {"cutout_size", "cutout_count", "cutout_probability", "cutout_fill"}


@pytest.mark.parametrize(
    ("fields", "idle"),
    [
        (dict(ema_decay=0.9), set()),
        (dict(optimizer="sgd", ema_decay=0.9), MUON),
        (dict(optimizer="adam", ema_decay=0.9), MUON | {"nesterov"}),
        (dict(optimizer="adamw", ema_decay=0.9), MUON | {"nesterov"}),
        (dict(sam_share=0, ema_decay=0.9), {"sam_radius"}),
        (dict(), {"ema_every"}),
        (dict(pad=0, ema_decay=0.9), {"pad_mode"}),
        (dict(flip_probability=0.3, ema_decay=0.9), {"flip_order"}),
        (dict(cutout_count=0, ema_decay=0.9), HOLES - {"cutout_count"}),
        (dict(cutout_probability=0, ema_decay=0.9), HOLES - {"cutout_probability"}),
    ],
)
def test_which_fields_change_nothing(fields, idle):
    recipe = Recipe.build(**fields)
    assert set(recipe.idle()) == idle
    assert all(recipe.idle().values())
    counts = {name: value for name, value in recipe if name not in recipe.idle() and not name.startswith("cutout")}
    assert counts.items() <= dict(recipe.canonical()).items()
    assert recipe.canonical().canonical() == recipe.canonical()


def test_recipes_that_differ_only_in_what_changes_nothing_become_equal():
    a = Recipe.build(
        optimizer="adam", sam_share=0, pad=0, cutout_count=0, flip_probability=0.3, muon_lr_factor=0.9, nesterov=False
    )
    b = a.replace(
        muon_momentum=0.1, sam_radius=0.5, ema_every=7, pad_mode="black", cutout_size=16, flip_order="random", nesterov=True
    )
    assert a.canonical() == b.canonical() != a.canonical().replace(max_lr=0.1)
    no_holes, never = Recipe.build(cutout_count=0, cutout_fill=0.5), Recipe.build(cutout_probability=0, cutout_count=3)
    assert no_holes.canonical() == never.canonical() != Recipe().canonical()


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(epochs=0), "--epochs 0"),
        (dict(max_lr=-0.1), "--max-lr -0.1"),
        (dict(max_lr=float("nan")), "--max-lr nan"),
        (dict(batch_size=0), "--batch-size 0"),
        (dict(width=0), "--width 0"),
        (dict(width=2000), "--width 2000"),
        (dict(peak_epoch=24), "--peak-epoch 24 is not before the last of 24 epochs"),
        (dict(loss="nll"), "nll takes log-softmax"),
        (dict(momentum=0.8, base_momentum=0.9), "--base-momentum 0.9 is above momentum 0.8"),
        (dict(momentum=0), "nesterov needs a momentum"),
        (dict(std=(0.2, 0, 0.2)), "not above 0"),
        (dict(unknown=1), "--unknown 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields, message):
    with pytest.raises(UsageError, match=message) as refusal:
        Recipe.build(**fields)
    assert "\n" not in str(refusal.value)


def test_an_unknown_recipe_names_the_near_ones():
    with pytest.raises(UsageError, match="did you mean era-s10"):
        Recipe.build("era10")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_recipe_file_may_be_in_the_encodings_of_windows(encoding, tmp_path):
    (tmp_path / "recipe.json").write_bytes('{"epochs": 3, "recipe": "page"}'.encode(encoding))
    assert Recipe.build(file=tmp_path / "recipe.json").epochs == 3


@pytest.mark.parametrize("path", ["/home/me/pets", "pets", r"C:\Users\me\pets", "C:/Users/me/pets/", r"\\server\share\pets"])
def test_the_name_of_images_is_that_of_their_folder_whatever_system_the_run_was_of(path):
    assert Recipe(dataset=path).dataset_name == "pets"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"epochs": "many"}', '{"epochs": 0}', '{"recipe": ["x"]}', "\x00"])
def test_a_recipe_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    for options in ({}, {"epochs": 5}):
        with pytest.raises(UsageError):
            Recipe.build(file=tmp_path / "r.json", **options)


def test_what_a_wrong_file_holds_is_shortened(tiny_run):
    with pytest.raises(UsageError, match="--final .*: no field of a recipe") as refusal:
        Recipe.build(file=tiny_run / "metrics.json")
    assert "--epochs [" in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_a_recipe_file_of_another_recipe_than_the_one_named_is_refused(tmp_path):
    (tmp_path / "r.json").write_text(Recipe.build("page").to_json())
    with pytest.raises(UsageError, match="--recipe digits contradicts"):
        Recipe.build("digits", tmp_path / "r.json")


def test_one_field_is_one_option_spelled_the_same():
    options = inspect.signature(train).parameters
    assert set(Recipe.model_fields) <= set(options)
    assert all(options[name].default is None for name in Recipe.model_fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"max-lr": 0.1}', "FILE: --max-lr 0.1: no field of a recipe; its name is max_lr"),
        ('{"epochs": "ten"}', "FILE: --epochs 'ten': input should be a valid integer"),
        ('{"epochs": true}', "FILE: --epochs True: true and false are no value of it"),
        ('{"nesterov": true, "label_smoothing": false}', "FILE: --label-smoothing False: true and false are no value of it"),
        ('{"epochs": 1, "epochs": 2}', "recipe file FILE cannot be read: not JSON: 'epochs' stands twice"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(content, message, tmp_path):
    (tmp_path / "part.json").write_text(content, encoding="utf-8")
    for options in ({}, {"epochs": 3}):
        if "epochs" not in content or not options:
            with pytest.raises(UsageError, match=re.escape(message.replace("FILE", str(tmp_path / "part.json")))):
                Recipe.build("digits", tmp_path / "part.json", **options)


def test_what_is_wrong_among_the_options_is_not_said_of_the_file(tmp_path):
    (tmp_path / "part.json").write_text('{"epochs": 3}', encoding="utf-8")
    with pytest.raises(UsageError, match="^--max-lr -1.0"):
        Recipe.build("digits", tmp_path / "part.json", max_lr=-1.0)


def test_a_dataset_may_be_a_path(tmp_path):
    assert Recipe(dataset=Path("digits")).dataset == str(Path("digits").absolute())
    assert Recipe.build(dataset=tmp_path) == Recipe(dataset=tmp_path) == Recipe().replace(dataset=str(tmp_path))
    (tmp_path / "recipe.json").write_text(Recipe(dataset="elsewhere", mean=(0.1, 0.2, 0.3)).to_json(), encoding="utf-8")
    assert Recipe.build(None, tmp_path / "recipe.json", dataset=tmp_path).mean is None  # that of other images


@pytest.mark.parametrize("name", [name for name, field in Recipe.model_fields.items() if "float" in str(field.annotation)])
def test_numbers_that_float32_has_not_are_refused(name):
    value = (1e39,) * 3 if name in ("mean", "std") else 1e39
    with pytest.raises(UsageError, match=f"{name.replace('_', '[-_]')}.*1e.?39"):
        Recipe(**{name: value})
