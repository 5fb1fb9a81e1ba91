"""The head on CUDA for narrow models: logits are formed in registers and never written.

Below a width of about 2,000 a head's time is that of reading and writing float32 logits, not of its matrix products.
One kernel computes a tile of logits, and of these only the log-sum-exp and the target's logit (online softmax: tiles of
the vocabulary are merged by their log-sum-exp). Another computes the tile again and writes the gradient with respect to
logits, in the working dtype, which two ordinary matrix products take on. The arithmetic is that of
:mod:`prefopt.model.kernels.head`, its oracle: products accumulated in float32, the one-hot subtracted before rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefopt.model.kernels.head import HeadGradients
from prefopt.model.kernels.head_device import aligned, tiles


class Blocks(NamedTuple):
    """Rows and columns of a tile, and the part of the width that is added at once."""

    rows: int = 128
    columns: int = 128
    width: int = 64


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    rows,
    columns,
    M,
    V,
    H,
    stride_h,
    stride_w,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Logits of a tile, float32 [ROWS, COLUMNS]; -inf beyond the vocabulary."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    h_rows, w_rows = rows.to(tl.int64)[:, None] * stride_h, columns.to(tl.int64)[None, :] * stride_w
    for start in range(0, H, WIDTH):
        inner = start + tl.arange(0, WIDTH)
        h = tl.load(hidden + h_rows + inner[None, :], mask=(rows[:, None] < M) & (inner[None, :] < H), other=0.0)
        w = tl.load(weight + w_rows + inner[:, None], mask=(columns[None, :] < V) & (inner[:, None] < H), other=0.0)
        z = tl.dot(h, w, z, input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    z *= scale
    if HAS_CAP:
        decay = tl.exp(-2 * tl.abs(z) / cap)  # tanh without overflow
        z = tl.where(z < 0, -cap, cap) * (1 - decay) / (1 + decay)
    return tl.where(columns[None, :] < V, z, -float("inf"))


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    bias,
    target,
    lse,
    square,
    chosen,
    M,
    V,
    H,
    stride_h,
    stride_w,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Log-sum-exp of each row of a tile, [tiles, M]; of twice the logits too; and the logit [M] of the target."""
    # Programs that run together share their columns: the weight is read from memory once.
    tile, block = tl.program_id(0) // tl.cdiv(M, ROWS), tl.program_id(0) % tl.cdiv(M, ROWS)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    z = _logits(
        hidden, weight, bias, rows, columns, M, V, H, stride_h, stride_w, scale, cap,
        HAS_BIAS, HAS_CAP, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    top = tl.max(z, 1)
    shifted = z - top[:, None]
    inside, place = rows < M, tile.to(tl.int64) * M + rows
    tl.store(lse + place, top + tl.log(tl.sum(tl.exp(shifted), 1)), mask=inside)
    if SQUARES:
        tl.store(square + place, 2 * top + tl.log(tl.sum(tl.exp(2 * shifted), 1)), mask=inside)
    y = tl.load(target + rows, mask=inside, other=-1)
    logit = tl.sum(tl.where(columns[None, :] == y[:, None], z, 0.0), 1)
    here = (y >= tile * COLUMNS) & (y < (tile + 1) * COLUMNS)
    tl.store(chosen + rows, logit, mask=inside & here)


