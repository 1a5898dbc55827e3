"""The coordinator: decides where items run, which stage lives where, when a step runs and a version is published."""
