"""Self-contained HTML pages, and the curves and charts in them."""
