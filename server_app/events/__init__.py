"""What happens in a run, as typed records: who makes them, how they travel, where they are kept."""
