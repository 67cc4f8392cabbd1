import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from distributed.data.batch import Batch
from distributed.figures.confusion import confusion_figure
from distributed.figures.predictions import predictions_figure
from distributed.figures.style import as_png, as_svg
from distributed.inference.confusion import ConfusionMatrix, Pair, as_lines, by_class, most_confused

NAMES = ["cat", "dog", "ship"]
COUNTS = [[6, 3, 1], [4, 5, 0], [0, 0, 0]]


def batch_of(labels: list[int]) -> Batch:
    nothing = torch.empty(0)
    return Batch(nothing, torch.tensor(labels, dtype=torch.int64), nothing, nothing, len(labels), (len(labels),))


def test_counts_are_by_true_and_predicted_class() -> None:
    matrix = ConfusionMatrix(3, torch.device("cpu"))
    matrix(torch.tensor([[0.0, 1, 0], [2, 1, 0]]), batch_of([0, 0]))
    matrix(torch.empty(0, 3), batch_of([]))
    matrix(torch.tensor([[0.0, 1, 9]]), batch_of([1]))
    assert matrix.read() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_results_of_each_class() -> None:
    cat, dog, ship = by_class(COUNTS, NAMES)
    assert (cat.count, cat.recall, cat.precision, cat.confused_with) == (10, 0.6, 0.6, Pair("cat", "dog", 3))
    assert (dog.recall, dog.precision, dog.confused_with) == (5 / 9, 5 / 8, Pair("dog", "cat", 4))
    # Predicted once, but there are no images of it.
    assert (ship.count, ship.recall, ship.precision, ship.confused_with) == (0, None, 0.0, None)


def test_a_class_that_is_never_predicted_has_no_precision() -> None:
    assert by_class([[0, 2], [0, 3]], ["a", "b"])[0].precision is None


def test_confused_pairs_are_sorted_by_frequency() -> None:
    assert most_confused(COUNTS, NAMES) == [Pair("dog", "cat", 4), Pair("cat", "dog", 3), Pair("cat", "ship", 1)]


def test_the_table_has_a_line_per_class() -> None:
    assert as_lines(by_class(COUNTS, NAMES)) == [
        "class       n    recall  precision  most confused with",
        "cat        10    60.00%     60.00%  dog (3)",
        "dog         9    55.56%     62.50%  cat (4)",
        "ship        0         -      0.00%  -",
    ]


def test_class_names_cannot_send_terminal_escapes() -> None:
    lines = as_lines(by_class([[1, 2], [3, 4]], ["a\n\x1b[2J", "b"]))
    assert [line.split()[0] for line in lines] == ["class", "a\\n\\x1b[2J", "b"]
    assert lines[2].endswith("a\\n\\x1b[2J (3)")


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_every_class_of_a_matrix_is_labelled(classes: int) -> None:
    names = [f"class number {c}" for c in range(classes)]
    counts = [
        [7 if true == predicted else (true + predicted) % 3 for predicted in range(classes)] for true in range(classes)
    ]
    with confusion_figure(counts, names, title="a matrix") as figure:
        axes = figure.axes[0]
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        assert as_png(figure).startswith(b"\x89PNG")
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert all(a.y0 >= b.y1 - 1 for a, b in pairwise(boxes)), "labels overlap"


@pytest.mark.filterwarnings("error")
def test_class_names_that_the_font_lacks_are_silent() -> None:
    with confusion_figure([[1, 0], [0, 1]], ["猫", "犬"], title="a matrix") as figure:
        assert as_png(figure).startswith(b"\x89PNG")


def test_a_picture_of_a_thousand_classes_stays_small() -> None:
    counts = [[int(true == predicted) for predicted in range(1000)] for true in range(1000)]
    with confusion_figure(counts, list(map(str, range(1000))), title="a matrix") as figure:
        assert max(figure.get_size_inches()) < 25
        assert as_png(figure).startswith(b"\x89PNG")


def test_an_svg_is_deterministic_and_adopts_the_pages_colours() -> None:
    drawn = []
    for _ in range(2):
        with confusion_figure(COUNTS, NAMES, title="<a & b>") as figure:
            drawn.append(as_svg(figure, label='a "matrix"'))
    assert drawn[0] == drawn[1]
    assert drawn[0].startswith("<svg viewBox=")
    assert 'aria-label="a &quot;matrix&quot;"' in drawn[0]
    assert "currentColor" in drawn[0]
    assert "#1b2028" not in drawn[0]
    assert "http" not in drawn[0].replace("http://www.w3.org/", "")


def test_names_that_are_not_utf8_are_escaped() -> None:
    name = os.fsdecode(b"caf\xe9")
    with confusion_figure([[1, 0], [0, 1]], [name, "tea"], title="a matrix") as figure:
        assert figure.axes[0].get_yticklabels()[0].get_text() == "caf\\udce9"
        assert as_png(figure).startswith(b"\x89PNG")
    with predictions_figure([np.zeros((8, 8, 3), np.float32)], [[(name, 0.5)]], [f"{name}.jpg"]) as figure:
        assert as_png(figure).startswith(b"\x89PNG")
