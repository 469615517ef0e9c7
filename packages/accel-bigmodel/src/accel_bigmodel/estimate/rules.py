"""What a run on a GPU does otherwise than one on the CPU, for fakes that only say where they lie.

Three rules decide how much such a run keeps for its backward, and each is torch's own:

* Attention (``scaled_dot_product_attention``) takes the first kernel that can do it: flash (half precision, no mask,
  heads up to 256), memory-efficient (any precision, a mask, as many key as query heads), or plain operators, which keep
  the whole matrix of scores (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
* Dropout keeps one byte an element (``native_dropout``), where the CPU keeps the noise in the dtype of the input.
* Autocast computes a list of operators in float32 (aten/src/ATen/autocast_mode.h), more than on the CPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["Attention", "CudaRules"]

Attention = Literal["auto", "flash", "efficient", "math"]

_FLASH_HEAD_DIM = 256
_DROPOUT = inspect.signature(functional.dropout)
_IN_FLOAT32 = frozenset(
    {
        "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div",
        "binary_cross_entropy_with_logits", "cosine_similarity", "softmax", "log_softmax", "softmin", "softplus",
        "layer_norm", "group_norm", "norm", "cumsum", "cumprod", "prod", "sum", "pow", "exp", "log", "rsqrt",
        "reciprocal",
    }
)  # fmt: skip
"""Functions whose inputs autocast converts to float32 on a GPU, as far as models call them."""


class CudaRules(TorchFunctionMode):
    """While entered, attention, dropout and autocast keep what they keep on a GPU.

    Args:
        attention: which kernel attention takes; ``"auto"`` as torch chooses.
        autocast: whether autocast is on, for fakes on the CPU that stand for a GPU's.
    """

    def __init__(self, *, attention: Attention = "auto", autocast: bool = False) -> None:
        super().__init__()
        self._attention = attention
        self._autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **given)
        if func is functional.dropout:
            return _dropout(*args, **given)
        if self._autocast and getattr(func, "__name__", "") in _IN_FLOAT32:
            args, given = tree_map(_widened, (args, given))
        return func(*args, **given)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled(query.device.type):
            narrow = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        triple = (query, key, value)
        kernel = self._kernel(*triple, attn_mask)
        if kernel == "flash":
            # The kernel takes heads of a multiple of 8; torch pads them around it and cuts the result.
            size = value.size(-1)
            padded = [_padded(each) for each in triple]
            flash: Callable[..., Any] = torch.ops.aten._scaled_dot_product_flash_attention
            result: torch.Tensor = flash(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return result if result.size(-1) == size else result[..., :size]
        if kernel == "efficient":
            bias = attn_mask
            if bias is not None and bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(bias.logical_not(), float("-inf"))
            if bias is not None:
                bias = bias.expand(query.size(0), query.size(1), query.size(2), key.size(2))
            efficient: Callable[..., Any] = torch.ops.aten._scaled_dot_product_efficient_attention
            keeps = torch.is_grad_enabled() and any(each.requires_grad for each in triple)
            return efficient(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]
        plain: Callable[..., Any] = torch.ops.aten._scaled_dot_product_attention_math
        return plain(  # type: ignore[no-any-return]
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]

    def _kernel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> Attention:
        if self._attention != "auto":
            return self._attention
        half = query.dtype in (torch.float16, torch.bfloat16)
        if query.dim() != 4:
            return "math"
        if half and mask is None and max(query.size(-1), value.size(-1)) <= _FLASH_HEAD_DIM:
            return "flash"
        alike = query.size(1) == key.size(1) == value.size(1)
        return "efficient" if alike else "math"


def _padded(heads: torch.Tensor) -> torch.Tensor:
    missing = -heads.size(-1) % 8
    return functional.pad(heads, (0, missing)) if missing else heads


def _dropout(*args: Any, **kwargs: Any) -> torch.Tensor:
    given = _DROPOUT.bind(*args, **kwargs)
    given.apply_defaults()
    values = given.arguments
    if values["inplace"] or not values["training"] or values["p"] == 0.0:
        return functional.dropout(*args, **kwargs)
    result: torch.Tensor = torch.native_dropout(values["input"], values["p"], True)[0]
    return result


def _widened(leaf: Any) -> Any:
    narrow = isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if narrow else leaf
