"""Draws squares, discs, crosses and stripes into arrays/*.npy. Your own data only has to have the same four files."""

from pathlib import Path

import numpy as np

SIDE = 28


def draw(label: int, generator: np.random.Generator) -> np.ndarray:
    """Return an image uint8 [28, 28] of a shape at a random place, with noise."""
    y, x = np.mgrid[:SIDE, :SIDE] - generator.integers(9, SIDE - 9, size=(2, 1, 1))
    radius = generator.integers(4, 9)
    shape = [
        (abs(x) < radius) & (abs(y) < radius),
        x**2 + y**2 < radius**2,
        ((abs(x) < 2) & (abs(y) < radius)) | ((abs(y) < 2) & (abs(x) < radius)),
        ((x + y) % 6 < 2) & (abs(x) < radius) & (abs(y) < radius),
    ][label]
    return np.clip(160 * shape + generator.normal(48, 24, (SIDE, SIDE)), 0, 255).astype(np.uint8)


def main() -> None:
    """Write 960 training and 240 test images with their labels."""
    folder = Path("arrays")
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 960), ("test", 240)):
        labels = np.arange(count, dtype=np.int64) % 4
        np.save(folder / f"{split}_images.npy", np.stack([draw(label, generator) for label in labels]))
        np.save(folder / f"{split}_labels.npy", labels)


if __name__ == "__main__":
    main()
