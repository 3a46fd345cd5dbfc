"""The trainers: one loop that knows when, one task a trained thing that knows what."""
