"""Workloads, replays and their reports: what a cluster does with real arrivals and real text, measured from outside."""
