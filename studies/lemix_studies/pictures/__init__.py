"""Pictures of a report, drawn with matplotlib (in the extra ``studies``), which is imported only here."""
