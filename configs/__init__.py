"""The settings of an operator, with presets and dashboards beside the code."""
