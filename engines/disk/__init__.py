"""Files and folders on disk: opened only if regular, written whole, locked while it lasts."""
