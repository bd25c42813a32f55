"""`Recipe`: every hyperparameter that changes a run's result, as one frozen and validated value.

A field's description is its help text. A field's default is the value of the `default` recipe. Each
other preset lists what it sets.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from .arguments import checked
from .errors import UsageError, printable
from .files import read_json
from .presets import PRESETS, preset

DATASETS = ("cifar10", "cifar100", "digits")  # anything else is a folder
SCHEMA = 3  # of a recipe in a file
# What a recipe of an older schema may lack, with the value that reproduces its run. Files of schema 1 bear no number.
MISSING_IN_2: dict[str, Any] = dict(batches="fixed")
MISSING_IN_1: dict[str, Any] = dict(
    init="default", muon_lr_factor=0.3, muon_momentum=0.6, flip_order="random", sam_share=0.0, sam_radius=0.01, grad_clip=0.0,
    width=64, **MISSING_IN_2,
)  # fmt: skip
Channels = tuple[float, float, float]


def _field(default: Any, panel: str, description: str, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel}, **bounds)


class Recipe(BaseModel):
    """A run's hyperparameters. `Recipe()` is the default recipe, `Recipe.build("page", epochs=8)` another.

    Raises:
        UsageError: a value is out of its range or two contradict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: str = _field(
        "default", "Recipe", "Preset: the defaults of the other options. `cifar-resnet recipes` lists all.", min_length=1
    )

    dataset: str = _field(
        "cifar10",
        "Data",
        "cifar10, cifar100, digits (scikit-learn's, no download), or a folder of your own images: train/CLASS/* and test/CLASS/*. "
        "digits and cifar100 choose the preset of their name.",
        min_length=1,
    )
    split: float | None = _field(
        None,
        "Data",
        "Share of a folder's images kept for evaluation, for a folder that has only train/CLASS/* or CLASS/*.",
        gt=0,
        lt=1,
    )
    holdout: int = _field(0, "Data", "Number of training images kept back, to evaluate on instead of the test set.", ge=0)
    train_limit: int | None = _field(None, "Data", "Train on a subset of this many images, each class in proportion.", ge=1)
    test_limit: int | None = _field(None, "Data", "Evaluate on a subset of this many images, each class in proportion.", ge=1)
    mean: Channels | None = _field(None, "Data", "Mean by channel, of pixels in 0 to 1; the dataset's own if not given.")
    std: Channels | None = _field(None, "Data", "Standard deviation by channel; the dataset's own if not given.")

    width: int = _field(
        64, "Model", "Channels after the first convolution; the three layers have 2, 4 and 8 times as many.", ge=1, le=1024
    )
    conv_bias: bool = _field(False, "Model", "Bias on the four convolutions outside the residual blocks.")
    fc_bias: bool = _field(True, "Model", "Bias on the fully connected layer.")
    prep_order: Literal["bn-relu", "relu-bn"] = _field(
        "bn-relu", "Model", "Order of BatchNorm and ReLU after the first convolution."
    )
    pool_position: Literal["before-bn", "after-relu"] = _field(
        "before-bn", "Model", "Place of the max pooling in the three layers."
    )
    output: Literal["logits", "softmax", "log-softmax"] = _field("logits", "Model", "What the model returns in training.")
    logit_scale: float = _field(0.125, "Model", "Constant that the logits are multiplied by.", gt=0)
    init: Literal["default", "dirac", "whiten"] = _field(
        "dirac",
        "Model",
        "Initial weights. default: torch's own. dirac: every convolution but the first starts as the identity, as far as it has "
        "outputs. whiten: as dirac, and the first convolution starts with filters that whiten the training images.",
    )

    optimizer: Literal["sgd", "muon", "adam", "adamw"] = _field(
        "muon", "Optimizer", "Optimizer. muon: Muon for all convolutions but the first, and SGD for the rest."
    )
    max_lr: float = _field(0.4, "Optimizer", "Learning rate at the peak of the schedule.", gt=0)
    momentum: float = _field(0.9, "Optimizer", "Momentum of SGD, or beta1 of Adam, at the lowest learning rate.", ge=0, lt=1)
    base_momentum: float | None = _field(
        None, "Optimizer", "Momentum at the highest learning rate. If not given, momentum stays the same.", ge=0, lt=1
    )
    nesterov: bool = _field(True, "Optimizer", "Nesterov's form of SGD momentum.")
    muon_lr_factor: float = _field(
        0.2, "Optimizer", "Muon's kernels train at this factor times the learning rate of the rest.", gt=0
    )
    muon_momentum: float = _field(0.6, "Optimizer", "Nesterov momentum of Muon's kernels.", ge=0, lt=1)
    weight_decay: float = _field(
        5e-4, "Optimizer", "Weight decay: L2 for SGD and Adam, decoupled for AdamW. Muon's kernels have none.", ge=0
    )
    grad_clip: float = _field(0.0, "Optimizer", "Clip every element of a gradient to this absolute value; 0: no clipping.", ge=0)
    loss: Literal["cross-entropy", "nll"] = _field("cross-entropy", "Optimizer", "Loss on the model's output.")
    label_smoothing: float = _field(0.1, "Optimizer", "Label smoothing of the cross entropy.", ge=0, lt=1)
    sam_share: float = _field(
        0.25,
        "Optimizer",
        "Share of the steps, at the end of the run, that use sharpness-aware minimisation (SAM); such a step takes twice as long. 0: none.",
        ge=0,
        le=1,
    )
    sam_radius: float = _field(0.01, "Optimizer", "Radius of SAM, relative to the norms of the weights.", gt=0, le=1)
    ema_decay: float = _field(
        0.0, "Optimizer", "Decay of the exponential moving average (EMA) of the weights; 0: no average.", ge=0, lt=1
    )
    ema_every: int = _field(5, "Optimizer", "Steps between two updates of the EMA.", ge=1)

    epochs: int = _field(24, "Schedule", "Passes over the training images.", ge=1, le=1_000_000)
    batch_size: int = _field(512, "Schedule", "Largest number of images in a step.", ge=1, le=1_000_000)
    batches: Literal["even", "fixed"] = _field(
        "even",
        "Schedule",
        "even: the batches of an epoch differ by one image at most, and every image has the same weight. "
        "fixed: the last batch has the images that are left.",
    )
    peak_epoch: float = _field(
        5.0, "Schedule", "Epoch at which the learning rate peaks. Epochs given without a peak move the peak in proportion.", gt=0
    )
    div_factor: float = _field(25.0, "Schedule", "Peak learning rate, divided by the first one.", ge=1)
    final_div_factor: float = _field(100.0, "Schedule", "First learning rate, divided by the last one.", gt=0)

    pad: int = _field(4, "Augmentation", "Pixels added on each side before the random crop to 32x32; 0 for no crop.", ge=0, le=16)
    pad_mode: Literal["reflect", "mean", "black"] = _field("reflect", "Augmentation", "What the added pixels show.")
    flip_probability: float = _field(0.5, "Augmentation", "Probability of a horizontal flip.", ge=0, le=1)
    flip_order: Literal["random", "alternating"] = _field(
        "alternating",
        "Augmentation",
        "When an image is flipped. alternating: in every second epoch, or by chance if --flip-probability is not 0.5. random: by chance.",
    )
    cutout_size: int = _field(8, "Augmentation", "Side of the square holes, in pixels.", ge=1, le=32)
    cutout_count: int = _field(1, "Augmentation", "Number of holes in an image; 0: no cutout.", ge=0, le=16)
    cutout_probability: float = _field(1.0, "Augmentation", "Probability that an image gets its holes.", ge=0, le=1)
    cutout_fill: float | None = _field(
        None, "Augmentation", "Grey level of the holes, in 0 to 1; the mean by channel if not given.", ge=0, le=1
    )

    seed: int = _field(0, "Run", "Seed of the weights, the order of the images and the augmentations.", ge=0, lt=2**32)
    precision: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "Run", "Arithmetic of the network; auto is bfloat16 where the hardware multiplies in it."
    )

    if not TYPE_CHECKING:  # for which the constructor takes the fields

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                wrong = [_one_line(problem) for problem in error.errors()]
                more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
                raise UsageError("; ".join(wrong[:10] + more)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise UsageError(f"a recipe does not change; recipe.replace({name}=...) gives another")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, about: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(about.field_name)].annotation is not bool:
            raise ValueError("true and false are no value of it")
        return value

    @field_validator("*")
    @classmethod
    def _in_float32(cls, value: Any) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, float) and abs(each) > 3.4e38 for each in numbers):
            raise ValueError("it is more than 3.4e38, beyond which float32 has no numbers")
        return value

    @field_validator("recipe")
    @classmethod
    def _printable(cls, value: str) -> str:
        return printable(value)

    @field_validator("dataset", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        """A path is never the name of a dataset."""
        return os.path.abspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("dataset")
    @classmethod
    def _absolute(cls, value: str) -> str:
        elsewhere = os.name != "nt" and _of_windows(value)
        return value if value in DATASETS or elsewhere else os.path.abspath(value)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.split is not None and self.dataset in DATASETS:
            raise ValueError(f"--split {self.split} is for a folder of images; {self.dataset} has its own for evaluation")
        if self.peak_epoch >= self.epochs:
            raise ValueError(f"peak_epoch {self.peak_epoch:g} is not before the last of {self.epochs} epochs")
        if (self.loss == "nll") != (self.output == "log-softmax"):
            fits = "nll takes log-softmax, cross-entropy the other two"
            raise ValueError(f"loss {self.loss} does not fit output {self.output}: {fits}")
        if self.loss == "nll" and self.label_smoothing > 0:
            raise ValueError("label_smoothing needs loss cross-entropy, not nll")
        if self.base_momentum is not None and self.base_momentum > self.momentum:
            raise ValueError(f"base_momentum {self.base_momentum} is above momentum {self.momentum}")
        if self.optimizer in ("sgd", "muon") and self.nesterov and 0 in (self.momentum, self.base_momentum):
            raise ValueError("nesterov needs a momentum above 0")
        if self.mean is not None and not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ValueError(f"mean {self.mean} is not within 0 to 1")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} has a channel that is not above 0")
        return self

    @classmethod
    @checked
    def build(cls, recipe: str | None = None, file: Path | str | None = None, **options: Any) -> Recipe:
        """Preset < recipe file < options; an option of None is one not given.

        Without a preset's name the dataset chooses it: the one of its name, else `default`. Epochs that come without a peak
        move the peak in proportion. Mean and standard deviation of a file are its dataset's, and are not taken for another one.
        """
        options = {name: value for name, value in options.items() if value is not None}
        from_file = _filled(read_json(file, "recipe file"), SCHEMA, f"{file}: ") if file else {}
        if not isinstance(from_file.get("recipe", ""), str):
            raise UsageError(f"{file}: its recipe is no name; give the recipe.json of a run, or a part of one")
        old, new = from_file.get("dataset"), options.get("dataset")
        if isinstance(old, str) and isinstance(new, str | os.PathLike) and os.path.abspath(old) != os.path.abspath(new):
            from_file = {name: value for name, value in from_file.items() if name not in ("mean", "std")}
        if recipe is not None and from_file.get("recipe", recipe) != recipe:
            raise UsageError(f"--recipe {recipe} contradicts {file}, which is of recipe {from_file['recipe']}; leave it out")
        if recipe is None:
            dataset = options.get("dataset", from_file.get("dataset"))
            recipe = from_file.get("recipe") or (dataset if dataset in DATASETS and dataset in PRESETS else "default")
        fields = {**preset(recipe).fields, "recipe": recipe}
        of_file = dict[str, Any]()
        try:
            for given in (from_file, options):
                if "epochs" in given and "peak_epoch" not in given:
                    before = cls(**fields)
                    with suppress(TypeError, ValueError, OverflowError):  # of what is no number, which is refused below
                        fields["peak_epoch"] = before.peak_epoch * max(int(given["epochs"]), 1) / before.epochs
                fields |= given
                of_file = of_file or dict(fields)
            return cls(**fields)
        except UsageError:
            if from_file:
                cls._loaded(of_file, f"{file}: ")  # which raises, where the file is to blame
            raise

    @classmethod
    def load(cls, fields: Any, source: str = "") -> Recipe:
        """The recipe that a run wrote into one of its files. What the file lacks is decided by the file's schema number.

        A recipe of an older schema gets the values that its run had; one of schema 1 has no number. In one of this schema a
        missing field has the value of its preset.

        Args:
            fields: plain values, as JSON holds them.
            source: what an error message begins with: the file.

        Raises:
            UsageError: one line that names each wrong field as its option, with its value.
        """
        if not isinstance(fields, dict):
            raise UsageError(f"{source}a recipe is an object with its fields, not {fields!r:.60}")
        known = PRESETS.get(str(fields.get("recipe"))) if "schema" in fields else None
        return cls._loaded({**(known.fields if known else {}), **_filled(fields, 1, source)}, source)

    @classmethod
    def _loaded(cls, fields: dict[str, Any], source: str) -> Recipe:
        try:
            return cls(**fields)
        except UsageError as error:
            raise UsageError(f"{source}{error}") from None

    def replace(self, **changes: Any) -> Recipe:
        return type(self)(**{**self.model_dump(), **changes})

    @property
    def alternates(self) -> bool:
        """Whether each image is mirrored in every second epoch, instead of at random."""
        return self.flip_order == "alternating" and self.flip_probability == 0.5

    def first_sharp_step(self, total_steps: int) -> int:
        """From which step of a run, from 0, on all are sharpness-aware."""
        return round(total_steps * (1 - self.sam_share))

    @property
    def dataset_name(self) -> str:
        return printable(folder_name(self.dataset)) or "images"

    @property
    def title(self) -> str:
        return self.recipe if self.recipe == self.dataset_name else f"{self.recipe} on {self.dataset_name}"

    def idle(self) -> dict[str, str]:
        """Fields that change nothing in a run of this recipe, each with the reason."""
        no_holes = not self.cutout_count or not self.cutout_probability
        reasons = [
            (self.optimizer != "muon", ("muon_lr_factor", "muon_momentum"), f"the optimizer is {self.optimizer}"),
            (self.optimizer in ("adam", "adamw"), ("nesterov",), f"the optimizer is {self.optimizer}"),
            (not self.sam_share, ("sam_radius",), "sam_share is 0"),
            (not self.ema_decay, ("ema_every",), "ema_decay is 0"),
            (not self.pad, ("pad_mode",), "pad is 0"),
            (self.flip_probability != 0.5, ("flip_order",), "flip_probability is not 0.5"),
            (no_holes, ("cutout_size", "cutout_fill"), "there are no holes"),
            (not self.cutout_count, ("cutout_probability",), "cutout_count is 0"),
            (bool(self.cutout_count) and no_holes, ("cutout_count",), "cutout_probability is 0"),
        ]
        return {name: reason for holds, names, reason in reasons if holds for name in names}

    def canonical(self) -> Recipe:
        """The recipe with every field that changes nothing at its default: recipes that train alike become equal."""
        default = Recipe()
        idle = {name: getattr(default, name) for name in self.idle()}
        if "cutout_size" in idle:  # without holes it does not matter which of the two is 0
            idle |= dict(cutout_count=0, cutout_probability=default.cutout_probability)
        return self.replace(**idle)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file, with the schema's number."""
        return {"schema": SCHEMA, **self.model_dump(mode="json")}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def _filled(fields: dict[str, Any], unnumbered: int, source: str) -> dict[str, Any]:
    """The fields of a file, without its schema number. A field that its schema may lack gets the value that its run had.

    A file without a number is of the schema `unnumbered`.
    """
    number = fields.get("schema", unnumbered)
    if number not in range(1, SCHEMA + 1) or isinstance(number, bool):
        raise UsageError(f"{source}a recipe of schema {number!r}; this version of cifar-resnet reads 1 to {SCHEMA}")
    missing = {1: MISSING_IN_1, 2: MISSING_IN_2, 3: {}}[number]
    return {**missing, **{name: value for name, value in fields.items() if name != "schema"}}


