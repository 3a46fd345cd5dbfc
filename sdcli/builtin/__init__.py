"""The embedded model and the recipe that draws its training pictures."""
