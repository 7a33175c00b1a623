"""The directory of a run: its history, checkpoints, trackers, and how a run is continued."""
