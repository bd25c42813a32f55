import numpy as np
import pytest
import torch

from cifar_resnet.data.splits import Split
from cifar_resnet.look import labels

CLASSES = ("ant", "bee", "cat", "dog")


def test_labels_are_ranked_by_how_little_they_are_believed():
    generator = torch.Generator().manual_seed(0)
    logits, given = 2 * torch.randn(60, 4, generator=generator), torch.randint(0, 4, (60,), generator=generator)
    expected = {}
    for i, (row, label) in enumerate(zip((logits.double() / 0.7).softmax(1).tolist(), given.tolist(), strict=True)):
        others = [(probability, c) for c, probability in enumerate(row) if c != label]
        expected[100 + i] = (row[label], CLASSES[label], CLASSES[max(others)[1]])
    names = np.array([f"{CLASSES[label]}/{i}.png" for i, label in enumerate(given)])
    split = Split(np.zeros((60, 32, 32, 3), np.uint8), given.numpy(), np.arange(100, 160), names)
    rows = labels.ranked(logits, given, split, CLASSES, temperature=0.7)
    assert [row["index"] for row in rows] == sorted(expected, key=lambda index: expected[index][0])
    for row in rows:
        assert (row["score"], row["given"], row["suggested"]) == (pytest.approx(expected[row["index"]][0]), *expected[row["index"]][1:])
        assert row["name"] == names[row["index"] - 100]


def test_the_score_is_cleanlabs():
    rank = pytest.importorskip("cleanlab.rank", reason="cleanlab is not installed")
    generator = torch.Generator().manual_seed(1)
    logits, given = torch.randn(200, 5, generator=generator), torch.randint(0, 5, (200,), generator=generator)
    expected = rank.get_self_confidence_for_each_label(given.numpy(), logits.double().softmax(1).numpy())
    assert labels.label_scores(logits, given).numpy() == pytest.approx(expected)
