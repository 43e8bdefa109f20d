"""Dashboards as code: what Weights & Biases shows of a project's runs, as plain data, and how it gets there."""
