"""Networks and their weights: the U-Net of the method, and reading, transferring and writing its tensors."""
