"""vtp.calib: a bundle and a user's own data -> a better bundle: how many tokens it keeps, in how few bits."""
