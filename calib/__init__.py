"""vtp.calib: a bundle and a user's own data -> a better choice of how many tokens to keep."""
