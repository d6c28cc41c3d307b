"""What several measurements share: figures, ceilings, operations, energy, memory."""
