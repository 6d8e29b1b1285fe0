"""The machine code of `ema.compiled`, by `numba`: pieces of a table of addresses, taken by whichever thread is free.

A few elements at once are written in the compiler's own vectors, which any processor has in registers of some width.
Wider ones, and what it makes of a loop over elements, take whole cache lines ahead: on the processor that this was
measured on that is a sixth slower, memory being the limit.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, cast

import numpy as np
import torch

HEADER = ("next piece", "pieces", "rows", "weight")
"""What a table begins with, in int64; the weight is the bits of a float32. The first row of every piece and the number
of rows follow, then the rows: address in the shadow, address in the source, elements."""
NEXT, PIECES, ROWS, WEIGHT = range(len(HEADER))
COLUMNS = 3

_BLOCK = 8
"""Elements of one turn of the loop: half a cache line of float32."""


@functools.cache
def kernel(dtype: torch.dtype) -> Any:
    """Compiles `s <- s + weight * (p - s)` by sources of a dtype, float32 or bfloat16, once in a process.

    Returns:
        A C function of the address of a table (attribute `address`). As many threads as like may call it at once; it
        returns when no piece is left to take.
    """
    # Their own types speak of what the compiler sees, not of what Python does.
    numba, core, extending, ir = (
        cast(Any, importlib.import_module(name)) for name in ("numba", "numba.core", "numba.extending", "llvmlite.ir")
    )
    types = core.types
    compiled = functools.partial(numba.njit, nogil=True, fastmath={"contract"}, error_model="numpy")
    is_full = dtype == torch.float32
    stored, size = (np.float32, 4) if is_full else (np.uint16, 2)
    floats, integers, halves = (
        ir.VectorType(kind, _BLOCK) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(16))
    )

    # `carray` takes an address as a pointer only.
    @extending.intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], core.cgutils.voidptr_t)

        return types.voidptr(types.int64), generate

    @extending.intrinsic
    def take_one(typing_context: Any, counter: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = ir.IntType(64)
            return builder.atomic_rmw(
                "add", builder.bitcast(arguments[0], number.as_pointer()), number(1), "monotonic"
            )

        return types.int64(types.voidptr), generate

    contract = ("contract",)  # a fused multiply-add, as PyTorch's

    def block(*, from_shadow: bool) -> Any:
        """A block in registers, as many and as wide as the processor has."""

        @extending.intrinsic
        def move(typing_context: Any, shadow: Any, source: Any, weight: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                place = builder.inttoptr(arguments[0], floats.as_pointer())
                old = builder.load(place, align=4)
                if is_full:
                    new = builder.load(builder.inttoptr(arguments[1], floats.as_pointer()), align=4)
                else:
                    bits = builder.load(builder.inttoptr(arguments[1], halves.as_pointer()), align=2)
                    # bfloat16 is the upper half of float32.
                    bits = builder.shl(builder.zext(bits, integers), integers([16] * _BLOCK))
                    new = builder.bitcast(bits, floats)
                one = builder.insert_element(floats(ir.Undefined), arguments[2], ir.IntType(32)(0))
                weights = builder.shuffle_vector(one, floats(ir.Undefined), integers([0] * _BLOCK))
                way = builder.fmul(weights, builder.fsub(new, old), flags=contract)
                builder.store(builder.fadd(old if from_shadow else new, way, flags=contract), place, align=4)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, types.float32), generate

        return move

    from_shadow, from_source = block(from_shadow=True), block(from_shadow=False)

    @compiled
    def widened(value: Any) -> Any:
        return value if is_full else np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)

    @compiled
    def move(shadow: Any, source: Any, length: Any, weight: Any) -> None:
        # `torch.lerp` starts from the end that is nearer, so that a weight near one loses no digits.
        near = abs(weight) < np.float32(0.5)
        rest = weight - np.float32(1.0)
        whole = length // _BLOCK * _BLOCK
        if near:
            for i in range(0, whole, _BLOCK):
                from_shadow(shadow + 4 * i, source + size * i, weight)
        else:
            for i in range(0, whole, _BLOCK):
                from_source(shadow + 4 * i, source + size * i, rest)
        shadows = numba.carray(pointer(shadow), (length,), np.float32)
        sources = numba.carray(pointer(source), (length,), stored)
        for i in range(whole, length):
            old, new = shadows[i], widened(sources[i])
            shadows[i] = old + weight * (new - old) if near else new + rest * (new - old)

    def update(data: Any) -> None:
        header = numba.carray(data, (len(HEADER),), np.int64)
        pieces, rows = header[PIECES], header[ROWS]
        weight = np.uint32(header[WEIGHT]).view(np.float32)
        first = len(HEADER) + pieces + 1
        table = numba.carray(data, (first + COLUMNS * rows,), np.int64)
        piece = take_one(data)
        while piece < pieces:
            at = len(HEADER) + piece
            for row in range(table[at], table[at + 1]):
                start = first + COLUMNS * row
                move(table[start], table[start + 1], table[start + 2], weight)
            piece = take_one(data)

    return numba.cfunc(types.void(types.voidptr), nopython=True, fastmath={"contract"}, error_model="numpy")(update)
