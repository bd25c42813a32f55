"""Images of CIFAR-10's test split whose label is wrong.

Confident learning found candidates, and five people looked at each: fewer than three of them chose the given label.
From Northcutt, Athalye and Mueller 2021, "Pervasive label errors in test sets destabilize machine learning benchmarks",
https://arxiv.org/abs/2103.14749; their answers: https://github.com/cleanlab/label-errors, Apache License 2.0.
"""

CIFAR10_TEST = frozenset({
    165, 792, 882, 1227, 1300, 1684, 1718, 1969, 2010, 2128, 2232, 2405, 2532, 2592, 2804, 2840, 2940, 3113, 3168, 3183, 3192, 3490,
    3600, 3753, 3977, 4055, 4198, 4614, 4643, 4794, 4910, 4965, 5166, 5191, 5211, 5468, 5632, 5690, 5882, 5960, 6522, 6792, 6877,
    6966, 7311, 7657, 7846, 8058, 8296, 8620, 9227, 9352, 9643, 9793,
})  # fmt: skip
