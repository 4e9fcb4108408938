"""A Grafana dashboard for what ``metrics.prometheus`` exports.

::

    dashboard.py  ->  python -m tools.grafana  ->  croupier.json, to be imported in Grafana
    prometheus.yml     an example of how Prometheus finds a run's processes
"""
