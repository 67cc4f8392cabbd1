"""Image folders: what is listed and refused, how pixels are converted, and that each image is decoded once."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.image_folders import read_folder
from PIL import Image

from distributed.config.data import ImageFolderData
from distributed.data.batch import Batching, InputFormat, Shards
from distributed.data.checks import unread_folders
from distributed.data.pipeline import DataPipeline
from distributed.data.sources import decode, image_folder
from distributed.errors import InputError


def picture(path: Path, height: int = 16, width: int = 16, seed: int = 0, mode: str = "RGB", **options: object) -> None:
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(), mode).save(path, **options)


@pytest.fixture
def root(tmp_path) -> Path:
    """Three classes, 6 training and 2 test images each."""
    for label, name in enumerate(("ant", "bee", "cow")):
        for index in range(6):
            picture(tmp_path / "data" / "train" / name / f"{index}.png", seed=10 * label + index)
        for index in range(2):
            picture(tmp_path / "data" / "test" / name / f"{index}.jpg", seed=100 + 10 * label + index)
    return tmp_path / "data"


def complaint(root: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        image_folder.list_folder(root)
    assert all(line.startswith("data.name = image_folder: ") for line in caught.value.lines)
    return [line.removeprefix("data.name = image_folder: ") for line in caught.value.lines]


def test_classes_are_the_folders_in_order(root):
    names, listings = image_folder.list_folder(root)
    assert names == ("ant", "bee", "cow")
    assert {split: len(listing.files) for split, listing in listings.items()} == {"train": 18, "test": 6}
    for split, listing in listings.items():
        assert [f"{split}/{names[label]}" for label in listing.labels] == [str(Path(f).parent) for f in listing.files]


def test_the_shuffled_order_depends_on_names_only(root):
    before = image_folder.list_folder(root).listings["train"]
    assert list(before.labels) != sorted(before.labels)
    root.rename(root.with_name("moved"))
    assert image_folder.list_folder(root.with_name("moved")).listings["train"].files == before.files


def test_a_changed_file_changes_the_digest(root):
    digest = image_folder.list_folder(root).listings["train"].digest
    assert image_folder.list_folder(root).listings["train"].digest == digest
    os.utime(root / "train" / "ant" / "0.png", (1, 1))
    assert image_folder.list_folder(root).listings["train"].digest != digest


def test_hidden_files_are_ignored_and_capital_suffixes_read(root):
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "ant" / ".thumbs").write_text("")
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "0.PNG")
    assert len(image_folder.list_folder(root).listings["train"].files) == 18


def test_a_class_with_test_images_only_is_reported(root):
    picture(root / "test" / "dog" / "0.png")
    (line,) = complaint(root)
    assert (
        line
        == f"{root / 'test' / 'dog'}: this class has no folder in {root / 'train'}; add it there, or remove it here"
    )


def test_files_of_another_kind_are_reported_one_per_line(root):
    (root / "train" / "ant" / "a.gif").write_bytes(b"GIF89a")
    (root / "test" / "bee" / "notes.txt").write_text("")
    (root / "train" / "cow" / "more").mkdir()
    lines = complaint(root)
    assert len(lines) == 3
    assert any(line.startswith(f"{root / 'train' / 'ant' / 'a.gif'}: not a supported image file;") for line in lines)
    assert any(line.startswith(f"{root / 'train' / 'cow' / 'more'}: a folder;") for line in lines)


def test_a_folder_full_of_other_files_is_reported_in_20_lines(root):
    for index in range(30):
        (root / "train" / "ant" / f"{index}.webp").write_bytes(b"")
    lines = complaint(root)
    assert len(lines) == 21
    assert lines[-1] == "and 10 more like these"
    for index in range(30):
        (root / "test" / f"{index}.jpg").write_bytes(b"")
    assert len(complaint(root)) == 21


def test_a_validation_folder_that_is_not_read_is_a_warning(root):
    (root / "test").rename(root / "val")
    (root / "test").symlink_to("val")
    assert unread_folders(root) == [], "read as test"
    (root / "validation/ant").mkdir(parents=True)
    [message] = unread_folders(root)
    assert message.startswith(f"{root / 'validation'}: ignored: validation images are taken from train")


def test_files_and_dead_links_beside_class_folders_are_reported(root):
    (root / "train" / "stray.png").write_bytes(b"")
    (root / "train" / "dog").symlink_to(root / "elsewhere")
    assert complaint(root) == [
        f"{root / 'train' / name}: not a folder, nor a link to one; images belong in train/CLASS/: move it"
        for name in ("dog", "stray.png")
    ]


def test_a_class_without_training_images_is_reported(root):
    (root / "train" / "dog").mkdir()
    (line,) = complaint(root)
    assert line.startswith(f"{root / 'train' / 'dog'}: a class without images")


def test_missing_images_folders_and_root_are_reported(root, tmp_path):
    assert "No such file or directory; point --data.root at" in complaint(tmp_path / "nothing")[0]
    (tmp_path / "bare" / "train").mkdir(parents=True)
    assert "no class folders" in complaint(tmp_path / "bare")[0]
    (tmp_path / "bare" / "train" / "ant").mkdir()
    assert "one class folder" in complaint(tmp_path / "bare")[0]
    for file in (root / "test").rglob("*.jpg"):
        file.unlink()
    assert complaint(root) == [f"{root / 'test'}: no images; it should hold CLASS/*.png, .jpg or .jpeg"]


def test_an_image_of_the_right_size_keeps_its_pixels(root):
    train, test = read_folder(root, 16)
    assert image_folder.list_folder(root).class_names == ("ant", "bee", "cow")
    assert train.images.shape == (18, 16, 16, 3)
    assert test.images.shape == (6, 16, 16, 3)
    listing = image_folder.list_folder(root).listings["train"]
    for image, file in zip(train.images, listing.files, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(root / file)))
    assert train.labels.tolist() == listing.labels.tolist()


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_images_become_rgb(tmp_path, mode):
    picture(tmp_path / "a.png", mode=mode)
    expected = np.asarray(Image.open(tmp_path / "a.png"))
    expected = np.repeat(expected[..., None], 3, 2) if mode == "L" else expected[..., :3]
    assert np.array_equal(decode.decode(tmp_path / "a.png").permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits_per_channel_become_eight(tmp_path):
    shades = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    image = decode.decode(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16))


def test_a_photo_is_rotated_by_its_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture(tmp_path / "a.jpg", 8, 24, exif=exif)
    assert decode.decode(tmp_path / "a.jpg").shape == (3, 24, 8)


@pytest.mark.parametrize(("height", "width"), [(100, 60), (60, 100), (40, 40), (17, 400), (20, 33), (16, 31), (7, 5)])
def test_the_shorter_side_is_resized_and_the_centre_cropped(height, width):
    across = torch.linspace(0, 255, width).round().byte().expand(3, height, width)
    square = decode.to_size(across, 16, 16)
    assert square.shape == (16, 16, 3)
    assert square.dtype == torch.uint8
    assert abs(float(square[:, 7:9].float().mean()) - 127.5) < 6, "the middle stays in the middle"
    steps = square[8, 1:, 0].int() - square[8, :-1, 0].int()
    assert int(steps.min()) >= 0
    covered = 255 * min(height, width) / width
    assert abs(float(square[8, -1, 0]) - float(square[8, 0, 0]) - covered * 15 / 16) < 0.12 * covered + 2


def test_resizing_is_close_to_pillows(tmp_path):
    picture(tmp_path / "a.png", 50, 50, seed=3)
    expected = Image.open(tmp_path / "a.png").resize((16, 16), Image.Resampling.BILINEAR)
    found = decode.to_size(decode.decode(tmp_path / "a.png"), 16, 16).numpy().astype(int)
    assert np.abs(found - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"GIF89a....", "neither PNG nor JPEG"),
        (b"text", "neither PNG nor JPEG"),
        (b"\x89PNG\r\n\x1a\n....", "broken"),
        (b"\xff\xd8\xff....", "broken"),
    ],
)
def test_a_broken_image_is_reported_with_its_path(root, content, message):
    (root / "train" / "bee" / "0.png").write_bytes(content)
    (root / "train" / "cow" / "1.png").write_bytes(content)
    (root / "test" / "cow" / "0.png").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_folder(root, 16)
    lines = sorted(caught.value.lines)
    broken = ("test/cow/0.png", "train/bee/0.png", "train/cow/1.png")
    assert [line.split(": ")[1] for line in lines] == [str(root / file) for file in broken]
    assert all(message in line and "\n" not in line for line in lines)
    assert not list((root / ".decoded").glob("*.images"))


def test_a_truncated_png_is_broken(root):
    file = root / "train" / "bee" / "0.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match="broken"):
        read_folder(root, 16)


def test_images_are_decoded_again_only_after_a_change(root, monkeypatch):
    counts: list[Path] = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path, **most: counts.append(path) or real(path, **most))
    first = read_folder(root, 16)[0]
    assert len(counts) == 24
    again = read_folder(root, 16)[0]
    assert len(counts) == 24
    assert np.array_equal(first.images, again.images)
    read_folder(root, 8)
    assert len(counts) == 48
    picture(root / "train" / "ant" / "0.png", seed=55)
    changed = read_folder(root, 16)[0]
    assert len(counts) == 48 + 18, "the test images have not changed"
    assert not np.array_equal(first.images, changed.images)


def _read(root: str, log: str) -> None:
    real = decode.decode

    def counted(path: Path, **most: int) -> torch.Tensor:
        with open(log, "ab", buffering=0) as file:
            file.write(f"{os.getpid()}\n".encode())
        return real(path, **most)

    decode.decode = counted
    read_folder(Path(root), 16)


def test_one_of_four_processes_decodes(root, tmp_path):
    context = multiprocessing.get_context("fork")
    torch.set_num_threads(1)
    processes = [context.Process(target=_read, args=(str(root), str(tmp_path / "log"))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len((tmp_path / "log").read_text().splitlines()) == 24


def test_a_pipeline_splits_an_image_folder_by_class(root):
    data = DataPipeline(
        ImageFolderData(root=root, validation_fraction=0.34),
        Batching(seed=1, global_batch_size=4, grad_accum_steps=1, evaluation_batch_size=5),
        Shards.of_rank(0, 1, 1),
        InputFormat(torch.device("cpu"), torch.float32, channels_last=True),
        decoded_side=16,
    )
    assert data.class_names == ("ant", "bee", "cow")
    assert data.num_classes == 3
    assert (data.size("train"), data.size("validation"), data.size("test")) == (12, 6, 6)
    held_out = torch.cat([batch.labels for batch in data.evaluation("validation")])
    assert torch.bincount(held_out).tolist() == [2, 2, 2]
    (batch,) = next(data.train_epoch(0))
    assert batch.images.shape == (4, 3, 16, 16)
    metadata = data.metadata()
    assert metadata["classes"] == ["ant", "bee", "cow"]
    assert len(metadata["normalization"]["mean"]) == len(metadata["normalization"]["deviation"]) == 3
