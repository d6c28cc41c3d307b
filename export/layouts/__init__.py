"""Other folders than a bundle: a verified bundle, laid out for a runtime that its users have already."""
