"""Stable Diffusion's parts as small functions over tensors. No specs, no printing."""
