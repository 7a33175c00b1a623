"""What a person reads of a run: tables, reports, pictures."""
