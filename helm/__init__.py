"""What the chart in `helm/sluice` is generated from: the schema of its values, its README, dashboards and alerts.

`python -m helm` writes them anew; tests compare. Nothing here is part of the application.
"""
