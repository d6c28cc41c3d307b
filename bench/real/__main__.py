"""python -m vtp.bench.real"""

from __future__ import annotations

import sys

from vtp.bench.real.command import main

if __name__ == "__main__":
    sys.exit(main())
