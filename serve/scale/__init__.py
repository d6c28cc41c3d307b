"""The server on more than one machine: one door, and replicas of each bundle behind it, on a Ray cluster."""
