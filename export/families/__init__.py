"""The families: a folder for each kind of model, a file for each family; the file exposes `FAMILY`."""

from vtp.export.families.registry import families, find_family

__all__ = ["families", "find_family"]
