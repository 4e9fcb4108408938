"""Sums over base-2 logits and the greatest of rows, each way of finding them against float64 and torch's own."""

import pytest
import torch

from learner import softmax
from learner.logprobs import Head, score_tokens
from learner.softmax import BLOCK, LANES, Maxima, sums_of, top_of_rows
from tests.unit.live import Live

WIDTHS = (BLOCK * LANES, BLOCK * LANES + 7, 5000)
OFFSETS = (0.0, -300.0, 300.0)  # the last two must be shifted


def rows(width, offset=0.0, n=6):
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(width)) * 4 + offset
    x[0, width // 2] = offset + 20  # one that is nearly sure
    x[1, 3] = offset - 500  # and one that is next to impossible
    x[2] = x[2].sort().values  # all of its greatest are side by side
    return x


def check(x, found):
    z = x.double() - found.shift.double()[:, None]
    sums, products = torch.exp2(z).sum(1), (torch.exp2(z) * z).sum(1)
    assert torch.allclose(found.sums.double(), sums, rtol=1e-6)
    assert torch.allclose(found.products.double(), products, rtol=2e-6, atol=1e-5)
    assert found.sums.isfinite().all()


def check_maxima(x, maxima):
    """Every element is in one block or in none, and each block's greatest is what it says."""
    blocks = torch.arange(maxima.values.shape[1]).expand(len(x), -1)
    columns = maxima.columns(blocks)
    assert sorted(columns[0].tolist()) == list(range(maxima.whole(x.shape[1])))
    assert torch.equal(x.gather(1, columns).unflatten(1, (-1, maxima.block)).amax(2), maxima.values)


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled functions as they are written."""
    monkeypatch.setattr(softmax, "_compiled_lanes", lambda: softmax._lanes)
    monkeypatch.setattr(softmax, "_compiled_sums", lambda: softmax._all_sums)


@pytest.mark.parametrize("width", [1, 63, *WIDTHS])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_and_maxima_are_those_of_double_precision(uncompiled, width, offset, compiled):
    x = rows(max(width, 4), offset)[:, :width].contiguous()
    found = sums_of(x.clone(), keep=False, maxima=True, compiled=compiled)
    check(x, found)
    if found.maxima is not None:
        check_maxima(x, found.maxima)
    kept = x.clone()
    found = sums_of(kept, keep=True, maxima=False, compiled=compiled)
    check(x, found)
    assert torch.allclose(kept, torch.exp2(x - found.shift[:, None]), rtol=1e-6)


@pytest.mark.parametrize("width", [1, 63, *WIDTHS])
@pytest.mark.parametrize("offset", OFFSETS)
def test_a_gpu_without_compile_finds_the_same_and_makes_one_more_of_the_logits_or_two(width, offset):
    """Any device can go its way."""
    for keep in (True, False):
        x = rows(max(width, 4), offset)[:, :width].contiguous()
        given, size = x.clone(), 4 * x.numel()
        with Live(given) as live:
            found = softmax._at_once(given, keep, compiled=False)
        check(x, found)
        assert torch.equal(given, torch.exp2(x - found.shift[:, None]) if keep else x)
        if found.maxima is not None:
            check_maxima(x, found.maxima)
        assert width < BLOCK or live.peak < (1.5 if keep else 2.5) * size


@pytest.mark.parametrize("width", [4, BLOCK * LANES])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_rows_have_no_sums(width, compiled):
    for keep in (False, True):
        found = sums_of(torch.zeros(0, width), keep=keep, maxima=True, compiled=compiled)
        assert found.sums.shape == found.products.shape == found.shift.shape == (0,)


@pytest.mark.parametrize("n", [0, 1, 9])
def test_scores_are_the_same_in_lanes(uncompiled, n):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 16, generator=g), torch.randn(BLOCK * LANES + 90, 16, generator=g)
    targets, ids = torch.randint(len(weight), (n,), generator=g), torch.randint(len(weight), (n, 5), generator=g)
    plain, lanes = (
        score_tokens(hidden, Head(weight, 0.9, compiled=c), targets, ids, top=7) for c in (False, True)
    )  # fmt: skip
    for name, value in vars(plain).items():
        assert torch.allclose(value.float(), getattr(lanes, name).float(), atol=1e-5), name


def test_one_logit_that_is_not_a_number_spoils_its_row_alone(uncompiled):
    x = rows(5000)
    x[3, 17] = float("nan")
    for compiled in (False, True):
        found = sums_of(x.clone(), keep=False, maxima=True, compiled=compiled)
        assert found.sums.isnan().tolist() == [False, False, False, True, False, False]


def test_powers_of_two_are_right_to_their_last_bits():
    x = torch.cat((torch.linspace(-125.9, 127.4, 300_001), torch.arange(-126.0, 128.0)))
    found = softmax._exp2(x).double()
    assert ((found / torch.exp2(x.double()) - 1).abs() < 3e-7).all()
    assert (softmax._exp2(torch.tensor([-127.0, -150.0, -1e6, -3e9])) == 0).all()
    assert softmax._exp2(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("width", [1, 40, 640, 2571, 5000])
@pytest.mark.parametrize("lanes", [None, 1, 3])
def test_the_greatest_of_rows_are_those_of_topk(width, lanes):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(width))
    x[2] = x[2].sort().values  # all of them in the last blocks
    x[3, 5 % width] = float("-inf")
    x[4] = 1.0  # all equal
    k = min(20, width)
    whole = 0 if lanes is None else width - width % (8 * lanes)
    maxima = Maxima(x[:, :whole].unflatten(1, (-1, 8, lanes)).amax(2).flatten(1), 8, lanes) if whole else None
    values, ids = top_of_rows(x, k, maxima)
    assert torch.equal(values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, ids), values)
    assert all(len(set(row.tolist())) == k for row in ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_they_are_the_same():
    for width in WIDTHS:
        for offset in OFFSETS[:2]:
            for n in (6, 3):  # the number of rows changes from batch to batch
                x = rows(width, offset, n)
                found = sums_of(x.clone(), keep=False, maxima=True, compiled=True)
                check(x, found)
                check_maxima(x, found.maxima)
                assert torch.equal(top_of_rows(x, 20, found.maxima)[0], x.topk(20, dim=1).values)
