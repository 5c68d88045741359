"""samestep: one recipe, any backend, the same step. See README.md."""
