"""Images that are small on disk and large in memory, and damaged ones: one line, without filling the memory."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kit.abuse import Outcome, assert_outcome, call, untouched
from kit.commands import ROOT
from kit.memory import peak_mib
from kit.trained_runs import image_folder, write_test_images
from PIL import Image

pytestmark = pytest.mark.timeout(200)
SETTINGS = (
    ROOT / "configs/debug.toml", "--data.train_samples", 20, "--data.test_samples", 20, "--global_batch_size", 20,
    "--schedule.name", "constant", "--data.validation_fraction", 0, "--device", "cpu", "--logging.level", "WARNING",
    "--epochs", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "run"
    found = call("train", *SETTINGS, "--run_dir", folder)
    assert found.code == 0, found.err
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_test_images(tmp_path_factory.mktemp("images") / "new", 1)[0]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int = 8, colours: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    pixels = zlib.compress(bytes(2**16), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int, height: int, **options: object) -> bytes:
    content = saved("JPEG", **options)
    frame = max(content.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2"))
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


def with_thumbnail(content: bytes) -> bytes:
    """Insert a segment with a small JPEG before the frame; its size is not the image's."""
    small = saved("JPEG")
    return content[:2] + b"\xff\xe2" + struct.pack(">H", len(small) + 2) + small + content[2:]


