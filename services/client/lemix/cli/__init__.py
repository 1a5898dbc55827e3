"""The `lemix` command: one file a subject, each with a `register`."""
