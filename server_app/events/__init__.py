"""Events of a run as typed records: their kinds, how they travel, and where they are stored."""
