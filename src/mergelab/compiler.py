"""numba: compiles a kernel to an object file that needs little of numba to run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import sizeof
from types import FunctionType
from typing import Any, cast

from mergelab import kernels
from mergelab.compiled import NAME, TYPES, signature


def compiled(kernel: kernels.Kernel[..., Any], kinds: tuple[str, ...]) -> tuple[bytes, bytes]:
    """The type that a kernel returns ("none", "float64") and its object file."""
    import llvmlite.binding as llvm

    numba = taught()
    function = with_numba(kernel)
    types = tuple(type_of(numba.types, kind) for kind in kinds)
    function.compile(types)
    made = function.overloads[types]
    result = str(made.signature.return_type)
    if result != "none" and result not in TYPES:
        raise TypeError(f"{kernel.name}: returns {result}; a kernel returns one number or nothing")
    module = llvm.parse_assembly(function.inspect_llvm(types))
    for inner in module.functions:
        if inner.name == made.fndesc.llvm_func_name:
            inner.name = NAME
            check(kernel.name, [str(argument.type) for argument in inner.arguments], kinds)
        elif not inner.is_declaration:
            inner.linkage = "internal"  # dropped below, unless the kernel calls it
    *_, processor, features = made.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=processor, features=features, opt=3, reloc="pic", jit=True
    )
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return result.encode(), machine.emit_object(module)


def check(name: str, taken: list[str], kinds: tuple[str, ...]) -> None:
    """Raise RuntimeError if the function does not take what `compiled.linked` gives it."""
    llvm = {"P": "ptr", "f": "float", "d": "double"}
    given = [llvm.get(c._type_, f"i{8 * sizeof(c)}") for c in signature(kinds)]
    if taken != given:
        raise RuntimeError(f"{name}: this numba passes arguments in another way: {taken}, {given}")


def type_of(types: Any, kind: str) -> Any:
    """numba's name for a kind of argument (compiled.kind)."""
    dtype, *rest = kind.split("_")
    if dtype == "type":
        return types.NumberClass(getattr(types, rest[0]))
    if not rest:
        return getattr(types, dtype)
    dimensions, how = rest
    flags = {"readonly": "r" in how, "aligned": "u" not in how}
    return types.Array(getattr(types, dtype), int(dimensions), how[0], **flags)


@functools.cache
def with_numba(kernel: kernels.Kernel[..., Any]) -> Any:
    """The kernel as a function of numba, and so the kernels among its globals."""
    function = cast("FunctionType", kernel.function)
    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        if isinstance(names.get(name), kernels.Kernel):
            names[name] = with_numba(names[name])
    own = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    return taught().njit(nogil=True, error_model="numpy")(own)


@functools.cache
def taught() -> Any:
    """numba, with what Python cannot say: code by an array's type, and the fused multiply-add."""
    with without("scipy.linalg.cython_blas"):
        import numba
        import numba.np.arraymath
    numba.config.DISABLE_JIT = 0
    bfloat16 = numba.types.uint16

    def choose_in(values: Any, model: Any, start: Any, count: Any, out: Any) -> Any:
        return kernels.widen if values.dtype == bfloat16 else kernels.copy_in

    def choose_out(values: Any, count: Any, out: Any, start: Any) -> Any:
        return kernels.narrow if out.dtype == bfloat16 else kernels.copy_out

    def rounded_once(typing: Any, a: Any, b: Any, c: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.fma(*args)

        return c(c, c, c), build

    once = numba.extending.intrinsic(rounded_once)

    def choose_fma(a: Any, b: Any, c: Any) -> Any:
        return lambda a, b, c: once(a, b, c)

    numba.extending.overload(kernels.decode, strict=False)(choose_in)
    numba.extending.overload(kernels.encode, strict=False)(choose_out)
    numba.extending.overload(kernels.fma, strict=False)(choose_fma)
    return numba


@contextmanager
def without(module: str) -> Iterator[None]:
    """Imports inside do not find the module: numba needs scipy's BLAS for `np.dot` in kernels,
    which may not use it (its sums depend on the processor), and it takes long to load."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = cast("Any", None)
    try:
        yield
    finally:
        del sys.modules[module]
