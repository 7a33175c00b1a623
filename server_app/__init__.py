"""What runs on the server: roll call, rounds, outer optimizer, run directory; and the `quickbloom` command."""
