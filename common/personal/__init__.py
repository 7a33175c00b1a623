"""Checkpoints and personal models as files, and what settings in such a file are trusted."""
