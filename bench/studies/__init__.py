"""Studies behind the project's own decisions; not shipped."""
