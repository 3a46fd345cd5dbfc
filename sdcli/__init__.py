"""sdcli: text-to-image from the command line, on Stable Diffusion's own parts."""

__version__ = "0.1.0"
