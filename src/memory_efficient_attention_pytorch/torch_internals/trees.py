"""Nested containers of tensors, and a mode that sees every operator.

PyTorch's own documentation uses these names, but the modules that they come from begin with an underscore.
"""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["TorchDispatchMode", "tree_leaves", "tree_map_only"]
