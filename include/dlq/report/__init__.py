"""The report of a drain: its account, drawn and written."""
