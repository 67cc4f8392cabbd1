"""The official CIFAR files: folders, archives, files, their MD5s, classes and digests. Imports no torch.

The MD5s of the archives are from https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from dataclasses import dataclass, field

_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

# The coarse label of each fine label of CIFAR-100, verified on all 60,000 records.
COARSE_OF_FINE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12,
    14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1,
    9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip

OFFICIAL_SERVER = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True)
class Form:
    """One of the layouts in which a data set is published. `md5` is per file, for pickles only: plain bytes are harmless."""

    folder: str
    archive: str
    archive_md5: str
    train: tuple[str, ...]
    test: str
    md5: dict[str, str] = field(default_factory=dict)

    @property
    def is_python(self) -> bool:
        return bool(self.md5)


@dataclass(frozen=True)
class CifarSet:
    """A data set and its forms, the preferred one first. A binary record is `label_bytes` and 3,072 pixels.

    `digests` are those of `identity_of` over all records of a split; every copy of the images has them, in any order.
    """

    class_names: tuple[str, ...]
    label_bytes: int
    label_key: bytes  # in a pickle
    train_records: int  # in each file of the training set
    test_records: int
    per_class: dict[str, int]  # images per class in a split
    forms: tuple[Form, Form]
    digests: dict[str, str]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def records(self, form: Form, split: str) -> dict[str, int]:
        """Return file name -> number of records, for the files of a split."""
        return dict.fromkeys(form.train, self.train_records) if split == "train" else {form.test: self.test_records}


CIFAR10 = CifarSet(
    tuple(_CIFAR10_CLASSES.split()),
    label_bytes=1,
    label_key=b"labels",
    train_records=10_000,
    test_records=10_000,
    per_class={"train": 5_000, "test": 1_000},
    forms=(
        Form(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test_batch.bin",
        ),
        Form(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
            },
        ),
    ),
    digests={"train": "ef06779b44df92d5", "test": "16e0cdb8efdd7fdb"},
)

CIFAR100 = CifarSet(
    tuple(_CIFAR100_CLASSES.split()),
    label_bytes=2,
    label_key=b"fine_labels",
    train_records=50_000,
    test_records=10_000,
    per_class={"train": 500, "test": 100},
    forms=(
        Form(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            ("train.bin",),
            "test.bin",
        ),
        Form(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            ("train",),
            "test",
            {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        ),
    ),
    digests={"train": "d4b4e6804db2ccf7", "test": "fc473b42bd887210"},
)

SETS = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def official_name(md5: str) -> str | None:
    """Return the official archive or pickle with this MD5, to recognize files that were swapped."""
    forms = [form for one in SETS.values() for form in one.forms]
    known = {form.archive_md5: form.archive for form in forms}
    known |= {digest: f"{form.folder}/{file}" for form in forms for file, digest in form.md5.items()}
    return known.get(md5)
