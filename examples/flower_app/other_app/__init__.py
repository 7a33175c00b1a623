"""A Flower app of its own that trains with quickbloom's MetaStrategy."""
