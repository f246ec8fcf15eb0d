"""E2M1, the 4-bit floats of MXFP4 and NVFP4: 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign.

Zero and minus zero are one level, so there are 15: codes are 0 (for -6) to 14 (for 6), and 7 is zero. A middle between two
levels goes to the one with an even mantissa (0, 1, 2 or 4), as IEEE 754 rounds; beyond 6 all is 6.
"""

import torch

from quantease.grids.levels import thresholds_of

LARGEST = 6.0
_POSITIVE = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, LARGEST]
_EVEN = {0.0, 1.0, 2.0, 4.0}
LEVELS = torch.tensor([*(-level for level in reversed(_POSITIVE)), 0.0, *_POSITIVE])
THRESHOLDS = thresholds_of(LEVELS, lambda lower: abs(LEVELS[lower + 1].item()) in _EVEN)
