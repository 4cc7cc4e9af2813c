"""A hint to the processor, for numba: fetch memory that is soon to be read.

Processors guess what is read next, but not past the end of a page of virtual memory, which two
blocks' keys seldom share.
"""

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

_BYTE, _INT = ir.IntType(8), ir.IntType(32)
_READ, _TO_ALL_CACHES, _DATA = _INT(0), _INT(3), _INT(1)


@intrinsic
def prefetch(_: Any, array: Any, index: Any) -> Any:
    """Fetch the cache line of an array's element; one that does not exist does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _INT, _INT, _INT])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(hint, [address, _READ, _TO_ALL_CACHES, _DATA])
        return context.get_dummy_value()

    return numba.void(array, numba.intp), generate
