"""A cluster that exists only in numbers: the coordinator's policies over discrete events, equal runs of equal seeds."""

from lemix_studies.simulator.engine import simulate
from lemix_studies.simulator.idle import idle_times, slo_base_s
from lemix_studies.simulator.measuring import measures
from lemix_studies.simulator.scenario import Interval, Outcome, Record, Scenario

__all__ = [
    "Interval",
    "Outcome",
    "Record",
    "Scenario",
    "idle_times",
    "measures",
    "simulate",
    "slo_base_s",
]
