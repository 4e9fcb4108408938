"""Products on CPUs: float32's result whichever library makes them, from shapes that come again."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from actor.engine import products as engine_products
from common import onednn
from common.onednn import LEAST, stays_float32
from learner import products
from learner.products import FEWEST_ROWS, at_once, length_that_comes_again, linear, mm, outer, pieces

INTEL = "vendor_id : GenuineIntel\nflags : fpu avx512f\n"
AMD = "vendor_id : AuthenticAMD\nflags : fpu avx512f\n"


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def by(request, monkeypatch):
    if request.param and not stays_float32(torch):
        pytest.skip("oneDNN rounds to bfloat16 on this CPU")
    for module in (products, engine_products):
        monkeypatch.setattr(module, "onednn_is_faster", lambda _torch: request.param)


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(found, exact):
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-4)


SHAPES = [(0, 8, 8), (1, 64, 64), (7, 640, 640), (300, 64, 96), (1000, 64, 64), (4099, 32, 16)]


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_products_are_those_of_float64(n, k, m):
    a, b, more = normal(n, k), normal(m, k), normal(n, m)
    close(mm(a, b.T), a.double() @ b.T.double())
    wide = torch.full((n, 2 * m), 7.0)
    mm(a, b.T, out=wide[:, :m])  # into a part of something
    close(wide[:, :m], a.double() @ b.T.double())
    assert (wide[:, m:] == 7).all()
    close(mm(a, b.T, out=torch.ones(n, m), add=True), 1 + a.double() @ b.T.double())
    close(mm(torch.cat((a, a), dim=1)[:, :k], b.T), a.double() @ b.T.double())  # out of one
    close(outer(a, more), a.double().T @ more.double())
    found = torch.ones(k, m)
    outer(a, more, out=found, add=True)
    close(found, 1 + a.double().T @ more.double())
    outer(a, more, out=found)  # what stood there is gone, also where there is no row
    close(found, a.double().T @ more.double())


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 700])
def test_linear_goes_both_ways_as_torchs_does(dtype, with_bias, rows):
    given_ = [normal(rows, 48, dtype=dtype), normal(80, 48, dtype=dtype), normal(80, dtype=dtype)]
    before = given_[2].clone()
    x, weight, bias = (t.requires_grad_() for t in given_)
    results = []
    for way in (linear, F.linear):
        out = way(x, weight, bias if with_bias else None)
        wanted = [x, weight, bias] if with_bias else [x, weight]
        results.append([out, *torch.autograd.grad((out * normal(rows, 80).to(dtype)).sum(), wanted)])
    for found, exact in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
    assert torch.equal(bias, before)
    assert linear(x.detach(), weight, None).requires_grad
    assert torch.autograd.grad(linear(x.detach(), weight, bias).sum(), [bias])[0].shape == (80,)


@given(st.integers(0, 100_000), st.integers(1, 1 << 22))
def test_pieces_are_all_rows_once_and_only_the_last_is_small(rows, work):
    found = list(pieces(rows, work))
    assert [row for part, _ in found for row in (part.start, part.stop)][1:-1:2] == [p.start for p, _ in found][1:]
    assert (found[0][0].start, found[-1][0].stop) == (0, rows) if rows else not found
    for part, enough in found:
        size = part.stop - part.start
        assert enough == (size >= FEWEST_ROWS and size * work >= LEAST) or part.stop == rows
    assert all(enough for _, enough in found[:-1])


@settings(deadline=None)
@given(st.integers(6, 13))
def test_lengths_of_an_octave_come_down_to_few_shapes(octave):
    lengths = range(1 << octave, 2 << octave)
    seen = {part.stop - part.start for n in lengths for part, enough in pieces(n, LEAST) if enough}
    assert len(seen) <= 8 * (octave + 1)


@pytest.mark.parametrize("octave", [0, 4, 5, 6, 11, 20])
def test_an_octave_has_few_lengths_that_come_again_and_none_is_much_too_long(octave):
    rows = range(1 << octave, 2 << octave, max(1, (1 << octave) // 5000))
    lengths = [length_that_comes_again(n, torch.empty(1, 8, dtype=torch.bfloat16)) for n in rows]
    assert all(n <= length <= n * 33 / 32 for n, length in zip(rows, lengths, strict=True))
    assert len(set(lengths)) <= 33 and length_that_comes_again(0, torch.empty(1, 8, dtype=torch.bfloat16)) == 0
    exact = [length_that_comes_again(n, torch.empty(1, 8, dtype=torch.float64)) for n in rows]
    assert exact == list(rows)  # torch's own products take what comes


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize(("n", "k", "m"), SHAPES)
def test_products_in_one_piece_are_those_of_float64(n, k, m):
    a, b = normal(n, k), normal(m, k)
    wide = torch.full((n, 2 * m), 7.0)
    at_once(a, b.T, out=wide[:, :m])
    close(wide[:, :m], a.double() @ b.T.double())
    assert (wide[:, m:] == 7).all()
    close(at_once(a.T, normal(n, m)), a.double().T @ normal(n, m).double())
    assert at_once(a.bfloat16(), b.T.bfloat16()).dtype == torch.bfloat16


@pytest.mark.usefixtures("by")
def test_what_torch_was_told_of_precision_stays_also_behind_an_error():
    told = torch.backends.mkldnn.matmul
    before = told.fp32_precision
    mm(normal(256, 128), normal(128, 64))
    assert told.fp32_precision == before
    with pytest.raises(RuntimeError):
        mm(normal(4096, 128), normal(64, 64))
    assert told.fp32_precision == before


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (AMD, True), (INTEL, False), (AMD.replace("avx", "amx_tile avx"), False), (AMD.replace("512f", "2"), False),
        (None, False),
    ],
)  # fmt: skip
def test_only_amds_cpus_with_avx512_and_without_amx_turn_to_onednn(monkeypatch, tmp_path, said, wanted):
    if wanted and not stays_float32(torch):
        pytest.skip("oneDNN rounds to bfloat16 on this CPU")
    monkeypatch.setattr(onednn, "CPUINFO", tmp_path / "cpuinfo")
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    assert onednn.onednn_is_faster.__wrapped__(torch) == wanted


def test_a_library_that_rounds_to_bfloat16_is_found_out(monkeypatch):
    exact = torch.Tensor.__matmul__

    def rounded(_torch, multiply):
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16(), b.bfloat16()).float())
            return multiply()

    monkeypatch.setattr(onednn, "by_onednn", rounded)
    assert not stays_float32(torch)


@pytest.mark.parametrize("found", [None, torch.zeros(1, 256, 256)], ids=["missing", "wrong"])
def test_a_torch_without_that_product_keeps_its_own_layers(monkeypatch, found):
    def product(*_):
        if found is None:
            raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")
        return found

    monkeypatch.setattr(engine_products, "onednn_is_faster", lambda _torch: True)
    monkeypatch.setattr(engine_products, "_linear", product)
    assert engine_products.use_fast_products(torch.nn.Sequential(torch.nn.Linear(256, 640))) == 0


@pytest.mark.usefixtures("by")
def test_the_embedded_engines_layers_are_what_they_were():
    model = torch.nn.Sequential(torch.nn.Linear(256, 640), torch.nn.Linear(640, 64, bias=False))
    inputs = [normal(2, 40, 256), normal(1, 1, 256)]
    with torch.no_grad():
        exact = [model(x) for x in inputs]
        bound = engine_products.use_fast_products(model)
        assert bound == (2 if engine_products.onednn_is_faster(torch) else 0)
        for x, before in zip(inputs, exact, strict=True):
            torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
        assert engine_products.use_fast_products(model.bfloat16()) == 0
