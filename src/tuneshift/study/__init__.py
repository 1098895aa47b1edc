"""Studies: a grid of transfers over shared candidates, and one tidy table of what came of them."""
