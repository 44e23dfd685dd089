"""copy_page: the first slots of one page to another, all layers, bit for bit."""

import numpy as np
import pytest

from medusa_ext import _core
from util import DTYPES, PagedCase, assert_same_bits, normal, prompt_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 80])
def test_copy_page(backend: _core.Backend, head_dim: int, dtype: str) -> None:
    rng = np.random.default_rng(head_dim)
    case = PagedCase(backend, [128, 64], 2, 4, 2, head_dim, dtype, seed=1, spare_pages=2)
    for layer in range(2):
        for sequence, length in [(0, 120), (1, 64)]:
            kv = (length, 2, head_dim)
            case.write(
                prompt_rows(sequence, 0, length), normal(rng, *kv), normal(rng, *kv), layer=layer
            )
    pages = case.page_table[0, :2].tolist() + case.page_table[1, :1].tolist()
    free = sorted(set(range(case.num_pages)) - set(pages))
    for src, dst, count in [
        (pages[0], free[0], 64),
        (pages[1], free[1], 63),
        (pages[2], pages[0], 1),
        (pages[1], pages[2], 0),
    ]:
        before = case.dump()
        _core.ops.copy_page(backend, case.cache, src, dst, count)
        want = before.copy()
        want[:, :, dst * 64 : dst * 64 + count] = before[:, :, src * 64 : src * 64 + count]
        assert_same_bits(case.dump(), want, f"{count} slots of page {src} to {dst}")


def test_copy_page_refuses_what_does_not_exist(backend: _core.Backend) -> None:
    case = PagedCase(backend, [128])
    for src, dst, count in [(-1, 0, 4), (0, 3, 4), (3, 0, 4), (0, 1, 65), (0, 1, -1), (1, 1, 4)]:
        with pytest.raises(ValueError, match=r"^copy_page"):
            _core.ops.copy_page(backend, case.cache, src, dst, count)
    assert np.isnan(case.dump()).all()
