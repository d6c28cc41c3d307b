"""vtp.bench: measurements that anyone can repeat; each prints the command's own conditions."""
