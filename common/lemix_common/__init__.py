"""The vocabulary of a LeMix cluster: ids, messages, wire, keys, errors, settings, and the seams."""
