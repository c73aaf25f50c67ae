"""What a long run needs besides the loop."""
