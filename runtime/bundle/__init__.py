"""The bundle on disk: its manifest, opening and writing the folder, the memory that it needs."""
