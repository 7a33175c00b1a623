"""Checkpoints and personal models as files, and what a file from elsewhere may do."""
