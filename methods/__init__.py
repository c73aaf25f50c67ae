"""Networks and methods, built by name."""
