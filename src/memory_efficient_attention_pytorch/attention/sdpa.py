"""Call PyTorch's ``scaled_dot_product_attention`` where it computes a request exactly and without n × m memory."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals.tensors import is_fake, is_transformed
from .cpu_kernel import unit_stride
from .log_sum_exp import less_level, rounded_away
from .request import IMMODERATE, LARGEST_BIAS, ROUNDED_AWAY, AttentionRequest
from .tiles import Scores
from .way import OF_SCORE, Way


class Fused(Way):
    """Applies one of PyTorch's fused kernels to the whole request."""

    backend = "fused"
    merit = "PyTorch's fused kernel computes exactly this"

    def drawback(self, request: AttentionRequest) -> str | None:
        mask = request.visibility.mask
        return "it would convert the n × m mask to floating point" if mask is not None and mask.shape[2] > 1 else None


class Sdpa(Fused):
    """Calls the public function, which does not return the log-sum-exp."""

    name = "sdpa"
    by_autograd = True

    def objection(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        reason = not_whole(request)
        if reason is not None:
            return reason
        kernels = fused_kernels(request, q, k, v)
        if "cudnn" in kernels and not request.visibility.plain_causal:
            # It reads keys beyond the last as zeros, unless causality hides them: exp(0 − lse) overflows.
            return "PyTorch may take cuDNN's kernel, whose gradients may be NaN (pytorch issue 196678)"
        if kernels - {"cudnn"}:
            return None
        if request.device_type == "cuda":
            return f"no CUDA kernel takes {request.dtype}, width {request.d} with these arguments"
        return f"no fused kernel with a backward pass is known for device type {request.device_type!r}"

    def forward(self, request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        mask, causal, grouped = whole_mask(request), request.visibility.plain_causal, request.h != request.kv
        attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
        first = request.device_type == "cuda" and _is_first_pass()
        heads = _wanting_gradients(q, k, v) if first else (q, k, v)
        with torch.set_grad_enabled(first or torch.is_grad_enabled()):
            out: Tensor = attend(*unit_stride(*heads), scale=request.scale)
        return (out.detach() if first else out,)


def _is_first_pass() -> bool:
    """Return whether gradients are off where a repetition with gradients may follow.

    PyTorch chooses a CUDA kernel by whether gradients are wanted: some have no backward pass for wide heads, and
    cuDNN's may round otherwise without the log-sum-exp. So both passes want them.
    """
    off = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return off and not torch.compiler.is_compiling()


def _wanting_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def not_whole(request: AttentionRequest) -> str | None:
    """Return why PyTorch's kernels cannot compute the request as a whole on any device; None if they can."""
    visibility, bias = request.visibility, request.bias
    if request.return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if request.device_type == "cpu" and not request.moderate:
        return IMMODERATE
    if request.dropout:
        return "dropout: the kernels draw other masks than the tiles, and on a CPU they hold the whole score matrix"
    if request.d != request.e:
        return f"q and v differ in width ({request.d} and {request.e})"
    if visibility.function is not None:
        return "a mask function would have to be evaluated for all n × m positions at once"
    if visibility.document_ids is not None:
        return "document_ids need a mask of n × m"
    if request.device_type == "cpu" and visibility.plain_causal and not request.scale > 0:
        return "PyTorch's CPU kernel multiplies hidden scores, −∞, by the scale, which is not positive"
    if not (visibility.structurally_trivial or visibility.plain_causal):
        return "the window, or causality together with a mask or with unequal lengths, needs a mask of n × m"
    if bias is not None:
        if bias.of_score:
            return OF_SCORE
        if bias.tensor is None and request.n > 1:
            return "a bias module would have to be evaluated for all n × m positions at once"
        if bias.wants_gradient:
            return "where the bias requires a gradient, PyTorch holds the whole score matrix"
        if not visibility.trivial and request.n > 1:
            return "bias and mask or causality together need a mask of n × m"
        if bias.tensor is not None and bias.tensor.dtype != request.dtype:
            return f"the bias's dtype {bias.tensor.dtype} is not that of q, {request.dtype}"
    if 0 in (request.b, request.n, request.m):
        return "there is nothing to attend"
    if bias is not None and request.device_type == "cpu":
        if is_transformed():
            return "whether scores count beside a bias cannot be looked at within a transform of torch.func"
        if rounded_away(_bias_and_mask(request).amax(-1)) is not None:
            return f"beside a row's biases, all beyond {ROUNDED_AWAY:.0e}, its scores count as equal"
    return None


def whole_mask(request: AttentionRequest) -> Tensor | None:
    """Return the ``attn_mask`` for the public function: the bool mask, or the bias.

    For a single query the bias is one row, which may come from a module and be combined with a mask.
    """
    if request.bias is None:
        return request.visibility.mask
    added = _bias_and_mask(request)
    # The kernels keep a row's log-sum-exp in fp32, and with it the level of its biases. A CPU checks the level first,
    # if values are known; elsewhere the host would have to wait, and the kernels read a mask as being of q's dtype.
    known = request.device_type == "cpu" and not is_fake(added) and not torch.compiler.is_compiling()
    if known and bool((added.amax(-1).abs() <= LARGEST_BIAS).all()):
        return added
    return less_level(added)[0].to(request.dtype if request.device_type != "cpu" else added.dtype)


def _bias_and_mask(request: AttentionRequest) -> Tensor:
    added = Scores.all_of(request).added(request.compute_dtype if request.n == 1 else request.dtype)
    assert added is not None
    return added


def fused_kernels(request: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> set[str]:
    """Return PyTorch's fused kernels that take the whole request: ``"cpu"``, or some of ``"flash"``, ``"efficient"``,
    ``"cudnn"``.

    On CUDA PyTorch decides, which knows the device; without a device (in a dry run) :func:`cuda_kernels` does.
    """
    if request.device_type != "cuda":
        return {"cpu"} & {request.device_type}
    # Of a mask only shape and dtype count, and those of a bias for many queries are the tensor's own.
    of_many = request.bias if request.n > 1 else None
    mask, grouped = whole_mask(request) if of_many is None else of_many.tensor, request.h != request.kv
    if q.is_cuda and torch.cuda.is_available() and not is_fake(q):
        q, k, v = _wanting_gradients(q, k, v) if _is_first_pass() else (q, k, v)
        params = torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, request.visibility.plain_causal, grouped)
        found = {
            "flash": torch.backends.cuda.can_use_flash_attention(params),
            "efficient": torch.backends.cuda.can_use_efficient_attention(params),
            "cudnn": torch.backends.cuda.can_use_cudnn_attention(params),
        }
        return {name for name, serves in found.items() if serves}
    return cuda_kernels(request.dtype, (request.d, request.e), mask is not None, grouped)


def cuda_kernels(dtype: torch.dtype, widths: tuple[int, int], masked: bool, grouped: bool) -> set[str]:
    """Return those of ``"flash"`` and ``"efficient"`` that take such arguments, by PyTorch's published conditions.

    widths: of q and of v. grouped: there are fewer key than query heads.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    found = {"flash"} if half and not masked and widths[0] == widths[1] <= 256 else set()
    aligned = all(width % (8 if half else 4) == 0 for width in widths)
    return found | ({"efficient"} if aligned and not grouped and (half or dtype == torch.float32) else set())
