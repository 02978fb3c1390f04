"""Merge maths: arrays in, arrays out. METHODS is the one table of what can be asked for."""

from mergelab.methods.averages import LINEAR, PASSTHROUGH
from mergelab.methods.base import Method
from mergelab.methods.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from mergelab.methods.della import DELLA, DELLA_LINEAR
from mergelab.methods.fusion import ARCEE_FUSION, NEARSWAP
from mergelab.methods.nuslerp import NUSLERP
from mergelab.methods.ram import RAM, RAMPLUS_TL
from mergelab.methods.sce import SCE
from mergelab.methods.spherical import KARCHER, MULTISLERP, SLERP
from mergelab.methods.stock import MODEL_STOCK
from mergelab.methods.task_vectors import DARE_LINEAR, DARE_TIES, TASK_ARITHMETIC, TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        TASK_ARITHMETIC,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        SCE,
        RAM,
        RAMPLUS_TL,
        MODEL_STOCK,
        NEARSWAP,
        ARCEE_FUSION,
        PASSTHROUGH,
    )
}
