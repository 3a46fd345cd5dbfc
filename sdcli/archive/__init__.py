"""What `meta` and `replay` stand on: a picture that is read, its settings as ours, its pixels compared."""
