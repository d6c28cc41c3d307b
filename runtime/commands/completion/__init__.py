"""Completion of the commands in shells: scripts made of the commands' own parsers."""
