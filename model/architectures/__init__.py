"""Families of models and our own decoder layers with torch."""
