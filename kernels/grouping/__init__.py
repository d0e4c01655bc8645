"""Grouping of rows by ids that are on the device."""
