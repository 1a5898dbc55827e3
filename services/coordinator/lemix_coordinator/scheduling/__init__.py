"""Where and when work runs: what it costs, what is predicted of it, and the policies that decide. All pure."""
