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


def test_it_learns_what_it_makes(example):
    assert example.main(["--steps", "120", "--batch", "32"]) > 0.5  # of four classes


@pytest.mark.parametrize("keys", [{"dtype": np.uint8, "shape": (8, 8)}, {"dtype": np.float32, "shape": (8, 12, 2)}])
def test_an_array_file_is_read(example, tmp_path, keys):
    random = np.random.default_rng(0)
    images = (random.random((40, *keys["shape"])) * 255).astype(keys["dtype"])
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(40) % 3)
    arguments = ["--data", str(tmp_path / "images.npz"), "--steps", "2", "--batch", "8", "--scheme", "hybrid_star"]
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


def test_a_scheme_that_does_not_exist_is_refused(example):
    with pytest.raises(SystemExit):
        example.main(["--scheme", "no_such_scheme"])
