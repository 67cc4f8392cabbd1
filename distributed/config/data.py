"""The settings of the images: where they come from, what is held out, how they are changed. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from distributed.config.schema import AnyPath, Section, operational, setting

MAX_PIXELS = 100_000_000
"""Four times a usual camera's. A file of some megabytes may hold a thousand times as many, and fill the memory."""


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
    cutout: int = setting(
        0,
        "side in pixels of the square set to the mean (normalize = unit: black) at a random place; 0: none",
        ge=0,
        le=32,
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return bool(self.mixup or self.cutmix)


class _Data(Section):
    validation_fraction: float = setting(
        0.2, "part of the training images held out by a fixed stratified shuffle; 0: none, train on all", ge=0, le=0.9
    )
    split_seed: int = setting(0, "key of that shuffle; apart from `seed`, so that runs with other seeds share it", ge=0)
    normalize: Literal["mean_std", "unit"] = setting(
        "mean_std", "mean_std: each channel to mean 0 and deviation 1 over the training images; unit: to [0, 1] only"
    )
    placement: Literal["auto", "device", "host"] = operational(
        "auto", "where the images lie; auto: on the device if they take less than a third of its free memory, else host"
    )
    augment: Augment = setting(Augment(), "random changes of the training images")

    def conflicts(self) -> list[str]:
        """Settings of this section that cannot stand together, a line each."""
        return []


def _addresses(value: Any) -> tuple[str, ...]:
    fine = isinstance(value, list | tuple) and all(
        isinstance(one, str) and one.startswith(("http://", "https://")) for one in value
    )
    if not fine:
        raise PydanticCustomError(
            "urls", 'should be a list of http or https addresses, as ["https://HOST/FILE.tar.gz"]'
        )
    return tuple(value)


class CifarData(_Data):
    name: Literal["cifar10", "cifar100"] = setting("cifar10", "the data set")
    root: AnyPath = operational(
        Path("data"), "folder with the official files, unpacked or as archive, binary or Python layout"
    )
    download: bool = operational(
        False, "fetch the official binary archive into root where no files are there, once a node"
    )
    urls: Annotated[tuple[str, ...], BeforeValidator(_addresses)] = operational(
        (), "mirrors of an official archive, tried in turn; only with download; []: the official server"
    )

    def conflicts(self) -> list[str]:
        if self.urls and not self.download:
            return ["data.urls has no effect without data.download: set data.download = true or remove data.urls"]
        return []


class GeneratedData(_Data):
    name: Literal["generated10", "generated100"] = setting("generated10", "procedural images in CIFAR's place")
    train_samples: int = setting(50_000, "number of training images, validation included", ge=10, le=1_000_000)
    test_samples: int = setting(10_000, "number of test images", ge=10, le=1_000_000)

    @property
    def num_classes(self) -> int:
        return 100 if self.name == "generated100" else 10


class ImageFolderData(_Data):
    name: Literal["image_folder"] = setting("image_folder", "PNG and JPEG files, a folder a class")
    root: AnyPath = operational(Path("data"), "folder with train/CLASS/*.png|jpg|jpeg and test/CLASS/*")
    cache: AnyPath | None = operational(
        None, "folder of the decoded images; none: .decoded in root, or the user's cache folder where that is read-only"
    )
    max_pixels: int = operational(
        MAX_PIXELS, "largest image, width times height, that is decoded; decoding takes about 16 bytes a pixel", ge=1
    )


AnyData = CifarData | GeneratedData | ImageFolderData


def max_pixels_of(data: AnyData) -> int:
    """The largest image that is decoded for a run on this data, e.g. to predict its class."""
    return data.max_pixels if isinstance(data, ImageFolderData) else MAX_PIXELS
