"""The compressed form of a cache, for object stores and for keeping, and the way back."""
