"""The example of image classification, run for a few steps on each kind of data that it reads."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "examples" / "image_classification.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("image_classification", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_short():
    assert len(FILE.read_text().splitlines()) < 150


@pytest.mark.long
def test_it_learns_what_it_makes(example):
    assert example.main(["--steps", "120", "--batch", "32"]) > 0.5  # of four classes


@pytest.mark.parametrize(
    ("dtype", "shape", "scheme"),
    [pytest.param(np.uint8, (8, 8), "hybrid_star", marks=pytest.mark.long), (np.float32, (8, 12, 2), "pre")],
)
def test_an_array_file_is_read(example, tmp_path, dtype, shape, scheme):
    random = np.random.default_rng(0)
    images = (random.random((40, *shape)) * 255).astype(dtype)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(40) % 3)
    arguments = ["--data", str(tmp_path / "images.npz"), "--steps", "2", "--batch", "8", "--scheme", scheme]
    assert 0 <= example.main(arguments) <= 1


def test_a_folder_of_images_is_read(example, tmp_path):
    images = pytest.importorskip("PIL.Image")
    for number in range(12):
        folder = tmp_path / ("cats" if number % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        images.fromarray(np.full((20, 10, 3), 20 * number, np.uint8)).save(folder / f"{number}.png")
    read, labels = example.read(str(tmp_path), 8)
    assert read.shape == (12, 8, 8, 3)
    assert sorted(labels) == [0] * 6 + [1] * 6
    assert -1 <= read.min() <= read.max() <= 1


def _images(count=8, *, dtype=np.uint8, shape=(8, 8), labels=None):
    return {"images": np.zeros((count, *shape), dtype), "labels": np.arange(count) % 2 if labels is None else labels}


WRONG_ARRAYS = {
    "no labels": ({"images": np.zeros((8, 8, 8))}, "no .npz file with arrays `images` and `labels`"),
    "objects": ({"images": np.array([{}]), "labels": np.zeros(1, int)}, "no .npz file with arrays"),
    "flat": (_images(shape=()), r"images: uint8 (8,): must be (n, h, w"),
    "wide integers": (_images(dtype=np.int64), "images: int64 (8, 8, 8): must be (n, h, w[, c]) of uint8"),
    "a label too few": (_images(labels=np.arange(7)), "labels: int64 (7,) must be 8 integers"),
    "a negative label": (_images(labels=np.arange(8) - 1), "labels: int64 (8,) must be 8 integers from 0 on"),
    "labels between": (_images(labels=np.zeros(8)), "labels: float64 (8,) must be 8 integers"),
    "one image": (_images(1), "images: at least 2 are needed"),
    "no image": (_images(0), "images: at least 2 are needed"),
    "NaN": ({**_images(), "images": np.full((8, 8, 8), np.nan)}, "without NaN and Inf"),
    "smaller than a patch": (_images(shape=(3, 8)), "larger than model.image_size"),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays_end_in_one_line(example, tmp_path, name):
    arrays, message = WRONG_ARRAYS[name]
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(SystemExit) as ended:
        example.main(["--data", str(tmp_path / "images.npz"), "--steps", "1"])
    assert str(ended.value).startswith("error: ")
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


@pytest.mark.parametrize("content", [None, b"", b"text", b"PK\x03\x04", b"\x93NUMPY\x01\x00"], ids=repr)
def test_what_is_no_array_file_ends_in_one_line(example, tmp_path, content):
    file = tmp_path / "images.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"error: .*images.npz: no \.npz file with arrays") as ended:
        example.main(["--data", str(file)])
    assert "\n" not in str(ended.value)


def test_a_folder_with_something_else_in_it_ends_in_one_line(example, tmp_path):
    pytest.importorskip("PIL")
    with pytest.raises(SystemExit, match="holds no folders of images"):
        example.main(["--data", str(tmp_path)])
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    with pytest.raises(SystemExit, match=r"error: .*cats/notes\.txt"):
        example.main(["--data", str(tmp_path)])
    (tmp_path / "cats" / "notes.txt").unlink()
    (tmp_path / "cats" / "more").mkdir()
    with pytest.raises(SystemExit, match=r"error: .*cats/more"):
        example.main(["--data", str(tmp_path)])


@pytest.mark.parametrize("option", ["--steps", "--batch", "--size", "--patch"])
def test_numbers_below_one_are_refused(example, option, capsys):
    with pytest.raises(SystemExit):
        example.main([option, "0"])
    assert f"{option} 0: must be at least 1" in capsys.readouterr().err


def test_a_scheme_that_does_not_exist_is_refused(example):
    with pytest.raises(SystemExit):
        example.main(["--scheme", "no_such_scheme"])
