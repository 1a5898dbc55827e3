"""Cutting a Hugging Face model into pipeline stages, with the numbers of the whole model."""
