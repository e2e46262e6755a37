"""The cache: its one declaration, its tables, its arrays as memory maps, and how they are written."""
