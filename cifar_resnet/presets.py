"""The named recipes, as data: what each changes of the default recipe, and where it comes from."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from .errors import UsageError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Preset(NamedTuple):
    origin: str
    assumed: str  # what the source leaves open, and what stands here for it
    fields: dict[str, Any]


# What `page` and the five published recipes share.
_PUBLISHED = dict(
    init="default", flip_order="random", sam_share=0.0, nesterov=True, grad_clip=0.0,
    conv_bias=False, fc_bias=True, prep_order="bn-relu", pool_position="before-bn", output="logits", logit_scale=1.0,
    loss="cross-entropy", label_smoothing=0.0, ema_decay=0.0, epochs=24, batch_size=512, batches="fixed", peak_epoch=5.0,
    momentum=0.95, base_momentum=0.85, weight_decay=0.0, div_factor=25.0, final_div_factor=1e4,
    pad=4, pad_mode="black", flip_probability=0.5, cutout_size=8, cutout_count=1, cutout_probability=0.5, cutout_fill=None,
)  # fmt: skip

PRESETS: dict[str, Preset] = {
    "default": Preset("ours: ResNet-9, tuned as docs/log tells", "nothing", {}),
    "sprint": Preset(
        "ours, for people in a hurry: the default's network in 8 epochs, started with whitening filters; a sooner peak, a higher rate "
        "of Muon, less augmentation, and no sharpness-aware minimisation",
        "nothing",
        dict(init="whiten", epochs=8, peak_epoch=0.8, muon_lr_factor=0.3, sam_share=0.0, pad=2, cutout_count=0),
    ),
    "digits": Preset(
        "ours, for scikit-learn's 1,797 digits: no flip, a smaller batch",
        "nothing",
        dict(dataset="digits", optimizer="sgd", init="default", flip_order="random", flip_probability=0.0, batch_size=64, epochs=8, peak_epoch=2.0, max_lr=0.1, sam_share=0.0),
    ),
    "cifar100": Preset(
        "ours: the default on CIFAR-100",
        "everything is the default's, which was tuned on CIFAR-10; no accuracy was measured",
        dict(dataset="cifar100"),
    ),
    "page": Preset(
        "cifar10-fast (David Page, 2018): pool after ReLU, no FC bias, logits times 0.125, reflection padding",
        "the last short batch is kept, not dropped; the LR starts and ends just above 0 instead of at it",
        {
            **_PUBLISHED, "pool_position": "after-relu", "fc_bias": False, "logit_scale": 0.125, "optimizer": "sgd", "max_lr": 0.4,
            "momentum": 0.9, "base_momentum": None, "weight_decay": 5e-4, "div_factor": 490.0, "final_div_factor": 4.0,
            "pad_mode": "reflect", "cutout_probability": 1.0,
        },
    ),
    "eva6-s9": Preset(
        "Session 9, Custom ResNet and Higher Receptive Fields",
        "SGD with Nesterov momentum cycled 0.95 to 0.85, no weight decay, black padding, final_div_factor 1e4; gradients cut at 0.1 "
        "as in the code beside the document",
        {
            **_PUBLISHED, "conv_bias": True, "prep_order": "relu-bn", "optimizer": "sgd", "max_lr": 0.507, "batch_size": 128,
            "grad_clip": 0.1, "div_factor": 16.0, "flip_probability": 0.1, "cutout_probability": 0.1, "cutout_fill": 0.473363,
            "mean": (0.49139968, 0.48215841, 0.44653091), "std": (0.24703223, 0.24348513, 0.26158784),
        },
    ),
    "eva8-s8": Preset(
        "Higher Receptive Fields in CNNs: softmax inside the model, cross entropy on top of it",
        "holes lie whole inside the image; the rest is as in the notebook of its run, which seems to go on from trained weights",
        {
            **_PUBLISHED, "output": "softmax", "optimizer": "adam", "max_lr": 1.17e-4, "weight_decay": 1e-2, "div_factor": 40.0,
            "peak_epoch": 7.2, "pad": 2, "pad_mode": "reflect", "cutout_probability": 1.0, "cutout_fill": 0.0,
            "mean": CIFAR10_MEAN, "std": CIFAR10_STD,
        },
    ),
    "eva4-s11": Preset(
        "S11 assignment: log-softmax and NLL, weight decay 1e-2, two holes",
        "max LR 0.035 (its later version: between 0.03 and 0.04), reflection padding, hole probability 0.5",
        {
            **_PUBLISHED, "conv_bias": True, "output": "log-softmax", "loss": "nll", "optimizer": "sgd",
            "max_lr": 0.035, "weight_decay": 1e-2, "peak_epoch": 6.0, "div_factor": 24.0, "final_div_factor": 1.0,
            "pad_mode": "reflect", "cutout_count": 2, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5),
        },
    ),
    "era-s10": Preset(
        "ERA session 10: no FC bias",
        "max LR 0.01, no weight decay, beta1 cycled 0.95 to 0.85",
        {
            **_PUBLISHED, "fc_bias": False, "optimizer": "adam", "max_lr": 0.01, "div_factor": 100.0,
            "final_div_factor": 100.0, "pad_mode": "mean", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
        },
    ),
    "week5-s10": Preset(
        "Week 5 submission",
        "max LR 1.73e-2 (the later of its two), flip and hole probability 0.5, black padding, div_factor 25, "
        "final_div_factor 1e4, beta1 cycled 0.95 to 0.85, CIFAR-10's own mean and std",
        {
            **_PUBLISHED, "optimizer": "adam", "max_lr": 1.73e-2, "weight_decay": 1e-4,
            "mean": CIFAR10_MEAN, "std": CIFAR10_STD,
        },
    ),
}  # fmt: skip


class Measured(NamedTuple):
    """Real images, test set, last epoch, single view; docs/results.md has the runs."""

    accuracy: float  # mean, in percent
    std: float | None  # over the runs
    runs: int
    seconds: float | None  # of training, where nothing else ran
    hardware: str


MEASURED = {
    "default": Measured(95.05, 0.12, 27, 9.4, "NVIDIA H200"),
    "sprint": Measured(94.00, 0.10, 5, 2.5, "NVIDIA H200"),
    "digits": Measured(99.78, 0.23, 5, 163, "2 cores, Zen 3"),
    "page": Measured(93.98, 0.04, 5, 16.5, "NVIDIA H200"),
    "eva6-s9": Measured(89.88, 0.44, 3, None, "NVIDIA H200"),
    "eva8-s8": Measured(89.40, 0.33, 3, None, "NVIDIA H200"),
    "eva4-s11": Measured(92.83, 0.40, 3, None, "NVIDIA H200"),
    "era-s10": Measured(93.10, 0.14, 3, None, "NVIDIA H200"),
    "week5-s10": Measured(92.52, 0.14, 3, None, "NVIDIA H200"),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: there is none; the near ones are named.
    """
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if str(name).endswith(".json"):
        raise UsageError(f"no recipe {name!r}; a file is given by --recipe-file")
    near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.4) or list(PRESETS)
    raise UsageError(f"no recipe {name!r}; did you mean {', '.join(near)}? `cifar-resnet recipes` lists all")
