"""The sections of the configuration, each with the units of its settings."""
