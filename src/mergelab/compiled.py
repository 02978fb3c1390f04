"""Compiled kernels as object files: compiled once for this processor, then loaded without numba.

numba compiles a kernel when it first meets arguments of these types (compiler.py). From then on
llvmlite loads the object file, without numba, which would take .2 s and 30 MB. Object files lie
under $XDG_CACHE_HOME/mergelab/kernels, by versions, processor, and the code that is compiled."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import xxhash

from mergelab.folders import cache_folder

NAME = "kernel"  # the function in an object file
HELPERS = {  # by prefix of their functions: extensions that need nothing else of numba
    "NRT_": "numba.core.runtime._nrt_python",  # its allocator
    "numba_": "numba._helperlib",
}
TYPES: dict[str, Any] = {
    "bool": ctypes.c_bool,
    **{f"int{bits}": getattr(ctypes, f"c_int{bits}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": getattr(ctypes, f"c_uint{bits}") for bits in (8, 16, 32, 64)},
    "float32": ctypes.c_float,
    "float64": ctypes.c_double,
}
_number = itertools.count()  # no two libraries have one name
FINE = (0, -2)  # what a function that numba compiled returns: with a result, without one


def kind(arg: Any) -> str:
    """What code depends on: "float32_2_C" is an array in C order, "float32_2_A" one with any
    strides, unaligned with a "u", read-only with an "r"; "float32" is a number, "type_float32"
    np.float32 itself. Raises TypeError for other arguments."""
    is_type = isinstance(arg, type) and issubclass(arg, np.generic)
    is_array = isinstance(arg, np.ndarray) and arg.dtype.isnative
    if is_array or is_type or isinstance(arg, bool | int | float | np.generic):
        name = np.dtype(arg.dtype if is_array else arg if is_type else type(arg)).name
        if name in TYPES and is_array:
            flags = arg.flags
            layout = "C" if flags.c_contiguous else "A"
            rest = "u" * (not flags.aligned) + "r" * (not flags.writeable)
            return f"{name}_{arg.ndim}_{layout}{rest}"
        if name in TYPES:
            return f"type_{name}" if is_type else name
    raise TypeError(f"a kernel takes arrays, numbers and numpy types, not {arg!r}")


@functools.cache
def load(kernel: Any, kinds: tuple[str, ...]) -> Callable[..., Any]:
    """A kernel (kernels.py) for arguments of such kinds, compiled if it never was."""
    key = digest(kernel.function, *kinds)
    file = folder() / f"{kernel.name.removeprefix('mergelab.')}-{key}"
    kept = read(file)
    if kept is None:
        from mergelab.compiler import compiled

        kept = b"\n".join(compiled(kernel, kinds))
        write(file, kept)
    result, _, code = kept.partition(b"\n")
    return linked(kernel.name, kinds, result.decode(), code)


def digest(*parts: object) -> str:
    """16 hexadecimal digits of texts and of functions: their code and all that it names."""
    found = hashlib.sha256()
    seen: dict[int, int] = {}

    def add(part: Any) -> None:
        if hasattr(part, "function"):  # a kernel
            part = part.function
        if isinstance(part, FunctionType | CodeType) and id(part) in seen:
            part = seen[id(part)]
        if isinstance(part, FunctionType):
            seen[id(part)] = len(seen)
            add(part.__code__)
            for name in part.__code__.co_names:
                add((name, part.__globals__.get(name)))
        elif isinstance(part, CodeType):
            seen[id(part)] = len(seen)
            found.update(part.co_code)
            add((*part.co_consts, *part.co_names, *part.co_varnames))
        elif isinstance(part, tuple):
            found.update(b"(%d" % len(part))
            for one in part:
                add(one)
        elif isinstance(part, np.ndarray):
            add((str(part.dtype), part.shape, part.tobytes()))
        else:
            told = getattr(part, "__name__", None) or repr(part)  # of a module or type: its name
            found.update(f"{type(part).__name__} {told}\0".encode())

    add(parts)
    return found.hexdigest()[:16]


@functools.cache
def folder() -> Path:
    """Where object files are kept: of these versions, this processor and these settings."""
    from importlib.metadata import version

    import llvmlite.binding as llvm

    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    versions = version("numba"), version("llvmlite"), sys.version
    settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_")))
    own = Path(__file__).with_name("compiler.py").read_text()
    return cache_folder("kernels") / digest(processor, versions, settings, own)


def read(file: Path) -> bytes | None:
    """What `write` kept in a file; None if there is no file, or a damaged one."""
    with suppress(OSError):
        data = file.read_bytes()
        if data[:16] == xxhash.xxh3_128(data[16:]).digest():
            return data[16:]
    return None


def write(file: Path, kept: bytes) -> None:
    """Keep something in a file, after its hash; where that cannot be, nothing is kept."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(xxhash.xxh3_128(kept).digest() + kept)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def signature(kinds: tuple[str, ...]) -> list[Any]:
    """The arguments of a function as numba compiles it.

    Pointers to the result and to an error, then those of the kernel; an array is two pointers to
    its owner, its size, bytes of an entry, data, shape and strides (numba's arraymodel)."""
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    types: list[Any] = [pointer, pointer]
    for one in kinds:
        dtype, *rest = one.split("_")
        if dtype == "type":
            types.append(pointer)
        elif rest:
            types += [pointer, pointer, long, long, pointer, *[long, long] * int(rest[0])]
        else:
            types.append(TYPES[dtype])
    return types


def linked(name: str, kinds: tuple[str, ...], result: str, code: bytes) -> Callable[..., Any]:
    """The function in an object file. It raises RuntimeError if the kernel failed inside."""
    import llvmlite.binding as llvm

    jit, helpers = linker()
    library = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for symbol, address in helpers.items():
        library.import_symbol(symbol, address)
    library.export_symbol(NAME)
    tracker = library.link(jit, f"{name} {next(_number)}")
    function = ctypes.CFUNCTYPE(ctypes.c_int, *signature(kinds))(tracker[NAME])
    error = ctypes.c_void_p()
    returned = TYPES.get(result, ctypes.c_void_p)

    def run(*values: Any, _kept: Any = tracker) -> Any:
        found = returned()
        status = function(ctypes.byref(found), ctypes.byref(error), *values)
        if status not in FINE:
            raise RuntimeError(f"{name}: failed inside ({status}). Is there memory left?")
        return found.value

    return run


@functools.cache
def linker() -> tuple[Any, dict[str, int]]:
    """What loads object files, and the addresses of numba's helpers by name."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    addresses: dict[str, int] = {}
    for prefix, name in HELPERS.items():
        if name not in sys.modules:  # numba, if it is imported later, takes it from there
            numba: Any = find_spec("numba")
            within = Path(numba.origin).parent.joinpath(*name.split(".")[1:-1])
            spec: Any = PathFinder.find_spec(name, [str(within)])
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        found = sys.modules[name].c_helpers
        addresses |= {f"{prefix}{key}": address for key, address in found.items()}
    return llvm.create_lljit_compiler(), addresses
