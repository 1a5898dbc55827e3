"""The stage worker: hosts pipeline stages on one accelerator, computes, and talks to its neighbours."""
