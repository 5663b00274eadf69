"""Arranges integer codes in the tiles of csrc/products.h, and reads them back.

A tile has 16 outputs by 64 inputs. Its inputs are fours that stand side by side, and it consists of
lines of 64 bytes: 16 outputs by 4 inputs. Eight-bit codes take a line for each four. Of fewer bits
the lowest four come first, two fours to a line, the even one in the low half of each byte. Then
come the other bits, four or eight fours to a line. Knows nothing of scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_OUTPUTS, TILE_INPUTS = 16, 64
#: Bits that stand together in a line, the lowest of a code first, by the bits of a code.
_DIGITS = {4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
_BYTE_BITS, _FOUR = 8, 4
_NUM_FOURS = TILE_INPUTS // _FOUR


def num_lines(bits: int) -> int:
    """Return the lines of a tile of codes of so many bits."""
    return _NUM_FOURS * bits // _BYTE_BITS


def arrange(codes: Tensor, bits: int) -> Tensor:
    """Return bytes `[output groups, tiles, lines, 16 outputs, 4]`, uint8.

    `codes` are uint8 `[outputs, inputs]` of whole tiles.
    """
    # A four is a word: transposing words takes a quarter of the time of transposing bytes.
    num_tiles = codes.shape[1] // TILE_INPUTS
    words = codes.view(torch.int32).view(-1, TILE_OUTPUTS, num_tiles, _NUM_FOURS)
    fours = words.permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    shift, planes = 0, []
    for digit_bits in _DIGITS[bits]:
        # [output groups, tiles, lines, fours of a line, bytes of a line].
        digits = torch.unflatten(fours, 2, (-1, _BYTE_BITS // digit_bits))
        digits = digits >> shift & (2**digit_bits - 1)
        plane = digits[:, :, :, 0]
        for four in range(1, digits.shape[3]):
            plane = plane | digits[:, :, :, four] << four * digit_bits
        planes.append(plane)
        shift += digit_bits
    return torch.unflatten(torch.cat(planes, dim=2), 3, (TILE_OUTPUTS, _FOUR))


def restore(lines: Tensor, bits: int) -> Tensor:
    """Return the codes of some outputs, uint8 `[outputs, inputs]`.

    `lines` are uint8 `[outputs, tiles, lines, 4]`: the outputs' parts of their tiles.
    """
    codes = lines.new_zeros(*lines.shape[:2], _NUM_FOURS, _FOUR)
    shift = start = 0
    for digit_bits in _DIGITS[bits]:
        end = start + num_lines(digit_bits)
        shifts = torch.arange(0, _BYTE_BITS, digit_bits, dtype=torch.uint8)[:, None]
        digits = lines[:, :, start:end, None] >> shifts & (2**digit_bits - 1)
        codes |= digits.flatten(2, 3) << shift
        start, shift = end, shift + digit_bits
    return codes.flatten(1)
