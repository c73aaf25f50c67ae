"""One protocol a file: what a trunk has learned."""
