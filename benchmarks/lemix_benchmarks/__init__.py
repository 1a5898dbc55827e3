"""`lemix bench`: LeMix beside the bare machine and beside its peers, measured in the same run.

A bench is a module with a function ``run(plan) -> Findings``; `report` says how it is measured and what is printed.
"""
