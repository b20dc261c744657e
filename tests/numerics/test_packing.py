"""Bits in, the same bits out; the order of bits is that of numpy's packbits, little end first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantsweep.numerics.packing import num_bytes, pack_bits, unpack_bits


@given(k=st.integers(1, 8), count=st.integers(0, 70), seed=st.integers(0, 2**31))
def test_packing_is_undone(k: int, count: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**k, count, dtype=np.uint8))
    data = pack_bits(codes, k)
    assert data.dtype == torch.uint8
    assert data.numel() == num_bytes(count, k) == -(-count * k // 8)
    assert torch.equal(unpack_bits(data, k, count), codes)


@pytest.mark.parametrize("k", range(1, 9))
def test_the_bits_lie_as_numpy_packs_them(k: int) -> None:
    """An independent implementation: the k low bits of each code, one after the other."""
    codes = np.random.default_rng(k).integers(0, 2**k, 1001, dtype=np.uint8)
    bits = (codes[:, None] >> np.arange(k)) & 1
    assert pack_bits(torch.from_numpy(codes), k).numpy().tobytes() == np.packbits(bits.reshape(-1), bitorder="little").tobytes()


def test_the_topmost_bit_of_a_word_is_no_sign() -> None:
    assert unpack_bits(pack_bits(torch.full((16,), 255, dtype=torch.uint8), 8), 8, 16).tolist() == [255] * 16
