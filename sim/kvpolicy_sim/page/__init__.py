"""A replay as one self-contained page with pictures."""
