"""The kinds of grid that look levels up, by the name that files have of them."""

from quantease.grids.levels import LevelFormat
from quantease.grids.mxfp4 import MXFP4
from quantease.grids.nf4 import NF4
from quantease.grids.nvfp4 import NVFP4

FORMATS: dict[str, LevelFormat] = {kind.name: kind for kind in (NF4(), MXFP4(), NVFP4())}
