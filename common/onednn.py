"""Which of the libraries that torch carries multiplies float32 faster on this CPU, and how torch is brought to it.

torch multiplies float32 by MKL, which uses AVX-512 on Intel's CPUs alone. On AMD's, oneDNN, which torch keeps for
other formats, takes less than half the time (``docs/decisions/0023-products.md``). ``torch`` is handed in.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

LEAST = 1 << 20  # multiplications from which oneDNN's start pays, 10 us and more
CPUINFO = Path("/proc/cpuinfo")
DEFAULT = "none"  # torch's; what stood there before may be another thread's, who is inside as well
TOLERANCE = 1e-3  # of sums of 256 products; rounded to bfloat16 they would be off by .05


@cache
def onednn_is_faster(torch: Any) -> bool:
    """Whether float32 products take half the time by oneDNN on this CPU, and stay float32."""
    mkldnn = torch.backends.mkldnn
    if not mkldnn.is_available() or not hasattr(mkldnn, "matmul"):
        return False
    try:
        words = set(CPUINFO.read_text().split())
    except OSError:
        return False
    if not {"AuthenticAMD", "avx512f"} <= words or any(word.startswith("amx") for word in words):
        return False
    return stays_float32(torch)


def stays_float32(torch: Any) -> bool:
    """Whether what :func:`by_onednn` asks for is computed in float32, as it is wherever there is no AMX."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    found = by_onednn(torch, lambda: a @ b)
    return bool((found.double() - exact).abs().max() < TOLERANCE)


def by_onednn(torch: Any, multiply: Callable[[], T]) -> T:
    """``multiply()``, its float32 products by oneDNN: torch turns to it where it may use bfloat16 inside.

    oneDNN does so by AMX alone, and where this is used there is none (:func:`onednn_is_faster`).
    """
    allowed = torch.backends.mkldnn.matmul
    allowed.fp32_precision = "bf16"
    try:
        return multiply()
    finally:
        allowed.fp32_precision = DEFAULT
