"""`quickbloom advise`: what to deploy for a user's own data, tried on validation users and told on one page."""
