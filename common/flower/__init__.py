"""Everything that touches what Flower does not promise."""
