"""Step 2: the engines that answer and score. All obey the protocol of `tuneshift.engines.base`."""
