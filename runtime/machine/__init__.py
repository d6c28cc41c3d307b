"""What this machine is, what its limits leave, and the conditions that a figure belongs to."""
