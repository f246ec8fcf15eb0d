"""Everything that touches models, data, disks and clocks."""

import os

# Waiting OpenMP threads spin for long by default: on a machine with other work that makes a loop of small operations up
# to a hundred times slower. Not to spin at all makes it twice as slow on an idle one. This is long enough for the next
# operation and no longer. It only takes effect before torch is imported, which is why it stands here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
