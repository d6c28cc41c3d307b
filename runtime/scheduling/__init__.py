"""Many requests over one cache: tickets, the queue, the rows that decode together, the worker."""
