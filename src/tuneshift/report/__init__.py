"""Step 6: the report. It reads result files only and computes nothing that a stage did not measure."""
