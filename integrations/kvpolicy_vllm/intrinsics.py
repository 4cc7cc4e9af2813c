"""What numba lacks: a hint to the processor, a counter that threads share, arrays at addresses."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic as typed_intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

from kvpolicy.compiler import numba

_BYTE, _INT, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
# numba hands each of these its typing context, which callers leave out.
intrinsic: Any = typed_intrinsic
as_tuple: Any = to_fixed_tuple
"""The first numbers of an array, as many as the second argument says."""

_READ, _TO_ALL_CACHES, _DATA = _INT(0), _INT(3), _INT(1)


@intrinsic
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Fetch the cache line of an array's element; one that does not exist does no harm.

    Processors guess what is read next, but not past the end of a page of virtual memory, which
    two blocks' keys seldom share.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _INT, _INT, _INT])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(hint, [address, _READ, _TO_ALL_CACHES, _DATA])
        return context.get_dummy_value()

    return numba.void(array, numba.intp), generate


@intrinsic
def take(_: Any, counter: Any) -> Any:
    """Add 1 to the first number of an int64 array; give what was there. No two threads get one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("add", data, _LONG(1), "monotonic")

    return numba.int64(counter), generate


@intrinsic
def pointer(_: Any, address: Any, element: Any) -> Any:
    """A pointer to numbers of a type, for `numba.carray`."""
    kind = numba.types.CPointer(element.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(numba.int64, element), generate
