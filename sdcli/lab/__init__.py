"""What the commands that compare and show stand on: their specs, the plan and rows of `bench`, plots."""
