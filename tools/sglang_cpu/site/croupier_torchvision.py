"""Lets torchvision be imported beside a CPU build of torch.

Its wheel on PyPI links CUDA, so its operators do not load, and the import ends at the first
operator that it wants to describe. Here those two are declared, without kernels, just before.
"""

import sys
from typing import Any


class DeclareOperators:
    """A finder that finds nothing: it only notices that torchvision is about to be imported."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Declare on the first import of torchvision."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DeclareOperators.library = library  # declarations end with their library


sys.meta_path.insert(0, DeclareOperators())
