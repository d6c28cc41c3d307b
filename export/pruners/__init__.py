"""The registry of pruning methods: one file each, found by file name (see CONTRIBUTING.md)."""
