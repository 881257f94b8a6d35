"""Many processes as one run: mesh, sharding, collectives and checkpoints. Knows no recipe."""
