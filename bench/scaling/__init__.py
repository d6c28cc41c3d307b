"""What a request costs as it grows."""
