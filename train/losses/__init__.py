"""The losses of pre-training and fine-tuning."""
