"""Pages of a chosen size: ordinary tensors, wherever the system has such pages."""

from __future__ import annotations

import mmap

import pytest
import torch

from tinygptv.kernels import pages
from tinygptv.kernels.pages import HUGE_PAGE, huge_zeros, lazy_zeros


class Mapping(mmap.mmap):
    """Memory that notes what it is asked for."""

    asked: list[tuple[int, int, int]] = []

    def madvise(self, *args):
        Mapping.asked.append(args)
        raise OSError(22, "Invalid argument")


@pytest.mark.skipif(not pages.IS_LINUX, reason="needs Linux")
@pytest.mark.parametrize(
    ("make", "advice", "shape", "dtype"),
    [
        (huge_zeros, "MADV_HUGEPAGE", (3, HUGE_PAGE // 2), torch.int8),
        (lazy_zeros, "MADV_NOHUGEPAGE", (2, 3, 2**18 + 5), torch.float32),
    ],
)
def test_whole_large_pages_are_asked_for_and_nothing_fails_without_them(make, advice, shape, dtype, monkeypatch):
    tensor = make(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and not tensor.any()
    assert tensor.data_ptr() % HUGE_PAGE == 0 and tensor.is_contiguous()
    Mapping.asked.clear()
    monkeypatch.setattr(mmap, "mmap", Mapping)
    other = make(shape, dtype)
    ((asked, start, length),) = Mapping.asked
    assert (asked, length) == (getattr(mmap, advice), other.nbytes // HUGE_PAGE * HUGE_PAGE)
    assert other.data_ptr() % HUGE_PAGE == 0 and 0 <= start < HUGE_PAGE
    other.fill_(1)
    assert not tensor.any() and bool(other.all())


def test_small_tensors_and_other_systems_have_ordinary_memory(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("a mapping"))
    assert not huge_zeros((HUGE_PAGE - 1,), torch.int8).any() and lazy_zeros((0, 3), torch.float32).shape == (0, 3)
    monkeypatch.setattr(pages, "IS_LINUX", False)
    assert lazy_zeros((1, HUGE_PAGE), torch.bfloat16).shape == (1, HUGE_PAGE)
