"""What runs on the server: roll call, task choice, aggregation, outer optimizer, run directory; and the `quickbloom` command."""