def folder_name(path: Path | str) -> str:
    """The last part of a path; of one of Windows too, whatever system reads it."""
    return PureWindowsPath(path).name if _of_windows(path) else Path(path).name


def _of_windows(path: Path | str) -> bool:
    """Whether it is a whole path with a drive or a server, as in a run that was made in Windows."""
    return bool(re.match(r"[A-Za-z]:[\\/]|\\\\", str(path)))


def option_words(name: str, value: Any) -> list[str]:
    """A field of a recipe as a command takes it."""
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]


SHORT = reprlib.Repr()  # of what a file may hold instead of a number
SHORT.maxstring = SHORT.maxother = 200


def _one_line(problem: Any) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing" and len(problem["loc"]) > 1:
        message = "it takes a value for each of three channels"
    if problem["type"] == "string_unicode":
        message = "its name is not UTF-8 here; set PYTHONUTF8=1, or rename it"
    if not problem["loc"]:
        return re.sub(r"[a-z]+(_[a-z]+)+", lambda field: "--" + field[0].replace("_", "-"), message)
    option = "--" + str(problem["loc"][0]).replace("_", "-")
    if problem["type"] == "extra_forbidden":
        meant = str(problem["loc"][0]).replace("-", "_")
        message = "no field of a recipe" + (f"; its name is {meant}" if meant in Recipe.model_fields else "")
    return f"{option} {SHORT.repr(problem['input'])}: {message[0].lower()}{message[1:]}"
