"""Where autocast on CUDA casts differently from autocast on the CPU, which no interface reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .trees import tree_leaves, tree_map_only

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Cast = Callable[[Any, Arguments, Keywords], Any]


def cast_on_cuda(name: str) -> Cast | None:
    """How to call a PyTorch function, with autocast off, as CUDA's autocast would; None if it does what the CPU's does.

    Looked up by name, as of PyTorch 2.13, whose list for CUDA is in ATen/autocast_mode.h.
    """
    return _CASTS.get(name, _as_they_are if name.startswith(("fft_", "linalg_")) else None)


def _in_dtype(dtype: torch.dtype, func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Call with floating-point tensors in ``dtype``; those of fp64 stay."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    return func(*args, **kwargs)


def _in_single(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    return _in_dtype(torch.float32, func, args, kwargs)


def _in_autocasts(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    return _in_dtype(torch.get_autocast_dtype("cpu"), func, args, kwargs)


def _in_the_widest(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    single = any(tensor.dtype == torch.float32 for tensor in given)
    return _in_single(func, args, kwargs) if single else func(*args, **kwargs)


def _into_single(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Return the result in fp32, unless the caller chooses a dtype."""
    given = (*args, *kwargs.values())
    first = next(x for x in given if isinstance(x, Tensor))
    if first.dtype in (torch.float16, torch.bfloat16) and not any(isinstance(x, torch.dtype) for x in given):
        kwargs["dtype"] = torch.float32
    return func(*args, **kwargs)


def _as_they_are(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Call unchanged: fp32 by the CPU's list, not by CUDA's."""
    return func(*args, **kwargs)


_CASTS: Mapping[str, Cast] = {
    name: cast
    for cast, names in (
        (
            _in_single,
            "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow __pow__ __rpow__ "
            "float_power square softplus layer_norm native_layer_norm rms_norm group_norm frobenius_norm nuclear_norm "
            "cosine_similarity dist pdist renorm logsumexp upsample interpolate",
        ),
        (_into_single, "softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm sum"),
        (_in_autocasts, "addmv addr mv chain_matmul multi_dot linalg_multi_dot lstm_cell gru_cell"),
        (_in_the_widest, "addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot scatter_add"),
        (
            _as_they_are,
            "adaptive_avg_pool3d adaptive_max_pool3d avg_pool3d max_pool3d fractional_max_pool2d pad quantile "
            "nanquantile polar stft trace view_as_complex",
        ),
    )
    for name in names.split()
}
