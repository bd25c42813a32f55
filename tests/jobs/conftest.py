"""What the tests of the jobs share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def own_images(tmp_path):
    """A folder of two classes, bright and dark, of images of 40x40 pixels: 24 to train on, 6 to be judged by, of each."""
    rng, folder = np.random.default_rng(0), tmp_path / "own"
    for part, count in (("train", 24), ("test", 6)):
        for name, low in (("bright", 150), ("dark", 0)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 100, (40, 40, 3), dtype=np.uint8)).save(folder / part / name / f"{i}.png")
    return folder
