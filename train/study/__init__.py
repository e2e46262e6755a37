"""Studies: arms x recipes x labelled counts x seeds: their declaration, the runner, and the results."""
