import inspect
import json

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
    assert set(json.loads(recipe.to_json())) == set(Recipe.model_fields)


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
        fields |= dict(sam_share=0, flip_order="random", init="default")
        assert {field: getattr(Recipe.build(name), field) for field in fields} == fields, name


def test_preset_then_file_then_options(tmp_path):
    file = tmp_path / "part.json"
    file.write_text('{"max_lr": 0.2, "weight_decay": 0.001}')
    recipe = Recipe.build("page", file, max_lr=0.3, momentum=None)
    assert (recipe.max_lr, recipe.weight_decay, recipe.momentum, recipe.fc_bias) == (0.3, 0.001, 0.9, False)


def test_a_recipe_written_while_uncut_gradients_were_null_is_read():
    written = {**Recipe().model_dump(mode="json"), "grad_clip": None}
    assert Recipe.parse(written) == Recipe()


def test_digits_choose_their_preset_unless_one_is_named():
    assert Recipe.build(dataset="digits").recipe == "digits"
    assert Recipe.build("page", dataset="digits").recipe == "page"


def test_the_peak_moves_with_the_epochs_unless_it_is_given():
    assert Recipe.build(epochs=12).peak_epoch == pytest.approx(2.5)
    assert Recipe.build("eva8-s8", epochs=12).peak_epoch == pytest.approx(3.6)
    assert Recipe.build(epochs=12, peak_epoch=4).peak_epoch == 4


def test_flips_alternate_only_where_half_the_images_flip(tmp_path):
    assert Recipe.build().alternates
    assert not Recipe.build(flip_probability=0.2).alternates
    assert not Recipe.build(flip_order="random").alternates
    whole = tmp_path / "recipe.json"
    whole.write_text(Recipe().to_json())
    assert not Recipe.build(file=whole, flip_probability=0.0, epochs=5).alternates


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(epochs=0), "--epochs 0"),
        (dict(max_lr=-0.1), "--max-lr -0.1"),
        (dict(max_lr=float("nan")), "--max-lr nan"),
        (dict(batch_size=0), "--batch-size 0"),
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


@pytest.mark.parametrize("content", ["", "[]", "{", '{"epochs": "many"}', '{"epochs": 0}', '{"recipe": ["x"]}', "\x00"])
def test_a_recipe_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    for options in ({}, {"epochs": 5}):
        with pytest.raises(UsageError):
            Recipe.build(file=tmp_path / "r.json", **options)


def test_a_recipe_file_of_another_recipe_than_the_one_named_is_refused(tmp_path):
    (tmp_path / "r.json").write_text(Recipe.build("page").to_json())
    with pytest.raises(UsageError, match="--recipe digits contradicts"):
        Recipe.build("digits", tmp_path / "r.json")


def test_one_field_is_one_option_spelled_the_same():
    options = inspect.signature(train).parameters
    assert set(Recipe.model_fields) <= set(options)
    assert all(options[name].default is None for name in Recipe.model_fields)
