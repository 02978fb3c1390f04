"""Merge maths: arrays in, arrays out. METHODS is the one table of what can be asked for."""

from mergelab.methods.averages import LINEAR, PASSTHROUGH, SLERP
from mergelab.methods.base import Method
from mergelab.methods.task_vectors import DARE_LINEAR, DARE_TIES, TASK_ARITHMETIC, TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        TASK_ARITHMETIC,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        PASSTHROUGH,
    )
}
