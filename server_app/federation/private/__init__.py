"""What nobody learns of a single task: noise and its account, and sums of which the server sees no part."""