def bmp(width: int, height: int) -> bytes:
    content = saved("BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


def gif(width: int, height: int) -> bytes:
    content = saved("GIF")
    return content[:6] + struct.pack("<HH", width, height) + content[10:]


def tiff(width: int, height: int) -> bytes:
    return saved("TIFF").replace(struct.pack("<HHII", 256, 4, 1, 16), struct.pack("<HHII", 256, 4, 1, width)).replace(
        struct.pack("<HHII", 257, 4, 1, 16), struct.pack("<HHII", 257, 4, 1, height)
    )  # fmt: skip


def webp(width: int, height: int) -> bytes:
    extended = struct.pack("<I", 0)[:4] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    rest = saved("WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + extended + rest
    return b"RIFF" + struct.pack("<I", len(body)) + body


def ppm(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode() + bytes(1000)


TRAINED = {
    "a PNG": (png(30_000, 30_000), "30,000 x 30,000 pixels"),
    "a PNG of 16 bits": (png(20_000, 20_000, 16, 6), "20,000 x 20,000 pixels"),
    "a PNG of the largest size": (png(2**31 - 1, 2**31 - 1), "2,147,483,647 x 2,147,483,647 pixels"),
    "a JPEG": (jpeg(60_000, 60_000), "60,000 x 60,000 pixels"),
    "a progressive JPEG": (jpeg(60_000, 50_000, progressive=True), "60,000 x 50,000 pixels"),
    "a JPEG with a thumbnail": (with_thumbnail(jpeg(60_000, 60_000)), "60,000 x 60,000 pixels"),
    "a JPEG with fill bytes": (jpeg(60_000, 60_000).replace(b"\xff\xc0", b"\xff\xff\xff\xc0"), "60,000 x 60,000"),
    "a strip": (b"", "900,000 x 1 pixels scaled to 28,800,000 x 32"),
}  # fmt: skip
PREDICTED = {
    "a PNG": (png(30_000, 30_000), "900,000,000 pixels"),
    "a PNG a little too large": (png(10_001, 10_000), "100,010,000 pixels"),
    "a JPEG": (jpeg(60_000, 60_000), "3,600,000,000 pixels"),
    "a BMP": (bmp(30_000, 30_000), "900,000,000 pixels"),
    "a GIF": (gif(30_000, 30_000), "900,000,000 pixels"),
    "a TIFF": (tiff(30_000, 30_000), "900,000,000 pixels"),
    "a WebP": (webp(16_000, 16_000), "256,000,000 pixels"),
    "a PPM": (ppm(30_000, 30_000), "900,000,000 pixels"),
}


@contextmanager
def peak_memory_within(mib: int) -> Iterator[None]:
    """Assert that the peak memory of the process grows by at most this much."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which an earlier test may have raised
    before = peak_mib()
    yield
    assert peak_mib() - before < mib


def trained_on(root: Path, run: Path, *arguments: object) -> Outcome:
    return call(
        "train", "--data.name", "image_folder", "--data.root", root, "--run_dir", run, "--device", "cpu", *arguments
    )


@pytest.mark.parametrize("case", TRAINED)
def test_image_too_large_to_train_on_is_one_line(case: str, tmp_path: Path) -> None:
    content, size = TRAINED[case]
    file = image_folder(tmp_path / "data") / "train" / "cat" / "0.png"
    if case == "a strip":
        Image.new("L", (900_000, 1)).save(file)
    else:
        file.write_bytes(content)
    with peak_memory_within(300):
        found = trained_on(tmp_path / "data", tmp_path / "run")
    assert_outcome(
        found, f"{file}: {size}", "more than data.max_pixels = 100,000,000 allows", "raise --data.max_pixels"
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xd8\xff\xd9", "broken: no size in its header"),
        (b"\xff\xd8" + b"\xff" * 100_000, "broken: no size in its header"),
        (b"\xff\xd8\xff\xe0\xff\xff" + bytes(100), "broken: no size in its header"),
        (saved("JPEG")[:170], "broken"),
        (png(0, 5), "broken"),
        (jpeg(0, 0), "broken"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", b""), "broken: no size in its header"),
    ],
    ids=["bare", "fill bytes", "a segment beyond the end", "cut", "no pixels", "a JPEG without pixels", "no header"],
)  # fmt: skip
def test_image_header_without_a_size_is_one_line(content: bytes, why: str, tmp_path: Path) -> None:
    file = image_folder(tmp_path / "data") / "train" / "cat" / "0.png"
    file.write_bytes(content)
    assert_outcome(trained_on(tmp_path / "data", tmp_path / "run"), f"{file}: {why}", "replace or remove it")


def flipped(at: int) -> bytes:
    """Return a PNG of noise with one bit flipped."""
    file = io.BytesIO()
    Image.effect_noise((20, 30), 80).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[at] ^= 1
    return bytes(content)


@pytest.mark.parametrize("at", [19, 35, 43, 60, 200, -20, -14])
def test_flipped_bit_in_a_png_is_one_line(at: int, tmp_path: Path) -> None:
    """torchvision's decoder crashed the process on some of them, without a message."""
    file = image_folder(tmp_path / "data") / "train" / "cat" / "0.png"
    file.write_bytes(flipped(at))
    assert_outcome(trained_on(tmp_path / "data", tmp_path / "run"), f"{file}: broken: ", "replace or remove it")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"])
def test_damaged_images_are_read_or_one_line(kind: str, tmp_path: Path) -> None:
    from distributed.data.sources.image_file import read_image
    from distributed.errors import InputError

    content, path = saved(kind), tmp_path / "image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at in range(0, min(len(content), 120), 3):
            for damaged in (content[:at], content[:at] + b"\xfe" + content[at + 1 :]):
                path.write_bytes(damaged)
                try:
                    assert read_image(path).shape[0] == 3
                except InputError as error:
                    assert len(error.lines) == 1  # noqa: PT017
                    assert str(error).startswith(f"{path}: ")  # noqa: PT017


def test_oversized_file_is_not_read(tmp_path: Path) -> None:
    file = image_folder(tmp_path / "data") / "train" / "cat" / "0.png"
    with file.open("r+b") as opened:
        opened.truncate(10**12)
    found = trained_on(tmp_path / "data", tmp_path / "run")
    assert_outcome(found, f"{file}: 1,000,000,000,000 bytes, more than data.max_pixels = 100,000,000 allows")


def test_max_pixels_is_a_setting(tmp_path: Path) -> None:
    found = trained_on(image_folder(tmp_path / "data"), tmp_path / "run", "--data.max_pixels", 63)
    assert_outcome(found, "8 x 8 pixels, more than data.max_pixels = 63 allows", lines=12)
    found = trained_on(tmp_path / "data", tmp_path / "run", "--data.max_pixels", 0)
    assert_outcome(found, "data.max_pixels")


@pytest.mark.parametrize("case", PREDICTED)
def test_image_too_large_to_predict_is_one_line(case: str, run: Path, tmp_path: Path) -> None:
    content, size = PREDICTED[case]
    (tmp_path / "image").write_bytes(content)
    with peak_memory_within(300), untouched(run):
        found = call("predict", run, tmp_path / "image")
    assert_outcome(found, f"{tmp_path}/image: {size}, more than data.max_pixels = 100,000,000 allows")


def test_one_pixel_high_strip_is_too_large_to_predict(run: Path, tmp_path: Path) -> None:
    Image.new("L", (5_000_000, 1)).save(tmp_path / "strip.png")
    assert_outcome(call("predict", run, tmp_path / "strip.png"), "5,000,000 x 1 pixels scaled to", "data.max_pixels")


def test_predict_accepts_max_pixels(run: Path, image: Path) -> None:
    found = call("predict", run, image, "--data.max_pixels", 100)
    assert_outcome(found, f"{image}: 1,024 pixels, more than data.max_pixels = 100 allows")
    assert_outcome(call("predict", run, image, "--data.max_pixels", -5), "--data.max_pixels -5: should be at least 1")
    assert call("predict", run, image, "--data.max_pixels", 1024).code == 0


def test_predict_runs_no_external_program_on_an_image(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.eps").write_bytes(saved("EPS"))
    assert_outcome(call("predict", run, tmp_path / "a.eps"), "a.eps: not an image that can be decoded")
