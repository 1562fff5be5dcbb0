"""What the features are worth: equal-budget comparisons with an independent implementation."""
