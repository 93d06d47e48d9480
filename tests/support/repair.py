"""What Triton's interpreter gets wrong and these tests need right: arithmetic in bfloat16.

The interpreter keeps a bfloat16 as the integer of its bits and hands that to numpy, which adds and
multiplies integers; and its conversion from float32 cuts off instead of rounding to even. Here
every operation on such a value widens it to float32 first and rounds its result, as a GPU does.
Sums and other reductions in bfloat16 are refused: a kernel has to widen before it reduces.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["install"]

_BF16 = tl.bfloat16
_Handle = interpreter.TensorHandle


def install():
    """Replace methods of the interpreter's builder, once in a process."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "rounds_bfloat16", False):
        return
    builder.rounds_bfloat16 = True
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    # Some releases define these apart from cast_impl.
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, value, dtype: self.cast_impl(value, dtype))
    builder.binary_op = _elementwise(builder.binary_op, operands=2)
    builder.unary_op = _elementwise(builder.unary_op, operands=1)
    builder.ternary_op = _elementwise(builder.ternary_op, operands=3)
    builder.create_fma = _elementwise(builder.create_fma, operands=3)
    builder.create_dot = _dot(builder.create_dot)
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32))
    reduce = interpreter.ReduceOps
    reduce.apply_impl = _refuse_bf16(reduce.apply_impl)
    _index_by_element()


def _is_bf16(handle):
    return handle.dtype.scalar == _BF16


def _widen(handle):
    """The same value as float32; other types as they are."""
    if not _is_bf16(handle):
        return handle
    bits = handle.data.astype(np.uint32) << np.uint32(16)
    return _Handle(bits.view(np.float32), tl.float32)


def _narrow(values):
    """float32 rounded to the nearest bfloat16, to even where two are as near."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    last = (bits >> np.uint32(16)) & np.uint32(1)
    with np.errstate(over="ignore"):
        rounded = ((bits + np.uint32(0x7FFF) + last) >> np.uint32(16)).astype(np.uint16)
    return _Handle(np.where(np.isnan(values), np.uint16(0x7FC0), rounded), _BF16)


def _cast(original):
    def cast(self, value, dtype, *options):
        wide = _widen(value)
        if dtype.scalar == _BF16:
            return _narrow(wide.data.astype(np.float32))
        if _is_bf16(value) and dtype.scalar == tl.float32:
            return wide
        return original(self, wide, dtype, *options)

    return cast


def _elementwise(original, operands):
    def apply(self, *arguments):
        handles, rest = arguments[:operands], arguments[operands:]
        # A selection moves bits and has nothing to round.
        if np.where in rest or not any(_is_bf16(handle) for handle in handles):
            return original(self, *arguments)
        found = original(self, *(_widen(handle) for handle in handles), *rest)
        if found.data.dtype == np.bool_:
            return _Handle(found.data, tl.int1)
        return _narrow(found.data)

    return apply


def _dot(original):
    def dot(self, a, b, accumulator, *options):
        return original(self, _widen(a), _widen(b), accumulator, *options)

    return dot


def _refuse_bf16(original):
    def apply(self, values):
        if any(value.dtype.scalar == _BF16 for value in values):
            raise NotImplementedError("a reduction in bfloat16: widen to float32 first")
        return original(self, values)

    return apply


def _index_by_element():
    """Triton 3.6 passes an array of one element to range(), which numpy 2.4 and newer refuse."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched
