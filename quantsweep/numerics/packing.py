"""Codes of k bits as bytes: what a file of a quantized weight holds.

Eight codes of k bits fill k bytes exactly; they are packed through one 64-bit word:

    word = Σ code_i · 2^(k·i),   i = 0 … 7          byte_j = word >> 8j & 255,   j = 0 … k - 1

The last word is filled up with zeros, and cut after the last byte that holds a bit of a code: n codes
need ceil(k·n / 8) bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CODES = 8
_BYTE = 255


def pack_bits(codes_n: Tensor, k: int) -> Tensor:
    """Codes (n,) uint8, each below 2^k, as bytes (ceil(k·n / 8),) uint8.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    words = torch.zeros(-(-codes_n.numel() // _CODES), dtype=torch.int64, device=codes_n.device)
    for i in range(_CODES):
        codes = codes_n[i::_CODES]
        words[: codes.numel()] |= codes.to(torch.int64) << (k * i)
    data = torch.stack([(words >> (8 * j)).bitwise_and_(_BYTE).to(torch.uint8) for j in range(k)], dim=1)
    return data.reshape(-1)[: num_bytes(codes_n.numel(), k)]


def unpack_bits(data: Tensor, k: int, count: int) -> Tensor:
    """The inverse: the first `count` codes, (count,) uint8."""
    padded = torch.zeros(-(-count // _CODES) * k, dtype=torch.uint8, device=data.device)
    padded[: data.numel()] = data
    bytes_Wk = padded.view(-1, k).to(torch.int64)
    words = torch.zeros(bytes_Wk.shape[0], dtype=torch.int64, device=data.device)
    for j in range(k):
        words |= bytes_Wk[:, j] << (8 * j)
    codes = [(words >> (k * i)).bitwise_and_((1 << k) - 1).to(torch.uint8) for i in range(_CODES)]
    return torch.stack(codes, dim=1).reshape(-1)[:count]


def num_bytes(count: int, k: int) -> int:
    """Bytes of `count` codes of k bits."""
    return -(-k * count // 8)
