"""What `sdcli serve` and those who let it draw have in common, and the side of the latter. No torch."""
