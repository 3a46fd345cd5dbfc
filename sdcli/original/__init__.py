"""Checkpoints in one file, in the naming of Stable Diffusion's authors: what they are, from their headers alone."""
