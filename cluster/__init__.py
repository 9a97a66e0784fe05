"""Runs and shows the product on a cluster: demo, plans, manifests, dashboards, lists of runs."""
