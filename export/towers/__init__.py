"""Reductions inside the vision tower: fewer rows there, all of them given back at its end."""

from vtp.export.towers.base import TowerReduction, TowerShape
from vtp.export.towers.registry import find_reduction, parse_reduction, reduction_names

__all__ = ["TowerReduction", "TowerShape", "find_reduction", "parse_reduction", "reduction_names"]
