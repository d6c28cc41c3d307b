"""make soak: one process that answers for an hour; resident memory, descriptors and threads must not grow.

    python -m tests.soak [--seconds N] [--bundles A B] [--seed N]

One summary line; exit code 1 where something grew, or where the same question was answered in two ways.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from ..kill.bundles import make_bundles
from .growth import ask, course, grown
from .requests import Asker


def main() -> int:
    """See the module's words."""
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, metavar="N", help="how long (%(default)s)")
    parser.add_argument("--bundles", nargs=2, type=Path, metavar="DIR", help="two that differ")
    parser.add_argument("--least", type=int, default=300, metavar="N", help="requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vtp-soak-") as name:
        bundles = tuple(args.bundles) if args.bundles else make_bundles(Path(name))
        asker = Asker((bundles[0], bundles[1]), Path(name), args.seed)
        done, samples = ask(asker.kinds, args.seconds, args.least, random.Random(args.seed))
        asker.close()
    bad = [*grown(samples), *asker.wrong]
    for line in bad[:20]:
        print(f"bad: {line}")
    print(
        f"soak: {args.seconds:g} s, {sum(done.values())} requests "
        f"({', '.join(f'{often} {kind}' for kind, often in sorted(done.items()))}); "
        f"{course(samples)}; {len(bad)} bad (seed {args.seed})"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
