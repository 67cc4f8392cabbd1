"""The settings of the images: where they come from, what is held out, how they are changed. Imports no torch."""

from pathlib import Path
from typing import Literal

from distributed.config.section import AnyPath, Section, operational, setting


class Augment(Section):
    crop: int = setting(
        4, "zero padding in pixels around the image before a random crop back to its size; 0: none", ge=0, le=16
    )
    flip: bool = setting(True, "mirror each training image with probability one half")
    mixup: float = setting(
        0.0, "mix each image and label with another's, its part drawn from Beta(mixup, mixup); 0: off", ge=0, le=1
    )
    cutmix: float = setting(
        0.0, "paste a box of another image, of an area drawn from Beta(cutmix, cutmix), and mix the labels; 0: off; "
        "with mixup too, each image has one of them", ge=0, le=1,
    )  # fmt: skip
    cutout: int = setting(0, "side in pixels of the square set to the mean at a random place; 0: none", ge=0, le=32)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return bool(self.mixup or self.cutmix)


class _Data(Section):
    validation_fraction: float = setting(
        0.2, "part of the training images held out by a fixed stratified shuffle; 0: none, train on all", ge=0, le=0.9
    )
    split_seed: int = setting(0, "key of that shuffle; apart from `seed`, so that runs with other seeds share it", ge=0)
    augment: Augment = setting(Augment(), "random changes of the training images")

    @property
    def num_classes(self) -> int:
        return 100 if getattr(self, "name", "").endswith("100") else 10


class CifarData(_Data):
    name: Literal["cifar10", "cifar100"] = setting("cifar10", "the data set")
    root: AnyPath = operational(
        Path("data"), "folder with cifar-10-batches-bin/ or cifar-100-binary/ (official binary layout)"
    )


class GeneratedData(_Data):
    name: Literal["generated10", "generated100"] = setting("generated10", "procedural images in CIFAR's place")
    train_samples: int = setting(50_000, "number of training images, validation included", ge=10, le=1_000_000)
    test_samples: int = setting(10_000, "number of test images", ge=10, le=1_000_000)
