"""What an operator may set; presets and dashboards lie beside the code."""
