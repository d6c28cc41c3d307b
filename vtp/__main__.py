"""`python -m vtp COMMAND` is `vtp COMMAND`."""

from __future__ import annotations

import sys

from vtp.entry import main

if __name__ == "__main__":
    sys.exit(main())
