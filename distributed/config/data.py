"""Settings of the images: their source, the validation split and the augmentation. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, PlainValidator, Tag
from pydantic_core import PydanticCustomError

from distributed.config.networks import ImportPath, Options, is_import_path
from distributed.config.schema import AnyPath, Section, operational, setting
from distributed.host.importable import check_module

CIFAR_SIDE = 32
"""Height and width in pixels of CIFAR's images and of generated ones."""

MAX_CLASSES = 1_000_000

MAX_PIXELS = 100_000_000
"""Four times the pixels of a typical camera. A file of a few megabytes can hold a thousand times more and exhaust memory."""


def _function_path(value: Any) -> Any:
    """Return the import path; None for none. Refuse any other value."""
    if value is None or value == "none":
        return None
    if is_import_path(value):
        return value
    raise PydanticCustomError("import_path", "should be an import path, package.module:function, e.g. net:erase")


def _flip(value: Any) -> Any:
    """Return how to mirror images; refuse any other value."""
    if type(value) is bool or value == "alternating":
        return value
    raise PydanticCustomError("flip", "should be true, false or alternating")


class Augment(Section):
    crop: int = setting(
        4, "pixels of padding around the image before a random crop back to its size; 0: no crop", ge=0, le=512
    )
    crop_padding: Literal["zero", "reflect"] = setting(
        "zero", "what is around the image before the crop: black, or its own mirrored border"
    )
    flip: Annotated[bool | Literal["alternating"], PlainValidator(_flip)] = setting(
        True, "mirror each training image with probability 1/2; alternating: in every other epoch; which half of the "
        "images begins is random"
    )  # fmt: skip
    mixup: float = setting(
        0.0, "blend each image and label with another's, by a weight drawn from Beta(mixup, mixup); 0: off", ge=0, le=1
    )
    cutmix: float = setting(
        0.0, "paste a box of another image, of an area drawn from Beta(cutmix, cutmix), and mix the labels; 0: off; "
        "with mixup too, each image gets one of them", ge=0, le=1,
    )  # fmt: skip
    cutout: int = setting(
        0,
        "side in pixels of a square at a random position that is set to the mean (black if normalize = unit); 0: off",
        ge=0,
        le=4096,
    )
    low_res_epochs: int = setting(
        0,
        "train the first N epochs on images resized to low_res_side, which takes less time (progressive resizing); 0: off",
        ge=0,
    )
    low_res_side: int | None = setting(
        None,
        "height and width in pixels to which images are resized in these epochs, after all other changes",
        ge=8,
        le=4096,
    )
    function: Annotated[str | None, BeforeValidator(_function_path)] = setting(
        None,
        "a function by import path that changes the images after crop and flip: function(images, draws), uint8 [n, h, w, c] "
        "on the device, returns as many of the same shape, e.g. net:erase; none: no function",
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return bool(self.mixup or self.cutmix)


class _Data(Section):
    image_side: ClassVar[int | None] = None
    """Height and width of the images in pixels, if the data set fixes them."""

    name: str  # defined by the variants; here so that it is the first field
    validation_fraction: float = setting(
        0.2,
        "fraction of the training images held out by a fixed stratified shuffle; 0: train on all of them",
        ge=0,
        le=0.9,
    )
    split_seed: int = setting(
        0, "seed of that shuffle, separate from `seed`, so that runs with different seeds share the split", ge=0
    )
    normalize: Literal["mean_std", "unit"] = setting(
        "mean_std",
        "mean_std: scale each channel to mean 0 and deviation 1, estimated from 2,000 training images; unit: to [0, 1] only",
    )
    placement: Literal["auto", "device", "host"] = operational(
        "auto", "where the images are stored; auto: on the device if they take less than a third of its free memory, "
        "else on the host"
    )  # fmt: skip
    augment: Augment = setting(Augment(), "random changes of the training images")

    @property
    def short_name(self) -> str:
        """The name in the default run folder."""
        return self.name.rpartition(":")[2]

    def conflicts(self) -> list[str]:
        """Return one line per conflict within the section."""
        found = []
        if self.augment.crop_padding == "reflect" and not self.augment.crop:
            found.append(
                "data.augment.crop_padding = reflect has no effect with data.augment.crop = 0: remove it or set "
                "data.augment.crop"
            )
        if self.split_seed and not self.validation_fraction:
            found.append(
                f"data.split_seed = {self.split_seed} has no effect with data.validation_fraction = 0: remove it or set "
                "data.validation_fraction"
            )
        return found

    def check_importable(self) -> Path | None:
        """Return the file of its module if it has one and it is known; nothing is imported.

        Raises:
            InputError: there is no such module.
        """
        return None


def _http_urls(value: Any) -> tuple[str, ...]:
    valid = isinstance(value, list | tuple) and all(
        isinstance(url, str) and url.startswith(("http://", "https://")) for url in value
    )
    if not valid:
        raise PydanticCustomError(
            "urls", 'should be a list of http or https addresses, e.g. ["https://HOST/FILE.tar.gz"]'
        )
    return tuple(value)


class CifarData(_Data):
    image_side = CIFAR_SIDE
    name: Literal["cifar10", "cifar100"] = setting("cifar10", "the data set, from its official files")
    root: AnyPath = operational(
        Path("data"), "folder with the official files, unpacked or as an archive, in the binary or the Python layout"
    )
    download: bool = operational(
        False, "download the official binary archive into root, once per node, if no files are there"
    )
    urls: Annotated[tuple[str, ...], BeforeValidator(_http_urls)] = operational(
        (), "mirrors of an official archive, tried in turn; only with download; []: the official server"
    )

    def conflicts(self) -> list[str]:
        found = super().conflicts()
        if self.urls and not self.download:
            found.append("data.urls has no effect without data.download: set data.download = true or remove data.urls")
        return found


class GeneratedData(_Data):
    image_side = CIFAR_SIDE
    name: Literal["generated10", "generated100"] = setting("generated10", "procedural images in CIFAR's format")
    train_samples: int = setting(50_000, "number of training images, including validation", ge=10, le=1_000_000)
    test_samples: int = setting(10_000, "number of test images", ge=10, le=1_000_000)

    @property
    def num_classes(self) -> int:
        return 100 if self.name == "generated100" else 10


class ImageFolderData(_Data):
    name: Literal["image_folder"] = setting("image_folder", "PNG and JPEG files, one folder per class")
    root: AnyPath = operational(Path("data"), "folder with train/CLASS/*.png|jpg|jpeg and test/CLASS/*")
    cache: AnyPath | None = operational(
        None, "folder for the decoded images; none: .decoded in root, or the user's cache folder if root is read-only"
    )
    max_pixels: int = operational(
        MAX_PIXELS, "largest image to decode, width times height; decoding takes about 16 bytes per pixel", ge=1
    )


_CLASSES = "number of classes; none: the highest label of both splits, plus 1"


class ArraysData(_Data):
    name: Literal["arrays"] = setting("arrays", "NumPy arrays: uint8 images, and their labels")
    root: AnyPath = operational(
        Path("data"), "folder with train_images.npy, train_labels.npy, test_images.npy and test_labels.npy"
    )
    classes: int | None = setting(None, _CLASSES, ge=2, le=MAX_CLASSES)


class ImportedData(_Data):
    """Arrays that a function outside this package returns."""

    name: ImportPath = setting(
        ..., "any other data: function(**options) returns a dict of train_images, train_labels, test_images and test_labels",
        examples=["package.module:function"],
    )  # fmt: skip
    options: Options = setting({}, "keyword arguments of the function: --data.options.NAME VALUE")
    classes: int | None = setting(None, _CLASSES, ge=2, le=MAX_CLASSES)

    def check_importable(self) -> Path | None:
        return check_module(self.name, "data.name")


_VARIANTS = {
    "cifar10": "cifar", "cifar100": "cifar", "generated10": "generated", "generated100": "generated",
    "image_folder": "image_folder", "arrays": "arrays",
}  # fmt: skip
DATA_NAMES = tuple(_VARIANTS)
DATA_EXAMPLE = "e.g. mydata:arrays for the function arrays in ./mydata.py"


def _data_variant(section: Any) -> str | None:
    """Return the tag of the class that a data section is read as; its name if none fits; None if it is no section."""
    if not isinstance(section, dict | _Data):
        return None
    name = section.get("name", DATA_NAMES[0]) if isinstance(section, dict) else section.name
    if isinstance(name, str) and name in _VARIANTS:
        return _VARIANTS[name]
    return "imported" if is_import_path(name) else f"unknown name {name}"


AnyData = CifarData | GeneratedData | ImageFolderData | ArraysData | ImportedData
DataSection = Annotated[
    Annotated[CifarData, Tag("cifar")]
    | Annotated[GeneratedData, Tag("generated")]
    | Annotated[ImageFolderData, Tag("image_folder")]
    | Annotated[ArraysData, Tag("arrays")]
    | Annotated[ImportedData, Tag("imported")],
    Discriminator(_data_variant),
]
"""The section `data`: its name selects the class."""


def max_pixels_of(data: AnyData) -> int:
    """Return the maximum number of pixels of an image to decode for a run on this data, e.g. in a prediction."""
    return data.max_pixels if isinstance(data, ImageFolderData) else MAX_PIXELS
