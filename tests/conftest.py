"""Before torch is imported: tests run side by side, so that each may use one core."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
