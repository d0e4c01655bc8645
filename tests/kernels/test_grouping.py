"""Rows sorted by group: by the kernel, in the interpreter, and by torch's sort."""

import numpy as np
import pytest
import torch

from v05.kernels.grouping import launch


def expect(ids: list[int], valid: list[bool], groups: int) -> tuple[list[int], list[int], list[bool]]:
    known = [i if 0 <= i < groups else 0 for i in ids]
    offsets = [sum(i < g for i in known) for g in range(groups + 1)]
    return (
        offsets,
        sorted(range(len(ids)), key=lambda row: known[row]),
        [v and 0 <= i < groups for v, i in zip(valid, ids, strict=True)],
    )


@pytest.mark.parametrize("rows", [launch.group_rows, launch.by_sorting], ids=["kernel", "sort"])
@pytest.mark.parametrize(("n", "groups", "programs"), [(0, 1, 256), (1, 1, 256), (70, 7, 256), (70, 7, 2), (40, 60, 9), (40, 3, 1)])
def test_group_rows(n, groups, programs, rows, monkeypatch):
    """More rows than a block, more groups than programs, ids that name no group, and invalid rows."""
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", programs)
    monkeypatch.setattr(launch, "TILE", 32)
    draw = np.random.default_rng(n + groups)
    ids, valid = draw.integers(-2, groups + 3, n), draw.random(n) < 0.8
    ids[ids > groups] = groups - 1
    got = rows(torch.from_numpy(ids), torch.from_numpy(valid), groups)
    assert tuple(part.tolist() for part in got) == expect(ids.tolist(), valid.tolist(), groups)
    assert rows(torch.from_numpy(ids), None, groups)[2].tolist() == expect(ids.tolist(), [True] * n, groups)[2]


def test_more_rows_and_groups_than_the_kernel_takes_are_sorted(monkeypatch):
    ids = torch.tensor([2, 0, 1, 2])
    wanted = [part.tolist() for part in launch.group_rows(ids, None, 3)]
    monkeypatch.setattr(launch, "_group_rows", None)  # a call of the kernel would fail
    for bound in ("MOST_ROWS", "MOST_GROUPS"):
        with monkeypatch.context() as patch:
            patch.setattr(launch, bound, 2)
            assert [part.tolist() for part in launch.group_rows(ids, None, 3)] == wanted
