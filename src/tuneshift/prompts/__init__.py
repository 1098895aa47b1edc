"""Step 1: the generator's prompting, robust parsing of what it wrote, screening and stop rules."""
