"""What one user, or a few liars, cannot spoil: rules for the sum of a round, and a root set of the server's."""
