"""The paper's experiments: which points each has, how they are run, and what is made of their figures."""
