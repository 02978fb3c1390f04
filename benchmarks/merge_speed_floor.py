"""The I/O floor of a merge: read every input byte, write every output byte, nothing else.

Two threads go over blocks of the output: each reads its block's share of every input with preadv
into one reused buffer and writes the block with pwritev to a file of full size. Run as
`merge_speed_floor.py OUT BYTES_OUT BYTES_IN [--sync] INPUT...`: BYTES_IN are read of every input,
and --sync waits until the output is on the disk."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

BLOCK = 2**21
THREADS = 2


def copy(target: int, total: int, wanted: int, inputs: list[int], number: int) -> None:
    """Thread `number`: every THREADS-th block of the output, with its share of the inputs."""
    blocks = -(-max(total, wanted) // BLOCK)
    buffer = memoryview(bytearray(BLOCK))
    for block in range(number, blocks, THREADS):
        start = block * BLOCK
        for source in inputs:
            move(os.preadv, source, buffer, start, wanted)
        move(os.pwritev, target, buffer, start, total)


def move(
    call: Callable[[int, list[memoryview], int], int],
    file: int,
    buffer: memoryview,
    start: int,
    end: int,
) -> None:
    """Read or write [start, start + BLOCK), cut at `end`, whatever a single call manages."""
    stop = min(start + BLOCK, end)
    while start < stop:
        done = call(file, [buffer[: stop - start]], start)
        if not done:
            raise SystemExit("an input is shorter than said")
        start += done


def main() -> None:
    """Read and write as the arguments say."""
    out, total, wanted, *rest = sys.argv[1:]
    sync = rest[0] == "--sync"
    inputs = [os.open(path, os.O_RDONLY) for path in rest[sync:]]
    target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.ftruncate(target, int(total))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda n: copy(target, int(total), int(wanted), inputs, n), range(THREADS)))
    if sync:
        os.fsync(target)


if __name__ == "__main__":
    main()
