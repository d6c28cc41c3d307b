"""Pictures of coloured shapes, made from a seed."""
