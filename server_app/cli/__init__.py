"""The `quickbloom` command."""
