"""Step 5: evidence - paired evaluation, statistics and the verdict."""
