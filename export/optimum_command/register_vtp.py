"""Makes `optimum-cli export vtp` the same command as `vtp-export`."""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class VtpExportCommand(BaseOptimumCLICommand):
    """Export a vision-language model to a bundle with visual token pruning."""

    COMMAND = CommandInfo(name="vtp", help="Export a vision-language model with visual token pruning (vtp).")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Add vtp-export's own flags."""
        from vtp.export.cli import add_arguments

        add_arguments(parser)

    def run(self) -> None:
        """Run vtp-export and leave with its exit code."""
        from vtp.export.cli import run

        sys.exit(run(self.args))


REGISTER_COMMANDS = [(VtpExportCommand, ExportCommand)]
