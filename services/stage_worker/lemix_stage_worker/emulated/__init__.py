"""Workers that wait instead of computing: real services, messages and steps on accelerators that aren't there."""
