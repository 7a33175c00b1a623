"""The rounds: roll call, strategy, aggregation, scores."""
