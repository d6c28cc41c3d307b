"""python -m vtp.bench.studies.methods"""

from __future__ import annotations

import sys

from vtp.bench.studies.methods.command import main

if __name__ == "__main__":
    sys.exit(main())
