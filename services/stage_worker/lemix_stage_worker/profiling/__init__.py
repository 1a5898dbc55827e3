"""Measuring what work costs on each stage of a model, by running the very code that the cluster runs."""
