"""Whether a cache is what was written: as a whole, case by case, superpixel by superpixel."""
