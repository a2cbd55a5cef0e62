"""Losses and measures of rankings, made of the sorts."""
