"""The commands that work on a bundle: vtp-run, vtp-build, vtp-doctor, and what commands share."""
