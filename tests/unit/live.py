"""How much memory operations take, on any device."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it held at once; a view counts with what it is a view of."""

    def __init__(self, *known):
        """``known``: tensors that were there before."""
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._made = [made for made in self._made if made() is not None]
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        storages = [made().untyped_storage() for made in self._made]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for at, size in held.items() if at not in self._known))
        return out
