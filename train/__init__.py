"""The training half: pre-training, fine-tuning and evaluation on a cache. Never imports `preprocess`, dask or numba."""
