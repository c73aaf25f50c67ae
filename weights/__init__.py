"""Every public checkpoint, in and out."""
