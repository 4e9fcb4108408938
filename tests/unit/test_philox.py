"""Philox against the known answers of its reference implementation (Random123)."""

import numpy as np
import pytest

from common.philox import coin_uniforms, philox4x32, uniforms

KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN)
def test_known_answers(key, counter, answer):
    assert tuple(int(w) for w in philox4x32(key, *counter)) == answer


def test_vectorised_equals_one_by_one():
    positions = np.arange(100)
    together = uniforms(7, 1, positions, 3, 11, 0)
    alone = [float(uniforms(7, 1, int(p), 3, 11, 0)) for p in positions]
    assert together.tolist() == alone


def test_coins_lie_strictly_inside_the_unit_interval_in_float32():
    u = coin_uniforms(0, 0, np.arange(200_000), 0, 0, 0)
    assert u.dtype == np.float32
    assert u.min() > 0
    assert u.max() < 1
    assert abs(float(u.mean()) - 0.5) < 0.005
    assert (np.log(u) < 0).all()  # a token whose log acceptance is 0 is always accepted