@triton.jit
def _slope_kernel(
    hidden,
    weight,
    bias,
    target,
    lse,
    factor,
    slope,
    M,
    V,
    H,
    stride_h,
    stride_w,
    stride_s,
    scale,
    cap,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``factor`` [M] times d logp / d (h W^T + b), [M, V], rounded once."""
    tile, block = tl.program_id(0) // tl.cdiv(M, ROWS), tl.program_id(0) % tl.cdiv(M, ROWS)
    rows, columns = block * ROWS + tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    z = _logits(
        hidden, weight, bias, rows, columns, M, V, H, stride_h, stride_w, scale, cap,
        HAS_BIAS, HAS_CAP, ROWS, COLUMNS, WIDTH,
    )  # fmt: skip
    inside = rows < M
    y = tl.load(target + rows, mask=inside, other=-1)
    hit = tl.where(columns[None, :] == y[:, None], 1.0, 0.0)
    d = hit - tl.exp(z - tl.load(lse + rows, mask=inside, other=0.0)[:, None])
    if HAS_CAP:
        bent = tl.where(columns[None, :] < V, z / cap, 0.0)
        d *= 1 - bent * bent
    d *= tl.load(factor + rows, mask=inside, other=0.0)[:, None] * scale
    place = slope + rows.to(tl.int64)[:, None] * stride_s + columns[None, :]
    tl.store(place, d.to(slope.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < V))


class FusedHead(NamedTuple):
    """A head and how it is computed: weight [V, H], bias [V]; ``scale`` and ``softcap`` of its logits."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    blocks: Blocks = Blocks()

    def forward(self, hidden: Tensor, target: Tensor, *, squares: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability [M] of targets, log-sum-exp [M], and the log of the sum of squared probabilities [M] (or
        nothing), float32."""
        vocabulary = -(-len(self.weight) // self.blocks.columns)
        lse = hidden.new_empty(vocabulary, len(hidden), dtype=torch.float32)
        square = torch.empty_like(lse) if squares else lse
        chosen = torch.empty_like(lse[0])
        self._launch(_forward_kernel, hidden, (target, lse, square, chosen), (), SQUARES=squares)
        whole = lse.logsumexp(0)
        return chosen - whole, whole, square.logsumexp(0) - 2 * whole if squares else whole.new_empty(0)

    def slopes(self, hidden: Tensor, target: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
        """``factor`` [M] times d logp / d (h W^T + b), [M, V] in the dtype of ``hidden``."""
        slope = aligned(len(hidden), len(self.weight), hidden.dtype, hidden.device)
        given = (target, lse.contiguous(), factor.float().contiguous(), slope)
        self._launch(_slope_kernel, hidden, given, (slope.stride(0),))
        return slope

    def _launch(
        self, kernel: Any, hidden: Tensor, given: tuple[Tensor, ...], strides: tuple[int, ...], **more: Any
    ) -> None:
        (rows, width), vocabulary = hidden.shape, len(self.weight)
        if not rows:
            return
        assert hidden.stride(1) == self.weight.stride(1) == 1
        tile = dict(zip(("ROWS", "COLUMNS", "WIDTH"), self.blocks, strict=True))
        flags = {"HAS_BIAS": self.bias is not None, "HAS_CAP": self.softcap is not None}
        grid = (triton.cdiv(rows, self.blocks.rows) * triton.cdiv(vocabulary, self.blocks.columns),)
        bias = self.weight if self.bias is None else self.bias
        numbers = (rows, vocabulary, width, hidden.stride(0), self.weight.stride(0), *strides)
        kernel[grid](
            hidden, self.weight, bias, *given, *numbers, self.scale, self.softcap or 1.0,
            **flags, **more, **tile, num_warps=8, num_stages=3,
        )  # fmt: skip


def fused_logprobs(hidden: Tensor, head: FusedHead, target: Tensor, *, squares: bool = False) -> tuple[Tensor, Tensor]:
    """See :func:`prefopt.model.kernels.head.token_logprobs`."""
    arguments = (hidden, head.weight, head.bias, target, head, squares, torch.is_grad_enabled())
    return cast(tuple[Tensor, Tensor], _FusedLogprobs.apply(*arguments))  # type: ignore[no-untyped-call]


class _FusedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: FusedHead,
        squares: bool,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        logp, lse, square = head.forward(hidden, target, squares=squares)
        head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        ctx.slope, ctx.head = None, head
        if grad and not head_trains and hidden.requires_grad:
            ctx.slope, once = torch.empty_like(hidden), torch.ones_like(lse)
            for part in tiles(len(target), len(weight), hidden.device):
                ctx.slope[part] = head.slopes(hidden[part], target[part], lse[part], once[part]) @ weight
        if grad:
            ctx.save_for_backward(hidden, weight, bias, target, lse)
        ctx.mark_non_differentiable(square)
        return logp, square

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, _ = grads
        hidden, weight, bias, target, lse = ctx.saved_tensors
        if ctx.slope is not None:
            return (ctx.slope * g[:, None]).to(ctx.slope.dtype), *(None,) * 6
        head = ctx.head._replace(weight=weight, bias=bias)
        gradients = HeadGradients(ctx.needs_input_grad, hidden, weight, bias)
        for part in tiles(len(target), len(weight), hidden.device):
            gradients.add(part, head.slopes(hidden[part], target[part], lse[part], g[part]))
        return *gradients.rounded(), *(None,) * 4
