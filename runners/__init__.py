"""Everything that touches models, data, disks and clocks."""

import os

# Waiting OpenMP threads spin by default; on a machine with other work that makes a loop of small operations up to fifty
# times slower. It only takes effect before torch is imported, which is why it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
