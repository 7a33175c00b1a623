"""What a device tells its owner: what happened last, and what to do."""
